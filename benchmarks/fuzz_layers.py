"""The table of pieces for sequences and images. `fuzz_core` says how one is written."""

from __future__ import annotations

import math

import torch
from fuzz_core import IMAGE, SEQUENCE, VECTOR, Made, Pick, Shape, block, io_block, piece, weight
from torch import Tensor, nn
from torch.nn import functional as F

# sequences ------------------------------------------------------------------------------------------------------------


@piece(SEQUENCE)
def norm_of_sequence(p: Pick, s: Shape) -> Made:
    norm = p.of(
        [nn.LayerNorm(s.c), nn.RMSNorm(s.c), nn.LayerNorm(s.c, elementwise_affine=False), nn.LayerNorm(s.c, bias=False)]
    )
    return block(lambda m, x: m.norm(x), norm=norm), s


@piece(SEQUENCE)
def rms_norm_by_hand(p: Pick, s: Shape) -> Made:
    run = lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale  # noqa: E731
    return block(run, scale=weight(s.c)), s


@piece(SEQUENCE)
def batch_norm_of_sequence(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: m.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.BatchNorm1d(s.c)), s


@piece(SEQUENCE)
def gated_mlp(p: Pick, s: Shape) -> Made:
    c = p.width()
    run = lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x))  # noqa: E731
    return block(run, gate=nn.Linear(s.c, c), up=nn.Linear(s.c, c, bias=False), down=nn.Linear(c, s.c)), s


@piece(SEQUENCE)
def fused_gated_mlp(p: Pick, s: Shape) -> Made:
    c = p.width()

    def run(m: nn.Module, x: Tensor) -> Tensor:
        a, b = m.up(x).chunk(2, -1)
        return m.down(F.gelu(a) * b)

    return block(run, up=nn.Linear(s.c, 2 * c), down=nn.Linear(c, s.c)), s


def _heads(x: Tensor, n: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)


@piece(SEQUENCE, weight=2)
def attention_by_hand(p: Pick, s: Shape) -> Made:
    n, d = p.of([1, 2, 3]), p.of([2, 4])
    causal, scaled, biased = p.chance(), p.chance(), p.chance(0.3)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = _heads(m.q(x), n), _heads(m.k(x), n), _heads(m.v(x), n)
        scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scaled else 0.5)
        scores = scores + m.bias[:, None, None] if biased else scores
        if causal:
            scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
        return m.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))

    q, k, v = (nn.Linear(s.c, n * d, bias=p.chance()) for _ in range(3))
    return block(run, q=q, k=k, v=v, o=nn.Linear(n * d, s.c), bias=weight(n)), s


