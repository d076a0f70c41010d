"""A trained feed-forward network as a polynomial system, and a partition of the system as a smaller network.

Homotopy (exact): the input moves from x₀ to x, x(t) = x₀ + t (x - x₀), and every unit follows by the chain rule,

    tanh      z' = (1 - z²) u'         sigmoid   z' = z (1 - z) u'         u' = Σ_i w_i z_i'
    softplus  z' = s u',  s' = s (1 - s) u'

with z(0) from a forward pass at x₀; so z(1) is the network at x. The derivatives z_i' are substituted, so degree and
number of monomials grow with depth. Biases live in the initial values alone: backward blocks must start equal.
Linear: h_k' = Σ_i w_ki h_i + b_k one, the activation left out; it takes any activation and sees the weights alone.

Blocks never cross layers; inputs, outputs and the constant stand alone. With M_l the 0/1 matrix of layer l's blocks and
D_l = M_l M_lᵀ their sizes, a partition is read back as

    backward  W_l' = D_l⁻¹ M_l W_l M_{l-1}ᵀ,  b_l' = D_l⁻¹ M_l b_l    (rows agree; exact for every activation)
    forward   W_l' = M_l W_l M_{l-1}ᵀ D_{l-1}⁻¹,  b_l' = M_l b_l      (columns agree; exact for linear units only).

Both encodings are derived here from the definitions of differential equivalence; how arXiv 2606.01402 encodes a network
is not public. For backward equivalence of networks compare Prabhakar, arXiv 2110.03726 (bisimulation); differs in: the
means over blocks for approximate ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array, vstack
from torch import nn

from weightfold.errors import ConfigError, DataError
from weightfold.ode.approximate import Kind, Linkage, approximate
from weightfold.ode.equivalence import joined, numbered
from weightfold.ode.system import Array, PolynomialSystem

ENCODED = {nn.Identity: "identity", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.Softplus: "softplus"}
"""Activations with an exact polynomial encoding."""
PASSED = (nn.Flatten, nn.Dropout)
MAX_MONOMIALS = 5_000_000
"""Largest homotopy that is written out."""


@dataclass(frozen=True, eq=False)
class Network:
    """Layers of a feed-forward network, in float64.

    Args:
        weights: one matrix per layer, shapes (O, I).
        biases: one vector per layer, shapes (O,).
        activations: the module behind each layer; the last is `nn.Identity`.

    Example:
        >>> network = Network.of(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))
        >>> network.widths, network(np.zeros((1, 3))).shape
        ((3, 5, 2), (1, 2))
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    activations: tuple[nn.Module, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Network:
        """Read a module made of linear layers and elementwise activations, one after another.

        Raises:
            ConfigError: another layer, or no linear layer at all.
        """
        weights: list[Array] = []
        biases: list[Array] = []
        activations: list[nn.Module] = []
        for name, module in _flat(model, ""):
            if isinstance(module, nn.Linear):
                weights.append(module.weight.detach().double().cpu().numpy())
                bias = (
                    np.zeros(len(weights[-1])) if module.bias is None else module.bias.detach().double().cpu().numpy()
                )
                biases.append(bias)
                activations.append(nn.Identity())
            elif isinstance(module, PASSED) or (isinstance(module, nn.Identity) and weights):
                continue
            elif not weights or next(module.parameters(), None) is not None or list(module.children()):
                raise ConfigError(
                    f"'{name or 'model'}' is a {type(module).__name__}; a network as a system of equations is made of "
                    "nn.Linear and elementwise activations, one after another.",
                    remedy="weightfold lump takes any network that can be traced.",
                )
            else:
                activations[-1] = module
        if not weights:
            raise ConfigError("The network has no linear layer.")
        return cls(tuple(weights), tuple(biases), tuple(activations))

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of every layer, the inputs first."""
        return (self.weights[0].shape[1], *(len(w) for w in self.weights))

    @property
    def layer_of(self) -> Array:
        """The layer of every unit that is a variable, inputs (0) first, shape (N,)."""
        return np.repeat(np.arange(len(self.widths)), self.widths)

    def __call__(self, x_BI: Array) -> Array:
        """The outputs, shape (B, O), float64."""
        return self.states(x_BI)[-1]

    def states(self, x_BI: Array) -> list[Array]:
        """What every layer gives, the inputs first."""
        out = [np.asarray(x_BI, np.float64)]
        for weight, bias, activation in zip(self.weights, self.biases, self.activations, strict=True):
            with torch.no_grad():
                out.append(activation(torch.from_numpy(out[-1] @ weight.T + bias)).numpy())
        return out

    def module(self) -> nn.Sequential:
        """The network as plain layers, float64."""
        layers: list[nn.Module] = []
        for weight, bias, activation in zip(self.weights, self.biases, self.activations, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
            with torch.no_grad():
                linear.weight.copy_(torch.from_numpy(weight))
                linear.bias.copy_(torch.from_numpy(bias))
            layers += [linear] if isinstance(activation, nn.Identity) else [linear, activation]
        return nn.Sequential(*layers)


def _flat(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        return [(name, module)]
    return [leaf for key, child in module.named_children() for leaf in _flat(child, f"{name}.{key}" if name else key)]


def unit_names(network: Network) -> list[str]:
    """x1 .. for inputs, h1_1 .. for hidden layers, y1 .. for outputs."""
    last = len(network.widths) - 1
    heads = ["x", *(f"h{layer}_" for layer in range(1, last)), "y"]
    return [f"{head}{k + 1}" for head, width in zip(heads, network.widths, strict=True) for k in range(width)]


# encodings ------------------------------------------------------------------------------------------------------------


def homotopy(network: Network, x_I: Array, base_I: Array | None = None) -> PolynomialSystem:
    """The exact encoding: at t = 1 every unit has its value at the input x.

    Args:
        x_I: the input, shape (I,).
        base_I: where the input starts from, shape (I,); 0 by default.
    Returns:
        Variables: the units as `unit_names`; "s_" and a unit's name for softplus; "c1" .. for x - x₀.
    Raises:
        ConfigError: an activation without an encoding; names it, and those that have one.
        DataError: an input of another size, or a system of more than `MAX_MONOMIALS`.
    Example:
        >>> network = Network.of(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
        >>> x = np.array([0.5, -1.0])
        >>> end = homotopy(network, x).simulate([0.0, 1.0])[1]
        >>> bool(abs(end[5] - network(x[None])[0, 0]) < 1e-8)
        True
    """
    kinds = [_encoding(k, activation) for k, activation in enumerate(network.activations)]
    x_I = _input(network, x_I)
    base_I = np.zeros(network.widths[0]) if base_I is None else _input(network, base_I)
    _check_size(network, kinds)
    states = network.states(base_I[None])
    pre = [s @ w.T + b for s, w, b in zip(states[:-1], network.weights, network.biases, strict=True)]
    units = unit_names(network)
    soft = [k for k, kind in enumerate(kinds) if kind == "softplus"]
    offset = np.cumsum([0, *network.widths])
    names, start = list(units), [s[0] for s in states]
    slope_at: dict[int, int] = {}
    for k in soft:
        slope_at[k] = len(names)
        names += [f"s_{unit}" for unit in units[offset[k + 1] : offset[k + 2]]]
        start.append(1 / (1 + np.exp(-pre[k][0])))
    first_c = len(names)
    names += [f"c{i + 1}" for i in range(network.widths[0])]
    start.append(x_I - base_I)
    n, width = len(names), network.widths[0]
    equation, coefficient = [np.arange(width)], [np.ones(width)]
    speed = csr_array((np.ones(width, np.int32), (np.arange(width), first_c + np.arange(width))), shape=(width, n))
    powers = [speed]
    unit, value = np.arange(width), np.ones(width)
    for k, (weight, kind) in enumerate(zip(network.weights, kinds, strict=True)):
        fan = len(weight)
        pushed = csr_array(vstack([speed] * fan))
        owner = np.repeat(np.arange(fan), len(unit))
        pushed_value = (weight[:, unit] * value).ravel()
        parts = _chain(kind, offset[k + 1], slope_at.get(k), owner, pushed_value, pushed)
        for at, c, p in parts:
            equation.append(at)
            coefficient.append(c)
            powers.append(p)
        own = [part for part in parts if offset[k + 1] <= part[0][0] < offset[k + 2]]
        unit = np.concatenate([part[0] for part in own]) - offset[k + 1]
        value = np.concatenate([part[1] for part in own])
        speed = csr_array(vstack([part[2] for part in own]))
    return PolynomialSystem.of_arrays(
        names, np.concatenate(equation), np.concatenate(coefficient), vstack(powers), np.concatenate(start), "homotopy"
    )


Part = tuple[Array, Array, csr_array]


def _chain(kind: str, unit_at: int, slope_at: int | None, owner: Array, u: Array, powers: csr_array) -> list[Part]:
    """The monomials of z' (and s') from those of u', as (equation, coefficient, powers)."""
    z = unit_at + owner
    if kind == "identity":
        return [(z, u, powers)]
    if kind == "tanh":
        return [(z, u, powers), (z, -u, _times(powers, z, 2))]
    if kind == "sigmoid":
        return [(z, u, _times(powers, z, 1)), (z, -u, _times(powers, z, 2))]
    assert slope_at is not None
    s = slope_at + owner
    once, twice = _times(powers, s, 1), _times(powers, s, 2)
    return [(z, u, once), (s, u, once), (s, -u, twice)]


def _times(powers: csr_array, variable: Array, power: int) -> csr_array:
    """Multiply every monomial by its own variable to a power."""
    extra = (np.full(len(variable), power, np.int32), (np.arange(len(variable)), variable))
    return csr_array(powers + csr_array(extra, shape=powers.shape))


def _encoding(k: int, activation: nn.Module) -> str:
    kind = ENCODED.get(type(activation))
    if kind is None or (isinstance(activation, nn.Softplus) and activation.beta != 1):
        raise ConfigError(
            f"{activation} behind layer {k + 1} has no exact polynomial encoding.",
            remedy=f"Exact for: {', '.join(sorted(ENCODED.values()))} (softplus with beta 1). "
            "The linear encoding takes any activation: linear(network).",
        )
    return kind


def _input(network: Network, x_I: Array) -> Array:
    x_I = np.asarray(x_I, np.float64)
    if x_I.shape != (network.widths[0],) or not np.isfinite(x_I).all():
        raise DataError(f"The input must be {network.widths[0]} finite numbers. Got shape {x_I.shape}.")
    return x_I


def _check_size(network: Network, kinds: Sequence[str]) -> None:
    own, total = network.widths[0], 0
    for width, kind in zip(network.widths[1:], kinds, strict=True):
        pushed = own * width
        own = pushed * (2 if kind in ("tanh", "sigmoid") else 1)
        total += pushed * {"identity": 1, "tanh": 2, "sigmoid": 2, "softplus": 3}[kind]
    if total > MAX_MONOMIALS:
        raise DataError(
            f"The homotopy of a network of widths {network.widths} has {total:,} monomials; at most {MAX_MONOMIALS:,}.",
            remedy="Use the linear encoding, which has one monomial per weight: linear(network).",
        )


def linear(network: Network, x_I: Array | None = None) -> PolynomialSystem:
    """The linear encoding: one monomial per weight and bias, any activation.

    Args:
        x_I: start of the inputs, shape (I,); 0 by default. It matters to simulation alone.
    Example:
        >>> linear(Network.of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))).names[-1]
        'one'
    """
    names = [*unit_names(network), "one"]
    offset = np.cumsum([0, *network.widths])
    one = len(names) - 1
    equation, column, value = [], [], []
    for k, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        to, source = np.nonzero(weight)
        biased = np.flatnonzero(bias)
        equation += [offset[k + 1] + to, offset[k + 1] + biased]
        column += [offset[k] + source, np.full(len(biased), one)]
        value += [weight[to, source], bias[biased]]
    rows = np.concatenate(equation)
    powers = coo_array((np.ones(len(rows), np.int32), (np.arange(len(rows)), np.concatenate(column))))
    powers.resize((len(rows), len(names)))
    start = np.zeros(len(names))
    start[one] = 1.0
    if x_I is not None:
        start[: network.widths[0]] = _input(network, x_I)
    return PolynomialSystem.of_arrays(names, rows, np.concatenate(value), powers, start, "linear")


# partitions -----------------------------------------------------------------------------------------------------------


def layer_blocks(network: Network, system: PolynomialSystem) -> Array:
    """The coarsest partition that a network allows: one block per hidden layer, all others alone, shape (N,)."""
    layer = network.layer_of
    hidden = (layer > 0) & (layer < len(network.widths) - 1)
    labels = np.arange(system.n_variables)
    n = len(layer)
    labels[:n] = np.where(hidden, system.n_variables + layer, labels[:n])
    for k, name in enumerate(system.names):
        if name.startswith("s_h"):
            labels[k] = 2 * system.n_variables + int(name[3:].partition("_")[0])
    return numbered(labels)


def hidden_labels(network: Network, system: PolynomialSystem, labels_N: Array) -> list[Array]:
    """The blocks of each hidden layer, numbered from 0, from those of an encoding.

    A softplus unit is two variables, its value and its slope; units are together where both are.
    """
    place = {name: i for i, name in enumerate(system.names)}
    units = unit_names(network)
    slope = np.array([place.get(f"s_{unit}", i) for i, unit in enumerate(units)])
    offset = np.cumsum([0, *network.widths])
    spans = [slice(offset[k], offset[k + 1]) for k in range(1, len(network.widths) - 1)]
    return [joined(numbered(labels_N[span]), numbered(labels_N[slope[span]])) for span in spans]


def partition(network: Network, kind: Kind, eps: float = 0.0, how: Linkage = "complete") -> list[Array]:
    """Lump the hidden units of a network by (approximate) equivalence of its linear encoding.

    Args:
        kind: "forward" (columns) or "backward" (rows and biases).
        eps: ε in units of weights, as `approximate` takes it: forward distances are three times those of columns.
    Returns:
        One array of labels per hidden layer.
    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> with torch.no_grad():
        ...     net[0].weight[3], net[0].bias[3] = net[0].weight[1], net[0].bias[1]
        >>> [labels.tolist() for labels in partition(Network.of(net), "backward")]
        [[0, 1, 2, 1]]
    """
    system = linear(network)
    found = approximate(system, eps, kind, how, layer_blocks(network, system), equal_start=False)
    return hidden_labels(network, system, found)


def read_back(network: Network, labels: Sequence[Array], kind: Kind) -> Network:
    """The smaller network of a partition.

    Args:
        labels: one array per hidden layer, as `partition` gives them.
        kind: "forward" sums rows and averages columns, "backward" averages rows and sums columns.
    Raises:
        DataError: labels of other sizes.
    Example:
        >>> network = Network.of(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)))
        >>> read_back(network, [np.array([0, 1, 0, 2])], "backward").widths
        (2, 3, 1)
    """
    if kind not in ("forward", "backward"):
        raise ConfigError(f"'kind' must be 'forward' or 'backward'. Got {kind!r} instead.")
    inner = network.widths[1:-1]
    if tuple(map(len, labels)) != inner:
        raise DataError(f"Hidden layers of {inner} units need one label each; got {[len(part) for part in labels]}.")
    members = [np.eye(network.widths[0]), *(_members(part) for part in labels), np.eye(network.widths[-1])]
    weights, biases = [], []
    for before, after, weight, bias in zip(members[:-1], members[1:], network.weights, network.biases, strict=True):
        size = after.sum(1, keepdims=True)
        if kind == "backward":
            weights.append(after @ weight @ before.T / size)
            biases.append(after @ bias / size[:, 0])
        else:
            weights.append(after @ weight @ before.T / before.sum(1))
            biases.append(after @ bias)
    return Network(tuple(weights), tuple(biases), network.activations)


def _members(labels: Array) -> Array:
    return np.eye(int(labels.max()) + 1)[numbered(labels)].T
