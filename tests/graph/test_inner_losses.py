"""Losses inside the forward: what they compare keeps its order, and nothing else; what they do not reach stays free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "mse": F.mse_loss,
    "summed": lambda a, b: F.mse_loss(a, b, reduction="sum"),
    "unreduced": lambda a, b: F.mse_loss(a, b, reduction="none").mean(1),
    "l1": F.l1_loss,
    "smooth l1": lambda a, b: F.smooth_l1_loss(a, b, beta=0.5),
    "huber": lambda a, b: F.huber_loss(a, b, delta=0.7),
    "kl": lambda a, b: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean"),
    "cross entropy of bits": lambda a, b: F.binary_cross_entropy(a.sigmoid(), b.sigmoid().detach()),
    "of logits, weighted": lambda a, b: F.binary_cross_entropy_with_logits(a, b.sigmoid(), b.abs().detach()),
    "poisson": lambda a, b: F.poisson_nll_loss(a, b.exp()),
    "soft margin": lambda a, b: F.soft_margin_loss(a, b.sign().detach()),
    "ranking": lambda a, b: F.margin_ranking_loss(a, b, torch.ones_like(a)),
    "hinge": lambda a, b: F.hinge_embedding_loss(a - b, torch.ones_like(a)),
    "cosine": lambda a, b: F.cosine_embedding_loss(a, b, torch.ones(len(a)).to(a)),
    "triplet": lambda a, b: F.triplet_margin_loss(a, b, b.flip(0)),
}


class Hint(nn.Module):
    """A student whose hidden channels are drawn towards those of a teacher."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(5, 12), nn.Linear(5, 12)
        self.before, self.out = nn.Linear(5, 5), nn.Linear(12, 3)
        self.loss = loss

    def forward(self, x_BC: Tensor) -> tuple[Tensor, Tensor]:
        x_BC = torch.tanh(self.before(x_BC))
        h_BH = torch.tanh(self.student(x_BC))
        return self.out(h_BH), self.loss(h_BH, self.teacher(x_BC))


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_compares_may_be_permuted_and_no_more(graph_of: Any, name: str) -> None:
    graph = graph_of(Hint(LOSSES[name]), torch.randn(4, 5, dtype=torch.float64))
    group = graph.containing("student.weight", 0)
    assert group is graph.containing("teacher.weight", 0)
    assert group.admits == {"permute"}
    assert graph.containing("before.weight", 0).admits >= {"permute", "remove", "merge"}


TABLES: dict[str, Loss] = {
    "fixed numbers": lambda a, b: F.mse_loss(a, torch.arange(12.0).to(a).expand_as(a)),
    "a broadcast row": lambda a, b: F.l1_loss(a, torch.arange(12.0).to(a)[None].expand_as(a)),
    "classes": lambda a, b: F.cross_entropy(a, torch.arange(len(a))),
    "log likelihoods": lambda a, b: F.nll_loss(a.log_softmax(-1), torch.arange(len(a))),
}


@pytest.mark.parametrize("name", TABLES)
def test_what_is_compared_with_places_keeps_them(graph_of: Any, name: str) -> None:
    graph = graph_of(Hint(TABLES[name]), torch.randn(4, 5, dtype=torch.float64))
    group = graph.containing("student.weight", 0)
    assert group is None or not group.free
    assert graph.containing("teacher.weight", 0) is None or graph.containing("before.weight", 0).free
