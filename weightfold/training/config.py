"""Settings of a training run."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from weightfold.config import Config
from weightfold.models.task import ImageInput, TaskSpec

_MODELS = {("image", ""): "vgg-small", ("text", "next-token"): "char-gpt", ("text", ""): "gru"}
_ADAPTIVE = ("char-gpt", "gru", "vit-tiny")
_FEW_PIXELS = 256


class Race(Config):
    """On what a network must not grow slower: see `weightfold tune`."""

    target: str = "onnx-cpu"
    """runtime"""
    batch: PositiveInt = 1
    """samples a call"""
    threads: PositiveInt = 1
    """of the runtime"""


class TrainConfig(Config):
    """A dense network and, paired with it, one that grows smaller while it trains."""

    data: str = "digits"
    """a built-in data set, a file or a folder; see `weightfold.data.load`"""
    limit: PositiveInt | None = None
    """at most this many samples for training and validation together, and as many for test"""
    model: str = "auto"
    """a built-in name, or package.module:function; auto: vgg-small, mlp, gru or char-gpt, as the data asks for"""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """settings of a built-in network, such as width"""
    epochs: PositiveInt = 20
    """passes over the training samples"""
    batch_size: PositiveInt = 32
    """samples a step"""
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """first learning rate, which falls to 0 along half a cosine; 0.05 for sgd and 0.002 for adamw"""
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    """sgd has momentum 0.9; auto takes adamw for gru, transformers and self_compress"""
    weight_decay: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    """decay of the weights"""
    augment: bool = False
    """shift (and mirror) images, shift the windows of a text"""
    seed: NonNegativeInt = 0
    """of the initial weights and of the order of samples, the same for both networks"""
    method: Literal["fold", "prune", "self_compress", "none"] = "fold"
    """what makes the second network smaller; none trains the dense one alone"""
    keep: float = Field(default=0.5, gt=0, le=1)
    """share of the channels that the method keeps"""
    max_accuracy_loss: float | None = Field(default=None, ge=0)
    """points of accuracy that folding (in place of `keep` and `at`) or self-compression (of `target`) may cost"""
    time_goal: float | None = Field(default=None, gt=0, lt=1)
    """share of the training time to save, in place of `keep` and `at`"""
    target: str | int | None = None
    """self_compress: size of the file, "48 kB", "1.5%" of the float file, or a number of bytes"""
    strength: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """self_compress: what a bit of the file costs in the loss, in nats, in place of `target`"""
    activation_strength: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """self_compress: what all bit operations of a sample cost in the loss, in nats; 0: layers' inputs stay float"""
    pareto: int = Field(default=0, ge=0, le=16)
    """self_compress: how many networks on the front of size against loss to keep as files"""
    liked: dict[str, list[int]] | None = None
    """widths that the target's kernels like, by channel group, as `weightfold tune` measured them"""
    race: Race | None = None
    """refuse events after which the network would be slower there than the dense one"""
    at: float | None = Field(default=None, ge=0, le=1)
    """when it acts, as a share of the steps; 0.1 by default, self_compress decides by its target"""
    max_increase: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """largest increase of the loss on probe batches that is accepted"""
    dense: bool = True
    """whether to train the dense network too"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes cuda where there is one"""
    threads: PositiveInt | None = None
    """threads of torch; its own choice by default"""

    @model_validator(mode="after")
    def _own_dials(self) -> Self:
        """Each dial belongs to a method, and a run turns one."""
        compresses = self.method == "self_compress"
        given = [n for n in ("target", "strength", "max_accuracy_loss", "time_goal") if getattr(self, n) is not None]
        given += [name for name in ("activation_strength", "pareto") if getattr(self, name)]
        foreign = [name for name in given if name not in ("max_accuracy_loss", "time_goal") and not compresses]
        if foreign:
            raise ValueError(f"'{foreign[0]}' is a setting of the method 'self_compress', not of '{self.method}'")
        for name in ("liked", "race"):
            if getattr(self, name) is not None and self.method not in ("fold", "prune", "self_compress"):
                raise ValueError(f"'{name}' is no setting of the method '{self.method}'")
        if compresses and "time_goal" in given:
            raise ValueError("'time_goal' is a setting of the method 'fold', not of 'self_compress'")
        aims = [name for name in given if name not in ("activation_strength", "pareto")]
        if compresses and len(aims) > 1:
            raise ValueError(f"'{aims[0]}' and '{aims[1]}' exclude each other: give one")
        return self

    def resolved(self, task: TaskSpec) -> Self:
        """Put values in the place of what is left open, for the data's task.

        Self-compression takes AdamW and, for images of few pixels, a network of a quarter of the width.

        Example:
            >>> from weightfold.models import ImageInput, Classes
            >>> task = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
            >>> open = TrainConfig().resolved(task)
            >>> open.model, open.optimizer, open.lr
            ('vgg-small', 'sgd', 0.05)
        """
        model, overrides, compresses = self.model, self.overrides, self.method == "self_compress"
        if model == "auto":
            if compresses and not overrides and isinstance(task.input, ImageInput):
                overrides = {"width": 16} if task.input.height * task.input.width <= _FEW_PIXELS else {}
            model = _MODELS.get((task.input.kind, task.output.kind), _MODELS.get((task.input.kind, ""), "mlp"))
        optimizer = self.optimizer
        if optimizer == "auto":
            optimizer = "adamw" if model in _ADAPTIVE or compresses else "sgd"
        lr = self.lr or (0.05 if optimizer == "sgd" else 0.002)
        return self.model_copy(update={"model": model, "overrides": overrides, "optimizer": optimizer, "lr": lr})

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the networks that are trained, in order.

        Example:
            >>> TrainConfig(method="none").arms, TrainConfig(dense=False).arms, TrainConfig().arms
            (('dense',), ('folded',), ('dense', 'folded'))
        """
        if self.method == "none":
            return ("dense",)
        return ("dense", "folded") if self.dense else ("folded",)
