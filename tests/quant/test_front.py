"""The networks kept on the way: which ones, that they run as they are stored, that a restart has them."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from weightfold.fingerprint import fingerprint
from weightfold.quant.codes import CodedModel, coded_model
from weightfold.quant.front import Front


def net(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 3)
    )


def tensors(model: nn.Module) -> CodedModel:
    found = {n: (torch.full((len(p),), -4.0), torch.full((len(p),), 8.0)) for n, p in model.named_parameters()}
    return coded_model(model, {n: found[n] for n in ("0.weight", "4.weight")}, 8)


def test_sizes_stay_spread_and_nothing_that_is_beaten_stays() -> None:
    front, model = Front(3), nn.Linear(2, 1)
    for n_bytes, loss in ((800, 0.1), (400, 0.2), (390, 0.3), (100, 0.9), (500, 0.25), (390, 0.15), (80, float("nan"))):
        front.keep(n_bytes, loss, 0, model, CodedModel({}, {}))
    assert [(p.n_bytes, p.loss) for p in front.points] == [(100, 0.9), (390, 0.15), (800, 0.1)]


def test_lagging_statistics_of_batch_norms_are_estimated_anew_and_are_those_of_the_file() -> None:
    model, front = net(), Front(1)
    x, y = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 2, torch.arange(64) % 3
    with torch.no_grad():
        train_loss = float(F.cross_entropy(model.train()(x), y))
    norm = model[1]
    norm.reset_running_stats()
    front.keep(100, train_loss, 0, model, tensors(model), [x])
    kept = front.points[0]
    assert float(F.cross_entropy(kept.network(x), y).detach()) < train_loss + 0.1
    assert torch.equal(norm.running_mean, torch.zeros(6)), "the network in training is left alone"
    assert np.array_equal(kept.tensors.plain["1.running_mean"], kept.network[1].running_mean.half().numpy())
    assert torch.equal(kept.network[1].running_mean, kept.network[1].running_mean.half().float())
    assert not any(module.training for module in kept.network.modules())


def test_a_restart_has_the_networks_of_before_at_their_own_widths() -> None:
    wide, narrow = net(6), net(4)
    front = Front(2)
    front.keep(300, 0.1, 7, wide, tensors(wide))
    front.keep(200, 0.2, 9, narrow, tensors(narrow))
    stored = io.BytesIO()
    torch.save(front.to_state(narrow), stored)
    stored.seek(0)
    again = Front(2)
    again.load_state(torch.load(stored, weights_only=True), net(4))
    assert [(p.n_bytes, p.loss, p.step) for p in again.points] == [(200, 0.2, 9), (300, 0.1, 7)]
    for before, after in zip(front.points, again.points, strict=True):
        assert fingerprint(before.network) == fingerprint(after.network)
        assert after.network[0].out_channels == before.network[0].out_channels
        assert np.array_equal(before.tensors.coded["4.weight"].codes, after.tensors.coded["4.weight"].codes)
