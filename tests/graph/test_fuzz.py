"""Random networks: the pieces run, recipes come back, wrong admissions are found and shrunk, a short run is clean."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from weightfold.graph.group import ChannelGraph

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fuzz_check
import fuzz_net
import graph_fuzz
from fuzz_core import ANY, IMAGE, PIECES, SEQUENCE, VECTOR, Pick
from fuzz_net import Recipe, Step
from fuzz_pieces import ACTIVATIONS


def subject(recipe: Recipe) -> fuzz_check.Subject:
    built = fuzz_net.build(recipe)
    return fuzz_check.Subject(built.net, built.args, built.kwargs)


@pytest.mark.parametrize("kind", [VECTOR, SEQUENCE, IMAGE])
def test_every_piece_runs_in_both_modes_and_is_used(kind: str) -> None:
    for name in (n for n, p in PIECES.items() if p.kind in (kind, ANY)):
        for seed in range(2):
            bodies = tuple((Step("mixed", 1), Step("relu", 2)) for _ in range(PIECES[name].bodies))
            recipe = Recipe(kind, 100 + seed, (Step("mixed", 5), Step(name, seed, bodies)))
            outputs = subject(recipe).outputs()
            assert all(bool(torch.isfinite(leaf).all()) for mode in outputs for leaf in mode), (name, seed)


def test_there_are_at_least_eighty_pieces() -> None:
    assert len(PIECES) >= 80


@pytest.mark.parametrize("seed", range(5))
def test_a_recipe_comes_back_from_its_text_and_builds_the_same_network(seed: int) -> None:
    recipe = fuzz_net.draw(seed)
    again = Recipe.read(recipe.text())
    assert again == recipe
    one, two = (fuzz_net.build(r).net.state_dict() for r in (recipe, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_wrong_admission_is_found_and_shrunk_to_the_piece_that_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that takes channels behind a sigmoid for silent, among pieces that have nothing to do with it."""
    with_sizes = graph_fuzz.with_sizes

    def too_generous(net: nn.Module, example: object, graph: ChannelGraph) -> ChannelGraph:
        graph = with_sizes(net, example, graph)
        return graph.with_groups(tuple(replace(group, zero_at_zero=True) for group in graph))

    monkeypatch.setattr(graph_fuzz, "with_sizes", too_generous)
    seed = next(k for k in range(1000) if Pick(k).of(ACTIVATIONS) is nn.Sigmoid)
    sigmoid = Step("activation", seed)
    recipe = Recipe(VECTOR, 1, (Step("relu", 1), Step("residual", 2, ((sigmoid,),)), Step("relu", 6)))
    report = graph_fuzz.study(recipe, prove=False)
    assert report.failure == "silent"
    assert Recipe.read(graph_fuzz.shrunk(report, prove=False)).steps == (sigmoid,)


def test_a_short_run_is_clean() -> None:
    reports = [graph_fuzz.study(fuzz_net.draw(graph_fuzz.seed_of(11, k)), prove=True) for k in range(8)]
    figures = graph_fuzz.summary(reports, 1.0, prove=True)
    assert figures["raw_errors"] == 0, [r.raw for r in reports]
    assert figures["invalid"] == 0, [r.invalid for r in reports]
    assert figures["wrong"] == 0, [r.wrong for r in reports]
    assert figures["checks"] > 20
    assert figures["nets_with_free_groups"] >= 4