@piece(SEQUENCE, weight=2)
def fused_attention(p: Pick, s: Shape) -> Made:
    n, d, causal, scale = p.of([1, 2]), p.of([2, 4]), p.chance(), p.of([None, 0.4])

    def run(m: nn.Module, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = m.qkv(x).reshape(b, t, 3, n, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        return m.o(y.transpose(1, 2).flatten(2))

    return block(run, qkv=nn.Linear(s.c, 3 * n * d), o=nn.Linear(n * d, s.c)), s


@piece(SEQUENCE)
def grouped_query_attention(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = _heads(m.q(x), 4), _heads(m.k(x), 2), _heads(m.v(x), 2)
        if m.native:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return m.o(y.transpose(1, 2).flatten(2))

    q, k, v = nn.Linear(s.c, 8), nn.Linear(s.c, 4), nn.Linear(s.c, 4)
    return block(run, q=q, k=k, v=v, o=nn.Linear(8, s.c), native=p.chance()), s


@piece(SEQUENCE)
def rotary_attention(p: Pick, s: Shape) -> Made:
    n, d = 2, 4

    def turned(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.1]).to(x.dtype)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def run(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (_heads(part, n) for part in m.qkv(x).split(n * d, -1))
        y = F.scaled_dot_product_attention(turned(q), turned(k), v)
        return m.o(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))

    return block(run, qkv=nn.Linear(s.c, 3 * n * d), o=nn.Linear(n * d, s.c)), s


@piece(SEQUENCE, needs=("mask",))
def masked_attention(p: Pick, s: Shape) -> Made:
    n = 2

    def run(m: nn.Module, x: Tensor, io: object) -> Tensor:
        q, k, v = _heads(m.q(x), n), _heads(m.k(x), n), _heads(m.v(x), n)
        mask = io.inputs["mask"][:, : x.shape[1]][:, None, None]
        if m.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = (q @ k.transpose(-2, -1)).masked_fill(~mask, -1e9).softmax(-1) @ v
        return m.o(y.transpose(1, 2).flatten(2))

    q, k, v = (nn.Linear(s.c, 8) for _ in range(3))
    return io_block(run, q=q, k=k, v=v, o=nn.Linear(8, s.c), fused=p.chance()), s


@piece(SEQUENCE, multiple=2, needs=("mask",), weight=2)
def multihead_attention(p: Pick, s: Shape) -> Made:
    how = p.of(["plain", "weights", "mask", "float mask", "padding"])

    def run(m: nn.Module, x: Tensor, io: object) -> Tensor:
        t = x.shape[1]
        causal = torch.ones(t, t).triu(1).bool()
        if how == "mask":
            return m.attend(x, x, x, attn_mask=causal, need_weights=False)[0]
        if how == "float mask":
            table = torch.zeros(t, t, dtype=x.dtype).masked_fill(causal, float("-inf"))
            return m.attend(x, x, x, attn_mask=table, need_weights=False)[0]
        if how == "padding":
            return m.attend(x, x, x, key_padding_mask=~io.inputs["mask"][:, :t], need_weights=False)[0]
        y, w = m.attend(x, m.memory(x), m.memory(x), need_weights=how == "weights")
        if w is not None:
            io.outputs.append(w)
        return y

    kwargs = {"bias": p.chance(0.7), "add_bias_kv": p.chance(0.2)}
    attend = nn.MultiheadAttention(s.c, 2, batch_first=True, **kwargs)
    return io_block(run, attend=attend, memory=nn.Linear(s.c, s.c)), s


@piece(SEQUENCE, multiple=2, needs=("mask",), weight=2)
def transformer_layer(p: Pick, s: Shape) -> Made:
    how = p.of(["plain", "causal", "padding"])
    layer = nn.TransformerEncoderLayer(
        s.c, 2, p.width(), 0.1, p.of(["relu", "gelu"]), batch_first=True, norm_first=p.chance()
    )

    def run(m: nn.Module, x: Tensor, io: object) -> Tensor:
        t = x.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(t).to(x.dtype) if how == "causal" else None
        padding = ~io.inputs["mask"][:, :t] if how == "padding" else None
        return m.layer(x, src_mask=causal, src_key_padding_mask=padding)

    return io_block(run, layer=layer), s


@piece(SEQUENCE, multiple=2)
def decoder_layer(p: Pick, s: Shape) -> Made:
    layer = nn.TransformerDecoderLayer(s.c, 2, p.width(), 0.1, batch_first=True)
    return block(lambda m, x: m.layer(x, torch.tanh(m.memory(x))), layer=layer, memory=nn.Linear(s.c, s.c)), s


@piece(SEQUENCE)
def latent_queries(p: Pick, s: Shape) -> Made:
    c = p.width()
    run = lambda m, x: torch.softmax(m.latents @ m.k(x).transpose(1, 2), -1) @ m.v(x)  # noqa: E731
    return block(run, latents=weight(4, c), k=nn.Linear(s.c, c), v=nn.Linear(s.c, c)), Shape(SEQUENCE, c, (4,))


@piece(SEQUENCE)
def linear_attention(p: Pick, s: Shape) -> Made:
    c = p.width()

    def run(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1, m.v(x)
        summed = torch.einsum("btk,btv->bkv", k, v)
        return torch.einsum("btk,bkv->btv", q, summed) / (torch.einsum("btk,bk->bt", q, k.sum(1)) + 1)[..., None]

    return block(run, q=nn.Linear(s.c, c), k=nn.Linear(s.c, c), v=nn.Linear(s.c, c)), s.wide(c)


@piece(SEQUENCE, weight=3)
def recurrent(p: Pick, s: Shape) -> Made:
    c, layers, both = p.width(), p.of([1, 1, 2]), p.chance(0.3)
    kind = p.of([nn.LSTM, nn.GRU, nn.RNN])
    settings = {"proj_size": 2} if kind is nn.LSTM and p.chance(0.2) else {}
    settings |= {"nonlinearity": p.of(["tanh", "relu"])} if kind is nn.RNN else {}
    rnn = kind(s.c, c, layers, batch_first=True, bidirectional=both, bias=p.chance(0.8), **settings)
    return block(lambda m, x: m.rnn(x)[0], rnn=rnn), s.wide(settings.get("proj_size", c) * (1 + both))


@piece(SEQUENCE)
def last_state(p: Pick, s: Shape) -> Made:
    c = p.width()
    if p.chance():
        return block(lambda m, x: m.rnn(x)[1][-1], rnn=nn.GRU(s.c, c, p.of([1, 2]), batch_first=True)), Shape(VECTOR, c)
    return block(lambda m, x: m.rnn(x)[1][1][-1], rnn=nn.LSTM(s.c, c, batch_first=True)), Shape(VECTOR, c)


@piece(SEQUENCE)
def encoder_decoder(p: Pick, s: Shape) -> Made:
    c = p.width()

    def run(m: nn.Module, x: Tensor) -> Tensor:
        _, state = m.encode(x)
        return m.decode(x.flip(1), state)[0]

    kind = p.of([nn.GRU, nn.LSTM])
    return block(run, encode=kind(s.c, c, batch_first=True), decode=kind(s.c, c, batch_first=True)), s.wide(c)


@piece(SEQUENCE)
def cell_over_time(p: Pick, s: Shape) -> Made:
    c = p.width()

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h, seen = x.new_zeros(x.shape[0], c), []
        for t in range(x.shape[1]):
            h = m.cell(x[:, t], h)
            seen.append(h)
        return torch.stack(seen, 1)

    return block(run, cell=p.of([nn.GRUCell, nn.RNNCell])(s.c, c)), s.wide(c)


@piece(SEQUENCE, least=3)
def conv_over_time(p: Pick, s: Shape) -> Made:
    c, groups = p.width(), 2 if s.c % 2 == 0 and p.chance(0.3) else 1
    if p.chance():
        conv = nn.Conv1d(s.c, c, 3, groups=groups)
        return block(lambda m, x: m.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2), conv=conv), s.wide(c)
    conv = nn.Conv1d(
        s.c, c, 3, padding=2, dilation=2, groups=groups, padding_mode=p.of(["zeros", "replicate", "circular"])
    )
    return block(lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2), conv=conv), s.wide(c)


@piece(SEQUENCE)
def transposed_conv_over_time(p: Pick, s: Shape) -> Made:
    c = p.width()
    conv = nn.ConvTranspose1d(s.c, c, 2, stride=2, groups=2 if s.c % 2 == 0 and p.chance(0.4) else 1)
    return block(lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2)[:, : x.shape[1]], conv=conv), s.wide(c)


