"""Fold. Expected numbers: numpy's least squares on captured activations, and measured outputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weightfold as wf
from weightfold import models
from weightfold.errors import ConfigError, DataError
from weightfold.graph.apply import apply
from weightfold.graph.observe import Observer, gather
from weightfold.methods.base import Moment, Proposal
from weightfold.methods.fold import Fold, FoldConfig
from weightfold.models import Classes, ImageInput, NextToken, TaskSpec, TextInput
from weightfold.size import macs


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(dtype).eval()


def moment_of(model: nn.Module, x: Tensor, step: int = 0, total_steps: int = 0) -> Moment:
    graph = wf.trace(model, x[:2])
    with Observer(model, graph, max_samples_per_batch=None) as observer, torch.no_grad():
        model(x)
    generator = torch.Generator().manual_seed(0)
    return Moment(model, graph, step, total_steps, observer.statistics(), x[:2], generator)


def captured(model: nn.Module, path: str, x: Tensor) -> np.ndarray:
    """What a module reads, as rows of channels."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    value = seen[0] if seen[0].ndim == 2 else seen[0].movedim(1, -1).flatten(0, -2)
    return value.double().numpy()


def applied(moment: Moment, proposals: list[Proposal]) -> None:
    graph = moment.graph
    for proposal in proposals:
        graph, _ = apply(moment.model, graph, proposal.edit)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3))


