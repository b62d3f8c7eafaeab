"""Two libraries behind one small face: networks with the same weights on the same scene."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import torchsparse
from benchmarks.cases import Last, features
from torchsparse import SparseTensor
from torchsparse import nn as spnn
from torchsparse.backbones.modules.blocks import SparseResBlock
from torchsparse.backbones.unet import SparseResUNet
from torchsparse.checkpoints import convert


class Torchsparse:
    """This library."""

    name = "torchsparse"
    captures = True  # on kept maps nothing waits for the GPU

    def __init__(self) -> None:
        self.version = torchsparse.__version__

    def allow_tf32(self, allow: bool) -> None:
        torchsparse.backends.allow_tf32 = allow

    def adopt(self, network: nn.Module) -> nn.Module:
        return copy.deepcopy(network)

    def start(self, feats: Tensor, coords: Tensor, kept: Any = None) -> SparseTensor:
        """An input without maps, or with ``kept`` ones."""
        x = SparseTensor(feats, coords)
        if kept is not None:
            x._caches = kept
        return x

    def keep(self, network: nn.Module, x: SparseTensor) -> Any:
        """The maps that a pass over ``x`` builds, with whatever its products read of them."""
        self.features(network(x))
        return x._caches

    def features(self, y: Any) -> Tensor:
        return features(y)

    def sites(self, y: Any) -> Tensor:
        return y.coords

    @contextmanager
    def maps_alone(
        self, conv: Any, feats: Tensor, coords: Tensor, training: bool
    ) -> Iterator[Callable[[], Any]]:
        """A step that builds the map of a layer and whatever its passes read of it, through the
        layer itself: inside the ``with`` block its products are left out."""
        with torch.no_grad():
            outputs = len(conv(self.start(feats, coords)).coords)
        rows = outputs

        def product(feats: Tensor, weight: Tensor, *rest: Any) -> Tensor:
            return feats.new_empty(rows, weight.shape[2])

        def kernel_product(feats: Tensor, grad: Tensor, *rest: Any) -> Tensor:
            return feats.new_empty(conv.kernel_volume, feats.shape[1], grad.shape[1])

        def step() -> None:
            nonlocal rows
            rows = outputs
            x = feats.detach().requires_grad_(training)
            with torch.set_grad_enabled(training):
                out = conv(self.start(x, coords)).feats
            if training:
                rows = len(coords)
                torch.autograd.grad(out, (x, conv.kernel), out.detach())

        with mock.patch.multiple(
            "torchsparse._autograd.conv", gather_gemm=product, weight_grad=kernel_product
        ):
            yield step


class Spconv:
    """SpConv 2.3. ImportError without it.

    It remembers the algorithm chosen for a layer whether TF32 was allowed then or not, so that a
    process should time one dtype (`run.py --fresh`).
    """

    name = "spconv"
    captures = False

    def __init__(self) -> None:
        self.core: Any = importlib.import_module("spconv")
        self.sp: Any = importlib.import_module("spconv.pytorch")
        self.version = self.core.__version__
        self.extents: dict[int, tuple[Tensor, list[int], int]] = {}  # keeps them: ids stay theirs

    def allow_tf32(self, allow: bool) -> None:
        importlib.import_module("spconv.constants").SPCONV_ALLOW_TF32 = allow  # pyright: ignore

    def adopt(self, network: nn.Module) -> nn.Module:
        return _Translator(self.sp).module(network).train(network.training)

    def start(self, feats: Tensor, coords: Tensor, kept: Any = None) -> Any:
        # An extent that four halvings keep whole, and room for a border site that padding makes:
        # both libraries keep every site then.
        # Known to its users without looking: found once for each tensor of coordinates.
        if id(coords) not in self.extents:
            extent = [16 * (n // 16 + 2) for n in coords.amax(0)[1:].tolist()]
            self.extents[id(coords)] = coords, extent, int(coords[:, 0].max()) + 1
        _, *extent = self.extents[id(coords)]
        return self.sp.SparseConvTensor(feats, coords, *extent, indice_dict=kept)

    def keep(self, network: nn.Module, x: Any) -> Any:
        """SpConv hands on the maps of submanifold layers alone."""
        if any(not m.subm for m in network.modules() if hasattr(m, "subm")):
            return None
        return network(x).indice_dict

    def features(self, y: Any) -> Tensor:
        return y.features

    def sites(self, y: Any) -> Tensor:
        return y.indices

    @contextmanager
    def maps_alone(
        self, conv: Any, feats: Tensor, coords: Tensor, training: bool
    ) -> Iterator[Callable[[], Any]]:
        """The call with which its layers build a map, with sorting and masks."""
        x = self.start(feats, coords)
        sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        ksize, stride, padding, dilation = map(list, sizes)
        if math.prod(ksize) > 32:
            raise NotImplementedError("SpConv has no implicit GEMM for more than 32 taps")
        algo = self.core.ConvAlgo.MaskImplicitGemm
        yield lambda: self.sp.ops.get_indice_pairs_implicit_gemm(
            coords, x.batch_size, x.spatial_shape, algo, ksize, stride, padding, dilation,
            [0, 0, 0], subm=conv.subm, is_train=training, alloc=x.thrust_allocator,
        )  # fmt: skip


class _Translator:
    """Builds SpConv's modules beside ours, in the order in which a network runs them."""

    def __init__(self, sp: Any) -> None:
        self.sp = sp
        self.depth = 0  # halvings so far

    def module(self, m: Any) -> nn.Module:
        if isinstance(m, spnn.Conv3d):
            return self._convolution(m)
        if isinstance(m, spnn.BatchNorm):
            norm = nn.BatchNorm1d(m.num_features, m.eps, m.momentum)
            norm.load_state_dict(m.state_dict())
            return norm
        if isinstance(m, spnn.ReLU):
            return nn.ReLU(True)
        if isinstance(m, nn.Identity):
            return nn.Identity()
        if isinstance(m, SparseResBlock):
            residual = type("Residual", (_Residual, self.sp.SparseModule), {})  # fed with tensors
            return residual(self.module(m.main), self.module(m.shortcut))
        if isinstance(m, Last):  # SpConv's return one tensor anyway
            return self.module(m.body)
        if isinstance(m, SparseResUNet):
            return _UNet(self, m)
        if isinstance(m, (nn.Sequential, nn.ModuleList)):
            return self.sp.SparseSequential(*(self.module(child) for child in m))
        raise TypeError(f"no counterpart in SpConv for {type(m).__name__}")

    def _convolution(self, conv: Any) -> nn.Module:
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size)
        strided = max(conv.stride) > 1
        if conv.transposed:
            self.depth -= 1
            twin = self.sp.SparseInverseConv3d(*sizes, f"down{self.depth}", bias=False)
        elif strided:
            twin = self.sp.SparseConv3d(
                *sizes, conv.stride, conv.padding, bias=False, indice_key=f"down{self.depth}"
            )
            self.depth += 1
        else:
            key = f"same{self.depth}-{conv.kernel_size}"
            twin = self.sp.SubMConv3d(*sizes, bias=False, indice_key=key)
        weight = convert(
            {"conv.kernel": conv.kernel.detach()}, "torchsparse", "spconv2", axes="xyz",
            kernel_sizes={"conv": conv.kernel_size}, strided=["conv"] if strided else (),
        )["conv.weight"]  # fmt: skip
        with torch.no_grad():
            twin.weight.copy_(weight)
        return twin


