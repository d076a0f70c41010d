"""The table of pieces for feature maps of any kind, and for vectors. `fuzz_core` says how one is written."""

from __future__ import annotations

import math

import torch
from fuzz_core import ANY, IMAGE, SEQUENCE, VECTOR, Made, Pick, Shape, block, io_block, piece, weight
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

# whatever comes in: nothing here mixes channels by weights ------------------------------------------------------------

ACTIVATIONS = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Mish, nn.ReLU6, nn.Tanhshrink, nn.Softshrink, nn.LogSigmoid,
)  # fmt: skip


@piece(ANY, weight=4)
def activation(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: m.act(x), act=p.of(ACTIVATIONS)()), s


@piece(ANY, weight=2)
def relu(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: F.relu(x)), s


@piece(ANY)
def relu_in_place(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: F.relu_(x + 0.1)), s


@piece(ANY)
def prelu(p: Pick, s: Shape) -> Made:
    n = p.of([1, s.c]) if s.kind != SEQUENCE else 1
    return block(lambda m, x: m.act(x), act=nn.PReLU(n)), s


@piece(ANY)
def function_of_numbers(p: Pick, s: Shape) -> Made:
    run = p.of([
        lambda m, x: x.clamp(-1.0, 0.7), lambda m, x: x.abs() ** 1.5, lambda m, x: torch.exp(-(x**2)), torch_sin,
        lambda m, x: x * torch.sigmoid(1.7 * x), lambda m, x: torch.where(x > 0, x, 0.2 * x),
        lambda m, x: F.threshold(x, 0.1, 0.0), lambda m, x: torch.sign(x) * torch.log1p(x.abs()),
        lambda m, x: x.relu().square(), lambda m, x: 3 - x, lambda m, x: x / (1 + x * x), lambda m, x: torch.erf(x),
    ])  # fmt: skip
    return block(run), s


def torch_sin(m: nn.Module, x: Tensor) -> Tensor:
    return torch.sin(x)


@piece(ANY)
def buffer_scale(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x * s.along(m.scale), scale=torch.rand(s.c) + 0.5), s


@piece(ANY)
def buffer_scale_unsaved(p: Pick, s: Shape) -> Made:
    made = block(lambda m, x: x * s.along(m.scale))
    made.register_buffer("scale", torch.rand(s.c) + 0.5, persistent=False)
    return made, s


@piece(ANY)
def parameter_scale(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x * s.along(m.gamma) + s.along(m.beta), gamma=weight(s.c), beta=weight(s.c)), s


@piece(ANY)
def scalar_parameter(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x * m.gain.exp() + m.bias, gain=weight(1), bias=weight(1)), s


@piece(ANY)
def positive_scale(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x * s.along(F.softplus(m.gamma)), gamma=weight(s.c)), s


@piece(ANY)
def channel_mask(p: Pick, s: Shape) -> Made:
    mask = (torch.arange(s.c) % 3 != 0).float()
    return block(lambda m, x: x * s.along(m.mask).to(x.dtype), mask=mask), s


@piece(ANY)
def drop(p: Pick, s: Shape) -> Made:
    kind = p.of(
        [nn.Dropout, nn.AlphaDropout, nn.Dropout2d] if s.kind == IMAGE else [nn.Dropout, nn.FeatureAlphaDropout]
    )
    return block(lambda m, x: m.drop(x), drop=kind(0.3)), s


@piece(ANY)
def over_width(p: Pick, s: Shape) -> Made:
    run = p.of([
        lambda m, x: x / x.shape[s.dim], lambda m, x: x * x.shape[s.dim] ** -0.5, lambda m, x: x + x.size(s.dim),
        lambda m, x: torch.add(x, x, alpha=x.shape[s.dim]), lambda m, x: x.clamp(max=x.shape[s.dim] / 4),
        lambda m, x: x / math.sqrt(x.shape[s.dim]), lambda m, x: x * x.numel() / 50,
        lambda m, x: x + torch.full((), 1.0 / x.shape[s.dim], dtype=x.dtype), lambda m, x: x * math.log(x.shape[s.dim]),
    ])  # fmt: skip
    return block(run), s


@piece(ANY)
def ones_summed(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x / torch.ones_like(x).sum(s.dim, keepdim=True)), s


