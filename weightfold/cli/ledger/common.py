"""What the verbs share: their argument, and one line of words for any entry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Source = Annotated[Path, typer.Argument(metavar="RUN|FILE", help="Folder of a run, or a ledger file.")]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
Maker = Annotated[
    str | None,
    typer.Option("--model", metavar="FUNCTION", help="package.module:function of a network that is not built in."),
]

COLOURS = {"edit": "green", "rollback": "red", "refusal": "red", "undo": "yellow", "watch": "cyan", "freeze": "cyan"}
LONG = 64


def marked(kind: str) -> str:
    """Colour the word for a kind of entry."""
    from weightfold.cli.show import plain

    colour = COLOURS.get(kind)
    return f"[{colour}]{plain(kind)}[/]" if colour else plain(kind)


def signed(value: float | None, form: str = "+.2g") -> str:
    """Write a number with its sign.

    Example:
        >>> signed(-0.0123), signed(None)
        ('−0.012', '–')
    """
    return "–" if value is None else f"{value:{form}}".replace("-", "−")


def summary(kind: str, body: Mapping[str, Any], aside: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Pick what fits on one line out of an entry, of whatever kind and however complete.

    A reason that depends on measured times stands aside; it says more than the one in the body.

    Example:
        >>> summary("watch", {"step": 40, "group": "fc1", "loss": 0.25, "curve": [1, 2]})["remark"]
        'step 40: loss 0.25'
    """
    from weightfold.audit.history import group_of, number

    facts: dict[str, Any] = {
        "group": group_of(body), "channels": "", "predicted": None, "measured": None, "remark": "",
    }  # fmt: skip
    measured = (aside or {}).get("why")
    known = {**body, "why": measured} if kind == "refusal" and isinstance(measured, str) else body
    try:
        found = _KNOWN[kind](known) if kind in _KNOWN else None
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        found = None
    facts |= found if found is not None else {"remark": _remark(body)}
    facts["predicted"], facts["measured"] = number(facts["predicted"]), number(facts["measured"])
    return facts


def _edit(body: Mapping[str, Any]) -> dict[str, Any]:
    edit, price = body["what"]["edit"], body.get("price", {})
    last = price["attempts"][-1] if price.get("attempts") else {}
    return {
        "channels": f"{edit['channels']} → {len(edit['carry'])}",
        "predicted": price.get("predicted"),
        "measured": last.get("mean"),
        "remark": f"{body['method']} at step {body['step']}",
    }


def _rollback(body: Mapping[str, Any]) -> dict[str, Any]:
    last = body["attempts"][-1]
    return {
        "predicted": last.get("predicted"),
        "measured": last.get("mean"),
        "remark": f"step {body['step']}: {last['reason']}",
    }


def _refusal(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"remark": f"step {body['step']}: {str(body['why']).partition(chr(10))[0]}"}


def _prepare(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"remark": f"{len(body['groups'])} groups, {len(body['frozen'])} frozen axes"}


def _run(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"remark": f"seed {body['config']['seed']}" if "config" in body else _remark(body)}


def _convert(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"remark": f"{body['parameters']:,} parameters"}


def _result(body: Mapping[str, Any]) -> dict[str, Any]:
    scores = ", ".join(f"{name} {arm['score']:.4f}" for name, arm in body["arms"].items())
    return {"remark": f"test: {scores}"}


def _undo(body: Mapping[str, Any]) -> dict[str, Any]:
    undoes = body.get("undoes", [])
    which = f"entries {', '.join(map(str, undoes))}" if len(undoes) > 1 else f"entry {undoes[0]}" if undoes else ""
    names = body.get("groups", [])
    group = body.get("group") or (names[0] if len(names) == 1 else f"{len(names)} groups")
    at = f"step {body['step']}: " if "step" in body else ""
    return {"group": group, "remark": f"{at}{' '.join(filter(None, ('takes back', which)))}, {body['how']}"}


def _plan(body: Mapping[str, Any]) -> dict[str, Any]:
    chosen = body["chosen"]
    share, macs = f"{100 * chosen['share']:.0f} %", f"{100 * chosen['macs']:.0f} %"
    remark = (
        f"step {body['step']}: {share} of the channels, {macs} of the MACs, of {len(body['candidates'])} candidates"
    )
    return {"predicted": chosen.get("predicted"), "remark": remark}


def _watch(body: Mapping[str, Any]) -> dict[str, Any]:
    verdict = "back where it was" if body["recovered"] else "still above where it was"
    names = body.get("groups", [])
    group = names[0] if len(names) == 1 else f"{len(names)} groups"
    change = float(body["after"]) - float(body["before"])
    return {"group": group, "measured": change, "remark": f"step {body['step']}: the loss is {verdict}"}


_KNOWN = {
    "plan": _plan,
    "watch": _watch,
    "undo": _undo,
    "edit": _edit,
    "rollback": _rollback,
    "refusal": _refusal,
    "prepare": _prepare,
    "run": _run,
    "convert": _convert,
    "result": _result,
}


def _remark(body: Mapping[str, Any]) -> str:
    """Say the plain facts of an entry that is not known here: its short texts and numbers."""
    step = f"step {body['step']}" if type(body.get("step")) is int else ""
    parts = [
        f"{key} {_short(value)}" for key, value in body.items() if key not in ("step", "group") and _is_short(value)
    ]
    text = ", ".join(parts[:4])
    return f"{step}: {text}" if step and text else step or text


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and 0 < len(value) <= LONG)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    text = str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text[:12]}…" if is_hash else text
