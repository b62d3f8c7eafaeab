"""The public functions and their derivatives, served by kernels, in the sense of the reference."""

import pytest
import torch

from tests._triton.test_points import close, randint, randn
from torchsparse import SparseTensor
from torchsparse._autograd.points import to_dense
from torchsparse._ops.dispatch import forced
from torchsparse.nn import functional as F
from torchsparse.nn.functional.norm import group_norm, instance_norm

pytestmark = pytest.mark.usefixtures("clean_state")


def cloud(device, n=211):
    coords = randint(0, 6, (n, 4), device, torch.int32)
    coords[:, 0] //= 2
    return coords


def dense(x, device):
    return to_dense(x, cloud(device), (3, 6, 6, 6))


def narrow(x, device):
    return to_dense(x[:, 1:2], cloud(device), (3, 6, 6, 6))


def voxelize(x, device):
    index = randint(-1, 50, (len(x),), device)
    return F.spvoxelize(x, index, F.spcount(index, 50))


def devoxelize(x, device):
    index, shares = (
        randint(-1, len(x), (70, 8), device),
        randn(70, 8, dtype=x.dtype, device=device),
    )
    return F.spdevoxelize(x, index, shares.requires_grad_())


def pooled(pool):
    return lambda x, device: pool(SparseTensor(x, cloud(device)))


def normalised(norm, *args):
    weight = torch.linspace(1, 2, 6)

    def run(x, device):
        w = weight.to(device, x.dtype).requires_grad_()
        return norm(SparseTensor(x, cloud(device)), *args, weight=w, bias=w).feats

    return run


CASES = {
    "to_dense": dense,
    "to_dense, one channel": narrow,
    "spvoxelize": voxelize,
    "spdevoxelize": devoxelize,
    "global_avg_pool": pooled(F.global_avg_pool),
    "global_max_pool": pooled(F.global_max_pool),
    "group_norm": normalised(group_norm, 2),
    "instance_norm": normalised(instance_norm),
}


def results(name, dtype, device):
    """The value of a case, and the gradients of all that it depends on."""
    x = randn(211, 6, dtype=dtype, device=device).requires_grad_()
    y = CASES[name](x, device)
    leaves, pending = [x], [y.grad_fn]
    while pending:  # also the leaves that a case has made
        node = pending.pop()
        leaves += [node.variable] if hasattr(node, "variable") else []
        pending += [following for following, _ in node.next_functions if following is not None]
    grad = randn(*y.shape, dtype=dtype, device=device, seed=5)
    return [y, *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_values_and_gradients(name, dtype, device):
    want = results(name, dtype, torch.device("cpu"))
    with forced("_triton"):
        got = results(name, dtype, device)
        for _ in range(10 if device.type == "cuda" else 0):
            again = results(name, dtype, device)
            assert all(torch.equal(a, b) for a, b in zip(got, again))
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.dtype == b.dtype
        if dtype == torch.float32:  # gradients of norms cancel
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
        else:
            close(a.cpu(), b)


@pytest.mark.usefixtures("kernels")
def test_search(device):
    coords = cloud(device, 60)
    offsets = randint(-1, 2, (7, 3), device, torch.int32)
    hashes = F.sphash(coords, offsets)
    rows = F.sphashquery(hashes, F.sphash(coords))
    assert rows.shape == (7, 60)
    sites = {tuple(c): i for i, c in reversed(list(enumerate(coords.tolist())))}
    for k, (dx, dy, dz) in enumerate(offsets.tolist()):
        want = [sites.get((b, x + dx, y + dy, z + dz), -1) for b, x, y, z in coords.tolist()]
        assert rows[k].tolist() == want
