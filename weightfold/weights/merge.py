"""Merging: one model of several, by averages of weights in one basis.

With θ₀ the common start (base), θ_i the models, τ_i = θ_i - θ₀:

- average         Σ w_i θ_i
- task arithmetic θ₀ + λ Σ τ_i
- TIES            keep the share k of τ_i's largest entries, elect a sign per entry by the sum, average the agreeing
- DARE            drop a share p of τ_i at random, rescale the rest by 1 / (1 - p), then as task arithmetic
- Fisher          Σ F_i θ_i / Σ F_i, entry by entry, F the mean square of the loss's gradient
- RegMean         W = (Σ G_i)⁻¹ Σ G_i W_i for linear layers, G_i = X_iᵀ X_i of the layer's inputs; others averaged

References: Wortsman et al. 2022, arXiv 2203.05482; Ilharco et al. 2022, arXiv 2212.04089; Yadav et al. 2023, arXiv
2306.01708; Yu et al. 2023, arXiv 2311.03099; Matena & Raffel 2021, arXiv 2111.09832; Jin et al. 2022, arXiv 2212.09849.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.errors import ConfigError, DataError, GraphError
from weightfold.graph.copies import independent_copy
from weightfold.graph.trace import Example
from weightfold.stats.running import call, evaluating
from weightfold.stats.taps import tapped
from weightfold.weights.adapters import FOLD, adapters_of, factor_, multiplied, require_same_numbers
from weightfold.weights.align import align, loaded
from weightfold.weights.compare import Gate, alike, cosine, differences, fitting, require_alike, unmixable, weights_of
from weightfold.weights.finite import holes
from weightfold.weights.symmetry import Symmetries
from weightfold.weights.ties import owners_of, tie_differences

State = dict[str, Tensor]
CLOSE = 0.5
"""Cosine of weights as they are, above which models count as one family."""


def average(models: Sequence[nn.Module], shares: Sequence[float] | None = None) -> nn.Module:
    """The weighted mean of models in one basis.

    Raises:
        GraphError: the architectures differ; says where.
        ConfigError: no models, or shares that do not fit.
    Example:
        >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> torch.equal(average([a, b]).weight, (a.weight + b.weight) / 2)
        True
    """
    models, states = _states(models)
    share = [1 / len(states)] * len(states) if shares is None else list(shares)
    if len(share) != len(states):
        raise ConfigError(f"There are {len(states)} models and {len(share)} shares.")
    return _loaded(
        models[0], {n: sum(w * s[n].double() for w, s in zip(share, states, strict=True)) for n in states[0]}
    )


def task_arithmetic(base: nn.Module, models: Sequence[nn.Module], strength: float = 1.0) -> nn.Module:
    """Add what each model learned since the base: θ₀ + λ Σ τ_i. ``strength``: λ."""
    base, start, deltas = _deltas(base, models)
    return _loaded(base, {n: start[n] + strength * sum(d[n] for d in deltas) for n in start})


def ties(base: nn.Module, models: Sequence[nn.Module], keep: float = 0.2, strength: float = 1.0) -> nn.Module:
    """Keep the largest changes, elect a sign for each entry, average the agreeing ones.

    Args:
        keep: share of each model's entries that are kept, in (0, 1].
        strength: λ.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"The 'keep' of ties must lie in (0, 1]. Got {keep} instead.")
    base, start, deltas = _deltas(base, models)
    trimmed = [_largest(d, keep) for d in deltas]
    out = {}
    for n in start:
        stack = torch.stack([d[n] for d in trimmed])
        elected = stack.sum(0).sign()
        agree = (stack.sign() == elected) & (stack != 0)
        mean = (stack * agree).sum(0) / agree.sum(0).clamp_min(1)
        out[n] = start[n] + strength * mean
    return _loaded(base, out)


def _largest(delta: State, keep: float) -> State:
    sizes = torch.cat([d.abs().reshape(-1) for d in delta.values()])
    k = max(1, round(keep * sizes.numel()))
    limit = sizes.kthvalue(sizes.numel() - k + 1).values
    return {n: torch.where(d.abs() >= limit, d, 0.0) for n, d in delta.items()}


