"""What models must have in common before their weights are mixed: ties, and finite numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from weightfold.errors import ConfigError, GraphError
from weightfold.weights.align import align
from weightfold.weights.canon import canonical, hash_of, same_hash, semantic_hash
from weightfold.weights.compare import untied_symmetries
from weightfold.weights.difference import difference
from weightfold.weights.disguise import disguise
from weightfold.weights.facts import facts
from weightfold.weights.merge import (
    align_all,
    average,
    dare,
    fisher,
    fisher_of,
    gate,
    grams_of,
    regmean,
    task_arithmetic,
    ties,
)
from weightfold.weights.path import between
from weightfold.weights.soft import soft
from weightfold.weights.symmetry import symmetries
from weightfold.weights.ties import owners_of, untied

TOKENS = torch.arange(24).reshape(4, 6) % 12


class LM(nn.Module):
    """A language model; ``tie``: "" or what the head shares with the embedding: a "parameter" or its "memory"."""

    def __init__(self, tie: str = "") -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        if tie == "parameter":
            self.head.weight = self.embed.weight
        if tie == "memory":
            self.head.weight = nn.Parameter(self.embed.weight.detach())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(tokens)).tanh())


class Looped(nn.Module):
    """Two layers after each other, or one that is run twice."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.second = self.first if shared else nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def drawn(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().double().clone() for name, value in model.state_dict().items()}


def assert_near(model: nn.Module, wanted: dict[str, Tensor], atol: float = 1e-6) -> None:
    for name, value in model.state_dict().items():
        assert torch.allclose(value.double(), wanted[name], atol=atol), name


PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module, Tensor]]] = {
    "parameter": lambda: (drawn(LM("parameter"), 1), drawn(LM(), 2), TOKENS),
    "memory": lambda: (drawn(LM("memory"), 1), drawn(LM(), 2), TOKENS),
    "module": lambda: (drawn(Looped(True), 1), drawn(Looped(False), 2), torch.ones(3, 6)),
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model with a tie, one without, and an input."""
    return PAIRS[request.param]()


def test_an_untied_copy_computes_the_same_and_leaves_the_model_alone(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    tied, free, x = pair
    before = owners_of(tied)
    twin = untied(tied)
    assert all(name == owner for name, owner in owners_of(twin).items())
    assert owners_of(tied) == before != owners_of(twin)
    assert torch.equal(twin(x), tied(x))
    last = list(twin.state_dict())[-1]
    with torch.no_grad():
        twin.state_dict()[last].add_(1.0)
    assert sum(not torch.equal(v, twin.state_dict()[n]) for n, v in tied.state_dict().items()) == 1
    assert untied(free) is free
    assert untied(tied, before) is tied


def test_merges_of_tied_and_untied_mix_each_name_by_itself(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    tied, free, _ = pair
    one, two = state(tied), state(free)
    mean = {n: (one[n] + two[n]) / 2 for n in one}
    for models in ([tied, free], [free, tied]):
        assert_near(average(models), mean)
        assert_near(between(*models), mean)
    assert_near(task_arithmetic(tied, [free], 2.0), {n: 2 * two[n] - one[n] for n in one})
    assert_near(task_arithmetic(free, [tied]), one)
    assert_near(ties(tied, [free], keep=1.0), two)
    assert_near(dare(tied, [free], torch.Generator(), drop=0.0), two)
    assert any("tied" in reason for reason in gate(tied, free, pair[2]).reasons)


def test_what_all_tie_stays_tied() -> None:
    a, b = drawn(LM("parameter"), 1), drawn(LM("parameter"), 2)
    merged = average([a, b])
    assert merged.head.weight is merged.embed.weight
    assert_near(merged, {n: (state(a)[n] + state(b)[n]) / 2 for n in state(a)})
    tables = [{n: torch.full_like(p, 1.0 + 2 * i) for n, p in m.named_parameters()} for i, m in enumerate((a, b))]
    assert_near(fisher([a, b], tables, floor=0.0), {n: (state(a)[n] + 3 * state(b)[n]) / 4 for n in state(a)})


def test_three_names_of_which_two_are_tied_everywhere() -> None:
    def net(also: bool) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[1].weight
        if also:
            model[1].weight = model[2].weight = model[0].weight
        return model

    a, b = drawn(net(True), 1), drawn(net(False), 2)
    for models in ([a, b], [b, a]):
        merged = average(models)
        assert merged[1].weight is merged[2].weight
        assert merged[0].weight is not merged[1].weight
        assert_near(merged, {n: (state(a)[n] + state(b)[n]) / 2 for n in state(a)})


def test_fisher_of_a_tied_model_is_refused_and_the_remedy_works() -> None:
    tied, free = drawn(LM("parameter"), 1), drawn(LM(), 2)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    tables = [fisher_of(m, loss, [TOKENS]) for m in (tied, free)]
    with pytest.raises(GraphError, match=r"'embed.weight' is tied to 'head.weight' in model 1[\s\S]*untied"):
        fisher([tied, free], tables)
    tables[0] = fisher_of(untied(tied), loss, [TOKENS])
    merged = fisher([tied, free], tables, floor=0.0)
    name = "head.weight"
    f, g = (t[name].double() for t in tables)
    assert_near(merged.head, {"weight": (f * state(tied)[name] + g * state(free)[name]) / (f + g)}, 1e-5)
    with pytest.raises(ConfigError, match=r"lacks 'head.weight'"):
        fisher([drawn(LM(), 1), free], [{n: f for n, f in tables[0].items() if n != name}, tables[1]])


def test_regmean_of_tied_and_untied_solves_only_what_is_read_as_a_layer() -> None:
    tied, free = drawn(LM("parameter"), 1), drawn(LM(), 2)
    grams = [grams_of(m, [TOKENS]) for m in (tied, free)]
    merged = regmean([tied, free], grams, shrink=1.0)
    total = grams[0]["head"] + grams[1]["head"]
    right = sum(g["head"] @ state(m)["head.weight"].T for g, m in zip(grams, (tied, free), strict=True))
    wanted = torch.linalg.lstsq(total, right).solution.T
    assert torch.allclose(merged.head.weight.double(), wanted, atol=1e-4)
    mean = (state(tied)["embed.weight"] + state(free)["embed.weight"]) / 2
    assert torch.allclose(merged.embed.weight.double(), mean, atol=1e-6)
    both = regmean([tied, tied], [grams[0]] * 2)
    assert torch.allclose(both.embed.weight, tied.embed.weight, atol=1e-6)


def test_regmean_of_one_layer_run_twice_and_two_layers_is_refused_and_the_remedy_works() -> None:
    shared, free, x = PAIRS["module"]()
    tables = [grams_of(m, [x]) for m in (shared, free)]
    with pytest.raises(ConfigError, match=r"model 1 lack 'second.0'[\s\S]*untied\(model\)"):
        regmean([shared, free], tables)
    regmean([shared, free], [grams_of(untied(shared), [x]), tables[1]])


def test_aligning_tied_and_untied_keeps_the_second_function(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    tied, free, x = pair
    for a, b in ((tied, free), (free, tied)):
        for turned in (align(a, b, x).model, align_all([a, b], x)[1]):
            assert torch.allclose(turned(x), b(x), atol=1e-4)
    assert difference(tied, untied(tied), x).moved < 1e-6


def test_a_tied_model_and_its_untied_copy_hash_alike(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    tied, _, x = pair
    twin = untied(tied)
    text = semantic_hash(tied, x)
    assert text == semantic_hash(twin, x)
    other = disguise(twin, x, torch.Generator().manual_seed(0))
    assert any(not torch.equal(p, q) for p, q in zip(other.parameters(), twin.parameters(), strict=True))
    assert torch.allclose(other(x), tied(x), atol=1e-4)
    assert same_hash(text, semantic_hash(other, x))
    assert facts(tied, x)["hash"] == text == semantic_hash(tied, x, found=symmetries(tied, x))
    assert semantic_hash(tied, x, found=untied_symmetries(tied, x)) == text
    with torch.no_grad():
        last = list(twin.parameters())[-1]
        last.reshape(-1)[0] += 0.1
    assert not same_hash(text, semantic_hash(twin, x))


class TwoPaths(nn.Module):
    """A layer that stands under two names and runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.net = nn.Sequential(self.first, nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_second_path_to_a_layer_is_no_weight() -> None:
    model, x = drawn(TwoPaths(), 3), torch.zeros(1, 4)
    assert set(untied_symmetries(model, x).shapes) == set(symmetries(model, x).shapes)
    twin = disguise(model, x, torch.Generator().manual_seed(0))
    assert not torch.equal(twin.first.weight, model.first.weight)
    assert same_hash(semantic_hash(model, x), semantic_hash(twin, x))


def test_symmetries_of_another_tie_are_not_used() -> None:
    tied, free = drawn(LM("parameter"), 1), drawn(LM(), 2)
    apart = untied_symmetries(tied, TOKENS)
    for model, found in ((tied, apart), (tied, symmetries(free, TOKENS)), (free, symmetries(tied, TOKENS))):
        for twin in (
            canonical(model, TOKENS, found=found, centre_logits=False),
            align(free, model, TOKENS, found=found).model,
        ):
            assert torch.allclose(twin(TOKENS), model(TOKENS), atol=1e-4)
    with pytest.raises(GraphError, match=r"'head.weight' is tied to 'embed.weight'[\s\S]*untied_symmetries"):
        hash_of(symmetries(tied, TOKENS), free.state_dict())
    assert same_hash(hash_of(apart, free.state_dict()), semantic_hash(free, TOKENS))
    once = {name: value for name, value in tied.state_dict().items() if name != "head.weight"}
    assert hash_of(apart, once) == semantic_hash(tied, TOKENS)


# numbers that are not finite ------------------------------------------------------------------------------------------


def mlp(seed: int) -> nn.Module:
    return drawn(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), seed)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["2.weight", "4.bias"])
