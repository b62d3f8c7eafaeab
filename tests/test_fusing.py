"""Features that are put off: fused and unfused networks agree, whoever looks, whatever follows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsparse
from tests.cases import sparse
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse._lazy import Lazy
from torchsparse.tensor import pending

# One rounding at the end instead of one per module, each to 24 and 11 bits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2}


def filled(*layers: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    """The layers in evaluation, with statistics as after training."""
    torch.manual_seed(3)
    net = nn.Sequential(*layers)
    for module in net.modules():
        if isinstance(module, spnn.BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return net.to(device, dtype).eval()


class Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int, inplace: bool) -> None:
        super().__init__()
        self.main = nn.Sequential(
            spnn.Conv3d(c_in, c_out, 3, bias=True),
            spnn.BatchNorm(c_out),
            spnn.ReLU(inplace),
            spnn.Conv3d(c_out, c_out, 3),
            spnn.BatchNorm(c_out),
        )
        self.shortcut = nn.Identity()
        if c_in != c_out:
            self.shortcut = nn.Sequential(spnn.Conv3d(c_in, c_out, 1), spnn.BatchNorm(c_out))
        self.relu = spnn.ReLU(inplace)

    def forward(self, x: SparseTensor) -> SparseTensor:
        return self.relu(self.main(x) + self.shortcut(x))


def network(device: torch.device, dtype: torch.dtype, inplace: bool = True) -> nn.Sequential:
    return filled(
        spnn.Conv3d(3, 16, 3),
        spnn.BatchNorm(16, affine=False),
        spnn.LeakyReLU(inplace=inplace),
        Residual(16, 16, inplace),
        Residual(16, 24, inplace),
        spnn.Conv3d(24, 32, 2, stride=2),
        spnn.BatchNorm(32),
        spnn.ReLU(inplace),
        Residual(32, 32, inplace),
        spnn.Conv3d(32, 8, 2, stride=2, transposed=True, bias=True),
        device=device,
        dtype=dtype,
    )


def layer(c_in: int, c_out: int, size: int, device: torch.device, dtype: torch.dtype) -> Any:
    """One convolution."""
    return filled(spnn.Conv3d(c_in, c_out, size), device=device, dtype=dtype)[0]


def unfused(run: Callable[[], SparseTensor]) -> Tensor:
    torchsparse.backends.fuse = False
    with torch.no_grad():
        feats = run().feats
    torchsparse.backends.fuse = True
    return feats


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_fused_networks_agree_with_unfused(dtype, inplace, device) -> None:
    net = network(device, dtype, inplace)

    def run() -> SparseTensor:
        return net(sparse(device, "odd", dtype=dtype))

    want = unfused(run)
    with torch.no_grad():
        out = run()
    assert isinstance(out._feats, Lazy) and not out._feats.done
    assert out.feats.dtype == dtype
    scale = float(want.abs().max())
    torch.testing.assert_close(out.feats, want, rtol=0, atol=TOLERANCES[dtype] * scale)


def test_synchronised_norms_join_as_others(device) -> None:
    net = network(device, torch.float64)
    with torch.no_grad():
        want = net(sparse(device)).feats
        out = spnn.convert_sync_batchnorm(net)(sparse(device))
    assert isinstance(out._feats, Lazy) and not out._feats.done
    assert torch.equal(out.feats, want)


@pytest.mark.parametrize("cloud", ["empty", "single", "batch_gap"])
def test_small_clouds(cloud, device) -> None:
    net = network(device, torch.float64)
    want = unfused(lambda: net(sparse(device, cloud)))
    with torch.no_grad():
        torch.testing.assert_close(net(sparse(device, cloud)).feats, want)


def test_hooks_see_unfused_features(device) -> None:
    """Looking at every module's output changes none of them."""
    net = network(device, torch.float64, inplace=False)
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: SparseTensor) -> None:
            seen.setdefault(name, []).append(output.feats.clone())

        return hook

    for name, module in net.named_modules():
        module.register_forward_hook(keep(name))
    unfused(lambda: net(sparse(device)))
    with torch.no_grad():
        net(sparse(device))
    assert len(seen) > 20
    for name, (want, got) in seen.items():
        torch.testing.assert_close(got, want, msg=name)


