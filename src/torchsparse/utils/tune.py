"""The tuner: how each layer of a network is best computed, measured on samples of its input."""

from __future__ import annotations

import copy
import json
import operator
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchsparse import _tuned
from torchsparse._cache import TensorCache
from torchsparse._graphs import unwrapped
from torchsparse._recipe import Dataflow
from torchsparse._search import Change, Choice, Search, Site, choices_of
from torchsparse._settings import settings
from torchsparse._timing import Timing, busy, measure
from torchsparse._validate import one_of
from torchsparse._warmup import compile_passes
from torchsparse.nn.functional.conv.choices import resolve
from torchsparse.nn.functional.conv.conv import find_map
from torchsparse.nn.functional.conv.conv_config import AttributeDict, resolve_config
from torchsparse.nn.modules.conv import Conv1d, Conv2d, Conv3d, Conv4d
from torchsparse.tensor import PointTensor, SparseTensor

__all__ = ["Gain", "compare", "tune"]

FORMAT = "torchsparse.tune/2"
CONVS = (Conv1d, Conv2d, Conv3d, Conv4d)
SEARCH = 0.8  # share of the time for measuring layers; the rest is for the network as a whole
# Share of a network's time that counts as noise: of the sum of kernels, and of a CPU's clock.
SLACK = {"cuda": 0.003, "cpu": 0.02}
Configs = dict[str, AttributeDict]


