"""Hand-written networks: the classics and the couplings that libraries of models do not show.

Every class is small enough to read in one glance and uses a different width wherever the design leaves a choice, so
that two axes of equal size are a statement of the design and not a coincidence. ``architectures.py`` lists them.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


def conv_bn(
    n_in: int, n_out: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Build convolution, batch norm and (unless told otherwise) ReLU, with padding that keeps the size at stride 1."""
    conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), *([nn.ReLU()] if act else []))


def pooled_head(n_in: int, n_classes: int = 5) -> nn.Sequential:
    """Build global average pooling, flatten and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes))


# Convolutional classifiers


def vgg_bn() -> nn.Module:
    """VGG with batch norm: one flattened channel becomes 4 x 4 columns of the first linear layer."""
    features = [conv_bn(3, 12), conv_bn(12, 20), nn.MaxPool2d(2), conv_bn(20, 28), conv_bn(28, 36), nn.MaxPool2d(2)]
    classifier = [nn.Flatten(), nn.Linear(36 * 4 * 4, 44), nn.ReLU(), nn.Dropout(), nn.Linear(44, 5)]
    return nn.Sequential(*features, *classifier)


class PadShortcutBlock(nn.Module):
    """Residual block whose shortcut subsamples and pads the channels with zeros (option A of He et al. 2015)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(n_in, n_out, stride=stride), conv_bn(n_out, n_out, act=False))
        self.stride, self.extra = stride, n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(self.body(x) + shortcut)


def resnet_pad() -> nn.Module:
    """ResNet for small images with parameter-free shortcuts: 12, 24 and 40 channels."""
    blocks = [PadShortcutBlock(12, 12, 1), PadShortcutBlock(12, 24, 2), PadShortcutBlock(24, 24, 1)]
    return nn.Sequential(conv_bn(3, 12), *blocks, PadShortcutBlock(24, 40, 2), pooled_head(40))


class ProjectionBlock(nn.Module):
    """Residual block with a projected shortcut where the shape changes; ``norm`` builds the norm of a width."""

    def __init__(
        self, n_in: int, n_out: int, stride: int, norm=nn.BatchNorm2d, n_mid: int = 0, groups: int = 1
    ) -> None:
        super().__init__()
        n_mid = n_mid or n_out + 4
        self.conv1, self.norm1 = nn.Conv2d(n_in, n_mid, 1, bias=False), norm(n_mid)
        self.conv2, self.norm2 = nn.Conv2d(n_mid, n_mid, 3, stride, 1, groups=groups, bias=False), norm(n_mid)
        self.conv3, self.norm3 = nn.Conv2d(n_mid, n_out, 1, bias=False), norm(n_out)
        plain = n_in == n_out and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride), norm(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def resnext() -> nn.Module:
    """ResNeXt: bottlenecks whose middle convolution has 4 groups."""
    blocks = [ProjectionBlock(16, 40, 1, n_mid=24, groups=4), ProjectionBlock(40, 40, 1, n_mid=24, groups=4)]
    return nn.Sequential(conv_bn(3, 16), *blocks, ProjectionBlock(40, 56, 2, n_mid=32, groups=4), pooled_head(56))


def resnet_group_norm() -> nn.Module:
    """ResNet with group normalisation of 4 groups."""

    def norm(n: int) -> nn.Module:
        return nn.GroupNorm(4, n)

    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU())
    return nn.Sequential(stem, ProjectionBlock(16, 16, 1, norm), ProjectionBlock(16, 32, 2, norm), pooled_head(32))


