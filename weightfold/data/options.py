"""Settings of `load`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from weightfold.config import Config

Progress = Callable[[int, int], None]
"""Called with the images decoded so far and the images to decode."""


class LoadOptions(Config):
    """How a source is read and divided."""

    seed: NonNegativeInt = 0
    """of the division into splits"""
    limit: PositiveInt | None = None
    """at most this many samples (characters of a text) for training and validation together, and as many for test"""
    download: Literal["never"] = "never"
    """nothing is ever fetched"""
    val_share: float = Field(default=0.1, gt=0, lt=0.5)
    """share of the training samples that becomes the validation split"""
    test_share: float | None = Field(default=None, gt=0, lt=0.5)
    """share held out where the source has no test set of its own; 0.2, or 0.1 for a running text"""
    size: PositiveInt | None = None
    """images: resize each to this many pixels a side"""
    target: int | str | None = None
    """tables: the column to predict, by name or by number from 0; the last one"""
    output: Literal["auto", "classes", "regression"] = "auto"
    """tables: what to predict; auto takes text and up to 20 different whole numbers for classes"""
    drop: tuple[int | str, ...] = ()
    """tables: columns to leave out"""
    header: bool | None = None
    """tables: whether the first row names the columns; by default it does if it holds no number and no date"""
    context: PositiveInt = 128
    """texts: tokens a network sees at once"""

    def held_out(self, usual: float) -> float:
        """Share of the samples for the test split."""
        return usual if self.test_share is None else self.test_share