def tune(
    model: nn.Module,
    data_loader: Iterable[Any],
    n_samples: int = 100,
    collect_fn: Callable[[Any], Any] = lambda data: data,
    enable_fp16: bool = False,
    save_dir: str = ".torchsparse-tune",
    tune_tag: str = "temp",
    force_retune: bool = False,
    dataflow_range: Sequence[Dataflow] = [Dataflow.ImplicitGEMM],  # as in v2.1
    dataflow_prune: bool = False,
    tune_with_bwd: bool = False,
    verbose: bool = True,
    skip_warning: bool = False,
    *,
    distributed: bool = False,
    seconds: float = 40.0,
) -> Configs:
    """Measure how each convolution of a network is best computed, and set it so.

    Layers that share a kernel map get one configuration: dataflow, row order and splits. How each
    launch is cut into tiles (on a CPU: the maps into chunks) goes into this machine's table, from
    which every program profits. All choices give the same result up to rounding. Layers are
    measured one by one; at the end the network is run with and without what was chosen, and what
    makes it slower, or evaluation without gradients slower, is taken back.

    The network runs in evaluation mode without gradients, to see which maps its layers meet.
    Afterwards only ``_config`` of its convolutions is different: modes, buffers, gradients, hooks,
    random numbers and settings are as before, also after an exception.

    Args:
        model: Any module with convolutions of this library.
        data_loader: Yields samples.
        n_samples: Look at no more than so many; fewer where the answers settle, or time is up.
        collect_fn: Makes the input of the model from a sample; a tuple is unpacked.
        enable_fp16: Tune for float16 autocast.
        save_dir, tune_tag: The result is kept in ``save_dir/tune_tag``.
        force_retune: Measure again even if that file, or this machine, knows the answer.
        dataflow_range: What a layer may use.
        dataflow_prune: Give up on choices that were slow on the first sample.
        tune_with_bwd: Count both gradients, too.
        verbose: Show progress and a table of the result.
        skip_warning: No warnings of this function.
        distributed: In a process group: every process calls this, rank 0 measures, all get its
            result. Otherwise nothing is measured there, as one process would keep others waiting.
        seconds: About how long the search may take; what takes longest in the network comes first.

    Returns:
        The configuration of each convolution, by its name in ``model``. With
        ``torch.use_deterministic_algorithms(True)`` nothing is changed and it is as found.

    Raises:
        TypeError: ``n_samples`` is no int.
        ValueError: No dataflow to choose from, a negative number of samples or seconds.
        NotImplementedError: `Dataflow.CodedCSR`.
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, CONVS)}
    allowed = _allowed(dataflow_range, tune_with_bwd)
    if operator.index(n_samples) < 0:
        raise ValueError(f"`n_samples` must be at least 0, got {n_samples}")
    if not seconds >= 0:
        raise ValueError(f"`seconds` must be at least 0, got {seconds}")
    path = Path(save_dir) / tune_tag
    device = _device_of(model)
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()

    def advise(message: str) -> None:
        if not skip_warning:
            warnings.warn(message, stacklevel=3)

    def work() -> _Answer:
        if torch.are_deterministic_algorithms_enabled():
            advise("nothing is tuned while torch.use_deterministic_algorithms(True) holds")
            return _Answer(_as_found(convs), False)
        known = None if force_retune else _read(path, convs, device, advise)
        if known is not None:
            _tuned.record(known.entries, device, write=False)  # others may have tuned since
            return _Answer(known.configs, True)
        if grouped and not distributed:
            advise(
                "nothing is tuned inside a process group unless asked: tune before "
                "init_process_group, or let every process call tune(..., distributed=True)"
            )
            return _Answer(_as_found(convs), False)
        bar = tqdm(desc="tuning", unit=" timings", disable=not verbose)
        search = Search(
            device,
            allowed,
            tune_with_bwd,
            SEARCH * seconds,
            dataflow_prune,
            force_retune,
            bar.update,
        )
        with bar, _untouched(model, device):
            inputs: tuple[Any, ...] = ()
            for inputs in _inputs(data_loader, n_samples, collect_fn, device):
                search.add(_sites(model, convs, inputs, device, enable_fp16))
                if search.done:
                    break
            if search.groups:
                _confirm(model, convs, inputs, search, enable_fp16, tune_with_bwd)
        if not search.groups:  # no sample, or none that meets a map
            return _Answer(_as_found(convs), False)
        saved = _Saved(_configs(convs, search), search.results)
        _tuned.record(saved.entries, device)
        _write(path, saved, device, advise)
        if verbose:
            print(_table(search))
        return _Answer(saved.configs, True)

    answer = _shared(work, convs, device) if grouped and distributed else work()
    for name, config in answer.configs.items() if answer.new else ():
        convs[name]._config = config.copy()
    return answer.configs


class _Answer(NamedTuple):
    """What `tune` found out."""

    configs: Configs
    new: bool  # to be set; otherwise they are those that hold anyway


class _Saved(NamedTuple):
    """What a file keeps."""

    configs: Configs
    entries: dict[str, _tuned.Entry]  # of the machine's table, for maps as dense as those met


def _allowed(dataflows: Sequence[Dataflow], backward: bool) -> list[Choice]:
    if not dataflows:
        raise ValueError("`dataflow_range` must name at least one Dataflow, got none")
    for dataflow in dataflows:
        resolve_config({"dataflow": dataflow})  # raises what a layer would raise
    return choices_of(dict.fromkeys(dataflows), backward)


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


class Gain(NamedTuple):
    """How long a network takes on one input, without and with what was tuned."""

    before: Timing
    after: Timing

    @property
    def ratio(self) -> float:
        """before / after: above 1, tuning pays."""
        return self.before.median / self.after.median


def compare(
    model: nn.Module,
    inputs: Any,
    configs: Mapping[str, Mapping[str, Any]],
    *,
    enable_fp16: bool = False,
    backward: bool = False,
    seconds: float = 1.0,
) -> Gain:
    """Time a network as it was before `tune`, and with its result; both build maps in every call.

    The two take turns. The model is left as found.

    Args:
        model: Any module with convolutions of this library.
        inputs: What it takes; a tuple is unpacked.
        configs: From `tune`. "Before" has no configurations and no measured tiles.
        enable_fp16: Under float16 autocast.
        backward: In training mode, with the gradients of all parameters; otherwise without any.
        seconds: For each of the two, about.

    Raises:
        KeyError: A configuration for a layer that is not there.
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, CONVS)}
    device = _device_of(model)
    found = inputs if type(inputs) is tuple else (inputs,)

    def time(after: bool) -> Timing:
        hidden = {} if after else dict.fromkeys(_tuned.entries(device))
        step = partial(_step, model, found, device, enable_fp16, backward)
        with _tuned.trying(hidden, device), _configured(convs, configs if after else {}):
            return measure(step, device, seconds=seconds / 2)

    with _untouched(model, device):
        model.train(backward)
        rounds = [Gain(time(False), time(True)) for _ in range(2)]
    return Gain(*(min(times, key=lambda timing: timing.median) for times in zip(*rounds)))


