"""The tuner measures, decides, remembers, and leaves everything else as it was."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchsparse
from tests import clouds
from tests.test_public_names import parameters
from torchsparse import PointTensor, SparseTensor, _search, _tuned
from torchsparse import nn as spnn
from torchsparse._kernel_map import KernelMap
from torchsparse._ops.dispatch import forced
from torchsparse._search import Choice, Group, Search, Site, choices_of
from torchsparse._timing import Timing
from torchsparse.nn import functional as F
from torchsparse.nn.functional import Dataflow
from torchsparse.nn.functional.conv.choices import resolve
from torchsparse.utils.tune import compare, tune

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Results and measurements of each test for itself; a timing takes as long as a call."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(_tuned.VARIABLE, str(tmp_path / "tuned"))
    monkeypatch.setattr(_search, "PER_CALL", {"cpu": 0.0, "cuda": 0.001})
    _tuned.forget()
    yield tmp_path
    _tuned.forget()


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        spnn.Conv3d(4, 8, 3),
        spnn.BatchNorm(8),
        spnn.ReLU(True),
        spnn.Conv3d(8, 8, 3, bias=True),
        spnn.Conv3d(8, 16, 2, stride=2),
        spnn.Conv3d(16, 16, 1),
        spnn.Conv3d(16, 8, 2, stride=2, transposed=True),
    )


def cloud(name: str = "odd") -> SparseTensor:
    coords = torch.from_numpy(clouds.CLOUDS[name]())
    generator = torch.Generator().manual_seed(0)
    return SparseTensor(torch.randn(len(coords), 4, generator=generator), coords)


def quiet(model: nn.Module, samples: Any = None, **options: Any) -> dict[str, Any]:
    samples = [cloud()] if samples is None else samples
    return tune(model, samples, **{"verbose": False, "seconds": 20.0, **options})


LAYERS = ["0", "3", "4", "5", "6"]


# ------------------------------------------------------------------ the function
def test_the_parameters_are_those_of_v21() -> None:
    assert torchsparse.tune is tune
    found = parameters(tune)
    assert found[3].startswith("collect_fn=<function")
    del found[3]
    v21 = """model, data_loader, n_samples=100, enable_fp16=False,
        save_dir='.torchsparse-tune', tune_tag='temp', force_retune=False,
        dataflow_range=[<Dataflow.ImplicitGEMM: 0>], dataflow_prune=False, tune_with_bwd=False,
        verbose=True, skip_warning=False, *, distributed=False, seconds=40.0"""
    assert found == [part.strip() for part in v21.split(",")]


@pytest.mark.parametrize("backward", [False, True])
def test_every_layer_gets_its_configuration(backward: bool) -> None:
    model = network()
    found = quiet(model, tune_with_bwd=backward)
    assert list(found) == LAYERS
    for name, config in found.items():
        layer = model.get_submodule(name)
        assert layer._config == config and layer._config is not config
        assert set(config) == {
            "dataflow",
            "ifsort",
            "split_mask_num",
            "split_mask_num_bwd",
            "auto",
        }
        assert config.dataflow is Dataflow.ImplicitGEMM  # an attribute, too
    model(cloud())  # and takes it


def test_results_are_the_same_up_to_rounding(device: torch.device) -> None:
    model = network().to(device).eval()
    before = model(cloud().to(device)).feats
    quiet(model, tune_with_bwd=True, dataflow_range=list(Dataflow)[:3])
    # The same products, summed in another order.
    torch.testing.assert_close(model(cloud().to(device)).feats, before, rtol=1e-4, atol=1e-5)


def test_what_a_layer_had_of_its_own_stays() -> None:
    model = network()
    layer: Any = model[4]
    layer._config = {"downsample_mode": "minkowski"}
    found = quiet(model)
    assert found["4"]["downsample_mode"] == "minkowski"
    assert "downsample_mode" not in found["0"]  # still follows the global setting


def test_only_dataflows_of_the_range_are_chosen() -> None:
    found = quiet(network(), dataflow_range=[Dataflow.GatherScatter])
    mapped = {name: config.dataflow for name, config in found.items() if name != "5"}
    assert set(mapped.values()) == {Dataflow.GatherScatter}


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="dataflow_range"):
        quiet(network(), dataflow_range=[])
    with pytest.raises(ValueError, match="Dataflow"):
        quiet(network(), dataflow_range=["ImplicitGEMM"])
    with pytest.raises(NotImplementedError, match="CodedCSR"):
        quiet(network(), dataflow_range=[Dataflow.CodedCSR])
    with pytest.raises(ValueError, match="n_samples"):
        quiet(network(), n_samples=-1)


@pytest.mark.parametrize("name", ["empty", "single", "origin", "batch_gap"])
def test_small_clouds_are_no_trouble(name: str) -> None:
    assert list(quiet(network(), [cloud(name)], tune_with_bwd=True)) == LAYERS


def test_no_sample_leaves_the_layers_as_found(folder: Path) -> None:
    assert list(quiet(network(), [])) == LAYERS
    assert list(quiet(network(), [cloud()], n_samples=0)) == LAYERS
    assert not (folder / ".torchsparse-tune").exists()  # or it would be loaded ever after
    assert quiet(nn.Linear(2, 2), []) == {}


def test_samples_are_bounded_and_end_when_the_answers_settle() -> None:
    seen: list[int] = []

    def loader() -> Iterator[SparseTensor]:
        while True:
            seen.append(1)
            yield cloud()

    quiet(network(), loader(), n_samples=2)
    assert len(seen) == 2
    seen.clear()
    quiet(network(), loader(), force_retune=True)
    assert 3 <= len(seen) < 50
    seen.clear()
    quiet(network(), loader(), force_retune=True, seconds=0.0)
    assert len(seen) == 1


# ------------------------------------------------------------------ inputs
class Takes(nn.Module):
    """A convolution behind a forward function of any kind."""

    def __init__(self, call: Callable[..., SparseTensor]) -> None:
        super().__init__()
        self.conv = spnn.Conv3d(4, 8, 3)
        self.call = call
        self.calls: list[Any] = []

    def forward(self, *args: Any) -> Any:
        x = self.call(*args)
        self.calls.append(x)
        return self.conv(x)


@pytest.mark.parametrize(
    ("collect", "call"),
    [
        (lambda x: x, lambda x: x),
        (lambda x: (x,), lambda x: x),
        (lambda x: (x, {"scale": torch.ones(1)}), lambda x, more: spnn.ReLU()(x)),
        (lambda x: {"input": x}, lambda batch: batch["input"]),
        (lambda x: [x, x], lambda batch: batch[1]),
        (lambda x: (x, PointTensor(x.F, x.C.float())), lambda x, points: x),
    ],
    ids=["one", "tuple-of-one", "tuple-with-dict", "dict", "list", "points"],
)
def test_a_tuple_is_unpacked_and_anything_else_is_one_input(
    collect: Callable[[SparseTensor], Any], call: Callable[..., SparseTensor]
) -> None:
    model = Takes(call)
    # Without time nothing is found, and then nothing is tried on the network.
    assert list(quiet(model, collect_fn=collect, seconds=0.0)) == ["conv"]
    assert len(model.calls) == 1


def test_the_samples_are_left_alone(device: torch.device) -> None:
    x = cloud()
    levels = dict(x._caches.cmaps)
    model = Takes(lambda x: x).to(device)
    quiet(model, [x])
    assert x.coords.device == x.feats.device == CPU
    assert x._caches.cmaps == levels and not x._caches.kmaps
    given = model.calls[0]
    assert given is not x and given.feats.device.type == device.type
    assert torch.equal(given.feats.cpu(), x.feats) and torch.equal(given.coords.cpu(), x.coords)


def test_samples_survive_a_network_that_works_in_place(device: torch.device) -> None:
    x = cloud()
    before = x.feats.clone()
    model = nn.Sequential(spnn.ReLU(True), spnn.Conv3d(4, 8, 3)).to(device)
    quiet(model, [SparseTensor(x.feats.to(device), x.coords.to(device))], seconds=0.1)
    quiet(model, [x], force_retune=True, seconds=0.1)
    assert (before < 0).any() and torch.equal(x.feats, before)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"n_samples": 1.5}, TypeError),
        ({"n_samples": None}, TypeError),
        ({"seconds": -1}, ValueError),
        ({"seconds": float("nan")}, ValueError),
    ],
)
def test_bad_bounds_of_the_work(bad: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        quiet(network(), **bad)


def test_layers_over_other_numbers_of_axes_and_given_sites_are_tuned() -> None:
    class Plane(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = spnn.Conv2d(4, 4, 3)

        def forward(self, x: SparseTensor) -> SparseTensor:
            return self.conv(x, coordinates=self.conv(x))

    coords = torch.tensor([[0, 1, 2], [0, 1, 3], [1, 5, 5]], dtype=torch.int32)
    assert list(quiet(Plane(), [SparseTensor(torch.ones(3, 4), coords)])) == ["conv"]


def test_half_precision_is_autocast() -> None:
    model = Takes(lambda x: x)
    seen: list[torch.dtype] = []
    model.conv.register_forward_hook(lambda conv, x, out: seen.append(out.feats.dtype))
    quiet(model, enable_fp16=True)
    half = set(seen)  # once, and again if something was found that must prove itself
    seen.clear()
    quiet(model, force_retune=True)
    assert (half, set(seen)) == ({torch.float16}, {torch.float32})
    assert next(model.parameters()).dtype == torch.float32


# ------------------------------------------------------------------ as it was
class Restless(nn.Module):
    """Changes whatever a forward pass can change."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.conv = spnn.Conv3d(4, 8, 3)
        self.norm = spnn.BatchNorm(8)
        self.drop = nn.Dropout()
        self.register_buffer("counter", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1), persistent=False)
        self.register_buffer("absent", None)
        self.frozen = nn.Linear(2, 2)
        self.fails = fails

    def forward(self, x: SparseTensor) -> SparseTensor:
        self.norm.train()
        self.counter += 1
        self.replaced = torch.ones(1)
        self.absent = torch.ones(1)
        torch.rand(3)
        random.random()
        np.random.rand()  # noqa: NPY002
        torchsparse.backends.allow_tf32 = True
        torchsparse.backends.benchmark = True
        F.set_conv_mode(2)
        self.frozen.weight.grad = torch.ones(2, 2)
        out = self.norm(self.conv(x))
        if self.fails:
            raise RuntimeError("the network fails")
        return out


