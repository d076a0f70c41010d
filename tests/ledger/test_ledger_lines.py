"""JSON lines: the round trip is complete, and damage in the lines is named."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from weightfold.errors import LedgerError
from weightfold.ledger import Ledger
from weightfold.ledger.entry import aside_checksum, chain_hash, to_json
from weightfold.ledger.metric import Metric


@pytest.fixture
def export(filled: Path, tmp_path: Path) -> Path:
    with Ledger.open(filled) as log:
        log.log_metrics(5, {"best": math.inf, "worst": -math.inf})
        log.export_jsonl(tmp_path / "run.jsonl")
    return tmp_path / "run.jsonl"


def test_the_round_trip_is_complete(filled: Path, export: Path, tmp_path: Path) -> None:
    with Ledger.open(filled) as log, Ledger.import_jsonl(export, tmp_path / "copy.ledger") as copy:
        assert copy.head == log.head
        assert list(copy.entries()) == list(log.entries())
        assert copy.metric_names() == log.metric_names() == ["bad", "best", "loss", "width", "worst"]
        for name in log.metric_names():
            assert repr(copy.metrics(name)) == repr(log.metrics(name))
        copy.export_jsonl(tmp_path / "again.jsonl")
        assert (tmp_path / "again.jsonl").read_bytes() == export.read_bytes()
        assert copy.append("edit", {}).seq == len(log)
        copy.verify()


def test_every_line_is_json_of_its_own(export: Path) -> None:
    records = [json.loads(line) for line in export.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [record["record"] for record in records[:2]] == ["ledger", "entry"]
    assert records[1]["body"] == {"seed": 7, "versions": {"torch": "2.13"}}
    assert records[-1]["record"] == "end"
    assert records[-1]["entries"] == 14
    assert records[-1]["blobs"] == 2


def test_a_deep_body_survives(log: Ledger, tmp_path: Path) -> None:
    deep: list[object] = []
    for _ in range(62):
        deep = [deep]
    log.append("edit", {"deep": deep})
    log.export_jsonl(tmp_path / "run.jsonl")
    with Ledger.import_jsonl(tmp_path / "run.jsonl", tmp_path / "copy.ledger") as copy:
        assert copy.head == log.head


def test_neither_way_overwrites_a_ledger(filled: Path, export: Path) -> None:
    with pytest.raises(LedgerError, match="exists already"):
        Ledger.import_jsonl(export, filled)
    with Ledger.open(filled) as log:
        with pytest.raises(LedgerError, match="is the ledger itself"):
            log.export_jsonl(filled)
        log.export_jsonl(export)
        log.verify()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: lines[:-1], "the file was cut short"),
        (lambda lines: [], "an empty file, is the last one"),
        (lambda lines: [*lines[:-1], lines[-1][:20]], r"Line \d+ .* is not JSON"),
        (lambda lines: [*lines[:4], *lines[5:]], "an entry must follow the last one"),
        (lambda lines: [*lines[:4], *lines[3:]], "an entry must follow the last one"),
        (lambda lines: [line for line in lines if '"metric"' not in line], r"Line \d+ .* promises"),
        (lambda lines: [line for line in lines if '"blob"' not in line], r"Line \d+ .* promises"),
        (lambda lines: lines[1:], "Line 1 .* is out of place: a 'entry' after 'nothing'"),
        (lambda lines: [*lines, lines[-1]], "is out of place: a 'end' after 'end'"),
        (lambda lines: [lines[0].replace("1", "2"), *lines[1:]], "Line 1 .* has format 2, not 1"),
        (lambda lines: ["[1, 2]", *lines], "Line 1 .* is no record of a ledger"),
        (lambda lines: ['{"record":["a"]}', *lines], "Line 1 .* is no record of a ledger"),
        (lambda lines: [lines[0], lines[1].replace('"aside":{},', ""), *lines[2:]], "a 'entry' must have"),
        (
            lambda lines: [lines[0], lines[1].replace('"seed":7', '"seed":8'), *lines[2:]],
            "Line 2 .* entry 0, was changed",
        ),
        (lambda lines: [lines[0], lines[1].replace('"seq":0', '"seq":"0"'), *lines[2:]], "columns hold str"),
        (
            lambda lines: [line.replace('"s":0.25', '"s":0.5') for line in lines],
            "entry 1, was changed: its time or aside",
        ),
        (lambda lines: [line.replace('"value":0.5', '"value":0.4') for line in lines], "does not fit the checksum"),
        (lambda lines: [line.replace('"value":0.5', '"value":[]') for line in lines], "columns hold int, str, list"),
        (lambda lines: [line.replace('"data":"', '"data":"A') for line in lines], "holds no base64|has the digest"),
        (lambda lines: [line.replace('"data":"c21h', '"data":"c21i') for line in lines], "has the digest"),
    ],
)
def test_damage_in_the_lines_is_named(
    export: Path, tmp_path: Path, change: Callable[[list[str]], list[str]], complaint: str
) -> None:
    lines = export.read_text(encoding="utf-8").split("\n")[:-1]
    export.write_text("".join(f"{line}\n" for line in change(lines)), encoding="utf-8", newline="\n")
    with pytest.raises(LedgerError, match=complaint):
        Ledger.import_jsonl(export, tmp_path / "copy.ledger")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.jsonl", "run.ledger"]


def test_a_chain_with_a_broken_link_is_refused(export: Path, filled: Path, tmp_path: Path) -> None:
    """Two entries that are whole by themselves, from two ledgers."""
    other = tmp_path / "other"
    other.mkdir()
    with Ledger.create(other / "run.ledger", run={"seed": 8}) as log:
        log.append("edit", {"step": 0})
        log.export_jsonl(other / "run.jsonl")
    lines, foreign = (file.read_text(encoding="utf-8").split("\n") for file in (export, other / "run.jsonl"))
    lines[2] = foreign[2]
    export.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    with pytest.raises(LedgerError, match=r"Entry 1 of .*run\.jsonl' does not follow the entry before"):
        Ledger.import_jsonl(export, tmp_path / "copy.ledger")
    assert not (tmp_path / "copy.ledger").exists()


def test_a_flipped_byte_of_the_lines_is_found_or_changes_nothing(export: Path, tmp_path: Path) -> None:
    data = export.read_bytes()
    generator = random.Random(0)
    n_found = 0
    for number in range(300):
        position, mask = generator.randrange(len(data)), 1 << generator.randrange(8)
        export.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
        try:
            with Ledger.import_jsonl(export, tmp_path / f"{number}.ledger") as copy:
                copy.export_jsonl(tmp_path / "again.jsonl")
            assert (tmp_path / "again.jsonl").read_bytes() == data, f"byte {position} ^ {mask:#x} was not found"
        except LedgerError:
            n_found += 1
    assert n_found > 250


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}", b"SQLite format 3\0"])
def test_what_is_no_export_is_named(tmp_path: Path, content: bytes | None) -> None:
    source = tmp_path / "in.jsonl"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(LedgerError, match="in\\.jsonl'"):
        Ledger.import_jsonl(source, tmp_path / "copy.ledger")
    assert not (tmp_path / "copy.ledger").exists()


@pytest.mark.parametrize("number", [1 << 63, -(1 << 70), 10**300])
@pytest.mark.parametrize("kind", ["entry", "metric"])
def test_numbers_that_no_column_holds_are_an_error_of_ours(tmp_path: Path, kind: str, number: int) -> None:
    """Hash and checksum are right: the line was made so."""
    with Ledger.create(tmp_path / "a.db", {"seed": 0}) as made:
        made.log_metrics(1, {"loss": 0.5})
        made.export_jsonl(tmp_path / "a.jsonl")
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for record in records:
        if record["record"] == kind == "entry":
            record["seq"] = number
            record["hash"] = chain_hash(number, record["kind"], to_json(record["body"]), record["prev"])
            record["checksum"] = aside_checksum(number, record["time"], to_json(record["aside"]))
        if record["record"] == kind == "metric":
            record |= {"step": number, "checksum": Metric.make(number, record["name"], record["value"]).checksum}
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(LedgerError, match="fit in 64 bits"):
        Ledger.import_jsonl(tmp_path / "b.jsonl", tmp_path / "b.db")
    assert not (tmp_path / "b.db").exists()
