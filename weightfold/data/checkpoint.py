"""Read tensors from a file, never code; put them into a model only if they all fit."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from weightfold.errors import ArtifactError

_PICKLES = (".pt", ".pth", ".bin")
_ENDINGS = ".safetensors, .pt, .pth and .bin"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_CONVERT = (
    "Convert it where it is trusted: safetensors.torch.save_file(model.state_dict(), 'model.safetensors'), "
    "and pass that file."
)


def load_weights_(model: nn.Module, path: str | Path) -> None:
    """Put the weights of a file into a model; the model is changed only if everything fits.

    A tensor that the model holds under several names need stand in the file under one of them only. Counters of batch
    norm (`num_batches_tracked`) may be missing.

    Args:
        model: changed in place.
        path: a .safetensors file, or a .pt, .pth or .bin file that holds nothing but tensors.
    Raises:
        ArtifactError: the file cannot be read or holds code; a tensor is missing, unexpected, of another shape, or not
            finite; names the tensor and the file.
    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.safetensors")
        ...     save_file({"weight": torch.ones(2, 3)}, path)
        ...     model = nn.Linear(3, 2, bias=False)
        ...     load_weights_(model, path)
        >>> model.weight.sum().item()
        6.0
    """
    put_tensors_(model, read_tensors(path), Path(path))


def put_tensors_(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Put tensors that were read from a file into a model; see `load_weights_`."""
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    check_names(model, tensors, path)
    _check_shapes(own, tensors, path)
    check_finite(tensors, path)
    model.load_state_dict(tensors, strict=False)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file on the CPU without running any code in it.

    Args:
        path: a .safetensors file, or a .pt, .pth or .bin file that holds nothing but tensors.
    Returns:
        tensors: by name; what stood under `state_dict` or `model` is unwrapped.
    Raises:
        ArtifactError: the file is missing, truncated, of another kind, or holds code; names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"There is no weights file '{path}'.", remedy="Check the path.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _PICKLES:
        return _unwrap(_read_pickle(path), path)
    raise ArtifactError(
        f"'{path}' has the ending '{path.suffix}'; weights are read from {_ENDINGS} files.",
        remedy=_CONVERT,
    )


def check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse weights that are infinite or not a number, naming the first such tensor.

    Raises:
        ArtifactError: a tensor is not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            n_bad = int((~tensor.float().isfinite()).sum())
            raise ArtifactError(
                f"'{name}' in '{path}' holds {n_bad} of {tensor.numel()} values that are not finite.",
                remedy="Take a checkpoint from before the training diverged.",
            )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"'{path}' is truncated, corrupt or no safetensors file: {error}", remedy="Copy or download it again."
        ) from None


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old formats; what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(f"'{path}' was not read: {_why_refused(error)}.", remedy=_CONVERT) from None
    except Exception as error:  # a broken archive fails in many ways
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ArtifactError(
            f"'{path}' is truncated, corrupt or no file of tensors: {reason}", remedy="Copy or download it again."
        ) from None


def _why_refused(error: pickle.UnpicklingError) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"it holds code, not only tensors (it would run '{code[1]}')"
    return "it is corrupt, or holds more than tensors"


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise ArtifactError(f"'{path}' holds {type(content).__name__}, not tensors by name.", remedy=_CONVERT)
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ArtifactError(f"'{name}' in '{path}' is {type(value).__name__}, not a tensor.", remedy=_CONVERT)
    return content


def check_names(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not by name those of a model.

    Raises:
        ArtifactError: one is missing or unexpected; names it.
    """
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    there = {id(value) for name, value in own.items() if name in tensors}
    missing = [
        name
        for name, value in own.items()
        if name not in tensors and id(value) not in there and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in tensors if name not in own]
    if missing:
        raise ArtifactError(
            f"'{path}' lacks '{missing[0]}' of shape {tuple(own[missing[0]].shape)}, which the model holds"
            f"{_and_more(missing)}.",
            remedy=_hint(unexpected),
        )
    if unexpected:
        raise ArtifactError(
            f"'{path}' holds '{unexpected[0]}' of shape {tuple(tensors[unexpected[0]].shape)}, which the model lacks"
            f"{_and_more(unexpected)}.",
            remedy=_hint(unexpected),
        )


def _check_shapes(own: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    wrong = [name for name, tensor in tensors.items() if tensor.shape != own[name].shape]
    if wrong:
        raise ArtifactError(
            f"'{wrong[0]}' in '{path}' has the shape {tuple(tensors[wrong[0]].shape)}; "
            f"the model needs {tuple(own[wrong[0]].shape)}{_and_more(wrong)}.",
            remedy="Build the model with the settings that the weights were trained with.",
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _hint(unexpected: list[str]) -> str:
    if unexpected:
        return f"Pass the weights of this very model; the first name that only the file has is '{unexpected[0]}'."
    return "Pass the weights of this very model."
