"""The `config.json` of a Hugging Face folder: read as plain data, and refused where it would fetch or run something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weightfold.artifact.plain import parse_json
from weightfold.errors import ArtifactError

MOST_BYTES = 1 << 24
PLAIN_ATTENTION = ("eager", "sdpa")
"""What PyTorch has itself; every other word makes transformers load a kernel, from the hub if need be."""
RUNNING = {
    "auto_map": "code that comes with the model",
    "trust_remote_code": "code that comes with the model",
    "custom_pipelines": "code that comes with the model",
    "custom_generate": "code that comes with the model",
    "auto_mapping": "an import of the module that it names",
    "quantization_config": "the code of a quantiser",
    "compression_config": "the code of a quantiser",
    "kernel_config": "kernels from the hub",
    "use_kernels": "kernels from the hub",
    "allow_all_kernels": "kernels from the hub",
    "use_pretrained_backbone": "weights of another model from the hub",
    "peft_config": "weights of another model",
    "_adapter_model_path": "weights of another model",
    "base_model_name_or_path": "weights of another model",
    "gguf_file": "a file of another kind",
}
"""Fields that make transformers or its helpers run, import or fetch something, and what."""
_OWN = "Write a function that builds the model, and pass package.module:function with the weights file."


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration.

    Raises:
        ArtifactError: it is missing, damaged or no table, or a field of it would fetch or run something; names it.
    """
    again = "Pass a folder that model.save_pretrained(folder) wrote."
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("it is too large")
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(f"'{path}' cannot be read: {reason}.", remedy=again) from None
    if not isinstance(config, dict):
        raise ArtifactError(f"'{path}' holds {type(config).__name__}, not settings by name.", remedy=again)
    for place, what in _running(config, ""):
        raise ArtifactError(f"'{path}' asks for {what} ('{place}'); it is not run.", remedy=_OWN)
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"The 'architectures' of '{path}' are no list of names.", remedy=again)
    return config


def _running(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Fields at any depth that would fetch or run something."""
    if isinstance(value, list):
        for item in value:
            yield from _running(item, place)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        where = f"{place}.{key}".lstrip(".")
        if key in RUNNING and item:
            yield where, RUNNING[key]
        if key.endswith(("attn_implementation", "attn_implementation_internal", "experts_implementation")):
            words = list(item.values()) if isinstance(item, dict) else [item]
            if any(word is not None and word not in PLAIN_ATTENTION for word in words):
                yield where, "kernels from the hub"
        yield from _running(item, where)
