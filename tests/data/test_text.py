"""Running text and sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightfold.data import load
from weightfold.data.text import Vocabulary
from weightfold.errors import DataError
from weightfold.models import Classes, NextToken

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 20


def decode(tokens: torch.Tensor, classes: tuple[str, ...]) -> str:
    return "".join(classes[token] for token in tokens.flatten().tolist())


@given(st.text(min_size=1), st.text())
def test_known_characters_come_back_and_others_do_not(train: str, other: str) -> None:
    vocabulary = Vocabulary.of(train + "x")
    back = decode(vocabulary.encode(other), vocabulary.characters)
    assert back == "".join(c if c in train + "x" else "\ufffd" for c in other)


def test_the_text_is_divided_in_its_own_order(tmp_path: Path) -> None:
    (tmp_path / "fox.txt").write_text(TEXT)
    data = load(tmp_path / "fox.txt", context=8)
    assert data.task.output == NextToken(vocab=len(set(TEXT)) + 1)
    read = decode(data.train.inputs, data.vocabulary)
    assert TEXT.startswith(read)
    assert len(read) >= 0.8 * len(TEXT)
    assert decode(data.train.targets, data.vocabulary) == TEXT[1 : len(read) + 1]
    assert decode(data.test.inputs, data.vocabulary) in TEXT[-100:]


def test_the_vocabulary_is_that_of_the_training_text(tmp_path: Path) -> None:
    (tmp_path / "fox-train.txt").write_text(TEXT)
    (tmp_path / "fox-test.txt").write_text("THE QUICK brown fox")
    data = load(tmp_path / "fox-train.txt", context=8)
    assert decode(data.test.inputs, data.vocabulary) == "\ufffd\ufffd\ufffd \ufffd\ufffd\ufffd\ufffd\ufffd brown "


@pytest.mark.parametrize(
    ("text", "settings", "complaint"),
    [
        ("", {}, "training part of the text .* Got 0"),
        ("short", {}, "must be longer than the context of 128"),
        (TEXT, {"limit": 100}, "longer than the context"),
        ("a" * 5000, {}, "one character only: 'a'"),
    ],
)
def test_texts_too_poor_are_refused(tmp_path: Path, text: str, settings: dict, complaint: str) -> None:
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(DataError, match=complaint):
        load(tmp_path / "x.txt", **settings)


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("straße".encode("latin-1"))
    with pytest.raises(DataError, match="no text in UTF-8"):
        load(tmp_path / "x.txt")


def sentences(n: int) -> str:
    return "sentence\tlabel\n" + "".join(f'a "quoted" one {i}\t{i % 2}\n' for i in range(n))


def test_sentences_end_with_the_window(tmp_path: Path) -> None:
    (tmp_path / "s.tsv").write_text(sentences(30))
    data = load(tmp_path / "s.tsv", context=20)
    assert data.task.output == Classes(n=2)
    first = decode(data.train.inputs[0], data.vocabulary)
    assert first.lstrip("\ufffd") == 'a "quoted" one 0'
    assert len(first) == 20
    assert load(tmp_path / "s.tsv", context=8).train.inputs.shape[1] == 8


def test_the_test_sentences_beside_are_found(tmp_path: Path) -> None:
    (tmp_path / "s-train.tsv").write_text(sentences(30))
    (tmp_path / "s-test.tsv").write_text(sentences(4))
    data = load(tmp_path / "s-train.tsv", context=20)
    assert len(data.test) == 4
    assert data.test.targets.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("no tab here\n", "Line 2 of .* must hold sentence, label"),
        ("a\t1\n\t0\n", "Line 3 of .* must hold sentence, label"),
        ("", "is empty"),
    ],
)
def test_bad_sentence_files_say_where(tmp_path: Path, lines: str, complaint: str) -> None:
    (tmp_path / "s.tsv").write_text("sentence\tlabel\n" + lines)
    with pytest.raises(DataError, match=complaint):
        load(tmp_path / "s.tsv")


def test_a_test_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s-train.tsv").write_text(sentences(30))
    (tmp_path / "s-test.tsv").write_text("text\tlabel\na\t1\n")
    with pytest.raises(DataError, match=r"no column 'sentence'. Columns there: text, label"):
        load(tmp_path / "s-train.tsv")
