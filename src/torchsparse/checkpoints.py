"""Convolution weights of other libraries: what each one keeps, and the way from one to another.

Every layout is one row of `LAYOUTS`: the order of the axes, the order of the taps, the name of
the weight. A conversion reads a weight into the one form [kx, ky, kz, C_in, C_out] by its row and
writes it by another; no layout knows of another, and none needs its library::

    state = torch.load("spconv.pt", weights_only=True)
    model.load_state_dict(convert(state, "spconv2"))
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from torchsparse._geometry import as_tuple

__all__ = ["LAYOUTS", "Layout", "convert", "state_of"]

Size = tuple[int, int, int]

# What K = 1 does to a weight. "matrix": it is [C_in, C_out]. "mislabelled": the shape stays, but
# the memory is a [C_in, C_out] matrix, whatever the shape says of C_out and C_in.
OneTap = Literal["as shaped", "matrix", "matrix at stride 1", "mislabelled at stride 1"]

_FORM = "xyzio"
_WIDEST = 15  # taps along one axis; a larger number is a channel count read as a kernel size


@dataclass(frozen=True)
class Layout:
    """How a library keeps the weights of a three-dimensional sparse convolution.

    ``axes`` has one letter per axis of the weight: o and i for C_out and C_in; 0, 1, 2 for the
    kernel along the columns of the library's coordinates; k for all K taps in one axis.

        spconv2: weight [C_out, k0, k1, k2, C_in], axes = "o012i"
        minkowski, kernel (2, 1, 2): taps 000, 100, 001, 101 (x runs fastest), odd = even = "zyx"
    """

    name: str
    library: str
    weight: str  # last part of the weight's name; the bias beside it is called "bias"
    axes: str
    odd: str = ""  # order of the taps, the fastest axis last, for odd K ...
    even: str = ""  # ... and for even K
    one_tap: OneTap = "as shaped"
    bias_dim: int = 1  # 1: [C_out], 2: [1, C_out]

    @property
    def lists_taps(self) -> bool:
        """Whether the kernel size cannot be read from the shape, only K."""
        return "k" in self.axes

    @property
    def shape(self) -> str:
        """The weight's shape in words: "[C_out, k0, k1, k2, C_in]"."""
        words = {"o": "C_out", "i": "C_in", "k": "K", "0": "k0", "1": "k1", "2": "k2"}
        return f"[{', '.join(words[axis] for axis in self.axes)}]"

    def order(self, volume: int, columns: str, strided: bool) -> str:
        """The axes of the memory, one letter each, the taps spread over x, y and z.

        "o012i" with columns "zyx" is "ozyxi"; "kio" with the taps in order "zyx" is "zyxio".
        """
        if self.lists_taps:
            return self.axes.replace("k", self.odd if volume % 2 else self.even)
        swapped = volume == 1 and not strided and self.one_tap == "mislabelled at stride 1"
        return self.axes.translate(str.maketrans("012io", columns + ("oi" if swapped else "io")))


# Read in the sources. TorchSparse 1.4 to 2.1 order the taps by the parity of K, MinkowskiEngine
# 0.4 and 0.5 always let the first axis run fastest. SpConv 2.x multiplies by
# `weight.view(C_in, C_out)` where K = 1 and the stride is 1 (traveller59/spconv issue 450).
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "torchsparse", "this library and TorchSparse 2.1", "kernel", "kio",
            odd="zyx", even="xyz", one_tap="matrix at stride 1",
        ),
        Layout(
            "torchsparse2.1", "TorchSparse 2.1", "kernel", "kio",
            odd="zyx", even="xyz", one_tap="matrix at stride 1",
        ),
        Layout(
            "torchsparse2.0", "TorchSparse 2.0", "kernel", "kio",
            odd="zyx", even="xyz", one_tap="matrix",
        ),
        Layout(
            "torchsparse1.4", "TorchSparse 1.4, and 1.0-1.3 for cubes", "kernel", "kio",
            odd="zyx", even="xyz", one_tap="matrix",
        ),
        Layout(
            "minkowski", "MinkowskiEngine 0.4 and 0.5", "kernel", "kio",
            odd="zyx", even="zyx", one_tap="matrix at stride 1", bias_dim=2,
        ),
        Layout(
            "spconv2", "SpConv 2.2 and later, and 2.0-2.1 but for algo=Native", "weight", "o012i",
            one_tap="mislabelled at stride 1",
        ),
        Layout(
            "spconv2.1-native", "SpConv 2.0-2.1, algo=Native", "weight", "012oi",
            one_tap="mislabelled at stride 1",
        ),
        Layout("spconv1", "SpConv 1.x", "weight", "012io"),
    )
}  # fmt: skip
"""The layouts by name."""