class _Residual(nn.Module):
    def __init__(self, main: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.main, self.shortcut, self.relu = main, shortcut, nn.ReLU(True)

    def forward(self, x: Any) -> Any:
        main = self.main(x)
        return main.replace_feature(self.relu(main.features + self.shortcut(x).features))


class _UNet(nn.Module):
    def __init__(self, translator: _Translator, network: Any) -> None:
        super().__init__()
        self.stem = translator.module(network.stem)
        self.encoders = nn.ModuleList(translator.module(m) for m in network.encoders)
        self.ups, self.fuses = nn.ModuleList(), nn.ModuleList()
        for decoder in network.decoders:
            self.ups.append(translator.module(decoder["upsample"]))
            self.fuses.append(translator.module(decoder["fuse"]))

    def forward(self, x: Any) -> Any:
        skips = [self.stem(x)]
        for encoder in self.encoders:
            skips.append(encoder(skips[-1]))
        y = skips.pop()
        for up, fuse in zip(self.ups, self.fuses):
            y = fuse(_joined(up(y), skips.pop()))
        return y


def _joined(x: Any, skip: Any) -> Any:
    return x.replace_feature(torch.cat([x.features, skip.features], 1))


def training_step(
    engine: Any, network: nn.Module, feats: Tensor, coords: Tensor, cast: Any, maps: Any = None,
    scale: float = 1.0, call: Callable[[Any], Any] | None = None,
) -> tuple[Any, Tensor | None]:  # fmt: skip
    """Forward, mean square times ``scale``, backward; the parameters' gradients are theirs.

    Args:
        cast: The autocast context of the forward pass.
        maps: Kept ones, or None.
        call: What runs the network, if not it alone.

    Returns:
        The output, and the gradient of the features.
    """
    network.zero_grad(set_to_none=True)
    feats = feats.detach().requires_grad_()
    with cast:
        output = (call or network)(engine.start(feats, coords, maps))
        found = engine.features(output)
    loss = found.float().square().mean()
    (loss if scale == 1 else loss * scale).backward()
    return output, feats.grad


ENGINES: dict[str, Callable[[], Any]] = {"torchsparse": Torchsparse, "spconv": Spconv}


def importable() -> list[str]:
    """Names of the libraries that are there."""
    found = []
    for name, engine in ENGINES.items():
        try:
            engine()
        except Exception:  # not there, or not for this machine
            continue
        found.append(name)
    return found
