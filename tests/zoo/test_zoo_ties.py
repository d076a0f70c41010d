"""Tied models and their untied copies in one zoo: one function, packed and read back to the bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightfold.weights.canon import same_hash
from weightfold.weights.disguise import disguise
from weightfold.weights.ties import untied
from weightfold.zoo.kin.dedupe import dedupe
from weightfold.zoo.kin.families import items_of
from weightfold.zoo.pack import pack
from weightfold.zoo.store import Zoo

from .conftest import equal

TOKENS = torch.arange(6)[None]


class LM(nn.Module):
    """A small language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(tokens)).tanh())


def made(seed: int) -> nn.Module:
    model, generator = LM(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return model


def test_a_tied_model_and_its_untied_copies_are_one_function_and_pack_to_the_bit(zoo: Zoo) -> None:
    tied = made(0)
    free = untied(tied)
    models = {
        "tied": tied,
        "turned": disguise(tied, TOKENS, torch.Generator().manual_seed(1)),
        "free": disguise(free, TOKENS, torch.Generator().manual_seed(2)),
        "other": made(3),
    }
    states = {name: {n: t.detach().clone() for n, t in m.state_dict().items()} for name, m in models.items()}
    for name, model in models.items():
        zoo.add(model, name=name, example=TOKENS)
    hashes = {name: zoo.card(name).semantic_hash for name in models}
    assert all(text is not None for text in hashes.values())
    assert all(same_hash(str(hashes["tied"]), str(hashes[name])) for name in ("turned", "free"))
    assert not same_hash(str(hashes["tied"]), str(hashes["other"]))
    groups = dedupe(items_of(zoo), level="rescaled")
    assert [(g.keeper, {c.name for c in g.copies}) for g in groups] == [("tied", {"turned", "free"})]
    pack(zoo)
    for name, state in states.items():
        assert equal(zoo.state(name), dict(sorted(state.items()))), name
