"""Images: encoded bytes or files to one uint8 tensor, and the data sets made of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weightfold.data.dataset import Dataset, Scaling, Split
from weightfold.data.optional import require
from weightfold.data.options import LoadOptions, Progress
from weightfold.data.splits import Plan, plan_splits
from weightfold.errors import DataError
from weightfold.models.task import Classes, ImageInput, TaskSpec

_N_THREADS = 4
_CHUNK = 512
_BILINEAR = 2  # PIL.Image.Resampling.BILINEAR, without importing it
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})


class Item(NamedTuple):
    """An encoded image: where it is, for errors, and its bytes or its file."""

    where: str
    source: bytes | Path


class Labelled(NamedTuple):
    """Encoded images and the class of each, shape (S,), int64."""

    items: list[Item]
    labels: Tensor


class ImageSource(NamedTuple):
    """What a reader found, before anything is decoded."""

    train: Labelled
    test: Labelled | None
    classes: tuple[str, ...]


def digits(options: LoadOptions) -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits of 8×8 pixels; their 17 grey levels are spread over 0 to 255."""
    bunch = require("sklearn.datasets", "The data set 'digits'").load_digits()
    pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    classes = tuple(map(str, bunch.target_names))
    plan = plan_splits(labels, None, classes=classes, options=options, source="digits")
    splits = [Split(pixels[idx], labels[idx]) for idx in plan]
    return image_dataset("digits", splits, classes)


def decode_source(name: str, source: ImageSource, options: LoadOptions, progress: Progress | None) -> Dataset:
    """Choose the samples of each split, decode those, and make a data set of them."""
    test_labels = None if source.test is None else source.test.labels
    plan = plan_splits(source.train.labels, test_labels, classes=source.classes, options=options, source=name)
    parts = _chosen(source, plan)
    pixels = decode([item for part in parts for item in part.items], size=options.size, progress=progress)
    pieces = pixels.split([len(part.items) for part in parts])
    splits = [Split(piece, part.labels) for piece, part in zip(pieces, parts, strict=True)]
    return image_dataset(name, splits, source.classes)


def image_dataset(name: str, splits: Sequence[Split], classes: tuple[str, ...]) -> Dataset:
    """Make a data set of decoded images.

    Args:
        name: what the source is called.
        splits: train, val and test, images of shape (S, C, H, W), uint8.
        classes: name of each class.
    Returns:
        dataset: normalised by the mean and deviation of each channel of the training images.
    """
    train, val, test = splits
    _, channels, height, width = train.inputs.shape
    task = TaskSpec(input=ImageInput(channels=channels, height=height, width=width), output=Classes(n=len(classes)))
    return Dataset(name, task, train, val, test, classes, input_scaling=Scaling.of_images(train.inputs))


def read_folder(root: Path) -> ImageSource:
    """List the images of a folder with one sub-folder per class, or with such folders under train/ and test/.

    Raises:
        DataError: no class folders, a class without images, or a test class that training lacks.
    """
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = root / "test" if train_root != root and (root / "test").is_dir() else None
    classes = tuple(folder.name for folder in _folders(train_root))
    if not classes:
        raise DataError(
            f"'{train_root}' has no sub-folders.",
            remedy="Put the images into one sub-folder per class, below train/ and test/ if they are divided already.",
        )
    return ImageSource(_list_images(train_root, classes), test_root and _list_images(test_root, classes), classes)


def decode(items: Sequence[Item], *, size: int | None = None, progress: Progress | None = None) -> Tensor:
    """Decode images with a few threads.

    Grey images stay grey if all are; else all become RGB. Transparency is dropped.

    Args:
        items: at least one image, all of the same size unless `size` is given.
        size: resize each image to this many pixels a side.
        progress: called now and then with the images done and the images to do.
    Returns:
        images: shape (S, C, H, W), uint8, C = 1 or 3.
    Raises:
        DataError: an image cannot be read, has more than 8 bits a channel, or another size than the first; names it.
    """
    pil = require("PIL.Image", "Reading images")
    arrays: list[np.ndarray] = []
    with ThreadPoolExecutor(_N_THREADS) as pool:
        for start in range(0, len(items), _CHUNK):
            arrays += pool.map(lambda item: _decode_one(pil, item, size), items[start : start + _CHUNK])
            if progress is not None:
                progress(len(arrays), len(items))
    _check_sizes(items, arrays)
    if any(array.ndim == 3 for array in arrays):
        arrays = [array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2) for array in arrays]
    pixels = torch.from_numpy(np.stack(arrays))
    return pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()


def _decode_one(pil: Any, item: Item, size: int | None) -> np.ndarray:
    """Decode to (H, W) or (H, W, 3), uint8."""
    try:
        with pil.open(io.BytesIO(item.source) if isinstance(item.source, bytes) else item.source) as image:
            return np.asarray(_to_8_bits(image, None if size is None else (size, size)))
    except Exception as error:  # decoders of a dozen formats fail in as many ways
        reason = "no known format" if isinstance(error, pil.UnidentifiedImageError) else error
        raise DataError(
            f"{item.where} cannot be read as an image: {reason}.", remedy="Replace it, or take it out."
        ) from None


def _to_8_bits(image: Any, size: tuple[int, int] | None) -> Any:
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits a channel (mode {image.mode})")
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, a transparent palette would warn
    image = image.convert("L" if image.mode in {"1", "L", "LA"} else "RGB")
    return image if size is None else image.resize(size, _BILINEAR)


def _check_sizes(items: Sequence[Item], arrays: Sequence[np.ndarray]) -> None:
    first = arrays[0].shape[:2]
    for item, array in zip(items, arrays, strict=True):
        if array.shape[:2] != first:
            here = f"{array.shape[0]}×{array.shape[1]}"
            raise DataError(
                f"All images must have one size. {items[0].where} has {first[0]}×{first[1]} pixels, "
                f"{item.where} has {here}.",
                remedy=f"Resize them while loading: size={first[0]}.",
            )


def _chosen(source: ImageSource, plan: Plan) -> tuple[Labelled, Labelled, Labelled]:
    test = source.train if source.test is None else source.test
    return _take(source.train, plan.train), _take(source.train, plan.val), _take(test, plan.test)


def _take(part: Labelled, idx: Tensor) -> Labelled:
    return Labelled([part.items[i] for i in idx.tolist()], part.labels[idx])


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list_images(root: Path, classes: tuple[str, ...]) -> Labelled:
    items: list[Item] = []
    labels: list[int] = []
    for folder in _folders(root):
        if folder.name not in classes:
            raise DataError(
                f"'{folder}' is a class of the test set, of which there is no training folder.",
                remedy=f"Classes of the training set: {', '.join(classes)}.",
            )
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
        if not files:
            raise DataError(
                f"The class folder '{folder}' holds no image.",
                remedy=f"Put images there ({', '.join(sorted(_SUFFIXES))}), or remove the folder.",
            )
        items += [Item(f"'{file}'", file) for file in files]
        labels += [classes.index(folder.name)] * len(files)
    return Labelled(items, torch.tensor(labels, dtype=torch.int64))
