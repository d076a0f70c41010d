"""`weightfold zoo dedupe`: which models of a zoo are copies of others."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.zoo.common import Folder


class Level(StrEnum):
    """What counts as a copy, strictest first; `weightfold.zoo.kin.dedupe.LEVELS`."""

    IDENTICAL = "identical"
    PERMUTED = "permuted"
    RESCALED = "rescaled"
    QUANTISED = "quantised"
    NOISY = "noisy"


Loosest = Annotated[
    Level | None, typer.Option("--level", help="Loosest level: to look for, and to remove; without it, noisy to look.")
]
Noise = Annotated[float, typer.Option("--noise", min=0.0, help="Largest relative distance of a noisy copy.")]
Remove = Annotated[
    bool,
    typer.Option(
        "--remove",
        help="Remove copies: identical ones, or up to --level. The first added stays, unless it is a rounded copy.",
    ),
]


@guarded
def dedupe(
    zoo: Folder, level: Loosest = None, noise: Noise = 1e-3, remove: Remove = False, as_json: Json = False
) -> None:
    """Group models that are copies: identical, permuted, rescaled, quantised or noisy; with the evidence."""
    from weightfold.zoo.kin.dedupe import LEVELS
    from weightfold.zoo.kin.dedupe import dedupe as find
    from weightfold.zoo.kin.families import items_of
    from weightfold.zoo.store import Zoo

    loosest = level or (Level.IDENTICAL if remove else Level.NOISY)
    with Zoo.open(zoo, create=False) as opened:
        count = len(opened)
        with show.progress("comparing", quiet=as_json) as update:
            groups = find(items_of(opened), level=loosest.value, noise=noise, progress=update)
        copies = [copy for group in groups for copy in group.copies]
        removed = [name for copy in copies for name in opened.remove(copy.name, unpack=True)] if remove else []
        if removed:
            opened.sweep()
    if as_json:
        counts = {name: sum(copy.level == name for copy in copies) for name in LEVELS}
        show.print_json({"groups": [asdict(g) for g in groups], "counts": counts, "removed": removed})
        return
    rows = [
        [show.plain(g.keeper) if n == 0 else "", show.plain(c.name), c.level, show.plain(c.of), show.plain(c.evidence)]
        for g in groups
        for n, c in enumerate(g.copies)
    ]
    if rows:
        show.table(("kept", "copy", "level", "copy of", "evidence"), rows, gives=4)
    gone = f"; removed {len(removed)}" if remove else ""
    if copies:
        found = f"{show.counted(len(copies), 'copy', 'copies')} of {show.counted(len(groups), 'model')}"
    else:
        found = f"no copies among {show.counted(count, 'model')}"
    show.console().print(f"{found}{gone}; looked for: {', '.join(LEVELS[: LEVELS.index(loosest.value) + 1])}")
