"""Read a model from whatever it lies in, without running its code: tensors, how it is built, what is said of it.

Runs and exports of weightfold | safetensors | .pt, .pth, .bin that hold tensors only | Hugging Face folders, sharded or
not | modules | tensors by name
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.artifact import Structure, read_header
from weightfold.artifact.format import KEY, parse_structure
from weightfold.artifact.format import check_tensors as check_structure
from weightfold.artifact.packed import SUFFIX as PACKED
from weightfold.artifact.plain import parse_json
from weightfold.data.checkpoint import read_tensors
from weightfold.errors import ArtifactError
from weightfold.export.card import run_facts
from weightfold.export.opened import is_saved
from weightfold.export.saved import model_file
from weightfold.fingerprint import digest
from weightfold.zoo.exchange.readme import front_matter
from weightfold.zoo.storage.contents import check_tensors

ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", PACKED)
_NAMELESS = ("model", "pytorch_model", "checkpoint", "weights", "adapter_model", "last", "best", "final")
KEPT = ("config.json", "adapter_config.json", "generation_config.json", "preprocessor_config.json", "README.md")
_LARGEST_KEPT = 1 << 20


@dataclass(frozen=True, eq=False)
class Imported:
    """A model as it was found.

    Args:
        state: CPU tensors by name; a tied tensor stands under each of its names.
        digest: of the state.
        name: what to call it unless the user says otherwise.
        source: file or folder.
        architecture: what builds it, as text.
        structure: how weightfold rebuilds it, if it knows.
        metadata: of the file.
        files: small texts beside the weights, by file name.
        facts: license, data, scores, as the source gives them.
        parent: what the source says that it comes from.
        module: the module itself, if that was given.
    """

    state: dict[str, Tensor]
    digest: str
    name: str
    source: str | None = None
    architecture: str | None = None
    structure: Structure | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None
    module: nn.Module | None = None


def read_model(source: str | Path | nn.Module | Mapping[str, Tensor]) -> Imported:
    """Read a model from a file, a folder, a module or tensors by name.

    Raises:
        ArtifactError: it is missing, truncated, of another kind, or holds code; names the file and what was found.
    Example:
        >>> found = read_model(nn.Linear(3, 2))
        >>> found.name, found.architecture, sorted(found.state)
        ('Linear', 'torch.nn.modules.linear.Linear', ['bias', 'weight'])
    """
    if isinstance(source, nn.Module):
        return _of_module(source)
    if isinstance(source, Mapping):
        state = checked(source, "The state")
        return Imported(state, digest(state), "model")
    path = Path(source)
    if not path.exists():
        raise ArtifactError(f"There is no model '{path}'.", remedy="Check the path.")
    if is_saved(path):
        return _of_saved(model_file(path))
    if path.is_dir():
        return _of_folder(path)
    return _of_file(path)


def find_models(path: Path) -> list[Path]:
    """List the models that a path stands for: itself, or all below a folder that is none itself.

    A folder that links lead to more than once is looked at once.

    Raises:
        ArtifactError: there is no such path, or no model below it.
    """
    if not path.exists():
        raise ArtifactError(f"There is no model '{path}'.", remedy="Check the path.")
    if not path.is_dir() or _is_model_folder(path):
        return [path]
    found = _below(path, {path.resolve()})
    if not found:
        raise ArtifactError(
            f"The folder '{path}' holds no model: no run, no config.json, no file that ends in {', '.join(ENDINGS)}.",
            remedy="Name the model's file.",
        )
    return found


def _below(folder: Path, seen: set[Path]) -> list[Path]:
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            found += [path] if path.suffix in ENDINGS else []
        elif path.resolve() not in seen:
            seen.add(path.resolve())
            found += [path] if _is_model_folder(path) else _below(path, seen)
    return found


def checked(tensors: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Copy tensors by name to plain CPU tensors; ties stay ties.

    Raises:
        ArtifactError: something is no tensor, or one that no file can hold; names it.
    """
    if not tensors:
        raise ArtifactError(f"{where} holds no tensors.")
    state: dict[str, Tensor] = {}
    seen: dict[object, Tensor] = {}
    memories: set[int] = set()
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ArtifactError(f"{where}: {name!r} is {type(value).__name__}, not a tensor.")
        check_tensors({name: value})
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ArtifactError(
                f"'{name}' is sparse, quantised or without values ({value.layout}, {value.dtype}).",
                remedy="Store plain tensors: value.to_dense(), value.dequantize().",
            )
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if value.numel() else name
        if key not in seen:
            plain = value.detach().cpu().contiguous()
            memory = plain.untyped_storage().data_ptr()
            seen[key] = (
                plain.clone() if memory in memories else plain
            )  # parts of one tensor: files know only whole ones
            memories.add(memory)
        state[name] = seen[key]
    return state


def _of_module(module: nn.Module) -> Imported:
    kind = type(module)
    state = checked({n: v for n, v in module.state_dict().items() if isinstance(v, Tensor)}, kind.__name__)
    return Imported(
        state, digest(state), kind.__name__, architecture=f"{kind.__module__}.{kind.__qualname__}", module=module
    )


