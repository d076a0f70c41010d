"""`weightfold zoo add`: put models into a zoo."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import WRONG, Json, complain, guarded, warn
from weightfold.cli.inputs import Shapes
from weightfold.cli.zoo.common import HASH_DIGITS, Folder, parse_facts, plain_card, size

if TYPE_CHECKING:
    from weightfold.zoo.card import Card

N_SHOWN, N_REASONS = 20, 5


@guarded
def add(
    zoo: Folder,
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL",
            help="Runs, exports, .safetensors, .pt, Hugging Face folders; or folders of such files.",
        ),
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name of the model; of one only.")] = None,
    fact: Annotated[
        list[str] | None, typer.Option("--fact", metavar="KEY=VALUE", help="A fact: accuracy=0.97, data=mnist.")
    ] = None,
    parent: Annotated[str | None, typer.Option("--parent", help="Name of what the models come from.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="SPEC", help="What tensors belong to: built-in name or function.")
    ] = None,
    example: Shapes = None,
    as_json: Json = False,
) -> None:
    """Add models; made if there is no zoo yet. Those that cannot be read are named, the others are added."""
    from weightfold.errors import ConfigError, WeightfoldError
    from weightfold.zoo.exchange.imports import find_models
    from weightfold.zoo.store import Zoo

    refused: list[tuple[str, WeightfoldError]] = []

    def refuse(source: Any, error: WeightfoldError) -> None:
        refused.append((str(source), error))

    found: list[Path] = []
    for path in models:
        try:
            found += find_models(path)
        except WeightfoldError as error:
            if len(models) == 1:
                raise
            refuse(path, error)
    if name is not None and len(found) != 1:
        raise ConfigError(f"--name names one model; there are {len(found)}.", remedy="Leave it out, or add one by one.")
    facts = parse_facts(fact)
    if not found:
        for _, error in refused[:-1]:
            complain(str(error))
        raise refused[-1][1]
    with Zoo.open(zoo) as opened, show.progress("adding", quiet=as_json) as update:
        before = len(opened)
        cards = opened.add_many(
            found,
            names=None if name is None else [name],
            facts=facts,
            parents=[parent] * len(found),
            model=model,
            example=example,
            refused=refuse if len(models) > 1 or len(found) > 1 else None,
            progress=update,
        )
        n_new = len(opened) - before
    if as_json:
        errors = [{"source": source, "error": error.message} for source, error in refused]
        show.print_json({"added": [plain_card(card) for card in cards], "new": n_new, "refused": errors})
    else:
        _print(cards, n_new)
        if n_new < len(cards) and (facts or parent is not None):
            warn("Of models that were there already, facts and parent stay as they were; rm a model to add it anew.")
        for _, error in refused:
            complain(str(error))
    if refused:
        raise typer.Exit(WRONG)


def _print(cards: list[Card], n_new: int) -> None:
    rows = [
        [
            show.plain(card.name),
            card.digest[:HASH_DIGITS],
            show.plain(card.architecture or "–"),
            f"{card.n_parameters:,}",
            size(card.size_bytes),
            "yes" if card.semantic_hash else "[dim]no[/]",
        ]
        for card in cards[:N_SHOWN]
    ]
    if rows:
        show.table(
            ("model", "digest", "architecture", "parameters", "size", "semantic hash"), rows, right=(3, 4), spare=(1,)
        )
    reasons = Counter(card.hash_reason for card in cards if card.hash_reason)
    for reason, count in reasons.most_common(N_REASONS):
        models = show.counted(count, "model")
        show.console().print(f"[yellow]no semantic hash[/]  {models}: {show.plain(reason)}", soft_wrap=True)
    more = f", {len(cards) - N_SHOWN:,} more than shown" if len(cards) > N_SHOWN else ""
    known = len(cards) - n_new
    there = f"; {known:,} {'was' if known == 1 else 'were'} there already" if known > 0 else ""
    show.console().print(f"[green]added[/]  {show.counted(n_new, 'model')}{there}{more}")