def picture(model: nn.Module) -> dict[str, Any]:
    """All that must not change, bit by bit."""
    buffers = {name: None if b is None else b.clone() for name, b in model.named_buffers()}
    names = torchsparse.backends.NAMES  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": buffers,
        "objects": [id(b) for m in model.modules() for b in m._buffers.values()],
        "names": [list(m._buffers) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [
            [dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks)]
            for m in model.modules()
        ],
        "dtypes": [p.dtype for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "rng": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
        "backends": {name: getattr(torchsparse.backends, name) for name in names},
        "modes of convolution": (F.get_conv_mode(), F.get_kmap_mode(), F.get_downsample_mode()),
        "torch": (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()),
    }


def assert_same(got: Any, want: Any, place: str = "") -> None:
    assert type(got) is type(want), place
    if isinstance(want, Tensor):
        assert torch.equal(got, want), place
    elif isinstance(want, dict):
        assert list(got) == list(want), place
        for name in want:
            assert_same(got[name], want[name], f"{place}/{name}")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), place
        for number, (one, other) in enumerate(zip(got, want)):
            assert_same(one, other, f"{place}/{number}")
    else:
        assert got == want, place


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_world_are_left_as_found(fails: bool) -> None:
    torch.manual_seed(1)
    model = Restless(fails)
    model.train()
    model.drop.eval()  # modes need not be alike
    model.conv.kernel.grad = torch.randn_like(model.conv.kernel)
    model.frozen.weight.requires_grad_(False)
    model.conv.register_forward_hook(lambda *args: None)
    before = picture(model)

    def loader() -> Iterator[SparseTensor]:
        torch.rand(1)  # as the loader of a data set does
        yield cloud()

    if fails:
        with pytest.raises(RuntimeError, match="the network fails"):
            quiet(model, loader(), tune_with_bwd=True)
        assert model.conv._config is None
    else:
        quiet(model, loader(), tune_with_bwd=True)
    assert_same(picture(model), before)


