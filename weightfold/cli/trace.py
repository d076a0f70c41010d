"""`weightfold trace`: what of a model is a channel, what may be done with it, and what is frozen and why."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.inputs import Data, Model, Shapes, Weights, open_with_example

EDITS = ("permute", "rescale", "sign", "remove", "merge")
N_FROZEN = 20


@guarded
def trace(
    model: Model,
    example: Shapes = None,
    data: Data = None,
    weights: Weights = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every frozen axis.")] = False,
    unproved: Annotated[bool, typer.Option("--unproved", help="Rules alone: try no edit on the model.")] = False,
    as_json: Json = False,
) -> None:
    """List the channel groups of a model: what changes together, which edits are exact, what is frozen and why."""
    import time

    from weightfold.graph import trace as trace_model
    from weightfold.graph.proof import prepared

    network, inputs = open_with_example(model, example, data, weights)
    start = time.perf_counter()
    traced = trace_model(network, inputs)
    seconds = time.perf_counter() - start
    graph = traced if unproved else prepared(network, inputs, graph=traced)
    facts = collect(graph)
    facts |= {"model": model, "seconds": seconds, "prepare_seconds": time.perf_counter() - start}
    if as_json:
        show.print_json(facts)
    else:
        print_facts(facts, verbose=verbose)


def collect(graph: Any) -> dict[str, Any]:
    """Put a graph into plain data."""
    frozen = [{"tensor": f.tensor, "dim": f.dim, "n": f.n, "reason": f.reason} for f in graph.frozen]
    order = {tensor: at for at, tensor in enumerate(graph.shapes)}
    groups = sorted(graph.summary(), key=lambda group: order[_first(group["axes"])["tensor"]])
    channels = [group for group in groups if group["kind"] == "channels"]
    free = sum(group["channels"] for group in channels if "permute" in group["admits"])
    return {
        "groups": groups,
        "frozen": frozen,
        "proved": str(graph.proved),
        "withdrawn": [{"group": g, "trial": kind, "reason": why} for g, kind, why in graph.proved.withdrawn],
        "totals": {
            "groups": len(groups),
            "channels": sum(group["channels"] for group in channels),
            "free_channels": free,
            "removable_channels": sum(group["channels"] for group in channels if "remove" in group["admits"]),
            "frozen_axes": len(frozen),
        },
    }


def _first(axes: list[dict[str, Any]]) -> dict[str, Any]:
    """The axis that a group is placed by: the first that writes it."""
    return next((axis for axis in axes if axis["role"] != "read"), axes[0])


def print_facts(facts: dict[str, Any], *, verbose: bool) -> None:
    """Print groups, frozen axes and totals."""
    rows = [
        [
            show.plain(shortened(group["name"], 26)),
            group["kind"],
            f"{group['channels']:,}",
            str(group["blocks"]) if group["blocks"] > 1 else "",
            admitted(group["admits"]),
            show.plain(where(group["axes"])),
        ]
        for group in facts["groups"]
    ]
    console = show.console()
    if rows:
        show.table(("group", "kind", "channels", "blocks", "admits", "written → read"), rows, right=(2, 3))
    else:
        console.print("No channel group was found.")
    _print_frozen(facts["frozen"], verbose=verbose)
    totals = facts["totals"]
    console.print(
        f"{totals['groups']} groups, {totals['channels']:,} channels: {totals['free_channels']:,} free to permute, "
        f"{totals['removable_channels']:,} removable; {totals['frozen_axes']} frozen axes. "
        f"Traced in {facts['seconds']:.2f} s."
    )
    console.print(f"{facts['proved'][0].upper()}{facts['proved'][1:]}.")
    for one in facts["withdrawn"]:
        console.print(f"[yellow]withdrawn[/] {show.plain(one['reason'])}")


def _print_frozen(frozen: list[dict[str, Any]], *, verbose: bool) -> None:
    if not frozen:
        return
    shown = frozen if verbose else frozen[:N_FROZEN]
    rows = [[show.plain(f"{f['tensor']}[{f['dim']}]"), f"{f['n']:,}", show.plain(f["reason"])] for f in shown]
    show.table(("frozen axis", "size", "why"), rows, right=(1,))
    if len(shown) < len(frozen):
        reasons = Counter(f["reason"] for f in frozen[len(shown) :])
        show.console().print(
            f"[dim]and {len(frozen) - len(shown)} more, of {len(reasons)} reasons; --verbose lists all[/]"
        )


def admitted(edits: list[str]) -> str:
    """Name the edits that are exact, or the few that are not.

    Example:
        >>> admitted(["merge", "permute", "remove", "rescale"]), admitted(["permute"]), admitted([])
        ('all but sign', 'permute', '[dim]nothing[/]')
    """
    missing = [edit for edit in EDITS if edit not in edits]
    if not missing:
        return "all"
    if len(missing) < len(EDITS) / 2:
        return f"all but {', '.join(missing)}"
    return ", ".join(edits) or "[dim]nothing[/]"


def where(axes: list[dict[str, Any]]) -> str:
    """Say which tensors write a group and which read it.

    Example:
        >>> axes = [{"tensor": "a.weight", "dim": 0, "role": "write"}, {"tensor": "b.weight", "dim": 1, "role": "read"}]
        >>> where(axes)
        'a → b'
    """
    return " → ".join(_few([a for a in axes if a["role"] in roles]) for roles in (("write", "both"), ("read",)))


def _few(axes: list[dict[str, Any]]) -> str:
    """Name the first module of some axes by the end of its path, and count the others."""
    modules = list(dict.fromkeys(axis["tensor"].rpartition(".")[0] or axis["tensor"] for axis in axes))
    if not modules:
        return "–"
    return shortened(modules[0], 20) + (f" +{len(modules) - 1}" if len(modules) > 1 else "")


def shortened(name: str, n: int) -> str:
    """Leave out the beginning of a long path.

    Example:
        >>> shortened("model.layers.0.self_attn.q_proj", 20)
        '…0.self_attn.q_proj'
    """
    parts = name.split(".")
    while len(parts) > 1 and len(".".join(parts)) > n - 1:
        parts.pop(0)
    short = ".".join(parts)
    return short if short == name else f"…{short}"
