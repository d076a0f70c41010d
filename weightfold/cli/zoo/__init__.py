"""`weightfold zoo`: a store for many models, one verb a file. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import typer

from weightfold.cli.zoo import add, dedupe, get, list_models, pack, rm, search, tree, verify

app = typer.Typer(no_args_is_help=True, help="Keep many models: find them, tell their families, store them cheaply.")
app.command("add")(add.add)
app.command("list")(list_models.list_models)
app.command("search")(search.search)
app.command("dedupe")(dedupe.dedupe)
app.command("tree")(tree.tree)
app.command("pack")(pack.pack)
app.command("get")(get.get)
app.command("rm")(rm.rm)
app.command("verify")(verify.verify)
