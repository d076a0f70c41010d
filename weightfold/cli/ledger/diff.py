"""`weightfold ledger diff`: how two runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded

SHOWN = 12


@guarded
def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of a run, or a ledger file.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one.")],
    as_json: Json = False,
) -> None:
    """Say where two runs part, and in what they differ. Exit code 0 if they are equal, 1 if not."""
    from weightfold.audit.compare import compare

    facts = compare(first, second)
    if as_json:
        show.print_json(facts)
    else:
        _print(facts, first, second)
    if not facts["equal"]:
        raise typer.Exit(1)


def _print(facts: Mapping[str, Any], first: Path, second: Path) -> None:
    console = show.console()
    if facts["equal"]:
        console.print(f"[green]equal[/]  {facts['entries'][0]} entries, head {facts['heads'][0]}", soft_wrap=True)
        _table("", ("seconds of training", "A", "B"), _seconds(facts))
        return
    console.print(f"[bold]A[/] {show.plain(first)}\n[bold]B[/] {show.plain(second)}", soft_wrap=True)
    for line in (*_parting(facts["parting"]), *_first_decision(facts["decisions"]["first_difference"])):
        console.print(line, soft_wrap=True)
    _table("Settings that differ", ("", "A", "B"), _settings(facts))
    _table("Structure", ("group", "start", "A", "B", "in both", "Jaccard"), _structure(facts), right=(1, 2, 3, 4, 5))
    _table("Decisions", ("", "A", "B"), _decisions(facts), right=(1, 2))
    _table("Results", ("", "A", "B", "B − A"), _results(facts), right=(1, 2, 3))
    _table("Seconds of training", ("", "A", "B"), _seconds(facts), right=(1, 2))


def _table(title: str, columns: tuple[str, ...], rows: list[list[str]], right: tuple[int, ...] = ()) -> None:
    if rows:
        show.table(columns, rows, right=right, title=title)


def _parting(parting: Mapping[str, Any]) -> Iterator[str]:
    from weightfold.audit.compare import shown

    a, b = parting["kinds"]
    if a is None or b is None:
        shorter = "A" if a is None else "B"
        yield f"The chains are the same until {shorter} ends before entry {parting['seq']} ({a or b})."
        return
    at = "" if parting["steps"][0] is None else f", step {parting['steps'][0]}"
    kinds = show.plain(a) if a == b else f"{show.plain(a)} in A, {show.plain(b)} in B"
    before = "They differ from the first entry on" if parting["seq"] == 0 else "The chains part"
    yield f"{before} at entry {parting['seq']} ({kinds}{at}):"
    for path, mine, other in parting["differs"]:
        yield f"  {show.plain(path)}: {show.plain(shown(mine))} | {show.plain(shown(other))}"


def _first_decision(difference: Mapping[str, Any] | None) -> Iterator[str]:
    """The first decision that differs, which settings that differ do not hide."""
    if difference is None:
        yield "Every decision is the same, with the same coefficients."
        return
    words = ["nothing" if row is None else _decided(row) for row in difference["runs"]]
    yield f"Decision {difference['number'] + 1} is the first that differs: {words[0]} | {words[1]}"


def _decided(row: Mapping[str, Any]) -> str:
    size = "" if row["channels"] is None else f" {row['channels'][0]} → {row['channels'][1]}"
    words = [row["kind"], row["group"]] if row["group"] else [row["kind"]]
    at = "" if row["step"] is None else f" at step {row['step']}"
    return f"{show.plain(' '.join(words))}{size}{at} (entry {row['seq']})"


def _settings(facts: Mapping[str, Any]) -> list[list[str]]:
    from weightfold.audit.compare import shown

    rows = [[show.plain(p), show.plain(shown(a, 36)), show.plain(shown(b, 36))] for p, a, b in facts["settings"]]
    more = len(rows) - SHOWN
    return rows if more <= 0 else [*rows[:SHOWN], [f"[dim]and {more} more; see --json[/]", "", ""]]


def _structure(facts: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for row in facts["structure"]:
        start = row["start"][0] if row["start"][0] is not None else row["start"][1]
        widths = ["–" if width is None else str(width) for width in row["widths"]]
        share = "–" if row["jaccard"] is None else f"{row['jaccard']:.2f}"
        colour = "" if row["same"] else "[red]"
        end = "[/]" if colour else ""
        common = "–" if row["common"] is None else str(row["common"])
        rows.append([show.plain(row["group"]), str(start), *widths, common, f"{colour}{share}{end}"])
    return rows


def _decisions(facts: Mapping[str, Any]) -> list[list[str]]:
    a, b = facts["decisions"]["counts"]
    return [[key.replace("_", " "), str(a[key]), str(b[key])] for key in a if a[key] or b[key]]


def _results(facts: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for arm, measured in facts["results"].items():
        for key, (a, b) in measured.items():
            if key == "fingerprint":
                rows.append([f"{arm} weights", *(str(v)[:12] for v in (a, b)), "same" if a == b else "[red]differ[/]"])
                continue
            unit = "count" if key in ("parameters", "macs") else "number"
            form = "+,.0f" if unit == "count" else "+.4f"
            change = "–" if a is None or b is None else f"{b - a:{form}}".replace("-", "−")
            rows.append([f"{arm} {key}", show.quantity(a, unit), show.quantity(b, unit), change])
    return rows


def _seconds(facts: Mapping[str, Any]) -> list[list[str]]:
    return [[arm, *(show.quantity(value, "seconds") for value in both)] for arm, both in facts["seconds"].items()]