def _of_saved(path: Path) -> Imported:
    if path.suffix == PACKED:
        return _of_packed(path)
    header = read_header(path)
    structure = parse_structure(header.metadata[KEY], str(path)) if KEY in header.metadata else None
    if structure is None:
        return _of_file(path)
    check_structure(structure, header, path)
    state = read_tensors(path)
    state |= {alias: state[name] for alias, name in structure.aliases.items()}
    found = digest(state)
    if found != structure.fingerprint:
        raise ArtifactError(
            f"The tensors in '{path}' do not have the fingerprint that its metadata gives: they were changed.",
            remedy="Copy or write it again.",
        )
    return Imported(
        state, found, name_of(path), _plain(path), structure.builder.name, structure, dict(header.metadata),
        facts=_facts_of_run(path),
    )  # fmt: skip


def _of_packed(path: Path) -> Imported:
    from weightfold.artifact import read_packed

    packed = read_packed(path)
    state = {name: torch.from_numpy(array.copy()) for name, array in packed.arrays().items()}
    state |= {alias: state[name] for alias, name in packed.structure.aliases.items()}
    found = digest(state)
    structure = packed.structure.model_copy(update={"fingerprint": found})
    return Imported(
        state, found, name_of(path), _plain(path), structure.builder.name, structure, {KEY: structure.to_json()},
        facts=_facts_of_run(path),
    )  # fmt: skip


def _of_file(path: Path) -> Imported:
    if path.suffix not in ENDINGS:
        raise ArtifactError(
            f"'{path}' ends in '{path.suffix}'; models are read from {', '.join(ENDINGS)} files and from folders.",
            remedy="Write the weights with safetensors.torch.save_file, or weightfold export --to safetensors.",
        )
    state = checked(read_tensors(path), f"'{path}'")
    metadata = dict(read_header(path).metadata) if path.suffix == ".safetensors" else {}
    return Imported(state, digest(state), name_of(path), _plain(path), metadata=metadata)


def _of_folder(folder: Path) -> Imported:
    files = {name: text for name in KEPT if (text := _text(folder / name)) is not None}
    state = checked(_sharded(folder), f"'{folder}'")
    config = _json(files.get("config.json", "{}"), folder / "config.json")
    adapter = _json(files.get("adapter_config.json", "{}"), folder / "adapter_config.json")
    said = front_matter(files.get("README.md", ""))
    base = said.pop("base_model", None) or adapter.get("base_model_name_or_path")
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    return Imported(
        state, digest(state), name_of(folder), _plain(folder), None if architecture is None else _plain(architecture),
        files=files, facts=said, parent=_plain(base[0] if isinstance(base, list) else base) if base else None,
    )  # fmt: skip


def _sharded(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, from one file or as many as its index names."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            return _by_index(index)
        if (folder / f"{stem}.{ending}").is_file():
            return read_tensors(folder / f"{stem}.{ending}")
    found = sorted(file for file in folder.iterdir() if file.suffix == ".safetensors")
    if len(found) == 1:
        return read_tensors(found[0])
    reason = f"{len(found)} .safetensors files and no index" if found else "no .safetensors file"
    raise ArtifactError(
        f"'{folder}' holds {reason}.", remedy="Save it with model.save_pretrained(folder), or name the file itself."
    )


def _by_index(index: Path) -> dict[str, Tensor]:
    text = _text(index)
    places = _json(text or "{}", index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ArtifactError(f"'{index}' names no tensors: it has no weight_map.", remedy="Copy the folder again.")
    state: dict[str, Tensor] = {}
    for shard in sorted({str(value) for value in places.values()}):
        if Path(shard).name != shard:
            raise ArtifactError(f"'{index}' names the shard '{shard}', which lies elsewhere; it is not read.")
        held = read_tensors(index.parent / shard)
        twice = sorted(set(held) & set(state))
        if twice:
            raise ArtifactError(f"'{twice[0]}' stands in two shards of '{index}'.", remedy="Copy the folder again.")
        state |= held
    for lost in sorted(set(places) - set(state)):
        raise ArtifactError(f"'{index.parent / places[lost]}' lacks '{lost}', which the index says it holds.",
                            remedy="Copy the folder again.")  # fmt: skip
    return state


def _plain(value: object) -> str:
    """A path, or what a file says, as text that JSON and a terminal take, whatever bytes it is made of."""
    return str(value).encode("utf-8", "replace").decode()


def name_of(path: Path) -> str:
    """What to call the model of a file or folder.

    Example:
        >>> name_of(Path("runs/seed3/model.safetensors")), name_of(Path("nets/a.pt")), name_of(Path("bert/model"))
        ('seed3', 'a', 'bert')
    """
    path = path.absolute()
    name = path.stem if path.suffix in ENDINGS else path.name
    while name in _NAMELESS and path.parent.name:
        path = path.parent
        name = path.name
    return name


def _facts_of_run(path: Path) -> dict[str, Any]:
    """What the run says whose model this is: its score on the test set under the score's name, its data and method."""
    if path.stem != "model":
        return {}
    try:
        known = run_facts(path.parent)
    except ArtifactError:  # a run of another kind; its tensors are as good
        return {}
    if not known:
        return {}
    return {known["score"]: known["after"]["value"], "data": known["data"]["name"], "method": known["method"]}


def _is_model_folder(path: Path) -> bool:
    return is_saved(path) or any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def _text(path: Path) -> str | None:
    try:
        if not path.is_file() or (path.name in KEPT and path.stat().st_size > _LARGEST_KEPT):
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}.") from None


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ArtifactError(f"'{path}' is no JSON: {error}.", remedy="Copy the folder again.") from None
    return value if isinstance(value, dict) else {}