def _cast(device: torch.device, enable_fp16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.float16) if enable_fp16 else nullcontext()


def _step(
    model: nn.Module, inputs: tuple[Any, ...], device: torch.device, enable_fp16: bool,
    backward: bool,
) -> None:  # fmt: skip
    """A pass of the network over fresh copies, and all gradients of its parameters."""
    with torch.set_grad_enabled(backward), _cast(device, enable_fp16):
        outputs = list(_outputs(model(*_moved(inputs, device))))  # asked for, thus computed
    losses = [t.float().square().mean() for t in outputs if backward and t.requires_grad]
    if losses:
        torch.autograd.backward(losses)
        model.zero_grad(set_to_none=True)


def _confirm(
    model: nn.Module,
    convs: Mapping[str, Any],
    inputs: tuple[Any, ...],
    search: Search,
    enable_fp16: bool,
    backward: bool,
) -> None:
    """Keep of a search's results what makes the network faster.

    In evaluation mode, which needs no labels, and in this process alone, as for `_sites`.
    """
    device, alone = search.device, unwrapped(model)

    def time(changes: Sequence[Change]) -> list[float]:
        taken_back = {} if None in changes else search.replaced
        configs = _configs(convs, search, changes)
        with _tuned.trying(taken_back, device), _configured(convs, configs):
            if device.type == "cuda" and len(inputs) == 1 and isinstance(inputs[0], SparseTensor):
                with _cast(device, enable_fp16):
                    compile_passes(alone, list(inputs), None)
            return [
                busy(partial(_step, alone, inputs, device, enable_fp16, gradients), device)
                for gradients in ((False, True) if backward else (False,))
            ]

    model.eval()
    search.confirm(time, SLACK.get(device.type, SLACK["cpu"]))


def _outputs(value: Any) -> Iterator[Tensor]:
    """Tensors of a network's output."""
    if isinstance(value, SparseTensor):
        value = value.feats
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _outputs(item)


@contextmanager
def _configured(
    convs: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
) -> Iterator[None]:
    """Let exactly these configurations hold."""
    before = {name: conv._config for name, conv in convs.items()}
    unknown = set(configs) - set(convs)
    if unknown:
        raise KeyError(f"the model has no layers {sorted(unknown)}")
    try:
        for name, conv in convs.items():
            conv._config = configs.get(name)
        yield
    finally:
        for name, conv in convs.items():
            conv._config = before[name]


# ------------------------------------------------------------------ running the network
@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back whatever running the model, the loader and the collection may change."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    values = [
        (b, b.detach().clone()) for known in buffers for b in known.values() if b is not None
    ]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    before = {field.name: getattr(settings, field.name) for field in fields(settings)}
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # whoever still uses it
    with ExitStack() as stack:
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for parameter, _ in grads:
            parameter.grad = None  # a backward pass would add to it in place
        try:
            yield
        finally:
            for module, mode, known in zip(modules, training, buffers):
                module.training = mode
                module._buffers.clear()
                module._buffers.update(known)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            for parameter, grad in grads:
                parameter.grad = grad
            for name, value in before.items():
                if name != "version" and getattr(settings, name) is not value:
                    setattr(settings, name, value)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _inputs(
    data_loader: Iterable[Any],
    n_samples: int,
    collect_fn: Callable[[Any], Any],
    device: torch.device,
) -> Iterator[tuple[Any, ...]]:
    if n_samples == 0:
        return
    for number, data in enumerate(data_loader, 1):
        found = collect_fn(data)
        yield _moved(found if type(found) is tuple else (found,), device)
        if number == n_samples:
            return