@piece(SEQUENCE)
def depthwise_over_time(p: Pick, s: Shape) -> Made:
    conv = nn.Conv1d(s.c, s.c, 3, padding=1, groups=s.c)
    return block(lambda m, x: F.silu(m.conv(x.mT).mT), conv=conv), s


@piece(SEQUENCE)
def token_mixing(p: Pick, s: Shape) -> Made:
    t, c = s.size[0], p.width()
    run = lambda m, x: x + m.two(F.gelu(m.one(x.transpose(1, 2)))).transpose(1, 2)  # noqa: E731
    return block(run, one=nn.Linear(t, c), two=nn.Linear(c, t)), s


@piece(SEQUENCE)
def learned_positions(p: Pick, s: Shape) -> Made:
    if p.chance():
        return block(lambda m, x: x + m.table, table=weight(1, s.size[0], s.c)), s
    return block(lambda m, x: x + m.table(torch.arange(x.shape[1])), table=nn.Embedding(9, s.c)), s


@piece(SEQUENCE)
def fixed_positions(p: Pick, s: Shape) -> Made:
    table = torch.sin(torch.arange(s.size[0])[:, None] * torch.rand(s.c))
    return block(lambda m, x: x + m.table, table=table), s


@piece(SEQUENCE)
def class_token(p: Pick, s: Shape) -> Made:
    run = lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1)  # noqa: E731
    return block(run, token=weight(1, 1, s.c)), Shape(SEQUENCE, s.c, (s.size[0] + 1,))