def test_the_picture_would_show_a_change() -> None:
    model = Restless().eval()
    before = picture(model)
    model(cloud())
    for part in ("state", "buffers", "modes", "grads", "rng", "backends"):
        with pytest.raises(AssertionError):
            assert_same(picture(model)[part], before[part])


def test_a_failing_loader_leaves_the_model_in_training() -> None:
    model = network().train()

    def loader() -> Iterator[SparseTensor]:
        yield cloud()
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        quiet(model, loader())
    assert model.training and all(m._config is None for m in model if hasattr(m, "_config"))


# ------------------------------------------------------------------ the file
def test_the_result_is_json_and_is_loaded_the_next_time(folder: Path) -> None:
    first = quiet(network(), save_dir="out/here", tune_tag="mine")
    path = folder / "out" / "here" / "mine"
    content = json.loads(path.read_text())
    assert list(content["layers"]) == LAYERS
    assert content["layers"]["0"]["dataflow"] == "ImplicitGEMM"
    assert [p.name for p in path.parent.iterdir()] == ["mine"]
    content["layers"]["3"] |= {"ifsort": True, "split_mask_num": 3, "auto": False}
    path.write_text(json.dumps(content))

    def loader() -> Iterator[SparseTensor]:
        raise AssertionError("nothing is measured again")
        yield cloud()

    model: Any = network()
    again = quiet(model, loader(), save_dir="out/here", tune_tag="mine")
    assert again["3"].split_mask_num == model[3]._config["split_mask_num"] == 3
    assert {**again, "3": first["3"]} == first
    quiet(network(), save_dir="out/here", tune_tag="mine", force_retune=True)
    assert json.loads(path.read_text())["layers"]["3"]["split_mask_num"] == 1


