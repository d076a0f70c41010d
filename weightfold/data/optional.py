"""Import what only some sources need, when it is needed."""

from __future__ import annotations

import importlib
from typing import Any

from weightfold.errors import DataError


def require(module: str, purpose: str, extra: str = "data") -> Any:
    """Import an optional dependency.

    Args:
        module: dotted name of the module.
        purpose: what it is needed for; the error begins with it.
        extra: the extra of this package that installs it.
    Returns:
        module: the imported module.
    Raises:
        DataError: it is not installed; says the line that installs it.
    Example:
        >>> require("no_such_module", "Reading clay tablets")
        Traceback (most recent call last):
        weightfold.errors.DataError: Reading clay tablets needs the package 'no_such_module', which is not installed.
          -> pip install "weightfold[data]"
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise DataError(
            f"{purpose} needs the package '{package}', which is not installed.",
            remedy=f'pip install "weightfold[{extra}]"',
        ) from None