def test_a_second_consumer_gets_the_features_of_its_place(device) -> None:
    net = filled(spnn.Conv3d(3, 8, 3), spnn.BatchNorm(8), device=device, dtype=torch.float64)
    x = sparse(device)
    conv, norm = net
    assert isinstance(norm, spnn.BatchNorm)
    want = unfused(lambda: conv(x))
    with torch.no_grad():
        y = conv(x)
        z = norm(y)
        both = torchsparse.cat([y, z])
    torch.testing.assert_close(both.feats[:, :8], want)
    torch.testing.assert_close(both.feats[:, 8:], nn.BatchNorm1d.forward(norm, want))


def test_in_place_activation_shows_in_its_input(device) -> None:
    """As it does without fusing: `y` and `z` are one."""
    conv = layer(3, 8, 3, device, torch.float64)
    with torch.no_grad():
        y = conv(sparse(device))
        z = spnn.ReLU(True)(y)
        assert z.feats is y.feats and bool((y.feats >= 0).all())
        y = conv(sparse(device))
        z = spnn.ReLU(False)(y)
        assert bool((y.feats < 0).any()) and bool((z.feats >= 0).all())


def test_infinity_and_nan_pass_as_in_torch(device) -> None:
    conv = layer(1, 3, 1, device, torch.float32)
    x = sparse(device, "single", channels=1, dtype=torch.float32)
    with torch.no_grad():
        conv.kernel.copy_(torch.tensor([[-torch.inf, torch.nan, torch.inf]], device=device))
        x.feats = torch.ones_like(x.feats)
        out = spnn.ReLU()(conv(x)).feats
    assert out[0, 0] == 0 and out[0, 1].isnan() and out[0, 2] == torch.inf


def test_a_module_used_twice(device) -> None:
    net = filled(spnn.Conv3d(3, 3, 3), spnn.BatchNorm(3), device=device, dtype=torch.float64)
    want = unfused(lambda: net(net(sparse(device))))
    with torch.no_grad():
        torch.testing.assert_close(net(net(sparse(device))).feats, want)


def test_switching_between_training_and_evaluation(device) -> None:
    net = network(device, torch.float64, inplace=False)
    twin = copy.deepcopy(net)
    for _ in range(2):
        for one, fuse in ((net, True), (twin, False)):
            torchsparse.backends.fuse = fuse
            one.train()
            one(sparse(device, "odd")).feats.square().mean().backward()
            one.eval()
        with torch.no_grad():
            torchsparse.backends.fuse = True
            got = net(sparse(device, "block")).feats
            torchsparse.backends.fuse = False
            torch.testing.assert_close(got, twin(sparse(device, "block")).feats)
    for a, b in zip(net.state_dict().values(), twin.state_dict().values()):
        torch.testing.assert_close(a, b)


def test_statistics_of_training_are_not_joined(device) -> None:
    """Without gradients but in training, statistics are those of the batch and are recorded."""
    net = filled(spnn.Conv3d(3, 8, 3), spnn.BatchNorm(8), device=device, dtype=torch.float64)
    net.train()
    norm: Any = net[1]
    before = norm.running_mean.clone()
    with torch.no_grad():
        out = net(sparse(device))
    assert not torch.equal(norm.running_mean, before)
    torch.testing.assert_close(out.feats.mean(0), norm.bias.detach())


def test_gradients_are_never_put_off(device) -> None:
    net = network(device, torch.float64)
    out = net(sparse(device))
    assert isinstance(out._feats, Tensor) and out.feats.requires_grad


def test_frozen_parts_join_nothing_that_learns(device) -> None:
    conv = layer(3, 3, 3, device, torch.float64)
    x = sparse(device)
    with torch.no_grad():
        y = conv(x)
    x.feats = x.feats.requires_grad_()
    total = y + x
    total.feats.sum().backward()
    assert x.feats.grad is not None
    torch.testing.assert_close(total.feats, y.feats + x.feats)


def test_changing_an_input_too_late_is_an_error(device) -> None:
    conv = layer(3, 3, 3, device, torch.float64)
    x = sparse(device)
    raw = x.feats
    with torch.no_grad():
        y = conv(x)
        raw.zero_()
        with pytest.raises(RuntimeError, match="changed in place, moved or cast"):
            _ = y.feats


def test_changing_an_input_through_the_library_closes_the_chain_first(device) -> None:
    conv = layer(3, 3, 3, device, torch.float64)
    x = sparse(device)
    want = unfused(lambda: conv(x))
    with torch.no_grad():
        y = conv(x)
        spnn.ReLU(True)(x)
        assert pending(y) is None
    torch.testing.assert_close(y.feats, want)