@piece(ANY)
def full_of_width(p: Pick, s: Shape) -> Made:
    run = p.of([
        lambda m, x: x * torch.full_like(x, x.shape[s.dim]), lambda m, x: x - torch.zeros_like(x).add_(x.shape[s.dim]),
        lambda m, x: x * x.new_full((1,), x.shape[s.dim]), lambda m, x: x * x.new_tensor(x.shape[s.dim]),
    ])  # fmt: skip
    return block(run), s


@piece(ANY)
def in_place_arithmetic(p: Pick, s: Shape) -> Made:
    run = p.of([
        lambda m, x: (x * 1.0).add_(0.3), lambda m, x: (x + 0).mul_(torch.sigmoid(x)),
        lambda m, x: x.clone().clamp_(min=0),
        lambda m, x: torch.zeros_like(x).add_(x), lambda m, x: x.clone().masked_fill_(x < 0, 0.0),
    ])  # fmt: skip
    return block(run), s


def _assigned(m: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = y[0] * 0.5
    return y


def _assigned_channels(dim: int) -> object:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = x.clone()
        y.narrow(dim % x.ndim, 0, 2).mul_(0.5)
        return y

    return run


def _filled_channels(dim: int) -> object:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = x.clone()
        y.select(dim % x.ndim, 1).fill_(0.25)
        return y

    return run


@piece(ANY)
def assignment(p: Pick, s: Shape) -> Made:
    return block(p.of([_assigned, _assigned_channels(s.dim), _filled_channels(s.dim)])), s


@piece(ANY)
def masked_fill(p: Pick, s: Shape) -> Made:
    value = p.of([0.0, 0.5, -1.0])
    return block(lambda m, x: x.masked_fill(x < 0.1, value)), s


@piece(ANY)
def softmax_of_channels(p: Pick, s: Shape) -> Made:
    run = p.of([lambda m, x: x.softmax(s.dim), lambda m, x: x.log_softmax(s.dim), lambda m, x: x * x.softmax(s.dim)])
    return block(run), s


@piece(ANY)
def normalised_channels(p: Pick, s: Shape) -> Made:
    run = p.of([
        lambda m, x: F.normalize(x, dim=s.dim), lambda m, x: x - x.mean(s.dim, keepdim=True),
        lambda m, x: x / (1 + x.abs().amax(s.dim, keepdim=True)),
        lambda m, x: x / (1 + x.square().sum(s.dim, keepdim=True)),
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(s.dim, keepdim=True) + 1e-5),
        lambda m, x: x / (0.5 + x.norm(dim=s.dim, keepdim=True)), lambda m, x: x - x.logsumexp(s.dim, keepdim=True),
    ])  # fmt: skip
    return block(run), s


@piece(ANY)
def flipped_channels(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x + 0.5 * x.flip(s.dim)), s


@piece(ANY)
def rolled_channels(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x + torch.roll(x, 1, s.dim)), s


@piece(ANY)
def accumulated_channels(p: Pick, s: Shape) -> Made:
    return block(p.of([lambda m, x: x.cumsum(s.dim), lambda m, x: x.cummax(s.dim).values])), s


@piece(ANY, multiple=2)
def sorted_channels(p: Pick, s: Shape) -> Made:
    k = s.c // 2
    if p.chance():
        return block(lambda m, x: x.topk(k, s.dim).values), s.wide(k)
    return block(lambda m, x: x.sort(s.dim).values), s


