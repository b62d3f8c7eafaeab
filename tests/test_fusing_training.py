"""Batch norm in training, put off: values, gradients and statistics are those without fusing.

`forced` stands in for a GPU; on one, the kernels serve by themselves.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsparse
from tests.cases import sparse
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse._autograd import late_norm
from torchsparse._ops.dispatch import forced
from torchsparse.backbones.modules import SparseConvBlock, SparseResBlock
from torchsparse.tensor import pending

F32, F64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def served() -> Iterator[None]:
    """The float64 twin, which is exact enough to compare graphs."""
    with forced("_reference"):
        yield


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, float | None]]:
    """What joined each normalisation that was computed: a residual, a slope."""
    found: list[tuple[bool, float | None]] = []
    own = late_norm.normalise_batch

    def spy(*args: Any) -> Tensor:
        found.append((args[3] is not None, args[5]))
        return own(*args)

    monkeypatch.setattr(late_norm, "normalise_batch", spy)
    return found


def randomised(net: nn.Module, device: torch.device, dtype: torch.dtype = F64) -> nn.Module:
    """The same parameters whenever it is called with the same layers."""
    torch.manual_seed(3)
    for module in net.modules():
        if isinstance(module, spnn.BatchNorm) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net.to(device, dtype).train()


class Outcome:
    """Output, gradients and state of one step."""

    def __init__(self, net: nn.Module, run: Callable[[SparseTensor], Any], x: SparseTensor):
        leaf = x.feats = x.feats.detach().clone().requires_grad_()
        net.zero_grad()
        found = run(x)
        self.out = [found.feats] if isinstance(found, SparseTensor) else list(found)
        push = torch.linspace(-1, 2, self.out[0].numel(), device=leaf.device, dtype=leaf.dtype)
        self.out[0].backward(push.view_as(self.out[0]).to(self.out[0].dtype))
        self.grads = [leaf.grad, *(p.grad for p in net.parameters())]
        self.state = [value.clone() for value in net.state_dict().values()]

    def assert_equals(self, other: Outcome, atol: float = 1e-11) -> None:
        for mine, theirs in ((self.out, other.out), (self.grads, other.grads),
                             (self.state, other.state)):  # fmt: skip
            assert len(mine) == len(theirs)
            for one, two in zip(mine, theirs):
                torch.testing.assert_close(one, two, rtol=atol, atol=atol)


def compare(
    net: nn.Module,
    device: torch.device,
    run: Callable[[Any, SparseTensor], Any] = lambda net, x: net(x),
    cloud: str = "odd",
    dtype: torch.dtype = F64,
    atol: float = 1e-11,
    steps: int = 1,
) -> None:
    """One network fused, its copy not."""
    plain = copy.deepcopy(net)
    for _ in range(steps):
        got = Outcome(net, lambda x: run(net, x), sparse(device, cloud, dtype=dtype))
        torchsparse.backends.fuse = False
        want = Outcome(plain, lambda x: run(plain, x), sparse(device, cloud, dtype=dtype))
        torchsparse.backends.fuse = True
        got.assert_equals(want, atol)


def blocks(c: int = 3) -> nn.Module:
    return nn.Sequential(
        SparseConvBlock(c, 8, 3),
        SparseResBlock(8, 8, 3),
        SparseResBlock(8, 12, 3),
        SparseConvBlock(12, 16, 2, 2),
        SparseResBlock(16, 16, 3, 2),
        spnn.Conv3d(16, 5, 1),
        spnn.BatchNorm(5, momentum=None, affine=False),
        spnn.LeakyReLU(0.2),
        spnn.BatchNorm(5, track_running_stats=False),
    )


def test_networks_agree_with_unfused(passes, device) -> None:
    compare(randomised(blocks(), device), device, steps=2)
    once = [
        (False, 0.0),
        *[(False, 0.0), (True, 0.0)],  # the shortcut is the input
        *[(False, 0.0), (False, None), (True, 0.0)],  # the shortcut has a norm of its own
        (False, 0.0),
        *[(False, 0.0), (False, None), (True, 0.0)],
        (False, 0.2),
        (False, None),
    ]
    assert passes == once * 2


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("act", [None, spnn.ReLU, spnn.LeakyReLU])
@pytest.mark.parametrize("added", [False, True])
def test_every_chain_is_one_pass(added, act, inplace, passes, device) -> None:
    net = [spnn.Conv3d(3, 3, 3), spnn.BatchNorm(3)]
    net += [] if act is None else [act(inplace=inplace)]

    def run(net: Any, x: SparseTensor) -> SparseTensor:
        y = net[1](net[0](x))
        y = y + x if added else y
        return y if act is None else net[2](y)

    compare(randomised(nn.Sequential(*net), device), device, run)
    slope = None if act is None else 0.0 if act is spnn.ReLU else 0.01
    assert passes == [(added, slope)]


def test_a_synchronised_norm_alone_joins_the_same(passes, device) -> None:
    """No process group: it is `BatchNorm`."""
    net = spnn.convert_sync_batchnorm(randomised(blocks(), device))
    assert not any(isinstance(module, spnn.BatchNorm) for module in net.modules())
    compare(net, device)
    assert len(passes) == 12 and passes[2] == (True, 0.0)


# The interpreter turns arrays of one element into numbers.
@pytest.mark.filterwarnings("ignore:Conversion of an array")
@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_kernels_agree_with_unfused(dtype, device) -> None:
    """float16: parameters in float32, as under autocast; one rounding less per joined layer."""
    norms = nn.ModuleList([spnn.BatchNorm(3), spnn.BatchNorm(3)])
    net = randomised(norms, device, F32)

    def run(net: Any, x: SparseTensor) -> SparseTensor:
        y = spnn.ReLU(True)(net[0](x))
        return spnn.LeakyReLU()(net[1](y) + x)

    with forced("_triton"):
        compare(net, device, run, dtype=dtype, atol=2e-5 if dtype == F32 else 1e-2)


@pytest.mark.filterwarnings("ignore:Conversion of an array")
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_norm_without_bias(device) -> None:
    """In training and in evaluation, by kernels."""
    net: Any = randomised(nn.Sequential(spnn.Conv3d(3, 4, 1), spnn.BatchNorm(4)), device, F32)
    net[1].bias = None
    nn.init.normal_(net[1].weight)
    with forced("_triton"):
        compare(net, device, dtype=F32, atol=1e-4)
        net.eval()
        with torch.no_grad():
            got = net(sparse(device, dtype=F32)).feats
    torchsparse.backends.fuse = False
    with torch.no_grad():
        torch.testing.assert_close(got, net(sparse(device, dtype=F32)).feats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["empty", "single"])
def test_too_few_rows(name, device) -> None:
    """None pass through; of one PyTorch says that it has no variance."""
    norm = spnn.BatchNorm(3).to(device, F64)
    x = sparse(device, name)
    if name == "single":
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm(x)
    else:
        assert norm(x).feats.shape == (0, 3)
    assert int(norm.num_batches_tracked or 0) == (name == "single")


def test_statistics_are_there_when_the_module_returns(device) -> None:
    norm = spnn.BatchNorm(3).to(device, F64)
    x = sparse(device)
    y = norm(x)
    assert pending(y) is not None
    got = {name: value.clone() for name, value in norm.state_dict().items()}
    want = nn.BatchNorm1d(3).to(device, F64)
    want(x.feats)
    for name, value in want.state_dict().items():
        torch.testing.assert_close(got[name], value)
    _ = y.feats, spnn.ReLU()(y).feats
    assert all(torch.equal(value, got[name]) for name, value in norm.state_dict().items())


def test_hooks_see_unfused_features_and_gradients(device) -> None:
    """Looking at every module's output, and keeping its gradient, changes none of them."""

    def run(net: Any, x: SparseTensor) -> list[Tensor]:
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: object, output: SparseTensor) -> None:
            output.feats.retain_grad()
            seen.append(output.feats)

        handles = [module.register_forward_hook(hook) for module in net.modules()]
        out = net(x).feats
        out.sum().backward(retain_graph=True)
        for handle in handles:
            handle.remove()
        assert len(seen) > 20
        # A later module may have changed the features in place, as it does without fusing.
        grads = [s.grad for s in seen if s.grad is not None]
        net.zero_grad()
        return [out, *seen, *grads]

    compare(randomised(blocks(), device), device, run)


