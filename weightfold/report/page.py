"""Put a report together and write it beside the run."""

from __future__ import annotations

from html import escape
from pathlib import Path

from weightfold import __version__
from weightfold.artifact import write_bytes
from weightfold.audit.folder import note_written, sealed
from weightfold.report import origin, sections
from weightfold.report.compressed import bits
from weightfold.report.facts import Facts, gather
from weightfold.report.weighed import weighed

NAME = "report.html"
STYLES = tuple(Path(__file__).with_name(name) for name in ("style.css", "timeline.css"))


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a finished run: one file that opens without a network.

    The run's `run.json` says from then on that there is one.

    Args:
        folder: holds `run.json` and `ledger.db`.
    Returns:
        path: of the page.
    Raises:
        ArtifactError: the run is missing, damaged or unfinished, or the page cannot be written.
        LedgerError: the ledger is damaged.
    """
    folder = Path(folder)
    path = folder / NAME
    write_bytes(path, sealed(render(gather(folder)).encode()))
    note_written(folder, NAME)
    return path


def render(facts: Facts) -> str:
    """Give the page as HTML."""
    title = f"{facts.run['config']['model']} on {facts.run['data']['name']}"
    parts = (
        sections.header(facts),
        sections.cards(facts),
        bits(facts),
        sections.curves(facts),
        sections.timeline(facts),
        weighed(facts),
        sections.decisions(facts),
        sections.merges(facts),
        origin.table(facts),
        origin.origin(facts),
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · weightfold</title><style>{_style()}</style></head>"
        f"<body><main>{''.join(parts)}<footer>Written by weightfold {escape(__version__)}.</footer></main></body>"
        "</html>\n"
    )


def _style() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in STYLES)
