"""The part of a report that says where its numbers come from: settings, machine, versions, ledger."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from weightfold.report.facts import Facts
from weightfold.report.sections import names_of
from weightfold.report.words import ROWS, change, quantity, score_unit, signed


def table(facts: Facts) -> str:
    """The whole comparison as a table."""
    arms, names, results = facts.results["arms"], names_of(facts), facts.results
    both = len(facts.arms) == 2
    head = "".join(f'<th class="n">{names[arm]}</th>' for arm in facts.arms)
    rows = [_score_row(facts, both=both)]
    for key, title, unit in (("loss", "Test loss", "number"), *ROWS):
        if not any(key in arms[arm] for arm in facts.arms):
            continue
        values = [arms[arm].get(key) for arm in facts.arms]
        percent = change(*values) if both else None
        cells = "".join(f'<td class="n">{quantity(value, unit)}</td>' for value in values)
        last = f'<td class="n">{"–" if percent is None else signed(percent)}</td>' if both else ""
        rows.append(f'<tr><th scope="row">{title}</th>{cells}{last}</tr>')
    heading = f"<thead><tr><th></th>{head}{'<th class=n>change</th>' if both else ''}</tr></thead>"
    return (
        '<section><h2>All numbers</h2><p class="note">'
        f"{_timing_note(facts)}</p>"
        '<div class="card scroll" tabindex="0" role="region" aria-label="All numbers">'
        f"<table>{heading}<tbody>{''.join(rows)}</tbody></table></div></section>"
        if results
        else ""
    )


def _score_row(facts: Facts, *, both: bool) -> str:
    results, unit = facts.results, score_unit(facts.results)
    values = [results["arms"][arm]["score"] for arm in facts.arms]
    cells = "".join(f'<td class="n">{quantity(value, unit)}</td>' for value in values)
    last = ""
    if both:
        last = (
            f'<td class="n">{signed(100 * (values[1] - values[0]), "+.2f", " pp" if unit == "share" else " /100")}</td>'
        )
    return f'<tr><th scope="row">Test {results["score"]}</th>{cells}{last}</tr>'


def _timing_note(facts: Facts) -> str:
    folded = facts.results["arms"].get("folded", {})
    text = "Inference: one thread, warm, in turns, median. Bytes: the file, with all that rebuilding the network needs."
    if "prepare_seconds" in folded:
        text += (
            f" Training time of the {names_of(facts)['folded']} network includes {folded['prepare_seconds']:.1f} s of "
            f"preparation (tracing) and {folded['event_seconds']:.1f} s for choosing, cutting and measuring."
        )
    return text


def origin(facts: Facts) -> str:
    """Settings, machine, versions and the ledger's head."""
    run = facts.run
    config = {name: value for name, value in run["config"].items() if value not in (None, {}, "")}
    machine = {**run["machine"], "data fingerprint": run["data"]["fingerprint"][:16]}
    ledger = {
        "entries": facts.entries,
        "head": facts.head,
        "initial weights": run["initial_weights"][:16],
        "final weights": next(iter(reversed(run["results"]["arms"].values())))["fingerprint"][:16],
        "to check it": "weightfold ledger verify FOLDER-OF-THIS-REPORT",
    }
    return (
        "<section><h2>Where this comes from</h2>"
        '<p class="note">The same settings, machine and threads give the same head again. The saved model carries the '
        "head in its metadata, so that entries cut off the ledger are noticed.</p>"
        f'<div class="two">{_list("Ledger", ledger, code=True)}'
        f"{_list('Machine and versions', {**machine, **run['versions']})}{_list('Settings', config)}</div></section>"
    )


def _list(title: str, items: Mapping[str, Any], *, code: bool = False) -> str:
    def text(value: Any) -> str:
        shown = escape(str(value))
        return f"<code>{shown}</code>" if code else shown

    rows = "".join(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{text(value)}</dd>" for name, value in items.items())
    return f'<div class="card"><h3>{title}</h3><dl>{rows}</dl></div>'
