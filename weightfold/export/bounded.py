"""Build what a file names, a built-in network, in no more memory and time than the file's length explains."""

from __future__ import annotations

from pydantic import ValidationError
from torch import nn

from weightfold.artifact import Builder
from weightfold.errors import ArtifactError, WeightfoldError
from weightfold.models import TaskSpec, build
from weightfold.models.bounded import Bounded


def build_named(builder: Builder, where: str, size_bytes: int) -> nn.Module:
    """Build the built-in network that a file names, before any edit.

    Args:
        builder: of kind "built-in".
        where: the file, for errors.
        size_bytes: of the file.
    Raises:
        ArtifactError: there is no such network, its settings do not fit, or it is larger than the file explains.
    """
    try:
        with Bounded(size_bytes):
            return build(builder.name, TaskSpec(**(builder.task or {})), **builder.overrides)
    except WeightfoldError as error:
        reason = error.message
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
    except (TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError, AttributeError) as error:
        reason = str(error).partition("\n")[0][:300] or type(error).__name__
    raise ArtifactError(
        f"'{where}' names a network '{builder.name[:80]}' that cannot be built: {reason.rstrip('.')}.",
        remedy="Copy or write the file again, or pass the model that it belongs to.",
    ) from None