@piece(SEQUENCE)
def over_time(p: Pick, s: Shape) -> Made:
    run = p.of([
        lambda m, x: x.cumsum(1), lambda m, x: x.flip(1), lambda m, x: torch.roll(x, 1, 1), lambda m, x: x.softmax(1),
        lambda m, x: x - x.mean(1, keepdim=True), lambda m, x: x.sort(1).values, lambda m, x: x[:, m.order],
        lambda m, x: x.index_select(1, m.order), lambda m, x: x / x.shape[1], lambda m, x: torch.fft.fft(x, dim=1).real,
        lambda m, x: F.normalize(x, dim=1), lambda m, x: x * x.amax(1, keepdim=True), lambda m, x: x.mT.contiguous().mT,
        lambda m, x: torch.einsum("btc,ts->bsc", x, m.mix), lambda m, x: torch.bmm(m.mix.expand(x.shape[0], -1, -1), x),
        lambda m, x: x.gather(1, m.order[None, :, None].expand(x.shape[0], -1, x.shape[2])),
    ])  # fmt: skip
    order = torch.tensor(p.random.sample(range(s.size[0]), s.size[0]))
    return block(run, order=order, mix=weight(s.size[0], s.size[0])), s


@piece(SEQUENCE)
def state_space(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h, seen = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = h * torch.sigmoid(m.decay) + x[:, t] * m.into
            seen.append(h)
        return torch.stack(seen, 1)

    return block(run, decay=weight(s.c), into=weight(s.c)), s


@piece(SEQUENCE, weight=2)
def sequence_to_vector(p: Pick, s: Shape) -> Made:
    run = p.of([
        lambda m, x: x.mean(1), lambda m, x: x[:, -1], lambda m, x: x.amax(1), lambda m, x: x.sum(1) / x.shape[1],
        lambda m, x: (m.score(x).softmax(1) * x).sum(1), lambda m, x: x.max(dim=1)[0],
        lambda m, x: torch.einsum("bt,btc->bc", m.score(x)[..., 0].softmax(-1), x),
    ])  # fmt: skip
    return block(run, score=nn.Linear(s.c, 1)), Shape(VECTOR, s.c)


@piece(SEQUENCE)
def flat_sequence(p: Pick, s: Shape) -> Made:
    c = p.width()
    run = lambda m, x: m.read(x.flatten(1))  # noqa: E731
    if p.chance():
        run = lambda m, x: m.read(x.transpose(1, 2).reshape(x.shape[0], -1))  # noqa: E731
    return block(run, read=nn.Linear(s.c * s.size[0], c)), Shape(VECTOR, c)


@piece(SEQUENCE, needs=("mask",))
def masked_mean(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor, io: object) -> Tensor:
        mask = io.inputs["mask"][:, : x.shape[1], None].to(x.dtype)
        return (x * mask).sum(1) / mask.sum(1)

    return io_block(run), Shape(VECTOR, s.c)


@piece(SEQUENCE)
def sequence_to_image(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x.transpose(1, 2).unsqueeze(-1)), Shape(IMAGE, s.c, (s.size[0], 1))


# images ---------------------------------------------------------------------------------------------------------------


def _reach(s: Shape, reach: int) -> tuple[int, int]:
    """A padding that may reflect: no longer than the image is."""
    return tuple(reach if n > reach else 0 for n in s.size)


@piece(IMAGE, weight=4)
def conv(p: Pick, s: Shape) -> Made:
    c, mode = p.width(), p.of(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
    if min(s.size) < 3:
        return block(lambda m, x: m.conv(x), conv=nn.Conv2d(s.c, c, 1)), s.wide(c)
    layer = nn.Conv2d(s.c, c, 3, padding=1, bias=p.chance(0.7), padding_mode=mode)
    return block(lambda m, x: m.conv(x), conv=layer), s.wide(c)


@piece(IMAGE, least=4)
def strided_conv(p: Pick, s: Shape) -> Made:
    c = p.width()
    return block(lambda m, x: m.conv(x), conv=nn.Conv2d(s.c, c, 2, stride=2)), Shape(
        IMAGE, c, tuple(n // 2 for n in s.size)
    )


@piece(IMAGE, least=3)
def dilated_conv(p: Pick, s: Shape) -> Made:
    c = p.width()
    return block(lambda m, x: m.conv(x), conv=nn.Conv2d(s.c, c, 3, padding=2, dilation=2)), s.wide(c)


@piece(IMAGE, multiple=2, weight=2)
def grouped_conv(p: Pick, s: Shape) -> Made:
    c = p.width(even=True)
    groups = p.of([g for g in (2, 3, 4) if s.c % g == 0 and c % g == 0 and s.c > g])
    return block(lambda m, x: m.conv(x), conv=nn.Conv2d(s.c, c, 3, padding=1, groups=groups)), s.wide(c)


@piece(IMAGE, weight=2)
def depthwise_conv(p: Pick, s: Shape) -> Made:
    times = p.of([1, 1, 2])
    return block(lambda m, x: m.conv(x), conv=nn.Conv2d(s.c, times * s.c, 3, padding=1, groups=s.c)), s.wide(
        times * s.c
    )


@piece(IMAGE)
def separable_conv(p: Pick, s: Shape) -> Made:
    c = p.width()
    parts = {
        "deep": nn.Conv2d(s.c, s.c, 3, padding=1, groups=s.c),
        "norm": nn.BatchNorm2d(s.c),
        "point": nn.Conv2d(s.c, c, 1),
    }
    return block(lambda m, x: m.point(F.relu6(m.norm(m.deep(x)))), **parts), s.wide(c)


@piece(IMAGE)
def transposed_conv(p: Pick, s: Shape) -> Made:
    c = p.width(even=True)
    groups = p.of([1, 1, 2, s.c]) if s.c % 2 == 0 else 1
    c = s.c if groups == s.c else c
    run = lambda m, x: m.conv(x)[..., : x.shape[2], : x.shape[3]]  # noqa: E731
    return block(run, conv=nn.ConvTranspose2d(s.c, c, 2, stride=2, groups=groups)), s.wide(c)


@piece(IMAGE)
def conv_in_3d(p: Pick, s: Shape) -> Made:
    c = p.width()
    deep = p.of(
        [nn.Conv3d(s.c, c, (2, 1, 1)), nn.ConvTranspose3d(s.c, c, (2, 1, 1)), nn.Conv3d(s.c, c, (2, 1, 1), bias=False)]
    )
    norm = p.of([nn.BatchNorm3d(c), nn.InstanceNorm3d(c), nn.Identity()]) if min(s.size) > 1 else nn.Identity()
    run = lambda m, x: m.norm(m.conv(torch.stack([x, x.flip(-1)], 2))).mean(2)  # noqa: E731
    return block(run, conv=deep, norm=norm), s.wide(c)


@piece(IMAGE)
def conv_over_rows(p: Pick, s: Shape) -> Made:
    c = p.width()

    def run(m: nn.Module, x: Tensor) -> Tensor:
        b, h = x.shape[0], x.shape[2]
        rows = m.conv(x.transpose(1, 2).reshape(b * h, x.shape[1], x.shape[3]))
        return rows.view(b, h, *rows.shape[1:]).transpose(1, 2)

    return block(run, conv=nn.Conv1d(s.c, c, 1)), s.wide(c)


@piece(IMAGE, weight=4)
def batch_norm(p: Pick, s: Shape) -> Made:
    norm = nn.BatchNorm2d(s.c, affine=p.chance(0.8), track_running_stats=p.chance(0.85))
    return block(lambda m, x: m.norm(x), norm=norm), s


@piece(IMAGE)
def instance_norm(p: Pick, s: Shape) -> Made:
    if s.size[0] * s.size[1] == 1:
        return block(lambda m, x: x), s
    norm = nn.InstanceNorm2d(s.c, affine=p.chance(), track_running_stats=p.chance(0.3))
    return block(lambda m, x: m.norm(x), norm=norm), s


@piece(IMAGE, multiple=2, weight=2)
def group_norm(p: Pick, s: Shape) -> Made:
    groups = p.of([g for g in (1, 2, 3, 4, s.c) if s.c % g == 0 and g * s.size[0] * s.size[1] < s.c * 99])
    return block(lambda m, x: m.norm(x), norm=nn.GroupNorm(groups, s.c, affine=p.chance(0.8))), s


@piece(IMAGE)
def layer_norm_of_image(p: Pick, s: Shape) -> Made:
    how = p.of(["last", "all", "space"])
    if how == "last":
        return block(lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(s.c)), s
    norm = nn.LayerNorm((s.c, *s.size)) if how == "all" else nn.LayerNorm(s.size)
    return block(lambda m, x: m.norm(x), norm=norm), s


@piece(IMAGE)
def local_response_norm(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: F.local_response_norm(x, 3)), s


@piece(IMAGE)
def prelu_of_image(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: m.act(x), act=nn.PReLU(s.c)), s


@piece(IMAGE, least=4, weight=2)
def pool(p: Pick, s: Shape) -> Made:
    layer = p.of(
        [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(2), nn.LPPool2d(2, 2)]
    )
    size = (2, 2) if "Adaptive" in type(layer).__name__ else tuple(n // 2 for n in s.size)
    return block(lambda m, x: m.pool(x), pool=layer), Shape(IMAGE, s.c, size)


@piece(IMAGE)
def pool_in_place(p: Pick, s: Shape) -> Made:
    run = p.of([lambda m, x: F.max_pool2d(x, 3, 1, 1), lambda m, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)])
    return block(run), s


@piece(IMAGE)
def squeeze_excite(p: Pick, s: Shape) -> Made:
    c = p.width()
    run = lambda m, x: x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3))))))[:, :, None, None]  # noqa: E731
    return block(run, down=nn.Linear(s.c, c), up=nn.Linear(c, s.c)), s


