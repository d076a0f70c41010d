"""Real data in, tensors out; and the user's own models."""

from weightfold.data.checkpoint import load_weights_, read_tensors
from weightfold.data.dataset import Dataset, Scaling, Split
from weightfold.data.load import load
from weightfold.data.options import LoadOptions
from weightfold.data.user import load_model

__all__ = [
    "Dataset",
    "LoadOptions",
    "Scaling",
    "Split",
    "load",
    "load_model",
    "load_weights_",
    "read_tensors",
]
