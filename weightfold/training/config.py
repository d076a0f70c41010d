"""Settings of a training run."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt

from weightfold.config import Config
from weightfold.models.task import TaskSpec

METHODS = ("fold", "none", "prune")
_MODELS = {("image", ""): "vgg-small", ("text", "next-token"): "char-gpt", ("text", ""): "gru"}
_ADAPTIVE = ("char-gpt", "gru", "vit-tiny")


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
    """sgd has momentum 0.9; auto takes adamw for gru and transformers"""
    weight_decay: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    """decay of the weights"""
    augment: bool = False
    """shift (and mirror) images, shift the windows of a text"""
    seed: NonNegativeInt = 0
    """of the initial weights and of the order of samples, the same for both networks"""
    method: Literal["fold", "prune", "none"] = "fold"
    """what makes the second network smaller; none trains the dense one alone"""
    keep: float = Field(default=0.5, gt=0, le=1)
    """share of the channels that the method keeps"""
    max_accuracy_loss: float | None = Field(default=None, ge=0)
    """points of accuracy that folding may cost, in place of `keep` and `at`"""
    time_goal: float | None = Field(default=None, gt=0, lt=1)
    """share of the training time to save, in place of `keep` and `at`"""
    at: float = Field(default=0.1, ge=0, le=1)
    """when it acts, as a share of the steps"""
    max_increase: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """largest increase of the loss on probe batches that is accepted"""
    dense: bool = True
    """whether to train the dense network too"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes cuda where there is one"""
    threads: PositiveInt | None = None
    """threads of torch; its own choice by default"""

    def resolved(self, task: TaskSpec) -> Self:
        """Put values in the place of what is left open, for the data's task.

        Example:
            >>> from weightfold.models import ImageInput, Classes
            >>> task = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
            >>> open = TrainConfig().resolved(task)
            >>> open.model, open.optimizer, open.lr
            ('vgg-small', 'sgd', 0.05)
        """
        model = self.model
        if model == "auto":
            model = _MODELS.get((task.input.kind, task.output.kind), _MODELS.get((task.input.kind, ""), "mlp"))
        optimizer = self.optimizer
        if optimizer == "auto":
            optimizer = "adamw" if model in _ADAPTIVE else "sgd"
        lr = self.lr or (0.05 if optimizer == "sgd" else 0.002)
        return self.model_copy(update={"model": model, "optimizer": optimizer, "lr": lr})

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