@piece(ANY, multiple=2)
def halves_apart(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        a, b = x.chunk(2, s.dim)
        return torch.cat([F.relu(a), torch.tanh(b)], s.dim)

    return block(run), s


@piece(ANY, multiple=2)
def halves_multiplied(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        a, b = x.split(s.c // 2, s.dim)
        return a * torch.sigmoid(b)

    return block(run), s.wide(s.c // 2)


@piece(ANY, multiple=2)
def glu(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: F.glu(x, s.dim)), s.wide(s.c // 2)


@piece(ANY, multiple=2)
def halves_added(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        a, b = x.tensor_split(2, s.dim)
        return torch.maximum(a, b) if m.larger else a + 0.5 * b

    return block(run, larger=p.chance()), s.wide(s.c // 2)


@piece(ANY, multiple=2)
def maxout(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        d = s.dim % x.ndim
        return x.unflatten(d, (x.shape[d] // 2, 2)).amax(d + 1)

    return block(run), s.wide(s.c // 2)


@piece(ANY)
def repeated_channels(p: Pick, s: Shape) -> Made:
    run = p.of([lambda m, x: x.repeat_interleave(2, s.dim), lambda m, x: torch.cat([x, -x], s.dim)])
    return block(run), s.wide(2 * s.c)


@piece(ANY, multiple=2)
def every_second_channel(p: Pick, s: Shape) -> Made:
    run = (lambda m, x: x[..., ::2]) if s.kind == SEQUENCE else (lambda m, x: x[:, ::2])
    return block(run), s.wide(s.c // 2)


@piece(ANY)
def picked_channels(p: Pick, s: Shape) -> Made:
    order = torch.tensor(p.random.sample(range(s.c), s.c))
    return block(lambda m, x: x.index_select(s.dim % x.ndim, m.order), order=order), s


@piece(ANY)
def stacked_and_summed(p: Pick, s: Shape) -> Made:
    run = p.of([
        lambda m, x: torch.stack([x, F.relu(x), torch.tanh(x)], 1).sum(1),
        lambda m, x: torch.stack([x, x.abs()]).mean(0),
        lambda m, x: sum(torch.unbind(torch.stack([x, 2 * x.relu()], -1), -1)),
    ])  # fmt: skip
    return block(run), s


@piece(ANY)
def lerp(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: torch.lerp(x, torch.tanh(x), s.along(torch.sigmoid(m.gate))), gate=weight(s.c)), s


@piece(ANY)
def detached(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x + (x.relu() - x).detach()), s


@piece(ANY)
def under_no_grad(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().mean() + 1
        return x / scale

    return block(run), s


@piece(ANY)
def complex_numbers(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        z = torch.polar(1 + x * x, x)
        return z.real + z.imag

    run_fft = lambda m, x: torch.fft.fft(x, dim=0).abs()  # noqa: E731
    return block(p.of([run, run_fft])), s


@piece(ANY)
def gate(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x * torch.sigmoid(m.gate(x)), gate=s.linear(s.c)), s


@piece(ANY)
def highway(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        t = torch.sigmoid(m.gate(x))
        return t * F.relu(m.layer(x)) + (1 - t) * x

    return block(run, gate=s.linear(s.c), layer=s.linear(s.c)), s


@piece(ANY)
def bottleneck(p: Pick, s: Shape) -> Made:
    mid = p.width()
    return block(lambda m, x: x + m.up(F.gelu(m.down(x))), down=s.linear(mid), up=s.wide(mid).linear(s.c)), s


@piece(ANY)
def layer_used_twice(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: m.layer(F.relu(m.layer(x))), layer=s.linear(s.c)), s


@piece(ANY)
def layers_share_a_weight(p: Pick, s: Shape) -> Made:
    one, two = s.linear(s.c), s.linear(s.c)
    two.weight = one.weight
    return block(lambda m, x: m.two(torch.tanh(m.one(x))), one=one, two=two), s


@piece(ANY)
def mixed(p: Pick, s: Shape) -> Made:
    c = p.width()
    return block(lambda m, x: m.layer(x), layer=s.linear(c, bias=p.chance(0.8))), s.wide(c)


@piece(ANY)
def called_by_keyword(p: Pick, s: Shape) -> Made:
    c = p.width()
    return block(lambda m, x: F.relu(m.layer(input=x)), layer=s.linear(c)), s.wide(c)


@piece(ANY)
def sequential(p: Pick, s: Shape) -> Made:
    a, b = p.width(), p.width()
    layers = nn.Sequential(s.linear(a), nn.ReLU(inplace=True), s.wide(a).linear(b), nn.Tanh())
    return block(lambda m, x: m.layers(x), layers=layers), s.wide(b)


@piece(ANY)
def module_list(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = x + torch.tanh(layer(x))
        return x

    return block(run, layers=nn.ModuleList([s.linear(s.c) for _ in range(2)])), s


@piece(ANY)
def module_dict(p: Pick, s: Shape) -> Made:
    c = p.width()
    layers = nn.ModuleDict({name: s.linear(c) for name in ("mean", "spread")})
    return block(lambda m, x: sum(F.relu(layer(x)) for layer in m.layers.values()), layers=layers), s.wide(c)


@piece(ANY)
def parameter_list(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        for scale in m.scales:
            x = torch.tanh(x * s.along(scale))
        return x

    return block(run, scales=nn.ParameterList([weight(s.c) for _ in range(2)])), s


@piece(ANY)
def dense_blocks(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        seen = [x]
        for layer in m.layers:
            seen.append(F.relu(layer(torch.cat(seen, s.dim))))
        return torch.cat(seen, s.dim)

    layers = nn.ModuleList([s.wide(s.c + 4 * k).linear(4) for k in range(2)])
    return block(run, layers=layers), s.wide(s.c + 8)


@piece(ANY)
def experts(p: Pick, s: Shape) -> Made:
    c, n = p.width(), 3

    def run(m: nn.Module, x: Tensor) -> Tensor:
        route = m.route(x).softmax(s.dim)
        done = torch.stack([e(x) for e in m.experts], s.dim % x.ndim)
        return (done * route.unsqueeze(s.dim % x.ndim + 1)).sum(s.dim % x.ndim)

    parts = nn.ModuleList([nn.Sequential(s.linear(c), nn.GELU(), s.wide(c).linear(s.c)) for _ in range(n)])
    return block(run, experts=parts, route=s.linear(n)), s


@piece(ANY)
def gates_picked_out(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        a, b = torch.sigmoid(m.gates(x)).chunk(2, s.dim)
        return a * F.relu(x) + b * torch.tanh(x)

    return block(run, gates=s.linear(2)), s


@piece(ANY)
def noise_in_training(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x * 1.5 if m.training else x), s


@piece(ANY)
def layer_in_training(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: x + m.aux(x) if m.training else x, aux=s.linear(s.c)), s


@piece(ANY)
def other_layer_in_training(p: Pick, s: Shape) -> Made:
    c = p.width()
    return block(lambda m, x: m.a(x) if m.training else m.b(x), a=s.linear(c), b=s.linear(c)), s.wide(c)


@piece(ANY)
def kept_state(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        m.last = x
        return m.layer(m.last)

    return block(run, layer=s.linear(s.c), last=None), s


# hooks ----------------------------------------------------------------------------------------------------------------


@piece(ANY)
def pre_hook(p: Pick, s: Shape) -> Made:
    c = p.width()
    layer = s.linear(c)
    hook = p.of([
        lambda module, args: (args[0] * 2,), lambda module, args: (args[0] + args[0].flip(s.dim),),
        lambda module, args: (F.relu(args[0]),), lambda module, args: None,
    ])  # fmt: skip
    layer.register_forward_pre_hook(hook)
    return block(lambda m, x: m.layer(x), layer=layer), s.wide(c)


@piece(ANY)
def forward_hook(p: Pick, s: Shape) -> Made:
    c = p.width()
    layer = s.linear(c)
    hook = p.of([
        lambda module, args, out: out.cumsum(s.dim), lambda module, args, out: F.relu(out) / out.shape[s.dim],
        lambda module, args, out: out - out.mean(s.dim, keepdim=True), lambda module, args, out: None,
    ])  # fmt: skip
    layer.register_forward_hook(hook)
    return block(lambda m, x: m.layer(x), layer=layer), s.wide(c)


class Collector(nn.Module):
    """Features that a hook of its own takes from a layer."""

    def __init__(self, s: Shape, c: int) -> None:
        super().__init__()
        self.one, self.two, self.read = s.linear(c), s.wide(c).linear(c), s.wide(c).linear(s.c)
        self.got: list[Tensor] = []
        self.one.register_forward_hook(self.keep)

    def keep(self, _module: nn.Module, _args: tuple, out: Tensor) -> None:
        self.got.append(out)

    def forward(self, x: Tensor) -> Tensor:
        self.got.clear()
        self.two(F.relu(self.one(x)))
        return self.read(self.got[-1])


@piece(ANY)
def feature_hook(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: m.collect(x), collect=Collector(s, p.width())), s


# parametrizations -----------------------------------------------------------------------------------------------------


class FunctionOfWeight(nn.Module):
    """A weight that is a function of the parameter."""

    def __init__(self, run: object) -> None:
        super().__init__()
        self.run = run

    def forward(self, w: Tensor) -> Tensor:
        return self.run(w)


WEIGHT_FUNCTIONS = (
    torch.tanh, torch.abs, F.softplus, lambda w: w * w, lambda w: w - w.mean(), lambda w: w / w.norm(),
    lambda w: w / (1 + w.norm(dim=1, keepdim=True)), lambda w: w / (1 + w.norm(dim=0, keepdim=True)),
    lambda w: torch.sign(w) * w.abs().mean(), lambda w: w + 0.1, lambda w: 2 * w,
    lambda w: (w * 8).round() / 8 + w - w.detach(),
    lambda w: w / w.shape[1],
)  # fmt: skip


@piece(ANY)
def own_parametrization(p: Pick, s: Shape) -> Made:
    c = p.width()
    layer = s.linear(c)
    parametrize.register_parametrization(layer, "weight", FunctionOfWeight(p.of(WEIGHT_FUNCTIONS)))
    return block(lambda m, x: m.layer(x), layer=layer), s.wide(c)


@piece(ANY)
def weight_norm(p: Pick, s: Shape) -> Made:
    c = p.width()
    return block(lambda m, x: m.layer(x), layer=parametrizations.weight_norm(s.linear(c), dim=p.of([0, 0, 1]))), s.wide(
        c
    )


@piece(ANY)
def spectral_norm(p: Pick, s: Shape) -> Made:
    c = p.width()
    return block(lambda m, x: m.layer(x), layer=parametrizations.spectral_norm(s.linear(c))), s.wide(c)


@piece(ANY)
def orthogonal(p: Pick, s: Shape) -> Made:
    how = p.of(["matrix_exp", "cayley", "householder"])
    layer = nn.Linear(s.c, s.c)
    parametrizations.orthogonal(layer, orthogonal_map=how, use_trivialization=False)
    run = (lambda m, x: m.layer(x.movedim(1, -1)).movedim(-1, 1)) if s.kind == IMAGE else (lambda m, x: m.layer(x))
    return block(run, layer=layer), s


@piece(ANY)
def function_of_weight(p: Pick, s: Shape) -> Made:
    c, run = p.width(), p.of(WEIGHT_FUNCTIONS)
    if s.kind == IMAGE:
        return block(lambda m, x: F.conv2d(x, run(m.w)[..., None, None]), w=weight(c, s.c)), s.wide(c)
    return block(lambda m, x: F.linear(x, run(m.w), m.b), w=weight(c, s.c), b=weight(c)), s.wide(c)


@piece(ANY)
def low_rank_update(p: Pick, s: Shape) -> Made:
    c = p.width()
    parts = {"w": weight(c, s.c), "a": weight(2, s.c), "b": weight(c, 2)}
    if s.kind == IMAGE:
        return block(lambda m, x: F.conv2d(x, (m.w + m.b @ m.a)[:, :, None, None]), **parts), s.wide(c)
    return block(lambda m, x: x @ (m.w + m.b @ m.a).T, **parts), s.wide(c)


# further outputs and inputs -------------------------------------------------------------------------------------------


@piece(ANY)
def side_output(p: Pick, s: Shape) -> Made:
    take = p.of([
        lambda x: x.sum(s.dim), lambda x: x.mean(s.dim), lambda x: x.norm(dim=s.dim), lambda x: x.var(s.dim),
        lambda x: x.amax(s.dim), lambda x: x.square().mean(), lambda x: x.logsumexp(s.dim), lambda x: x.abs().sum(),
        lambda x: x, lambda x: x.mean(0), lambda x: x.std(), lambda x: (x > 0).sum(), lambda x: x.prod(s.dim),
        lambda x: x.sum(s.dim) > 0, lambda x: x.softmax(s.dim).amax(s.dim), lambda x: x.select(s.dim, 0),
    ])  # fmt: skip

    def run(m: nn.Module, x: Tensor, io: object) -> Tensor:
        io.outputs.append(take(x))
        return x

    return io_block(run), s


@piece(ANY)
def aux_head(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor, io: object) -> Tensor:
        if m.training or m.always:
            io.outputs.append(m.head(F.relu(x)))
        return x

    return io_block(run, head=s.linear(3), always=p.chance(0.3)), s


@piece(ANY)
def loss_inside(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor, io: object) -> Tensor:
        target = torch.zeros_like(x)
        io.outputs.append(m.loss(x, target) if m.elementwise else F.mse_loss(m.head(x), m.head(x).detach() * 0.5))
        return x

    return io_block(run, loss=p.of([nn.MSELoss, nn.SmoothL1Loss])(), head=s.linear(2), elementwise=p.chance()), s


@piece(ANY, needs=("condition",))
def film(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor, io: object) -> Tensor:
        scale, shift = m.film(io.inputs["condition"]).chunk(2, -1)
        for _ in s.places:
            scale, shift = (scale[..., None], shift[..., None]) if s.kind == IMAGE else (scale[:, None], shift[:, None])
        return x * (1 + scale) + shift

    return io_block(run, film=nn.Linear(5, 2 * s.c)), s


@piece(ANY, needs=("label",))
def label_embedding(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor, io: object) -> Tensor:
        e = m.table(io.inputs["label"])
        return x + (e[:, :, None, None] if s.kind == IMAGE else e[:, None] if s.kind == SEQUENCE else e)

    return io_block(run, table=nn.Embedding(7, s.c)), s


@piece(ANY, needs=("label",))
def conditional_norm(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor, io: object) -> Tensor:
        gamma = m.gamma(io.inputs["label"])
        x = m.norm(x.movedim(s.dim, -1)).movedim(-1, s.dim)
        return x * (gamma[:, :, None, None] if s.kind == IMAGE else gamma[:, None] if s.kind == SEQUENCE else gamma)

    return io_block(run, gamma=nn.Embedding(7, s.c), norm=nn.LayerNorm(s.c, elementwise_affine=False)), s


# chains of pieces -----------------------------------------------------------------------------------------------------


def _same(a: Shape, b: Shape) -> bool:
    return (a.kind, a.size) == (b.kind, b.size)


@piece(ANY, bodies=1, weight=5)
def residual(p: Pick, s: Shape, body: Made) -> Made:
    inner, out = body
    if not _same(s, out):
        return inner, out
    if s.c == out.c:
        return io_block(lambda m, x, io: x + m.body(x, io), body=inner), s
    return io_block(lambda m, x, io: m.skip(x) + m.body(x, io), body=inner, skip=s.linear(out.c)), out


@piece(ANY, bodies=2, weight=2)
def joined(p: Pick, s: Shape, left: Made, right: Made) -> Made:
    (a, s_a), (b, s_b) = left, right
    if not _same(s_a, s_b):
        return a, s_a
    join = io_block(lambda m, x, io: torch.cat([m.a(x, io), m.b(x, io)], s_a.dim), a=a, b=b)
    return join, s_a.wide(s_a.c + s_b.c)


@piece(ANY, bodies=2, weight=2)
def added(p: Pick, s: Shape, left: Made, right: Made) -> Made:
    (a, s_a), (b, s_b) = left, right
    if s_a != s_b:
        return a, s_a
    meet = p.of([torch.add, torch.mul, torch.maximum, lambda x, y: x * torch.sigmoid(y), torch.sub, torch.minimum])
    return io_block(lambda m, x, io: meet(m.a(x, io), m.b(x, io)), a=a, b=b), s_a


@piece(ANY, bodies=1, weight=2)
def used_twice(p: Pick, s: Shape, body: Made) -> Made:
    inner, out = body
    if out == s:
        return io_block(lambda m, x, io: m.body(m.body(x, io), io), body=inner), s
    return io_block(lambda m, x, io: m.body(x, io) + 0.5 * m.body(F.relu(x), io), body=inner), out


@piece(ANY, bodies=1)
def switched_off_in_training(p: Pick, s: Shape, body: Made) -> Made:
    inner, out = body
    if out != s:
        return inner, out
    return io_block(lambda m, x, io: x if m.training else m.body(x, io), body=inner), s


@piece(ANY, bodies=1)
def scaled_body(p: Pick, s: Shape, body: Made) -> Made:
    inner, out = body
    return io_block(lambda m, x, io: m.body(x, io) * out.along(m.gamma), body=inner, gamma=weight(out.c)), out


# vectors --------------------------------------------------------------------------------------------------------------


@piece(VECTOR)
def batch_norm_vector(p: Pick, s: Shape) -> Made:
    norm = nn.BatchNorm1d(s.c, affine=p.chance(0.8), track_running_stats=p.chance(0.8))
    return block(lambda m, x: m.norm(x), norm=norm), s


@piece(VECTOR)
def bilinear(p: Pick, s: Shape) -> Made:
    c = p.width()
    return block(lambda m, x: m.layer(x, torch.tanh(x)), layer=nn.Bilinear(s.c, s.c, c)), s.wide(c)


@piece(VECTOR)
def tied_autoencoder(p: Pick, s: Shape) -> Made:
    w = weight(p.width(), s.c)
    return block(lambda m, x: F.linear(F.relu(F.linear(x, m.w)), m.w.t()), w=w), s


@piece(VECTOR)
def distances(p: Pick, s: Shape) -> Made:
    c = p.width()
    run = p.of([
        lambda m, x: (x[:, None] - m.centres).square().sum(-1).sqrt(), lambda m, x: torch.cdist(x, m.centres),
        lambda m, x: torch.exp(-(x[:, None] - m.centres).abs().mean(-1)),
        lambda m, x: F.cosine_similarity(x[:, None], m.centres[None], dim=-1),
    ])  # fmt: skip
    return block(run, centres=weight(c, s.c)), s.wide(c)


@piece(VECTOR)
def outer_product(p: Pick, s: Shape) -> Made:
    return block(lambda m, x: m.read(torch.einsum("bi,bj->bij", x, x).flatten(1)), read=nn.Linear(s.c**2, s.c)), s


@piece(VECTOR)
def generated_weight(p: Pick, s: Shape) -> Made:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        w = m.make(x).view(x.shape[0], x.shape[1], -1)
        return torch.bmm(x[:, None], w)[:, 0]

    return block(run, make=nn.Linear(s.c, s.c * 4)), s.wide(4)


@piece(VECTOR)
def matrix_of_parameters(p: Pick, s: Shape) -> Made:
    c = p.width()
    run = p.of([
        lambda m, x: x @ m.w + m.b, lambda m, x: torch.addmm(m.b, x, m.w),
        lambda m, x: torch.einsum("bi,io->bo", x, m.w),
        lambda m, x: torch.matmul(m.w.t(), x.t()).t(), lambda m, x: (x[:, :, None] * m.w).sum(1),
        lambda m, x: x.mm(m.w.abs()),
        lambda m, x: torch.tensordot(x, m.w, 1), lambda m, x: torch.stack([torch.mv(m.w.t(), row) for row in x]),
    ])  # fmt: skip
    return block(run, w=weight(s.c, c), b=weight(c)), s.wide(c)


@piece(VECTOR)
def gru_cell(p: Pick, s: Shape) -> Made:
    c = p.width()
    if p.chance():
        return block(lambda m, x: m.cell(x, m.cell(x)), cell=nn.GRUCell(s.c, c)), s.wide(c)
    return block(lambda m, x: m.cell(x)[0], cell=nn.LSTMCell(s.c, c)), s.wide(c)


@piece(VECTOR)
def vector_to_sequence(p: Pick, s: Shape) -> Made:
    t, c = p.of([4, 6]), p.width()
    run = p.of([lambda m, x: m.spread(x).view(x.shape[0], t, -1), lambda m, x: m.spread(x).unflatten(1, (t, c))])
    return block(run, spread=nn.Linear(s.c, t * c)), Shape(SEQUENCE, c, (t,))


@piece(VECTOR)
def vector_to_image(p: Pick, s: Shape) -> Made:
    c = p.width()
    return block(lambda m, x: m.spread(x).view(x.shape[0], -1, 4, 4), spread=nn.Linear(s.c, c * 16)), Shape(
        IMAGE, c, (4, 4)
    )


@piece(VECTOR)
def scatter_into(p: Pick, s: Shape) -> Made:
    index = torch.tensor([p.random.randrange(6) for _ in range(s.c)])
    if p.chance():
        run = lambda m, x: x.new_zeros(x.shape[0], 6).index_add(1, m.index, x)  # noqa: E731
    else:
        run = lambda m, x: x.new_zeros(x.shape[0], 6).scatter_add(1, m.index.expand(x.shape[0], -1), x)  # noqa: E731
    return block(run, index=index), s.wide(6)


@piece(VECTOR)
def rows_as_graph(p: Pick, s: Shape) -> Made:
    c = p.width()
    edges = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]])

    def run(m: nn.Module, x: Tensor) -> Tensor:
        sent = m.send(x)
        return F.relu(m.own(x) + torch.zeros_like(sent).index_add(0, m.edges[1], sent[m.edges[0]]))

    return block(run, own=nn.Linear(s.c, c), send=nn.Linear(s.c, c), edges=edges), s.wide(c)
