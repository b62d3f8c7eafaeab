"""Libraries that only some users need, imported when they are needed."""

import importlib
from types import ModuleType

__all__ = ["need"]


def need(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of this package brings it.

    Args:
        module: Import name, for example ``"matplotlib"``.
        extra: The extra of ``torchsparse`` that depends on it, for example ``"plots"``.

    Raises:
        ImportError: The library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs {module}, which is not installed: pip install 'torchsparse[{extra}]'"
        ) from error
