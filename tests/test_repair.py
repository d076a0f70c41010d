"""Repair on unlabelled inputs: Gauss-Newton against closed forms, batch norms, jittered inputs."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from weightfold.errors import DataError
from weightfold.repair import distance, gauss_newton_, jittered, output_of, recalibrate_


def test_a_linear_layer_reaches_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    net = nn.Linear(5, 2, dtype=torch.float64)
    gauss_newton_(net, x, y, rounds=8, iterations=30, damping=1e-10, enough=0.0)
    wide = np.concatenate([x.numpy(), np.ones((60, 1))], 1)
    best = np.linalg.lstsq(wide, y.numpy(), rcond=None)[0]
    assert np.allclose(net.weight.detach().numpy(), best[:5].T, atol=1e-6)
    assert np.allclose(net.bias.detach().numpy(), best[5], atol=1e-6)


def test_a_network_finds_back_to_another_of_its_size() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(300, 4)
    wished = output_of(net, x).detach()
    errors = gauss_newton_(moved, x, wished, rounds=10, iterations=40)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[0]
    assert distance(moved, net, [torch.randn(100, 4)])["relative"] < 0.02


def test_masked_weights_stay() -> None:
    net = nn.Linear(4, 3)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]] * 3)
    net.weight.data *= mask
    x = torch.randn(50, 4)
    gauss_newton_(net, x, x @ torch.ones(4, 3), masks={"weight": mask}, rounds=3)
    assert bool((net.weight[:, [1, 3]] == 0).all())
    assert torch.allclose(net.weight[:, [0, 2]], torch.ones(3, 2), atol=0.5)


def test_what_is_good_enough_is_left_alone() -> None:
    net, x = nn.Linear(4, 3), torch.randn(50, 4)
    before = net.weight.clone()
    assert len(gauss_newton_(net, x, output_of(net, x).detach(), enough=1e-6)) == 1
    assert torch.equal(net.weight, before)


def test_outputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        gauss_newton_(nn.Linear(2, 1), torch.full((3, 2), float("nan")), torch.zeros(3, 1))
    with pytest.raises(DataError, match="no inputs"):
        distance(nn.Linear(2, 1), nn.Linear(2, 1), [])


def test_batch_norms_are_measured_anew_and_nothing_else_changes() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    batches = [torch.randn(64, 3) for _ in range(4)]
    assert recalibrate_(net, batches) == 1
    seen = torch.cat([net[0](b) for b in batches])
    assert torch.allclose(net[1].running_mean, seen.mean(0), atol=1e-5)
    assert net[1].momentum == 0.1
    assert not net[1].training
    assert recalibrate_(nn.Linear(3, 3), batches) == 0


def test_a_batch_norm_of_many_processes_is_measured_in_one_alone(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4))
    batch = torch.randn(64, 3)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        assert recalibrate_(net, [batch]) == 1
    finally:
        dist.destroy_process_group()
    assert torch.allclose(net[1].running_mean, net[0](batch).mean(0), atol=1e-5)
    assert type(net[1]) is nn.SyncBatchNorm


def test_batch_norms_are_as_they_were_where_a_batch_does_not_fit() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(RuntimeError):
        recalibrate_(net, [torch.zeros(2, 5)])
    assert (net[1].momentum, net[1].training) == (0.1, False)


def test_jittered_inputs_begin_with_those_given() -> None:
    x = torch.randn(40, 3)
    more = jittered(x, 100, torch.Generator().manual_seed(0))
    assert torch.equal(more[:40], x)
    assert 0 < float((more[40:, None] - x).norm(dim=2).min(1).values.max()) < 1.5
    assert jittered(x, 10, torch.Generator()) is x
