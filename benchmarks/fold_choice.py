"""Whom to keep by single samples: channels go in the order in which dropping them costs the probe least.

`weightfold.price` predicts the change of the loss from u_i, one number a sample. Here the same number decides: with P
the activations times the inverse second moment, dropping channel j leaves the residual P_j / (C⁻¹)_jj; with g_j the
gradient there, that of all that was folded into j so far included,

    price_j = E_i[-u_i - u_ij] + ½ E_i[(u_i + u_ij)²],    u_ij = Σ_positions of i  g_j P_j / (C⁻¹)_jj.

An arm of `fold_variants.py`. Cost: O(R C) a dropped channel for R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from weightfold.folding import Job
from weightfold.graph.observe import SecondMoment
from weightfold.methods.base import Key, Moment
from weightfold.methods.fold import Fold
from weightfold.price import Trails, trails
from weightfold.redundancy import Path, Reader


class BySamples(Fold):
    """`Fold` with the choice made by single samples.

    Args:
        slope: whether the first-order term counts.
    """

    name = "fold"

    def __init__(self, slope: bool, **settings: object) -> None:
        super().__init__(**settings)
        self.slope = slope

    def _jobs(self, moment: Moment, statistics: Mapping[Key, SecondMoment]) -> list[Job]:
        jobs = super()._jobs(moment, statistics)
        assert moment.loss is not None
        found = trails(moment.model, [job.group for job in jobs], moment.probe, moment.loss)
        return [replace(j, path=order(j.group.name, j.readers, found, j.ridge, self.slope)) for j in jobs]


def order(group: str, readers: Sequence[Reader], found: Trails, ridge: float, slope: bool) -> Path:
    """The order in which a group's channels go, down to one."""
    states = [_State(reader, found, group, ridge) for reader in readers]
    n = len(readers[0].second_CC)
    left, taken = torch.ones(n, dtype=torch.bool), torch.zeros(found.n_samples, 1)
    order, cost = [], [0.0]
    for _ in range(n - 1):
        u_SC = taken + sum(state.prices(found.n_samples) for state in states)
        price_C = u_SC.square().mean(0) / 2 - (u_SC.mean(0) if slope else 0.0)
        j = int(torch.where(left, price_C, torch.inf).argmin())
        order.append(j)
        cost.append(max(cost[-1], float(price_C[j])))
        taken, left[j] = u_SC[:, j : j + 1].clone(), False
        for state in states:
            state.drop(j)
    return Path(np.array(order, np.int64), np.array(cost))


class _State:
    """One reader's rows while channels are dropped."""

    def __init__(self, reader: Reader, found: Trails, group: str, ridge: float) -> None:
        trail = found.by_reader[group, reader.key]
        n = len(reader.second_CC)
        inverse = np.linalg.inv(reader.second_CC + reader.ridge(max(ridge, 1e-10)) * np.eye(n))
        read_RC = trail.read_RC if reader.mean_C is None else trail.read_RC - torch.from_numpy(reader.mean_C).float()
        self.inverse_CC = torch.from_numpy(inverse)
        self.rest_RC = read_RC @ self.inverse_CC.float()
        self.gradient_RC = trail.gradient_RC.clone()
        self.sample_R = trail.sample_R

    def prices(self, n_samples: int) -> Tensor:
        """u of each channel, shape (S, C)."""
        rows_RC = self.gradient_RC * self.rest_RC
        sums_SC = torch.zeros(n_samples, rows_RC.shape[1]).index_add_(0, self.sample_R, rows_RC)
        return sums_SC / self.inverse_CC.diagonal().float().clamp_min(1e-30)

    def drop(self, j: int) -> None:
        row_C = self.inverse_CC[j].clone()
        through_C = row_C / row_C[j]
        passed_C = -through_C.float()
        passed_C[j] = 0.0
        self.gradient_RC.addr_(self.gradient_RC[:, j].clone(), passed_C)
        self.rest_RC.addr_(self.rest_RC[:, j].clone(), through_C.float(), alpha=-1)
        self.inverse_CC.addr_(through_C, row_C, alpha=-1)
        self.inverse_CC[j] = self.inverse_CC[:, j] = 0.0
        self.inverse_CC[j, j] = 1.0
        self.gradient_RC[:, j] = 0.0
