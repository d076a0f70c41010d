"""`weightfold zoo tree`: which models come from which, told from their weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.zoo.common import Folder

if TYPE_CHECKING:
    from weightfold.zoo.kin.tree import Edge, Family

Alone = Annotated[bool, typer.Option("--all", help="Show models without relatives too.")]


@guarded
def tree(zoo: Folder, all_models: Alone = False, as_json: Json = False) -> None:
    """Show families and their trees: parents, direction and confidence, from weights alone."""
    from weightfold.zoo.kin.families import items_of
    from weightfold.zoo.kin.tree import tree as tell
    from weightfold.zoo.store import Zoo

    with Zoo.open(zoo, create=False) as opened:
        declared = {card.name: card.parent for card in opened.cards()}
        with show.progress("comparing", quiet=as_json) as update:
            found = tell(items_of(opened), progress=update)
    if as_json:
        edges = [[{**asdict(e), "declared": declared.get(e.child)} for e in family.edges] for family in found]
        show.print_json({"families": [{"root": f.root, "edges": e} for f, e in zip(found, edges, strict=True)]})
        return
    single = [family for family in found if len(family.names) == 1]
    for family in found:
        if len(family.names) > 1 or all_models:
            _print(family, declared)
    hint = "" if all_models else " (--all lists them)"
    rest = f"; {show.counted(len(single), 'model')} without relatives{hint}" if single else ""
    show.console().print(f"{show.counted(len(found) - len(single), 'family', 'families')}{rest}")


def _print(family: Family, declared: dict[str, str | None]) -> None:
    children: dict[str | None, list[Edge]] = {}
    for edge in family.edges:
        children.setdefault(edge.parent, []).append(edge)
    waiting = [(edge, 0) for edge in reversed(children[None])]
    while waiting:
        edge, depth = waiting.pop()
        line = f"{'   ' * depth}{'└─ ' if depth else ''}{edge.child}"
        if depth or len(family.edges) > 1:
            line += f"   {'root, ' if not depth else ''}confidence {100 * edge.confidence:.0f} %"
        if edge.parent is not None:
            line += f", {100 * edge.distance:.2g} % of the weights away"
        said = declared.get(edge.child)
        if said is not None and edge.parent is not None and said != edge.parent:
            line += f"; declared: {said}"
        if edge.copies:
            line += f"; {'copy' if len(edge.copies) == 1 else 'copies'}: {', '.join(edge.copies)}"
        show.console().print(show.plain(line), highlight=False, soft_wrap=True)
        waiting += [(child, depth + 1) for child in reversed(children.get(edge.child, []))]
