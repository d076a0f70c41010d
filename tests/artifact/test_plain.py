"""JSON of files: what JSON cannot say, or no reader takes, is refused with the reason."""

from __future__ import annotations

import json

import pytest

from weightfold.artifact.plain import parse_json


def test_plain_data_comes_back() -> None:
    value = {"a": [1, -2.5, None, True, "ü", {"b": []}], "c": 10**300}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[NaN]", "NaN is not a number"),
        ("-Infinity", "is not a number"),
        ("1e999", "larger than any number"),
        ("1" * 500, "500 digits"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice"),
        (r'{"a": "\ud800"}', "half a character"),
        (r'{"\udfff": 1}', "half a character"),
        ("[" * 65 + "]" * 65, "deeper than 64"),
        ("[" * 200_000, "deeper than 64"),
        ("{", "Expecting"),
        (b"\xff", "decode"),
    ],
)
def test_anything_else_is_a_value_error(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_sixty_four_levels_are_read() -> None:
    assert parse_json("[" * 64 + "]" * 64)