def _moved(value: Any, device: torch.device) -> Any:
    """A copy on the device, as deep as tensors lie; sparse tensors without maps."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, SparseTensor):
        out = copy.copy(value)
        out.feats, out._caches = _moved(value.feats, device), TensorCache()
        vars(out._caches).update(value._caches.extras())
        if getattr(value.coords, "device", None) == device:
            out._caches.cmaps.update(value._caches.cmaps)
        else:
            out.coords = _moved(value.coords, device)
        return out
    if isinstance(value, PointTensor):
        out = copy.copy(value)
        vars(out).update(_moved(vars(value), device))
        return out
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _sites(
    model: nn.Module,
    convs: Mapping[str, Any],
    inputs: tuple[Any, ...],
    device: torch.device,
    enable_fp16: bool,
) -> list[Site]:
    """Run the model once and see which maps its layers meet."""
    sites: list[Site] = []

    def hook(name: str) -> Callable[..., None]:
        def see(
            conv: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: SparseTensor
        ) -> None:
            x = args[0] if args else kwargs["input"]
            onto = args[1] if len(args) > 1 else kwargs.get("coordinates")
            layer = conv._parameters_of()
            if layer.pointwise and onto is None:
                return
            recipe = resolve(conv._config, x.feats, conv.kernel, conv.bias)
            kmap, _ = find_map(
                layer.ndim, x, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                recipe.downsample_mode, layer.transposed, layer.generative, onto,
            )  # fmt: skip
            c_in, c_out = (c // layer.groups for c in (conv.in_channels, conv.out_channels))
            if layer.groups == 1 or c_in > 1:  # groups of one channel have their own kernel
                site = Site(name, kmap, layer.transposed, c_in, c_out, recipe)
                sites.extend([site] * layer.groups)

        return see

    model.eval()
    handles = [
        conv.register_forward_hook(hook(name), with_kwargs=True) for name, conv in convs.items()
    ]
    try:
        with torch.no_grad(), _cast(device, enable_fp16):
            unwrapped(model)(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [site for site in sites if min(site.rows) and site.c_in and site.c_out]


# ------------------------------------------------------------------ results
def _fields(choice: Choice) -> dict[str, Any]:
    """A choice as the keys of a configuration."""
    return {
        "dataflow": choice.dataflow,
        "ifsort": choice.sort,
        "split_mask_num": choice.splits,
        "split_mask_num_bwd": choice.splits_bwd,
        "auto": not choice.literal,
    }


def _config(conv: Any, values: Mapping[str, Any]) -> AttributeDict:
    """What a layer had of its own, with the tuned keys; the rest follows the global settings."""
    own = {} if conv._config is None else conv._config
    return AttributeDict({**own, **values})


def _as_found(convs: Mapping[str, Any]) -> Configs:
    found = {}
    for name, conv in convs.items():
        complete = resolve_config(conv._config)
        found[name] = _config(conv, {key: complete[key] for key in KEYS})
    return found


KEYS = tuple(_fields(Choice(Dataflow.ImplicitGEMM, False, 1, 1, False)))


def _configs(
    convs: Mapping[str, Any], search: Search, changes: Sequence[Change] | None = None
) -> Configs:
    """What a search found; of what it could leave as it was, these changes alone."""
    found = _as_found(convs)
    for group in search.groups.values():
        if changes is not None and group not in changes and group.may_stay(search.allowed):
            continue
        for name in group.names:
            found[name] = _config(convs[name], _fields(group.choice(name)))
    return found


def _rows(configs: Configs) -> dict[str, dict[str, Any]]:
    """The tuned keys as JSON can say them."""
    return {
        name: {key: config[key] for key in KEYS} | {"dataflow": config.dataflow.name}
        for name, config in configs.items()
    }


def _write(path: Path, saved: _Saved, device: torch.device, advise: Callable[[str], None]) -> None:
    content = {
        "format": FORMAT, "machine": _tuned.machine(device), "layers": _rows(saved.configs),
        "entries": _tuned.rows(saved.entries),
    }  # fmt: skip
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _tuned.locked(path):
                partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        advise(f"{path} cannot be written ({error.strerror or error})")


def _read(
    path: Path, convs: Mapping[str, Any], device: torch.device, advise: Callable[[str], None]
) -> _Saved | None:
    """What a file keeps; None, with a warning, if it is not for this network."""
    try:
        return _parsed(path.read_text("utf-8"), convs, _tuned.machine(device))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        advise(f"{path} is not used: {reason}")
        return None


def _parsed(text: str, convs: Mapping[str, Any], machine: Mapping[str, Any]) -> _Saved:
    """What the text of a file keeps.

    Raises:
        ValueError: It is no JSON, or of another format, machine or network.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected JSON of format {FORMAT!r}")
    if content.get("machine") != machine:
        raise ValueError("it was measured on another machine or by other versions")
    configs = _from_rows(content.get("layers"), convs)
    return _Saved(configs, _tuned.from_rows(content.get("entries")))


