"""Low-rank adapters: pairs of factors B, A beside a layer, of which only the product s B A counts.

Two adapters of one base have factors in bases of their own, so a mean of factors is the mean of nothing. Their products
can be mixed like any weight, and the mixture is factored again by singular values: B = U √S, A = √S Vᵀ. A mixture of
products of ranks r and q has rank r + q at most; the factors grow to what it needs, and nothing is cut off.

Known by name are pairs as peft, loralib, torchtune and kohya write them. The scale s is what the layer says: `scaling`,
or alpha over rank as attributes, or a tensor `alpha`.

Reference: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.errors import GraphError
from weightfold.graph.apply import find_tensor, put_tensor
from weightfold.graph.copies import independent_copy

State = dict[str, Tensor]
PAIRS = {"lora_A": "lora_B", "lora_a": "lora_b", "lora_down": "lora_up", "lora_embedding_A": "lora_embedding_B"}
ALPHAS, RANKS = ("lora_alpha", "alpha"), ("r", "rank", "lora_r")
ROUNDING = 1e-6
"""Singular values below this share of the largest are rounding."""
FOLD = "Fold the adapters into their layers first: weightfold.weights.adapters.folded(model)."
"""What to do where products will not do."""


@dataclass(frozen=True)
class Adapter:
    """One pair of factors.

    Args:
        layer: path of the layer that they stand beside.
        key: name of the adapter in it; "" where it has but one.
        down, up: names of A and B.
        bias: name of a bias that is added to B A x and scaled like it.
        scale: s.
        alpha: name of the tensor from which the scale comes.
        explicit: whether the scale is a number of its own, whatever the rank.
    """

    layer: str
    key: str
    down: str
    up: str
    bias: str | None
    scale: float
    alpha: str | None
    explicit: bool

    @property
    def product(self) -> str:
        """Name of s B A among tensors."""
        return f"{self.up}@{self.down}"


def adapters_of(model: nn.Module) -> tuple[Adapter, ...]:
    """The adapters of a model, in its order.

    Raises:
        GraphError: factors that cannot be multiplied; names them.
    Example:
        >>> layer = nn.Module()
        >>> layer.lora_A, layer.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 4, bias=False)
        >>> layer.scaling = 0.5
        >>> [(a.down, a.up, a.scale) for a in adapters_of(layer)]
        [('lora_A.weight', 'lora_B.weight', 0.5)]
    """
    state = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    return tuple(
        _adapter(model, state, name.split("."), at)
        for name in state
        for at, part in enumerate(name.split("."))
        if part in PAIRS and not name.endswith(".bias") and _up(name.split("."), at) in state
    )


def _up(parts: list[str], at: int) -> str:
    return ".".join([*parts[:at], PAIRS[parts[at]], *parts[at + 1 :]])


def _adapter(model: nn.Module, state: Mapping[str, Tensor], parts: list[str], at: int) -> Adapter:
    down, up = ".".join(parts), _up(parts, at)
    a, b = state[down], state[up]
    if a.ndim < 2 or b.ndim < 2 or b[0].numel() != a.shape[0]:
        raise GraphError(
            f"'{up}' {tuple(b.shape)} and '{down}' {tuple(a.shape)} are factors of no product B A that is known.",
            remedy="Merge the adapters into their layers first (peft: merge_and_unload).",
        )
    layer = ".".join(parts[:at])
    key = parts[at + 1] if len(parts) > at + 1 and parts[at + 1] != "weight" else ""
    bias = up.removesuffix("weight") + "bias" if up.endswith(".weight") else None
    alpha = f"{layer}.alpha".lstrip(".")
    alpha = alpha if alpha in state and state[alpha].numel() == 1 else None
    scale, explicit = _scale(model.get_submodule(layer), key, a.shape[0], None if alpha is None else state[alpha])
    return Adapter(layer, key, down, up, bias if bias in state else None, scale, alpha, explicit)


def _scale(layer: nn.Module, key: str, rank: int, alpha: Tensor | None) -> tuple[float, bool]:
    """The factor of B A, and whether it is a number of its own."""
    own = _number(layer, ("scaling",), key)
    if own is not None:
        return own, True
    over = _number(layer, RANKS, key) or rank
    if alpha is not None:
        return float(alpha) / over, False
    named = _number(layer, ALPHAS, key)
    return 1.0 if named is None else named / over, False


def _number(layer: nn.Module, names: tuple[str, ...], key: str) -> float | None:
    for name in names:
        value = getattr(layer, name, None)
        value = value.get(key) if isinstance(value, Mapping) else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def multiplied(state: Mapping[str, Tensor], adapters: tuple[Adapter, ...]) -> State:
    """Named tensors with s B A in float64, shape (O, F), in place of each pair of factors."""
    gone = {name for a in adapters for name in (a.down, a.up, a.alpha)}
    out = {name: value for name, value in state.items() if name not in gone}
    for a in adapters:
        out[a.product] = a.scale * (state[a.up].double().flatten(1) @ state[a.down].double().flatten(1))
        if a.bias is not None:
            out[a.bias] = a.scale * state[a.bias].double()
    return out


@torch.no_grad()
def factor_(model: nn.Module, state: Mapping[str, Tensor], adapters: tuple[Adapter, ...]) -> None:
    """Load products into a model's factors, of the rank that they need and at least the one that is there.

    Raises:
        GraphError: the rank has to grow and the layer's scale depends on it; names the factors.
    """
    for a in adapters:
        down = find_tensor(model, a.down)[2]
        if a.bias is not None:
            find_tensor(model, a.bias)[2].copy_(state[a.bias] / (a.scale or 1.0))
        left, size, right = low_rank(state[a.product] / (a.scale or 1.0), 4 * down.shape[0])
        rank = len(size)
        if rank > down.shape[0] and not a.explicit and not _bears_rank(model, a, rank):
            raise GraphError(
                f"The merged factors '{a.up}' and '{a.down}' need rank {rank}, not {down.shape[0]}; the layer "
                f"'{a.layer}' does not compute the same with factors of that rank.",
                remedy=FOLD,
            )
        a_down = torch.cat([size.sqrt()[:, None] * right, down.double().flatten(1)[rank:]])
        a_up = torch.zeros(len(left), len(a_down), dtype=torch.float64)
        a_up[:, :rank] = left * size.sqrt()
        _put_factors_(model, a, a_down, a_up)


def low_rank(matrix: Tensor, guess: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a matrix without what is rounding: shapes (O, R), (R,), (R, F).

    A matrix of low rank is first brought into the space of its images of ``guess`` random vectors, which is cheaper.

    Example:
        >>> left, size, right = low_rank(torch.tensor([[3.0, 0.0], [0.0, 0.0], [4.0, 0.0]]), 1)
        >>> size.tolist(), (left * size @ right).abs().round(decimals=6).tolist()
        ([5.0], [[3.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
    """
    matrix = matrix.double()
    basis = torch.eye(len(matrix), dtype=torch.float64)
    if guess < min(matrix.shape) // 2:
        drawn = torch.randn(matrix.shape[1], guess, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = torch.linalg.qr(matrix @ drawn)[0]
        if float((matrix - found @ (found.T @ matrix)).norm()) <= 0.1 * ROUNDING * float(matrix.norm()):
            basis = found
    left, size, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    n = int((size > ROUNDING * size[:1]).sum())
    return basis @ left[:, :n], size[:n], right[:n]


def _bears_rank(model: nn.Module, a: Adapter, rank: int) -> bool:
    """Whether the layer, run by itself, computes the same with its factors filled up by zeros to a higher rank."""
    start = len(a.layer) + 1 if a.layer else 0
    layer = independent_copy(model.get_submodule(a.layer)).eval()
    own = replace(a, layer="", down=a.down[start:], up=a.up[start:])
    down, up = (find_tensor(layer, name)[2].detach() for name in (own.down, own.up))
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(down)  # noqa: E731
    x = draw(2, down.shape[1]) if down.ndim == 2 else draw(1, down.shape[1], *(2 * n for n in down.shape[2:]))
    x = torch.arange(down.shape[1], device=down.device)[None] if "embedding" in own.down else x
    more = rank - len(down)
    a_down = down.double().flatten(1)
    try:
        up.copy_(draw(*up.shape))
        a_up = torch.cat([up.flatten(1), draw(len(up), more)], 1).double()
        before = layer(x)
        _put_factors_(layer, own, torch.cat([a_down, torch.zeros(more, a_down.shape[1], dtype=torch.float64)]), a_up)
        return bool(torch.allclose(layer(x), before, rtol=1e-3, atol=1e-4 * float(before.abs().max())))
    except Exception:  # the layer's own code, called as it may not be meant to be
        return False


def _put_factors_(model: nn.Module, a: Adapter, a_down: Tensor, a_up: Tensor) -> None:
    down, up = (find_tensor(model, name)[2] for name in (a.down, a.up))
    put_tensor(down, a_down.reshape(-1, *down.shape[1:]).to(down))
    put_tensor(up, a_up.reshape(len(up), len(a_down), *up.shape[2:]).to(up))
    _tell_rank(model, a, len(a_down))


def require_same_numbers(models: Sequence[nn.Module], adapters: Sequence[Adapter]) -> None:
    """Refuse layers whose numbers differ, for one of them may scale the factors under a name that is not known.

    Raises:
        GraphError: names the layer and the number.
    """
    known = {"scaling", *ALPHAS, *RANKS}
    for a in adapters:
        tables = [
            {n: v for n, v in vars(model.get_submodule(a.layer)).items() if type(v) in (int, float) and n not in known}
            for model in models
        ]
        for name in tables[0]:
            found = [table.get(name) for table in tables]
            if any(value != found[0] for value in found):
                raise GraphError(
                    f"'{name}' of the layer '{a.layer}' is {found[0]} in one model and another number in the "
                    f"others: it may scale the factors '{a.up}' and '{a.down}'.",
                    remedy="If it does, call it 'scaling' in the layer; if not, give it one value in all models.",
                )


def _tell_rank(model: nn.Module, a: Adapter, rank: int) -> None:
    """Let modules say the rank that their tensors have."""
    for name, sizes in ((a.down, ("out_features", "out_channels")), (a.up, ("in_features", "in_channels"))):
        holder = find_tensor(model, name)[0]
        for size in sizes:
            if isinstance(getattr(holder, size, None), int) and name.endswith(".weight"):
                setattr(holder, size, rank)
    layer = model.get_submodule(a.layer)
    if a.scale and _number(layer, ("scaling",), a.key) is not None:
        _set(layer, RANKS, a.key, rank)
        _set(layer, ALPHAS, a.key, a.scale * rank)


def _set(layer: nn.Module, names: tuple[str, ...], key: str, value: float) -> None:
    for name in names:
        held: Any = getattr(layer, name, None)
        if isinstance(held, dict) and key in held:
            held[key] = value
        elif isinstance(held, int | float) and not isinstance(held, bool):
            setattr(layer, name, value)


@torch.no_grad()
def folded(model: nn.Module) -> nn.Module:
    """A copy of the same function with every s B A added to the weight beside it, and B at zero.

    Raises:
        GraphError: the weight is not found, or is decomposed (DoRA); names the factors.
    Example:
        >>> layer = nn.Module()
        >>> layer.base_layer = nn.Linear(3, 2)
        >>> layer.lora_A, layer.lora_B = nn.Linear(3, 1, bias=False), nn.Linear(1, 2, bias=False)
        >>> twin = folded(layer)
        >>> wanted = layer.base_layer.weight + layer.lora_B.weight @ layer.lora_A.weight
        >>> bool(torch.allclose(twin.base_layer.weight, wanted)), bool(twin.lora_B.weight.any())
        (True, False)
    """
    twin = independent_copy(model)
    state = twin.state_dict()
    for a in adapters_of(twin):
        start = f"{a.layer}." if a.layer else ""
        base = next((n for n in (f"{start}base_layer.weight", f"{start}weight") if n in state), None)
        decomposed = any(name.startswith(f"{start}lora_magnitude") for name in state)
        product = None if base is None else _as_weight(multiplied(state, (a,))[a.product], twin, a, state[base])
        if base is None or product is None or decomposed or a.bias is not None:
            raise GraphError(
                f"'{a.up}' and '{a.down}' cannot be folded: the weight that they are added to is not known.",
                remedy="Merge the adapters into their layers first (peft: merge_and_unload).",
            )
        state[base].copy_(state[base].double() + product)
        state[a.up].zero_()
    return twin


def _as_weight(product: Tensor, model: nn.Module, a: Adapter, weight: Tensor) -> Tensor | None:
    turned = "embedding" in a.down or bool(getattr(model.get_submodule(a.layer), "fan_in_fan_out", False))
    product = product.T if turned else product
    fits = product.shape == weight.flatten(1).shape if weight.ndim > 1 else False
    return product.reshape(weight.shape) if fits else None
