"""Read tensors from a file, never code; put them into a model only if they all fit."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from weightfold.config import nearest
from weightfold.data.kinds import told
from weightfold.data.pickled import Archive, DamagedError, Named, Stored
from weightfold.errors import ArtifactError

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_ENDINGS = ".safetensors, .pt, .pth, .bin and .ckpt"
_USUAL = re.compile(
    r"(model|net|network|module|state_dict|weights|params|ema|student|teacher)(?![a-z])|.*state_dict|.*_ema"
)
_BESIDE = re.compile(r".*(optim|sched|scaler|loop|callback|rng|random|criterion|loss).*", re.IGNORECASE)
_MOST_DEPTH = 5
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
        path: what `read_tensors` reads.
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
    tensors = fitted_names(own, tensors)
    check_names(model, tensors, path)
    _check_shapes(own, tensors, path)
    check_finite(tensors, path)
    model.load_state_dict(tensors, strict=False)


def fitted_names(own: Mapping[str, object], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that a model has for them: without the prefix that all share, or with the model's own.

    Example:
        >>> list(fitted_names({"0.bias": 1}, {"model.net.0.bias": torch.zeros(1)}))
        ['0.bias']
    """
    tried = tensors
    for _ in range(_MOST_DEPTH):
        if tried.keys() <= own.keys():
            return tried
        heads = {name.partition(".")[0] for name in tried if "." in name}
        if len(heads) != 1 or not all("." in name for name in tried):
            break
        tried = {name.partition(".")[2]: value for name, value in tried.items()}
    heads = {name.partition(".")[0] for name in own}
    if len(heads) == 1 and {f"{min(heads)}.{name}" for name in tensors} <= own.keys():
        return {f"{min(heads)}.{name}": value for name, value in tensors.items()}
    return tensors


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file on the CPU without running any code in it.

    Checkpoints are read as training scripts write them: the network may stand under a key of its own beside an
    optimiser, settings and counters, and its names may begin with `module.` (data-parallel) or `_orig_mod.` (compiled).

    Args:
        path: a .safetensors file, or a .pt, .pth, .bin or .ckpt file; with `:KEY` behind it, the network of that key.
    Returns:
        tensors: by name.
    Raises:
        ArtifactError: the file is missing, truncated, of another kind, holds code in the place of tensors, or several
            networks; names it.
    """
    path, key = _split(Path(path))
    if not path.is_file():
        raise ArtifactError(f"There is no weights file '{path}'.", remedy="Check the path.")
    try:
        known = told(path)
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    if known is not None and path.suffix in (".safetensors", *_PICKLES):
        raise ArtifactError(f"'{path}' is {known[0]}.", remedy=known[1])
    if path.suffix == ".safetensors":
        return _unwrapped_names(_read_safetensors(path))
    if path.suffix in _PICKLES:
        try:
            found = _network(_read_pickle(path), path, key, 0)
            return _unwrapped_names({name: _read(value) for name, value in found.items()})
        except DamagedError as error:
            raise _damaged(path, str(error)) from None
    raise ArtifactError(
        f"'{path}' has the ending '{path.suffix}'; weights are read from {_ENDINGS} files.",
        remedy=_CONVERT,
    )


def _split(path: Path) -> tuple[Path, str | None]:
    """The file, and the key of one of its networks."""
    file, colon, key = str(path).rpartition(":")
    return (Path(file), key) if colon and not path.exists() and Path(file).is_file() else (path, None)


def _unwrapped_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what data-parallel and compiled modules put into them."""
    plain = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    if plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    return plain if len(plain) == len(tensors) else tensors


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


def _damaged(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"'{path}' is truncated, corrupt or no file of tensors: {reason}", remedy="Copy or download it again."
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"'{path}' is truncated, corrupt or no safetensors file: {error}", remedy="Copy or download it again."
        ) from None


def _read_pickle(path: Path) -> object:
    if not zipfile.is_zipfile(path):
        return _read_old_pickle(path)
    archive = Archive(path.read_bytes())
    if archive.is_script:
        raise ArtifactError(
            f"'{path}' is a TorchScript program: its tensors come with code, which is not run.",
            remedy="Where it is trusted, write its tensors: torch.save(torch.jit.load(path).state_dict(), 'model.pt').",
        )
    return archive.content()