def test_numbers_that_are_not_finite_are_refused_by_tensor_and_parent(number: float, name: str) -> None:
    good, bad, x = mlp(0), mlp(1), torch.zeros(1, 4)
    with torch.no_grad():
        bad.state_dict()[name].reshape(-1)[1] = number
    unit = {n: torch.ones_like(p) for n, p in good.named_parameters()}
    grams = {"2": torch.eye(8, dtype=torch.float64)}
    jobs: list[tuple[str, Callable[[], object]]] = [
        ("model 2 of 2", lambda: average([good, bad])),
        ("model 1 of 3", lambda: average([bad, good, good])),
        ("the base", lambda: task_arithmetic(bad, [good])),
        ("model 2 of 2", lambda: ties(good, [good, bad])),
        ("model 1 of 1", lambda: dare(good, [bad], torch.Generator())),
        ("model 2 of 2", lambda: fisher([good, bad], [unit, unit])),
        ("model 2 of 2", lambda: regmean([good, bad], [grams, grams])),
        ("the second model", lambda: align(good, bad, x)),
        ("the first model", lambda: align(bad, good, x, method="activations", data=[x])),
        ("the second model", lambda: soft(good, bad, x)),
        ("the first model", lambda: difference(bad, good, x)),
        ("the second model", lambda: between(good, bad)),
        ("model 2 of 2", lambda: align_all([good, bad], x)),
        ("", lambda: canonical(bad, x)),
        ("", lambda: semantic_hash(bad, x)),
    ]
    for where, job in jobs:
        with pytest.raises(GraphError, match=f"'{name}'.*{where}.*holds NaN or infinite"):
            job()
    assert gate(good, bad, x).verdict == "no"
    average([good, good])


class Masked(nn.Module):
    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) + self.mask).softmax(-1)


def test_a_mask_among_the_weights_is_told_from_a_broken_weight_and_the_remedy_works() -> None:
    with pytest.raises(GraphError, match=r"'mask' of model 1[\s\S]*persistent=False"):
        average([Masked(True), Masked(True)])
    x = torch.ones(3, 3)
    model = Masked(False)
    assert torch.allclose(average([model, copy.deepcopy(model)])(x), model(x))


# what is no channel ---------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """A language model of any vocabulary and width."""

    def __init__(self, n_words: int, width: int = 6, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_words, width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, n_words, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(tokens)).tanh())


@pytest.mark.parametrize("width", [6, 8])
def test_vocabularies_and_classes_are_never_mixed(width: int) -> None:
    x = torch.arange(6)[None]
    a, b = drawn(Words(12), 1), drawn(Words(14, width), 2)
    with pytest.raises(GraphError, match=r"'embed.weight' has 12 entries in dimension 0[\s\S]*vocabulary"):
        soft(a, b, x)
    assert gate(a, b, x).verdict == "no"
    assert "no channels" in gate(a, b, x).reasons[0]
    pairs = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (3, 5)]
    assert gate(*pairs, torch.zeros(1, 4)).verdict == "no"
    with torch.no_grad():  # the remedy: the same words, entry by entry
        short = drawn(Words(12, width), 2)
        short.embed.weight.copy_(b.embed.weight[:12])
    assert soft(a, short, x).embed.weight.shape == (12, 6)


def test_words_keep_their_rows_when_models_are_aligned() -> None:
    x = torch.arange(6)[None]
    a, b = drawn(Words(12), 1), drawn(Words(12), 2)
    with torch.no_grad():
        b.embed.weight.copy_(a.embed.weight.flip(0))
        b.head.weight.copy_(a.head.weight.flip(0))
    turned = align(a, b, x).model
    assert torch.allclose(turned(x), b(x), atol=1e-5)
    norms = [m.embed.weight.norm(dim=1) for m in (turned, b)]
    assert torch.allclose(*norms, atol=1e-5)


def test_tied_models_of_other_widths_are_refused_and_the_remedy_works() -> None:
    x = torch.arange(6)[None]
    a, b = drawn(Words(12, 6, tie=True), 1), drawn(Words(12, 8, tie=True), 2)
    with pytest.raises(GraphError, match=r"tied weights[\s\S]*untied\(model\)"):
        soft(a, b, x)
    assert soft(untied(a), untied(b), x).head.weight.shape == (12, 6)
