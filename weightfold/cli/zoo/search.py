"""`weightfold zoo search`: models like another one, or of which something holds."""

from __future__ import annotations

from typing import Annotated

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.zoo.common import HASH_DIGITS, Folder, facts_text, plain_card

Like = Annotated[str | None, typer.Option("--like", metavar="MODEL", help="A model of the zoo, or a file of weights.")]
Where = Annotated[
    str | None,
    typer.Option("--where", metavar="CONDITION", help="On cards and facts: accuracy > 0.9 and tags.dataset == mnist"),
]
Classes = Annotated[
    str | None, typer.Option("--classes", metavar="A,B", help="Classes that the facts say the model tells apart.")
]
Most = Annotated[int, typer.Option("-k", min=1, help="Most models to show.")]


@guarded
def search(
    zoo: Folder, like: Like = None, where: Where = None, classes: Classes = None, k: Most = 10, as_json: Json = False
) -> None:
    """Find models: near another one by their weights, by a condition on what is known, by classes."""
    from weightfold.zoo.find import search as searching
    from weightfold.zoo.find.where import absent
    from weightfold.zoo.store import Zoo

    with Zoo.open(zoo, create=False) as opened:
        vector = None if like is None else searching.vector_of(opened, like)
        wanted = [part.strip() for part in (classes or "").split(",") if part.strip()]
        hits = searching.search(opened, like=vector, where=where, classes=wanted, k=k + 1)
        known = [] if hits or where is None else [searching.known(card) for card in opened.cards()]
    near = vector is not None
    if as_json:
        show.print_json({"models": [{**plain_card(hit.card), "distance": hit.distance} for hit in hits[:k]]})
        return
    more, hits = len(hits) > k, hits[:k]
    rows = [
        [
            *(() if hit.distance is None else (f"{hit.distance:.3f}",)),
            show.plain(hit.card.name),
            hit.card.digest[:HASH_DIGITS],
            show.plain(hit.card.architecture or "–"),
            show.plain(facts_text(hit.card.facts)),
        ]
        for hit in hits
    ]
    if rows:
        columns = ("distance",) if near else ()
        at = len(columns)
        heads = (*columns, "model", "digest", "architecture", "facts")
        show.table(heads, rows, right=range(at), spare=(at + 1, at + 2), gives=at + 3, cut=True)
    if more and not near:
        show.console().print(f"the first {k}; there are more: -k {10 * k}")
    if not rows:
        show.console().print("no model was found")
        if where is not None and known and (unknown := absent(where, known)):
            fields = sorted({name for card in known for name in card})
            show.console().print(
                show.plain(f"no card has {', '.join(map(repr, unknown))}; there are: {', '.join(fields)}"),
                soft_wrap=True,
            )
