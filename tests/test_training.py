"""Captured training passes, as far as a machine without a GPU can tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.scans import Dense, again, assert_agree, network, scan
from torchsparse import nn as spnn
from torchsparse.training import UNSEEN, _bring, _copies, _lent, _Packed, graphed


def test_what_runs_as_usual(device: torch.device) -> None:
    """Evaluation, no gradients, a single row, too many rows; on a CPU everything."""
    model = network(Dense, device)
    net = graphed(model, max_points=50)
    for rows in (40, 300):
        x = scan(rows, 1, device, ranged=True)
        with torch.no_grad():
            assert_agree(net(again(x)), model(again(x)))
    model.train()
    x = scan(300, 1, device, ranged=True)
    net(x)["grid"].sum().backward()
    assert all(p.grad is not None for p in model.body.parameters())  # pyright: ignore
    single = nn.Sequential(spnn.Conv3d(4, 4, 3)).to(device)
    graphed(single)(scan(1, 1, device)).feats.sum().backward()
    assert net.captures == net.replays == 0


def test_bad_arguments(device: torch.device) -> None:
    model = network(Dense, device)
    with pytest.raises(ValueError, match="max_points"):
        graphed(model, max_points=0)
    with pytest.raises(ValueError, match="keep"):
        graphed(model, keep=0)
    with pytest.raises(TypeError, match="SparseTensor"):
        graphed(model)(torch.zeros(3, 4))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"the model.*DataParallel"):
        graphed(nn.DataParallel(model))
    with pytest.raises(ValueError, match=r"the model.*BatchNorm1d"):
        graphed(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"1.*InstanceNorm1d"):
        graphed(nn.Sequential(spnn.Conv3d(4, 4, 3), nn.InstanceNorm1d(4)))


def test_norms_of_dense_maps_are_none_over_rows() -> None:
    """A detector's head, which works on a grid."""
    graphed(nn.Sequential(spnn.Conv3d(4, 4, 3), nn.Sequential(nn.BatchNorm2d(4))))
    graphed(nn.Sequential(spnn.Conv3d(4, 4, 3), nn.Sequential(nn.InstanceNorm3d(4))))


def test_gradients_are_brought_to_where_a_graph_reads_them() -> None:
    """Rows of an earlier, larger scan are zeros again; a loss has no rows."""
    kept = [torch.zeros(4, 2), torch.zeros(())]
    passes: Any = SimpleNamespace(grads=kept, filled=[0, 0])
    _bring([torch.ones(3, 2), torch.tensor(1.0)], passes)
    _bring([torch.full((1, 2), 2.0), torch.tensor(3.0)], passes)
    assert kept[0].tolist() == [[2, 2], [0, 0], [0, 0], [0, 0]]
    assert kept[1].item() == 3


def test_parameters_are_lent_and_given_back() -> None:
    """Of a module with two names, and of two modules with one parameter."""
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)})
    net["again"] = net["a"]
    net["b"].weight = net["a"].weight
    before = dict(net.named_parameters(remove_duplicate=False))
    leaves = {id(p): torch.full_like(p, 2.0).requires_grad_() for p in net.parameters()}
    assert len(leaves) == 2
    x = torch.ones(1, 2)
    with _lent(net, leaves):
        y = net["a"](x) + net["again"](x) + net["b"](x)
    assert y.tolist() == [[16.0, 16.0]]
    y.sum().backward()
    assert [leaf.grad is not None for leaf in leaves.values()] == [True, True]
    after = dict(net.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[name] is p and p.grad is None for name, p in before.items())


def test_values_go_back_to_where_they_came_from() -> None:
    """Also if a tensor has other data by then."""
    a, b = torch.arange(3.0), torch.tensor(5)
    packed = _Packed([a, b])
    values = packed.pack()
    a.zero_()
    b.zero_()
    packed.unpack(values)
    assert a.tolist() == [0, 1, 2]
    assert b.item() == 5


def test_copies_are_of_the_same_values_in_other_memory() -> None:
    tensors = [
        torch.arange(3.0),
        torch.tensor([torch.nan, -0.0]),
        torch.ones(2, 0),
        torch.ones(()),
    ]
    copies = _copies([*tensors, torch.ones(2, dtype=torch.float16)])
    for tensor, copied in zip(tensors, copies):
        assert copied.data_ptr() != tensor.data_ptr() or tensor.numel() == 0
        torch.testing.assert_close(copied, tensor, rtol=0, atol=0, equal_nan=True)
    assert copies[1][1].signbit() and copies[-1].dtype == torch.float16
    assert _copies([]) == []


@pytest.mark.parametrize("arrives", ["at once", "in pieces", "at the end"])
def test_the_host_waits_until_a_report_is_there(arrives: str, device: torch.device) -> None:
    """Until all of it has arrived, and not for what the graph does after that."""
    report = torch.full((5,), UNSEEN)
    looks: list[str] = []

    def query() -> bool:
        """Whether the graph has ended; a little more arrives meanwhile."""
        looks.append(arrives)
        if arrives == "in pieces":
            report[: 2 * len(looks)] = 7
            return False
        if arrives == "at once":
            report.fill_(7)
            return False
        if len(looks) == 4:
            report.fill_(7)
        return len(looks) == 4

    net = graphed(network(Dense, device))
    net._replayed = SimpleNamespace(query=query)
    bucket: Any = SimpleNamespace(report=report)
    net._await(bucket)
    assert report.tolist() == [7] * 5
    assert len(looks) == {"at once": 1, "in pieces": 3}.get(arrives, 4)
