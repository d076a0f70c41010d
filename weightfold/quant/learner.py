"""Exponents and bit widths of a network in training: beside its parameters, with an optimiser of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightfold.errors import ConfigError, DataError
from weightfold.quant.attached import BITS, EXPONENT, attach, detach
from weightfold.quant.fake import MAX_BITS, MIN_BITS, codes_of, limit_of
from weightfold.quant.rate import Prices, prices, rate
from weightfold.ranks import Ranks

PATIENCE = 10
"""Updates in a row without finite gradients after which the run counts as lost."""
LARGEST_PUSH = 10.0
"""Of a bit width at one step, in rows of average cost."""

Values = Mapping[str, tuple[Tensor, Tensor]]
"""Exponents and bits, shape (R,), by parameter name."""


@dataclass
class Quantiser:
    """What is learned for one parameter.

    Args:
        exponent_R: log2 of the step of each row.
        bits_R: bit width of each row.
        price: what its codes cost at the last count.
    """

    exponent_R: Tensor
    bits_R: Tensor
    price: Prices

    def codes(self, weight: Tensor) -> Tensor:
        """Whole numbers, shape (R, C)."""
        return codes_of(weight, self.exponent_R, self.bits_R)

    def count(self, weight: Tensor) -> None:
        """Make prices of the codes as they are."""
        self.price = prices(self.codes(weight), limit_of(self.bits_R))

    def follow(self, weight: Tensor) -> None:
        """Count anew where an edit has changed the parameter's shape."""
        rows = len(self.exponent_R)
        if self.price.first_RC.shape != (rows, weight.numel() // rows):
            self.count(weight)


class Learner:
    """Quantises the parameters of a network, and learns how.

    Steps are learned by Adam. Bit widths take plain steps in proportion to what a bit of the row costs, so that dear
    rows narrow first; neither decays. Gradients are divided by whatever the loss was multiplied by (a scaler,
    micro-batches): a parameter that enters the penalty with slope one tells it.

    Args:
        model: the plain network.
        values: first exponents and bits.
        step_lr: learning rate of exponents, in octaves.
        bits_lr: of widths, in bits, for a row of average cost.
        regrowth: whether gradients reach weights that are clipped, or whose row is zero.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> learner = Learner(layer, {"weight": (torch.full((3,), -3.0), torch.full((3,), 4.0))}, 1e-2, 1e-2)
        >>> (layer(torch.ones(1, 4)).sum() + learner.penalty(1e-6)).backward()
        >>> learner.learn(Ranks(), 1e-6, 1.0, 1)
        1.0
        >>> learner.release()
    """

    def __init__(self, model: nn.Module, values: Values, step_lr: float, bits_lr: float, regrowth: bool = True) -> None:
        self.model = model
        self.quantisers: dict[str, Quantiser] = {}
        for name, parameter in self._among(model, values):
            exponent_R, bits_R = (v.to(parameter.device).requires_grad_() for v in values[name])
            found = prices(codes_of(parameter, exponent_R, bits_R), limit_of(bits_R))
            self.quantisers[name] = Quantiser(exponent_R, bits_R, found)
        attach(model, self.values(), regrowth)
        held = list(self.quantisers.values())
        self._rates = step_lr, bits_lr
        self.optimizers = (
            torch.optim.Adam([q.exponent_R for q in held], step_lr),
            torch.optim.SGD([q.bits_R for q in held], bits_lr),
        )
        self._witness = torch.zeros((), device=held[0].exponent_R.device, requires_grad=True)
        self._n_lost = 0

    @staticmethod
    def _among(model: nn.Module, names: Mapping[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
        named = dict(model.named_parameters())
        return ((name, named[name]) for name in names)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, Quantiser]]:
        """Each quantised parameter with its name and what is learned for it."""
        return ((name, p, self.quantisers[name]) for name, p in self._among(self.model, self.quantisers))

    def values(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Exponents and bits by parameter name."""
        return {name: (q.exponent_R, q.bits_R) for name, q in self.quantisers.items()}

    def followers(self) -> dict[str, str]:
        """Names of exponents and bits as the network's own attributes, and of the parameter whose rows they follow."""
        return {name + leaf: name for name in self.quantisers for leaf in (EXPONENT, BITS)}

    def penalty(self, price: float) -> Tensor:
        """λ times a surrogate of the file's bits, differentiable.

        Args:
            price: λ, nats a bit.
        """
        parts = []
        for _, parameter, quantiser in self.parameters():
            quantiser.follow(parameter)
            parts.append(rate(parameter, quantiser.exponent_R, quantiser.bits_R, quantiser.price))
        return price * torch.stack(parts).sum() + self._witness

    def learn(self, ranks: Ranks, price: float, pace: float, step: int) -> float:
        """One step of exponents and bits.

        Args:
            ranks: whose gradients are averaged.
            pace: learning rates as a share of their highest.
            step: of the run, for errors.
        Returns:
            scale: what the loss was multiplied by, added up over the ranks; 0 where gradients were not finite.
        Raises:
            ConfigError: the penalty was not in the loss.
            DataError: gradients have not been finite for a while.
        """
        flat, held = self._gradients(ranks)
        *parts, scale = flat.split([*(len(t) for t in held), 1])
        if not bool(torch.isfinite(flat).all()) or float(scale) == 0:
            self._n_lost += 1
            if self._n_lost >= PATIENCE:
                raise DataError(
                    f"The loss or its gradients have not been finite for {PATIENCE} steps, up to step {step}.",
                    remedy="Lower the learning rate, or look at the batches of these steps.",
                )
            return 0.0
        self._n_lost = 0
        for tensor, grad in zip(held, parts, strict=True):
            tensor.grad = grad / scale
        usual = price * float(torch.cat([q.price.width_R for q in self.quantisers.values()]).mean())
        for quantiser in self.quantisers.values():
            assert quantiser.bits_R.grad is not None
            quantiser.bits_R.grad.div_(max(usual, 1e-30)).clamp_(-LARGEST_PUSH, LARGEST_PUSH)
        for optimizer, full in zip(self.optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = full * pace
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for quantiser in self.quantisers.values():
                quantiser.bits_R.clamp_(MIN_BITS, MAX_BITS)
        return float(scale)

    def _gradients(self, ranks: Ranks) -> tuple[Tensor, list[Tensor]]:
        """All gradients end to end, added up over the ranks, the witness's last; they are taken off."""
        if self._witness.grad is None:
            raise ConfigError(
                "The penalty is not in the loss: nothing would be compressed.",
                remedy="Train on loss + compressor.penalty().",
            )
        held = [t for q in self.quantisers.values() for t in (q.exponent_R, q.bits_R)]
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in held]
        flat = torch.cat([*grads, self._witness.grad.reshape(1)])
        if ranks.group is not None:
            dist.all_reduce(flat, group=ranks.group)
        for tensor in (*held, self._witness):
            tensor.grad = None
        return flat, held

    def count(self) -> float:
        """Make prices of the codes as they are; gives the bits that they take by the surrogate's own count."""
        for _, parameter, quantiser in self.parameters():
            quantiser.count(parameter)
        return sum(quantiser.price.total for quantiser in self.quantisers.values())

    def release(self) -> None:
        """Take everything off the network."""
        detach(self.model)

    # restarts -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs."""
        held = self.quantisers
        return {
            "values": {n: [q.exponent_R.detach().clone(), q.bits_R.detach().clone()] for n, q in held.items()},
            "prices": {n: list(vars(q.price).values()) for n, q in held.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "lost": self._n_lost,
        }

    @classmethod
    def from_state(
        cls, model: nn.Module, state: Mapping[str, Any], step_lr: float, bits_lr: float, regrowth: bool = True
    ) -> Learner:
        """Quantise a network again as it was."""
        values = {name: (exponent.clone(), bits.clone()) for name, (exponent, bits) in state["values"].items()}
        learner = cls(model, values, step_lr, bits_lr, regrowth)
        for name, price in state["prices"].items():
            learner.quantisers[name].price = Prices(*price)
        for optimizer, value in zip(learner.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        learner._n_lost = int(state["lost"])
        return learner
