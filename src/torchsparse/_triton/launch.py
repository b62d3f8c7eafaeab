"""Launching: the device of the tensors, the current stream, nothing for an empty grid.

``kernel[grid](...)`` binds, specialises and looks up its arguments anew in every call (12.6 us on
the host of an H100). Here the compiled kernel is resolved once per kind of arguments and its
launcher called directly. That launcher is no public interface of Triton, so whatever is not as
in the versions it was tried with goes the public way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

__all__ = ["cdiv", "compile_ahead", "launch", "next_power"]

_knobs: Any = getattr(triton, "knobs", None)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


class _Resolved(NamedTuple):
    """A compiled kernel on one device."""

    start: Any  # the launcher's C function
    function: int  # handle
    cooperative: bool
    dependent: bool
    packed: Any
    constants: tuple[Any, ...]  # of the constexpr parameters, which stand last


class _Launch(NamedTuple):
    """What `launch` was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    device: torch.device
    args: tuple[Any, ...]  # aligned tensors as their dtypes, so that nothing is kept alive
    options: dict[str, Any]


_noted: list[_Launch] | None = None  # a list while `compile_ahead` looks
_resolved: dict[Any, _Resolved | None] = {}
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    like: Tensor,
    *args: Any,
    memo: Any = None,
    **options: Any,
) -> None:
    """Run ``kernel`` over ``grid`` on the device of ``like``, in its current stream.

    Args:
        kernel: A Triton function; its constexpr parameters stand behind all others.
        grid: One to three extents.
        like: A tensor on the device.
        *args: All parameters that are not constexpr: tensors, ints, floats or None.
        memo: None, or a dictionary and a key in it that determine the kernel, the device, the
            options, all numbers and the dtypes of all tensors: these are then not looked at.
        **options: The constexpr parameters, num_warps, num_stages.
    """
    if 0 in grid:
        return
    device = like.device
    if _noted is not None:
        _noted.append(_Launch(kernel, grid, device, tuple(map(_light, args)), options))
    elif INTERPRETED:
        kernel[grid](*args, **options)
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _start(kernel, grid, device.index, args, options, memo)
    else:
        _start(kernel, grid, device.index, args, options, memo)


def _start(
    kernel: Any,
    grid: tuple[int, ...],
    device: int | None,
    args: tuple[Any, ...],
    options: dict[str, Any],
    memo: tuple[dict[Any, Any], Any] | None = None,
) -> None:
    values: list[Any] = []
    pointers = 0
    for arg in args:
        if isinstance(arg, Tensor):
            pointer = arg.data_ptr()
            pointers |= pointer
            values.append(pointer)
        else:
            values.append(arg)
    where, key = _resolved, None
    if memo is None:
        key = _kinds(kernel, device, args, options)
    elif pointers & 15 == 0:  # a kernel by memo is compiled for aligned tensors
        where, key = memo
    known = None if key is None else where.get(key)
    if known is None or _hooked():
        compiled = kernel[grid](*args, **options)
        if key is not None and key not in where:
            where[key] = _resolve(kernel, compiled, len(args), options)
        return
    known.start(
        grid[0],
        grid[1] if len(grid) > 1 else 1,
        grid[2] if len(grid) > 2 else 1,
        _stream(device),  # pyright: ignore[reportOptionalCall]  # checked by _resolve
        known.function,
        known.cooperative,
        known.dependent,
        None,
        None,
        known.packed,
        None,
        None,
        None,
        *values,
        *known.constants,
    )


def _kinds(
    kernel: Any, device: int | None, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, ...]:
    """What a compiled kernel depends on: dtypes, alignment, and the kind of each number."""
    kinds: list[Any] = [kernel, device]
    add = kinds.append
    for arg in args:
        kind = type(arg)
        if kind is int:
            wide = not -2147483648 <= arg <= 2147483647
            add(1 if arg == 1 else 2 + (arg & 15 == 0) + 2 * wide)
        elif isinstance(arg, Tensor):
            add(arg.dtype)
            add(arg.data_ptr() & 15 == 0)
        else:
            add(None if arg is None else kind)
    kinds.extend(options.items())
    return tuple(kinds)


def _hooked() -> bool:
    """Whether a profiler wants to see launches."""
    runtime = _knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _resolve(kernel: Any, compiled: Any, given: int, options: dict[str, Any]) -> _Resolved | None:
    """What a direct launch needs; None where this Triton is built differently."""
    if _stream is None or not triton.__version__.startswith("3.6."):
        return None
    if not hasattr(_knobs.runtime.launch_enter_hook, "calls"):
        return None
    run = compiled.run
    wanted = ("launch", "global_scratch_size", "profile_scratch_size")
    if not all(hasattr(run, name) for name in wanted):
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    names = kernel.arg_names[given:]
    if any(name not in options for name in names):
        return None
    return _Resolved(
        run.launch,
        compiled.function,
        run.launch_cooperative_grid,
        run.launch_pdl,
        compiled.packed_metadata,
        tuple(options[name] for name in names),
    )


def compile_ahead(calls: Iterable[Callable[[], Any]]) -> int:
    """Compile what calls would launch, several kernels at once, and launch nothing.

    Their results are garbage. A kernel that does not compile says so when it is launched.

    Returns:
        The number of kernels.
    """
    global _noted
    _noted = noted = []
    try:
        for call in calls:
            call()
    finally:
        _noted = None
    kernels = {
        (job.kernel, job.device, *map(_kind, job.args), *job.options.items()): job for job in noted
    }
    if kernels and not INTERPRETED:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_compile, kernels.values()))
    return len(kernels)


def _light(arg: Any) -> Any:
    """An argument as `warmup` understands it."""
    return arg.dtype if isinstance(arg, Tensor) and arg.data_ptr() % 16 == 0 else arg


def _kind(arg: Any) -> Any:
    """What a compilation depends on."""
    if isinstance(arg, Tensor):
        return arg.dtype, False
    if type(arg) is int:
        return arg % 16 == 0, arg == 1, -2147483648 <= arg <= 2147483647
    return arg if isinstance(arg, torch.dtype) else type(arg)


def _compile(job: _Launch) -> None:
    # LLVM and ptxas run without Python's lock; `warmup` is Triton's public way to compile.
    try:
        with torch.cuda.device(job.device):
            job.kernel.warmup(*job.args, grid=job.grid, **job.options)
    except Exception:  # whatever it is, the launch will raise it again
        return