def _changed(**layer: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(content: dict[str, Any]) -> dict[str, Any]:
        content["layers"]["0"] |= layer
        return content

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content | {"format": "torchsparse.tune/1"}, "format"),
        (lambda content: content | {"entries": [["name/d3", [-1]]]}, "entries are damaged"),
        (lambda content: {k: v for k, v in content.items() if k != "entries"}, "damaged"),
        (lambda content: content | {"layers": {}}, "other layers"),
        (lambda content: [1], "format"),
        (_changed(dataflow="Magic"), "dataflow"),
        (_changed(dataflow="CodedCSR"), "CodedCSR"),
        (_changed(dataflow=0), "dataflow"),
        (_changed(split_mask_num=0), "split_mask_num"),
        (_changed(split_mask_num_bwd="3"), "split_mask_num_bwd"),
        (_changed(ifsort="yes"), "ifsort"),
        (_changed(more=1), "expected the keys"),
        (_changed(ifsort=1), "ifsort"),
        (lambda content: content | {"machine": {"device": "another"}}, "another machine"),
        (lambda content: {k: v for k, v in content.items() if k != "machine"}, "another machine"),
    ],
    ids=range(15),
)
def test_another_file_is_retuned_with_a_warning(
    change: Callable[[Any], Any], reason: str, folder: Path
) -> None:
    want = quiet(network())
    path = folder / ".torchsparse-tune" / "temp"
    good = path.read_text()
    path.write_text(json.dumps(change(json.loads(good))))
    with pytest.warns(UserWarning, match=reason) as caught:
        assert quiet(network()) == want
    assert (
        len(caught) == 1 and json.loads(path.read_text())["layers"] == json.loads(good)["layers"]
    )


def test_json_too_deep_to_read_is_ignored(folder: Path) -> None:
    path = folder / ".torchsparse-tune" / "temp"
    path.parent.mkdir()
    path.write_text("[" * 100_000)
    with pytest.warns(UserWarning, match="expected JSON"):
        quiet(network())


def test_a_pickle_of_v21_is_not_opened(folder: Path) -> None:
    path = folder / ".torchsparse-tune" / "temp"
    path.parent.mkdir()
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.warns(UserWarning, match="expected JSON|is not used"):
        quiet(network())
    assert not (folder / "opened").exists()
    path.write_bytes(b"\x80\x04\x95")
    quiet(network(), skip_warning=True)  # silent: warnings are errors here


def test_a_folder_that_cannot_be_written_costs_a_warning(folder: Path) -> None:
    (folder / ".torchsparse-tune").touch()
    with pytest.warns(UserWarning):
        assert list(quiet(network())) == LAYERS


# ------------------------------------------------------------------ densities
FIRST, SECOND, THIRD = (8192, 1), (16384, 1), (65536, 1)  # layouts of plans on a CPU
NAMES = {_tuned.key("layout", 0, 0, c, 0, "any", "ieee", "cpu") for c in (8, 16)}


@pytest.fixture
def best(monkeypatch: pytest.MonkeyPatch) -> list[_tuned.Entry]:
    """The last of the list is the layout that takes least time; nothing is taken back."""
    best = [FIRST]

    def cost(self: Search, entry: Any, candidate: Any, rest: Any) -> float:
        return 0.5 if candidate == best[-1] else 1.0

    monkeypatch.setattr(_search, "SMALL", 0.0)
    monkeypatch.setattr(Search, "_launch_cost", cost)
    monkeypatch.setattr(Search, "confirm", lambda *args: None)
    return best


def both(best: list[_tuned.Entry]) -> None:
    """Tune for a dense cloud, then for a thin one with another answer."""
    for name, entry in (("block", FIRST), ("odd", SECOND)):
        best.append(entry)
        quiet(network(), [cloud(name)], tune_tag=name)


