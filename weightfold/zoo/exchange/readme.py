"""What the head of a Hugging Face README says of a model: the few keys that a zoo keeps, of the simple YAML there."""

from __future__ import annotations

import re
from typing import Any

KEYS = {"license": "license", "base_model": "base_model", "datasets": "data", "tags": "tags", "language": "language",
        "base_model_relation": "relation", "pipeline_tag": "task"}  # fmt: skip
_LINE = re.compile(r"^([A-Za-z_][\w-]*):\s*(.*)$")
_ITEM = re.compile(r"^\s*-\s+(.*)$")


def front_matter(text: str) -> dict[str, Any]:
    """Read the keys that a zoo keeps; whatever else stands there is left out.

    Example:
        >>> front_matter("---\\nlicense: mit\\nbase_model:\\n- org/base\\ntags: [a, 'b']\\nx: {y: 1}\\n---\\n# Title")
        {'license': 'mit', 'base_model': ['org/base'], 'tags': ['a', 'b']}
    """
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, Any] = {}
    key: str | None = None
    for line in lines[1:]:
        if line.strip() in ("---", "..."):
            break
        if pair := _LINE.match(line):
            key = KEYS.get(pair[1])
            value = _value(pair[2])
            if key and value not in ("", []):
                found[key] = value
        elif key and (item := _ITEM.match(line)):
            held = found.setdefault(key, [])
            if isinstance(held, list) and isinstance(value := _value(item[1]), str):
                held.append(value)
    return found


def _value(text: str) -> str | list[str]:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [_bare(part) for part in text[1:-1].split(",") if part.strip()]
    return _bare(text)


def _bare(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text.partition(" #")[0].strip()