def dare(
    base: nn.Module,
    models: Sequence[nn.Module],
    generator: torch.Generator,
    drop: float = 0.9,
    strength: float = 1.0,
) -> nn.Module:
    """Drop changes at random and rescale the rest, then add them. ``drop``: share p, in [0, 1)."""
    if not 0 <= drop < 1:
        raise ConfigError(f"The 'drop' of dare must lie in [0, 1). Got {drop} instead.")
    base, start, deltas = _deltas(base, models)
    out = {n: start[n].clone() for n in start}
    for delta in deltas:
        for n in delta:
            stay = torch.rand(delta[n].shape, generator=generator) >= drop
            out[n] += strength * delta[n] * stay / (1 - drop)
    return _loaded(base, out)


def fisher_of(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], data: Iterable[Any]) -> State:
    """Mean square of the loss's gradient by each weight, one term a batch (take batches of one for the true mean).

    Args:
        loss: the loss of a model on one batch.
    """
    twin = independent_copy(model).eval()
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in twin.named_parameters()}
    count = 0
    for batch in data:
        twin.zero_grad()
        loss(twin, batch).backward()
        count += 1
        for n, p in twin.named_parameters():
            if p.grad is not None:
                total[n] += p.grad.double().square()
    if not count:
        raise DataError("Fisher information needs data.")
    return {n: f / count for n, f in total.items()}


def fisher(models: Sequence[nn.Module], information: Sequence[Mapping[str, Tensor]], floor: float = 1e-6) -> nn.Module:
    """The mean of models weighted entry by entry by their Fisher information; what has none is averaged.

    Args:
        information: of each model, from `fisher_of`.
        floor: least weight of an entry, as a share of the tensor's mean information.
    """
    given, (models, states) = models, _states(models)
    if len(information) != len(states):
        raise ConfigError(f"There are {len(states)} models and {len(information)} tables of Fisher information.")
    names = owners_of(models[0])
    _require_no_factors(models, states, information)
    out = {}
    for n in states[0]:
        known = _information(n, given, names, information)
        if known is None:
            out[n] = torch.stack([s[n].double() for s in states]).mean(0)
            continue
        stack = torch.stack(known)
        stack = stack + floor * stack.mean().clamp_min(1e-30)
        values = torch.stack([s[n].double() for s in states])
        out[n] = (stack * values).sum(0) / stack.sum(0)
    return _loaded(models[0], out)


def _require_no_factors(
    models: Sequence[nn.Module], states: Sequence[State], tables: Sequence[Mapping[str, Tensor]]
) -> None:
    for a in adapters_of(models[0]):
        if any(a.down in table or a.up in table for table in tables) and any(bool(s[a.product].any()) for s in states):
            raise GraphError(
                f"'{a.up}' and '{a.down}' are factors of an adapter: Fisher information of each is not that of B A.",
                remedy=FOLD,
            )


def _information(
    name: str, models: Sequence[nn.Module], owners: Mapping[str, str], tables: Sequence[Mapping[str, Tensor]]
) -> list[Tensor] | None:
    """What is known of one tensor in each model; None if it is in no table.

    A model that ties it to what is not tied in the others has one number for both, which belongs to neither.
    """
    same = [n for n, owner in owners.items() if owner == name] or [name]
    found = [next((table[n].double() for n in same if n in table), None) for table in tables]
    if all(f is None for f in found):
        return None
    for number, (model, table) in enumerate(zip(models, tables, strict=True), 1):
        own = owners_of(model)
        apart = [n for n, owner in own.items() if owner == own.get(name, name) and n not in same]
        lone = [n for n in (*same, *apart) if n in table]
        if apart and len(lone) < 2:
            raise GraphError(
                f"'{name}' is tied to '{apart[0]}' in model {number}, not in the others: its Fisher information there "
                "is that of both.",
                remedy="Pass fisher_of(untied(model), ...) for that model (weightfold.weights.ties).",
            )
        if found[number - 1] is None:
            raise ConfigError(
                f"The Fisher information of model {number} lacks '{name}'.",
                remedy="Pass what fisher_of returns for this very model.",
            )
    return [f for f in found if f is not None]