class Residual(nn.Module):
    """A stream that is written twice and read at three depths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back, self.head = (
            nn.Linear(5, 10),
            nn.Linear(10, 6),
            nn.Linear(6, 10),
            nn.Linear(10, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.back(self.inner(x).tanh()).tanh()
        return self.head(x)


# least squares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "group", "reader"), [(mlp, "0", "2"), (mlp, "2", "4"), (Residual, "inner", "back")])
def test_maps_and_shifts_are_the_least_squares_of_numpy(make: Callable[[], nn.Module], group: str, reader: str) -> None:
    model, x = seeded(make), draw(400, 5)
    a = captured(model, reader, x)
    [proposal] = Fold(keep=0.5, ridge=0.0, groups=group).step(moment_of(model, x))
    keep = proposal.edit.carry.numpy()
    drop = np.setdiff1d(np.arange(a.shape[1]), keep)
    with_one = np.concatenate([a[:, keep], np.ones((len(a), 1))], 1)
    expected = np.linalg.lstsq(with_one, a[:, drop], rcond=None)[0]
    key = (f"{reader}.weight", 1)
    np.testing.assert_allclose(proposal.edit.reads[key][drop].numpy(), expected[:-1].T, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(proposal.edit.shift[key][drop].numpy(), expected[-1], rtol=1e-6, atol=1e-9)
    assert not proposal.edit.shift[key][keep].any()


def test_each_reader_of_a_stream_has_its_own_map() -> None:
    model, x = seeded(Residual), draw(400, 5)
    moment = moment_of(model, x)
    [proposal] = Fold(keep=0.6, ridge=0.0, groups="stem").step(moment)
    keep = proposal.edit.carry.numpy()
    drop = np.setdiff1d(np.arange(10), keep)
    for reader in ("inner", "head"):
        a = captured(model, reader, x)
        a = a - a.mean(0)
        expected = np.linalg.lstsq(a[:, keep], a[:, drop], rcond=None)[0].T
        found = proposal.edit.reads[f"{reader}.weight", 1][drop].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2), nn.Flatten())


@pytest.mark.parametrize(("make", "group", "reader"), [(mlp, "0", "2"), (mlp, "2", "4"), (conv, "0", "3")])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_predicted_error_is_the_measured_one(
    make: Callable[[], nn.Module], group: str, reader: str, ridge: float
) -> None:
    model = seeded(make)
    x = draw(300, 5) if make is mlp else draw(30, 2, 6, 6)
    layer = model.get_submodule(reader)
    moment = moment_of(model, x)
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, out: outputs.append(out.detach()))
    model(x)
    [proposal] = Fold(keep=0.5, ridge=ridge, groups=group).step(moment)
    applied(moment, [proposal])
    model(x)
    before, after = outputs
    if isinstance(layer, nn.Linear):
        energy = (before - before.mean(0)).square().sum()
    else:
        energy = (before - layer.bias.detach()[:, None, None]).square().sum()
    measured = float((after - before).square().sum() / energy)
    assert proposal.predicted == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize(("make", "shape"), [(mlp, (400, 5)), (conv, (40, 2, 8, 8))])
def test_a_fold_in_training_is_balanced_and_computes_the_same(make: Callable[[], nn.Module], shape: Any) -> None:
    x = draw(*shape)
    outputs, norms = [], []
    for balance in (False, True):
        model = seeded(make)
        moment = moment_of(model, x, step=1, total_steps=10)
        method = Fold(keep=0.4, at=0.1, ridge=0.1)
        job = method._jobs(moment, moment.statistics)[0]
        before = gather(model, job.group, ("read",)).norm(dim=1)
        keep = job.kept(job.group.n_channels // 3)
        graph, _ = apply(model, moment.graph, replace(job, balance=balance).edit(keep))
        outputs.append(model(x))
        group = graph[job.group.name]
        norms.append(
            [gather(model, group, (role,)).norm(dim=1) for role in ("write", "pointwise", "read") if group.role(role)]
        )
    assert torch.allclose(*outputs, rtol=1e-9, atol=1e-10)
    growth = norms[0][-1] / before[keep]
    assert torch.allclose(norms[1][-1] / before[keep], growth.sqrt()), "readers grow by the root"
    assert float(growth.max()) > 1


def test_what_may_not_be_rescaled_is_not_balanced() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3)))
    moment = moment_of(model, draw(400, 6), step=1, total_steps=10)
    [proposal] = Fold(keep=0.5, at=0.1).step(moment)
    assert proposal.edit.scale is None
    assert proposal.why["balanced"] is False


def test_a_grouped_convolution_folds_within_its_groups() -> None:
    model, x = seeded(conv), draw(30, 2, 6, 6)
    [proposal] = Fold(keep=0.5, ridge=0.0, groups="0").step(moment_of(model, x))
    full = proposal.edit.B_of(("3.weight", 1)).numpy()
    keep = proposal.edit.carry.numpy()
    crossing = (np.arange(8)[:, None] // 4) != (keep[None, :] // 4)
    assert np.bincount(keep // 4).tolist() == [2, 2]
    np.testing.assert_allclose(full[crossing], 0, atol=1e-12)


# planted duplicates ---------------------------------------------------------------------------------------------------


def planted(dtype: torch.dtype, act: type[nn.Module], factor: float) -> nn.Module:
    """A network whose channels 5 and 9 are multiples of 1 and 4 behind the batch norm."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), act(),
            nn.Conv2d(12, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 10),
        )  # fmt: skip

    model: Any = seeded(make, dtype=dtype)
    with torch.no_grad():
        model[1].running_mean.copy_(0.1 * draw(12, seed=1))
        model[1].running_var.copy_(draw(12, seed=2).abs() + 0.3)
        model[1].bias.copy_(0.2 * draw(12, seed=3))
        for copy, original in ((5, 1), (9, 4)):
            model[0].weight[copy] = model[0].weight[original]
            for tensor, by in (
                (model[1].weight, factor),
                (model[1].bias, factor),
                (model[1].running_mean, 1),
                (model[1].running_var, 1),
            ):
                tensor[copy] = tensor[original] * by
    return model


@pytest.mark.parametrize(
    ("act", "factor"), [(nn.ReLU, 1.0), (nn.ReLU, 0.37), (nn.Identity, -2.5), (nn.Tanh, -1.0), (nn.GELU, 1.0)]
)
@pytest.mark.parametrize(("dtype", "ridge", "limit"), [(torch.float32, 1e-8, 1e-5), (torch.float64, 1e-13, 1e-9)])
def test_planted_duplicates_fold_without_a_trace(
    act: type[nn.Module], factor: float, dtype: torch.dtype, ridge: float, limit: float
) -> None:
    model = planted(dtype, act, factor)
    x = draw(40, 3, 8, 8).to(dtype)
    before = model(x).detach()
    moment = moment_of(model, x)
    [proposal] = Fold(keep=10 / 12, ridge=ridge, groups="0").step(moment)
    dropped = {entry["channel"]: entry for entry in proposal.why["dropped"]}
    assert {frozenset((i, entry["partner"])) for i, entry in dropped.items()} == {frozenset((1, 5)), frozenset((4, 9))}
    for i, entry in dropped.items():
        assert entry["correlation"] == pytest.approx(np.sign(factor), abs=1e-5)
        assert entry["coefficient"] == pytest.approx(factor if i in (5, 9) else 1 / factor, rel=1e-4)
    applied(moment, [proposal])
    assert model.get_submodule("0").weight.shape[0] == 10
    assert float((model(x).detach() - before).abs().max()) <= limit


