"""Data in memory: three splits of tensors, and batches made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from weightfold.config import nearest
from weightfold.errors import ConfigError
from weightfold.models.task import TaskSpec

Batch = tuple[Tensor, Tensor]
SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True, eq=False)
class Split:
    """Samples of one purpose, as they were read.

    Args:
        inputs: images (S, C, H, W) uint8; rows of numbers (S, F) float32; tokens (S, N) int32.
        targets: classes (S,) int64; numbers (S, n_targets) float32; tokens (S, N) int32.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class Scaling:
    """A mean and a standard deviation, taken away and put back.

    Args:
        mean: shape that broadcasts against one sample.
        std: same shape, > 0.
    Example:
        >>> scaling = Scaling.of(torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
        >>> scaling.apply(torch.tensor([[3.0, 8.0]]))
        tensor([[1., 1.]])
        >>> scaling.undo(torch.tensor([[1.0, 1.0]]))
        tensor([[3., 8.]])
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Measure each column of `values`, shape (S, F).

        A constant column gets the deviation 1. A column of zeros and ones stays as it is: divided by its deviation, the
        one of a rare category would dwarf all other inputs.
        """
        std, mean = torch.std_mean(values.double(), dim=0, correction=0)
        binary = ((values == 0) | (values == 1)).all(0)
        return cls(torch.where(binary, 0, mean).float(), torch.where(binary | (std == 0), 1, std).float())

    @classmethod
    def of_images(cls, images: Tensor) -> Self:
        """Measure each channel of uint8 `images`, shape (S, C, H, W), on the scale from 0 to 1."""
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.transpose(0, 1)])
        share = counts.double() / counts.sum(1, keepdim=True)
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ levels
        std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt()
        return cls(mean.float()[:, None, None], torch.where(std > 0, std, 1.0).float()[:, None, None])

    def apply(self, values: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation."""
        return (values - self.mean) / self.std

    def undo(self, values: Tensor) -> Tensor:
        """Multiply by the deviation and add the mean: `apply` backwards."""
        return values * self.std + self.mean


@dataclass(frozen=True, eq=False)
class Dataset:
    """A task and its samples: for training, for decisions while training, and for the last measurement.

    Args:
        name: what the source is called.
        task: kind and size of input and output.
        train: samples to learn from; all scalings are measured on them alone.
        val: samples to decide by, taken out of the training samples.
        test: samples that no decision may look at.
        classes: name of each class; empty unless the task is classification.
        vocabulary: character of each token of a text; else empty.
        input_scaling: normalises images (on the scale from 0 to 1) and tables; None for texts.
        target_scaling: normalises the targets of a regression; None for others.
    """

    name: str
    task: TaskSpec
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    input_scaling: Scaling | None = None
    target_scaling: Scaling | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything a network can see: task, names, the splits in their order, the scalings."""
        digest = hashlib.sha256(repr((self.task.to_json(), self.classes, self.vocabulary)).encode())
        for tensor in self._tensors():
            digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def split(self, name: SplitName) -> Split:
        """Return the split of that name: train, val or test.

        Raises:
            ConfigError: there is no such split.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test}
        if name not in splits:
            raise ConfigError(f"There is no split '{name}'.", remedy=nearest(name, splits))
        return splits[name]

    def batches(
        self, split: SplitName, batch_size: int, *, generator: torch.Generator | None = None, augment: bool = False
    ) -> Iterator[Batch]:
        """Go once through a split.

        With a generator the order is shuffled, and a last batch of a single sample is left out (batch norm cannot
        train on it). Without one, every sample comes once, in order.

        Augmentation shifts each image by up to an eighth of its side and mirrors half of the colour images; it shifts
        the windows of a running text; it leaves tables as they are.

        Args:
            split: train, val or test.
            batch_size: samples in a batch, > 0.
            generator: draws the order and the augmentation.
            augment: whether to vary the inputs; needs a generator.
        Returns:
            batches: pairs of inputs (float32, normalised; int64 for texts) and targets (int64; float32 and normalised
                for regression).
        Raises:
            ConfigError: no such split, a batch size below 1, or augmentation without a generator.
        Example:
            >>> from weightfold.data import load
            >>> data = load("digits")
            >>> inputs, targets = next(data.batches("train", 32, generator=torch.Generator().manual_seed(0)))
            >>> inputs.shape, inputs.dtype, targets.shape
            (torch.Size([32, 1, 8, 8]), torch.float32, torch.Size([32]))
        """
        samples = self.split(split)
        if batch_size < 1:
            raise ConfigError(f"The 'batch_size' of batches must be at least 1. Got {batch_size} instead.")
        if augment and generator is None:
            raise ConfigError("Augmentation draws random numbers.", remedy="Pass generator=torch.Generator().")
        return self._batches(samples, batch_size, generator, augment)

    def _batches(
        self, samples: Split, batch_size: int, generator: torch.Generator | None, augment: bool
    ) -> Iterator[Batch]:
        if augment and generator is not None and self.task.output.kind == "next-token":
            samples = shift_windows(samples, generator)
        for idx in _order(len(samples), batch_size, generator):
            inputs, targets = samples.inputs[idx], samples.targets[idx]
            if augment and generator is not None and self.task.input.kind == "image":
                inputs = shift_images(inputs, generator, mirror=inputs.shape[1] == 3)
            yield self._normalise(inputs), self._normalise_targets(targets)

    def _normalise(self, inputs: Tensor) -> Tensor:
        if self.input_scaling is None:
            return inputs.long()
        return self.input_scaling.apply(inputs / 255 if self.task.input.kind == "image" else inputs)

    def _normalise_targets(self, targets: Tensor) -> Tensor:
        return targets.long() if self.target_scaling is None else self.target_scaling.apply(targets)

    def _tensors(self) -> Iterator[Tensor]:
        for split in (self.train, self.val, self.test):
            yield from (split.inputs, split.targets)
        for scaling in (self.input_scaling, self.target_scaling):
            if scaling is not None:
                yield from (scaling.mean, scaling.std)


def windows(stream: Tensor, context: int) -> Split:
    """Cut a running text into pieces that overlap by one token: what is read, and what comes next.

    Args:
        stream: tokens, shape (T,), T > context.
        context: tokens in a piece.
    Returns:
        split: inputs and targets, both of shape ((T - 1) // context, context).
    Example:
        >>> windows(torch.arange(6), 2)
        Split(inputs=tensor([[0, 1],
                [2, 3]]), targets=tensor([[1, 2],
                [3, 4]]))
    """
    pieces = stream.unfold(0, context + 1, context)
    return Split(pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous())


def shift_windows(samples: Split, generator: torch.Generator) -> Split:
    """Cut the same running text again, from a random place within the first window."""
    stream = torch.cat([samples.inputs.flatten(), samples.targets[-1, -1:]])
    context = samples.inputs.shape[1]
    offset = int(torch.randint(context, (), generator=generator)) if len(samples) > 1 else 0
    return windows(stream[offset:], context)


def shift_images(images: Tensor, generator: torch.Generator, *, mirror: bool) -> Tensor:
    """Move each image by up to an eighth of its side, filling with zeros, and perhaps mirror half of them.

    Args:
        images: shape (B, C, H, W).
        generator: draws the shifts and the mirrored images.
        mirror: whether to swap left and right.
    Returns:
        images: shape (B, C, H, W).
    """
    batch, _, height, width = images.shape
    rows = _shifted(height, batch, generator)
    columns = _shifted(width, batch, generator)
    if mirror:
        flip = torch.rand(batch, generator=generator) < 0.5
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    padded = F.pad(images, (width // 8, width // 8, height // 8, height // 8))
    moved = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def _shifted(side: int, batch: int, generator: torch.Generator) -> Tensor:
    """Rows (or columns) of the padded image that each shifted image shows, shape (batch, side)."""
    start = torch.randint(2 * (side // 8) + 1, (batch, 1), generator=generator)
    return start + torch.arange(side)


def _order(n_samples: int, batch_size: int, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """Indices of each batch."""
    if generator is None:
        return torch.arange(n_samples).split(batch_size)
    batches = torch.randperm(n_samples, generator=generator).split(batch_size)
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 and batch_size > 1 else batches