def test_features_that_somebody_holds_are_a_node_of_their_own(passes, device) -> None:
    """Their gradients are as without joining, also where they are looked at too late."""

    def run(net: Any, x: SparseTensor) -> list[Tensor]:
        y = net[0](x)
        z = y + x
        w = spnn.ReLU(False)(z)
        out = w.feats
        for one in (y, z):
            one.feats.retain_grad()
        out.square().sum().backward(retain_graph=True)
        grads = [one.feats.grad.clone() for one in (y, z)]
        net.zero_grad()
        return [out, y.feats, z.feats, *grads]

    compare(randomised(nn.ModuleList([spnn.BatchNorm(3)]), device), device, run)
    assert passes == [(False, None)]


def test_dropped_features_join(passes, device) -> None:
    """Names that are given away hold nothing back."""
    net = randomised(nn.ModuleList([spnn.BatchNorm(3)]), device)

    def run(net: Any, x: SparseTensor) -> SparseTensor:
        y = net[0](x)
        y = y + x
        y = spnn.ReLU(False)(y)
        return y

    compare(net, device, run)
    assert passes == [(True, 0.0)]


@pytest.mark.parametrize("inplace", [True, False])
def test_a_second_consumer_gets_the_features_of_its_place(inplace, device) -> None:
    def run(net: Any, x: SparseTensor) -> list[Tensor]:
        y = net[0](x)
        sums = y + x
        z = spnn.ReLU(inplace)(y)
        return [torchsparse.cat([sums, y, z]).feats, z.feats]

    compare(randomised(nn.ModuleList([spnn.BatchNorm(3)]), device), device, run)


