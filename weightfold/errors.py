"""The exception tree: one root, one message form, a remedy on its own line."""

from __future__ import annotations


class WeightfoldError(Exception):
    """Any error this library raises on purpose.

    Args:
        message: what was expected, what came, and where (tensor, group, operator, file or line).
        remedy: what to do about it; printed on a second line.

    Example:
        >>> print(GraphError("'fc.weight' has 3 columns; its input has 4.", remedy="Pass the real example input."))
        'fc.weight' has 3 columns; its input has 4.
          -> Pass the real example input.
    """

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n  -> {self.remedy}"


class ConfigError(WeightfoldError):
    """A setting is unknown, misspelt or out of range."""


class TraceError(WeightfoldError):
    """A model could not be traced: control flow on data, a wrong example shape, an operator that fails."""


class GraphError(WeightfoldError):
    """A channel group and the tensors it names do not fit each other."""


class EditError(WeightfoldError):
    """An edit is not admitted by its group, or its sizes are wrong."""


class DataError(WeightfoldError):
    """A data set is missing, empty, has one class, or holds what cannot be read."""


class LedgerError(WeightfoldError):
    """A ledger is corrupt, foreign, or was written by someone else in the meantime."""


class ArtifactError(WeightfoldError):
    """A model file is corrupt, foreign, or holds code."""


class ExportError(WeightfoldError):
    """A target cannot express the model, or its runtime is not installed."""
