"""What this machine measured: how to launch a computation of given sizes.

A table per device lies over the shipped choices of `_triton.tiles` and `_reference.conv`. It is
read from disk when a computation first asks, and written by `torchsparse.tune` alone. A file holds

    {"format": 2, "machine": {...},
     "entries": [["fwd/17/64/64/27/float16/ieee/sm_90/d3", [64, ...]], ...]}

and counts only if format and machine are as expected: it depends on this package and the source of
its kernels, on PyTorch, Triton, the device and its driver. Each combination has its own file, so
that environments which share a home do not overwrite each other. With
``torch.use_deterministic_algorithms(True)`` the shipped choices serve.

An entry is filed under what a launch can say of itself, its `key`, and the density of the maps
that it was measured on. A launch on a GPU cannot say the latter: the host knows the number of
pairs only after waiting for it, and what depends on when it arrives would change the bits of
results. So, of the entries of a key, the one recorded last serves; files keep this order.

TORCHSPARSE_TUNED names another folder; set to nothing, it keeps tables in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torchsparse.version import __version__

__all__ = [
    "Entry",
    "Question",
    "architecture",
    "choose",
    "entries",
    "file_of",
    "filed",
    "forget",
    "from_rows",
    "generation",
    "heard",
    "key",
    "listening",
    "locked",
    "lookup",
    "machine",
    "measured",
    "record",
    "recorded",
    "rows",
    "trying",
]

FORMAT = 2
VARIABLE = "TORCHSPARSE_TUNED"
LARGEST = 1 << 24  # no field of an entry is larger
SPARSEST = 9  # densities below 2^-9 count as 2^-9
STALE = 10.0  # seconds after which a lock belongs to a process that died
PATIENCE = 5.0  # seconds to wait for a lock

Entry = tuple[int, ...]


class _Table(NamedTuple):
    """What is known of a device."""

    measured: dict[str, Entry]  # by `filed` name, in the order of recording
    serving: dict[str, Entry]  # by `key`: the answers of `lookup`


_tables: dict[tuple[str, int], _Table] = {}
_listeners: list[dict[str, Question]] = []
_generation = 0


# ------------------------------------------------------------------ reading
def key(
    op: str, rows: int, c_in: int, c_out: int, volume: int, dtype: str, precision: str, arch: str
) -> str:
    """What a launch can say of itself without waiting. Sizes of one power of two share it.

    The density of a map is not part of it: the host of a GPU would have to wait for it. The names
    of entries have it: `filed`.

    Args:
        op: "fwd", "dgrad", "wgrad", or "layout" for plans on a CPU.
        rows: M of a product, or the pairs of a weight gradient.
        c_in, c_out, volume: C_in, C_out and K.
        dtype: Of the operands, such as "float16".
        precision: Of float32 products.
        arch: From `architecture`.
    """
    return f"{op}/{rows.bit_length()}/{c_in}/{c_out}/{volume}/{dtype}/{precision}/{arch}"


def filed(name: str, pairs: int, places: int) -> str:
    """The name of an entry: a `key`, and the density of the maps that it was measured on.

    The density is pairs / places, rounded to a power of two: a key with "/d3" for 1/8.

    Args:
        name: A `key`.
        pairs: That exist in the maps.
        places: K M, where M are the output rows of the product; several products add up.
    """
    level = min(round(math.log2(places / pairs)), SPARSEST) if pairs else SPARSEST
    return f"{name}/d{level}"


def _key_of(filed: str) -> str:
    return filed.rpartition("/")[0]


def generation() -> int:
    """A number that changes whenever answers of `lookup` may; for memories of its answers."""
    return -1 if torch.are_deterministic_algorithms_enabled() else _generation


def lookup(name: str, device: torch.device) -> Entry | None:
    """What serves under a `key`: the entry recorded last; None: nothing, or it must not count."""
    if torch.are_deterministic_algorithms_enabled():
        return None
    return _table(device).serving.get(name)


def measured(filed: str, device: torch.device) -> Entry | None:
    """What was measured at one density; None also where `lookup` has nothing under its `key`."""
    known = lookup(_key_of(filed), device) is not None
    return _table(device).measured.get(filed) if known else None


class Question(NamedTuple):
    """A choice that a computation made, as `choose` heard of it."""

    name: str  # its `key`
    answer: Entry
    others: Callable[[], list[Entry]]  # what could be tried instead


def choose(
    name: str, device: torch.device, shipped: Entry, others: Callable[[], list[Entry]]
) -> Entry:
    """The measured entry of a `key`, else the shipped one.

    Args:
        name, device: As in `lookup`.
        shipped: The choice without measurements; an entry of another length is not understood.
        others: Makes the list of what a search may try; called by `torchsparse.tune` alone.
    """
    answer = lookup(name, device)
    if answer is None or len(answer) != len(shipped):
        answer = tuple(shipped)
    for heard in _listeners:
        heard.setdefault(name, Question(name, answer, others))
    return answer


def heard() -> bool:
    """Whether somebody collects the choices that are made."""
    return bool(_listeners)


@contextmanager
def listening() -> Iterator[dict[str, Question]]:
    """Collect, by name, the choices made within a ``with`` block."""
    global _generation
    heard: dict[str, Question] = {}
    _generation += 1  # remembered answers are asked for again
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners.pop()


def entries(device: torch.device) -> dict[str, Entry]:
    """A copy of what serves on a device, by `key`."""
    return dict(_table(device).serving)


def recorded(device: torch.device) -> dict[str, Entry]:
    """A copy of all that was measured on a device, by `filed` name, in the order of recording."""
    return dict(_table(device).measured)


def _place(device: torch.device) -> tuple[str, int]:
    if device.type == "cpu":
        return "cpu", 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return device.type, index


def _table(device: torch.device) -> _Table:
    place = _place(device)
    table = _tables.get(place)
    if table is None:
        path = file_of(device)
        found = {} if path is None else _load(path, machine(device))
        table = _tables.setdefault(place, _Table(found, _by_key(found)))
    return table


def _by_key(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """What serves, of entries in the order of recording: the last of each key."""
    return {_key_of(name): entry for name, entry in found.items()}


def _load(path: Path, expected: Mapping[str, Any]) -> dict[str, Entry]:
    """The entries of a file; none, with a warning, if it is not what it should be."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return _ignored(path, f"it cannot be read ({error})")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        return _ignored(path, f"expected format {FORMAT}, got {found!r}")
    if content.get("machine") != expected:
        return _ignored(path, "it was measured on another machine or by other versions")
    try:
        return from_rows(content.get("entries"))
    except ValueError as error:
        return _ignored(path, str(error))


