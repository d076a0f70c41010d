"""What each family promises about its layout, beyond shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightfold.models import Classes, ImageInput, NextToken, TaskSpec, TextInput, build
from weightfold.models.attention import Attention
from weightfold.models.resnet20 import option_a

DIGITS = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
MNIST = TaskSpec(input=ImageInput(channels=1, height=28, width=28), output=Classes(n=10))
CIFAR = TaskSpec(input=ImageInput(channels=3, height=32, width=32), output=Classes(n=10))
TEXT = TaskSpec(input=TextInput(vocab=9, context=12), output=NextToken(vocab=9))


def n_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    # He et al. 2016, table 6: 0.27 M; exactly 269,722 with option A. LeNet-5 with full connection between its
    # convolutions: 61,706. Page 2018: 6.57 M.
    assert n_parameters(build("resnet20", CIFAR)) == 269_722
    assert n_parameters(build("resnet20", CIFAR, depth=56)) == 853_018
    assert n_parameters(build("lenet5", MNIST)) == 61_706
    assert n_parameters(build("resnet9", CIFAR, width=64)) == 6_573_130


def test_the_mlp_is_over_wide_for_images_only() -> None:
    model = build("mlp", DIGITS)
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [1024, 1024, 10]
    assert [m.out_features for m in build("mlp", DIGITS, width=7, depth=3).modules() if isinstance(m, nn.Linear)] == [
        7,
        7,
        7,
        10,
    ]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_agrees_with_the_equation_in_float64(causal: bool) -> None:
    attention = Attention(width=12, num_heads=3, causal=causal).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = attention.qkv.weight.view(3, 3, 4, 12), attention.qkv.bias.view(3, 3, 4)
    heads = []
    for head in range(3):
        query, key, value = (F.linear(x, rows[0][part, head], rows[1][part, head]) for part in range(3))
        logits = query @ key.transpose(1, 2) / 4**0.5
        if causal:
            logits = logits.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
        heads.append(logits.softmax(-1) @ value)
    expected = attention.proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x), expected)


def test_attention_stays_right_after_a_head_is_taken_out() -> None:
    attention = Attention(width=12, num_heads=3, causal=False)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention.proj.weight[:, 4:8] = 0  # nothing reads head 1
    expected = attention(x)
    keep = torch.tensor([i for i in range(36) if i % 12 not in range(4, 8)])
    attention.qkv.weight = nn.Parameter(attention.qkv.weight[keep])
    attention.qkv.bias = nn.Parameter(attention.qkv.bias[keep])
    attention.proj.weight = nn.Parameter(attention.proj.weight[:, [0, 1, 2, 3, 8, 9, 10, 11]])
    attention.num_heads = 2
    torch.testing.assert_close(attention(x), expected)


def test_attention_stays_right_after_silent_channels_of_its_heads_are_taken_out() -> None:
    attention = Attention(width=12, num_heads=3, causal=False)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    last = torch.arange(3, 36, 4)
    with torch.no_grad():
        attention.qkv.weight[last] = 0
        attention.qkv.bias[last] = 0
    expected = attention(x)
    keep = torch.tensor([i for i in range(36) if i % 4 != 3])
    attention.qkv.weight = nn.Parameter(attention.qkv.weight[keep])
    attention.qkv.bias = nn.Parameter(attention.qkv.bias[keep])
    attention.proj.weight = nn.Parameter(attention.proj.weight[:, [i for i in range(12) if i % 4 != 3]])
    attention.head_dim = 3
    torch.testing.assert_close(attention(x), expected)


def test_char_gpt_never_looks_ahead() -> None:
    model = build("char-gpt", TEXT, width=16, depth=2, num_heads=2).eval()
    tokens = torch.randint(9, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 9
    with torch.no_grad():
        before, after = model(tokens), model(changed)
        shorter = model(tokens[:, :7])
    torch.testing.assert_close(before[:, :7], after[:, :7])
    torch.testing.assert_close(before[:, :7], shorter)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_a_tied_head_is_the_embedding_itself() -> None:
    tied, untied = (build("char-gpt", TEXT, tied=tied) for tied in (True, False))
    assert "head.weight" not in tied.state_dict()
    assert n_parameters(untied) - n_parameters(tied) == 128 * 9 + 9


def option_a_by_hand(x: Tensor, n_out: int) -> Tensor:
    out = torch.zeros(x.shape[0], n_out, x.shape[2] // 2, x.shape[3] // 2)
    front = (n_out - x.shape[1]) // 2
    for channel in range(x.shape[1]):
        out[:, front + channel] = x[:, channel, ::2, ::2]
    return out


@pytest.mark.parametrize(("n_in", "n_out"), [(16, 32), (15, 31), (7, 12), (5, 5)])
def test_the_shortcut_follows_the_channels_it_meets(n_in: int, n_out: int) -> None:
    x = torch.randn(2, n_in, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(option_a(x, torch.empty(2, n_out, 2, 2), 2), option_a_by_hand(x, n_out))


def test_a_resnet_runs_after_its_streams_were_narrowed_in_place() -> None:
    model = build("resnet20", CIFAR, width=4, depth=8)
    wide = build("resnet20", CIFAR, width=5, depth=8)
    narrowed = {name: value.shape for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, tensor in [*wide.named_parameters(), *wide.named_buffers()]:
            owner, _, leaf = name.rpartition(".")
            smaller = tensor[tuple(slice(n) for n in narrowed[name])].clone()
            parameter = isinstance(tensor, nn.Parameter)
            setattr(wide.get_submodule(owner), leaf, nn.Parameter(smaller) if parameter else smaller)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.load_state_dict(wide.state_dict())
    torch.testing.assert_close(wide.eval()(x), model.eval()(x))


def test_a_gru_reads_an_image_from_top_to_bottom() -> None:
    model = build("gru", CIFAR, width=6).eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([x[:, :, row].flatten(1) for row in range(32)], dim=1)
    torch.testing.assert_close(model.get_submodule("sequence")(x), rows)
