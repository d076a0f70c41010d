"""Regression data of `lumping.py`: four public tables, four generated dynamical systems, and networks trained on them.

    abalone, metro, concrete, energy   UCI; metro is split by time, the others at random by seed
    electrical       RC H-tree of 4 levels, R and C off by up to 1 %, 15 voltages now -> in 2 s
    glycolysis       7 states of the yeast oscillator now -> in 0.1 minutes, from the usual ranges of initial values
    polymerisation   monomer and chains of 8 lengths now -> in 0.05
    reactions        2-site phosphorylation (e2), 18 species now -> in 0.002

Inputs and targets are standardised by the training rows. What the systems stand in for is said in `docs/lumping.md`.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from weightfold.ode.system import PolynomialSystem
from weightfold.ode.systems import GLYCOLYSIS_RANGES, glycolysis, h_tree, phosphorylation, polymerisation

N_GENERATED = 5000
STEPS, BATCH = 4000, 128
NETS = {
    "64-64 tanh": ((64, 64), nn.Tanh),
    "64-64 relu": ((64, 64), nn.ReLU),
    "256 tanh": ((256,), nn.Tanh),
    "128-128-128 relu": ((128, 128, 128), nn.ReLU),
}


@dataclass(frozen=True, eq=False)
class Regression:
    """Standardised rows, float32: inputs (B, I), targets (B, T)."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def standardised(name: str, x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> Regression:
    """Scale by the training rows; columns that do not vary there are dropped."""
    y = y.reshape(len(y), -1)
    x = x[:, x[train].std(0) > 1e-9]
    y = y[:, y[train].std(0) > 1e-9]
    parts = []
    for values in (x, y):
        mean, std = values[train].mean(0), values[train].std(0)
        parts += [torch.tensor((values[rows] - mean) / std, dtype=torch.float32) for rows in (train, test)]
    return Regression(name, parts[0], parts[2], parts[1], parts[3])


