"""Self-compression: one loss learns how many bits each channel is worth, and which are worth none, while it trains.

    L = L_task + λ · bits of the file

Weights run as whole numbers times a step (`weightfold.quant.fake`); a step and a bit width for each output channel are
learned with them. What a weight costs is what the file's own coder takes for it (`weightfold.quant.rate`): little in a
busy row and column, much where it would be alone. So weights go to zero, then rows and columns, and a channel that is
silent or that nobody reads is cut out of the network, with its optimiser state, while training goes on.

λ need not be chosen: a controller raises and lowers it so that the file meets a target in bytes, or so that accuracy
on the probe stays within a bound.

Cost: O(N) elementwise work a step, about as much as the optimiser's; less as the network shrinks.
Reference: Cséfalvay & Imber, arXiv 2301.13142; differs in: whole bits and a symmetric grid in the forward pass, the
price of the real coder in place of eq. 4 and 5, a controller in place of a sweep over λ, removal with folded constants,
gradients that reach clipped weights, so that what was dropped may come back.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from weightfold.artifact.matrix import coded_bits
from weightfold.config import Config
from weightfold.errors import ConfigError, DataError
from weightfold.gate import losses
from weightfold.graph.edit import Edit, remove
from weightfold.graph.group import ChannelGroup
from weightfold.methods.base import Method, Moment, Proposal, check_liked
from weightfold.quant.account import Account
from weightfold.quant.activations import Activations
from weightfold.quant.activations import Grid as InputGrid
from weightfold.quant.attached import plain_copy
from weightfold.quant.budget import Budget, Caution, Ramp, expected_accuracy, schedule, target_bytes
from weightfold.quant.codes import CodedModel, coded_model, quantisable
from weightfold.quant.dead import Dead, dead_channels, evenly, first_of_blocks, observe_spans
from weightfold.quant.fake import start, step_index
from weightfold.quant.front import Front, Point
from weightfold.quant.learner import Learner
from weightfold.quant.trimming import Judge, trimmed
from weightfold.size import count_macs, file_bytes, unique_state
from weightfold.widths import Grid

PULL_BITS = 64
"""What a unit of a constant that stands in the way of a removal costs, in bits."""
RELIEF = 0.25
"""What is left of λ while the guard holds."""
PATIENT_STEPS = 100
"""Steps after which a tensor whose codes have never changed is worth a warning, from half of the run on."""


class SelfCompressConfig(Config):
    """Settings of `self_compress`."""

    target: str | int | None = None
    """size of the file: "48 kB", "1.5%" of the float file, or a number of bytes; λ is found by itself"""
    max_accuracy_loss: float | None = Field(default=None, gt=0, le=100)
    """instead: how many points of accuracy on the probe the run may fall behind its own best, 0 to 100"""
    strength: float = Field(default=1e-6, gt=0)
    """without either: λ, what a bit of the file costs in the loss, in nats"""
    at: float | None = Field(default=None, ge=0, lt=1)
    """when quantisation begins, as a share of the steps; by default the later the milder the target, 0.1 without one"""
    reach: float | None = Field(default=None, gt=0, le=1)
    """when the target is to be met (without one: when λ has grown to its full size), as a share of the steps; 0.3 after
    `at` by default"""
    resolution: float = Field(default=0.5, gt=0, le=10)
    """first step of each tensor, in standard deviations of its weights"""
    step_lr: float = Field(default=3e-3, gt=0)
    """learning rate of steps, in octaves; falls with the optimiser's own"""
    bits_lr: float = Field(default=5e-3, ge=0)
    """learning rate of bit widths, in bits, for a row of average cost; 0 keeps the grids as wide as they begin"""
    activation_strength: float = Field(default=0.0, ge=0)
    """what the bit operations of a sample cost in the loss, in nats for all those of the float network, each product
    counted as its bits of weight times bits of input over 32·32; 0: inputs of layers stay float"""
    bias_bits: int = Field(default=8, ge=2, le=16)
    """bits of biases, on one grid for each vector"""
    refresh: int = Field(default=25, ge=1)
    """steps between two countings of the codes, by which prices are made"""
    check: float = Field(default=0.02, gt=0, le=1)
    """how often dead channels are looked for and the file is measured, as a share of the steps"""
    dwell: int = Field(default=2, ge=1)
    """looks in a row at which a channel must be dead before it is cut"""
    regrowth: bool = True
    """whether weights that are clipped, or whose row is zero, still learn, so that they may come back"""
    guard: float | None = Field(default=None, gt=0)
    """rise of the probe loss over its best, in nats, at which pressure eases until it has recovered; None: never"""
    remove: bool = True
    """whether dead channels are cut out of the network; otherwise their codes are zero"""
    liked: dict[str, list[int]] | None = None
    """widths that a target's kernels like, by channel group, as `weightfold tune` lists them: none is cut to another"""
    tensors: str | None = None
    """pattern of the names of tensors to compress, such as "layer?.*"; all matrices and kernels by default"""
    pareto: int = Field(default=0, ge=0)
    """how many networks to keep of those on the front of size against probe loss; 0: none"""

    @model_validator(mode="after")
    def _one_aim(self) -> SelfCompressConfig:
        if self.target is not None and self.max_accuracy_loss is not None:
            raise ValueError("a target and max_accuracy_loss exclude each other: give one")
        if self.reach is not None and self.at is not None and self.reach <= self.at:
            raise ValueError(f"reach ({self.reach:g}) must lie after at ({self.at:g})")
        return self


