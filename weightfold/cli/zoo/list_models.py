"""`weightfold zoo list`: what a zoo holds."""

from __future__ import annotations

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.zoo.common import HASH_DIGITS, Folder, facts_text, plain_card, size


@guarded
def list_models(zoo: Folder, as_json: Json = False) -> None:
    """List the models of a zoo, and what it takes to store them."""
    from weightfold.zoo.store import Zoo

    with Zoo.open(zoo, create=False) as opened:
        cards = opened.cards()
    held = {card.digest: card for card in cards}.values()
    stored, full = sum(card.stored_bytes for card in held), sum(card.size_bytes for card in held)
    if as_json:
        totals = {"contents": len(held), "stored_bytes": stored, "size_bytes": full}
        show.print_json({"models": [plain_card(card) for card in cards], **totals})
        return
    names = {card.digest: card.name for card in reversed(cards)}
    rows = [
        [
            show.plain(card.name),
            card.digest[:HASH_DIGITS],
            show.plain(card.architecture or "–"),
            f"{card.n_parameters:,}",
            "full" if card.base is None else f"{'≈' if card.lossy else ''}{show.plain(names.get(card.base, '?'))}",
            size(card.stored_bytes),
            show.plain(facts_text(card.facts)),
        ]
        for card in cards
    ]
    if rows:
        columns = ("model", "digest", "architecture", "parameters", "stored as", "stored", "facts")
        show.table(columns, rows, right=(3, 5), spare=(1, 2, 3), gives=6, cut=True)
    distinct = f", {len(held):,} of them distinct" if len(held) < len(cards) else ""
    share = f", {100 * stored / full:.0f} % of their tensors' {size(full)}" if full else ""
    show.console().print(f"{show.counted(len(cards), 'model')}{distinct}; {size(stored)} on disk{share}")