# when, how much, why --------------------------------------------------------------------------------------------------


def test_statistics_are_taken_just_before_the_event() -> None:
    method = Fold(at=0.25, stats_batches=3)
    assert [s for s in range(40) if method.observes(s, 40)] == [7, 8, 9]
    assert method.observes(0, 0)


def test_the_event_fires_once_and_a_restart_remembers() -> None:
    model, x = seeded(mlp), draw(100, 5)
    method = Fold(at=0.25, keep=0.5)
    assert method.step(moment_of(model, x, 9, 40)) == []
    first = method.step(moment_of(model, x, 10, 40))
    assert [p.edit.n_after for p in first] == [round(p.edit.n_channels / 2 + 0.01) for p in first]
    resumed = Fold(at=0.25, keep=0.5)
    resumed.load_state_dict(method.state_dict())
    assert method.step(moment_of(model, x, 11, 40)) == resumed.step(moment_of(model, x, 11, 40)) == []


def test_less_is_half_the_cut_until_nothing_is_left() -> None:
    [proposal] = Fold(keep=0.4, groups="0").step(moment_of(seeded(mlp), draw(100, 5)))
    widths, predicted = [], []
    current: Proposal | None = proposal
    while current is not None:
        widths.append(current.edit.n_after)
        predicted.append(current.predicted)
        current = current.less()
    assert widths == [5, 9, 11]
    assert predicted == sorted(predicted, reverse=True)


def test_less_stays_on_the_grid() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 2)))
    [proposal] = Fold(keep=0.3, align=8).step(moment_of(model, draw(100, 5)))
    half = proposal.less()
    assert half is not None
    assert (proposal.edit.n_after, half.edit.n_after) == (8, 24)
    assert half.less() is None


def test_the_reasons_name_cost_partner_and_rejected_choices() -> None:
    [proposal] = Fold(keep=0.5, groups="0").step(moment_of(seeded(mlp), draw(100, 5)))
    why = proposal.why
    assert why["value"] == proposal.predicted
    assert len(why["dropped"]) == 6
    kept = proposal.edit.carry.tolist()
    assert all(entry["partner"] in kept and entry["cost"] >= 0 for entry in why["dropped"])
    assert [entry["choice"] for entry in why["rejected"]] == ["magnitude", "random"]
    assert all(entry["value"] >= proposal.predicted * 0.99 for entry in why["rejected"])


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_macs_target_is_met_by_what_is_counted_afterwards(share: float) -> None:
    task = TaskSpec(input=ImageInput(channels=3, height=16, width=16), output=Classes(n=4))
    model = models.build("vgg-small", task).eval()
    x = draw(64, 3, 16, 16).float()
    moment = moment_of(model, x)
    total = macs(model, moment.example)
    applied(moment, Fold(macs=share).step(moment))
    assert share - 0.01 <= macs(model, moment.example) / total <= share


TASKS = (
    TaskSpec(input=ImageInput(channels=3, height=16, width=16), output=Classes(n=4)),
    TaskSpec(input=TextInput(vocab=11, context=16), output=NextToken(vocab=11)),
)
SMALL = {"vgg-small": {"width": 16}, "resnet9": {"width": 8}, "mlp": {"hidden": (48, 32)}, "lenet5": {}}