class SelfCompress(Method):
    """Learns bits and channels in training, down to a size or as far as accuracy allows.

    Attributes:
        history: one record for each look: step, bytes of the file, λ; by tensor: bits, rows and weights that live.
        result: tensors of the file, once converted.
        grids: with ``activation_strength``, the grid of each layer's input, once converted.

    An averaged copy of the network follows every cut, but nothing rounds it. Load its state into the network before
    `convert`, and the file holds the average.

    Example:
        >>> import weightfold as wf
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> method = SelfCompress(target="300 B")
        >>> c = wf.Compressor(net, torch.zeros(1, 8), [method], total_steps=100)
        >>> _ = c.prepare(torch.optim.Adam(net.parameters()))
    """

    name: ClassVar[str] = "self_compress"
    Config: ClassVar[type[Config]] = SelfCompressConfig
    alone: ClassVar[bool] = True

    def __init__(self, config: Config | None = None, **settings: Any) -> None:
        super().__init__(config, **settings)
        self.history: list[dict[str, Any]] = []
        self.result: CodedModel | None = None
        self.grids: dict[str, InputGrid] = {}
        self.refused: dict[str, str] = {}
        self._front = Front(self.config.pareto)
        self._names: list[str] = []
        self._account = Account("", {})
        self._learner: Learner | None = None
        self._activations: Activations | None = None
        self._at, self._reach = schedule(self.config.at, self.config.reach)
        self._aim: Ramp | Budget | Caution = Ramp(self.config.strength, self._at, self._reach)
        self._stuck: dict[str, Tensor] = {}
        self._dwelt: dict[str, Tensor] = {}
        self._still: dict[str, int] = {}
        self._size, self._rest, self._ratio, self._peak_lr = math.nan, 0.0, 1.0, 0.0
        self._n_trimmed = 0
        self._best_loss, self._guarded = math.inf, False
        self._loaded: Mapping[str, Any] | None = None

    # before the first batch -----------------------------------------------------------------------------------------

    def prepare(self, moment: Moment) -> None:
        """Find what can be compressed.

        Raises:
            ConfigError: nothing can, a tensor is quantised already, or the target is below the smallest file.
        """
        config = self.config
        check_liked(moment.graph, config.liked or ())
        self._names, self.refused = quantisable(moment.model, config.tensors)
        self._account = Account.of(moment.model, recorded=bool(moment.ranks.shared(moment.recorded)))
        if not self._names:
            why = "; ".join(f"'{n}': {r}" for n, r in list(self.refused.items())[:3])
            raise ConfigError(f"No parameter can be compressed{': ' + why if why else ''}.")
        if moment.total_steps == 0:
            raise _needs_training()
        measured = {"max_accuracy_loss": config.max_accuracy_loss, "pareto": config.pareto, "guard": config.guard}
        if not moment.probe and (name := next((name for name, value in measured.items() if value), None)):
            raise ConfigError(f"{name} needs a probe to measure by.", remedy="Pass probe= and loss=.")
        if config.max_accuracy_loss is not None:
            expected_accuracy(moment.model, moment.probe, moment.autocast)
            self._aim = Caution(config.max_accuracy_loss)
        if config.target is not None:
            full = file_bytes(unique_state(moment.model))
            target = target_bytes(config.target, full)
            self._at, self._reach = schedule(config.at, config.reach, target / full)
            graph = moment.graph if config.remove else None
            least = self._account.least_bytes(moment.model, self._names, config.bias_bits, graph)
            if target < least:
                raise ConfigError(
                    f"A file of {target:,} bytes is not possible: without any weight it still takes {least:,.0f}.",
                    remedy="Ask for more, or make the network itself smaller.",
                )
            self._aim = Budget(target, self._at, self._reach)

    # in training ----------------------------------------------------------------------------------------------------

    def _begin(self, total_steps: int) -> int:
        return max(1, round(self._at * total_steps))

    def _due(self, step: int, total_steps: int) -> bool:
        return step % max(1, round(self.config.check * total_steps)) == 0 or step == total_steps

    def updates(self, step: int, total_steps: int) -> bool:
        return total_steps > 0 and step >= self._begin(total_steps)

    def due(self, total_steps: int) -> int | None:
        return self._begin(total_steps) if self._learner is None and self.result is None else None

    def acts(self, step: int, total_steps: int) -> bool:
        return self.config.remove and step > self._begin(total_steps) and self._due(step, total_steps)

    def followers(self) -> Mapping[str, str]:
        return {} if self._learner is None else self._learner.followers()

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return () if self._learner is None else self._learner.optimizers

    @property
    def front(self) -> list[Point]:
        """Networks kept on the way, the smallest first."""
        return self._front.points

    @property
    def promised_bytes(self) -> float:
        """Bytes of the file by the latest measurement; once converted, of the file that will be written."""
        return self._size

    @property
    def price(self) -> float:
        """λ now: what a bit costs in the loss, in nats."""
        return self._aim.price * (RELIEF if self._guarded else 1.0)

    def penalty(self) -> Tensor | None:
        """λ times the bits of the file; its value is what the last count of the codes says."""
        if self._learner is None:
            return None
        total = self._learner.penalty(self.price)
        total = total + (self.price * 8 * self._size - total.detach()) + self._pull(self._learner)
        if self._activations is not None:
            total = total + self.config.activation_strength * self._activations.bops(self._weight_bits())
        return total

    def _pull(self, learner: Learner) -> Tensor:
        """Brings constants to zero that no reader can take over."""
        named = dict(learner.model.named_parameters())
        fits = [(named[n], mask) for n, mask in self._stuck.items() if mask.shape == named[n].shape]
        parts = [self.price * PULL_BITS * bias[mask.to(bias.device)].abs().sum() for bias, mask in fits]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    def update(self, moment: Moment) -> None:
        config = self.config
        if self._learner is None:
            named = dict(moment.model.named_parameters())
            if lost := [n for n, p in named.items() if not bool(torch.isfinite(p).all())]:
                raise DataError(
                    f"'{lost[0]}' is not finite at step {moment.step}, at which quantisation begins.",
                    remedy="Lower the learning rate, or look at the batches before this step.",
                )
            self._start(moment)
            return
        pace = self._pace(moment)
        scale = self._learner.learn(moment.ranks, self.price, pace, moment.step)
        if self._activations is not None:
            self._activations.learn(moment.ranks, scale, pace)
        if scale == 0:
            return
        share = moment.step / moment.total_steps
        if self._due(moment.step, moment.total_steps):
            self._measure(self._learner, moment)
            self._look(moment)
        elif moment.step % config.refresh == 0:
            self._size = self._learner.count() * self._ratio / 8 + self._rest
        if isinstance(self._aim, Ramp):
            self._aim.update(share)
        elif isinstance(self._aim, Budget) and moment.step % config.refresh == 0:
            self._aim.update(share, self._size)

    def _start(self, moment: Moment) -> None:
        """Put quantisers on; off again where the network cannot be run or measured with them."""
        config, named = self.config, dict(moment.model.named_parameters())
        values = {n: start(named[n], named[n].shape[0], config.resolution) for n in self._names}
        self._learner = Learner(moment.model, values, config.step_lr, config.bits_lr, config.regrowth)
        try:
            self._activations = self._new_activations(moment)
            self._measure(self._learner, moment)
            self._still = self._checksums()
        except BaseException:
            if self._activations is not None:
                self._activations.release()
            self._learner.release()
            self._learner = self._activations = None
            raise

    def _new_activations(self, moment: Moment) -> Activations | None:
        """Grids at the inputs of all layers whose weights are quantised."""
        if self.config.activation_strength == 0:
            return None
        inputs = [x for x, _ in moment.probe[:2]] or [moment.example]
        return Activations(moment.model, self._macs(moment), inputs)

    def _macs(self, moment: Moment) -> dict[str, float]:
        """Multiply-accumulates of each quantised layer, by module path."""
        found = count_macs(moment.model, moment.example).by_tensor
        leaves = {n.rpartition(".")[0]: found[n] for n in self._names if n.endswith("weight") and n in found}
        return {path: float(n) for path, n in leaves.items()}

    def _weight_bits(self) -> dict[str, Tensor]:
        """Mean width of each layer's rows, those of zeros too, by module path."""
        assert self._learner is not None
        held = self._learner.quantisers.items()
        return {n.rpartition(".")[0]: torch.round(q.bits_R.detach()).mean() for n, q in held}

    def _pace(self, moment: Moment) -> float:
        """The optimiser's learning rate as a share of its highest so far."""
        rates = [float(g["lr"]) for o in moment.optimizers for g in o.param_groups]
        self._peak_lr = max([self._peak_lr, *rates])
        return max(rates) / self._peak_lr if self._peak_lr > 0 else float(not rates)

    def _measure(self, learner: Learner, moment: Moment) -> None:
        """Count what the file's own coder would take, and keep it on record."""
        estimate, exact = learner.count(), 0.0
        tensors: dict[str, dict[str, float]] = {}
        model = self._coded(moment.model)
        for name in learner.quantisers:
            tensor = model.coded[name]
            taken = coded_bits(tensor)
            exact += taken
            tensors[name] = {
                "bits": _mean_bits(tensor.bits_R),
                "rows": int((tensor.bits_R > 0).sum()),
                "weights": int((tensor.codes != 0).sum()),
                "of": tensor.codes.size,
                "bytes": taken / 8,
            }
        self._ratio, self._size = exact / max(estimate, 1.0), self._account.promised_bytes(model)
        self._rest = self._size - exact / 8
        record = {"step": moment.step, "bytes": self._size, "price": self.price, "tensors": tensors}
        if self._activations is not None:
            self._activations.macs = self._macs(moment)
            record["bops"] = float(self._activations.bops(self._weight_bits()).detach())
            record["inputs"] = {path: grid.bits for path, grid in self._activations.grids().items()}
        self.history.append(record)

    def _look(self, moment: Moment) -> None:
        """Look at the probe, and for failures that make no noise."""
        if isinstance(self._aim, Caution):
            self._aim.update(
                float(
                    moment.ranks.shared(
                        expected_accuracy(moment.model, moment.probe, moment.autocast) if moment.ranks.leads else 0.0
                    )
                )
            )
        if self.config.guard is not None and moment.probe and moment.loss is not None:
            own = losses(moment.model, moment.probe, moment.loss, moment.autocast) if moment.ranks.leads else [0.0]
            loss = float(moment.ranks.shared(sum(own) / len(own)))
            self._best_loss = min(self._best_loss, loss)
            self._guarded = loss > self._best_loss + self.config.guard
        late = moment.step >= self._reach * moment.total_steps / 2
        if self.config.pareto and late and moment.probe and moment.loss is not None and moment.ranks.leads:
            found = losses(moment.model, moment.probe, moment.loss, moment.autocast)
            loss = sum(found) / len(found)
            inputs = [x for x, _ in moment.probe]
            self._front.keep(self._size, loss, moment.step, moment.model, self._coded(moment.model), inputs)
        if moment.ranks.leads:
            self._warn(moment)

    def _warn(self, moment: Moment) -> None:
        """Tell of layers that have gone to zero, and of those that do not move."""
        before = self.history[-2]["tensors"] if len(self.history) > 1 else {}
        for name, found in self.history[-1]["tensors"].items():
            if found["rows"] == 0 and before.get(name, {}).get("rows", 0) > 0:
                text = f"Every weight of '{name}' has become zero: nothing passes that layer any more."
                self._tell(moment, name, text, "Ask for a larger file, or lower the strength.")
        now = self._checksums() if self._still else {}
        self._still = {name: codes for name, codes in self._still.items() if now[name] == codes}
        waited = moment.step - self._begin(moment.total_steps)
        if 2 * moment.step >= moment.total_steps and waited >= PATIENT_STEPS:
            for name in self._still:
                text = f"No code of '{name}' has changed in the {waited} steps since its bits are learned."
                self._tell(moment, name, text, "Check that an optimiser holds it, at a learning rate above 0.")
            self._still = {}

    def _tell(self, moment: Moment, name: str, what: str, remedy: str) -> None:
        warnings.warn(f"{what} {remedy}", stacklevel=2)
        moment.record("warning", {"step": moment.step, "tensor": name, "what": what}, {})

    def _checksums(self) -> dict[str, int]:
        """Of each tensor's codes and steps."""
        assert self._learner is not None
        out = {}
        for name, weight, quantiser in self._learner.parameters():
            parts = (quantiser.codes(weight).to("cpu", torch.int16), step_index(quantiser.exponent_R).cpu())
            out[name] = zlib.crc32(b"".join(part.numpy().tobytes() for part in parts))
        return out

    # what is cut ----------------------------------------------------------------------------------------------------

    def step(self, moment: Moment) -> list[Proposal]:
        """Propose to cut what has been dead for a while.

        Raises:
            ConfigError: in a one-shot.
        """
        if moment.total_steps == 0:
            raise _needs_training()
        if self._learner is None:
            return []
        last = moment.step == moment.total_steps
        inputs = [x for x, _ in moment.probe[:2]] or [moment.example]
        spans = observe_spans(moment.model, moment.graph, inputs)
        live = {n: (q.codes(p) != 0).reshape(p.shape) for n, p, q in self._learner.parameters()}
        found, dwelt = [], {}
        self._stuck = {}
        for group in moment.graph:
            if "remove" not in group.admits or group.kind != "channels" or group.name in moment.frozen:
                continue
            dead = dead_channels(moment.model, moment.graph, group, live, spans)
            self._hold(moment, group, dead)
            before = self._dwelt.get(group.name)
            if before is None or len(before) != group.n_channels:
                before = torch.zeros(group.n_channels)
            dwelt[group.name] = torch.where(dead.gone_C, before + 1, 0.0)
            ripe_C = dead.gone_C if last else dwelt[group.name] >= self.config.dwell
            proposal = self._proposal(group, dead, ripe_C, last)
            if proposal is not None:
                found.append(proposal)
        self._dwelt = dwelt
        return found

    def _hold(self, moment: Moment, group: ChannelGroup, dead: Dead) -> None:
        """Note the biases of silent channels whose constant has to come to zero first."""
        for axis in group.axes if bool(dead.stuck_C.any()) else ():
            shape, leaf = moment.graph.shapes[axis.tensor], axis.tensor.rpartition(".")[2]
            if len(shape) == 1 and axis.role != "read" and leaf.startswith("bias"):
                mask = self._stuck.setdefault(axis.tensor, torch.zeros(shape[0], dtype=torch.bool))
                at = axis.index[dead.stuck_C]
                mask[at[at >= 0]] = True

    def _proposal(self, group: ChannelGroup, dead: Dead, ripe_C: Tensor, last: bool) -> Proposal | None:
        gone_C = evenly(ripe_C, group.block)
        if bool(gone_C.all()):
            gone_C[first_of_blocks(group)] = False
        if group.name in (self.config.liked or {}):
            width = Grid(liked=self.config.liked).above(group, int((~gone_C).sum()))
            gone_C = evenly(gone_C, group.block, group.n_channels - width)
        n = int(gone_C.sum())
        if n == 0 or (n < max(1, group.n_channels // 16) and not last):
            return None
        shift = {key: torch.where(gone_C, value, 0.0) for key, value in dead.shift.items()}
        cut = remove(group, (~gone_C).nonzero().flatten())
        edit: Edit = replace(cut, shift={key: value for key, value in shift.items() if bool(value.any())})
        why = {
            "metric": "weights of a channel that are not zero",
            "unit": "weights",
            "value": 0,
            "threshold": 0,
            "unread": int((gone_C & dead.unread_C).sum()),
            "constant": int((gone_C & ~dead.unread_C).sum()),
            "folded": sorted(f"{tensor}[{dim}]" for tensor, dim in edit.shift),
            "dwell": self.config.dwell,
        }
        return Proposal(edit, why, 0.0)

    # the end --------------------------------------------------------------------------------------------------------

    def _coded(self, model: nn.Module) -> CodedModel:
        assert self._learner is not None
        return coded_model(model, self._learner.values(), self.config.bias_bits)

    def convert(self, moment: Moment) -> None:
        """Give the network exactly the values of its file, and take the quantisers off."""
        if self._learner is None:
            return
        self.result = self._trimmed(moment, self._coded(moment.model))
        self._learner.release()
        self.result.load_into(moment.model)
        n_live, n_all = self.result.n_weights()
        coded = self.result.coded
        self._size = self._account.promised_bytes(self.result)
        body = {
            "step": moment.step,
            "weights": [n_live, n_all],
            "bits": {n: sorted(set(t.bits_R.tolist())) for n, t in coded.items()},
            "promised_bytes": round(self._size),
            "trimmed": self._n_trimmed,
        }
        if self._activations is not None:
            self.grids = self._activations.grids()
            self._activations.release()
            body["inputs"] = {p: [g.step, g.bits, g.signed] for p, g in self.grids.items()}
            body["bops"] = self.history[-1]["bops"]
            self._activations = None
        moment.record("precision", body, {})
        self._learner = None

    def _trimmed(self, moment: Moment, model: CodedModel) -> CodedModel:
        """Where the file is still too large, give up the codes that the loss misses least for what they take."""
        aim, account = self._aim, self._account
        if not isinstance(aim, Budget) or account.written_bytes(model) <= aim.target:
            return model
        smaller = model
        if moment.ranks.leads:
            judge = Judge(plain_copy(moment.model), moment.probe, moment.loss, moment.autocast)
            smaller = trimmed(model, self._names, aim.target, account.written_bytes, judge)
        smaller = moment.ranks.shared(smaller)
        self._n_trimmed = model.n_weights()[0] - smaller.n_weights()[0]
        return smaller

    # restarts -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.shared_state(),
            "learner": None if self._learner is None else self._learner.state_dict(),
            "activations": None if self._activations is None else self._activations.state_dict(),
            "front": [] if self._learner is None else self._front.to_state(self._learner.model),
        }

    def shared_state(self) -> dict[str, Any]:
        return {
            "learner": None,
            "activations": None,
            "front": [],
            "aim": self._aim.to_state(),
            "recorded": self._account.recorded,
            "numbers": [self._size, self._rest, self._ratio, self._peak_lr],
            "guard": [self._best_loss, self._guarded],
            "dwelt": dict(self._dwelt),
            "stuck": dict(self._stuck),
            "still": dict(self._still),
            "history": list(self.history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._aim.load_state(state["aim"])
        self._account = replace(self._account, recorded=state.get("recorded", True))
        self._size, self._rest, self._ratio, self._peak_lr = state["numbers"]
        self._best_loss, self._guarded = state["guard"]
        self._dwelt, self._stuck = dict(state["dwelt"]), dict(state["stuck"])
        self._still, self.history = dict(state["still"]), list(state["history"])
        self._loaded = state

    def take_up(self, moment: Moment) -> None:
        state, self._loaded = self._loaded, None
        if state is None or state["learner"] is None:
            return
        self._learner = Learner.from_state(
            moment.model, state["learner"], self.config.step_lr, self.config.bits_lr, self.config.regrowth
        )
        self._activations = self._new_activations(moment)
        if self._activations is not None:
            self._activations.load_state(state["activations"])
        self._front.load_state(state.get("front", ()), moment.model)


def _needs_training() -> ConfigError:
    return ConfigError(
        "Self-compression learns in training, and cannot be done at once.",
        remedy="Pass total_steps= to the Compressor, and call its step() after every step of the optimiser.",
    )


def _mean_bits(bits_R: Any) -> float:
    """Mean width of the rows that live; 0 if none does."""
    live = bits_R[bits_R > 0]
    return float(live.mean()) if live.size else 0.0
