"""Launching: what is remembered, and when the public way is taken. Kernels are fakes."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from torchsparse._triton import launch as module
from torchsparse._triton.launch import Step, cdiv, compile_ahead, launch, next_power

STREAM = 77
KNOBS: Any = importlib.import_module("triton.knobs")


class Kernel:
    """Counts its launches on the public way; what it compiles to counts the direct ones."""

    def __init__(self) -> None:
        self.arg_names: tuple[str, ...] = ("x", "n", "BLOCK")
        self.public: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []
        self.run = SimpleNamespace(
            launch=lambda *args: self.direct.append(args),
            global_scratch_size=0,
            profile_scratch_size=0,
            launch_cooperative_grid=False,
            launch_pdl=False,
        )

    def __getitem__(self, grid: tuple[int, ...]):
        def start(*args: Any, **options: Any) -> Any:
            self.public.append((grid, args, options))
            return SimpleNamespace(run=self.run, function=5, packed_metadata=("packed",))

        return start

    @property
    def ways(self) -> tuple[int, int]:
        return len(self.public), len(self.direct)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A fake kernel in a process that seems to have a GPU and nothing launched."""
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "_stream", lambda device: STREAM)
    monkeypatch.setattr(module, "_resolved", {})
    return Kernel()


def start(kernel: Kernel, n: int = 100, x: torch.Tensor | None = None, block: int = 64) -> None:
    x = torch.zeros(8) if x is None else x
    launch(kernel, (3,), x, x, n, BLOCK=block, num_warps=2)


def test_the_second_launch_is_direct(kernel: Kernel) -> None:
    x = torch.zeros(8)
    start(kernel, 100, x)
    start(kernel, 101, x)
    assert kernel.ways == (1, 1)
    assert kernel.public == [((3,), (x, 100), {"BLOCK": 64, "num_warps": 2})]
    # Extents, stream, function, flags, metadata; then the arguments, constexpr ones last.
    assert kernel.direct == [
        (3, 1, 1, STREAM, 5, False, False, None, None, ("packed",), None, None, None,
         x.data_ptr(), 101, 64)
    ]  # fmt: skip


@pytest.mark.parametrize("n", [1, 16, 96, 1 << 31, -(1 << 31) - 1])
def test_numbers_that_compile_to_other_code_are_other_kernels(n: int, kernel: Kernel) -> None:
    """1 is a constant, multiples of 16 are known to be such, large ones have 64 bits."""
    start(kernel, 100)
    start(kernel, n)
    assert kernel.ways == (2, 0)
    start(kernel, n)
    assert kernel.ways == (2, 1)


@pytest.mark.parametrize("n", [2, 7, 99, 101, -3, (1 << 31) - 1])
def test_other_numbers_share_a_kernel(n: int, kernel: Kernel) -> None:
    """Clouds differ in their number of rows: each new one must not take the slow way."""
    start(kernel, 100)
    start(kernel, n)
    assert kernel.ways == (1, 1)


def test_tensors_differ_by_dtype_and_alignment(kernel: Kernel) -> None:
    whole = torch.zeros(80)
    start(kernel, x=whole)
    start(kernel, x=whole[4:])  # 16 bytes on
    assert kernel.ways == (1, 1)
    start(kernel, x=whole[1:])
    start(kernel, x=whole[2:])  # neither is aligned
    assert kernel.ways == (2, 2)
    start(kernel, x=whole.half())
    start(kernel, block=32)
    assert kernel.ways == (4, 2)


def test_none_and_floats(kernel: Kernel) -> None:
    kernel.arg_names = ("x", "a", "BLOCK")
    x = torch.zeros(8)
    for a in (None, 0.5, 0.75, None):
        launch(kernel, (1,), x, x, a, BLOCK=1)
    assert kernel.ways == (2, 2)
    assert [args[-2] for args in kernel.direct] == [0.75, None]


def repeated(kernel: Kernel, x: torch.Tensor) -> Any:
    """A function that makes ``kernel[3, 2](y, x, 0.5, 7)`` again for any ``y``."""
    kernel.arg_names = ("y", "x", "eps", "n", "BLOCK")
    step = Step(kernel, BLOCK=64)

    def make(y: torch.Tensor) -> bool:
        values = (y.data_ptr(), x.data_ptr(), 0.5, 7)
        done = step.again(y.get_device(), (3, 2), values[0] | values[1], values)
        if not done:
            step.find((3, 2), y, (y, x, 0.5, 7))
        return done

    return make


