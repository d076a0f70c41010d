"""`weightfold ledger explain`: what became of one channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.ledger.common import Source, signed

SHOWN_READERS = 3
SHOWN = 5


@guarded
def explain(
    source: Source,
    layer: Annotated[
        str, typer.Argument(metavar="LAYER", help="Channel group, module, tensor, or axis such as 'conv1.weight[0]'.")
    ],
    channel: Annotated[
        int, typer.Argument(metavar="CHANNEL", help="Its number in the network before any edit, from 0.")
    ],
    as_json: Json = False,
) -> None:
    """Tell what became of a channel: kept or removed, when, why, at what price, into whom, how to go back."""
    from weightfold.audit import explain as find
    from weightfold.audit import read_history
    from weightfold.audit.history import ledger_file
    from weightfold.ledger import Ledger

    history = read_history(source)
    with Ledger.open(ledger_file(source), readonly=True) as ledger:
        facts = find(history, layer, channel, ledger.get_blob)
    if as_json:
        show.print_json(facts)
        return
    console = show.console()
    for line in describe(facts, source):
        console.print(line, soft_wrap=True)


def describe(facts: Mapping[str, Any], source: Path) -> Iterator[str]:
    """Say in lines what `weightfold.audit.explain` has found."""
    name = f"[bold]channel {facts['channel']} of {show.plain(facts.get('group', facts['layer']))}[/]"
    if facts["state"] == "frozen":
        yield f"{name}: [green]kept[/]. No edit may touch {show.plain(facts['axis'])}: {show.plain(facts['reason'])}."
        return
    yield f"{name}: {_state(facts)}"
    yield f"[dim]counted along {show.plain(facts['numbering'])}, as before any edit{_meant(facts)}[/]"
    if facts["removed"]:
        yield from _removal(facts, source)
    elif facts["state"] == "kept":
        yield from _survival(facts)
    yield from _taken(facts["takes"])
    yield from _events(facts)
    yield from _refused(facts)


def _meant(facts: Mapping[str, Any]) -> str:
    axis = facts["axis"]
    return "" if axis in ("", facts["numbering"]) else f"; {show.plain(axis)} belongs to the same group"


def _state(facts: Mapping[str, Any]) -> str:
    if facts["state"] == "kept":
        return f"[green]kept[/], now channel {facts['place_now']} of {facts['channels_now']}"
    if facts["state"] == "lost":
        return "[red]gone[/] with an edit of another group that shares its tensors"
    gone = facts["removed"]
    epoch = "" if gone["epoch"] is None else f", epoch {gone['epoch']}"
    return (
        f"[red]removed[/] by entry {gone['seq']} ({show.plain(gone['method'])}, {show.plain(gone['kind'])}) "
        f"at step {gone['step']}{epoch}"
    )


def _removal(facts: Mapping[str, Any], source: Path) -> Iterator[str]:
    gone = facts["removed"]
    yield ""
    yield from _into(facts, gone)
    yield from _why(gone)
    yield from _plan(gone["plan"])
    yield from _price(gone["price"])
    yield from _gain(gone)
    yield _line("entry", f"{gone['seq']}, hash {gone['hash'][:16]}…, written {_clock(gone['time'])}")
    if gone["undo"]:
        yield _line("way back", f"weightfold ledger undo {source} --seq {gone['seq']}")
        yield _line("", f"[dim]what the edit replaced is stored as {gone['undo'][:16]}…[/]")
    else:
        yield _line("way back", "none: what the edit replaced was not stored")


def _into(facts: Mapping[str, Any], gone: Mapping[str, Any]) -> Iterator[str]:
    partner = gone["partner"]
    if partner:
        text = f"channel {partner['channel']} is most like it"
        if partner["correlation"] is not None:
            text += f": correlation {signed(partner['correlation'], '.3f')}"
        if partner["coefficient"] is not None:
            text += f", alone with coefficient {signed(partner['coefficient'], '.3f')}"
        yield _line("into", text)
    elif not gone["coefficients"]:
        yield _line("into", "nobody: it was removed without a replacement")
    for item in gone["coefficients"][:SHOWN_READERS]:
        shares = "  ".join(f"{p['channel']}: {signed(p['coefficient'], '+.3f')}" for p in item["partners"][:SHOWN])
        rest = item["nonzero"] - len(item["partners"][:SHOWN])
        more = f"  [dim]and {rest} smaller[/]" if rest > 0 else ""
        yield _line("", f"in {show.plain(item['reader'] or 'every reader')} as  {shares}{more}")
    if len(gone["coefficients"]) > SHOWN_READERS:
        yield _line("", f"[dim]and in {len(gone['coefficients']) - SHOWN_READERS} more readers; see --json[/]")
    if len(facts["way"]) > 1:
        steps = " → ".join(f"{hop['into']} (entry {hop['seq']})" for hop in facts["way"])
        yield _line("since then", f"its partner was removed too: {facts['channel']} → {steps}")


def _why(gone: Mapping[str, Any]) -> Iterator[str]:
    why = gone["why"]
    if gone["rank"]:
        cost = "" if gone["cost"] is None else f", cost {gone['cost']:.3g}"
        yield _line("why", f"number {gone['rank']} of {gone['of']} to go{cost}")
    metric = why.get("metric")
    if metric:
        value = why.get("value")
        text = f"{show.plain(metric)}"
        text += f" {value:.3g}" if isinstance(value, int | float) else ""
        text += f" ({show.plain(why['unit'])})" if why.get("unit") else ""
        text += f", threshold {why['threshold']}" if "threshold" in why else ""
        text += f", chosen by {show.plain(why['choice'])}" if why.get("choice") else ""
        yield _line("" if gone["rank"] else "why", text)
    for other in gone["rejected"]:
        if isinstance(other, dict):
            value = other.get("value")
            price = f" {value:.3g}" if isinstance(value, int | float) else ""
            reason = show.plain(other.get("reason", ""))
            yield _line("rejected", f"{show.plain(other.get('choice', '?'))}:{price}{', ' if reason else ''}{reason}")


def _plan(plan: Mapping[str, Any] | None) -> Iterator[str]:
    """One line of the plan that the edit carries out."""
    chosen = plan.get("chosen") if plan else None
    if plan is None or not isinstance(chosen, Mapping):
        return
    text = f"entry {plan['seq']}"
    text += f", {100 * chosen['share']:.0f} % of the channels" if isinstance(chosen.get("share"), float | int) else ""
    points = chosen.get("forecast_points")
    text += f", forecast cost {points:.2g} points of accuracy" if isinstance(points, float | int) else ""
    weighed = plan.get("candidates")
    text += f"; {len(weighed)} candidates weighed" if isinstance(weighed, list) else ""
    text += f"; when: {show.plain(plan['trigger'])}" if plan.get("trigger") else ""
    text += f"; why this: {show.plain(plan['why'])}" if isinstance(plan.get("why"), str) else ""
    yield _line("plan", text)


def _price(price: Mapping[str, Any]) -> Iterator[str]:
    text = "" if price["predicted"] is None else f"predicted {price['predicted']:.3g}"
    if price["measured"] is not None:
        low, high = price["interval"] or (None, None)
        text += f"{', ' if text else ''}measured {signed(price['measured'], '+.3g')} of the loss"
        text += f", 90 % interval {signed(low, '+.3g')} to {signed(high, '+.3g')}" if high is not None else ""
        text += f", limit {price['limit']:g}" if price["limit"] is not None else ""
    yield _line("price", text or "not measured")
    failed = [item for item in price["attempts"] if item.get("reason")]
    for item in failed:
        yield _line("", f"[dim]tried with {item.get('kept', '?')} channels before: {show.plain(item['reason'])}[/]")


def _gain(gone: Mapping[str, Any]) -> Iterator[str]:
    parts = []
    for key, change in gone["gain"].items():
        after = change["after"]
        if not isinstance(after, int | float):
            continue
        before = "" if change["before"] is None else f"{change['before']:,.0f} → "
        parts.append(f"{key.replace('_', ' ')} {before}{after:,.0f}")
    if parts:
        n = len(gone["together_with"])
        of = f"of all {n + 1} edits made at once" if n else "of the whole edit"
        yield _line("gain", f"{', '.join(parts)} [dim]({of})[/]")


def _survival(facts: Mapping[str, Any]) -> Iterator[str]:
    if not facts["events"]:
        yield _line("why", "no edit of its group was accepted")
    for kind, reason in facts["refused"].items():
        yield _line("never", f"{show.plain(kind)}: {show.plain(reason)}")


def _taken(takes: list[Mapping[str, Any]]) -> Iterator[str]:
    near = [item for item in takes if item["nearest"]]
    others = [item for item in takes if not item["nearest"]]
    if not takes:
        return
    yield ""
    for number, item in enumerate(near):
        like = "" if item["correlation"] is None else f", correlation {signed(item['correlation'], '.3f')}"
        share = "" if item["coefficient"] is None else f", coefficient {signed(item['coefficient'], '+.3f')}"
        yield _line("" if number else "took over", f"channel {item['channel']} in entry {item['seq']}{like}{share}")
    if others:
        text = "  ".join(f"{item['channel']}: {signed(item['coefficient'], '+.3f')}" for item in others[: 2 * SHOWN])
        yield _line("and parts of", text)


def _events(facts: Mapping[str, Any]) -> Iterator[str]:
    if not facts["events"]:
        return
    yield ""
    for number, event in enumerate(facts["events"]):
        before, after = event["channels"]
        undone = "" if event["undone_by"] is None else f", [yellow]taken back by entry {event['undone_by']}[/]"
        word = "[green]kept[/]" if event["channel"] == "kept" else "[red]removed[/]"
        text = f"entry {event['seq']}, step {event['step']}: {show.plain(event['kind'])} {before} → {after}, {word}"
        yield _line("" if number else "edits", text + undone)


def _refused(facts: Mapping[str, Any]) -> Iterator[str]:
    for number, event in enumerate(facts["attempts_on_group"]):
        last = event["attempts"][-1] if event["attempts"] else {}
        text = f"entry {event['seq']}, step {event['step']}: {show.plain(last.get('reason', ''))}"
        yield _line("" if number else "taken back", text)


def _clock(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _line(label: str, text: str) -> str:
    return f"  {label:<13}{text}"
