"""Prune: the controls. Expected numbers: scores computed in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weightfold as wf
from weightfold import models
from weightfold.errors import ConfigError, DataError
from weightfold.graph.apply import apply
from weightfold.graph.observe import Observer
from weightfold.methods.base import Moment
from weightfold.methods.prune import Prune, PruneConfig
from weightfold.models import Classes, ImageInput, TaskSpec
from weightfold.size import macs


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 3),
        ).eval()


def moment_of(model: nn.Module, x: Tensor, step: int = 0, total_steps: int = 0, seed: int = 0) -> Moment:
    graph = wf.trace(model, x[:1])
    with Observer(model, graph, max_samples_per_batch=None) as observer, torch.no_grad():
        model(x)
    return Moment(model, graph, step, total_steps, observer.statistics(), x[:1], torch.Generator().manual_seed(seed))


def kept(score: np.ndarray, n: int) -> list[int]:
    return sorted(np.argsort(score, kind="stable")[len(score) - n :].tolist())


def test_magnitude_keeps_the_largest_filters(net: Any) -> None:
    [first, second] = Prune(keep=0.5).step(moment_of(net, draw(4, 2, 6, 6)))
    filters = net[0].weight.detach().double().numpy().reshape(8, -1)
    bias = net[0].bias.detach().double().numpy()[:, None]
    assert first.edit.kind == "remove"
    assert first.edit.carry.tolist() == kept(np.linalg.norm(np.concatenate([filters, bias], 1), axis=1), 4)
    assert second.edit.n_after == 3


def test_magnitude_can_count_the_scale_of_the_norm(net: Any) -> None:
    with torch.no_grad():
        net[1].weight.copy_(draw(8, seed=5))
        net[1].running_var.copy_(draw(8, seed=6).abs() + 0.1)
    [first, _] = Prune(keep=0.5, norm_scale=True).step(moment_of(net, draw(4, 2, 6, 6)))
    rows = torch.cat([net[0].weight.flatten(1), net[0].bias[:, None]], 1).detach().double().numpy()
    scale = np.abs(net[1].weight.detach().numpy()) / np.sqrt(net[1].running_var.numpy() + 1e-5)
    assert first.edit.carry.tolist() == kept(np.linalg.norm(rows, axis=1) * scale, 4)


def test_wanda_is_weights_times_the_norm_of_what_they_multiply(net: Any) -> None:
    x = draw(20, 2, 6, 6)
    [first, second] = Prune(criterion="wanda", keep=0.5).step(moment_of(net, x))
    with torch.no_grad():
        a, b = net[:3](x).double().numpy(), net[:5](x).double().numpy()
    score = np.abs(net[3].weight.detach().numpy()).sum((0, 2, 3)) * np.sqrt((a**2).mean((0, 2, 3)))
    assert first.edit.carry.tolist() == kept(score, 4)
    columns = np.abs(net[6].weight.detach().numpy()).reshape(3, 6, 4).sum((0, 2))
    assert second.edit.carry.tolist() == kept(columns * np.sqrt((b**2).mean((0, 2, 3))), 3)


def test_random_follows_the_generator(net: Any) -> None:
    x = draw(4, 2, 6, 6)
    one, same, other = (
        [p.edit.carry.tolist() for p in Prune(criterion="random", keep=0.5).step(moment_of(net, x, seed=seed))]
        for seed in (1, 1, 2)
    )
    assert one == same != other


@pytest.mark.parametrize("allocation", ["uniform", "cost"])
def test_a_macs_target_is_met_by_what_is_counted_afterwards(allocation: str) -> None:
    task = TaskSpec(input=ImageInput(channels=3, height=16, width=16), output=Classes(n=4))
    model = models.build("vgg-small", task).eval()
    moment = moment_of(model, draw(2, 3, 16, 16))
    total, graph = macs(model, moment.example), moment.graph
    for proposal in Prune(macs=0.5, allocation=allocation).step(moment):
        graph, _ = apply(model, graph, proposal.edit)
    assert 0.49 <= macs(model, moment.example) / total <= 0.5


def test_the_same_widths_as_another_plan(net: Any) -> None:
    plan = {"0": 5}
    [proposal] = Prune(criterion="random", widths=plan).step(moment_of(net, draw(4, 2, 6, 6)))
    assert (proposal.edit.group, proposal.edit.n_after) == ("0", 5)


def test_less_removes_half_as_many(net: Any) -> None:
    [first, _] = Prune(keep=0.25).step(moment_of(net, draw(4, 2, 6, 6)))
    half = first.less()
    assert half is not None
    assert (first.edit.n_after, half.edit.n_after) == (2, 5)
    assert set(first.edit.carry.tolist()) < set(half.edit.carry.tolist())


def test_it_fires_once_and_only_wanda_needs_statistics(net: Any) -> None:
    method = Prune(at=0.5, keep=0.5)
    x = draw(4, 2, 6, 6)
    assert not any(method.observes(s, 20) for s in range(20))
    wanda = Prune(criterion="wanda", at=0.5, stats_batches=2)
    assert [s for s in range(20) if wanda.observes(s, 20)] == [8, 9]
    assert method.step(moment_of(net, x, 9, 20)) == []
    assert len(method.step(moment_of(net, x, 10, 20))) == 2
    resumed = Prune(at=0.5, keep=0.5)
    resumed.load_state_dict(method.state_dict())
    assert resumed.step(moment_of(net, x, 11, 20)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "magnitud"}, "Did you mean 'magnitude'"),
        ({"allocation": "uniforme"}, "Did you mean 'uniform'"),
        ({"keep": 0}, "keep"),
        ({"macs": 1.2}, "macs"),
        ({"kept": 0.5}, "Did you mean 'keep'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Prune(**settings)


def test_what_does_not_fit_the_network_is_refused(net: Any) -> None:
    moment = moment_of(net, draw(4, 2, 6, 6))
    with pytest.raises(ConfigError, match="cannot keep 9"):
        Prune(widths={"0": 9}).step(moment)
    with pytest.raises(ConfigError, match="name no group 'o'"):
        Prune(widths={"o": 3}).prepare(moment)
    with pytest.raises(ConfigError, match="No group matches 'x'"):
        Prune(groups="x").prepare(moment)
    bare = Moment(net, moment.graph, 0, 0, {}, moment.example, torch.Generator())
    with pytest.raises(DataError, match="which 'wanda' needs"):
        Prune(criterion="wanda").step(bare)
    single = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="can be pruned"):
        Prune().prepare(Moment(single, wf.trace(single, draw(1, 3)), 0, 0, {}, draw(1, 3), torch.Generator()))


def test_the_configuration_survives_json() -> None:
    config = PruneConfig(criterion="wanda", widths={"0": 3})
    assert PruneConfig.from_json(config.to_json()) == config