def split(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(1000 + seed).permutation(n)
    return order[: int(0.8 * n)], order[int(0.8 * n) :]


def _one_hot(cells: list[str]) -> np.ndarray:
    kinds = sorted(set(cells))
    return np.array([[cell == kind for kind in kinds] for cell in cells], float)


def abalone(folder: Path, seed: int) -> Regression:
    rows = list(csv.reader((folder / "abalone.csv").open()))[1:]
    numbers = np.array([row[1:] for row in rows], float)
    x = np.concatenate([_one_hot([row[0] for row in rows]), numbers[:, :-1]], 1)
    return standardised("abalone", x, numbers[:, -1], *split(len(x), seed))


def metro(folder: Path, seed: int) -> Regression:  # noqa: ARG001
    rows = list(csv.DictReader((folder / "metro.csv").open()))
    times = [datetime.datetime.fromisoformat(row["date_time"]) for row in rows]
    order = np.argsort([t.timestamp() for t in times], kind="stable")
    holidays = {t.date() for t, row in zip(times, rows, strict=True) if row["holiday"] != "None"}
    temperature = np.array([float(row["temp"]) for row in rows])
    temperature[temperature < 100] = np.median(temperature)
    plain = [[min(float(row["rain_1h"]), 60), float(row["snow_1h"]), float(row["clouds_all"])] for row in rows]
    hour = np.array([t.hour for t in times]) * 2 * np.pi / 24
    day = np.array([t.weekday() for t in times])
    year = np.array([t.timetuple().tm_yday for t in times]) * 2 * np.pi / 365.25
    waves = [f(k * hour) for k in (1, 2, 3) for f in (np.sin, np.cos)] + [np.sin(year), np.cos(year)]
    flags = [[t.date() in holidays, t.weekday() >= 5] for t in times]
    weather = _one_hot([row["weather_main"] for row in rows])
    x = np.concatenate([temperature[:, None], plain, np.stack(waves, 1), flags, np.eye(7)[day], weather], 1)
    y = np.array([float(row["traffic_volume"]) for row in rows])
    cut = int(0.8 * len(order))
    return standardised("metro", x, y, order[:cut], order[cut:])


def _blanks(name: str) -> Callable[[Path, int], Regression]:
    def read(folder: Path, seed: int) -> Regression:
        rows = np.loadtxt(folder / f"{name}.txt")
        return standardised(name, rows[:, :8], rows[:, 8], *split(len(rows), seed))

    return read


def _flow(name: str, system: PolynomialSystem, starts: np.ndarray, dt: float, n_states: int, seed: int) -> Regression:
    """State now to state in ``dt``, by fixed fourth-order Runge-Kutta steps on all samples at once."""
    x = starts.copy()
    step = dt / 200
    for _ in range(200):
        k1 = _rhs(system, x)
        k2 = _rhs(system, x + step / 2 * k1)
        k3 = _rhs(system, x + step / 2 * k2)
        k4 = _rhs(system, x + step * k3)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: the integration diverged")
    return standardised(name, starts[:, :n_states], x[:, :n_states], *split(len(x), seed))


def _rhs(system: PolynomialSystem, x_BN: np.ndarray) -> np.ndarray:
    rows, columns, powers = system.entries()
    value = np.tile(system.coefficient_M[:, None], (1, len(x_BN)))
    np.multiply.at(value, rows, x_BN.T[columns] ** powers[:, None])
    out = np.zeros((system.n_variables, len(x_BN)))
    np.add.at(out, system.equation_M, value)
    return out.T


def electrical(folder: Path, seed: int) -> Regression:  # noqa: ARG001
    generator = np.random.default_rng(0)
    system = h_tree(4, spread=0.01, generator=generator)
    return _flow("electrical", system, generator.uniform(0, 2, (N_GENERATED, 15)), 2.0, 15, seed)


def oscillator(folder: Path, seed: int) -> Regression:  # noqa: ARG001
    low, high = np.array(GLYCOLYSIS_RANGES).T
    states = np.random.default_rng(0).uniform(low, high, (N_GENERATED, 7))
    auxiliary = 1 / (1 + (states[:, 5:6] / 0.52) ** 4)
    return _flow("glycolysis", glycolysis(), np.concatenate([states, auxiliary], 1), 0.1, 7, seed)


def polymers(folder: Path, seed: int) -> Regression:  # noqa: ARG001
    generator = np.random.default_rng(0)
    system = polymerisation(8, spread=0.05, generator=generator)
    starts = np.concatenate([generator.uniform(0, 10, (N_GENERATED, 1)), generator.uniform(0, 2, (N_GENERATED, 8))], 1)
    return _flow("polymerisation", system, starts, 0.05, 9, seed)


def reactions(folder: Path, seed: int) -> Regression:  # noqa: ARG001
    system = phosphorylation(2)
    starts = np.random.default_rng(0).uniform(0, 1, (N_GENERATED, 18)) * np.r_[300, 300, np.full(16, 300)]
    return _flow("reactions", system, starts, 0.002, 18, seed)


DATA: dict[str, Callable[[Path, int], Regression]] = {
    "abalone": abalone,
    "metro": metro,
    "concrete": _blanks("concrete"),
    "energy": _blanks("energy"),
    "electrical": electrical,
    "glycolysis": oscillator,
    "polymerisation": polymers,
    "reactions": reactions,
}


def mlp(n_in: int, hidden: tuple[int, ...], n_out: int, activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(n_in, width), activation()]
        n_in = width
    return nn.Sequential(*layers, nn.Linear(n_in, n_out))


def trained(data: Regression, net: str, seed: int, steps: int = STEPS) -> nn.Sequential:
    """Adam with weight decay 1e-4 (decoupled), learning rate 3e-3 falling to 0 by a cosine."""
    torch.manual_seed(seed)
    hidden, activation = NETS[net]
    model = mlp(data.x.shape[1], hidden, data.y.shape[1], activation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data.x), (BATCH,), generator=generator)
        loss = (model(data.x[rows]) - data.y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def r2(model: nn.Module, data: Regression) -> float:
    """Share of variance explained on the test rows, the mean over targets."""
    left = (model(data.test_x) - data.test_y).double().square().mean(0)
    whole = (data.test_y - data.test_y.mean(0)).double().square().mean(0)
    return float((1 - left / whole).mean())