def test_an_activation_in_place_after_others_have_read(device) -> None:
    """`z` was made of `y` before `y` changed."""

    def run(net: Any, x: SparseTensor) -> list[Tensor]:
        y = net[0](x)
        z = y + x
        w = spnn.ReLU(True)(y)
        assert w.feats is y.feats
        return [(z.feats + 2 * w.feats), y.feats, z.feats]

    compare(randomised(nn.ModuleList([spnn.BatchNorm(3)]), device), device, run)


def test_twice_the_same(device) -> None:
    """A shared module, a tensor that is added to itself, a residual that waits too."""

    def run(net: Any, x: SparseTensor) -> SparseTensor:
        y = spnn.ReLU(True)(net[0](x))
        y = net[0](y) + net[0](x)
        y = y + y
        z = net[0](y)
        return spnn.ReLU()(z + spnn.ReLU(False)(z))

    net = randomised(nn.ModuleList([spnn.BatchNorm(3)]), device)
    compare(net, device, run)
    assert int(net.state_dict()["0.num_batches_tracked"]) == 4


@pytest.mark.parametrize("frozen", ["input", "parameters", "weight", "everything but the sum"])
def test_frozen_parts(frozen, device) -> None:
    norm = spnn.BatchNorm(3).to(device, F64)
    norm.weight.requires_grad_(frozen == "input")
    norm.bias.requires_grad_(frozen in ("input", "weight"))
    leaves: list[list[Tensor]] = []
    for fuse in (True, False):
        torchsparse.backends.fuse = fuse
        x, other = sparse(device), sparse(device)
        x.feats.requires_grad_(frozen in ("parameters", "weight"))
        other.feats.requires_grad_(frozen == "everything but the sum")
        other.coords = x.coords
        norm.zero_grad()
        y = spnn.ReLU()(norm(x) + other).feats
        y.square().sum().backward()
        tensors = x.feats, other.feats, norm.weight, norm.bias
        leaves.append([t.grad for t in tensors if t.grad is not None])
    assert len(leaves[0]) == len(leaves[1]) > 0
    for got, want in zip(*leaves):
        torch.testing.assert_close(got, want)


