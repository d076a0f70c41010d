"""`weightfold train --method self-compress`: the table, the files, the picture, the board in the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import Result

from weightfold.cli.live import bar, board, picture, shown
from weightfold.cli.train import remarks
from weightfold.training.looks import Look, Start

from .conftest import TINY, Run

COMPRESS = (*TINY, "--method", "self-compress", "--at", "0.1", "--lr", "0.01", "--epochs", 10)
LAYERS = {
    "body.0.weight": {"bits": 3.2, "rows": 20, "weights": 700, "of": 1536, "bytes": 300.0},
    "head.weight": {"bits": 4.0, "rows": 10, "weights": 1, "of": 240, "bytes": 95.0},
}
START = Start({"body.0.weight": (24, 64), "head.weight": (10, 24)}, 1810, 8000, 500)
SCORES = {"dense": {"score": 0.91}, "folded": {"score": 0.875}}


@pytest.fixture(scope="module")
def compressed(cli: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("runs") / "small"
    return out, cli("train", *COMPRESS, "--target", "900B", "--out", out)


def test_the_table_says_what_the_file_takes(compressed: tuple[Path, Result]) -> None:
    out, done = compressed
    assert done.exit_code == 0, done.output
    arm = json.loads((out / "run.json").read_text())["results"]["arms"]["folded"]
    text = " ".join(done.stdout.split())
    for words in (
        "compressed",
        "weights that are not zero",
        f"{arm['size_bytes']:,} bytes (asked for: 900)",
        f"{arm['weights'][1]:,} of {arm['weights'][0]:,} weights",
        "model.wfp",
        "body.2.weight",
    ):
        assert words in text, words
    assert (out / "model.wfp").stat().st_size == arm["size_bytes"]


def test_the_file_is_exported_as_it_is(compressed: tuple[Path, Result], cli: Run, tmp_path: Path) -> None:
    out, _ = compressed
    done = cli("export", out, "--to", "packed", "--out", tmp_path / "a.wfp", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["largest_difference"] == 0
    assert (tmp_path / "a.wfp").read_bytes() == (out / "model.wfp").read_bytes()
    again = cli("export", out / "model.wfp", "--to", "packed", "--out", tmp_path / "b.wfp")
    assert again.exit_code == 0, again.output


def test_a_model_without_codes_is_refused_with_what_to_do(
    compressed: tuple[Path, Result], cli: Run, tmp_path: Path
) -> None:
    done = cli("export", compressed[0] / "dense.safetensors", "--to", "packed", "--out", tmp_path / "a.wfp")
    assert done.exit_code == 2
    assert "has no codes" in done.stderr
    assert "--method self-compress" in done.stderr
    assert not (tmp_path / "a.wfp").exists()


def test_the_picture_is_drawn_and_written(compressed: tuple[Path, Result], cli: Run, tmp_path: Path) -> None:
    text = cli("ledger", "timeline", compressed[0], "--bits")
    assert text.exit_code == 0, text.output
    assert "body.2.weight" in text.stdout
    assert "900 asked for" in text.stdout
    svg = tmp_path / "bits.svg"
    assert cli("ledger", "timeline", compressed[0], "--bits", "--out", svg).exit_code == 0
    ElementTree.parse(svg)
    facts = json.loads(cli("ledger", "timeline", compressed[0], "--bits", "--json").stdout)
    assert [layer["name"] for layer in facts["layers"]] == ["body.0.weight", "body.2.weight", "head.weight"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--method", "self-compress", "--keep", 0.5), "--method self-compress takes --target"),
        (("--target", "3kB"), "'target' is a setting of the method 'self_compress'"),
        (("--method", "self-compress", "--target", "3kB", "--strength", 1e-6), "exclude each other"),
        (("--method", "self-compress", "--target", "3 bytes"), "unknown unit"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    options: tuple[object, ...], complaint: str, cli: Run, tmp_path: Path
) -> None:
    done = cli("train", *TINY, *options, "--out", tmp_path / "run")
    assert done.exit_code == 2, done.output
    assert complaint in done.stderr
    assert not (tmp_path / "run").exists()


def drawn(look: Look, width: int = 100, height: int = 30) -> str:
    console = Console(file=io.StringIO(), record=True, width=width, height=height)
    console.print(picture(look, "self_compress", 10.0, width, height))
    return console.export_text()


def test_the_board_shows_each_layer_and_the_target() -> None:
    record = {"step": 50, "bytes": 620.0, "price": 2e-5, "tensors": LAYERS}
    text = drawn(Look(2, 4, 50, 100, SCORES, START, record))
    for words in ("epoch 3 of 4", "10 s left", "compressed 0.875", "20 of 24", "3.2", "45.6 %", "0.42 %", "620 bytes"):
        assert words in text, words
    assert "7.8 % of the float file; asked for 500: 1.24 times that" in text
    assert "met" in drawn(Look(2, 4, 50, 100, SCORES, START, {**record, "bytes": 499.0}))


def test_the_board_fits_the_terminal() -> None:
    record = {"step": 50, "bytes": 620.0, "price": 2e-5, "tensors": LAYERS}
    look = Look(2, 4, 50, 100, {}, START, record)
    assert max(map(len, drawn(look, width=80).splitlines())) <= 80
    assert shown({str(n): {"bytes": n} for n in range(9)}, 3) == ["6", "7", "8"]


def test_other_runs_have_a_bar_alone() -> None:
    text = drawn(Look(0, 4, 10, 100, SCORES))
    assert "epoch 1 of 4" in text
    assert "bits" not in text
    assert "bits are learned after" in drawn(Look(0, 4, 10, 100, SCORES, START))


def test_nothing_is_shown_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with board("self_compress") as tell:
        tell(Look(0, 1, 0, 1))
    assert capsys.readouterr() == ("", "")


def test_bars_are_as_long_as_their_share() -> None:
    assert [len(bar(share, 10).rstrip()) for share in (0.0, 0.04, 0.5, 1.0)] == [0, 1, 5, 10]


def test_a_missed_target_is_said() -> None:
    packed = {"coded_bytes": 950, "target_bytes": 900, "fp32_bytes": 8000, "share": 0.119, "packed_bytes": 1500}
    lines = remarks({"arms": {"folded": {"packed": packed, "weights": [1810, 700], "size_bytes": 950}}})
    assert "50 bytes more than asked for" in lines[1]


def test_edits_are_spoken_of_where_there_were_any() -> None:
    arm = {"prepare_seconds": 0.5, "event_seconds": 0.0, "events": []}
    (line, _) = remarks({"arms": {"folded": arm}})
    assert line == "Its training seconds include 0.5 of preparation."
    arm["events"] = [{"accepted": True}]
    assert "0.0 for 1 of 1 proposed edits" in remarks({"arms": {"folded": arm}})[0]
