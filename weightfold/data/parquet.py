"""Parquet files of encoded images and their classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from weightfold.data.images import ImageSource, Item, Labelled
from weightfold.data.optional import require
from weightfold.errors import DataError

_COLUMNS = ("image", "label")


def read_parquet(path: Path, test_path: Path | None) -> ImageSource:
    """Read the columns `image` (PNG or JPEG bytes, or a struct with `bytes`) and `label` of one file or two.

    Class names come from the schema's metadata: `classes`, separated by commas, or what Hugging Face's datasets write
    there. Without either, the labels are their own names.

    Args:
        path: the training file.
        test_path: the test file, if there is one.
    Returns:
        source: nothing decoded yet.
    Raises:
        DataError: not a parquet file, a column is missing or of another type, a cell is empty, a label has no name.
    """
    table = _read(path)
    names = _class_names(table.schema)
    labels = _labels(path, table)
    if names is None:
        known = sorted(set(labels))
        classes = tuple(map(str, known))
        number = {label: i for i, label in enumerate(known)}
    else:
        classes = names
        number = {label: i for i, name in enumerate(names) for label in (i, name)}
    test = None if test_path is None else _labelled(test_path, _read(test_path), number)
    return ImageSource(_labelled(path, table, number), test, classes)


def _read(path: Path) -> Any:
    pyarrow = require("pyarrow", "Reading parquet files")
    parquet = require("pyarrow.parquet", "Reading parquet files")
    try:
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            missing = [name for name in _COLUMNS if name not in there]
            if missing:
                raise DataError(
                    f"'{path}' has no column '{missing[0]}'. Columns there: {', '.join(there)}.",
                    remedy="Name the encoded images 'image' and their classes 'label'.",
                )
            return file.read(columns=list(_COLUMNS))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"'{path}' cannot be read as a parquet file: {error}", remedy="Copy or download the file again."
        ) from None


def _labelled(path: Path, table: Any, number: dict[Any, int]) -> Labelled:
    labels = _labels(path, table)
    for row, label in enumerate(labels):
        if label not in number:
            raise DataError(
                f"Row {row} of '{path}' has the label {label!r}; known are {', '.join(map(str, number))}.",
                remedy="Correct the label, or the names under 'classes' in the schema's metadata.",
            )
    items = [Item(f"Row {row} of '{path}'", data) for row, data in enumerate(_images(path, table))]
    return Labelled(items, torch.tensor([number[label] for label in labels], dtype=torch.int64))


def _labels(path: Path, table: Any) -> list[Any]:
    labels = table.column("label").to_pylist()
    for row, label in enumerate(labels):
        if not isinstance(label, int | str):
            raise DataError(
                f"Row {row} of '{path}' has the label {label!r}.", remedy="Labels must be whole numbers or names."
            )
    return labels


def _images(path: Path, table: Any) -> list[bytes]:
    images = table.column("image").to_pylist()
    for row, image in enumerate(images):
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            raise DataError(
                f"Row {row} of '{path}' holds {type(data).__name__} in column 'image', not encoded bytes.",
                remedy="Store each image as PNG or JPEG bytes, not as a path or as numbers.",
            )
        images[row] = data
    return images


def _class_names(schema: Any) -> tuple[str, ...] | None:
    metadata = schema.metadata or {}
    if b"classes" in metadata:
        return tuple(metadata[b"classes"].decode(errors="replace").split(","))
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):  # not written by datasets, or labels without names
        return None
    return tuple(map(str, names))
