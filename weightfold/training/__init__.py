"""A complete training run around a compressor: two networks, one folder, an account of both."""

from weightfold.training.config import TrainConfig
from weightfold.training.run import resume, train

__all__ = ["TrainConfig", "resume", "train"]
