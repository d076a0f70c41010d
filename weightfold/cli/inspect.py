"""`weightfold inspect`: what a model's weights say of it."""

from __future__ import annotations

from typing import Any

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.inputs import Data, Model, Shapes, Weights, open_with_example


@guarded
def inspect(
    model: Model,
    example: Shapes = None,
    data: Data = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Tell a model's symmetries, silent and duplicate channels, spectra, and where it would compress."""
    from weightfold.weights.facts import facts

    network, inputs = open_with_example(model, example, data, weights)
    told = {"model": model, **facts(network, inputs)}
    if as_json:
        show.print_json(told)
    else:
        print_facts(told)


def print_facts(told: dict[str, Any]) -> None:
    """Print what `facts` told."""
    console = show.console()
    console.print(f"{told['parameters']:,} parameters")
    counts = ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in told["symmetries"].items() if n)
    console.print(f"symmetries: {counts or 'none'}")
    if told["groups"]:
        rows = [
            [
                show.plain(g["name"]),
                f"{g['channels']:,}",
                *(str(len(g[key]) or "") for key in ("silent", "unread", "faint")),
                str(sum(len(c) for c in g["alike"]) or ""),
                f"{g['effective']:.1f}",
                f"{g['effective'] / g['channels']:.0%}",
            ]
            for g in told["groups"]
        ]
        heads = ("group", "channels", "silent", "unread", "faint", "alike", "effective", "used")
        show.table(heads, rows, right=range(1, 8))
    if told["layers"]:
        rows = [
            [
                show.plain(s["name"]),
                f"{s['shape'][0]}x{s['shape'][1]}",
                f"{s['alpha']:.2f} ± {s['alpha_error']:.2f}",
                f"{s['alpha_blocks']:.2f}",
                f"{s['stable_rank']:.1f}",
                f"{s['effective_rank']:.1f}",
                f"{s['entropy']:.2f}",
                f"{s['norm']:.2f}",
            ]
            for s in told["layers"]
        ]
        heads = ("layer", "shape", "alpha", "of blocks", "stable rank", "effective rank", "entropy", "norm")
        show.table(heads, rows, right=range(1, 8))
    for line in told["advice"]:
        console.print(f"- {show.plain(line)}")
    if not told["advice"]:
        console.print("Nothing is silent, doubled or low in rank: only looking at data can tell what may go.")
    console.print(f"[dim]{told['hash']}[/]", soft_wrap=True)