def convert(
    state: Mapping[str, Any],
    source: str,
    target: str = "torchsparse",
    *,
    axes: str = "zyx",
    kernel_sizes: Mapping[str, Any] | None = None,
    strided: Iterable[str] = (),
    channelwise: Iterable[str] = (),
    names: Mapping[str, str] | None = None,
    skip: Iterable[str] = (),
) -> dict[str, Any]:
    """The state dict ``state`` with its convolutions in another library's layout.

    Taken for a convolution is every floating tensor

    * of 5 dimensions whose name ends in ``weight``, if the source is an SpConv (a dense
      ``torch.nn.Conv3d`` looks the same: name it in ``skip``);
    * of 3 dimensions, or 2 (K = 1), whose name ends in ``kernel``, if it is another (the
      bird's-eye-view modules look the same; SpConv has none, so ``skip`` them on the way there).

    Its bias, the entry ``bias`` of the same module, comes along. Everything else is passed
    through, the same objects. Submanifold, strided, inverse, transposed and generative
    convolutions share one layout in every library, so their kind is not asked for.

    A kernel of one tap is a matter of stride. At stride 1, SpConv 2.x reads the memory of its
    [C_out, 1, 1, 1, C_in] as [C_in, C_out], and that is what its checkpoints mean; MinkowskiEngine
    and TorchSparse 2.1 keep [C_in, C_out] at stride 1 and [1, C_in, C_out] else. Where the source
    does not tell, stride 1 is assumed; ``strided`` names the exceptions. Our `Conv3d` loads both,
    the matrix of a strided layer with a note.

    A weight of SpConv 2.x also means what its shape says if the network multiplies by it itself.
    SoftGroup and its descendants do: their ``Custom1x1Subm3d`` is a subclass of SpConv's layer,
    which reads the kernel of one tap as [C_out, C_in]. Name these modules in ``strided``, too.

    Weights are all that is converted. With SpConv's usual columns (b, z, y, x), the arguments
    kernel_size, stride, padding and dilation are listed the other way round in a network on
    (b, x, y, z). MinkowskiEngine places the taps of an even size k at 0 ... k - 1, also at
    stride 1 and also beside odd sizes: there "minkowski" downsampling agrees for sizes 1, 2, 3,
    5, 7, ..., and submanifold kernels agree if all three sizes are odd or all are even. Its
    cross-shaped and custom kernels have no counterpart.

    Args:
        state: Name -> tensor, as of ``Module.state_dict()``; tensors of any dtype, any device.
        source, target: Names of rows in `LAYOUTS`.
        axes: What the three spatial columns of SpConv's coordinates hold. The detectors of
            OpenPCDet and mmdetection3d use "zyx"; "xyz" if a network sees (b, x, y, z) in both
            libraries. The other layouts know no choice: their columns are x, y, z.
        kernel_sizes: Module name -> size along (x, y, z), one int or three, for kernels that are
            not cubes and of which the source only tells K. 27 taps are taken for (3, 3, 3), 12
            taps could be (3, 2, 2) or (2, 3, 2). Sizes that the source does tell are compared.
        strided: Names of modules with a stride other than 1; read for kernels of one tap. Also
            those at stride 1 whose weight means what its shape says, ``Custom1x1Subm3d``.
        channelwise: Names of MinkowskiEngine's channelwise convolutions, whose kernels are
            [K, C]; here they are [K, 1, C], those of ``Conv3d(C, C, groups=C)``.
        names: Regular expression -> replacement, applied to each name in this order (`re.sub`)
            before ``weight`` becomes ``kernel`` or the reverse. ``{r"\\.bn\\.": "."}`` takes
            MinkowskiEngine's batch norms to ours, ``{"^module\\\\.": ""}`` removes the prefix of
            DistributedDataParallel.
        skip: Regular expressions; an entry whose name contains a match is passed through.

    Returns:
        A new dict in the order of ``state``. Converted tensors are contiguous and detached, of
        the dtype and device they had.

    Raises:
        ValueError: An unknown layout; no convolution at all; a kernel size that cannot be told,
            or that contradicts the shape; a weight that looks like another layout's; two entries
            with one name. The message says what to pass.
    """
    reader, writer = _layout(source, "source"), _layout(target, "target")
    if sorted(axes) != ["x", "y", "z"]:
        raise ValueError(f"`axes` must be the letters x, y and z in some order, got {axes!r}")
    skipped = [re.compile(pattern) for pattern in skip]
    modules = {
        _module(name): name
        for name, value in state.items()
        if _is_weight(name, value, reader) and not any(p.search(name) for p in skipped)
    }
    if not modules:
        raise ValueError(_nothing_found(state, reader))
    sizes = {
        _known(name, modules, "kernel_sizes"): _size(name, size)
        for name, size in (kernel_sizes or {}).items()
    }
    moving = {_known(name, modules, "strided") for name in strided}
    single = {_known(name, modules, "channelwise") for name in channelwise}

    result: dict[str, Any] = {}
    for name, value in state.items():
        module = _module(name)
        new_name = name
        for pattern, replacement in (names or {}).items():
            new_name = re.sub(pattern, replacement, new_name)
        if modules.get(module) == name:
            outputs = value.shape[reader.axes.index("o") - len(reader.axes)]
            _check_bias(state.get(_bias_of(module)), module, outputs)
            size = sizes.get(module)
            if module in single and value.dim() == 2:
                value = value[:, None]
            value = _convert_weight(name, value, reader, writer, axes, size, module in moving)
            if module in single and writer.name == "minkowski":
                value = value.reshape(-1, value.shape[-1])
            if _last(new_name) == reader.weight:
                new_name = new_name[: -len(reader.weight)] + writer.weight
        elif name == _bias_of(module) and module in modules:
            value = _convert_bias(value, reader, writer)
        if new_name in result:
            raise ValueError(f"{name!r} would become {new_name!r}, which another entry has taken")
        result[new_name] = value
    return result


