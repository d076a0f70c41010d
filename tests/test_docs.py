"""The Python blocks of README.md and docs/ run, page by page, top to bottom, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python[^\n]*\n(?P<code>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
SKIP = "<!-- no-run -->"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))


def test_blocks_share_a_namespace_and_marked_ones_are_skipped() -> None:
    run_page(f"```python\nx = 1\n```\ntext\n```python\nassert x == 1\n```\n{SKIP}\n```python\n1 / 0\n```\n", "page.md")


def test_a_failing_block_is_reported_at_its_line_of_the_page() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_page("# Title\n\n```python\n\n1 / 0\n```\n", "page.md")
    place = caught.traceback[-1]
    assert (Path(place.path).name, place.lineno + 1) == ("page.md", 5)


def run_page(text: str, name: str) -> None:
    """Run every block that is not marked, in one namespace, with the page's own line numbers in tracebacks."""
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in BLOCK.finditer(text):
        before = text[: block.start()]
        if before.rstrip().endswith(SKIP):
            continue
        padding = "\n" * (before.count("\n") + 1)
        exec(compile(padding + block["code"], name, "exec"), namespace)
