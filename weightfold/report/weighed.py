"""The part of a report that shows what a dial weighed: candidate widths, what each was forecast to cost, the choice."""

from __future__ import annotations

from html import escape
from typing import Any

from weightfold.report.facts import Facts
from weightfold.report.words import small


def weighed(facts: Facts) -> str:
    """Every plan and refusal with its candidates; empty where no dial decided."""
    return "".join(_plan(body, aside) for body, aside in facts.plans)


def _plan(body: dict[str, Any], aside: dict[str, Any]) -> str:
    candidates = sorted(body["candidates"], key=lambda c: -c["macs"])
    chosen = body.get("chosen")
    rows = "".join(_row(candidate, candidate == chosen, aside) for candidate in candidates)
    error = body.get("error_percent")
    now = "" if error is None else f" {error:.1f} % of the probe's answers were wrong then."
    head = (
        '<tr><th class="n">Channels kept</th><th class="n">MACs left</th><th class="n">A step takes</th>'
        '<th class="n">Loss at once, predicted</th><th class="n">Accuracy at the end, forecast</th><th>Choice</th></tr>'
    )
    return (
        f'<section><h2>What was weighed</h2><p class="note">At step {body["step"]} ({escape(body["trigger"])}): '
        f"{escape(str(aside.get('why', body['why'])))}.{now} Predictions come from {body['priced_samples']} samples; "
        "the forecast is fitted to finished runs.</p>"
        '<div class="card scroll" tabindex="0" role="region" aria-label="What was weighed">'
        f"<table><thead>{head}</thead><tbody>{rows}</tbody></table></div></section>"
    )


def _row(candidate: dict[str, Any], chosen: bool, aside: dict[str, Any]) -> str:
    price = candidate.get("forecast_points")
    ratio = aside.get("ratio") if chosen else None
    cells = (
        f"{candidate['share']:.0%}",
        f"{candidate['macs']:.0%}",
        "" if ratio is None else f"{ratio:.0%} of the time",
        small(candidate["predicted"]),
        "" if price is None else f"−{price:.2f} points",
    )
    verdict = '<span class="pill good">chosen</span>' if chosen else ""
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    return f"<tr>{numbers}<td>{verdict}</td></tr>"
