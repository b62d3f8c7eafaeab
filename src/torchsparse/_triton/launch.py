"""Launching: the device of the tensors, the current stream, nothing for an empty grid.

Every launch is one of these:

1. `launch` finds the kernel that was compiled for such arguments and calls its launcher directly
   with addresses and numbers. That launcher is no public interface of Triton, so whatever is not
   as in the versions it was tried with goes the public way, ``kernel[grid](...)``, which binds,
   specialises and looks up its arguments anew in every call (12.6 us on the host of an H100).
   So do the first launch of a kind, and all while a profiler listens.
2. A `Step` remembers what `launch` found, and need not look at what it is given.

A matrix that a kernel reads in blocks (`Blocks`) reaches the launcher as a map for the GPU's copy
engine. Triton makes one in every launch; a `Step` makes it once for each address.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

__all__ = [
    "Blocks",
    "Resolved",
    "Step",
    "cdiv",
    "compile_ahead",
    "launch",
    "next_power",
    "number_kind",
    "only_noted",
]


def _module(name: str) -> Any:
    """A part of Triton that an older one, or one without NVIDIA's backend, lacks."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_driver = _module("triton.backends.nvidia.driver")
# A matrix that a kernel reads in blocks: base, shape, strides, block_shape. None: there are none.
Blocks: Any = getattr(_module("triton.tools.tensor_descriptor"), "TensorDescriptor", None)
_knobs: Any = getattr(triton, "knobs", None)
MOST_MAPS = 4096  # that a `Step` keeps
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


class Resolved(NamedTuple):
    """A compiled kernel on one device."""

    start: Any  # the launcher's C function
    function: int  # handle
    cooperative: bool
    dependent: bool
    packed: Any
    constants: tuple[Any, ...]  # of the constexpr parameters, which stand last
    kernel: Any  # so that its id stays its own
    blocks: Any = ()  # of each parameter of type `Blocks`, what its map depends on


