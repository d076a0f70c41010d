"""The user's own model: a function of theirs, a Hugging Face folder, or a built-in name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightfold import models
from weightfold.config import nearest
from weightfold.data.checkpoint import check_finite, load_weights_, read_tensors
from weightfold.data.foreign import read_config
from weightfold.data.optional import require
from weightfold.errors import ArtifactError, ConfigError
from weightfold.models import TaskSpec
from weightfold.models.bounded import Bounded


def load_model(
    spec: str | Path, weights: str | Path | None = None, *, task: TaskSpec | None = None, seed: int = 0
) -> nn.Module:
    """Load a model to work on.

    Whatever the model draws while it is built comes from the seed; the global random state is left as it was.

    Args:
        spec: `package.module:function`, imported from the current folder too and called without arguments; a folder as
            Hugging Face writes it (config.json, model.safetensors), read offline; or a built-in name.
        weights: a file for `load_weights_`; a Hugging Face folder brings its own.
        task: what a built-in model is built for.
        seed: of the initial weights.
    Returns:
        model: on the CPU, in the mode that its maker left it in.
    Raises:
        ConfigError: the spec names nothing, its function fails or returns no module, a task is missing.
        ArtifactError: the weights cannot be read, hold code, or do not fit.
    Example:
        >>> load_model("torch.nn:Identity")
        Identity()
    """
    text = str(spec)
    if text in models.NAMES:
        if task is None:
            raise ConfigError(f"The built-in model '{text}' is built for a task.", remedy="Pass task=dataset.task.")
        model = models.build(text, task, seed=seed)
    elif Path(spec).is_dir():
        if weights is not None:
            raise ConfigError(f"The folder '{spec}' brings its own weights.", remedy="Leave out 'weights'.")
        return _seeded(lambda: _from_hugging_face(Path(spec)), seed)
    elif ":" in text:
        model = _seeded(lambda: _from_function(text), seed)
    else:
        raise ConfigError(
            f"There is no model '{text}': neither a built-in name, nor a folder, nor package.module:function.",
            remedy=nearest(text, models.NAMES),
        )
    if weights is not None:
        load_weights_(model, weights)
    return model


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def _from_function(spec: str) -> nn.Module:
    module_name, _, function_name = spec.partition(":")
    with _current_folder_first():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise ConfigError(
                f"'{module_name}', the module of the model '{spec}', cannot be imported: {_reason(error)}",
                remedy="Check the name; it is looked up in the current folder, then among the installed packages.",
            ) from error
        function = getattr(module, function_name, None)
        if not callable(function):
            there = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise ConfigError(
                f"'{module_name}' has no function '{function_name}'.", remedy=nearest(function_name, there)
            )
        try:
            model = function()
        except Exception as error:
            raise ConfigError(
                f"'{spec}' failed: {_reason(error)}", remedy="It is called without arguments and must return the model."
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"'{spec}' must return a torch.nn.Module. Got {type(model).__name__} instead.")
    return model


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def _current_folder_first() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def _from_hugging_face(folder: Path) -> nn.Module:
    config = read_config(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise ArtifactError(
            f"'{folder}' holds an adapter ('adapter_config.json'), whose base model would be looked up elsewhere.",
            remedy="Merge it where it was trained: model.merge_and_unload().save_pretrained(folder).",
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtifactError(
            f"'{folder}' holds no .safetensors file.", remedy="Save it with model.save_pretrained(folder)."
        )
    for file in files:
        check_finite(read_tensors(file), file)
    transformers = require("transformers", "Loading a Hugging Face folder", extra="hf")
    architecture = next(iter(config.get("architectures") or ()), "AutoModel")
    maker = getattr(transformers, architecture, None)
    if not (isinstance(maker, type) and issubclass(maker, transformers.PreTrainedModel)):
        maker = transformers.AutoModel
    with _quiet(transformers.utils.logging), Bounded(sum(file.stat().st_size for file in files)):
        try:
            model, info = maker.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:  # transformers raises whatever its parts raise
            raise ArtifactError(f"'{folder}' cannot be loaded as {architecture}: {_reason(error)}") from None
    _check_loading_info(info, folder)
    return model


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Switch the progress bar and the warnings of transformers off, then back as they were."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _check_loading_info(info: dict[str, Any], folder: Path) -> None:
    for key, verb in (("missing_keys", "lacks"), ("unexpected_keys", "holds the unexpected")):
        if info[key]:
            raise ArtifactError(
                f"The weights in '{folder}' do not fit the model: the file {verb} '{min(info[key])}'.",
                remedy="Save the model again with model.save_pretrained(folder).",
            )
    for name, got, wanted in info["mismatched_keys"]:
        raise ArtifactError(
            f"'{name}' in '{folder}' has the shape {tuple(got)}; the model needs {tuple(wanted)}.",
            remedy="The sizes in config.json must be those the weights were trained with.",
        )
