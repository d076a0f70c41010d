"""One record of the ledger: canonical JSON, and the hash that ties it to the record before.

    hash = SHA-256 of {"body":BODY,"kind":KIND,"prev":PREV,"seq":SEQ}, itself canonical JSON in UTF-8

Wall-clock facts (`time`, `aside`) stay out of the hash, so that the same run done twice has the same head. A checksum
of their own covers them.
"""

from __future__ import annotations

import hashlib
import json
import math
import time as clock
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from weightfold.errors import LedgerError

GENESIS = "0" * 64
"""What the first entry of a chain names as the hash before it."""

RESTORE = "Restore a copy of the file, or import an export in JSON lines; what stands before this is intact."

MAX_DEPTH = 64
MAX_INT_BITS = 1024


class Row(NamedTuple):
    """An entry as it is stored: `body` and `aside` are canonical JSON, `checksum` covers `time` and `aside`."""

    seq: int
    kind: str
    time: float
    body: str
    aside: str
    prev: str
    hash: str
    checksum: int


ROW_TYPES = (int, str, float, str, str, str, str, int)


@dataclass(frozen=True, slots=True)
class Entry:
    """One link of the chain.

    Args:
        seq: place in the chain, from 0.
        kind: what sort of record this is: "run", "edit", ...
        time: when it was appended, seconds since 1970; not hashed.
        body: the facts, plain JSON; hashed.
        prev: hash of the entry before, 64 zeros for the first.
        hash: SHA-256 over seq, kind, body and prev, in hex.
        aside: facts of the wall clock (seconds, host), plain JSON; not hashed.

    Example:
        >>> entry = Entry.after(None, "run", {"seed": 7}, {"seconds": 0.3})
        >>> entry.seq, entry.hash[:16], entry.hash == entry.compute_hash()
        (0, 'a7a5a6621391ae31', True)
    """

    seq: int
    kind: str
    time: float
    body: dict[str, Any]
    prev: str
    hash: str
    aside: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def after(cls, last: tuple[int, str] | None, kind: str, body: dict[str, Any], aside: dict[str, Any]) -> Self:
        """Make the entry that follows (seq, hash), or the first one.

        Raises:
            LedgerError: the kind is no word, or the body or aside is not plain JSON; names the key.
        """
        if type(kind) is not str or not kind:
            raise LedgerError(f"The kind of an entry must be a non-empty str. Got {kind!r} instead.")
        _check_text(kind, "kind")
        facts, beside = _plain_dict(body, "body"), _plain_dict(aside, "aside")
        seq, prev = (0, GENESIS) if last is None else (last[0] + 1, last[1])
        digest = chain_hash(seq, kind, to_json(facts), prev)
        return cls(seq, kind, clock.time(), facts, prev, digest, beside)

    def compute_hash(self) -> str:
        """Recompute the hash from seq, kind, body and prev; equals `hash` unless something was changed."""
        return chain_hash(self.seq, self.kind, canonical(self.body), self.prev)

    def to_row(self) -> Row:
        """Give the entry in the form in which it is stored."""
        body, aside = to_json(self.body), to_json(self.aside)
        checksum = aside_checksum(self.seq, self.time, aside)
        return Row(self.seq, self.kind, self.time, body, aside, self.prev, self.hash, checksum)

    @classmethod
    def from_row(cls, values: Sequence[Any], where: str) -> Self:
        """Read a stored row, and check it against its own hash and checksum.

        Raises:
            LedgerError: the row was changed; names it and what differs.
        """
        row = Row(*values)
        check_types(row, ROW_TYPES, where)
        computed = chain_hash(row.seq, row.kind, row.body, row.prev)
        if computed != row.hash:
            raise LedgerError(
                f"{where} was changed: its seq, kind, body and prev hash to {computed}, but its hash is {row.hash!r}.",
                remedy=RESTORE,
            )
        if aside_checksum(row.seq, row.time, row.aside) != row.checksum:
            raise LedgerError(
                f"{where} was changed: its time or aside does not fit the checksum {row.checksum}.", remedy=RESTORE
            )
        body, aside = _parse_dict(row.body, f"{where}: its body"), _parse_dict(row.aside, f"{where}: its aside")
        return cls(row.seq, row.kind, row.time, body, row.prev, row.hash, aside)