def state_of(checkpoint: Any, key: str | None = None) -> Mapping[str, Any]:
    """The state dict in what a training script saved: the object itself, or nested one deep.

    Args:
        checkpoint: The loaded object.
        key: Where the state dict is; None to look under the usual names.

    Raises:
        ValueError: Nothing there, or several candidates; the message lists the keys.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"a mapping was expected, got {type(checkpoint).__name__}")
    if key is None and _holds_tensors(checkpoint):
        return checkpoint
    usual = "state_dict model_state_dict model_state model network net state".split()
    keys = [name for name in ([key] if key is not None else usual) if name in checkpoint]
    found = [name for name in keys if _holds_tensors(checkpoint[name])]
    if len(found) == 1:
        return checkpoint[found[0]]
    there = ", ".join(map(repr, checkpoint)) or "nothing"
    what = "several state dicts" if found else "no state dict"
    raise ValueError(f"{what} found; pass the key of one (the checkpoint holds {there})")


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


# Names.


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _bias_of(module: str) -> str:
    return f"{module}.bias" if module else "bias"


def _layout(name: str, argument: str) -> Layout:
    if name not in LAYOUTS:
        raise ValueError(f"`{argument}` must be one of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name]


def _is_weight(name: str, value: Any, layout: Layout) -> bool:
    dims = (2, 3) if layout.lists_taps else (5,)
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() in dims
        and _last(name) == layout.weight
    )


def _nothing_found(state: Mapping[str, Any], layout: Layout) -> str:
    """What to say about a state without convolutions in this layout."""
    fitting = [
        other.name
        for other in LAYOUTS.values()
        if any(_is_weight(name, value, other) for name, value in state.items())
    ]
    advice = f"; as weights of {' or '.join(fitting)} there are some" if fitting else ""
    return f"no `{layout.weight}` of shape {layout.shape}, as {layout.name} has them{advice}"


def _known(name: str, modules: Mapping[str, str], argument: str) -> str:
    """The module of that name; the name of its weight is understood too."""
    module = name if name in modules else _module(name)
    if name not in modules and modules.get(module) != name:
        raise ValueError(
            f"`{argument}` names {name!r}, which is none of the {len(modules)} convolutions: "
            f"{_some(modules)}"
        )
    return module


def _size(name: str, size: Any) -> Size:
    x, y, z = as_tuple(size, 3, f"kernel_sizes[{name!r}]")
    return (x, y, z)


def _some(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "")


# One weight.


def _convert_weight(
    name: str,
    weight: Tensor,
    reader: Layout,
    writer: Layout,
    axes: str,
    size: Size | None,
    strided: bool,
) -> Tensor:
    """[...] in the source's layout -> [...] in the target's."""
    weight = weight.detach()
    if weight.dim() == 2:
        weight = weight[None]
    elif reader.one_tap == "matrix at stride 1":
        strided = True  # or K > 1, where it does not matter
    if reader.lists_taps:
        volume = weight.shape[reader.axes.index("k")]
        same = reader.order(volume, axes, strided) == writer.order(volume, axes, strided)
        if size is None and same:
            size = (volume, 1, 1)  # the taps stay where they are, whatever the shape
        size = _told_size(name, volume, size)
    else:
        size = _read_size(name, weight, reader, axes, size)
    return _write(_read(weight, reader, axes, size, strided), writer, axes, strided)


def _read(weight: Tensor, layout: Layout, axes: str, size: Size, strided: bool) -> Tensor:
    """[...] in a layout -> [kx, ky, kz, C_in, C_out], a view where possible."""
    length = dict(zip("xyz", size))
    length["i"], length["o"] = (weight.shape[layout.axes.index(axis)] for axis in "io")
    order = layout.order(math.prod(size), axes, strided)
    spread = weight.reshape([length[axis] for axis in order])
    return spread.permute([order.index(axis) for axis in _FORM])


def _write(form: Tensor, layout: Layout, axes: str, strided: bool) -> Tensor:
    """[kx, ky, kz, C_in, C_out] -> [...] in a layout."""
    length = dict(zip(_FORM, form.shape))
    length["k"] = volume = math.prod(form.shape[:3])
    order = layout.order(volume, axes, strided)
    weight = form.permute([_FORM.index(axis) for axis in order]).contiguous()
    is_matrix = layout.one_tap == "matrix" or (
        layout.one_tap == "matrix at stride 1" and not strided
    )
    if volume == 1 and is_matrix:
        return weight.reshape(length["i"], length["o"])
    labels = layout.axes.translate(str.maketrans("012", axes))
    return weight.reshape([length[axis] for axis in labels])


def _told_size(name: str, volume: int, size: Size | None) -> Size:
    """The kernel size behind K taps: as told, or else a cube."""
    if size is None:
        side = round(volume ** (1 / 3))
        if side**3 != volume:
            raise ValueError(
                f"{name!r} has {volume} taps, which is no cube: pass its size along (x, y, z), "
                f"kernel_sizes={{{_module(name)!r}: (kx, ky, kz)}}"
            )
        return (side, side, side)
    if math.prod(size) != volume:
        raise ValueError(f"{name!r} has {volume} taps, but `kernel_sizes` says {size}")
    return size


def _read_size(name: str, weight: Tensor, layout: Layout, axes: str, size: Size | None) -> Size:
    """The kernel size along (x, y, z) in a shape that has it."""
    labels = layout.axes.translate(str.maketrans("012", axes))
    x, y, z = (weight.shape[labels.index(axis)] for axis in "xyz")
    if size is not None and size != (x, y, z):
        raise ValueError(
            f"{name!r} of shape {list(weight.shape)} has the kernel size {(x, y, z)} along "
            f"(x, y, z) as {layout.name} with axes={axes!r}, but `kernel_sizes` says {size}"
        )
    if size is None and max(x, y, z) > _WIDEST:
        raise ValueError(
            f"{name!r} of shape {list(weight.shape)} would have the kernel size {(x, y, z)} as "
            f"{layout.name}: pass another `source`; or `skip` it if it is a dense convolution; "
            f"or confirm with kernel_sizes={{{_module(name)!r}: {(x, y, z)}}}"
        )
    return (x, y, z)


def _convert_bias(bias: Any, reader: Layout, writer: Layout) -> Any:
    """[C_out] -> [1, C_out] or back, where the two libraries differ."""
    if not isinstance(bias, Tensor) or reader.bias_dim == writer.bias_dim:
        return bias
    return bias.detach().reshape((1,) * (writer.bias_dim - 1) + (-1,))


def _check_bias(bias: Any, module: str, outputs: int) -> None:
    """A bias has C_out entries; anything else says that the weight was misread."""
    if isinstance(bias, Tensor) and bias.numel() != outputs:
        raise ValueError(
            f"{module!r} has a bias of {bias.numel()} entries, but {outputs} output channels "
            "by its weight: pass another `source`"
        )
