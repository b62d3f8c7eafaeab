"""Features that are computed when somebody needs them, so that what follows can join.

In evaluation a convolution is mostly followed by a normalisation, a residual sum and an
activation. Each of these, if it is next, adds itself to the `Epilogue` of features that are still
to be computed, and the convolution applies all of them while its sums are in registers. Whoever
looks at the features before gets them as they would be without this.

In training a batch norm begins such a chain, one node of the graph: see `_autograd.late_norm`.

At most one chain is open per thread: looking at the features of any sparse tensor, and beginning
another chain, closes it. So a chain never outlives the operations right behind its convolution.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from torchsparse._compiling import runs_while_tracing
from torchsparse._recipe import Epilogue, Norm

__all__ = ["Lazy", "close_chain"]


NOTHING = Epilogue()


class _StaleError(RuntimeError):
    """An input was written to, or replaced, before it was needed."""


class _Open(threading.local):
    chain: weakref.ref[Lazy] | None = None


_open = _Open()


@runs_while_tracing
def close_chain() -> None:
    """Compute what is still open in this thread, if anybody holds it.

    Where an input has changed since, whoever asks for these features is told, nobody else.
    """
    now = _open.chain
    if now is not None:
        chain = now()
        _open.chain = None
        if chain is not None:
            try:
                chain.value()
            except _StaleError:
                pass


def _state(tensors: tuple[Tensor, ...]) -> int:
    """Changes if one of them is written to, or gets other memory, as where a module is moved or
    cast. Tensors of inference mode do not count what is written to them."""
    total = 0
    if torch.is_inference_mode_enabled():
        for tensor in tensors:
            total += tensor.data_ptr()
            if not tensor.is_inference():
                total += tensor._version
        return total
    try:
        for tensor in tensors:
            total += tensor.data_ptr() + tensor._version
    except RuntimeError:  # some come from inference mode, which costs time only here
        total = sum(tensor.data_ptr() for tensor in tensors)
        total += sum(tensor._version for tensor in tensors if not tensor.is_inference())
    return total


_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream(tensor: Tensor) -> int:
    """The current stream of its device; 0 on a CPU."""
    if not tensor.is_cuda:
        return 0
    if _raw_stream is not None:
        return _raw_stream(tensor.get_device())
    return torch.cuda.current_stream(tensor.device).cuda_stream


class Lazy:
    """Features [M, C] to be computed by ``make(epilogue)``."""

    __slots__ = (
        "__weakref__", "_state", "_stream", "_value", "device", "dtype", "epilogue", "inputs",
        "make", "shape",
    )  # fmt: skip

    def __init__(
        self,
        make: Callable[[Epilogue | None], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        inputs: tuple[Tensor, ...],
    ) -> None:
        """Open a chain, closing another.

        Args:
            make: Computes the features with an epilogue.
            shape, dtype, device: Of the features.
            inputs: What ``make`` reads; nobody may change it in between.
        """
        close_chain()
        self.make, self.shape, self.dtype, self.device = make, shape, dtype, device
        self.inputs = inputs
        self.epilogue: Epilogue | None = None
        self._state = _state(inputs)
        self._stream = _stream(inputs[0])
        self._value: Tensor | None = None
        _open.chain = weakref.ref(self)

    @property
    def done(self) -> bool:
        """Whether the features have been computed."""
        return self._value is not None

    def value(self) -> Tensor:
        """The features.

        Raises:
            RuntimeError: An input was written to or replaced since; its old values are gone.
        """
        if self._value is None:
            try:
                if self._state != _state(self.inputs):
                    raise _StaleError(
                        "features or weights were changed in place, moved or cast before a "
                        "convolution that reads them was needed; read its `feats` first, or set "
                        "torchsparse.backends.fuse = False"
                    )
                self._value = self._compute()
                del self.make, self.inputs
            except AttributeError:
                if self._value is None:
                    raise  # no other thread was at the same and let go of them before
        return self._value  # pyright: ignore[reportReturnType]

    def _compute(self) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._in_stream()
        return self._in_stream()

    def _in_stream(self) -> Tensor:
        if _stream(self.inputs[0]) == self._stream:
            return self.make(self.epilogue)
        # Asked for from another stream: computed where it was called, and waited for.
        if self._stream:
            there = torch.cuda.ExternalStream(self._stream, device=self.device)
        else:  # an external stream of address 0 would be another one
            there = torch.cuda.default_stream(self.device)
        with torch.cuda.stream(there):
            value = self.make(self.epilogue)
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(there)
        value.record_stream(here)
        return value

    def _extended(self, epilogue: Epilogue, *more: Tensor) -> Lazy:
        """These features with an epilogue that reads ``more``, as the last of their chain."""
        now = _open.chain
        if now is not None and now() is not self:
            close_chain()
        new: Lazy = object.__new__(type(self))
        new.make, new.shape, new.dtype, new.device = self.make, self.shape, self.dtype, self.device
        new.inputs, new.epilogue = self.inputs + more, epilogue
        new._state = self._state + _state(more) if more else self._state
        new._stream, new._value = self._stream, None
        _open.chain = weakref.ref(new)
        return new

    def normalised(self, norm: Norm) -> Lazy | None:
        """These features, normalised; None if something else came before."""
        if self._value is not None or self.epilogue is not None:
            return None
        mean, var, weight, bias, _ = norm
        if weight is None or bias is None:
            return self._extended(Epilogue(norm), mean, var)
        return self._extended(Epilogue(norm), mean, var, weight, bias)

    def plus(self, residual: Tensor) -> Lazy | None:
        """These features plus others; None if they cannot join."""
        now = self.epilogue or NOTHING
        fits = residual.dtype == self.dtype and residual.shape == self.shape
        learns = torch.is_grad_enabled() and residual.requires_grad
        if self.done or learns or not fits or now.residual is not None or now.slope is not None:
            return None
        return self._extended(now._replace(residual=residual), residual)

    def rectified(self, slope: float, inplace: bool) -> Lazy | None:
        """These features with negative values times ``slope``; None if they cannot join.

        In place, whoever holds these features sees the new ones.
        """
        norm, residual, before = self.epilogue or NOTHING
        if self._value is not None or before is not None:
            return None
        epilogue = Epilogue(norm, residual, slope)
        if inplace:
            self.epilogue = epilogue
            return self
        return self._extended(epilogue)
