"""The parts of a report's page, each from the facts of the run to HTML."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from weightfold.report.compressed import lead_of_file, packed_of
from weightfold.report.facts import Curve, Decision, Facts
from weightfold.report.svg import Line, interval_plot, line_plot, smooth
from weightfold.report.timeline import picture
from weightfold.report.words import ROWS, change, fewer, quantity, score_unit, signed, small

NAMES = {"prune": "pruned", "self_compress": "compressed"}
"""What a method makes of a network."""
ON_CARDS = ("parameters", "size_bytes", "seconds", "latency_ms_1", "latency_ms_64")


def names_of(facts: Facts) -> dict[str, str]:
    """What the two networks are called in this run."""
    if facts.run["kind"] == "fold":
        return {"dense": "before", "folded": "after"}
    return {"dense": "dense", "folded": NAMES.get(facts.run["config"].get("method", "fold"), "folded")}


def header(facts: Facts) -> str:
    """Title, what was run, and the result in one sentence."""
    config, data = facts.run["config"], facts.run["data"]
    samples = data["samples"]
    how = (
        f"{config['epochs']} epochs, seed {config['seed']}"
        if facts.run["kind"] == "train"
        else f"folded at once by {config['samples']:,} unlabelled inputs, seed {config['seed']}"
    )
    return (
        f'<header><span class="brand">weightfold</span>'
        f"<h1>{escape(str(config['model']))} on {escape(data['name'])}</h1>"
        f"<p>{how} · {samples['train']:,} training, {samples['val']:,} validation, {samples['test']:,} test samples</p>"
        f'<p class="lead">{lead(facts)}</p></header>'
    )


def lead(facts: Facts) -> str:
    """Say what came out, with its uncertainty."""
    arms, results = facts.results["arms"], facts.results
    unit = score_unit(results)
    if len(facts.arms) < 2:
        (only,) = facts.arms
        arm = arms[only]
        if packed_of(facts):
            return f"{lead_of_file(facts)}. Its test {results['score']} is {quantity(arm['score'], unit)}."
        return (
            f"The network reaches a test {results['score']} of {quantity(arm['score'], unit)} "
            f"with {arm['parameters']:,} parameters."
        )
    dense, folded = arms["dense"], arms["folded"]
    gone = fewer(change(dense["parameters"], folded["parameters"]) or 0.0, "fewer", "more")
    parts = [f"The {_adjective(facts)} network has <strong>{gone}</strong> parameters"]
    if packed_of(facts):
        parts = [lead_of_file(facts)]
    time = change(dense.get("seconds"), folded.get("seconds"))
    if time is not None:
        link = "; it" if packed_of(facts) else " and"
        parts.append(
            f"{link} took <strong>{fewer(time, 'less', 'more')}</strong> training time "
            f"({quantity(folded['seconds'], 'seconds')} instead of {quantity(dense['seconds'], 'seconds')})"
        )
    parts.append(
        f". Its test {results['score']} is <strong>{quantity(folded['score'], unit)}</strong> against "
        f"{quantity(dense['score'], unit)}"
    )
    return "".join(parts) + _uncertainty(results["paired"]) + "."


def _adjective(facts: Facts) -> str:
    return "folded" if facts.run["kind"] == "fold" else names_of(facts)["folded"]


def _uncertainty(paired: dict[str, Any] | None) -> str:
    if not paired:
        return ""
    low, high = paired["interval"]
    verdict = "which is within chance" if low <= 0 <= high else "which is more than chance"
    return (
        f": {paired['gained']} of {paired['answers']:,} answers became right and {paired['lost']} wrong, {verdict} "
        f"(95 % interval of the difference {signed(100 * low, '+.2f', '')} to {signed(100 * high, '+.2f', ' pp')}, "
        "one seed)"
    )


def cards(facts: Facts) -> str:
    """The numbers that matter, each network's bar beside the other's."""
    if len(facts.arms) < 2:
        return ""
    arms, names = facts.results["arms"], names_of(facts)
    out = [_score_card(facts, names)]
    for key, title, unit in ROWS:
        before, after = arms["dense"].get(key), arms["folded"].get(key)
        if key == "parameters" and packed_of(facts):
            title, (before, after) = "Weights that are not zero", arms["folded"]["weights"]
        percent = change(before, after)
        if percent is None or key not in ON_CARDS:
            continue
        style = "good" if percent < -0.5 else "bad" if percent > 0.5 else ""
        pair = _pair([(names["dense"], "dense", before, unit), (names["folded"], "folded", after, unit)])
        out.append(_card(title, signed(percent), style, pair))
    return f'<section class="cards" aria-label="Comparison">{"".join(out)}</section>'


def _score_card(facts: Facts, names: dict[str, str]) -> str:
    results, unit = facts.results, score_unit(facts.results)
    before, after = results["arms"]["dense"]["score"], results["arms"]["folded"]["score"]
    paired = results["paired"]
    beyond = paired and not paired["interval"][0] <= 0 <= paired["interval"][1]
    style = ("good" if after > before else "bad") if beyond else ""
    text = signed(100 * (after - before), "+.2f", " pp" if unit == "share" else " /100")
    pair = _pair([(names["dense"], "dense", before, unit), (names["folded"], "folded", after, unit)])
    return _card(f"Test {results['score']}", text, style, pair)


def _card(title: str, big: str, style: str, inner: str) -> str:
    return f'<div class="card"><div class="what">{title}</div><div class="big {style}">{big}</div>{inner}</div>'


def _pair(items: list[tuple[str, str, float, str]]) -> str:
    largest = max(abs(value) for _, _, value, _ in items) or 1
    cells = (
        f'<span>{name}</span>{_track(style, value / largest)}<span class="value">{quantity(value, unit)}</span>'
        for name, style, value, unit in items
    )
    return f'<div class="pair">{"".join(cells)}</div>'


def _track(style: str, share: float) -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<span class="track"><span class="fill {style}" style="display:block;width:{width:.1f}%"></span></span>'


def curves(facts: Facts) -> str:
    """Loss and score of both networks, over steps and over seconds."""
    if not facts.losses:
        return ""
    percent = facts.results["score"] == "accuracy"
    score = f"Validation {facts.results['score']}"
    events = sorted({event["step"] for event in _events(facts) if event["accepted"]})
    times = sorted({round(event["at_seconds"], 2) for event in _events(facts) if event["accepted"]})
    plots = [
        _curve_card("Training loss over steps", facts, facts.losses, "by_step", "steps", events, log=True),
        _curve_card(
            "Training loss over time", facts, facts.losses, "by_seconds", "seconds of training", times, log=True
        ),
        _curve_card(f"{score} over steps", facts, facts.scores, "by_step", "steps", events, percent=percent),
        _curve_card(
            f"{score} over time", facts, facts.scores, "by_seconds", "seconds of training", times, percent=percent
        ),
    ]
    names = names_of(facts)
    legend = "".join(f'<span><span class="key {arm}"></span>{names[arm]}</span>' for arm in facts.arms)
    note = (
        "Both networks start from the same weights and see the same batches, in turns, so that whatever else the "
        "machine does falls on both. Seconds count everything that training needs: batches, tracing, statistics, "
        "surgery, gates. Each dotted line marks an edit."
    )
    if "dense" not in facts.arms or "folded" not in facts.arms:
        note = "Seconds count everything that training needs: batches, tracing, statistics, surgery, gates."
    return (
        f'<section><h2>Training</h2><p class="note">{note}</p><div class="legend">{legend}</div>'
        f'<div class="plots">{"".join(plots)}</div></section>'
    )


def _curve_card(
    title: str,
    facts: Facts,
    found: list[Curve],
    which: str,
    x_label: str,
    marks: list[float],
    *,
    percent: bool = False,
    log: bool = False,
) -> str:
    names = names_of(facts)
    lines = [Line(names[c.arm], c.arm, smooth(getattr(c, which)) if log else getattr(c, which)) for c in found]
    faint = [Line(names[c.arm], c.arm, getattr(c, which)) for c in found] if log else []
    done = "channels cut" if packed_of(facts) else names["folded"]
    words = [(at, done if number == 0 else "") for number, at in enumerate(marks)]
    plot = line_plot(title, lines, x_label=x_label, percent=percent, log=log, faint=faint, marks=words)
    return f'<div class="card"><h3>{title}</h3>{plot}</div>'


def _events(facts: Facts) -> list[dict[str, Any]]:
    return [{"at_seconds": 0.0, **event} for arm in facts.results["arms"].values() for event in arm.get("events", [])]


def timeline(facts: Facts) -> str:
    """Widths of every group over the run, with what was decided, and the loss below."""
    if "folded" not in facts.arms or not facts.timeline.rows:
        return ""
    counted = "decision by decision" if facts.timeline.unit == "decisions" else "over training"
    note = (
        f"Each row is a channel group, {counted}: the filled part is the share of its channels that live, the numbers "
        "count them at the start and at the end. Dotted lines mark the changes of the network."
    )
    later = facts.run.get("since", [])
    if later:
        undone = ", ".join(str(item["seq"]) for entry in later for item in entry["undone"])
        note += f" Undone after the run: entry {undone}. All scores on this page were measured before that."
    return (
        f'<section><h2>Widths over the run</h2><p class="note">{escape(note)}</p><div class="card scroll" tabindex="0" '
        f'role="region" aria-label="Widths over the run"><div class="wide">'
        f"{picture(facts.timeline, names=names_of(facts))}</div></div></section>"
    )


def decisions(facts: Facts) -> str:
    """Every proposed edit: what was predicted, what was measured, what was decided."""
    if "folded" not in facts.arms:
        return ""
    if not facts.decisions:
        return '<section><h2>Decisions</h2><p class="note">No edit was proposed.</p></section>'
    config = facts.run["config"]
    limit = config.get("max_increase")
    rows = "".join(_decision_row(facts, decision, limit) for decision in facts.decisions)
    measured = any(attempt.mean is not None for d in facts.decisions for attempt in d.attempts)
    gate = (
        f"After each edit the loss is measured again on the same {_n_probe(facts)} batches of training samples. The "
        "dot is the mean change, the line its 90 % interval; an edit whose upper end passes the dashed limit of "
        f"{small(limit)} is tried at half the size, then taken back."
        if measured and limit is not None
        else "Edits were not gated: no labels were looked at."
    )
    unit = next((d.unit for d in facts.decisions if d.unit), "")
    predicted = f" Predicted: {escape(unit)}, before anything is changed." if unit else ""
    head = (
        '<tr><th>Step</th><th>Group</th><th class="n">Channels</th><th class="n">Predicted</th>'
        '<th class="n">Measured</th><th>Change of the loss</th><th>Decision</th></tr>'
    )
    return (
        f'<section><h2>Decisions</h2><p class="note">{gate}{predicted}</p><div class="card scroll" tabindex="0" '
        f'role="region" aria-label="Decisions"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
        "</section>"
    )


def _n_probe(facts: Facts) -> int:
    return int(facts.run.get("probe_batches", 8))


def _decision_row(facts: Facts, decision: Decision, limit: float | None) -> str:
    attempt = decision.attempts[-1] if decision.attempts else None
    mean = attempt.mean if attempt else None
    changed = decision.after != decision.before
    channels = f"{decision.before} → {decision.after}" if changed else str(decision.before or "–")
    plot = _interval(facts, decision, limit)
    tries = (
        f" at the {_ordinal(len(decision.attempts))} size" if len(decision.attempts) > 1 and decision.accepted else ""
    )
    if decision.undone is not None:
        verdict = f'<span class="pill bad">undone later</span> <span class="soft">entry {decision.undone}</span>'
    elif decision.accepted:
        verdict = f'<span class="pill good">kept{tries}</span>'
    else:
        verdict = f'<span class="pill bad">taken back</span> <span class="soft">{escape(decision.reason)}</span>'
    return (
        f'<tr><td class="n">{decision.step}</td><th scope="row"><code>{escape(decision.group or "–")}</code></th>'
        f'<td class="n">{channels}</td><td class="n">{small(decision.predicted)}</td>'
        f'<td class="n">{small(mean)}</td><td>{plot}</td><td>{verdict}</td></tr>'
    )


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")


def _interval(facts: Facts, decision: Decision, limit: float | None) -> str:
    attempt = decision.attempts[-1] if decision.attempts else None
    if attempt is None or attempt.mean is None or attempt.upper is None or limit is None:
        return '<span class="soft">not measured</span>'
    every = [a for d in facts.decisions for a in d.attempts if a.mean is not None and a.upper is not None]
    reach = max(limit, *(abs(a.upper or 0) for a in every), *(abs(2 * (a.mean or 0) - (a.upper or 0)) for a in every))
    reach = min(reach, 4 * limit if limit else reach) or 1.0
    low = 2 * attempt.mean - attempt.upper
    title = f"mean {small(attempt.mean)}, interval {small(low)} to {small(attempt.upper)}, limit {small(limit)}"
    return interval_plot(title, low, attempt.mean, attempt.upper, limit, (-reach * 1.05, reach * 1.05))


def merges(facts: Facts) -> str:
    """What was folded into what, and what the other choices would have cost."""
    kept = [decision for decision in facts.decisions if decision.accepted and decision.dropped]
    if not kept:
        return ""
    note = (
        "Every dropped channel is expressed through all kept ones by least squares; shown is the kept channel that is "
        "most like it, with their correlation. Numbers count channels of the network as it was before any edit."
    )
    blocks = "".join(_merge_block(decision, first=number == 0) for number, decision in enumerate(kept))
    return f'<section><h2>What was folded into what</h2><p class="note">{note}</p>{blocks}</section>'


def _merge_block(decision: Decision, *, first: bool) -> str:
    dropped = [item for item in decision.dropped if "partner" in item]
    closest = sorted(dropped, key=lambda item: -abs(item.get("correlation", 0.0)))[:12]
    receivers = Counter(int(item["partner"]) for item in dropped).most_common(8)
    pairs = "".join(
        f"<li>{_original(decision, item['channel'])} → {_original(decision, item['partner'])} "
        f"<small>{signed(item.get('correlation', 0.0), '.2f', '')}</small></li>"
        for item in closest
    )
    takers = "".join(
        f"<li>{_original(decision, channel)} <small>takes {count}</small></li>" for channel, count in receivers
    )
    n_gone = decision.before - decision.after
    return (
        f"<details{' open' if first else ''}><summary><strong><code>{escape(decision.group)}</code></strong>"
        f"<span>{n_gone} of {decision.before} channels folded</span>"
        f'<span class="soft">step {decision.step}, entry {decision.seq}, <code>{decision.hash[:12]}</code></span>'
        f"</summary>"
        f'<div class="merges"><div><h3>Closest pairs</h3><ul class="chips">{pairs or "<li>–</li>"}</ul></div>'
        f'<div><h3>Kept channels that take over most</h3><ul class="chips">{takers or "<li>–</li>"}</ul></div>'
        f"<div><h3>Predicted price of the choice</h3>{_alternatives(decision)}</div></div></details>"
    )


def _original(decision: Decision, channel: int) -> int:
    return decision.original[channel] if channel < len(decision.original) else channel


def _alternatives(decision: Decision) -> str:
    prices = [("chosen", decision.predicted)]
    prices += [(f"{item['choice']} instead", item.get("value")) for item in decision.rejected if "choice" in item]
    known = [(name, value) for name, value in prices if isinstance(value, int | float)]
    if not known:
        return '<p class="none">Not priced.</p>'
    largest = max(value for _, value in known) or 1.0
    cells = "".join(
        f"<span>{escape(name)}</span>{_track('folded' if name == 'chosen' else 'dense', value / largest)}"
        f'<span class="value">{small(value)}</span>'
        for name, value in known
    )
    return f'<div class="pair" style="margin-top:0">{cells}</div>'