def test_gradients_are_recorded_where_the_module_was_called(device) -> None:
    """Not where its features are first looked at."""
    norm = spnn.BatchNorm(3).to(device, F64)
    x = sparse(device)
    y = norm(x)
    with torch.no_grad():
        assert y.feats.requires_grad
        z = norm(x)
    assert not z.feats.requires_grad
    y = norm(x)
    with torch.inference_mode():
        assert y.feats.requires_grad and not y.feats.is_inference()
    y.feats.sum().backward()
    assert norm.bias.grad is not None
    # What is added without gradients is no part of the graph, and the rest stays one.
    for follow in (lambda y: y + x, spnn.ReLU(False)):
        y = norm(x)
        with torch.no_grad():
            w = follow(y)
        assert not w.feats.requires_grad and y.feats.requires_grad
        want = follow(SparseTensor(y.feats.detach(), x.coords))
        torch.testing.assert_close(w.feats, want.feats)


def test_no_gradients_meet_gradients(device) -> None:
    norm = spnn.BatchNorm(3).to(device, F64)
    x = sparse(device)
    raw = x.feats
    with torch.no_grad():
        y = norm(x)
    raw.requires_grad_()
    assert pending(y) is not None
    total = y + x
    total.feats.sum().backward()
    assert raw.grad is not None and torch.equal(raw.grad, torch.ones_like(raw))


def test_evaluation_does_not_join_training(device) -> None:
    """Behind a norm of the batch, one by running statistics starts anew."""
    first, second = (spnn.BatchNorm(3).to(device, F64) for _ in range(2))
    second.eval()
    with torch.no_grad():
        x = sparse(device)
        got = second(first(x)).feats
        torchsparse.backends.fuse = False
        torch.testing.assert_close(got, second(first(x)).feats)


def test_a_negative_slope_stays_apart(passes, device) -> None:
    def run(net: Any, x: SparseTensor) -> SparseTensor:
        return spnn.LeakyReLU(-0.5)(net[0](x))

    compare(randomised(nn.ModuleList([spnn.BatchNorm(3)]), device), device, run)
    assert passes == [(False, None)]


@pytest.mark.parametrize("other", ["dtype", "broadcast"])
def test_what_does_not_fit_is_added_afterwards(other, passes, device) -> None:
    norm = spnn.BatchNorm(3).to(device, F64)
    x = sparse(device)
    feats = x.feats.float() if other == "dtype" else x.feats[:, :1]
    got = norm(x) + SparseTensor(feats, x.coords)
    torchsparse.backends.fuse = False
    want = norm(x) + SparseTensor(feats, x.coords)
    torch.testing.assert_close(got.feats, want.feats)
    assert passes == [(False, None)]


def test_changed_inputs_are_noticed(device) -> None:
    """Too late, when the features are needed; in backward, as by PyTorch."""
    norm = spnn.BatchNorm(3).to(device, F64)
    x = sparse(device)
    y = norm(x)
    x.feats.zero_()
    assert y.feats.abs().sum() > 0  # reading `x.feats` has closed the chain
    raw = x.feats
    y = norm(x)
    raw.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        _ = y.feats
    y = spnn.ReLU()(norm(x) + x)
    y.feats.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.feats.sum().backward()


