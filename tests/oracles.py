"""Two judges of a sparse convolution. Neither imports the library, both count in float64.

* The search: Python dicts over sites, straight from the one formula

      fine_i = coarse_i * s_i - o_i + d_i * t_i          (equal sample on both sides)

* The dense convolution: ``torch.nn.functional.conv3d`` and ``conv_transpose3d`` on a box.

Coordinate rows are (b, x, y, z). A tap is t = (tx, ty, tz) with 0 <= t_i < k_i. A ``Layer`` says
what is computed, a ``Relation`` which input row meets which tap in which output row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Triple = tuple[int, int, int]
Site = tuple[int, int, int, int]
Range = tuple[int, ...]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

AXES = range(3)


def triple(value: int | Sequence[int]) -> Triple:
    """An int three times, or three ints as they are."""
    if isinstance(value, int):
        return (value, value, value)
    x, y, z = (int(v) for v in value)
    return (x, y, z)


@dataclass(frozen=True)
class Layer:
    """One convolution and the switches that decide its sites.

    ``Layer.of(kernel_size=3, stride=2)`` accepts ints; the fields hold triples.
    """

    kernel_size: Triple
    stride: Triple
    padding: Triple
    dilation: Triple
    transposed: bool = False
    generative: bool = False
    minkowski: bool = False
    allow_negative: bool = False
    infer_range: bool = True

    @staticmethod
    def of(
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        **switches: bool,
    ) -> Layer:
        k, s, p, d = (triple(size) for size in (kernel_size, stride, padding, dilation))
        return Layer(k, s, p, d, **switches)

    def __str__(self) -> str:
        def short(value: Triple) -> str:
            same = len(set(value)) == 1
            return str(value[0]) if same else "x".join(str(v) for v in value)

        text = f"k{short(self.kernel_size)}s{short(self.stride)}"
        text += f"p{short(self.padding)}d{short(self.dilation)}"
        for name in ("transposed", "generative", "minkowski"):
            text += f"-{name}" if getattr(self, name) else ""
        return text

    @property
    def volume(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1] * self.kernel_size[2]

    @property
    def kind(self) -> str:
        """Which row of the table of sites applies (transposed with stride 1: submanifold)."""
        if self.kernel_size == self.stride == (1, 1, 1):
            return "pointwise"
        if self.generative:
            return "generative"
        if self.stride == (1, 1, 1):
            return "submanifold"
        if self.transposed:
            return "transposed"
        return "minkowski" if self.minkowski else "strided"

    @property
    def scatters(self) -> bool:
        """The inputs are the coarse side of the formula."""
        return self.transposed or self.generative

    @property
    def offset(self) -> Triple:
        """o of the formula; for a transposed layer, the one of its own arguments."""
        k, d = self.kernel_size, self.dilation
        if self.kind in ("submanifold", "pointwise"):
            odd = self.volume % 2 == 1
            return triple([d[i] * (k[i] - 1) // 2 if odd else 0 for i in AXES])
        if self.minkowski:
            return triple([d[i] * ((k[i] - 1) // 2) for i in AXES])
        return self.padding

    @property
    def reach(self) -> Triple:
        """d (k - 1): how far apart the outermost taps lie."""
        return triple([self.dilation[i] * (self.kernel_size[i] - 1) for i in AXES])


@dataclass(frozen=True, eq=False)
class Relation:
    """Which input row meets tap t in output row m: ``table[m, t]``, -1 = none.

    Kernel 3 along x, sites x = 4, 5, 9, submanifold:
        table = [[-1, 0, 1], [0, 1, -1], [-1, 2, -1]]
    """

    coords: Ints  # [M, 4] output sites, in the order of the output
    table: Ints  # [M, K] input rows
    spatial_range: Range | None
    num_inputs: int

    @property
    def pairs(self) -> list[tuple[int, int, int]]:
        """(input, output, tap) by tap, then by output row."""
        rows, columns = np.nonzero(self.table.T >= 0)
        return [(int(self.table[m, t]), int(m), int(t)) for t, m in zip(rows, columns)]


def taps(kernel_size: Triple) -> list[Triple]:
    """The taps by weight index: x fastest for an odd volume, z fastest for an even one."""
    kx, ky, kz = kernel_size
    every = itertools.product(range(kx), range(ky), range(kz))
    if kx * ky * kz % 2 == 1:
        index = {t: t[0] + kx * (t[1] + ky * t[2]) for t in every}
    else:
        index = {t: (t[0] * ky + t[1]) * kz + t[2] for t in every}
    return sorted(index, key=lambda t: index[t])


def module_padding(
    kernel_size: Triple, stride: Triple, padding: Triple, dilation: Triple
) -> Triple:
    """What ``nn.Conv3d`` makes of its padding argument."""
    p = list(padding)
    for i in AXES:
        if kernel_size[i] % 2 == 1 and stride[i] == 1:
            p[i] = dilation[i] * (kernel_size[i] - 1) // 2
    return triple(p)


def as_sites(coords: NDArray[np.generic] | Iterable[Site]) -> list[Site]:
    rows = np.asarray(coords if isinstance(coords, np.ndarray) else list(coords))
    return [(int(b), int(x), int(y), int(z)) for b, x, y, z in rows.reshape(-1, 4)]


def as_rows(sites: Sequence[Site]) -> Ints:
    return np.array(sites, np.int64).reshape(-1, 4)


def output_range(spatial_range: Range | None, layer: Layer) -> Range | None:
    """The range of the output, on the output's own lattice."""
    if layer.kind == "pointwise" or spatial_range is None:
        return spatial_range
    batch, *r = spatial_range[:4]
    s, p, reach = layer.stride, layer.padding, layer.reach
    if layer.kind == "strided":
        return (batch, *((r[i] + 2 * p[i] - reach[i] - 1) // s[i] + 1 for i in AXES))
    if layer.kind == "minkowski":
        return (batch, *((r[i] - 1) // s[i] + 1 for i in AXES))
    if layer.kind == "generative":
        return (batch, *(r[i] * s[i] for i in AXES))
    return (batch, *r)


def output_stride(tensor_stride: Triple, layer: Layer) -> Triple:
    s = layer.stride
    if layer.kind in ("strided", "minkowski"):
        return triple([tensor_stride[i] * s[i] for i in AXES])
    if layer.kind == "transposed":
        return triple([tensor_stride[i] // s[i] for i in AXES])
    if layer.kind == "generative":
        return triple([max(1, tensor_stride[i] // s[i]) for i in AXES])
    return tensor_stride


def coarse_of(fine: Site, tap: Triple, layer: Layer, offset: Triple) -> Site | None:
    """The coarse site that meets this fine site in this tap, if there is one."""
    found = [fine[0]]
    for i in AXES:
        scaled = fine[1 + i] + offset[i] - layer.dilation[i] * tap[i]
        if scaled % layer.stride[i] != 0:
            return None
        found.append(scaled // layer.stride[i])
    return (found[0], found[1], found[2], found[3])


def fine_of(coarse: Site, tap: Triple, layer: Layer, offset: Triple) -> Site:
    s, d = layer.stride, layer.dilation
    x, y, z = (coarse[1 + i] * s[i] - offset[i] + d[i] * tap[i] for i in AXES)
    return (coarse[0], x, y, z)


def bounds(
    sites: Sequence[Site], layer: Layer, spatial_range: Range | None
) -> tuple[list[float], list[float]]:
    """Lowest and highest allowed site per axis (infinite where nothing bounds it)."""
    lower = [-np.inf if layer.allow_negative else 0.0] * 3
    upper = [np.inf] * 3
    if layer.kind == "strided":
        known = output_range(spatial_range, layer)
        if known is not None:
            upper = [known[1 + i] - 1.0 for i in AXES]
        elif layer.infer_range and sites:
            p, reach, s = layer.padding, layer.reach, layer.stride
            highest = [max(site[1 + i] for site in sites) for i in AXES]
            upper = [float((highest[i] + 2 * p[i] - reach[i]) // s[i]) for i in AXES]
    elif layer.kind == "generative" and spatial_range is not None:
        upper = [spatial_range[1 + i] * layer.stride[i] - 1.0 for i in AXES]
    elif layer.kind == "minkowski":
        lower = [-np.inf] * 3
    return lower, upper


def output_sites(
    coords: NDArray[np.generic], layer: Layer, spatial_range: Range | None = None
) -> list[Site]:
    """The output sites in their order; a transposed layer is told its own (``relate``)."""
    sites = as_sites(coords)
    if layer.kind in ("pointwise", "submanifold"):
        return sites
    found: set[Site] = set()
    for site in sites:
        if layer.kind == "minkowski":
            x, y, z = (site[1 + i] // layer.stride[i] for i in AXES)
            found.add((site[0], x, y, z))
            continue
        for tap in taps(layer.kernel_size):
            if layer.kind == "generative":
                found.add(fine_of(site, tap, layer, layer.offset))
            else:
                coarse = coarse_of(site, tap, layer, layer.offset)
                found |= {coarse} if coarse else set()
    lower, upper = bounds(sites, layer, spatial_range)
    kept = (c for c in found if all(lower[i] <= c[1 + i] <= upper[i] for i in AXES))
    return sorted(kept)


def relate(
    coords: NDArray[np.generic],
    layer: Layer,
    spatial_range: Range | None = None,
    fine: NDArray[np.generic] | None = None,
    offset: Triple | None = None,
    fine_range: Range | None = None,
) -> Relation:
    """Search every tap of every output site. A transposed layer needs ``fine``, its output."""
    inputs = as_sites(coords)
    if layer.kind == "transposed":
        assert fine is not None, "a transposed layer is told its output sites"
        outputs, out_range = as_sites(fine), fine_range
    else:
        outputs = output_sites(coords, layer, spatial_range)
        out_range = output_range(spatial_range, layer)
    o = layer.offset if offset is None else offset
    row = {site: n for n, site in enumerate(inputs)}
    table = np.full((len(outputs), layer.volume), -1, np.int64)
    for m, site in enumerate(outputs):
        for t, tap in enumerate(taps(layer.kernel_size)):
            if layer.scatters:
                met = coarse_of(site, tap, layer, o)
            else:
                met = fine_of(site, tap, layer, o)
            if met is not None:
                table[m, t] = row.get(met, -1)
    return Relation(as_rows(outputs), table, out_range, len(inputs))


def convolve(
    feats: NDArray[np.generic],
    kernel: NDArray[np.generic],
    relation: Relation,
    bias: NDArray[np.generic] | None = None,
) -> Floats:
    """out[m] = bias + sum over t of feats[table[m, t]] @ kernel[t], in float64."""
    feats64, kernel64 = feats.astype(np.float64), weights(kernel)
    out = np.zeros((len(relation.coords), kernel64.shape[2]))
    for t in range(kernel64.shape[0]):
        hit = relation.table[:, t] >= 0
        out[hit] += feats64[relation.table[hit, t]] @ kernel64[t]
    return out if bias is None else out + bias.astype(np.float64)


def gradients(
    feats: NDArray[np.generic],
    kernel: NDArray[np.generic],
    relation: Relation,
    grad: NDArray[np.generic],
) -> tuple[Floats, Floats, Floats]:
    """Gradients of sum(out * grad) to feats [N, C_in], kernel [K, C_in, C_out], bias [C_out]."""
    feats64, kernel64, grad64 = feats.astype(np.float64), weights(kernel), grad.astype(np.float64)
    to_feats, to_kernel = np.zeros_like(feats64), np.zeros_like(kernel64)
    for n, m, t in relation.pairs:
        to_feats[n] += kernel64[t] @ grad64[m]
        to_kernel[t] += np.outer(feats64[n], grad64[m])
    return to_feats, to_kernel, grad64.sum(0)


def weights(kernel: NDArray[np.generic]) -> Floats:
    """[K, C_in, C_out] float64, also from the two-dimensional form of a single tap."""
    kernel64 = kernel.astype(np.float64)
    return kernel64[None] if kernel64.ndim == 2 else kernel64


# The dense judge.


def dense_weight(kernel: Tensor, kernel_size: Triple) -> Tensor:
    """[K, C_in, C_out] by weight index -> [kx, ky, kz, C_in, C_out]."""
    kx, ky, kz = kernel_size
    kernel = kernel.reshape(-1, *kernel.shape[-2:])
    if kx * ky * kz % 2 == 1:
        return kernel.reshape(kz, ky, kx, *kernel.shape[1:]).permute(2, 1, 0, 3, 4)
    return kernel.reshape(kx, ky, kz, *kernel.shape[1:])


def to_box(feats: Tensor, sites: Tensor, low: Tensor, size: Sequence[int], batch: int) -> Tensor:
    """[B, C, X, Y, Z] with feats at their sites minus ``low``; rows outside are left out."""
    place = sites[:, 1:] - low
    inside = ((place >= 0) & (place < torch.tensor(size))).all(1)
    box = feats.new_zeros(batch, *size, feats.shape[1])
    index = (sites[inside, 0], *place[inside].unbind(1))
    return box.index_put(index, feats[inside]).permute(0, 4, 1, 2, 3)


def from_box(box: Tensor, sites: Tensor, low: Tensor) -> Tensor:
    """[M, C] at the sites; 0 outside the box."""
    place = sites[:, 1:] - low
    inside = ((place >= 0) & (place < torch.tensor(box.shape[2:]))).all(1)
    values = box.permute(0, 2, 3, 4, 1)[(sites[inside, 0], *place[inside].unbind(1))]
    return box.new_zeros(len(sites), box.shape[1]).index_put((inside.nonzero()[:, 0],), values)


def dense_convolve(
    feats: Tensor,
    coords: NDArray[np.generic],
    kernel: Tensor,
    layer: Layer,
    out_coords: NDArray[np.generic],
    offset: Triple | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same numbers by a dense convolution over a box. Differentiable in feats and kernel.

    The box starts at the lowest coarse site, so that no padding is needed: the fine box starts
    at low * s - o and is (high - low) * s + d (k - 1) + 1 wide.
    """
    inputs = torch.from_numpy(coords.astype(np.int64)).reshape(-1, 4)
    outputs = torch.from_numpy(out_coords.astype(np.int64)).reshape(-1, 4)
    weight = dense_weight(kernel, layer.kernel_size)
    if not len(inputs) or not len(outputs):
        out = feats.new_zeros(len(outputs), weight.shape[-1])
        return out if bias is None else out + bias
    s, o = layer.stride, layer.offset if offset is None else offset
    coarse = inputs if layer.scatters else outputs
    low, high = coarse[:, 1:].amin(0), coarse[:, 1:].amax(0)
    coarse_size = (high - low + 1).tolist()
    fine_size = [(coarse_size[i] - 1) * s[i] + layer.reach[i] + 1 for i in AXES]
    fine_low = low * torch.tensor(s) - torch.tensor(o)
    batch = int(max(inputs[:, 0].max(), outputs[:, 0].max())) + 1
    d = layer.dilation
    if layer.scatters:
        box = to_box(feats, inputs, low, coarse_size, batch)
        dense = torch.conv_transpose3d(box, weight.permute(3, 4, 0, 1, 2), stride=s, dilation=d)
        out = from_box(dense, outputs, fine_low)
    else:
        box = to_box(feats, inputs, fine_low, fine_size, batch)
        dense = torch.conv3d(box, weight.permute(4, 3, 0, 1, 2), stride=s, dilation=d)
        out = from_box(dense, outputs, low)
    return out if bias is None else out + bias


def dense_sites(
    coords: NDArray[np.generic], layer: Layer, spatial_range: Range | None = None
) -> list[Site]:
    """Output sites as the support of a dense convolution of ones (strided and generative)."""
    sites = torch.from_numpy(coords.astype(np.int64)).reshape(-1, 4)
    if not len(sites):
        return []
    s, o = torch.tensor(layer.stride), torch.tensor(layer.offset)
    reach = torch.tensor(layer.reach)
    low, high = sites[:, 1:].amin(0), sites[:, 1:].amax(0)
    if layer.kind == "strided":
        out_low, out_high = (low + o - reach).div(s, rounding_mode="floor"), (high + o) // s
    else:
        out_low, out_high = low * s - o, high * s - o + reach
    grid = torch.cartesian_prod(
        torch.arange(int(sites[:, 0].max()) + 1),
        *(torch.arange(int(a), int(b) + 1) for a, b in zip(out_low, out_high)),
    )
    if len(grid) == 0:
        return []
    one, kernel = torch.ones(len(sites), 1).double(), torch.ones(layer.volume, 1, 1).double()
    hit = dense_convolve(one, coords, kernel, layer, grid.numpy())[:, 0] > 0.5
    lower, upper = bounds(as_sites(coords), layer, None)
    if layer.kind == "strided" and spatial_range is not None:
        empty = torch.empty(1, 1, *spatial_range[1:4], device="meta")
        tap = torch.empty(1, 1, *layer.kernel_size, device="meta")
        out = torch.conv3d(
            empty, tap, stride=layer.stride, padding=layer.padding, dilation=layer.dilation
        )
        upper = [size - 1.0 for size in out.shape[2:]]
    elif spatial_range is not None:
        upper = [spatial_range[1 + i] * layer.stride[i] - 1.0 for i in AXES]
    kept = (c for c in as_sites(grid[hit].numpy()) if within(c, lower, upper))
    return sorted(kept)


def within(site: Site, lower: Sequence[float], upper: Sequence[float]) -> bool:
    return all(lower[i] <= site[1 + i] <= upper[i] for i in AXES)
