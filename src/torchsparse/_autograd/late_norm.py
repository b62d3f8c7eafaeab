"""Batch normalisation in training, put off until a sum and an activation have joined it.

Its statistics are taken at once, and the running ones with them: only the pass that writes the
features waits. With gradients, that pass is one node of the graph. So if somebody still holds the
features in between, they are computed on their own and what follows is computed from them, as
without joining: a hook on them, or `retain_grad`, then sees what it would have seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, relu

from torchsparse._autograd.batch_norm import normalise_batch
from torchsparse._lazy import Lazy, _open, close_chain
from torchsparse._ops.batch_norm import batch_moments_
from torchsparse._recipe import Epilogue

__all__ = ["late_batch_norm"]


def late_batch_norm(
    feats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    eps: float,
    limit: Tensor | None = None,
) -> Lazy:
    """Normalise by the statistics of these rows, when somebody needs it.

    Args:
        feats: [N, C] floating, N >= 2.
        weight, bias: [C] or None.
        mean, var, batches: Running statistics, which follow now, as in `batch_moments_`.
        momentum, eps: Of ``nn.BatchNorm1d``.
        limit: [1] int64 on the device, how many rows are real (`_capacity`); None: all.

    Returns:
        [N, C] in the dtype of feats, with gradients if they are enabled now.
    """
    moments = batch_moments_(feats, eps, mean, var, batches, momentum, limit)
    make = _Pass(feats, weight, bias, moments, eps, limit)
    inputs = tuple(t for t in (feats, weight, bias) if t is not None)
    shape = (feats.shape[0], feats.shape[1])
    chain = _LateNorm(make, shape, feats.dtype, feats.device, inputs)
    chain.epilogue = NOTHING  # not None: no other normalisation joins
    return chain


NOTHING = Epilogue()


class _Pass:
    """The pass that writes the features of a chain."""

    __slots__ = ("bias", "eps", "feats", "learns", "limit", "moments", "weight")

    def __init__(
        self,
        feats: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Tensor,
        eps: float,
        limit: Tensor | None,
    ) -> None:
        self.feats, self.weight, self.bias = feats, weight, bias
        self.moments, self.eps, self.limit = moments, eps, limit
        self.learns = torch.is_grad_enabled()

    def __call__(self, epilogue: Epilogue | None) -> Tensor:
        _, residual, slope = epilogue or NOTHING
        return normalise_batch(
            self.feats,
            self.weight,
            self.bias,
            residual,
            self.moments,
            slope,
            self.eps,
            self.limit,
        )


class _FromLiving:
    """The same, but from the features that came before if somebody still holds them, unchanged."""

    __slots__ = ("before", "learns", "make", "parent")

    def __init__(self, parent: _LateNorm) -> None:
        self.parent, self.before = weakref.ref(parent), parent.epilogue
        self.make: Any = parent.make
        self.learns: bool = parent.learns

    def __call__(self, epilogue: Epilogue | None) -> Tensor:
        parent = self.parent()
        if parent is None or parent.epilogue is not self.before:
            return self.make(epilogue)
        old, new = self.before or NOTHING, epilogue or NOTHING
        value = parent.value()
        if old.residual is None and new.residual is not None:
            value = value + new.residual
        if old.slope is None and new.slope is not None:
            value = leaky_relu(value, new.slope) if new.slope else relu(value)
        return value


class _LateNorm(Lazy):
    """Computed with gradients if they were enabled where the chain began."""

    __slots__ = ()

    @property
    def learns(self) -> bool:
        make: Any = self.make
        return make.learns

    def _compute(self) -> Tensor:
        learns = self.learns
        if torch.is_grad_enabled() is learns:
            return self._in_stream()
        with torch.inference_mode(False), torch.set_grad_enabled(learns):
            return self._in_stream()

    def _extended(self, epilogue: Epilogue, *more: Any) -> Lazy:
        make = _FromLiving(self)
        new = super()._extended(epilogue, *more)
        new.make = make
        return new

    def plus(self, residual: Tensor) -> Lazy | None:
        now = self.epilogue or NOTHING
        fits = residual.dtype == self.dtype and residual.shape == self.shape
        fits &= residual.device == self.device
        if self.done or not fits or now.residual is not None or now.slope is not None:
            return None
        # With gradients, a sum without any is no part of the node.
        learns = self.learns
        if torch.is_grad_enabled() is not learns and (learns or residual.requires_grad):
            return None
        if self._needed_by_others():
            return None
        return self._extended(Epilogue(None, residual, None), residual)

    def rectified(self, slope: float, inplace: bool) -> Lazy | None:
        if self.done:
            return None
        # A negative slope hides the sign of what it was applied to.
        if self.learns and not (torch.is_grad_enabled() and slope >= 0):
            return None
        if not inplace and self._needed_by_others():
            return None
        return super().rectified(slope, inplace)

    def _needed_by_others(self) -> bool:
        """Close what else is open: it may have begun with these features."""
        now = _open.chain
        if now is not None and now() is not self:
            close_chain()
        return self.done