@pytest.mark.parametrize("added", [False, True])
def test_second_derivatives(added, device) -> None:
    """As in a penalty on gradients, through a module that is used twice."""

    def run(net: Any, x: SparseTensor) -> list[Tensor]:
        y = net[0](spnn.LeakyReLU(0.3)(net[0](x)))
        y = spnn.LeakyReLU(0.2)(y + x if added else y).feats
        grad, weight = torch.autograd.grad(
            y.square().sum(), (x.feats, net[0].weight), create_graph=True
        )
        return [grad.square(), weight, y]

    compare(randomised(nn.ModuleList([spnn.BatchNorm(3)]), device), device, run)


def test_copies_and_detached_tensors(device) -> None:
    norm = spnn.BatchNorm(3).to(device, F64)
    x = sparse(device)
    want = norm(x).feats.detach()
    assert torch.equal(norm(x).detach().feats, want) and not norm(x).detach().feats.requires_grad
    assert torch.equal(norm(x).clone().feats, want)
    assert torch.equal(copy.copy(norm(x)).feats, want)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(norm(x))).feats, want)
    again = pickle.loads(pickle.dumps(norm))
    assert torch.equal(again(x).feats, want)


def test_nothing_is_kept_alive(device) -> None:
    """A chain that nobody wants any more is not computed, and goes."""
    norm = spnn.BatchNorm(3).to(device, F64)
    gc.disable()  # no cycle keeps it either
    y = norm(sparse(device))
    z = spnn.ReLU(False)(y)
    kept = [weakref.ref(one._feats) for one in (y, z)]
    del y, z
    gone = [one() is None for one in kept]
    gc.enable()
    assert gone == [True, True]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(3),
        spnn.BatchNorm(3, dtype=torch.float16),
        nn.utils.parametrizations.weight_norm(spnn.BatchNorm(3), dim=0),
    ],
    ids=["dense", "dtypes", "parametrised"],
)
def test_what_is_left_to_pytorch(norm, passes, device) -> None:
    norm = copy.deepcopy(norm).to(device)
    x = sparse(device, dtype=F32)
    if isinstance(norm, spnn.BatchNorm) and norm.running_mean.dtype == torch.float16:  # pyright: ignore
        assert norm._by_batch(x) is None
    elif type(norm) is nn.BatchNorm1d:
        assert isinstance(norm(x.feats), Tensor)
    else:
        assert isinstance(norm(x)._feats, Tensor)
    assert not passes


def test_without_fusing_and_without_kernels_pytorch_serves(passes, device) -> None:
    x, norm = sparse(device), spnn.BatchNorm(3).to(device, F64)
    torchsparse.backends.fuse = False
    assert isinstance(norm(x)._feats, Tensor)
    assert not passes


def test_gradients_by_differences(device) -> None:
    """Of the node with all that can join, in all that it depends on."""
    torch.manual_seed(0)
    feats, added = (torch.randn(7, 3, dtype=F64, device=device) for _ in range(2))
    weight, bias = (torch.randn(3, dtype=F64, device=device) for _ in range(2))

    def run(slope: Any, feats: Tensor, weight: Tensor, bias: Tensor, added: Tensor) -> Tensor:
        return late_norm.normalise_batch(
            feats, weight, bias, added, late_norm.batch_moments_(
                feats, 1e-3, None, None, None, 0.1
            ), slope, 1e-3,
        )  # fmt: skip

    for slope in (None, 0.0, 0.3):
        leaves = [t.clone().requires_grad_() for t in (feats, weight, bias, added)]
        assert torch.autograd.gradcheck(partial(run, slope), leaves)
        assert torch.autograd.gradgradcheck(partial(run, slope), leaves)
        own = torch.nn.functional.batch_norm(
            leaves[0], None, None, leaves[1], leaves[2], True, 0.1, 1e-3
        )
        want = own + leaves[3]
        want = want if slope is None else torch.nn.functional.leaky_relu(want, slope)
        torch.testing.assert_close(run(slope, *leaves), want)
