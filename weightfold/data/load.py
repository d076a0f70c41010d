"""One door to every source of data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from weightfold.config import nearest
from weightfold.data.dataset import Dataset
from weightfold.data.images import decode_source, digits, read_folder
from weightfold.data.options import LoadOptions, Progress
from weightfold.data.parquet import read_parquet
from weightfold.data.table import is_number_table, load_table
from weightfold.data.text import is_sentence_table, load_sentences, load_text
from weightfold.errors import DataError

_BUILT_IN = {"digits": digits}
_FILES = (".parquet", ".csv", ".tsv", ".txt")


def load(
    source: str | Path,
    *,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Dataset:
    """Load a data set into memory and divide it into training, validation and test samples.

    The source may be

    - `"digits"`: scikit-learn's handwritten digits, which need no file;
    - a folder of images with one sub-folder per class, or with such folders under train/ and test/;
    - a .parquet file with the columns `image` (encoded bytes) and `label`;
    - a .csv or .tsv table, or a .txt of numbers divided by blanks: regression or classification;
    - a .tsv with the columns `sentence` and `label`: classification of texts;
    - any other .txt: the next character of a running text.

    A file with the word `train` in its name is joined by the one with `test` in that place, if it lies beside it.
    Otherwise test samples are held out. Samples and splits are chosen by the seed alone, each class in its proportion;
    a running text is divided in its own order. Nothing is ever downloaded.

    Args:
        source: a name or a path.
        seed: of the choice of samples.
        limit: at most this many samples for training and validation together, and as many for test.
        progress: called with the images decoded so far and the images to decode.
        **options: further settings, see `LoadOptions`: `target=`, `output=`, `drop=`, `header=`, `context=`, `size=`,
            `val_share=`, `test_share=`, `download="never"`.
    Returns:
        dataset: splits as they were read; `batches` normalises them.
    Raises:
        DataError: the source is missing, empty, of one class, or holds what cannot be read; names the place.
        ConfigError: a setting is unknown or out of range.
    Example:
        >>> data = load("digits", limit=500)
        >>> data.task.input.shape, data.task.output.n
        ((1, 8, 8), 10)
        >>> len(data.train), len(data.val), len(data.test)
        (360, 40, 100)
    """
    settings = LoadOptions(seed=seed, limit=limit, **options)
    if source in _BUILT_IN:
        return _BUILT_IN[str(source)](settings)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"There is no data set '{source}': neither a built-in one nor a file or folder.",
            remedy=f"Built in: {nearest(str(source), _BUILT_IN)} Nothing is downloaded.",
        )
    try:
        return _load_path(path, settings, progress)
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is no text in UTF-8: {error.reason} at byte {error.start}.", remedy="Convert it to UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"'{error.filename or path}' cannot be read: {error.strerror or error}.") from None


def _load_path(path: Path, options: LoadOptions, progress: Progress | None) -> Dataset:
    if path.is_dir():
        return decode_source(path.resolve().name, read_folder(path), options, progress)
    test_path = _test_beside(path)
    match path.suffix.lower():
        case ".parquet":
            return decode_source(path.stem, read_parquet(path, test_path), options, progress)
        case ".tsv" if is_sentence_table(path):
            return load_sentences(path, test_path, options)
        case ".txt" if not is_number_table(path.read_text(encoding="utf-8-sig")):
            return load_text(path, test_path, options)
        case ".csv" | ".tsv" | ".txt":
            return load_table(path, test_path, options)
    raise DataError(
        f"'{path}' has the ending '{path.suffix}'; known are {', '.join(_FILES)}, and folders of images.",
        remedy="Convert the data to one of these.",
    )


def _test_beside(path: Path) -> Path | None:
    """The test file beside a training file: the word 'train' in its name replaced."""
    name = re.sub(r"(?<![a-z])train(?![a-z])", "test", path.name, count=1)
    beside = path.with_name(name)
    return beside if name != path.name and beside.is_file() else None
