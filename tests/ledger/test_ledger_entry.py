"""Canonical JSON and the hash of an entry. Expected values: hashlib and json of the standard library, written out."""

from __future__ import annotations

import enum
import hashlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfold.errors import LedgerError
from weightfold.ledger import Entry
from weightfold.ledger.entry import GENESIS, MAX_DEPTH, canonical, parse

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAF = (
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
)
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=20
)
BODIES = st.dictionaries(TEXT, JSON, max_size=5)


@given(BODIES)
def test_canonical_json_gives_every_body_back(body: dict[str, Any]) -> None:
    text = canonical(body)
    back = parse(text, "body")
    assert repr(back) == repr(json.loads(json.dumps(body, sort_keys=True)))
    assert canonical(back) == text
    assert "\n" not in text
    text.encode()


@given(BODIES, BODIES)
def test_the_hash_is_sha256_of_the_four_fields(body: dict[str, Any], aside: dict[str, Any]) -> None:
    entry = Entry.after((4, "ab" * 32), "edit", body, aside)
    fields = {"seq": 5, "kind": "edit", "body": body, "prev": "ab" * 32}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert entry.hash == entry.compute_hash() == hashlib.sha256(text.encode()).hexdigest()
    assert Entry.from_row(entry.to_row(), "Entry") == entry


def test_the_hash_is_pinned() -> None:
    """The format of the chain must not change by accident: old ledgers would no longer verify."""
    entry = Entry.after(None, "run", {"b": [1, 2.5, None, True], "a": "é"}, {})
    assert entry.prev == GENESIS
    assert entry.hash == "79512844a2e58693a9db556a8ea1a60908b6b25569fafed80c6761268f41e961"


def test_time_and_aside_are_not_hashed() -> None:
    first, second = (Entry.after(None, "run", {"seed": 0}, {"seconds": seconds}) for seconds in (0.1, 99.0))
    assert first.hash == second.hash
    assert first.to_row().checksum != second.to_row().checksum


def test_the_entry_does_not_share_the_callers_lists() -> None:
    kept = [0, 2]
    entry = Entry.after(None, "edit", {"kept": kept, "pair": (1, (2, 3))}, {})
    kept.append(9)
    assert entry.body == {"kept": [0, 2], "pair": [1, [2, 3]]}


class Colour(enum.StrEnum):
    RED = "red"


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"loss": math.nan}, r"'body.loss' must be a finite number. Got nan"),
        ({"a": [{"b": 0.0}, {"b": -math.inf}]}, r"'body.a\[1\].b' must be a finite number. Got -inf"),
        ({"x": np.float64(1.0)}, r"'body.x' must be None, bool.* Got float64"),
        ({"x": np.int64(1)}, r"'body.x'.* Got int64"),
        ({"x": np.bool_(True)}, r"'body.x'.* Got bool"),
        ({"x": np.zeros(2)}, r"'body.x'.* Got ndarray"),
        ({"x": np.str_("a")}, r"'body.x'.* Got str_"),
        ({"x": Colour.RED}, r"'body.x'.* Got Colour"),
        ({"x": {1, 2}}, r"'body.x'.* Got set"),
        ({"x": b"raw"}, r"'body.x'.* Got bytes"),
        ({"x": {3: "c"}}, r"keys of 'body.x' must be str. Got 3 \(int\)"),
        ({"x": "\ud800"}, r"'body.x' must be text that UTF-8 can write"),
        ({"\udc80": 1}, r"must be text that UTF-8 can write"),
        ({"x": 1 << 5000}, r"'body.x' must be an int of at most 1024 bits. Got 5001"),
        ({"x": nested(MAX_DEPTH)}, r"nested deeper than 64"),
        ({"x": LOOP}, r"nested deeper than 64 levels, or holds itself"),
    ],
)
def test_what_is_not_plain_json_is_refused_by_its_key(value: dict[Any, Any], complaint: str) -> None:
    with pytest.raises(LedgerError, match=complaint):
        canonical(value)


@pytest.mark.parametrize(("kind", "body"), [("", {}), (3, {}), ("\ud800", {}), ("edit", [1]), ("edit", None)])
def test_kind_and_body_are_checked(kind: Any, body: Any) -> None:
    with pytest.raises(LedgerError):
        Entry.after(None, kind, body, {})


@pytest.mark.parametrize("text", ["{", "NaN", '{"a":Infinity}', "[" * 100_000, "9" * 5000])
def test_what_is_not_json_is_refused_when_read(text: str) -> None:
    with pytest.raises(LedgerError, match="Line 3 is not JSON"):
        parse(text, "Line 3")
