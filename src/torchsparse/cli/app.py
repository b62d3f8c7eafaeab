"""The registry of commands: one file and one line each."""

from typing import Annotated

import typer

from torchsparse.cli.bench import bench
from torchsparse.cli.convert import convert
from torchsparse.cli.demo import demo
from torchsparse.cli.segment import segment
from torchsparse.cli.tune import tune
from torchsparse.cli.warmup import warmup
from torchsparse.version import __version__

__all__ = ["app"]

app = typer.Typer(
    help="Sparse convolution for point clouds and voxels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # brackets in help texts are brackets
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchsparse {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


app.command()(bench)
app.command()(convert)
app.command()(demo)
app.command()(segment)
app.command()(tune)
app.command()(warmup)