def _from_rows(layers: Any, convs: Mapping[str, Any]) -> Configs:
    """The reverse of `_rows`, checked.

    Raises:
        ValueError: Other layers, keys or values.
    """
    if not isinstance(layers, dict) or set(layers) != set(convs):
        raise ValueError("it was tuned for other layers")
    found = {}
    for name, row in layers.items():
        if not isinstance(row, dict) or set(row) != set(KEYS):
            raise ValueError(f"expected the keys {', '.join(KEYS)} for {name}, got {row!r}")
        dataflow = Dataflow[one_of(row["dataflow"], tuple(d.name for d in Dataflow), "dataflow")]
        for key in ("ifsort", "auto"):
            if type(row[key]) is not bool:
                raise ValueError(f"`{key}` must be true or false, got {row[key]!r}")
        found[name] = _config(convs[name], {**row, "dataflow": dataflow})
        resolve_config(found[name])
    return found


def _table(search: Search) -> str:
    """What was chosen, and what it gains on a sample."""
    rows: list[tuple[str, ...]] = [
        ("layers", "kernel", "rows", "choice", "as found", "tuned", "gain")
    ]
    total = [0.0, 0.0]
    for group in search.groups.values():
        more = len(group.names) - 1
        rest = f" and {more} more" if more else ""
        kernel = "x".join(map(str, group.kernel))
        sizes = " -> ".join(map(str, dict.fromkeys(group.voxels)))
        choice = "as found" if group.best is None else str(group.best)
        times = ("-", "-", "-")
        if group.samples:
            total = [total[0] + group.before, total[1] + group.after]
            times = _gain(group.before, group.after)
        rows.append((group.names[0] + rest, kernel, sizes, choice, *times))
    if total[0]:
        rows.append(("together", "", "", "", *_gain(*total)))
    if search.entries:
        before, after = search.launches, search.launches - search.gained
        label = f"tiles of {len(search.entries)} kinds of launches"
        rows.append((label, "", "", "", *_gain(before, after)))
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 4 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _gain(before: float, after: float) -> tuple[str, str, str]:
    return f"{1e3 * before:.3f} ms", f"{1e3 * after:.3f} ms", f"{1 - after / before:.0%}"


# ------------------------------------------------------------------ several processes
def _shared(
    work: Callable[[], _Answer], convs: Mapping[str, Any], device: torch.device
) -> _Answer:
    """Rank 0 works, every rank gets its result, or its failure."""
    if torch.distributed.get_rank() > 0:
        said = json.loads(_broadcast(b"", device))
        if "error" in said:
            raise RuntimeError(f"tuning failed on rank 0: {said['error']}")
        _tuned.record(_tuned.from_rows(said["entries"]), device, write=False)
        return _Answer(_from_rows(said["layers"], convs), said["new"])
    try:
        answer = work()
    except BaseException as error:
        _broadcast(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode(), device)
        raise
    entries = _tuned.rows(_tuned.recorded(device))
    said = {"layers": _rows(answer.configs), "new": answer.new, "entries": entries}
    _broadcast(json.dumps(said).encode(), device)
    return answer


def _broadcast(text: bytes, device: torch.device) -> bytes:
    """The bytes of rank 0, on every rank; nothing is pickled."""
    group = torch.distributed
    through = device if "nccl" in str(group.get_backend()) else torch.device("cpu")
    size = torch.tensor([len(text)], dtype=torch.int64, device=through)
    group.broadcast(size, 0)
    data = torch.zeros(int(size), dtype=torch.uint8)
    if text:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    data = data.to(through)
    group.broadcast(data, 0)
    return bytes(data.cpu().numpy())
