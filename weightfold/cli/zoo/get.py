"""`weightfold zoo get`: take a model out of a zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.zoo.common import Folder, Ref, plain_card


@guarded
def get(
    zoo: Folder,
    model: Ref,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .safetensors file, which is written over, or a folder.")
    ],
    as_json: Json = False,
) -> None:
    """Write a model as safetensors, verified, with what is needed to load it."""
    from weightfold.zoo.store import Zoo

    with Zoo.open(zoo, create=False) as opened:
        file = opened.get(model, out)
        card = opened.card(model)
    if as_json:
        show.print_json({"file": str(file), **plain_card(card)})
        return
    how = "as it was packed, with a loss" if card.lossy else "every tensor bit for bit as it was added"
    show.console().print(f"[green]wrote[/]  {show.plain(file)}: '{show.plain(card.name)}', {how}", soft_wrap=True)
