"""The command line: ``torchsparse demo``, ``segment``, ``convert``, ``tune``, ``bench`` and
``warmup``."""

import sys

from torchsparse._optional import need

__all__ = ["main"]


def main() -> None:
    """Run the command in ``sys.argv``; without typer, say in one line which extra brings it."""
    try:
        need("typer", extra="cli")
    except ImportError as error:
        print(f"torchsparse: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    need("torchsparse.cli.app", extra="cli").app()
