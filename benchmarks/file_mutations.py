"""Damage that knows what it damages: bytes, JSON and texts, with values that readers stumble over.

Everything is drawn from the generator that is passed.
"""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

MARK = "weightfold_fuzz_ran"
"""A name that only planted code uses; see `file_fuzz`."""
CODE = f"__import__('{MARK}')"
INTEGERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62,
            2**63 - 1,
            2**63, 2**64 - 1, 10**30, 10**400, -1, -2, -128, -(2**31), -(2**63))  # fmt: skip
TEXTS = ("", "a", "\ud800", "\udfff\ud800", "é", "\0",
         "a\nb", "a'b", 'a"b', "\\", "../../x", "/etc/passwd", "__class__",
         "__metadata__", "NaN", "1e999", "%s%n", "a" * 5000, CODE, f"x={CODE}", f'"+{CODE}+"', f"os.system('{MARK}')",
         "torch.os.system", "builtins.exec", "float32", "built-in", "\u2028", "e\u0301", "s0", "9" * 5000)  # fmt: skip
_BRACKETS = re.compile(r'"(?:\\u0001|\x01)([\[{])(\d{1,4})"')
SCALARS: tuple[Any, ...] = (None, True, False, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"))


def value(draw: Random) -> Any:
    """A value of JSON that a reader may not expect."""
    kind = draw.randrange(9)
    if kind < 3:
        return draw.choice(INTEGERS)
    if kind < 5:
        return draw.choice(TEXTS)
    if kind == 5:
        return draw.choice(SCALARS)
    if kind == 6:
        return draw.choice(
            ([], {}, [[]], [{}], {"": {}}, [0] * 100, ["a", 1], {"a": [1]}, {"__enum__": True, "fqn": MARK})
        )
    if kind == 7:
        return nested(draw.choice((3, 70, 300, 2000)), draw)
    return draw.randrange(-(2**16), 2**16)


def nested(depth: int, draw: Random) -> Any:
    """A value in many brackets; deeper ones stand as a text that is put in later, as writers cannot write them."""
    if depth > 100:
        return f"\x01{'[' if draw.random() < 0.5 else '{'}{depth}"
    inner: Any = 1
    for _ in range(depth):
        inner = [inner]
    return inner


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every place of a tree: what holds it, and its key."""
    found, stack = [], [tree]
    while stack:
        here = stack.pop()
        items = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, inner in items:
            found.append((here, key))
            stack.append(inner)
    return found


def tree(whole: Any, draw: Random, times: int | None = None) -> Any:
    """Damage a tree of plain data, which is copied before."""
    root = [json.loads(json.dumps(whole))]
    for _ in range(times or draw.choice((1, 1, 1, 2, 4))):
        found = places(root)
        holder, key = draw.choice(found)
        kind = draw.randrange(8)
        if kind < 4:
            holder[key] = value(draw)
        elif kind == 4 and holder is not root:
            del holder[key]
        elif kind == 5 and isinstance(holder, dict):
            word = draw.choice((draw.choice(TEXTS), str(draw.choice(found)[1])))
            holder[word] = holder[key] if draw.random() < 0.5 else holder.pop(key)
        elif kind == 6:
            other, place = draw.choice(found)
            if other is not root:
                holder[key] = json.loads(json.dumps(other[place])) if len(json.dumps(other[place])) < 2000 else 0
        elif isinstance(holder[key], list):
            holder[key] = holder[key] * draw.choice((0, 2, 50)) if len(holder[key]) < 100 else holder[key][:1]
        elif isinstance(holder[key], str):
            holder[key] = text(holder[key], draw)
        elif type(holder[key]) is int:
            holder[key] += draw.choice((-1, 1, 2**31, 2**62))
    return root[0]


def written(whole: Any, draw: Random) -> str:
    """A tree as JSON: brackets that no writer can write put in, now and then a key twice or a number beyond floats."""
    out = json.dumps(whole, ensure_ascii=draw.random() < 0.7)
    out = _BRACKETS.sub(_brackets, out)
    if draw.random() < 0.05:
        out = out.replace(": 1", ": 1e999", 1)
    if draw.random() < 0.05 and out.startswith("{") and len(out) > 2:
        out = out[:-1] + "," + out[1:]
    if draw.random() < 0.03:
        out = text(out, draw)
    return out


def _brackets(match: re.Match[str]) -> str:
    depth = int(match[2])
    return "[" * depth + "]" * depth if match[1] == "[" else '{"a":' * depth + "1" + "}" * depth


def text(whole: str, draw: Random) -> str:
    """Damage a text."""
    kind, at = draw.randrange(6), draw.randrange(len(whole) + 1)
    end = min(len(whole), at + draw.choice((1, 1, 4, 30)))
    if kind == 0:
        return whole[:at] + draw.choice(TEXTS) + whole[at:]
    if kind == 1:
        return whole[:at] + whole[end:]
    if kind == 2:
        return whole[:at]
    if kind == 3:
        return whole[:end] + whole[at:end] * draw.choice((1, 3, 200)) + whole[end:]
    if kind == 4:
        other = draw.randrange(len(whole) + 1)
        return whole[:at] + whole[other : other + 40] + whole[end:]
    return (
        whole[:at]
        + "".join(draw.choice("()[]{}\"'\\,:;+-*/^=.eE0129 \n\tAa_$%<>\u00e9\0") for _ in range(end - at))
        + whole[end:]
    )


def octets(whole: bytes, draw: Random, other: bytes | None = None) -> bytes:
    """Damage bytes: flip, cut, repeat, exchange, overwrite by extreme numbers, splice with another sample."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
        if not data:
            return draw.randbytes(draw.randrange(64))
        at = draw.randrange(len(data))
        kind = draw.randrange(9)
        if kind < 3:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 3:
            data[at] = draw.choice((0, 1, 127, 128, 255))
        elif kind == 4:
            width = draw.choice((2, 4, 8))
            data[at : at + width] = (draw.choice(INTEGERS) & ((1 << 8 * width) - 1)).to_bytes(
                width, draw.choice(("little", "big"))
            )
        elif kind == 5:
            del data[at : at + draw.choice((1, 2, 8, 64))]
        elif kind == 6:
            data[at:at] = data[at : at + draw.choice((1, 4, 32))] * draw.choice((1, 2, 16))
        elif kind == 7:
            two = draw.randrange(len(data))
            data[at], data[two] = data[two], data[at]
        elif other and draw.random() < 0.5:
            data[at:] = other[draw.randrange(len(other)) :]
        else:
            data = data[:at] if draw.random() < 0.3 else data[:at] + draw.randbytes(draw.randrange(1, 16)) + data[at:]
    return bytes(data)
