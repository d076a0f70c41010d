"""Equal channels, up to the ratios that the network lets through: what is found, and the bound on what it changes."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from torch import Tensor, nn

from weightfold.bounds import lumped_bound, output_bound
from weightfold.errors import ConfigError, DataError
from weightfold.graph.apply import apply
from weightfold.graph.trace import trace
from weightfold.lumping import MAX_CHANNELS, Rows, cluster, condensed, equal_rows, lumped, rows_of

SEEDS = st.integers(0, 10_000)


def mlp(act: type[nn.Module], seed: int = 0, widths: tuple[int, ...] = (4, 12, 10, 3)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o, dtype=torch.float64), act()]
    return nn.Sequential(*layers[:-1])


def lumped_network(net: nn.Module, example: Tensor, eps: float) -> tuple[nn.Module, list]:
    graph, small, edits = trace(net, example), copy.deepcopy(net), []
    now = graph
    for group in graph:
        found = lumped(small, now[group.name], eps)
        if found is not None:
            edits.append(found.edit(now[group.name]))
            now, _ = apply(small, now, edits[-1])
    return small, edits


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


@given(SEEDS, st.sampled_from([nn.ReLU, nn.LeakyReLU]), st.floats(0.01, 50))
@settings(max_examples=30, deadline=None)
def test_a_rescaled_copy_behind_relu_is_merged_exactly(seed: int, act: type[nn.Module], ratio: float) -> None:
    net = mlp(act, seed)
    for layer in (net[0], net[2]):
        layer.weight.data[5], layer.bias.data[5] = ratio * layer.weight.data[1], ratio * layer.bias.data[1]
    small, edits = lumped_network(net, torch.zeros(1, 4).double(), 0.0)
    x = torch.randn(50, 4).double()
    assert [e.n_after for e in edits] == [11, 9]
    assert (outputs(net, x) - outputs(small, x)).abs().max() <= 1e-12 * max(1.0, ratio)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_a_flipped_copy_behind_tanh_is_merged_exactly(seed: int) -> None:
    net = mlp(nn.Tanh, seed)
    net[0].weight.data[5], net[0].bias.data[5] = -net[0].weight.data[1], -net[0].bias.data[1]
    net[2].weight.data[7], net[2].bias.data[7] = net[2].weight.data[2], net[2].bias.data[2]
    small, edits = lumped_network(net, torch.zeros(1, 4).double(), 0.0)
    x = torch.randn(50, 4).double()
    assert [e.n_after for e in edits] == [11, 9]
    assert (outputs(net, x) - outputs(small, x)).abs().max() <= 1e-12


@pytest.mark.parametrize("act", [nn.GELU, nn.Sigmoid, nn.SiLU])
def test_no_ratio_is_free_behind_other_activations(act: type[nn.Module]) -> None:
    net = mlp(act)
    net[0].weight.data[5], net[0].bias.data[5] = 2 * net[0].weight.data[1], 2 * net[0].bias.data[1]
    net[0].weight.data[6], net[0].bias.data[6] = -net[0].weight.data[2], -net[0].bias.data[2]
    assert lumped_network(net, torch.zeros(1, 4).double(), 0.0)[1] == []


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.GELU])
def test_unread_channels_go_and_random_ones_stay(act: type[nn.Module]) -> None:
    net = mlp(act)
    assert lumped_network(net, torch.zeros(1, 4).double(), 0.0)[1] == []
    net[2].weight.data[:, 3] = 0
    small, edits = lumped_network(net, torch.zeros(1, 4).double(), 0.0)
    x = torch.randn(20, 4).double()
    assert [e.n_after for e in edits] == [11]
    assert torch.allclose(outputs(net, x), outputs(small, x), atol=1e-13)


@given(SEEDS, st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU]), st.sampled_from([0.3, 0.8, 1.2]))
@settings(max_examples=25, deadline=None)
def test_the_bound_holds_for_every_input_in_the_box(seed: int, act: type[nn.Module], eps: float) -> None:
    net = mlp(act, seed)
    example = torch.zeros(1, 4).double()
    small, edits = lumped_network(net, example, eps)
    bound = lumped_bound(net, trace(net, example), edits, example, (-1.0, 1.0))
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(500, 4, generator=generator, dtype=torch.float64) * 2 - 1
    x = torch.cat([x, x.sign()])
    assert (outputs(net, x) - outputs(small, x)).abs().max() <= bound + 1e-12
    assert bound > 0 or not edits


def test_the_bound_of_one_layer_is_attained() -> None:
    """Linear units: the worst corner of the box is known in closed form."""
    net = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64))
    other = copy.deepcopy(net)
    other[0].weight.data += torch.tensor([[0.5, -0.25, 0.0], [0.0, 0.0, 0.1]]).double()
    assert output_bound(net, other, torch.zeros(1, 3).double(), (-2.0, 2.0)) == pytest.approx(1.5)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.outer = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.head(nn.functional.max_pool2d(x, 2).mean((2, 3)))


def test_the_bound_goes_through_convolutions_norms_pools_and_sums() -> None:
    torch.manual_seed(0)
    net = Residual().double().eval()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    example = torch.zeros(1, 2, 6, 6).double()
    small, edits = lumped_network(net, example, 1.0)
    assert edits
    bound = lumped_bound(net, trace(net, example), edits, example, (-1.0, 1.0))
    x = torch.rand(300, 2, 6, 6, dtype=torch.float64) * 2 - 1
    assert 0 < (outputs(net, x) - outputs(small, x)).abs().max() <= bound


def test_what_has_no_rule_is_named() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))
    with pytest.raises(ConfigError, match="no interval rule for the operator 'softmax'"):
        output_bound(net, net, torch.zeros(1, 4), (-1.0, 1.0))
    with pytest.raises(ConfigError, match="is empty"):
        output_bound(net, net, torch.zeros(1, 4), (1.0, -1.0))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))))


def test_channels_that_only_a_batch_norm_makes_equal_are_merged() -> None:
    """w, γ, β, μ and σ all differ, and γ w / σ and β + γ (b - μ) / σ agree up to a factor."""
    torch.manual_seed(0)
    net = Normed().double().eval()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
        net.norm.weight.uniform_(0.5, 1.5)
        net.norm.bias.normal_()
        sigma = (net.norm.running_var + net.norm.eps).sqrt()
        net.conv.weight[4] = 3 * net.conv.weight[1]
        net.norm.weight[4] = 2.5 * net.norm.weight[1] / sigma[1] * sigma[4] / 3
        shift = net.norm.bias[1] + net.norm.weight[1] * (net.conv.bias[1] - net.norm.running_mean[1]) / sigma[1]
        own = net.norm.weight[4] * (net.conv.bias[4] - net.norm.running_mean[4]) / sigma[4]
        net.norm.bias[4] = 2.5 * shift - own
    small, edits = lumped_network(net, torch.zeros(1, 2, 5, 5).double(), 0.0)
    x = torch.randn(10, 2, 5, 5).double()
    assert [e.n_after for e in edits] == [5]
    assert (outputs(net, x) - outputs(small, x)).abs().max() <= 1e-12


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0]), min_size=12, max_size=12))
@settings(max_examples=60, deadline=None)
def test_equal_rows_are_those_that_are_equal(values: list[float]) -> None:
    rows = torch.tensor(values).double().reshape(6, 2)
    labels = equal_rows(rows, 1e-14).tolist()
    assert all((labels[i] == labels[j]) == torch.equal(rows[i], rows[j]) for i in range(6) for j in range(6))


def test_distances_are_those_of_scipy() -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert condensed(rows) == pytest.approx(pdist(rows.numpy()))


@given(SEEDS, st.sampled_from([0.2, 0.6, 1.0]))
@settings(max_examples=30, deadline=None)
def test_no_block_is_wider_than_the_tolerance(seed: int, eps: float) -> None:
    net = mlp(nn.GELU, seed)
    found = rows_of(net, trace(net, torch.zeros(1, 4).double())["0"])
    labels = cluster(found, None, eps)
    scale = float(found.rows_CF.norm(dim=1).median())
    for block in range(int(labels.max()) + 1):
        mine = found.rows_CF[labels == block]
        assert len(mine) == 1 or float(pdist(mine.numpy()).max()) <= eps * scale * (1 + 1e-9)


def test_more_tolerance_leaves_fewer_channels() -> None:
    net = mlp(nn.ReLU, 3, (4, 64, 2))
    found = rows_of(net, trace(net, torch.zeros(1, 4).double())["0"])
    sizes = [int(cluster(found, None, eps, "single").max()) + 1 for eps in (0.0, 0.2, 0.4, 0.8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64


def test_a_layer_too_wide_for_pairs_is_refused() -> None:
    n = MAX_CHANNELS + 1
    ones, no = torch.ones(n), torch.zeros(n, dtype=torch.bool)
    rows = Rows(torch.arange(n).double()[:, None] + 1, ones, ones, True, no, no, 1e-14)
    with pytest.raises(DataError, match="too wide for distances of all pairs"):
        cluster(rows, None, 0.1)