@pytest.mark.parametrize("name", ["char-gpt", "lenet5", "mlp", "resnet9", "vgg-small", "vit-tiny"])
def test_built_in_networks_fold_in_one_shot_and_still_run(name: str) -> None:
    task = next(task for task in TASKS if name in models.serving(task))
    model = models.build(name, task, **SMALL.get(name, {})).eval()
    x = torch.randint(11, (64, 16)) if task.input.kind == "text" else draw(600, 3, 16, 16).float()
    moment = moment_of(model, x)
    before = model(x[:2]).detach()
    method = Fold(keep=0.75)
    method.prepare(moment)
    proposals = method.step(moment)
    assert proposals
    applied(moment, proposals)
    assert model(x[:2]).shape == before.shape
    assert macs(model, moment.example) < macs(models.build(name, task, **SMALL.get(name, {})), moment.example)


SCRIPT = """
import torch, sys
sys.path[:0] = {paths!r}
from tests_fold import Residual, draw, mlp, moment_of, seeded
from weightfold.methods.fold import Fold
for make in (mlp, Residual):
    for proposal in Fold(keep=0.5).step(moment_of(seeded(make), draw(200, 5))):
        maps = sorted((key, value.sum().item().hex()) for key, value in proposal.edit.reads.items())
        print(proposal.edit.group, proposal.edit.carry.tolist(), maps)
"""


def test_the_same_choice_under_two_hash_seeds(tmp_path: Path) -> None:
    here = Path(__file__)
    (tmp_path / "tests_fold.py").write_text(here.read_text())
    script = SCRIPT.format(paths=[str(tmp_path), str(here.parents[2])])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) == 4


# bad input ------------------------------------------------------------------------------------------------------------


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DataError, match=r"'2.weight' reads 12 channels; 11 samples are too few"):
        Fold().step(moment_of(seeded(mlp), draw(11, 5)))
    assert len(Fold(ridge=0.1).step(moment_of(seeded(mlp), draw(11, 5)))) == 2
    with pytest.raises(DataError, match="2 samples are too few"):
        Fold(ridge=0.1).step(moment_of(seeded(mlp), draw(2, 5)))


def test_no_statistics_are_refused() -> None:
    model, x = seeded(mlp), draw(20, 5)
    moment = Moment(model, wf.trace(model, x), 0, 0, {}, x, torch.Generator())
    with pytest.raises(DataError, match="No group has statistics"):
        Fold().step(moment)


@pytest.mark.parametrize(
    "settings", [{"keep": 0.0}, {"keep": 1.5}, {"macs": 0.0}, {"at": 1.0}, {"ridge": -1.0}, {"stats_batches": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Fold(**settings)


def test_a_misspelt_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'keep'"):
        Fold(kep=0.5)


def test_a_pattern_without_groups_names_the_nearest() -> None:
    moment = moment_of(seeded(Residual), draw(50, 5))
    with pytest.raises(ConfigError, match="Did you mean 'inner'"):
        Fold(groups="iner").prepare(moment)


def test_a_network_without_foldable_groups_is_refused_with_reasons() -> None:
    model = seeded(lambda: nn.Linear(3, 2))
    with pytest.raises(ConfigError, match="No group of this network can be folded: it has none"):
        Fold().prepare(Moment(model, wf.trace(model, draw(2, 3)), 0, 0, {}, draw(2, 3), torch.Generator()))


def test_a_target_below_the_floors_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be met"):
        Fold(macs=0.01, floor=0.5).step(moment_of(seeded(mlp), draw(50, 5)))


def test_no_group_shrinks_to_nothing() -> None:
    proposals = Fold(keep=0.001).step(moment_of(seeded(mlp), draw(50, 5)))
    assert [p.edit.n_after for p in proposals] == [1, 1]
    proposals = Fold(keep=0.001, min_channels=4).step(moment_of(seeded(mlp), draw(50, 5)))
    assert [p.edit.n_after for p in proposals] == [4, 4]


def test_silent_channels_are_dropped_first() -> None:
    model: Any = seeded(mlp)
    with torch.no_grad():
        for i in (3, 8):
            model[0].weight[i] = 0
            model[0].bias[i] = -1
    [proposal] = Fold(keep=10 / 12, groups="0").step(moment_of(model, draw(100, 5)))
    assert sorted(entry["channel"] for entry in proposal.why["dropped"]) == [3, 8]
    assert proposal.predicted == pytest.approx(0, abs=1e-12)


def test_the_configuration_survives_json() -> None:
    config = FoldConfig(macs=0.5, groups="layer*", ridge=1e-3)
    assert FoldConfig.from_json(config.to_json()) == config