def test_a_network_for_another_density_has_a_search_of_its_own(best: list[_tuned.Entry]) -> None:
    quiet(network(), [cloud("block")], tune_tag="block")
    dense = _tuned.recorded(CPU)
    assert dense == dict.fromkeys(dense, FIRST)
    assert {name.rpartition("/")[0] for name in dense} == set(_tuned.entries(CPU)) == NAMES
    best.append(SECOND)
    quiet(network(), [cloud("odd")], tune_tag="odd")
    thin = {name: entry for name, entry in _tuned.recorded(CPU).items() if name not in dense}
    assert len(thin) == len(dense) == 2 and thin == dict.fromkeys(thin, SECOND)
    for _ in ("in memory", "from the file"):
        assert _tuned.recorded(CPU) == dense | thin
        assert _tuned.entries(CPU) == dict.fromkeys(NAMES, SECOND)  # tuned last
        _tuned.forget()


def test_what_is_known_for_a_density_is_not_measured_again_and_serves(
    folder: Path, best: list[_tuned.Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    both(best)
    known = _tuned.recorded(CPU)
    best.append(THIRD)
    serving: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(Search, "_answer", lambda *args: pytest.fail("it is known"))
        patch.setattr(Search, "confirm", lambda *args: serving.append(_tuned.entries(CPU)))
        tune(network(), [cloud("block")], tune_tag="again", seconds=20.0)
    saved = [
        json.loads((folder / ".torchsparse-tune" / tag).read_text())["entries"]
        for tag in ("block", "again")
    ]
    assert sorted(saved[0]) == sorted(saved[1])
    assert serving == [dict.fromkeys(NAMES, FIRST)]  # already when the network is judged
    for _ in ("in memory", "from the file"):
        assert _tuned.entries(CPU) == dict.fromkeys(NAMES, FIRST)
        assert _tuned.recorded(CPU) == known
        _tuned.forget()


def test_tuning_anew_compares_with_what_is_known_for_the_density(
    best: list[_tuned.Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    both(best)
    compared: list[_tuned.Entry] = []
    real = Search._answer

    def answer(self: Search, entry: Any, rest: Any) -> None:
        compared.append(entry.question.answer)
        real(self, entry, rest)

    monkeypatch.setattr(Search, "_answer", answer)
    best.append(THIRD)
    quiet(network(), [cloud("block")], tune_tag="block", force_retune=True)
    assert compared == [FIRST, FIRST]
    assert sorted(_tuned.recorded(CPU).values()) == [SECOND, SECOND, THIRD, THIRD]
    assert _tuned.entries(CPU) == dict.fromkeys(NAMES, THIRD)


def test_a_saved_result_brings_the_entries_of_its_density(best: list[_tuned.Entry]) -> None:
    both(best)
    best.append(THIRD)
    quiet(network(), [cloud("block")], tune_tag="more", force_retune=True)
    _tuned.forget()
    for name, entry in (("odd", SECOND), ("block", FIRST), ("odd", SECOND)):
        quiet(network(), [], tune_tag=name)  # nothing to measure: it is loaded
        assert _tuned.entries(CPU) == dict.fromkeys(NAMES, entry)
    _tuned.forget()
    assert _tuned.entries(CPU) == dict.fromkeys(NAMES, THIRD)  # the file is as it was


def test_without_time_what_is_known_serves(best: list[_tuned.Entry]) -> None:
    both(best)
    quiet(network(), [cloud("block")], tune_tag="again", seconds=0.0)
    assert FIRST in _tuned.entries(CPU).values()


def test_the_density_is_that_of_all_launches_together() -> None:
    model = nn.Sequential(spnn.Conv3d(4, 8, 3), spnn.Conv3d(8, 8, 2, stride=2))
    convs = dict(model.named_children())
    x = cloud("block")
    sites = import_module("torchsparse.utils.tune")._sites(model, convs, (x,), CPU, False)
    fine, down = (_search._Use(site, "fwd", site.recipe) for site in sites)
    assert fine.pairs == int((sites[0].kmap.neighbors >= 0).sum())
    assert fine.places == 27 * len(x.coords)
    coarse = sites[1].kmap.num_outputs
    assert (down.places, down._replace(kind="wgrad").places) == (8 * coarse, 8 * coarse)
    assert down._replace(kind="dgrad").places == 8 * len(x.coords)
    question = _tuned.Question("key", FIRST, list)

    def filed(*uses: Any) -> str:
        return _search._Asked(question, list(uses), 1.0).filed

    back = down._replace(kind="dgrad")
    assert (filed((fine, 1)), filed((back, 1))) == ("key/d1", "key/d3")
    assert filed((fine, 1), (back, 1)) == "key/d1"
    assert filed((fine, 1), (back, 99)) == "key/d3"


# ------------------------------------------------------------------ what is shown
def test_a_table_and_a_bar_only_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    quiet(network())
    assert capsys.readouterr() == ("", "")
    tune(network(), [cloud()], force_retune=True)
    shown = capsys.readouterr()
    assert "tuning" in shown.err
    lines = shown.out.splitlines()
    assert lines[0].split() == "layers kernel rows choice as found tuned gain".split()
    assert any(line.startswith("0 and 1 more") and "3x3x3" in line for line in lines)
    assert lines[-1].startswith("tiles of ")


# ------------------------------------------------------------------ deterministic, distributed
def test_deterministic_mode_tunes_nothing(folder: Path) -> None:
    model = network()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.warns(UserWarning, match="use_deterministic_algorithms"):
            found = quiet(model)
    finally:
        torch.use_deterministic_algorithms(False)
    assert list(found) == LAYERS and found["0"].auto is True
    assert all(m._config is None for m in model if hasattr(m, "_config"))
    assert not (folder / ".torchsparse-tune").exists() and not (folder / "tuned").exists()


PROCESS = """
    import os, sys, warnings, torch, torchsparse
    from torchsparse import SparseTensor, _tuned, nn as spnn
    warnings.simplefilter("ignore")  # as other libraries warn
    rank, store, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    if rank:
        os.environ[_tuned.VARIABLE] = ""  # as on another host: no file tells it anything
    group, device = torch.distributed, torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    group.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(spnn.Conv3d(4, 8, 3), spnn.Conv3d(8, 16, 2, stride=2))
    model = model.to(device)
    model = torch.nn.parallel.DistributedDataParallel(model)
    coords = torch.cartesian_prod(*[torch.arange(4)] * 3)
    coords = torch.nn.functional.pad(coords, (1, 0)).int()
    x = SparseTensor(torch.randn(64, 4, device=device), coords.to(device))
    options = dict(verbose=False, seconds=5.0, save_dir=f"{store}-out")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torchsparse.tune(model, [x], **options)
    assert sum("process group" in str(w.message) for w in caught) == 1
    assert model.module[0]._config is None and list(found) == ["module.0", "module.1"]

    def loader():
        assert rank == 0, "the other ranks wait"
        yield x

    found = torchsparse.tune(model, loader(), distributed=True, **options)
    told = [None, None]
    mine = ({n: str(c) for n, c in found.items()}, _tuned.recorded(device))
    group.all_gather_object(told, mine)
    assert told[0] == told[1], told
    assert told[0][1] or device.type == "cuda", told  # there the defaults may be the best
    assert model.module[0]._config == found["module.0"]
    model(x).feats.sum().backward()

    def broken():
        raise OSError("no data")
        yield

    try:
        torchsparse.tune(model, broken(), distributed=True, force_retune=True, **options)
    except OSError:
        assert rank == 0
    except RuntimeError as error:
        assert rank == 1 and "no data" in str(error)
    group.barrier()
    group.destroy_process_group()
    print("done", flush=True)
    os._exit(0)  # PyTorch's own threads may still run, and then end the process with a signal
"""


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_two_processes_get_the_same_answer_when_asked(
    backend: str, folder: Path, device: torch.device
) -> None:
    """Through gloo on the CPU; through NCCL each process has a GPU of its own."""
    if backend == "nccl" and (device.type != "cuda" or torch.cuda.device_count() < 2):
        pytest.skip("needs two GPUs")
    code = textwrap.dedent(PROCESS)
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), backend], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (out, err) in zip(processes, outputs):
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == "done"


# ------------------------------------------------------------------ the search itself
def test_choices_cover_the_modes_of_v21() -> None:
    found = choices_of([Dataflow.ImplicitGEMM, Dataflow.GatherScatter], backward=False)
    assert found[0] == Choice(Dataflow.ImplicitGEMM, False, 1, 3, False)
    fields = {(c.sort, c.splits) for c in found if c.literal}
    assert fields >= {(False, 1), (True, 1), (True, 3)}
    assert found[-1].dataflow is Dataflow.GatherScatter and len(set(found)) == len(found)


def _group(**costs: float) -> tuple[Group, dict[str, Choice]]:
    names: list[str] = ["auto", "unsorted", "sorted"]
    named = dict(zip(names, choices_of([Dataflow.ImplicitGEMM], True)))
    group = Group(("a",), {"a": named["auto"]}, (1, 1), (3, 3, 3), 1)
    group.costs = {named.get(name): cost for name, cost in costs.items()}
    group.decide(list(named.values()))
    return group, named


def test_the_cheapest_choice_wins_by_a_margin() -> None:
    group, named = _group(found=1.0, auto=1.0, unsorted=0.9, sorted=0.5)
    assert group.best == named["sorted"] == group.choice("a")
    group, named = _group(found=1.0, auto=1.0, unsorted=0.98, sorted=1.5)
    assert group.best is None and group.choice("a") == named["auto"]


def site(name: str, kmap: KernelMap) -> Site:
    ones = torch.ones(1, 1)
    return Site(name, kmap, False, 4, 4, resolve(None, ones, ones, None))


def test_layers_that_share_a_map_are_a_group() -> None:
    one, two, three = (cast_map(number) for number in range(3))
    sites = [site("a", one), site("b", two), site("c", one), site("d", three), site("b", three)]
    groups = {tuple(sorted({s.name for s in group})) for group in _search._grouped(sites)}
    assert groups == {("a", "c"), ("b", "d")}


def cast_map(number: int) -> KernelMap:
    """Something with an identity."""
    return f"map {number}"  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("pays", [True, False])
def test_kernels_are_searched_through_the_functions_that_run(
    monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    """In Triton's interpreter: every question of the launches is answered by what is fastest, but
    if the network as a whole becomes slower, by what it was before."""
    pytest.importorskip("triton")
    asked: list[dict[str, Any]] = []
    real = _tuned.trying

    def trying(found: dict[str, Any], device: torch.device) -> Any:
        asked.append(dict(found))
        return real(found, device)

    def time_of(fn: Callable[[], Any], *args: Any, **options: Any) -> Timing:
        """A kernel takes the time that its tile says: two shares of the taps are best."""
        fn()
        answer = next(iter(asked[-1].values()), None) if asked else None
        seconds = 1.0 if answer is None or answer[5] != 2 else 0.5
        return Timing(seconds, seconds, seconds, 1)

    passes: list[float] = []

    def whole(fn: Callable[[], Any], *args: Any) -> float:
        """Forward and backward, first without changes, then with them."""
        passes.append(1.0 if len(passes) < 2 else 0.5 if pays else 2.0)
        return passes[-1]

    monkeypatch.setattr(_search, "measure", time_of)
    monkeypatch.setattr(_tuned, "trying", trying)
    monkeypatch.setattr(import_module("torchsparse.utils.tune"), "busy", whole)
    coords = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 3, 3]], dtype=torch.int32)
    model = spnn.Conv3d(16, 16, (3, 3, 1))
    with forced("_triton"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interpreter's own
        quiet(model, [SparseTensor(torch.randn(3, 16), coords)], tune_with_bwd=True, n_samples=1)
    found = {name.split("/")[0]: entry for name, entry in _tuned.entries(CPU).items()}
    assert set(found) == {"fwd", "dgrad", "wgrad"}
    assert (found["fwd"][5] == 2) is (found["dgrad"][5] == 2) is pays
    assert len(passes) == 4


class Guarded(nn.DataParallel):
    """A wrapper that would wait for other processes."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        raise AssertionError("the others do not take part")


def test_what_was_found_is_tried_in_this_process_alone() -> None:
    model = Guarded(network())
    convs = {name: m for name, m in model.named_modules() if isinstance(m, spnn.Conv3d)}
    search = Search(CPU, choices_of([Dataflow.ImplicitGEMM], True), True, 10.0)
    name = _tuned.key("layout", 0, 0, 8, 0, "any", "ieee", "cpu")
    search.entries, search.replaced = {name: (8192,)}, {name: (32768,)}
    import_module("torchsparse.utils.tune")._confirm(model, convs, (cloud(),), search, False, True)
    assert search.entries[name] in ((8192,), (32768,))


def test_a_candidate_that_computes_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor one that fails, however fast it is."""
    shipped, wrong, broken, right = (65536, 1), (3, 1), (4, 1), (5, 1)
    name = _tuned.key("layout", 0, 0, 8, 0, "any", "ieee", "cpu")
    question = _tuned.Question(name, shipped, lambda: [shipped, wrong, broken, right])
    outputs: dict[Any, float] = {shipped: 1.0, wrong: 1.5, right: 1.0 + 1e-6}
    costs: dict[Any, float] = {shipped: 1.0, wrong: 0.1, broken: 0.1, right: 0.8}

    def output(self: Search, entry: Any, candidate: _tuned.Entry) -> Tensor:
        if candidate == broken:
            raise RuntimeError("out of shared memory")
        return torch.full((2, 2), outputs[candidate])

    def cost(self: Search, entry: Any, candidate: Any, rest: Any) -> float:
        return costs[candidate]

    monkeypatch.setattr(Search, "_output", output)
    monkeypatch.setattr(Search, "_launch_cost", cost)
    search = Search(CPU, choices_of([Dataflow.ImplicitGEMM], False), False, 10.0)
    search._answer(_search._Asked(question, [], 1.0), [])
    assert search.entries == {name: right} and list(search.results.values()) == [right]
    assert search.gained == pytest.approx(0.2)


# ------------------------------------------------------------------ before and after
@pytest.mark.parametrize("backward", [False, True])
def test_comparing_leaves_the_model_as_found(backward: bool) -> None:
    model = Restless().train()
    model.conv._config = {"ifsort": True}
    model.conv.kernel.grad = torch.ones_like(model.conv.kernel)
    before = picture(model)
    found = compare(
        model, (cloud(),), {"conv": {"split_mask_num": 2}}, backward=backward, seconds=0.0
    )
    assert_same(picture(model), before)
    assert model.conv._config == {"ifsort": True}
    assert found.ratio == found.before.median / found.after.median > 0


def test_before_has_neither_configurations_nor_measured_tiles() -> None:
    seen = set()

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = spnn.Conv3d(4, 8, 3)

        def forward(self, x: SparseTensor) -> list[Any]:
            seen.add((str(self.conv._config), len(_tuned.entries(CPU)), x._caches.kmaps == {}))
            return [{"out": self.conv(x)}]

    _tuned.record({"name/d1": (3, 4), "name/d3": (1, 2)}, CPU, write=False)
    compare(Looks(), cloud(), {"conv": {"ifsort": True}}, backward=True, seconds=0.0)
    assert seen == {("None", 0, True), (str({"ifsort": True}), 1, True)}
    assert _tuned.entries(CPU) == {"name": (1, 2)}
    with pytest.raises(KeyError, match="no layers"):
        compare(Looks(), cloud(), {"stem": {}}, seconds=0.0)


def test_a_gain_that_does_not_show_again_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, lucky = (65536, 1), (5, 1)
    name = _tuned.key("layout", 0, 0, 8, 0, "any", "ieee", "cpu")
    question = _tuned.Question(name, shipped, lambda: [shipped, lucky])
    times = iter([1.0, 0.5, 0.9, 0.95])  # shipped, lucky; and again
    monkeypatch.setattr(Search, "_output", lambda *args: torch.ones(2, 2))
    monkeypatch.setattr(Search, "_launch_cost", lambda *args: next(times))
    search = Search(CPU, choices_of([Dataflow.ImplicitGEMM], False), False, 10.0)
    search._answer(_search._Asked(question, [], 1.0), [])
    assert search.entries == {name: shipped} and search.gained == 0.0


def test_a_choice_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that needs more memory than there is."""
    real = _search._Use.planner

    def planner(use: Any) -> Any:
        key, make = real(use)
        return (key, use.recipe.dataflow), make

    def cost(self: Search, uses: list[Any], known: Any) -> float:
        if uses[0].recipe.dataflow is Dataflow.FetchOnDemand:
            raise RuntimeError("out of memory")
        return 1.0

    monkeypatch.setattr(_search._Use, "planner", planner)
    monkeypatch.setattr(Search, "_cost", cost)
    found = quiet(network(), dataflow_range=[Dataflow.FetchOnDemand, Dataflow.ImplicitGEMM])
    assert {config.dataflow for config in found.values()} == {Dataflow.ImplicitGEMM}


def test_layers_in_groups_are_tuned_group_by_group() -> None:
    model = nn.Sequential(spnn.Conv3d(4, 8, 3, groups=2), spnn.Conv3d(8, 8, 3, groups=8))
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Site] = []
        real = Search.add
        patch.setattr(Search, "add", lambda self, sites: (seen.extend(sites), real(self, sites)))
        found = quiet(model, tune_with_bwd=True, n_samples=1)
    assert [(s.name, s.c_in, s.c_out) for s in seen] == [("0", 2, 4)] * 2
    assert list(found) == ["0", "1"]  # depthwise products have a kernel without choices