def rows(found: Mapping[str, Entry]) -> list[list[Any]]:
    """Entries as JSON can say them, in their order."""
    return [[name, list(entry)] for name, entry in found.items()]


def from_rows(rows: Any) -> dict[str, Entry]:
    """The reverse of `rows`, checked.

    Raises:
        ValueError: They are something else.
    """
    if not isinstance(rows, list) or not all(map(_plain, rows)):
        raise ValueError("its entries are damaged")
    return {name: tuple(entry) for name, entry in rows}


def _plain(row: Any) -> bool:
    if not isinstance(row, list) or list(map(type, row)) != [str, list]:
        return False
    return all(type(number) is int and 0 <= number <= LARGEST for number in row[1])


def _ignored(path: Path, reason: str) -> dict[str, Entry]:
    warnings.warn(
        f"{path} is ignored: {reason}. `torchsparse.tune` writes a new one", stacklevel=2
    )
    return {}


# ------------------------------------------------------------------ writing
def record(found: Mapping[str, Entry], device: torch.device, write: bool = True) -> None:
    """Add entries, by `filed` name, to the table of a device and, if ``write``, to its file.

    From now on they serve, also those that were there. Writers take turns, and a reader sees the
    old file or the new one. A folder that cannot be written to costs a warning; the entries then
    serve this process.
    """
    global _generation
    if not found:
        return
    table = _table(device)
    before = dict(table.serving)
    _append(table.measured, found)
    table.serving.update(_by_key(found))
    if table.serving != before:
        _generation += 1
    path = file_of(device) if write else None
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # whoever read it was warned
                merged = _load(path, machine(device))
            _append(merged, found)
            _replace(path, machine(device), merged)
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error.strerror or error})", stacklevel=2)