@piece(IMAGE)
def conv_over_channels(p: Pick, s: Shape) -> Made:
    run = lambda m, x: x * m.slide(x.mean((2, 3))[:, None])[:, 0, :, None, None].sigmoid()  # noqa: E731
    return block(run, slide=nn.Conv1d(1, 1, 3, padding=1)), s


@piece(IMAGE)
def spatial_attention(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(m.where(seen))

    return block(run, where=nn.Conv2d(2, 1, 3, padding=1)), s


@piece(IMAGE)
def interpolate(p: Pick, s: Shape) -> Made:
    mode = p.of(["nearest", "bilinear", "bicubic", "area"])
    size = tuple(min(2 * n, 8) for n in s.size)
    return block(lambda m, x: F.interpolate(x, size, mode=mode)), Shape(IMAGE, s.c, size)


@piece(IMAGE, multiple=4)
def pixel_shuffle(p: Pick, s: Shape) -> Made:
    size = tuple(2 * n for n in s.size)
    return block(lambda m, x: F.avg_pool2d(F.pixel_shuffle(x, 2), 2)), Shape(IMAGE, s.c // 4, s.size) if size else s


@piece(IMAGE, least=4)
def pixel_unshuffle(p: Pick, s: Shape) -> Made:
    if any(n % 2 for n in s.size):
        return block(lambda m, x: x), s
    c = p.width()
    run = lambda m, x: m.mix(F.pixel_unshuffle(x, 2))  # noqa: E731
    return block(run, mix=nn.Conv2d(4 * s.c, c, 1)), Shape(IMAGE, c, tuple(n // 2 for n in s.size))


@piece(IMAGE)
def padded(p: Pick, s: Shape) -> Made:
    mode = p.of(["constant", "reflect", "replicate", "circular"])
    a, b = _reach(s, 1)
    value = p.of([0.0, 0.5])
    kwargs = {"value": value} if mode == "constant" else {}
    run = lambda m, x: m.conv(F.pad(x, (b, b, a, a), mode=mode, **kwargs))  # noqa: E731
    return block(run, conv=nn.Conv2d(s.c, s.c, (2 * a + 1, 2 * b + 1))), s


@piece(IMAGE)
def padded_channels(p: Pick, s: Shape) -> Made:
    run = p.of([lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1)), lambda m, x: torch.cat([x, torch.zeros_like(x[:, :2])], 1)])
    return block(run), s.wide(s.c + 2)


@piece(IMAGE, multiple=2)
def channel_shuffle(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)

    return block(p.of([run, lambda m, x: F.channel_shuffle(x, 2)])), s


@piece(IMAGE)
def unfolded(p: Pick, s: Shape) -> Made:
    c = p.width()

    def run(m: nn.Module, x: Tensor) -> Tensor:
        read = m.read(F.unfold(x, 3, padding=1).transpose(1, 2))
        return read.mT.reshape(x.shape[0], -1, *x.shape[2:])

    return block(run, read=nn.Linear(9 * s.c, c)), s.wide(c)


@piece(IMAGE)
def coordinates(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h, dtype=x.dtype)[None, None, :, None].expand(b, 1, h, w)
        return m.mix(torch.cat([x, rows], 1))

    return block(run, mix=nn.Conv2d(s.c + 1, s.c, 1)), s


@piece(IMAGE)
def inverted_residual(p: Pick, s: Shape) -> Made:
    c = p.width(even=True)
    parts = {
        "up": nn.Conv2d(s.c, c, 1, bias=False), "n1": nn.BatchNorm2d(c), "n2": nn.BatchNorm2d(c),
        "n3": nn.BatchNorm2d(s.c),
        "deep": nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False), "down": nn.Conv2d(c, s.c, 1, bias=False),
    }  # fmt: skip
    run = lambda m, x: x + m.n3(m.down(F.hardswish(m.n2(m.deep(F.silu(m.n1(m.up(x))))))))  # noqa: E731
    return block(run, **parts), s


@piece(IMAGE)
def table_of_places(p: Pick, s: Shape) -> Made:
    shape = p.of([(s.c, *s.size), (s.c, 1, 1), (1, *s.size)])
    return block(lambda m, x: x + m.table, table=weight(*shape)), s


@piece(IMAGE)
def standardised_conv(p: Pick, s: Shape) -> Made:
    c = p.width()

    def run(m: nn.Module, x: Tensor) -> Tensor:
        w = m.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-4).sqrt()
        return F.conv2d(x, w, m.conv.bias, padding=1)

    return block(run, conv=nn.Conv2d(s.c, c, 3, padding=1)), s.wide(c)


