"""``torchsparse convert``: the weights of another library in ours, or the reverse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from torch import Tensor

from torchsparse import checkpoints

__all__ = ["convert"]

_ROWS = ", ".join(checkpoints.LAYOUTS)


def convert(
    source_file: Annotated[Path, typer.Argument(metavar="IN", help="A PyTorch checkpoint.")],
    target_file: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    source: Annotated[str, typer.Option("--from", help=f"Layout of IN: {_ROWS}.")],
    target: Annotated[str, typer.Option("--to", help="Layout of OUT.")] = "torchsparse",
    axes: Annotated[
        str, typer.Option(help="What the spatial columns of SpConv's coordinates hold.")
    ] = "zyx",
    kernel_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE=X,Y,Z",
            help="Kernel size along (x, y, z) where the number of taps does not tell it.",
        ),
    ] = None,
    strided: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="A kernel of one tap with a stride other than 1, or SoftGroup's Custom1x1Subm3d.",
        ),
    ] = None,
    channelwise: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="A channelwise convolution of MinkowskiEngine."),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=TEXT", help=r"Change names of IN first: '\.bn\.=.', '^module\.='."
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Leave these alone: dense convolutions, for example."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Where IN keeps the state dict, if not under a usual name."),
    ] = None,
) -> None:
    """Convert the sparse convolutions of a checkpoint to another library's layout.

    Reads tensors only: no code from IN runs. Writes a plain state dict and prints a line per
    converted tensor. Options for modules may be given several times. Whatever is wrong with IN or
    the options gets one line and exit code 2, and OUT is not written.
    """
    try:
        sizes = {name: _ints(text) for name, text in map(_pair, kernel_size or ())}
        names = dict(map(_pair, rename or ()))
        state = checkpoints.state_of(_load(source_file), key)
        result = checkpoints.convert(
            state,
            source,
            target,
            axes=axes,
            kernel_sizes=sizes,
            strided=strided or (),
            channelwise=channelwise or (),
            names=names,
            skip=skip or (),
        )
    except (ValueError, IndexError, re.error) as error:  # the last two: a bad --rename
        _fail(f"{source_file}: {error}")
    _save(result, target_file)

    rows = [("IN", "", "OUT", "")]
    for (name, value), (new_name, new_value) in zip(state.items(), result.items()):
        if new_value is not value:
            rows.append((name, _shape(value), new_name, _shape(new_value)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    typer.echo(
        f"{source} -> {target}: {len(rows) - 1} converted, {len(state) - len(rows) + 1} passed "
        f"through; wrote {target_file}"
    )


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except Exception as error:  # zip, pickle and torch errors, by kind of damage
        found = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if found:
            raise ValueError(
                f"holds objects of {found[1]} beside tensors, which are not loaded for safety: "
                "save its state dict alone"
            ) from None
        raise ValueError("not a readable PyTorch checkpoint") from None


def _save(state: dict[str, Any], path: Path) -> None:
    """All or nothing: the file appears under its name when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        _fail(f"{path}: {error.strerror or error}")


def _pair(text: str) -> tuple[str, str]:
    left, equals, right = text.rpartition("=")
    if not equals:
        raise ValueError(f"expected LEFT=RIGHT in an option, got {text!r}")
    return left, right


def _ints(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(map(int, text.split(",")))
    except ValueError:
        sizes = ()
    if len(sizes) not in (1, 3):
        raise ValueError(f"a kernel size is one int or three as in 3,1,1, got {text!r}")
    return sizes * (3 // len(sizes))


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else ""


def _fail(message: str) -> NoReturn:
    typer.echo(f"torchsparse: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)