def _append(measured: dict[str, Entry], found: Mapping[str, Entry]) -> None:
    """Put entries last, also those that were there."""
    for name, entry in found.items():
        measured.pop(name, None)
        measured[name] = entry


def _replace(path: Path, about: Mapping[str, Any], measured: Mapping[str, Entry]) -> None:
    content = {"format": FORMAT, "machine": about, "entries": rows(measured)}
    partial = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path.lock``, a file that only one process can create.

    Whoever waits too long goes on: the file is replaced as a whole, so at worst the entries of one
    of two writers are lost.
    """
    lock = path.with_name(path.name + ".lock")
    end = time.monotonic() + PATIENCE
    held = False
    while not held and time.monotonic() < end:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            held = True
        except (FileExistsError, PermissionError):  # the latter: being deleted, on Windows
            if not lock.parent.is_dir() or not os.access(lock.parent, os.W_OK):
                raise
            try:
                if time.time() - lock.stat().st_mtime > STALE:
                    lock.unlink(missing_ok=True)
            except FileNotFoundError:
                continue
            time.sleep(0.005)
    try:
        yield
    finally:
        if held:
            lock.unlink(missing_ok=True)


# ------------------------------------------------------------------ trying
@contextmanager
def trying(found: Mapping[str, Entry | None], device: torch.device) -> Iterator[None]:
    """Let entries serve, by `key`, for the length of a ``with`` block.

    None hides what was measured, at all densities.
    """
    global _generation
    serving = _table(device).serving
    saved = {name: serving.get(name) for name in found}

    def put(values: Mapping[str, Entry | None]) -> None:
        for name, value in values.items():
            if value is None:
                serving.pop(name, None)
            else:
                serving[name] = value

    put(found)
    _generation += 1
    try:
        yield
    finally:
        put(saved)
        _generation += 1


def forget() -> None:
    """Empty the tables in memory: the next question reads the files again."""
    global _generation
    _tables.clear()
    _generation += 1


# ------------------------------------------------------------------ the machine
def file_of(device: torch.device) -> Path | None:
    """Where the table of a device lies; None: nowhere."""
    named = os.environ.get(VARIABLE)
    if named == "":
        return None
    about = machine(device)
    text = json.dumps(about, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    label = "".join(c if c.isalnum() else "-" for c in about["device"])[:40].strip("-")
    return (Path(named) if named else _user_folder()) / f"{label}-{digest}.json"


def _user_folder() -> Path:
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        if os.environ.get(variable):
            return Path(os.environ[variable]) / "torchsparse"
    return Path(os.path.expanduser("~")) / ".cache" / "torchsparse"


def machine(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on besides its key."""
    about: dict[str, Any] = {"torchsparse": __version__, "torch": torch.__version__}
    if device.type == "cpu":
        return about | {
            "device": _processor(), "threads": torch.get_num_threads(),
            "sources": _sources("_reference"),
        }  # fmt: skip
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)
    return about | {
        "device": torch.cuda.get_device_name(device), "driver": driver(), "triton": _triton(),
        "cuda": torch.version.cuda or torch.version.hip, "sources": _sources("_triton"),
    }  # fmt: skip


@cache
def architecture(device: torch.device) -> str:
    """The kind of processor: cpu, sm_90 and the like."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _sources(package: str) -> str:
    """A fingerprint of the code that was measured."""
    folder = Path(__file__).parent / package
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _triton() -> str:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return version_of(name)
        except PackageNotFoundError:
            continue
    return "none"


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "cpu"