def _read_old_pickle(path: Path) -> object:
    """What PyTorch wrote before 1.6, which its own reader for tensors alone takes apart."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old formats; what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(f"'{path}' was not read: {_why_refused(error)}.", remedy=_CONVERT) from None
    except Exception as error:  # a broken file fails in many ways
        raise _damaged(path, str(error).partition("\n")[0][:300] or type(error).__name__) from None


def _why_refused(error: pickle.UnpicklingError) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"it holds code, not only tensors (it would run '{code[1]}')"
    return "it is corrupt, or holds more than tensors"


def _read(value: Tensor | Stored) -> Tensor:
    return value if isinstance(value, Tensor) else value.tensor()


def _network(content: object, path: Path, key: str | None, depth: int) -> dict[str, Tensor | Stored]:
    """The tensors by name that a checkpoint holds, under whatever key.

    Raises:
        ArtifactError: there are none, or those of several networks.
    """
    if not isinstance(content, dict) or not content:
        raise _no_tensors(content, path)
    if key is not None:
        if not _holds_tensors(content.get(key), depth):
            raise ArtifactError(f"'{path}' holds no tensors under '{key}'.", remedy=nearest(key, _networks(content, 0)))
        return _network(content[key], path, None, depth + 1)
    inner, direct = _networks(content, depth), [name for name, value in content.items() if _is_tensor(value)]
    if len(inner) > 1 and (not direct or all(_USUAL.fullmatch(name) for name in inner)):
        raise ArtifactError(
            f"'{path}' holds several networks: under {', '.join(map(repr, inner))}.",
            remedy=f"Choose one by its key, for example {path}:{inner[0]} or {path}:{inner[-1]}",
        )
    if inner and (not direct or _USUAL.fullmatch(inner[0])):
        return _network(content[inner[0]], path, None, depth + 1)
    if not direct:
        name, value = next(iter(content.items()))
        if (code := _code_in(content, 0)) is not None:
            raise _holds_code(code, path)
        raise ArtifactError(f"{name!r} in '{path}' is {_kind(value)}, not a tensor.", remedy=_CONVERT)
    for value in content.values():
        if isinstance(value, Named) and not value.path.endswith("multiarray.scalar"):
            raise _holds_code(value, path)
    return {name: value for name, value in content.items() if _is_tensor(value) and isinstance(name, str)}


def _networks(content: dict[Any, Any], depth: int) -> list[str]:
    """Keys under which tensors stand that may be a network's; those of optimisers and the like are passed over."""
    return [
        name
        for name, value in content.items()
        if isinstance(name, str) and not _BESIDE.fullmatch(name) and _holds_tensors(value, depth + 1)
    ]


def _holds_tensors(value: object, depth: int) -> bool:
    if not isinstance(value, dict) or depth > _MOST_DEPTH or not all(isinstance(name, str) for name in value):
        return False
    return any(_is_tensor(item) for item in value.values()) or bool(_networks(value, depth))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor | Stored)


def _code_in(value: object, depth: int) -> Named | None:
    """The first object of a class or function that stands in plain data."""
    if isinstance(value, dict) and depth < _MOST_DEPTH:
        return next((found for item in value.values() if (found := _code_in(item, depth + 1))), None)
    return value if isinstance(value, Named) else None


def _holds_code(value: Named, path: Path) -> ArtifactError:
    reason = f"it holds code, not only tensors (it would run '{value.path}')"
    return ArtifactError(f"'{path}' was not read: {reason}.", remedy=_CONVERT)


def _kind(value: object) -> str:
    return "Tensor" if isinstance(value, Stored) else type(value).__name__


def _no_tensors(content: object, path: Path) -> ArtifactError:
    if isinstance(content, Named):
        return _holds_code(content, path)
    return ArtifactError(f"'{path}' holds {_kind(content)}, not tensors by name.", remedy=_CONVERT)


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