def test_a_step_gives_tensors_to_the_public_way_and_addresses_to_the_direct_one(
    kernel: Kernel,
) -> None:
    kernel.arg_names = ("y", "x", "limit", "n", "BLOCK")
    step, x, y = Step(kernel, BLOCK=64), torch.zeros(8), torch.zeros(80)
    for grid in ((3, 2), (4, 1), (5, 6)):
        step(grid, (y, x, None), (7,))
    assert kernel.public == [((3, 2), (y, x, None, 7), {"BLOCK": 64})]
    same = (1, STREAM, 5, False, False, None, None, ("packed",), None, None, None)
    given = (y.data_ptr(), x.data_ptr(), None, 7, 64)
    assert kernel.direct == [(4, 1, *same, *given), (5, 6, *same, *given)]
    step((0, 2), (y, x, None), (7,))
    step((2, 0), (y, x, None), (7,))
    step((3, 2), (y[1:], x, None), (7,))  # not aligned: another kernel
    assert kernel.ways == (2, 2)


def test_a_step_is_interpreted_like_any_launch(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it was found directly before: `benchmarks.host` launches nothing at all."""
    step, x = Step(kernel, BLOCK=64), torch.zeros(8)
    for _ in range(3):
        step((3, 1), (x,), (7,))
    monkeypatch.setattr(module, "INTERPRETED", True)
    step((3, 1), (x,), (7,))
    assert kernel.ways == (2, 2)


def test_a_repeated_launch_remembers_all_but_addresses(kernel: Kernel) -> None:
    x, y = torch.zeros(8), torch.zeros(80)
    make = repeated(kernel, x)
    # The first is public, the second finds what it compiled, the others need not look.
    assert [make(y), make(y), make(y), make(y[4:])] == [False, False, True, True]
    assert kernel.ways == (1, 3)
    same = (3, 2, 1, STREAM, 5, False, False, None, None, ("packed",), None, None, None)
    addresses = (y.data_ptr(), y.data_ptr(), y[4:].data_ptr())
    assert kernel.direct == [(*same, at, x.data_ptr(), 0.5, 7, 64) for at in addresses]


def test_unaligned_tensors_have_a_kernel_of_their_own(kernel: Kernel) -> None:
    """What was compiled for them must not serve aligned ones, nor the other way round."""
    y = torch.zeros(80)
    make = repeated(kernel, torch.zeros(8))
    assert not any(make(y[1:]) for _ in range(3))
    assert kernel.ways == (1, 2)  # but it is launched directly
    assert [make(y), make(y), make(y), make(y[1:])] == [False, False, True, False]
    assert kernel.ways == (2, 5)
    make = repeated(kernel, y[1:])
    assert not any(make(y) for _ in range(3))


class Reads(Kernel):
    """A kernel of which the first parameter is read in blocks: its launcher has a wrapper that
    makes maps, as Triton's has."""

    def __init__(self, name: str = "launcher") -> None:
        super().__init__()
        self.made: list[Any] = []
        launcher: Any = self.run.launch
        if name == "launcher":

            def inner(*args: Any) -> Any:
                return launcher("wrapped", *args)
        else:

            def inner(*args: Any) -> Any:
                return self.direct.append(("wrapped", *args))

        self.run.launch = inner

    def __getitem__(self, grid: tuple[int, ...]):
        start = super().__getitem__(grid)

        def described(*args: Any, **options: Any) -> Any:
            compiled = start(*args, **options)
            compiled.metadata = SimpleNamespace(tensordesc_meta=["about"])
            return compiled

        return described

    def map(self, blocks: Any, about: Any) -> list[Any]:
        self.made.append(blocks)
        return [about, blocks.base.data_ptr(), *blocks.shape]


def in_blocks(base: torch.Tensor) -> Any:
    return module.Blocks(base, [4, 8], [8, 1], [2, 8])


@pytest.mark.parametrize("name", ["launcher", "another"])
def test_maps_are_made_once_for_each_address(
    name: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And behind the wrapper that would make them in every launch; if it is not as it was, the
    public way serves."""
    kernel = Reads(name)
    monkeypatch.setattr(module, "_driver", SimpleNamespace(make_tensordesc_arg=kernel.map))
    kernel.arg_names = ("w", "x", "n", "BLOCK")
    step, x = Step(kernel, BLOCK=64), torch.zeros(8)
    one, other = torch.zeros(32).half(), torch.zeros(32).half()
    for w in (one, one, one, one, other, one):
        values = (*step.mapped(x.get_device(), w, in_blocks), x.data_ptr(), 7)
        if not step.again(x.get_device(), (3, 2), w.data_ptr() | x.data_ptr(), values):
            step.find((3, 2), x, (in_blocks(w), x, 7))
    if name == "another":
        assert kernel.ways == (6, 0)
        return
    assert kernel.ways == (1, 5)
    # The second launch finds the kernel, the others know it.
    assert [blocks.base is one for blocks in kernel.made] == [True, True, False]
    assert all("wrapped" not in args for args in kernel.direct)
    maps = [args[13:17] for args in kernel.direct]
    assert maps == [("about", w.data_ptr(), 4, 8) for w in (one, one, one, other, one)]
    assert all(args[17:] == (x.data_ptr(), 7, 64) for args in kernel.direct)


def test_other_blocks_are_other_kernels(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Reads()
    monkeypatch.setattr(module, "_driver", SimpleNamespace(make_tensordesc_arg=kernel.map))
    w, x = torch.zeros(32), torch.zeros(8)
    for base, block in ((w, [2, 8]), (w, [4, 8]), (w.half(), [2, 8]), (w, [2, 8])):
        blocks = module.Blocks(base, [4, 8], [8, 1], block)
        launch(kernel, (1,), x, blocks, 7, BLOCK=1)
    assert kernel.ways == (3, 1)


def test_whoever_watches_sees_repeated_launches(kernel: Kernel) -> None:
    y = torch.zeros(80)
    make = repeated(kernel, torch.zeros(8))
    for _ in range(3):
        make(y)
    chain = KNOBS.runtime.launch_enter_hook

    def listen(metadata: Any) -> None:
        raise AssertionError("the fake kernel calls no hooks")

    chain.add(listen)
    try:
        assert not make(y)
    finally:
        chain.remove(listen)
    assert kernel.ways == (2, 2)
    assert compile_ahead([lambda: make(y)]) == 1
    assert kernel.ways == (2, 2)
    assert make(y)


def test_the_grid_is_no_part_of_what_is_compiled(kernel: Kernel) -> None:
    x = torch.zeros(8)
    for grid in ((1,), (4, 5), (6, 7, 8)):
        launch(kernel, grid, x, x, 2, BLOCK=1)
    assert [args[:3] for args in kernel.direct] == [(4, 5, 1), (6, 7, 8)]


@pytest.mark.parametrize("grid", [(0,), (3, 0), (0, 5), (1, 2, 0)])
def test_an_empty_grid_launches_nothing(grid: tuple[int, ...], kernel: Kernel) -> None:
    x = torch.zeros(0)
    launch(kernel, grid, x, x, 0, BLOCK=1)
    assert kernel.ways == (0, 0)


@pytest.mark.parametrize("version", ["3.5.1", "3.7.0", "4.0.0"])
def test_another_triton_is_launched_the_public_way(
    version: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    for _ in range(3):
        start(kernel)
    assert kernel.ways == (3, 0)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_sees_every_launch(hook: str, kernel: Kernel) -> None:
    start(kernel)
    chain = getattr(KNOBS.runtime, hook)

    def listen(metadata: Any) -> None:
        raise AssertionError("the fake kernel calls no hooks")

    chain.add(listen)
    try:
        start(kernel)
    finally:
        chain.remove(listen)
    assert kernel.ways == (2, 0)
    start(kernel)
    assert kernel.ways == (2, 1)


@pytest.mark.parametrize("missing", ["launch", "global_scratch_size", "profile_scratch_size"])
def test_a_launcher_built_otherwise_is_left_alone(missing: str, kernel: Kernel) -> None:
    """As of AMD's: it has no global scratch, and another order of arguments."""
    delattr(kernel.run, missing)
    start(kernel)
    start(kernel)
    assert kernel.ways == (2, 0)


@pytest.mark.parametrize("scratch", ["global_scratch_size", "profile_scratch_size"])
def test_scratch_memory_is_left_to_triton(scratch: str, kernel: Kernel) -> None:
    setattr(kernel.run, scratch, 64)
    start(kernel)
    start(kernel)
    assert kernel.ways == (2, 0)


def test_without_streams_the_public_way(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch without CUDA."""
    monkeypatch.setattr(module, "_stream", None)
    start(kernel)
    start(kernel)
    assert kernel.ways == (2, 0)


def test_a_constexpr_with_a_default_is_left_to_triton(kernel: Kernel) -> None:
    kernel.arg_names = ("x", "n", "BLOCK", "EXTRA")
    start(kernel)
    start(kernel)
    assert kernel.ways == (2, 0)


def test_real_launchers_have_what_the_direct_way_reads() -> None:
    """The names that fakes above have, in the Triton that is installed."""
    if not triton.__version__.startswith("3.6."):
        pytest.skip("another Triton is launched the public way")
    driver = importlib.import_module("triton.backends.nvidia.driver")
    source = inspect.getsource(driver.CudaLauncher)
    for name in ("launch", "global_scratch_size", "profile_scratch_size", "launch_pdl"):
        assert f"self.{name} =" in source
    assert "gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid" in source
    assert hasattr(KNOBS.runtime.launch_enter_hook, "calls")


def test_small_arithmetic() -> None:
    assert [cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power(n) for n in (0, 1, 2, 3, 4, 5, 1023)] == [1, 1, 2, 4, 4, 8, 1024]
