"""`weightfold zoo rm`: take a model away."""

from __future__ import annotations

from typing import Annotated

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.zoo.common import Folder, Ref, size


@guarded
def rm(
    zoo: Folder,
    model: Ref,
    unpack: Annotated[
        bool, typer.Option("--unpack", help="Store models that are differences to it in full first.")
    ] = False,
    children: Annotated[
        bool, typer.Option("--children", help="Remove models that are differences to it as well.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove a model and free its space; refused while others are stored as differences to it."""
    from weightfold.errors import ConfigError
    from weightfold.zoo.store import Zoo

    if unpack and children:
        raise ConfigError("--unpack keeps the children, --children removes them.", remedy="Choose one.")
    with Zoo.open(zoo, create=False) as opened:
        opened.sweep(wait_s=0.0)  # a full disk needs room for the record of the removal
        gone = opened.remove(model, children=children, unpack=unpack)
        swept = opened.sweep()
    n_bytes = 0 if swept is None else swept.n_bytes
    if as_json:
        show.print_json({"removed": gone, "freed_bytes": n_bytes, "swept": swept is not None})
        return
    names = ", ".join(f"'{show.plain(name)}'" for name in gone)
    later = "; its space is freed by the next 'zoo verify --sweep', others are at work" if swept is None else ""
    show.console().print(f"[green]removed[/]  {names}; {size(n_bytes)} freed{later}", soft_wrap=True)
