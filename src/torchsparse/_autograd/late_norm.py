"""Batch normalisation in training, put off until a sum and an activation have joined it.

Its statistics are taken at once, and the running ones with them: only the pass that writes the
features waits. With gradients, that pass is one node of the graph. So if somebody still holds the
features in between, they are computed on their own and what follows is computed from them, as
without joining: a hook on them, or `retain_grad`, then sees what it would have seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, relu

from torchsparse._autograd.batch_norm import normalise_batch
from torchsparse._lazy import Lazy
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
) -> Lazy:
    """Normalise by the statistics of these rows, when somebody needs it.

    Args:
        feats: [N, C] floating, N >= 2.
        weight, bias: [C] or None.
        mean, var, batches: Running statistics, which follow now, as in `batch_moments_`.
        momentum, eps: Of ``nn.BatchNorm1d``.

    Returns:
        [N, C] in the dtype of feats, with gradients if they are enabled now.
    """
    moments = batch_moments_(feats, eps, mean, var, batches, momentum)

    def make(epilogue: Epilogue | None) -> Tensor:
        _, residual, slope = epilogue or NOTHING
        return normalise_batch(feats, weight, bias, residual, moments, slope, eps)

    inputs = tuple(t for t in (feats, weight, bias) if t is not None)
    return _LateNorm(
        make, (feats.shape[0], feats.shape[1]), feats.dtype, feats.device, inputs, NOTHING
    )


NOTHING = Epilogue()


class _LateNorm(Lazy):
    """Its epilogue is never None, so that no other normalisation joins."""

    __slots__ = ("_learns",)

    def __init__(
        self,
        make: Callable[[Epilogue | None], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        inputs: tuple[Tensor, ...],
        epilogue: Epilogue | None = None,
        parent: _LateNorm | None = None,
    ) -> None:
        super().__init__(make, shape, dtype, device, inputs, epilogue, parent)
        self._learns = torch.is_grad_enabled() if parent is None else parent._learns

    def _compute(self) -> Tensor:
        if torch.is_grad_enabled() is self._learns:
            return self._in_stream()
        with torch.inference_mode(False), torch.set_grad_enabled(self._learns):
            return self._in_stream()

    def _extended(self, epilogue: Epilogue, *more: Tensor | None) -> Lazy:
        inputs = (*self.inputs, *(t for t in more if t is not None))
        make = _from_living(weakref.ref(self), self.epilogue, self.make)
        return _LateNorm(make, self.shape, self.dtype, self.device, inputs, epilogue, self)

    def plus(self, residual: Tensor) -> Lazy | None:
        # With gradients, a sum without any is no part of the node.
        if torch.is_grad_enabled() is not self._learns and (
            self._learns or residual.requires_grad
        ):
            return None
        now = self.epilogue or NOTHING
        fits = residual.dtype == self.dtype and residual.shape == self.shape
        fits &= residual.device == self.device
        if self.done or not fits or now.residual is not None or now.slope is not None:
            return None
        return self._extended(now._replace(residual=residual), residual)

    def rectified(self, slope: float, inplace: bool) -> Lazy | None:
        # A negative slope hides the sign of what it was applied to.
        if self._learns and not (torch.is_grad_enabled() and slope >= 0):
            return None
        return super().rectified(slope, inplace)


def _from_living(
    parent: weakref.ref[_LateNorm],
    before: Epilogue | None,
    make: Callable[[Epilogue | None], Tensor],
) -> Callable[[Epilogue | None], Tensor]:
    """``make``, but from the features of ``parent`` if somebody still holds them, unchanged."""

    def made(epilogue: Epilogue | None) -> Tensor:
        one = parent()
        if one is None or one.epilogue is not before:
            return make(epilogue)
        old, new = before or NOTHING, epilogue or NOTHING
        value = one.value()
        if old.residual is None and new.residual is not None:
            value = value + new.residual
        if old.slope is None and new.slope is not None:
            value = leaky_relu(value, new.slope) if new.slope else relu(value)
        return value

    return made
