"""Texts: running text for next-token prediction, sentences with a label for classification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from weightfold.data.dataset import Dataset, Split, windows
from weightfold.data.options import LoadOptions
from weightfold.data.splits import plan_splits
from weightfold.errors import DataError
from weightfold.models.task import Classes, NextToken, TaskSpec, TextInput

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Token 0: a character that the training text lacks, and the padding before a short sentence."""


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a training text, numbered from 1; 0 is every other character.

    Example:
        >>> vocabulary = Vocabulary.of("banana")
        >>> vocabulary.characters
        ('�', 'a', 'b', 'n')
        >>> vocabulary.encode("bad")
        tensor([2, 1, 0], dtype=torch.int32)
    """

    characters: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Self:
        """Collect the characters of a text in order of their code points."""
        return cls((UNKNOWN, *sorted(set(text) - {UNKNOWN})))

    def encode(self, text: str) -> Tensor:
        """Number the characters of a text, shape (len(text),), int32."""
        points = _code_points(text)
        known = _code_points("".join(self.characters[1:]))
        place = np.searchsorted(known, points).clip(max=len(known) - 1)
        return torch.from_numpy(np.where(known[place] == points, place + 1, 0).astype(np.int32))


def load_text(path: Path, test_path: Path | None, options: LoadOptions) -> Dataset:
    """Read a running text, character by character.

    The text is divided in its own order: training first, then validation, then test unless that is a file of its own.

    Raises:
        DataError: a part is shorter than one window, or the training text is one character repeated.
    """
    text = path.read_text(encoding="utf-8-sig")[: options.limit]
    if test_path is None:
        text, test = _cut(text, options.held_out(0.1))
    else:
        test = test_path.read_text(encoding="utf-8-sig")[: options.limit]
    train, val = _cut(text, options.val_share)
    for part, role in ((train, "training"), (val, "validation"), (test, "test")):
        _check_length(part, role, path, options.context)
    vocabulary = Vocabulary.of(train)
    n_tokens = len(vocabulary.characters)
    if n_tokens < 3:
        raise DataError(f"The text '{path}' holds one character only: {train[0]!r}.", remedy="Pass a real text.")
    task = TaskSpec(input=TextInput(vocab=n_tokens, context=options.context), output=NextToken(vocab=n_tokens))
    parts = [windows(vocabulary.encode(part), options.context) for part in (train, val, test)]
    return Dataset(path.stem, task, parts[0], parts[1], parts[2], vocabulary=vocabulary.characters)


def is_sentence_table(path: Path) -> bool:
    """Tell whether a file of tab-separated values has the columns `sentence` and `label`."""
    with path.open(encoding="utf-8-sig") as file:
        return {"sentence", "label"} <= {cell.strip() for cell in file.readline().split("\t")}


def load_sentences(path: Path, test_path: Path | None, options: LoadOptions) -> Dataset:
    """Read sentences and their labels, character by character.

    Longer sentences are cut at the end of the context; shorter ones are padded in front with token 0, so that the last
    token is always a real one.

    Raises:
        DataError: a row has too few cells, a sentence is empty, or a label is too rare for the splits.
    """
    sentences, names = _read_sentences(path)
    test_sentences, test_names = ([], []) if test_path is None else _read_sentences(test_path)
    classes = tuple(sorted({*names, *test_names}))
    labels = torch.tensor([classes.index(name) for name in names], dtype=torch.int64)
    test_labels = torch.tensor([classes.index(name) for name in test_names], dtype=torch.int64)
    own_test = None if test_path is None else test_labels
    plan = plan_splits(labels, own_test, classes=classes, options=options, source=path.name)
    vocabulary = Vocabulary.of("".join(sentences[i] for i in plan.train.tolist()))

    def split(source: list[str], labels: Tensor, idx: Tensor) -> Split:
        return Split(_pad([vocabulary.encode(source[i]) for i in idx.tolist()], options.context), labels[idx])

    train, val = split(sentences, labels, plan.train), split(sentences, labels, plan.val)
    test = split(sentences, labels, plan.test) if own_test is None else split(test_sentences, own_test, plan.test)
    n_tokens = len(vocabulary.characters)
    task = TaskSpec(input=TextInput(vocab=n_tokens, context=options.context), output=Classes(n=len(classes)))
    return Dataset(path.stem, task, train, val, test, classes, vocabulary.characters)


def _read_sentences(path: Path) -> tuple[list[str], list[str]]:
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    header = [cell.strip() for cell in rows[0]]
    for needed in ("sentence", "label"):
        if needed not in header:
            raise DataError(
                f"'{path}' has no column '{needed}'. Columns there: {', '.join(header)}.",
                remedy="Give the test file the header of the training file.",
            )
    sentence, label = header.index("sentence"), header.index("label")
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(header) or not row[sentence].strip() or not row[label].strip():
            raise DataError(
                f"Line {line} of '{path}' must hold {', '.join(header)}, divided by tabs. Got {row!r} instead.",
                remedy="Correct or remove that line.",
            )
    return [row[sentence].strip() for row in rows[1:]], [row[label].strip() for row in rows[1:]]


def _pad(tokens: list[Tensor], context: int) -> Tensor:
    padded = torch.zeros(len(tokens), context, dtype=torch.int32)
    for row, sentence in zip(padded, tokens, strict=True):
        n = min(len(sentence), context)
        row[context - n :] = sentence[:n]
    return padded


def _cut(text: str, share: float) -> tuple[str, str]:
    """The text and its last part."""
    place = len(text) - round(share * len(text))
    return text[:place], text[place:]


def _check_length(part: str, role: str, path: Path, context: int) -> None:
    if len(part) <= context:
        raise DataError(
            f"The {role} part of the text '{path}' must be longer than the context of {context} characters. "
            f"Got {len(part)} instead.",
            remedy="Pass a longer text, a smaller context=, or a larger limit=.",
        )


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