@piece(IMAGE)
def over_space(p: Pick, s: Shape) -> Made:
    run = p.of([
        lambda m, x: x.flatten(2).softmax(-1).view_as(x), lambda m, x: torch.roll(x, (1, 1), (2, 3)),
        lambda m, x: x.flip(-1) + x, lambda m, x: x / (1 + x.norm(p=2, dim=(2, 3), keepdim=True)),
        lambda m, x: x * (1 + x.mean((2, 3), keepdim=True)), lambda m, x: torch.rot90(x, 2, (2, 3)),
        lambda m, x: x - x.amin((2, 3), keepdim=True), lambda m, x: x / (x.shape[2] * x.shape[3]),
        lambda m, x: torch.fft.rfft2(x).abs().mean((2, 3), keepdim=True) * x,
        lambda m, x: x + x.std((2, 3), keepdim=True, correction=0),
    ])  # fmt: skip
    return block(run), s


@piece(IMAGE)
def shifted_channels(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        a, b = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        return torch.cat([a.roll(1, 2), b.roll(-1, 2)], 1)

    return block(run), s


@piece(IMAGE)
def attention_over_places(p: Pick, s: Shape) -> Made:
    c = p.of([2, 4])

    def run(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = m.q(x).flatten(2), m.k(x).flatten(2), m.v(x).flatten(2)
        y = torch.bmm(v, torch.bmm(q.transpose(1, 2), k).softmax(-1).transpose(1, 2))
        return x + m.gamma * y.view_as(x)

    return block(run, q=nn.Conv2d(s.c, c, 1), k=nn.Conv2d(s.c, c, 1), v=nn.Conv2d(s.c, s.c, 1), gamma=weight(1)), s


@piece(IMAGE, weight=2)
def image_to_vector(p: Pick, s: Shape) -> Made:
    run = p.of([
        lambda m, x: x.mean((2, 3)), lambda m, x: F.adaptive_avg_pool2d(x, 1).flatten(1), lambda m, x: x.amax((2, 3)),
        lambda m, x: F.adaptive_max_pool2d(x, 1).squeeze(-1).squeeze(-1), lambda m, x: x.flatten(2).sum(-1),
        lambda m, x: x.mean([-1, -2]) + x.amax([-1, -2]), lambda m, x: x.clamp(min=1e-3).pow(3).mean((2, 3)).pow(1 / 3),
    ])  # fmt: skip
    return block(run), Shape(VECTOR, s.c)


@piece(IMAGE, weight=2)
def flat_image(p: Pick, s: Shape) -> Made:
    c, n = p.width(), math.prod(s.size)
    run = p.of([
        lambda m, x: m.read(x.flatten(1)), lambda m, x: m.read(x.view(x.shape[0], -1)),
        lambda m, x: m.read(x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)),
        lambda m, x: m.read(x.reshape(-1, n * x.shape[1])),
    ])  # fmt: skip
    return block(run, read=nn.Linear(s.c * n, c)), Shape(VECTOR, c)


@piece(IMAGE)
def image_to_sequence(p: Pick, s: Shape) -> Made:
    run = p.of([lambda m, x: x.flatten(2).transpose(1, 2), lambda m, x: x.permute(0, 2, 3, 1).flatten(1, 2)])
    return block(run), Shape(SEQUENCE, s.c, (math.prod(s.size),))


@piece(IMAGE)
def rows_as_sequence(p: Pick, s: Shape) -> Made:
    run = lambda m, x: x.permute(0, 2, 1, 3).flatten(2)  # noqa: E731
    return block(run), Shape(SEQUENCE, s.c * s.size[1], (s.size[0],))


@piece(IMAGE, least=4)
def patches(p: Pick, s: Shape) -> Made:
    c, h, w = p.width(), s.size[0] // 2, s.size[1] // 2
    conv = nn.Conv2d(s.c, c, 2, stride=2)
    return block(lambda m, x: m.conv(x).flatten(2).transpose(1, 2), conv=conv), Shape(SEQUENCE, c, (h * w,))
