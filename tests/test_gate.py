"""The gate: paired differences with their interval, and a measurement that leaves the model alone."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import weightfold as wf
from weightfold.gate import compare, losses, probing
from weightfold.latency import measure
from weightfold.price import trails


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.plain = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6, momentum=None)
        self.stray = nn.BatchNorm2d(6, track_running_stats=False)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stray(self.plain(F.relu(self.norm(self.conv(x)))))
        return self.head(self.drop(x).mean((2, 3)))


def probe(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)) for _ in range(n)
    ]


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    before, after = [1.0, 2.0, 1.5, 0.7, 1.1], [1.2, 1.9, 1.8, 0.9, 1.0]
    reading = compare(before, after)
    reference = stats.ttest_rel(after, before).confidence_interval(0.90)
    assert reading.lower == pytest.approx(reference.low, abs=1e-12)
    assert reading.upper == pytest.approx(reference.high, abs=1e-12)
    assert reading.mean == pytest.approx(sum(after) / 5 - sum(before) / 5, abs=1e-12)
    assert (reading.n_batches, reading.before, reading.after) == (5, pytest.approx(1.26), pytest.approx(1.36))


def test_equal_losses_and_a_single_batch() -> None:
    reading = compare([1.0, 2.0], [1.0, 2.0])
    assert (reading.mean, reading.lower, reading.upper) == (0, 0, 0)
    reading = compare([1.0], [1.25])
    assert (reading.mean, reading.lower, reading.upper, reading.n_batches) == (0.25, 0.25, 0.25, 1)


def test_a_loss_that_is_not_finite_shows_in_the_bound() -> None:
    assert not compare([1.0, 1.0], [1.0, float("nan")]).upper <= 1e9
    assert not compare([1.0, 1.0], [1.0, float("inf")]).upper <= 1e9


@pytest.mark.parametrize("training", [True, False])
def test_probing_leaves_statistics_modes_and_the_generator_alone(training: bool) -> None:
    model = Net().train(training)
    model.norm.eval()
    model(probe()[0][0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
    modes = {m: m.training for m in model.modules()}
    settings = [(m.momentum, m.track_running_stats) for m in (model.norm, model.plain, model.stray)]
    rng = torch.get_rng_state()
    first = losses(model, probe(), F.cross_entropy)
    assert first == losses(model, probe(), F.cross_entropy)
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == {m: m.training for m in model.modules()}
    assert settings == [(m.momentum, m.track_running_stats) for m in (model.norm, model.plain, model.stray)]
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name
    assert identities == {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}


def test_probing_measures_with_the_statistics_of_the_batch() -> None:
    """Wrong running statistics do not matter; the reference normalises by hand."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4)).double()
    model[0].running_mean.fill_(7.0)  # pyright: ignore
    x, y = probe()[0]
    x = x.double()
    normal = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    with torch.no_grad():
        expected = float(F.cross_entropy(model[2](normal.flatten(1)), y))
    assert losses(model, [(x, y)], F.cross_entropy)[0] == pytest.approx(expected, rel=1e-12)


def test_probing_is_left_in_order_after_an_error() -> None:
    model = Net().train()
    modes = {m: m.training for m in model.modules()}
    tracked = model.norm.num_batches_tracked
    with pytest.raises(RuntimeError), probing(model):
        model(torch.zeros(1, 5, 6, 6))
    assert modes == {m: m.training for m in model.modules()}
    assert model.norm.num_batches_tracked is tracked
    assert (model.norm.momentum, model.plain.momentum) == (0.1, None)


def test_a_probe_may_hold_several_inputs_by_place_or_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.head(F.relu(self.a(x)) * scale)

    torch.manual_seed(0)
    model, x, scale, y = Two(), torch.randn(6, 3), torch.rand(6, 8), torch.arange(6) % 2
    expected = float(F.cross_entropy(model(x, scale), y).detach())
    for inputs in ((x, scale), {"x": x, "scale": scale}):
        assert losses(model, [(inputs, y)], F.cross_entropy) == [pytest.approx(expected)]
        graph = wf.trace(model, inputs)
        assert trails(model, list(graph), [(inputs, y)], F.cross_entropy).n_samples == 6
        assert measure(model, graph, [({}, 1.0)], (inputs, y), F.cross_entropy).rows[0].seconds > 0
