"""Spectra, curvature, facts and differences: the references are numpy, exact Hessians, and planted facts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from weightfold.errors import DataError, GraphError
from weightfold.weights.curvature import curvature
from weightfold.weights.difference import difference
from weightfold.weights.disguise import disguise
from weightfold.weights.facts import facts
from weightfold.weights.spectra import power_law, spectra, spectrum, square_blocks

from .conftest import Made
from .test_align import mlp


@pytest.mark.parametrize("alpha", [2.0, 3.0, 4.5])
def test_a_planted_power_law_is_found(alpha: float) -> None:
    drawn = (1 - np.random.default_rng(0).random(3000)) ** (-1 / (alpha - 1))
    fit = power_law(drawn)
    assert abs(fit.alpha - alpha) < 5 * fit.error
    assert fit.error == pytest.approx((fit.alpha - 1) / fit.n_tail**0.5)


def test_few_eigenvalues_give_a_wide_error_and_none_give_nan() -> None:
    assert power_law(np.array([1.0, 2.0, 3.0, 5.0, 9.0])).error > 0.2
    assert np.isnan(power_law(np.array([1.0, 2.0])).alpha)
    assert np.isnan(power_law(np.zeros(9)).alpha)


def test_ranks_and_entropy_agree_with_numpy() -> None:
    weight = torch.randn(12, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    found = spectrum("w", weight)
    values = np.linalg.svd(weight.reshape(12, -1).double().numpy(), compute_uv=False) ** 2
    share = values / values.sum()
    assert found.stable_rank == pytest.approx(values.sum() / values.max())
    assert found.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert found.norm == pytest.approx(weight.norm().item())
    assert (found.rows, found.columns) == (12, 27)
    assert spectrum("zero", torch.zeros(4, 4)).stable_rank == 0


def test_square_blocks_take_the_aspect_ratio_out() -> None:
    """Noise of any shape: the spread of its eigenvalues depends on the shape, that of its blocks does not."""
    generator = torch.Generator().manual_seed(0)
    spread, of_blocks = [], []
    for columns in (64, 1024):
        matrix = torch.randn(64, columns, generator=generator).double()
        values = torch.linalg.svdvals(matrix).square() / columns
        spread.append(float(values.max() / values.mean()))
        blocks = torch.cat([torch.linalg.svdvals(b).square() / b.shape[1] for b in square_blocks(matrix)])
        of_blocks.append(float(blocks.max() / blocks.mean()))
    assert spread[0] > 2 * spread[1]
    assert of_blocks[0] == pytest.approx(of_blocks[1], rel=0.2)


def test_small_layers_are_not_skipped() -> None:
    assert [s.name for s in spectra(mlp(0, 6, 16, 16, 3))] == ["0.weight", "2.weight", "4.weight"]


def test_curvature_agrees_with_the_exact_hessian() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    loss = lambda m: m(x).square().mean()  # noqa: E731
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def of_vector(v: torch.Tensor) -> torch.Tensor:
        named, at = {}, 0
        for name, p in model.named_parameters():
            named[name] = v[at : at + p.numel()].reshape(p.shape)
            at += p.numel()
        return torch.func.functional_call(model, named, (x,)).square().mean()

    exact = torch.autograd.functional.hessian(of_vector, flat)
    values = torch.linalg.eigvalsh(exact)
    found = curvature(model, loss, torch.Generator().manual_seed(1), samples=400, tolerance=1e-6, steps=300)
    assert abs(found.trace - float(exact.trace())) < 4 * found.trace_error
    assert found.largest == pytest.approx(float(values[values.abs().argmax()]), rel=1e-2)
    with pytest.raises(DataError, match="not finite"):
        curvature(model, lambda m: m(x).sum() * float("nan"), torch.Generator())


def test_facts_name_silent_unread_and_alike_channels() -> None:
    model = mlp(0, 6, 10, 10, 3)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 3 * model[0].weight[0], 3 * model[0].bias[0]
        model[0].weight[2], model[0].bias[2] = 0, 0
        model[2].weight[:, 4] = 0
    told = facts(model, torch.zeros(1, 6))
    group = next(g for g in told["groups"] if g["name"] == "0")
    assert group["alike"] == [[0, 1]]
    assert set(group["silent"]) == {2, 4}  # what nothing reads is silenced too: its writers have no influence
    assert group["spare"] == 3
    assert any("'0': 3 of 10 channels can go" in line for line in told["advice"])
    assert told["symmetries"]["permutations"] == 20


def test_facts_work_for_every_kind_of_network(made: Made) -> None:
    model, example = made
    told = facts(model, example)
    assert told["hash"].startswith("wf1-")
    assert all(0 <= g["effective"] <= g["channels"] + 1e-6 for g in told["groups"])


def test_a_disguise_moves_nothing_and_a_real_change_is_found(made: Made) -> None:
    model, example = made
    other = disguise(model, example, torch.Generator().manual_seed(1), shift_logits=True)
    hidden = difference(model, other, example)
    assert hidden.moved < 1e-3
    assert hidden.plain > 0.1


def test_the_unit_that_moved_is_named() -> None:
    model = mlp(0, 6, 10, 10, 3)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[2].weight[7] += 0.5
    example = torch.zeros(1, 6)
    other = disguise(changed, example, torch.Generator().manual_seed(3))
    found = difference(model, other, example)
    assert (found.units[0].group, found.units[0].unit) == ("2", 7)
    moved = {layer.name: layer.moved for layer in found.layers}
    assert moved["2.weight"] > 5 * moved["0.weight"]
    with pytest.raises(GraphError, match=r"'0\.weight' has shape"):
        difference(model, mlp(0, 6, 9, 10, 3), example)
