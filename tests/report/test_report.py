"""The report: one page, nothing from elsewhere, every fact of the run on it, readable by machines and people."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from weightfold.errors import ArtifactError, LedgerError
from weightfold.ledger import Ledger
from weightfold.report import write_report
from weightfold.report.facts import gather
from weightfold.report.weighed import _plan
from weightfold.training import TrainConfig, train

from ..training.conftest import TINY

ROOT = Path(__file__).parent.parent.parent
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that tags are closed, and collects text, attributes and headings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, train(TrainConfig(**TINY), out)


@pytest.fixture(scope="module")
def page(run: tuple[Path, dict[str, Any]]) -> str:
    return write_report(run[0]).read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(page: str) -> None:
    parsed = Page(page)
    assert not parsed.open
    assert not [value for _, name, value in parsed.attributes if name in ("src", "href", "action", "xlink:href")]
    assert not re.search(r"https?://|url\(|@import|<script", page)


def test_it_can_be_read_by_a_screen_reader(page: str) -> None:
    parsed = Page(page)
    assert ("html", "lang", "en") in parsed.attributes
    images = [(tag, value) for tag, name, value in parsed.attributes if name == "role" and value == "img"]
    labels = [value for tag, name, value in parsed.attributes if name == "aria-label"]
    assert len(labels) >= len(images) > 4
    assert all(labels)
    assert ("th", "scope", "row") in parsed.attributes


def test_it_says_what_was_measured(page: str, run: tuple[Path, dict[str, Any]]) -> None:
    text, results = Page(page).text, run[1]["results"]
    for arm in results["arms"].values():
        assert f"{arm['parameters']:,}" in text
        assert f"{100 * arm['score']:.2f} %" in text
    assert results["head"] in text
    assert "Training loss over steps" in text
    assert "Training loss over time" in text
    assert "24 → 12" in text
    assert text.count("kept") >= 2


def test_it_says_what_was_folded_into_what(page: str, run: tuple[Path, dict[str, Any]]) -> None:
    with Ledger.open(run[0] / "ledger.db", readonly=True) as ledger:
        edits = [entry.body for entry in ledger.entries(kind="edit")]
    text = Page(page).text
    for body in edits:
        closest = max(body["why"]["dropped"], key=lambda item: abs(item["correlation"]))
        assert f"{closest['channel']} → {closest['partner']}" in text


def test_its_colours_have_contrast() -> None:
    """WCAG 2.1: text at least 4.5:1 against what it stands on; lines and bars at least 3:1."""
    style = (ROOT / "weightfold" / "report" / "style.css").read_text()
    for block in re.findall(r":root \{([^}]*)\}", style):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for name, least in [("ink", 4.5), ("soft", 4.5), ("good", 4.5), ("bad", 4.5), ("dense", 3), ("folded", 3)]:
            for ground in ("page", "card"):
                assert contrast(colours[name], colours[ground]) >= least, (name, ground)


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_it_needs_no_torch(run: tuple[Path, dict[str, Any]]) -> None:
    code = "import sys, weightfold.report as r; r.write_report(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(run[0])], check=True, cwd=ROOT, capture_output=True)
    assert done.stdout.strip() == b"False"


@pytest.mark.parametrize("changes", [{"method": "none"}, {"dense": False}, {"max_increase": 0.0}, {"keep": 1.0}])
def test_every_kind_of_run_has_a_report(changes: dict[str, Any], tmp_path: Path) -> None:
    train(TrainConfig(**{**TINY, "epochs": 2, **changes}), tmp_path / "run")
    text = Page(write_report(tmp_path / "run").read_text(encoding="utf-8")).text
    if changes == {"max_increase": 0.0}:
        assert "taken back" in text or "kept" in text
    if changes == {"keep": 1.0}:
        assert "No edit was proposed" in text


def test_foreign_text_is_shown_as_text(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    facts = json.loads((out / "run.json").read_text())
    facts["data"]["name"] = "<script>alert(1)</script>"
    facts["config"]["model"] = '"><b>bold</b>'
    (out / "run.json").write_text(json.dumps(facts))
    page = write_report(out).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>bold" not in page


def test_what_is_no_finished_run_is_refused(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"run\.json"):
        write_report(tmp_path)
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    (out / "ledger.db").write_bytes(b"nothing")
    with pytest.raises(LedgerError):
        gather(out)
    (out / "run.json").write_text('{"status": "running"}')
    with pytest.raises(ArtifactError, match="not finished"):
        gather(out)


def test_what_a_dial_weighed_is_shown() -> None:
    candidates = [
        {
            "share": share,
            "widths": {},
            "macs": share**2,
            "predicted": 0.01,
            "lost_energy": 0.0,
            "forecast_points": price,
        }
        for share, price in ((0.5, 0.21), (0.75, 0.04))
    ]
    body = {
        "step": 7, "trigger": "the latest step", "why": "<b>", "error_percent": 12.5, "priced_samples": 256,
        "candidates": candidates, "chosen": candidates[0],
    }  # fmt: skip
    page = _plan(body, {"ratio": 0.4})
    assert page.index("75%") < page.index("50%"), "from mild to strong"
    assert "−0.21 points" in page
    assert "40% of the time" in page
    assert page.count("chosen") == 1
    assert "&lt;b&gt;" in page
    assert "12.5 %" in page
