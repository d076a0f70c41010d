"""Grids of what layers read. References: the definitions, and differences of the network's own loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.compressor import Compressor
from weightfold.methods.self_compress import SelfCompress
from weightfold.quant.activations import Activations, Grid, _Quantise, running
from weightfold.ranks import Ranks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def data(n: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=g)
    return x, (x[:, :3] @ torch.randn(3, 3, generator=g)).argmax(1)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_values_lie_on_the_grid_and_are_the_nearest(bits: int, signed: bool) -> None:
    x = torch.linspace(-3, 3, 601)
    grid = Grid(0.25, bits, signed)
    low, high = grid.limits
    points = 0.25 * torch.arange(low, high + 1)
    found = grid.on(x)
    nearest = (x[:, None] - points).abs().min(1).values
    assert torch.allclose((found - x).abs(), nearest, atol=1e-6)
    exponent, width = torch.tensor(-2.0), torch.tensor(float(bits))
    assert torch.equal(_Quantise.apply(x, exponent, width, signed), found)


def test_gradients_are_those_of_the_definition() -> None:
    x = torch.tensor([-0.2, 0.3, 0.9, 5.0], requires_grad=True)
    exponent, bits = torch.tensor(-1.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    G = torch.tensor([1.0, 2.0, 3.0, 4.0])
    q: Any = _Quantise.apply(x, exponent, bits, False)
    assert q.tolist() == [0.0, 0.5, 1.0, 3.5]
    (q * G).sum().backward()
    assert x.grad is not None
    assert exponent.grad is not None
    assert bits.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 0.0], "what is clipped learns nothing"
    ln2 = torch.log(torch.tensor(2.0))
    expected = ln2 * (1 * 0.2 + 2 * 0.2 + 3 * 0.1 + 4 * 3.5)
    assert torch.allclose(exponent.grad, expected)
    assert bits.grad == 4 * (3.5 - 1.5), "only what a grid of one bit less would clip"


def test_bit_operations_are_counted_against_the_first_network() -> None:
    grids = Activations(net(), {"0": 96.0, "2": 48.0}, [data()[0]])
    bits = {"0": torch.tensor(4.0), "2": torch.tensor(2.0)}
    assert grids.bops(bits).item() == pytest.approx((96 * 4 * 8 + 48 * 2 * 8) / (1024 * 144))
    grids.macs = {"0": 48.0, "2": 24.0}
    assert grids.bops(bits).item() == pytest.approx((48 * 4 * 8 + 24 * 2 * 8) / (1024 * 144))
    grids.release()


def test_pressure_narrows_grids_and_the_scale_of_the_loss_does_not_matter() -> None:
    found = []
    for scale in (1.0, 1024.0):
        model = net()
        grids = Activations(model, {"0": 96.0, "2": 48.0}, [data()[0]])
        bits = {"0": torch.tensor(8.0), "2": torch.tensor(8.0)}
        for _ in range(60):
            (scale * (F.cross_entropy(model(data()[0]), data()[1]) + 10 * grids.bops(bits))).backward()
            grids.learn(Ranks(), scale, 1.0)
        found.append(grids.grids())
        grids.release()
        assert not model[0]._forward_pre_hooks
    assert found[0] == found[1]
    assert all(2 <= grid.bits < 8 for grid in found[0].values())


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    model = net()
    grids = Activations(model, {"0": 96.0, "2": 48.0}, [data()[0]])
    before = grids.state_dict()["grids"]
    (model(data()[0]).sum() * float("nan")).backward()
    grids.learn(Ranks(), 1.0, 1.0)
    assert grids.state_dict()["grids"] == before
    grids.release()


def trained(stop: int | None = None) -> tuple[Any, ...]:
    """A short run with bits of inputs; its parts after a number of steps."""
    x, y = data(256)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    method = SelfCompress(strength=1e-4, activation_strength=50.0, check=0.1, refresh=5)
    compressor = Compressor(model, x[:2], [method], loss=F.cross_entropy, probe=[(x, y)], total_steps=80)
    compressor.prepare(optimizer)
    return x, y, model, optimizer, method, compressor, stop or 80


def steps(run: tuple[Any, ...], start: int, stop: int) -> None:
    x, y, model, optimizer, _, compressor, _ = run
    for k in range(start, stop):
        at = slice(k * 32 % 256, k * 32 % 256 + 32)
        (F.cross_entropy(model(x[at]), y[at]) + compressor.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()


def test_a_run_records_its_operations_and_leaves_a_plain_network() -> None:
    run = trained()
    steps(run, 0, 80)
    x, y, model, _, method, compressor, _ = run
    first, last = method.history[0], method.history[-1]
    assert set(first["inputs"].values()) == {8}
    assert max(last["inputs"].values()) < 8
    macs = {"0": len(model[0].weight) * 6, "2": len(model[0].weight) * 3}
    bits = {name: float(q.bits_R.detach().round().mean()) for name, q in method._learner.quantisers.items()}
    found = sum(n * bits[f"{path}.weight"] * last["inputs"][path] for path, n in macs.items())
    assert last["bops"] == pytest.approx(found / (1024 * 16 * 9), rel=1e-5)
    compressor.convert()
    assert set(method.grids) == {"0", "2"}
    assert not any(module._forward_pre_hooks for module in model.modules())
    floats = model(x)
    with running(model, method.grids):
        rounded = model(x)
    assert not torch.equal(floats, rounded)
    assert float((rounded.argmax(1) == y).float().mean()) > float((floats.argmax(1) == y).float().mean()) - 0.1
    assert torch.equal(model(x), floats)


def test_an_interrupted_run_ends_with_the_same_grids() -> None:
    whole = trained()
    steps(whole, 0, 80)
    whole[5].convert()
    first = trained()
    steps(first, 0, 37)
    kept = copy.deepcopy([first[k].state_dict() for k in (5, 2, 3)])
    second = trained()
    second[5].load_state_dict(kept[0])
    second[2].load_state_dict(kept[1])
    second[3].load_state_dict(kept[2])
    steps(second, 37, 80)
    second[5].convert()
    assert second[4].grids == whole[4].grids
    assert all(torch.equal(a, b) for a, b in zip(second[2].parameters(), whole[2].parameters(), strict=True))


def test_a_loss_that_was_not_finite_once_is_forgotten() -> None:
    """A step that is skipped leaves no gradient behind, which would cost the next step too."""
    run = trained()
    steps(run, 0, 30)
    x, y, model, optimizer, method, compressor, _ = run
    ((F.cross_entropy(model(x), y) + compressor.penalty()) * float("nan")).backward()
    optimizer.zero_grad()
    compressor.step()
    before = method._activations.state_dict()["grids"]
    steps(run, 31, 32)
    assert method._activations.state_dict()["grids"] != before
