"""Networks as polynomial systems: both encodings, partitions, and the way back."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightfold.errors import ConfigError, DataError
from weightfold.ode.equivalence import backward, forward, is_exact, quotient
from weightfold.ode.network import Network, hidden_labels, homotopy, layer_blocks, linear, partition, read_back

SMOOTH = [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity]
ANY = [nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.ELU]


def mlp(widths: list[int], activation: type[nn.Module], seed: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    generator = torch.Generator().manual_seed(seed)
    for i, o in pairwise(widths):
        layer = nn.Linear(i, o, dtype=torch.float64)
        for p in layer.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / i**0.5
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def duplicated(net: nn.Sequential, rows: bool, seed: int) -> nn.Sequential:
    """Plant in each hidden layer: unit 2 equal to unit 0, as it is written (rows) or as it is read (columns)."""
    linears = [m for m in net if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for here, after in pairwise(linears):
            if rows:
                here.weight[2], here.bias[2] = here.weight[0], here.bias[0]
            else:
                after.weight[:, 2] = after.weight[:, 0]
    return net


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("widths", [[3, 5, 2], [3, 5, 4, 2], [2, 3, 3, 3, 1]])
def test_the_homotopy_ends_at_the_networks_outputs(activation: type[nn.Module], widths: list[int]) -> None:
    network = Network.of(mlp(widths, activation, 1))
    generator = np.random.default_rng(0)
    x, base = generator.normal(size=widths[0]), generator.normal(size=widths[0])
    for start in (None, base):
        end = homotopy(network, x, start).simulate([0.0, 1.0], rtol=1e-12, atol=1e-13)[1]
        expected = np.concatenate([s[0] for s in network.states(x[None])])
        assert np.allclose(end[: len(expected)], expected, atol=1e-9)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Softplus(beta=2.0)])
def test_an_activation_without_an_encoding_is_named_with_those_that_have_one(activation: nn.Module) -> None:
    network = Network.of(nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 1)))
    with pytest.raises(ConfigError) as error:
        homotopy(network, np.zeros(2))
    assert type(activation).__name__ in str(error.value)
    assert "identity, sigmoid, softplus, tanh" in str(error.value)
    assert "linear(network)" in str(error.value)
    assert linear(network).n_variables == 7


def test_the_linear_encoding_is_the_weights() -> None:
    network = Network.of(mlp([2, 3, 1], nn.ReLU, 0))
    system = linear(network)
    assert system.terms()["h1_2"] == {
        (("x1", 1),): network.weights[0][1, 0],
        (("x2", 1),): network.weights[0][1, 1],
        (("one", 1),): network.biases[0][1],
    }
    assert system.degree == 1


@given(st.integers(0, 999), st.sampled_from(ANY), st.sampled_from([[3, 4, 2], [3, 6, 5, 1], [2, 4, 4, 4, 2]]))
@settings(max_examples=40, deadline=None)
def test_duplicates_are_merged_exactly_under_any_activation(
    seed: int, kind: type[nn.Module], widths: list[int]
) -> None:
    network = Network.of(duplicated(mlp(widths, kind, seed), True, seed))
    labels = partition(network, "backward")
    small = read_back(network, labels, "backward")
    assert small.widths[1:-1] == tuple(w - 1 for w in network.widths[1:-1])
    x = np.random.default_rng(seed).normal(size=(20, widths[0]))
    assert np.abs(small(x) - network(x)).max() <= 1e-12


@given(st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_columns_that_agree_are_merged_exactly_in_linear_networks(seed: int) -> None:
    network = Network.of(duplicated(mlp([3, 6, 5, 2], nn.Identity, seed), False, seed))
    labels = partition(network, "forward")
    small = read_back(network, labels, "forward")
    assert small.widths == (3, 5, 4, 2)
    x = np.random.default_rng(seed).normal(size=(20, 3))
    assert np.abs(small(x) - network(x)).max() <= 1e-12


def test_the_quotient_of_the_linear_encoding_is_that_of_the_network_read_back() -> None:
    network = Network.of(duplicated(mlp([3, 6, 5, 2], nn.ReLU, 4), True, 4))
    system = linear(network)
    labels = backward(system, layer_blocks(network, system), equal_start=False)
    small = read_back(network, hidden_labels(network, system, labels), "backward")
    assert quotient(system, labels, "backward").n_monomials == linear(small).n_monomials
    assert np.allclose(
        np.sort(quotient(system, labels, "backward").coefficient_M), np.sort(linear(small).coefficient_M)
    )


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.Softplus])
def test_the_homotopy_finds_duplicates_backward_and_none_forward(activation: type[nn.Module]) -> None:
    network = Network.of(duplicated(mlp([2, 4, 3, 1], activation, 2), True, 2))
    system = homotopy(network, np.array([0.3, -0.7]))
    start = layer_blocks(network, system)
    found = hidden_labels(network, system, backward(system, start))
    assert [labels.tolist() for labels in found] == [[0, 1, 0, 2], [0, 1, 0]]
    assert is_exact(system, backward(system, start), "backward")
    assert [labels.max() + 1 for labels in hidden_labels(network, system, forward(system, start))] == [4, 3]


def test_equal_rows_with_unequal_biases_start_apart() -> None:
    net = duplicated(mlp([2, 4, 1], nn.Tanh, 0), True, 0)
    net[0].bias.data[2] += 0.5
    network = Network.of(net)
    system = homotopy(network, np.array([0.3, -0.7]))
    start = layer_blocks(network, system)
    assert hidden_labels(network, system, backward(system, start))[0].tolist() == [0, 1, 2, 3]
    assert hidden_labels(network, system, backward(system, start, equal_start=False))[0].tolist() == [0, 1, 0, 2]
    with pytest.raises(DataError, match="'h1_1' and 'h1_3' are one block"):
        quotient(system, backward(system, start, equal_start=False), "backward")


def test_nothing_is_merged_in_a_random_network() -> None:
    network = Network.of(mlp([3, 8, 8, 2], nn.Tanh, 5))
    for kind in ("forward", "backward"):
        assert [len(set(labels.tolist())) for labels in partition(network, kind)] == [8, 8]


def test_larger_tolerances_leave_fewer_units() -> None:
    network = Network.of(mlp([3, 16, 16, 2], nn.Tanh, 5))
    sizes = [sum(len(set(x.tolist())) for x in partition(network, "backward", eps)) for eps in (0.0, 1.0, 3.0, 9.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 32
    assert sizes[-1] < 16


def test_what_is_no_chain_of_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="'1' is a Conv1d"):
        Network.of(nn.Sequential(nn.Linear(2, 3), nn.Conv1d(1, 1, 1)))
    with pytest.raises(ConfigError, match="is a ReLU"):
        Network.of(nn.ReLU())
    network = Network.of(mlp([2, 3, 1], nn.Tanh, 0))
    with pytest.raises(DataError, match="must be 2 finite numbers"):
        homotopy(network, np.zeros(3))
    with pytest.raises(DataError, match="need one label each"):
        read_back(network, [np.zeros(2, int)], "backward")
    wide = Network.of(mlp([8, 128, 128, 128, 1], nn.Tanh, 0))
    with pytest.raises(DataError, match="monomials; at most"):
        homotopy(wide, np.zeros(8))


def test_the_module_read_back_is_the_network() -> None:
    net = mlp([3, 5, 2], nn.Tanh, 0)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Network.of(net).module()(x), net(x))


@pytest.mark.parametrize("eps", [0.3, 0.8, 1.5])
@pytest.mark.parametrize(("kind", "how"), [("forward", "single"), ("backward", "complete")])
def test_the_benchmarks_rivals_are_these_equivalences(eps: float, kind: str, how: str) -> None:
    """Layer sweeps of the benchmark against refining the whole system; its forward distances count three times."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import lumping

    net = mlp([3, 12, 10, 2], nn.Tanh, 3)
    layers = [(m.weight.detach(), m.bias.detach()) for m in net if isinstance(m, nn.Linear)]
    bench = lumping.Bench(net, layers, nn.Tanh(), torch.zeros(1, 3).double(), 0)
    cut = lumping.forward_at(bench, eps) if kind == "forward" else lumping.backward_at(bench, eps)
    network = Network.of(net)
    labels = partition(network, kind, 3 * eps if kind == "forward" else eps, how)  # type: ignore[arg-type]
    small = read_back(network, labels, kind)  # type: ignore[arg-type]
    assert tuple(len(b) for _, b in cut.layers) == small.widths[1:]
    x = np.random.default_rng(0).normal(size=(10, 3))
    assert np.allclose(bench.module(cut).double()(torch.from_numpy(x)).detach().numpy(), small(x), atol=1e-5)