@torch.no_grad()
def grams_of(model: nn.Module, data: Iterable[Example]) -> State:
    """XᵀX of the inputs of each linear layer, by the layer's path, shapes (I, I)."""
    grams: State = {}

    def look(x: Tensor, name: str) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        grams[name] = grams[name] + rows.T @ rows if name in grams else rows.T @ rows

    looks = {name: partial(look, name=name) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    with evaluating(model), tapped(model, looks):
        for batch in data:
            call(model, batch)
    return grams


def regmean(models: Sequence[nn.Module], grams: Sequence[Mapping[str, Tensor]], shrink: float = 0.9) -> nn.Module:
    """Linear layers by least squares on their inputs' Gram matrices, all else by the mean.

    Args:
        grams: of each model, from `grams_of`.
        shrink: factor of the off-diagonal entries, in [0, 1]; below 1 the solution is stable.
    """
    models, states = _states(models)
    if len(grams) != len(states):
        raise ConfigError(f"There are {len(states)} models and {len(grams)} sets of Gram matrices.")
    out = {n: torch.stack([s[n].double() for s in states]).mean(0) for n in states[0]}
    owners, modules = owners_of(models[0]), dict(models[0].named_modules(remove_duplicate=False))
    readers = {a.product: [a.down] for a in adapters_of(models[0])}  # A reads what the product reads
    for name in states[0]:
        names = readers.get(name) or [n for n, owner in owners.items() if owner == name]
        paths = [n.rpartition(".")[0] for n in names if n.endswith("weight")]
        layers = [path for path in paths if any(path in g for g in grams)]
        if not layers or {id(modules[path]) for path in paths} != {id(modules[path]) for path in layers}:
            continue  # a tensor that is read in another way too, as an embedding is, has no such solution
        _require_grams(layers, grams)
        inputs = [sum((g[layer] for layer in layers[1:]), g[layers[0]]) for g in grams]
        shrunk = [shrink * g + (1 - shrink) * torch.diag(g.diagonal()) for g in inputs]
        total = sum(shrunk, torch.zeros_like(shrunk[0]))
        ridge = 1e-8 * float(total.diagonal().mean()) + 1e-30
        right = sum((g @ s[name].double().T for g, s in zip(shrunk, states, strict=True)), torch.zeros(()))
        out[name] = torch.linalg.solve(total + ridge * torch.eye(len(total), dtype=torch.float64), right).T
    return _loaded(models[0], out)


def _require_grams(layers: Sequence[str], grams: Sequence[Mapping[str, Tensor]]) -> None:
    for number, table in enumerate(grams, 1):
        for layer in layers:
            if layer not in table:
                raise ConfigError(
                    f"The Gram matrices of model {number} lack '{layer}'; perhaps it is one layer with another there.",
                    remedy="Pass grams_of(untied(model), ...) for that model (weightfold.weights.ties).",
                )


# many models ----------------------------------------------------------------------------------------------------------


def align_all(
    models: Sequence[nn.Module], example: Example, *, rounds: int = 10, found: Symmetries | None = None
) -> list[nn.Module]:
    """Bring many models into one basis: each in turn is aligned to the mean of the others until none moves.

    Reference: Ainsworth et al. 2022, arXiv 2209.04836, algorithm 3 (MergeMany).
    """
    if not models:
        raise ConfigError("There are no models to align.")
    models = alike(models)
    found = fitting(found, models[0], example)
    aligned = [models[0], *(align(models[0], m, example, found=found).model for m in models[1:])]
    for _ in range(rounds if len(models) > 2 else 0):
        moved = False
        for i in range(len(aligned)):
            rest = _middle([m for j, m in enumerate(aligned) if j != i])
            turned = align(rest, aligned[i], example, found=found)
            if turned.cosine_after > turned.cosine_before + 1e-9:
                aligned[i], moved = turned.model, True
        if not moved:
            break
    return aligned


def _middle(models: Sequence[nn.Module]) -> nn.Module:
    """The mean name by name, factors of adapters too: what alignment compares."""
    states = [weights_of(model) for model in models]
    return loaded(models[0], {n: torch.stack([s[n].double() for s in states]).mean(0) for n in states[0]})


# the gate -------------------------------------------------------------------------------------------------------------


def gate(
    a: nn.Module,
    b: nn.Module,
    example: Example,
    *,
    generator: torch.Generator | None = None,
    found: Symmetries | None = None,
) -> Gate:
    """Say beforehand whether two models can be merged, and why.

    Looks at shapes, at numbers that are not finite, at the cosine as they are (models of one family share a start), and
    at what alignment brings beyond chance: the same search on the second model's weights shuffled within each tensor.

    Args:
        generator: draws the shuffle; seeded 0 by default.
    """
    one, two = weights_of(a), weights_of(b)
    for which, state in (("first", one), ("second", two)):
        for name in holes(state):
            return Gate("no", (f"'{name}' of the {which} model holds NaN or infinite numbers",))
    factors = adapters_of(a), adapters_of(b)
    one, two = multiplied(one, factors[0]), multiplied(two, factors[1])
    differ = differences(one, two)
    if any("lacks" in text for text in differ):
        return Gate("no", tuple(f"they have other layers: {text}" for text in differ[:5]))
    if differ and not factors[0]:
        found = fitting(found, a, example)
        if fixed := unmixable(found, one, two):
            return Gate("no", tuple(fixed[:5]))
    if differ:
        return Gate("softly", tuple(f"widths differ: {text}" for text in differ[:5]))
    notes = tuple(f"{text}: untied for the merge" for text in tie_differences([a, b]))
    notes += tuple(f"'{p.up}' and '{p.down}' are factors (LoRA): merged by their product" for p in adapters_of(a))
    if all(torch.equal(one[n], two[n]) for n in one):
        return Gate("as they are", ("they are equal, byte for byte", *notes), 1.0, 1.0)
    now = cosine(one, two)
    if factors[0] and now >= CLOSE:
        return Gate("as they are", (f"weights point the same way, adapters multiplied (cosine {now:.2f})", *notes), now)
    if differ := differences(weights_of(a), weights_of(b)):
        return Gate("no", (f"their adapters have other ranks, so they cannot be aligned: {differ[0]}", *notes), now)
    a, b = alike([a, b])
    found = fitting(found, a, example)
    turned = align(a, b, example, found=found)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    chance = align(a, _shuffled(b, generator), example, found=found).cosine_after
    now, then = turned.cosine_before, turned.cosine_after
    if now >= CLOSE and then - now < 0.05:
        why = f"weights point the same way (cosine {now:.2f}), as models of one family do; alignment adds nothing"
        return Gate("as they are", (why, *notes), now, then, chance)
    if then > max(chance + 0.02, 1.2 * chance):
        why = f"alignment raises the cosine from {now:.2f} to {then:.2f}; shuffled weights reach {chance:.2f}"
        rest = () if then >= CLOSE else ("they share little beyond the task: expect a barrier, and repair",)
        return Gate("after alignment", (why, *rest, *notes), now, then, chance)
    why = f"alignment reaches a cosine of {then:.2f}, shuffled weights {chance:.2f}: nothing in common is found"
    return Gate("no", (why, *notes), now, then, chance)


def _shuffled(model: nn.Module, generator: torch.Generator) -> nn.Module:
    twin = independent_copy(model)
    with torch.no_grad():
        for p in twin.parameters():
            flat = p.reshape(-1).clone()
            p.copy_(flat[torch.randperm(flat.numel(), generator=generator)].reshape(p.shape))
    return twin


def similarity(a: nn.Module, b: nn.Module) -> float:
    """Cosine of two models' weights as they are."""
    return cosine(weights_of(a), weights_of(b))


# parts ----------------------------------------------------------------------------------------------------------------


def _states(models: Sequence[nn.Module], roles: Sequence[str] = ()) -> tuple[list[nn.Module], list[State]]:
    """The models, alike in their ties, and their weights, each tied one once."""
    if not models:
        raise ConfigError("There are no models to merge.")
    adapters = [adapters_of(model) for model in models]
    models = alike(models, roles, {name for each in adapters for a in each for name in (a.down, a.up)})
    owners = owners_of(models[0])
    states = [multiplied(weights_of(m), each) for m, each in zip(models, adapters, strict=True)]
    products = [{a.product: state[a.product] for a in each} for state, each in zip(states, adapters, strict=True)]
    for other in products[1:]:
        require_alike(products[0], other)
    require_same_numbers(models, adapters[0])
    return models, [{n: t for n, t in state.items() if owners.get(n, n) == n} for state in states]


def _deltas(base: nn.Module, models: Sequence[nn.Module]) -> tuple[nn.Module, State, list[State]]:
    roles = ["the base", *(f"model {i} of {len(models)}" for i in range(1, len(models) + 1))]
    parents, states = _states([base, *models], roles)
    start = {n: t.double() for n, t in states[0].items()}
    return parents[0], start, [{n: s[n].double() - start[n] for n in start} for s in states[1:]]


def _loaded(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    twin = independent_copy(model)
    own = twin.state_dict()
    adapters = adapters_of(twin)
    made = {a.product for a in adapters} | {a.bias for a in adapters}
    with torch.no_grad():
        for name, value in state.items():
            if name not in made:
                own[name].copy_(value)
    factor_(twin, state, adapters)
    return twin