def test_copies_hold_features(device) -> None:
    conv = layer(3, 3, 3, device, torch.float64)
    with torch.no_grad():
        want = conv(sparse(device)).feats
        assert torch.equal(pickle.loads(pickle.dumps(conv(sparse(device)))).feats, want)
        assert torch.equal(copy.deepcopy(conv(sparse(device))).feats, want)
        assert torch.equal(copy.copy(conv(sparse(device))).feats, want)


def test_another_stream_waits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda")
    conv = layer(3, 64, 3, device, torch.float32)
    x = sparse(device, "block", dtype=torch.float32)
    want = unfused(lambda: conv(x))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        y = conv(x)
    torch.testing.assert_close(y.feats, want)
    with torch.no_grad():
        y = conv(x)
    with torch.cuda.stream(side):
        feats = y.feats
    side.synchronize()
    torch.testing.assert_close(feats, want)


def test_a_buffer_of_inference_mode_may_be_filled_again(device: torch.device) -> None:
    """Its writes are not counted, so what reads it must not be put off."""
    net = filled(spnn.Conv3d(4, 8, 3), spnn.BatchNorm(8), spnn.ReLU(), device=device,
                 dtype=torch.float32)  # fmt: skip
    x = sparse(device, "odd", channels=4, dtype=torch.float32)
    with torch.inference_mode():
        frames = [torch.randn_like(x.feats, dtype=torch.float32) for _ in range(3)]
        want = [net(SparseTensor(frame.clone(), x.coords)).feats for frame in frames]
        buffer, seen = torch.empty_like(frames[0]), []
        for frame in frames:
            buffer.copy_(frame)
            seen.append(net(SparseTensor(buffer, x.coords)))
        assert all(torch.equal(y.feats, w) for y, w in zip(seen, want))


def test_a_residual_of_inference_mode_may_be_filled_again(device: torch.device) -> None:
    x = sparse(device, "odd", channels=4, dtype=torch.float32)
    conv = filled(spnn.Conv3d(4, 4, 3), device=device, dtype=torch.float32)
    with torch.inference_mode():
        buffer = torch.randn_like(x.feats)
        want = conv(x).feats + buffer
        y = conv(x) + SparseTensor(buffer, x.coords)
        buffer.zero_()
        torch.testing.assert_close(y.feats, want)


def test_only_those_who_ask_are_told_of_a_late_change(device: torch.device) -> None:
    x = sparse(device, "odd", channels=4, dtype=torch.float32)
    conv = filled(spnn.Conv3d(4, 8, 3), device=device, dtype=torch.float32)
    with torch.no_grad():
        feats = x.feats
        y = conv(x)
        feats.zero_()
        other = SparseTensor(torch.ones_like(feats), x.coords)
        assert other.feats.sum() > 0 and conv(other).feats.shape[1] == 8
        with pytest.raises(RuntimeError, match="changed in place, moved or cast"):
            _ = y.feats


@pytest.mark.parametrize("part", ["convolution", "norm", "features"])
@pytest.mark.parametrize("change", ["half", "data", "moved"])
def test_what_got_other_memory_is_not_read(part: str, change: str, device: torch.device) -> None:
    """A module that is moved or cast gives its parameters other memory and counts no write."""
    x = sparse(device, "odd", channels=4, dtype=torch.float32)
    conv, norm = spnn.Conv3d(4, 8, 3), spnn.BatchNorm(8)
    net = filled(conv, norm, device=device, dtype=torch.float32)
    changed = {"convolution": conv.kernel, "norm": norm.weight, "features": x.feats}[part]
    with torch.no_grad():
        y = net(x)
        if change == "half":
            changed.data = changed.data.half()
        elif change == "data":
            changed.data = changed.data.clone()
        else:
            changed.data = changed.data.cpu().double()
        with pytest.raises(RuntimeError, match="changed in place, moved or cast"):
            _ = y.feats


def test_threads_may_ask_for_the_same_features(device: torch.device) -> None:
    x = sparse(device, "odd", channels=4, dtype=torch.float32)
    conv = filled(spnn.Conv3d(4, 8, 3), device=device, dtype=torch.float32)
    with torch.no_grad():
        want = conv(x).feats
        for _ in range(40):
            y = conv(x)
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda _, y=y: y.feats, range(4)))
            assert all(torch.equal(f, want) for f in found)