def canonical(value: Any, where: str = "body") -> str:
    """Write plain data as JSON in its one canonical form: sorted keys, no spaces, floats by repr, tuples as lists.

    Raises:
        LedgerError: something in it is not plain JSON, or a float is not finite; names the key.

    Example:
        >>> canonical({"b": (1, 2.5), "a": None})
        '{"a":null,"b":[1,2.5]}'
    """
    return to_json(plain(value, where))


def plain(value: Any, where: str = "body", depth: int = 0) -> Any:
    """Copy plain data, tuples as lists, and refuse what JSON cannot give back exactly.

    Example:
        >>> plain({"loss": [float("nan")]})
        Traceback (most recent call last):
        weightfold.errors.LedgerError: 'body.loss[0]' must be a finite number. Got nan instead.
          -> Leave it out, or write it as None or a str.
    """
    if depth > MAX_DEPTH:
        raise LedgerError(f"'{where}' is nested deeper than {MAX_DEPTH} levels, or holds itself.")
    if value is None or type(value) is bool:
        return value
    if isinstance(value, dict):
        return {_key(key, where): plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    check = _LEAVES.get(type(value))
    if check is None:
        raise LedgerError(
            f"'{where}' must be None, bool, int, float, str, list or dict. Got {type(value).__qualname__} instead.",
            remedy="Convert it first: .item() for one number, .tolist() for an array, str() for a name.",
        )
    check(value, where)
    return value


def check_types(row: Sequence[Any], types: Sequence[type], where: str) -> None:
    """Refuse a stored row whose columns hold values of other types than they should."""
    if tuple(map(type, row)) != tuple(types):
        held = ", ".join(type(value).__name__ for value in row)
        raise LedgerError(f"{where} was changed: its columns hold {held}.", remedy=RESTORE)
    if any(type(value) is int and not -(1 << 63) <= value < 1 << 63 for value in row):
        raise LedgerError(f"{where} was changed: its numbers do not fit in 64 bits.", remedy=RESTORE)


def to_json(value: Any) -> str:
    """Write data that `plain` has passed, or `parse` has read, in the canonical form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def chain_hash(seq: int, kind: str, body: str, prev: str) -> str:
    """Hash an entry whose body is already canonical JSON."""
    text = f'{{"body":{body},"kind":{to_json(kind)},"prev":{to_json(prev)},"seq":{seq}}}'
    return hashlib.sha256(encode(text)).hexdigest()


def aside_checksum(seq: int, time: float, aside: str) -> int:
    """Checksum what the chain's hash leaves out."""
    return zlib.crc32(encode(f"{seq}\n{time!r}\n{aside}"))


def encode(text: str) -> bytes:
    """Encode stored text; bytes that were no UTF-8 when read come back as they were, so that a hash sees them."""
    return text.encode("utf-8", "surrogateescape")


def decode(data: bytes) -> str:
    """Decode stored text without failing on damage; `encode` gives the same bytes back."""
    return data.decode("utf-8", "surrogateescape")


def parse(text: str, where: str) -> Any:
    """Read JSON, refusing NaN and Infinity.

    Raises:
        LedgerError: it is not JSON; starts with `where`.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise LedgerError(f"{where} is not JSON: {error}.") from None


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number in JSON")


def _parse_dict(text: str, where: str) -> dict[str, Any]:
    value = parse(text, where)
    if type(value) is not dict:
        raise LedgerError(f"{where} must be a JSON object. Got {text[:40]!r} instead.")
    return value


def _plain_dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LedgerError(f"The '{where}' of an entry must be a dict. Got {type(value).__qualname__} instead.")
    return plain(value, where)


def _key(key: Any, where: str) -> str:
    if type(key) is not str:
        raise LedgerError(f"The keys of '{where}' must be str. Got {key!r} ({type(key).__qualname__}) instead.")
    _check_text(key, f"{where}.{key!r}")
    return key


def _check_float(value: float, where: str) -> None:
    if not math.isfinite(value):
        raise LedgerError(
            f"'{where}' must be a finite number. Got {value} instead.",
            remedy="Leave it out, or write it as None or a str.",
        )


def _check_int(value: int, where: str) -> None:
    if value.bit_length() > MAX_INT_BITS:
        raise LedgerError(f"'{where}' must be an int of at most {MAX_INT_BITS} bits. Got {value.bit_length()} bits.")


def _check_text(value: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LedgerError(f"'{where}' must be text that UTF-8 can write. Got {value!a} instead.") from None


_LEAVES = {float: _check_float, int: _check_int, str: _check_text}