class _Launch(NamedTuple):
    """What `launch` was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    device: torch.device
    args: tuple[Any, ...]  # aligned tensors as their dtypes, so that nothing is kept alive
    options: dict[str, Any]


_noted: list[_Launch] | None = None  # a list while `compile_ahead` looks
_makes_maps = False  # whether it lets the kernels of maps run
MAPS = "torchsparse._triton.coords"  # where these are defined
_resolved: dict[Any, Resolved | None] = {}
_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_current: Any = getattr(torch._C, "_cuda_getDevice", lambda: -1)  # -1: the device of CPU tensors


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any
) -> Resolved | None:
    """Run ``kernel`` over ``grid`` on the device of ``like``, in its current stream.

    Args:
        kernel: A Triton function; its constexpr parameters stand behind all others.
        grid: One to three extents.
        like: A tensor on the device.
        *args: All parameters that are not constexpr: tensors, ints, floats or None.
        **options: The constexpr parameters, num_warps, num_stages.

    Returns:
        What the kernel is on this device for such arguments; None if it went the public way.
    """
    if 0 in grid:
        return None
    if _noted is not None:
        _noted.append(_Launch(kernel, grid, like.device, tuple(map(_light, args)), options))
        if not (_makes_maps and _of_maps(kernel)):
            return None
    if INTERPRETED:
        kernel[grid](*args, **options)
        return None
    device = like.get_device()
    if device < 0 or device == _current():
        return _start(kernel, grid, device, args, options)
    with torch.cuda.device(device):
        return _start(kernel, grid, device, args, options)


def _start(
    kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], options: dict[str, Any]
) -> Resolved | None:
    """Find the kernel by what its compilation depends on, and start it on the current device."""
    values: list[Any] = []
    kinds: list[Any] = [id(kernel), device]  # a kernel's own hash takes a microsecond
    give, add = values.append, kinds.append
    for arg in args:
        kind = type(arg)
        if kind is Tensor or isinstance(arg, Tensor):
            pointer = arg.data_ptr()
            give(pointer)
            add(arg.dtype)
            if pointer & 15:
                add("unaligned")
        elif kind is int:
            give(arg)
            add(2 + (arg & 15 == 0) if 1 < arg <= 2147483647 else number_kind(arg))
        else:
            give(arg)
            add(None if arg is None else kind)
            if kind is Blocks:
                add(_form_of(arg))
    key = (*kinds, *options, *options.values())
    known = _resolved.get(key)
    if known is None or watched():
        compiled = kernel[grid](*args, **options)
        if key not in _resolved:
            _resolved[key] = _resolve(kernel, compiled, len(args), options)
        return None
    if known.blocks:
        values = _with_maps(values, known.blocks)
    extents = len(grid)
    known.start(
        grid[0],
        grid[1] if extents > 1 else 1,
        grid[2] if extents > 2 else 1,
        _stream(device),
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
    return known


def number_kind(value: int) -> int:
    """What a compilation knows of a number: 1 is a constant, multiples of 16 are known as such,
    and so is what needs more than 32 bits."""
    wide = not -2147483648 <= value <= 2147483647
    return 1 if value == 1 else 2 + (value & 15 == 0) + 2 * wide


class Step:
    """A kernel whose launches differ in addresses, plain numbers and grid alone::

        kernel[grid](*tensors, *numbers, **options)

    `launch` finds the kernel by looking at each argument, which takes longer than starting it
    (of 15 arguments 6.0 us, a `Step` 2.6 us). Here the caller sees to it that what stands at one
    place has always the same dtype, or is always None, that numbers on which the kernel is
    specialised stay of one kind (`number_kind`), and that the others fit into 32 bits.
    """

    __slots__ = ("_known", "_maps", "kernel", "options")

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options
        self._known: dict[int, Resolved] = {}  # by device
        self._maps: dict[tuple[int, int], tuple[Any, ...]] = {}  # by device and address

    def __call__(
        self, grid: tuple[int, int], tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]
    ) -> None:
        """Launch on the device of the first tensor, in its current stream; nothing for an empty
        grid."""
        bits = 0
        values: list[Any] = []
        for tensor in tensors:
            if tensor is None:
                values.append(None)
            else:
                pointer = tensor.data_ptr()
                bits |= pointer
                values.append(pointer)
        values.extend(numbers)
        like: Any = tensors[0]
        if not self.again(like.get_device(), grid, bits, values):
            self.find(grid, like, (*tensors, *numbers))

    def again(self, device: int, grid: tuple[int, int], bits: int, values: Iterable[Any]) -> bool:
        """Launch with these addresses and numbers, if the kernel is known for them.

        Args:
            device: Index of the tensors' device.
            grid: Two extents.
            bits: All addresses, or-ed.
            values: Addresses and numbers, in the order of the parameters.
        """
        known = self._known.get(device)
        if known is None or bits & 15 or INTERPRETED or watched():
            return False
        x, y = grid
        if not x or not y or (device >= 0 and device != _current()):
            return False
        start, function, cooperative, dependent, packed, constants, *_ = known
        start(
            x, y, 1, _stream(device), function, cooperative, dependent, None, None, packed,
            None, None, None, *values, *constants,
        )  # fmt: skip
        return True

    def mapped(
        self, device: int, tensor: Tensor, make: Callable[[Tensor], Any]
    ) -> tuple[Any, ...]:
        """``make(tensor)``, which is of type `Blocks`, as `again` wants it among its values.

        Equal addresses mean equal blocks; a map holds nothing of what lies there.
        """
        address = tensor.data_ptr()
        found = self._maps.get((device, address))
        if found is None:
            known = self._known.get(device)
            if known is None:
                return ()  # `again` will say so
            if len(self._maps) >= MOST_MAPS:
                self._maps.clear()
            found = self._maps[device, address] = tuple(_map(make(tensor), known.blocks[0]))
        return found

    def find(self, grid: tuple[int, int], like: Tensor, args: tuple[Any, ...]) -> None:
        """`launch`, with tensors in place of addresses; what it finds is kept for `again`."""
        known = launch(self.kernel, grid, like, *args, **self.options)
        tensors = (arg for arg in args if isinstance(arg, Tensor))
        if known is not None and all(tensor.data_ptr() & 15 == 0 for tensor in tensors):
            self._known[like.get_device()] = known


def only_noted() -> bool:
    """Whether launches are looked at and left out: `compile_ahead`."""
    return _noted is not None


def watched() -> bool:
    """Whether somebody wants to see every launch: `compile_ahead`, or a profiler."""
    runtime = _knobs.runtime
    return bool(
        _noted is not None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    )


def _resolve(kernel: Any, compiled: Any, given: int, options: dict[str, Any]) -> Resolved | None:
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
    about = getattr(compiled, "metadata", None)
    start, blocks = run.launch, tuple(getattr(about, "tensordesc_meta", None) or ())
    if blocks:
        start = _behind(start)
        if start is None:
            return None
    return Resolved(
        start,
        compiled.function,
        run.launch_cooperative_grid,
        run.launch_pdl,
        compiled.packed_metadata,
        tuple(options[name] for name in names),
        kernel,
        blocks,
    )


def _behind(wrapper: Any) -> Any:
    """The launcher that takes maps, behind the function that makes them in every launch."""
    names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
    if "launcher" not in names or not hasattr(_driver, "make_tensordesc_arg"):
        return None
    return wrapper.__closure__[names.index("launcher")].cell_contents


def _map(blocks: Any, about: Any) -> list[Any]:
    """What stands in the place of one argument: a map, shape, strides."""
    return _driver.make_tensordesc_arg(blocks, about)


def _with_maps(values: list[Any], about: tuple[Any, ...]) -> list[Any]:
    """The same arguments, each of type `Blocks` replaced."""
    left, found = iter(about), []
    for value in values:
        found += _map(value, next(left)) if type(value) is Blocks else [value]
    return found


def compile_ahead(
    calls: Iterable[Callable[[], Any]], *, maps_only: bool = False, make_maps: bool = False
) -> int:
    """Compile what calls would launch, several kernels at once, and launch nothing.

    Their results are garbage. A kernel that does not compile says so when it is launched.

    Args:
        calls: Whose launches to look at, those of autograd's threads included.
        maps_only: Compile the kernels of maps alone.
        make_maps: Let these run, so that the sizes of levels are the true ones.

    Returns:
        The number of kernels.
    """
    global _noted, _makes_maps
    noted: list[_Launch] = []
    _noted, _makes_maps = noted, make_maps
    try:
        for call in calls:
            call()
    finally:
        _noted, _makes_maps = None, False
    kernels = different(job for job in noted if not maps_only or _of_maps(job.kernel))
    if kernels and not INTERPRETED:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_compile, kernels.values()))
    return len(kernels)


def different(jobs: Iterable[_Launch]) -> dict[Hashable, _Launch]:
    """One launch for each kernel that has to be compiled."""
    return {
        (job.kernel, job.device, *map(_kind, job.args), *job.options.items()): job for job in jobs
    }


def _of_maps(kernel: Any) -> bool:
    return kernel.fn.__module__.startswith(MAPS)


def _light(arg: Any) -> Any:
    """An argument as `warmup` understands it."""
    return arg.dtype if isinstance(arg, Tensor) and arg.data_ptr() % 16 == 0 else arg


def _kind(arg: Any) -> Any:
    """What a compilation depends on."""
    if isinstance(arg, Tensor):
        return arg.dtype, False
    if type(arg) is int:
        return arg % 16 == 0, arg == 1, -2147483648 <= arg <= 2147483647
    if type(arg) is Blocks:
        return _form_of(arg)
    return arg if isinstance(arg, torch.dtype) else type(arg)


def _form_of(blocks: Any) -> Hashable:
    """What a compilation depends on."""
    return blocks.base.dtype, *blocks.block_shape


def _compile(job: _Launch) -> None:
    # LLVM and ptxas run without Python's lock; `warmup` is Triton's public way to compile.
    try:
        with torch.cuda.device(job.device):
            job.kernel.warmup(*job.args, grid=job.grid, **job.options)
    except Exception:  # whatever it is, the launch will raise it again
        return
