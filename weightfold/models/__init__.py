"""Built-in networks: plain modules in pure torch, built by name for a task."""

from weightfold.models.registry import NAMES, build, serving
from weightfold.models.task import (
    Classes,
    ImageInput,
    NextToken,
    Regression,
    TableInput,
    TaskSpec,
    TextInput,
)

__all__ = [
    "NAMES",
    "Classes",
    "ImageInput",
    "NextToken",
    "Regression",
    "TableInput",
    "TaskSpec",
    "TextInput",
    "build",
    "serving",
]