class DenseLayer(nn.Module):
    """Norm, ReLU, convolution; the result is appended to the input."""

    def __init__(self, n_in: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(n_in), nn.Conv2d(n_in, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


def densenet() -> nn.Module:
    """DenseNet: two dense blocks (growth 6) with a transition that mixes 34 channels into 18."""
    first = [DenseLayer(16 + 6 * i, 6) for i in range(3)]
    transition = [nn.BatchNorm2d(34), nn.ReLU(), nn.Conv2d(34, 18, 1), nn.AvgPool2d(2)]
    second = [DenseLayer(18 + 6 * i, 6) for i in range(2)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), *first, *transition, *second, nn.BatchNorm2d(30), pooled_head(30)
    )


class Inception(nn.Module):
    """Four branches, concatenated: 1x1, 3x3, 5x5 and pooled."""

    def __init__(self, n_in: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        one, three, five, pool = widths
        self.one = conv_bn(n_in, one, 1)
        self.three = nn.Sequential(conv_bn(n_in, three - 2, 1), conv_bn(three - 2, three))
        self.five = nn.Sequential(conv_bn(n_in, five - 2, 1), conv_bn(five - 2, five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(n_in, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


def googlenet() -> nn.Module:
    """Two inception modules (8 + 12 + 6 + 4 and 10 + 14 + 8 + 6 channels), then flatten and a linear layer."""
    modules = [Inception(14, (8, 12, 6, 4)), nn.MaxPool2d(2), Inception(30, (10, 14, 8, 6)), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(conv_bn(3, 14, stride=2), *modules, nn.Flatten(), nn.Linear(38 * 4, 5))


class UNet(nn.Module):
    """U-Net with two levels: transposed convolutions up, skip connections by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = conv_bn(3, 12), conv_bn(12, 20), conv_bn(20, 36)
        self.up2, self.merge2 = nn.ConvTranspose2d(36, 22, 2, 2), conv_bn(22 + 20, 26)
        self.up1, self.merge1 = nn.ConvTranspose2d(26, 14, 2, 2), conv_bn(14 + 12, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.merge2(torch.cat([self.up2(c), b], dim=1))
        return self.head(self.merge1(torch.cat([a, self.up1(b)], dim=1)))


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` equal parts."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2 unit: half of the channels pass, half are transformed, both are shuffled; stride 2 doubles."""

    def __init__(self, n_in: int, stride: int) -> None:
        super().__init__()
        half = n_in if stride == 2 else n_in // 2
        depthwise = conv_bn(half, half, stride=stride, groups=half, act=False)
        self.right = nn.Sequential(conv_bn(half, half, 1), depthwise, conv_bn(half, half, 1))
        left = nn.Sequential(conv_bn(half, half, stride=2, groups=half, act=False), conv_bn(half, half, 1))
        self.left = left if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.left is None else (self.left(x), x)
        return shuffle_channels(torch.cat([left, self.right(right)], dim=1), 2)


def shufflenet_v2() -> nn.Module:
    """ShuffleNetV2: channel split, depthwise convolution, concatenation and shuffle."""
    return nn.Sequential(conv_bn(3, 12), ShuffleUnit(12, 2), ShuffleUnit(24, 1), conv_bn(24, 44, 1), pooled_head(44))


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from all channels' means."""

    def __init__(self, n: int, n_squeezed: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(n, n_squeezed, 1), nn.Conv2d(n_squeezed, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """MobileNetV3 block: expand, depthwise, squeeze and excite, project, add where the shape allows."""

    def __init__(self, n_in: int, n_mid: int, n_out: int, stride: int) -> None:
        super().__init__()
        expand = [nn.Conv2d(n_in, n_mid, 1, bias=False), nn.BatchNorm2d(n_mid), nn.Hardswish()]
        depthwise = [
            nn.Conv2d(n_mid, n_mid, 3, stride, 1, groups=n_mid, bias=False),
            nn.BatchNorm2d(n_mid),
            nn.Hardswish(),
        ]
        project = [SqueezeExcite(n_mid, n_mid // 4 + 1), nn.Conv2d(n_mid, n_out, 1, bias=False), nn.BatchNorm2d(n_out)]
        self.body = nn.Sequential(*expand, *depthwise, *project)
        self.residual = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet_v3() -> nn.Module:
    """MobileNetV3: inverted residuals with squeeze and excite."""
    blocks = [InvertedResidual(10, 26, 10, 1), InvertedResidual(10, 34, 18, 2), InvertedResidual(18, 50, 18, 1)]
    return nn.Sequential(conv_bn(3, 10), *blocks, pooled_head(18))


class SqueezeFire(nn.Module):
    """SqueezeNet's fire module: squeeze, then two expansions of different kernel, concatenated."""

    def __init__(self, n_in: int, squeezed: int, one: int, three: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(n_in, squeezed, 1)
        self.one, self.three = nn.Conv2d(squeezed, one, 1), nn.Conv2d(squeezed, three, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], dim=1)


def squeezenet() -> nn.Module:
    """SqueezeNet: two fire modules and a convolutional classifier."""
    body = [nn.Conv2d(3, 18, 3, 2), nn.ReLU(), SqueezeFire(18, 6, 14, 10), nn.MaxPool2d(2), SqueezeFire(24, 8, 16, 12)]
    return nn.Sequential(*body, nn.Conv2d(28, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def conv3d_net() -> nn.Module:
    """Three-dimensional convolutions over a short clip."""
    body = [nn.Conv3d(2, 10, 3, padding=1), nn.BatchNorm3d(10), nn.ReLU(), nn.MaxPool3d(2)]
    body += [nn.Conv3d(10, 18, 3, padding=1), nn.BatchNorm3d(18), nn.ReLU(), nn.AdaptiveAvgPool3d(2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(18 * 8, 5))


class Res2Block(nn.Module):
    """Res2Net block: channels split into four, each part convolved together with the result of the one before."""

    def __init__(self, n: int, parts: int = 4) -> None:
        super().__init__()
        self.enter, self.leave, self.parts = conv_bn(n, n + 8, 1), conv_bn(n + 8, n, 1, act=False), parts
        width = (n + 8) // parts
        self.convs = nn.ModuleList(conv_bn(width, width) for _ in range(parts - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.enter(x).chunk(self.parts, dim=1)
        outputs = [first]
        for part, conv in zip(rest, self.convs, strict=True):
            outputs.append(conv(part if len(outputs) == 1 else part + outputs[-1]))
        return F.relu(x + self.leave(torch.cat(outputs, dim=1)))


def res2net() -> nn.Module:
    """Res2Net: split, hierarchical additions, concatenation."""
    return nn.Sequential(conv_bn(3, 24), Res2Block(24), Res2Block(24), pooled_head(24))


# Images to images


def espcn() -> nn.Module:
    """ESPCN super-resolution: nine maps per colour, rearranged into a picture three times the size."""
    body = [nn.Conv2d(3, 20, 5, padding=2), nn.Tanh(), nn.Conv2d(20, 14, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*body, nn.Conv2d(14, 3 * 9, 3, padding=1), nn.PixelShuffle(3))


class EDSR(nn.Module):
    """EDSR super-resolution: residual body without norm; a pixel shuffle between two convolutions."""

    def __init__(self, n: int = 18, n_mid: int = 26, n_blocks: int = 2) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, n, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, n_mid, 3, padding=1), nn.ReLU(), nn.Conv2d(n_mid, n, 3, padding=1))
            for _ in range(n_blocks)
        )
        self.up, self.tail = nn.Conv2d(n, 10 * 4, 3, padding=1), nn.Conv2d(10, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.head(x)
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return self.tail(F.pixel_shuffle(self.up(x + first), 2))


class StyleTransfer(nn.Module):
    """Feed-forward style transfer: instance norm with learned scale, reflection padding, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(3, 14, 3), nn.InstanceNorm2d(14, affine=True), nn.ReLU()
        )
        self.down = nn.Sequential(nn.Conv2d(14, 22, 3, 2, 1), nn.InstanceNorm2d(22, affine=True), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(22, 30, 3, padding=1),
            nn.InstanceNorm2d(30, affine=True),
            nn.ReLU(),
            nn.Conv2d(30, 22, 3, padding=1),
        )
        self.leave = nn.Sequential(nn.Conv2d(22, 14, 3, padding=1), nn.ReLU(), nn.Conv2d(14, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.enter(x))
        x = x + self.body(x)
        return self.leave(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConvAutoencoder(nn.Module):
    """Strided convolutions down, transposed convolutions up."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 22, 3, 2, 1), nn.ReLU())
        self.narrow, self.widen = nn.Linear(22 * 16, 18), nn.Linear(18, 22 * 16)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(22, 14, 4, 2, 1), nn.BatchNorm2d(14), nn.ReLU(), nn.ConvTranspose2d(14, 3, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        code = self.narrow(self.encoder(x).flatten(1))
        return self.decoder(F.relu(self.widen(code)).unflatten(1, (-1, 4, 4)))


class VAE(nn.Module):
    """Variational autoencoder: mean and log-variance heads; the noise is an input, so that the model is a function."""

    def __init__(self, n_in: int = 40, n_hidden: int = 28, n_latent: int = 6) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(n_in, n_hidden), nn.Tanh())
        self.mean, self.log_var = nn.Linear(n_hidden, n_latent), nn.Linear(n_hidden, n_latent)
        self.decoder = nn.Sequential(nn.Linear(n_latent, n_hidden - 4), nn.Tanh(), nn.Linear(n_hidden - 4, n_in))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        return self.decoder(mean + noise * torch.exp(0.5 * log_var)), mean, log_var


# Sequences


class WaveNet(nn.Module):
    """Gated dilated causal convolutions with residual and skip sums; one convolution feeds both gates."""

    def __init__(self, n: int = 14, n_gate: int = 18, n_skip: int = 22, dilations: tuple[int, ...] = (1, 2, 4)) -> None:
        super().__init__()
        self.enter = nn.Conv1d(3, n, 1)
        self.gates = nn.ModuleList(nn.Conv1d(n, 2 * n_gate, 2, dilation=d) for d in dilations)
        self.residuals = nn.ModuleList(nn.Conv1d(n_gate, n, 1) for _ in dilations)
        self.skips = nn.ModuleList(nn.Conv1d(n_gate, n_skip, 1) for _ in dilations)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(n_skip, n_skip + 4, 1), nn.ReLU(), nn.Conv1d(n_skip + 4, 7, 1))
        self.dilations = dilations

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        total: Tensor | float = 0.0
        for gate, residual, skip, dilation in zip(self.gates, self.residuals, self.skips, self.dilations, strict=True):
            filtered, gated = gate(F.pad(x, (dilation, 0))).chunk(2, dim=1)
            y = torch.tanh(filtered) * torch.sigmoid(gated)
            x, total = x + residual(y), total + skip(y)
        return self.head(total)


class TCNBlock(nn.Module):
    """Two weight-normalised dilated convolutions and a projected shortcut."""

    def __init__(self, n_in: int, n_out: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = weight_norm(nn.Conv1d(n_in, n_out + 4, 3, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(n_out + 4, n_out, 3, dilation=dilation))
        self.shortcut, self.pad = nn.Conv1d(n_in, n_out, 1), (2 * dilation, 0)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(F.pad(x, self.pad)))
        return F.relu(F.relu(self.conv2(F.pad(y, self.pad))) + self.shortcut(x))


def tcn_weight_norm() -> nn.Module:
    """Temporal convolutional network with weight normalisation."""
    return nn.Sequential(TCNBlock(3, 14, 1), TCNBlock(14, 22, 2), nn.Conv1d(22, 5, 1))


def discriminator_spectral_norm() -> nn.Module:
    """Discriminator with spectral normalisation."""
    body = [spectral_norm(nn.Conv2d(3, 14, 4, 2, 1)), nn.LeakyReLU(0.2), spectral_norm(nn.Conv2d(14, 22, 4, 2, 1))]
    return nn.Sequential(*body, nn.LeakyReLU(0.2), nn.Flatten(), spectral_norm(nn.Linear(22 * 16, 1)))


class MixerBlock(nn.Module):
    """One perceptron across the tokens, one across the channels."""

    def __init__(self, n_tokens: int, n: int, n_token_mid: int, n_channel_mid: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(n), nn.LayerNorm(n)
        self.tokens = nn.Sequential(nn.Linear(n_tokens, n_token_mid), nn.GELU(), nn.Linear(n_token_mid, n_tokens))
        self.channels = nn.Sequential(nn.Linear(n, n_channel_mid), nn.GELU(), nn.Linear(n_channel_mid, n))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MLPMixer(nn.Module):
    """MLP-Mixer on 4 x 4 patches of a 16 x 16 image."""

    def __init__(self, n: int = 28) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, n, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(16, n, 22, 44), MixerBlock(16, n, 22, 44))
        self.norm, self.head = nn.LayerNorm(n), nn.Linear(n, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


class GatedMLPBlock(nn.Module):
    """gMLP block: half of the channels gate the other half after a projection across the tokens."""

    def __init__(self, n_tokens: int, n: int, n_mid: int) -> None:
        super().__init__()
        self.norm, self.enter = nn.LayerNorm(n), nn.Linear(n, 2 * n_mid)
        self.gate_norm, self.spatial = nn.LayerNorm(n_mid), nn.Conv1d(n_tokens, n_tokens, 1)
        self.leave = nn.Linear(n_mid, n)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.enter(self.norm(x))).chunk(2, dim=-1)
        return x + self.leave(u * self.spatial(self.gate_norm(v)))


class GatedMLP(nn.Module):
    """gMLP over token sequences of length 11."""

    def __init__(self, n: int = 28) -> None:
        super().__init__()
        self.embed = nn.Embedding(101, n)
        self.blocks = nn.Sequential(GatedMLPBlock(11, n, 38), GatedMLPBlock(11, n, 38))
        self.head = nn.Linear(n, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to the last axis, paired as first half with second half."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class GroupedAttention(nn.Module):
    """Causal attention by explicit matrix products: 4 query heads share 2 key and value heads."""

    def __init__(self, n: int, n_heads: int = 4, n_kv: int = 2, head_dim: int = 10) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(n, h * head_dim, bias=False) for h in (n_heads, n_kv, n_kv))
        self.o = nn.Linear(n_heads * head_dim, n, bias=False)
        self.n_heads, self.n_kv, self.head_dim = n_heads, n_kv, head_dim

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotate(self._heads(self.q(x)), cos, sin)
        k = rotate(self._heads(self.k(x)), cos, sin).repeat_interleave(self.n_heads // self.n_kv, dim=1)
        v = self._heads(self.v(x)).repeat_interleave(self.n_heads // self.n_kv, dim=1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        y = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class SwiGLUBlock(nn.Module):
    """Pre-norm block: grouped attention, then a SiLU-gated perceptron."""

    def __init__(self, n: int, n_mid: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.RMSNorm(n), GroupedAttention(n), nn.RMSNorm(n)
        self.gate, self.up, self.down = nn.Linear(n, n_mid), nn.Linear(n, n_mid), nn.Linear(n_mid, n)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class SwiGLUTransformer(nn.Module):
    """Decoder with rotary positions, grouped KV and a tied output layer, all in plain tensor operations."""

    def __init__(self, n: int = 36, head_dim: int = 10, length: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(101, n)
        self.blocks = nn.ModuleList(SwiGLUBlock(n, 58) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(n), nn.Linear(n, 101, bias=False)
        self.head.weight = self.embed.weight
        angles = torch.outer(torch.arange(length), 100.0 ** -torch.linspace(0, 1, head_dim // 2))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


class FusedQKVTransformer(nn.Module):
    """Encoder of one block with queries, keys and values in one linear layer, taken apart by unflatten and unbind."""

    def __init__(self, n: int = 36, n_heads: int = 3, head_dim: int = 10, n_mid: int = 58) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(101, n), nn.Parameter(torch.randn(1, 11, n))
        self.norm1, self.qkv, self.out = (
            nn.LayerNorm(n),
            nn.Linear(n, 3 * n_heads * head_dim),
            nn.Linear(n_heads * head_dim, n),
        )
        self.norm2, self.up, self.down = nn.LayerNorm(n), nn.Linear(n, n_mid), nn.Linear(n_mid, n)
        self.head, self.shape = nn.Linear(n, 5), (3, -1, head_dim)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, self.shape).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


class GRUClassifier(nn.Module):
    """Embedding, GRU written with cells in a loop, linear head: one weight used at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(101, 14), nn.GRUCell(14, 22), nn.Linear(22, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = x.new_zeros(x.shape[0], 22)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


class CRNN(nn.Module):
    """Convolutions, then a bidirectional LSTM along the width, as in text recognition."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 14), nn.MaxPool2d(2), conv_bn(14, 22), nn.MaxPool2d((4, 1)))
        self.lstm, self.head = nn.LSTM(22 * 2, 18, bidirectional=True, batch_first=True), nn.Linear(36, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(self.lstm(x.permute(0, 3, 1, 2).flatten(2))[0])


# Sharing, gating and conditioning


class Siamese(nn.Module):
    """Two inputs through one tower; the head reads the difference and the product."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            conv_bn(3, 12), nn.MaxPool2d(2), conv_bn(12, 20), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(2 * 20, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.tower(a), self.tower(b)
        return self.head(torch.cat([(a - b).abs(), a * b], dim=1))


class TiedAutoencoder(nn.Module):
    """Decoder weights are the transposed encoder weights."""

    def __init__(self, widths: tuple[int, ...] = (40, 26, 14)) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(o, i) / math.sqrt(i)) for i, o in itertools.pairwise(widths)
        )
        self.up_biases = nn.ParameterList(nn.Parameter(torch.randn(o)) for o in widths[1:])
        self.down_biases = nn.ParameterList(nn.Parameter(torch.randn(i)) for i in widths[:-1])

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights, self.up_biases, strict=True):
            x = torch.tanh(F.linear(x, weight, bias))
        for weight, bias in list(zip(self.weights, self.down_biases, strict=True))[::-1]:
            x = torch.tanh(F.linear(x, weight.t(), bias))
        return x


class FiLMNet(nn.Module):
    """Convolutional network whose channels are scaled and shifted by a linear function of a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.film1 = nn.Conv2d(3, 14, 3, padding=1), nn.Linear(9, 2 * 14)
        self.conv2, self.film2 = nn.Conv2d(14, 22, 3, padding=1), nn.Linear(9, 2 * 22)
        self.head = pooled_head(22)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for conv, film in ((self.conv1, self.film1), (self.conv2, self.film2)):
            scale, shift = film(condition)[:, :, None, None].chunk(2, dim=1)
            x = F.relu((1 + scale) * conv(x) + shift)
        return self.head(x)


class Highway(nn.Module):
    """Highway network: a gate mixes a transformed and an untouched copy, so all layers share one width."""

    def __init__(self, n: int = 26, n_layers: int = 3) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(12, n), nn.Linear(n, 5)
        self.transforms = nn.ModuleList(nn.Linear(n, n) for _ in range(n_layers))
        self.gates = nn.ModuleList(nn.Linear(n, n) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for transform, gate in zip(self.transforms, self.gates, strict=True):
            t = torch.sigmoid(gate(x))
            x = t * F.relu(transform(x)) + (1 - t) * x
        return self.head(x)


class Maxout(nn.Module):
    """Maxout network: every unit is the largest of three linear functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 22 * 3), nn.Linear(22, 14 * 3), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unflatten(-1, (-1, 3)).amax(-1)
        return self.head(self.second(x).unflatten(-1, (-1, 3)).amax(-1))


class KANLayer(nn.Module):
    """Sum over inputs of one learned function per edge: radial basis functions plus a SiLU term."""

    def __init__(self, n_in: int, n_out: int, n_basis: int = 5) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(-1, 1, n_basis))
        self.coefficients = nn.Parameter(torch.randn(n_out, n_in, n_basis) / math.sqrt(n_in * n_basis))
        self.base = nn.Linear(n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-((x[..., None] - self.centres) ** 2))
        return torch.einsum("bik,oik->bo", basis, self.coefficients) + self.base(F.silu(x))


def kan() -> nn.Module:
    """Kolmogorov-Arnold network of two layers."""
    return nn.Sequential(KANLayer(12, 22), KANLayer(22, 5))


def mlp_selu() -> nn.Module:
    """Plain perceptron with batch norm."""
    return nn.Sequential(
        nn.Linear(12, 34),
        nn.BatchNorm1d(34),
        nn.SELU(),
        nn.Linear(34, 22),
        nn.LayerNorm(22),
        nn.SELU(),
        nn.Linear(22, 5),
    )


class GraphConvolution(nn.Module):
    """Two graph convolutions over a dense adjacency matrix, with a jumping-knowledge concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 22), nn.Linear(22, 14), nn.Linear(36, 5)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency.softmax(-1)
        a = F.relu(adjacency @ self.first(x))
        b = F.relu(adjacency @ self.second(a))
        return self.head(torch.cat([a, b], dim=-1))


class PointNet(nn.Module):
    """PointNet: a shared perceptron on points, maximum over points, the result joined to every point."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv1d(3, 14, 1), nn.BatchNorm1d(14), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv1d(14, 26, 1), nn.BatchNorm1d(26), nn.ReLU())
        self.head = nn.Sequential(nn.Conv1d(40, 18, 1), nn.ReLU(), nn.Conv1d(18, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        local = self.local(x)
        whole = self.wide(local).amax(-1, keepdim=True)
        return self.head(torch.cat([local, whole.expand(-1, -1, x.shape[-1])], dim=1))


class MultiExit(nn.Module):
    """Convolutional trunk with an early and a late classifier and an auxiliary reconstruction."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(3, 14), conv_bn(14, 22, stride=2)
        self.early, self.late, self.picture = pooled_head(14), pooled_head(22), nn.ConvTranspose2d(22, 3, 2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.first(x)
        b = self.second(a)
        return {"early": self.early(a), "late": self.late(b), "picture": self.picture(b)}
