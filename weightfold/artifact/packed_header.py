"""The header of a packed file: the tensors' names, shapes and kinds, and how to build the module; in a few bytes.

A length, that many bytes of JSON deflated with a preset dictionary, then for each tensor one byte and some numbers,
and 32 bytes for the head of a ledger if there is one. Left out is what can be told from the rest: the shape of a bias,
integer attributes such as `out_features`, the fingerprint.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightfold.artifact.format import Attribute, Resized, Shape, Structure, Value
from weightfold.artifact.plain import parse_json
from weightfold.errors import ArtifactError, ConfigError

ENTROPY, PACKED = "entropy", "packed"
KINDS = (ENTROPY, PACKED, "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
"""How a tensor lies in the file: coded, or an array of a type. Its place in this list is written: only append."""
_SUFFIXES = {"w": "weight", "b": "bias", "m": "running_mean", "v": "running_var", "n": "num_batches_tracked"}
_LETTERS = {suffix: letter for letter, suffix in _SUFFIXES.items()}
_DERIVED, _RESIZED = 7, 128
_LEAST_TEXT, _MOST_TEXT = 1 << 16, 64
"""Bytes that a header's text may have at least, and for each that it takes; a thousand equal modules come to 20."""
_WORDS = (
    b'"mlp:n","module.model.network.features.encoder.decoder.embed.classifier.backbone.layers.","stem.0:w","bn:wbmvn",'
    b'"downsample.0:w","downsample.1:wbmvn","shortcut.0:w","shortcut.1:wbmvn","weight_ih_l0:","weight_hh_l0:",'
    b'"bias_ih_l0:","bias_hh_l0:","gru.","lstm.","sequence:w","position:","position:w","token:w","patches:wb",'
    b'"blocks.1.attn.proj:wb","blocks.1.attn.qkv:wb","blocks.1.mlp.fc1:wb","blocks.1.mlp.fc2:wb","blocks.1.norm1:wb",'
    b'"blocks.1.norm2:wb","blocks.2.attn.proj:wb","blocks.2.attn.qkv:wb","blocks.2.mlp.fc1:wb","blocks.2.mlp.fc2:wb",'
    b'"blocks.2.norm1:wb","blocks.2.norm2:wb","norm:wb","layer1.0.bn1:wbmvn","layer1.0.bn2:wbmvn","layer1.0.conv1:w",'
    b'"layer1.0.conv2:w","layer2.0.bn1:wbmvn","layer2.0.bn2:wbmvn","layer2.0.conv1:w","layer2.0.conv2:w",'
    b'"layer3.0:w","layer3.1:wbmvn","prep.0:w","prep.1:wbmvn","res1.0.0:w","res1.0.1:wbmvn","res1.1.0:w",'
    b'"res1.1.1:wbmvn","res3.0.0:w","res3.0.1:wbmvn","res3.1.0:w","res3.1.1:wbmvn","features.0:w","features.1:wbmvn",'
    b'"features.10:w","features.11:wbmvn","features.3:wb","features.4:wbmvn","in_features","out_features","in_channels",'
    b'"out_channels","num_features","num_embeddings","embedding_dim","num_heads","head_dim","hidden_size","groups",'
    b'"instance","folder","function","config.","gru","vgg-small","vit-tiny","char-gpt","resnet20","resnet9",'
    b'{"kind":"table","n_features":{"kind":"text","vocab":96,"context":128{"kind":"next-token","vocab":'
    b'"overrides":{"activation":"tanh","relu","norm":"width":"depth":"num_heads":"channels":[20,50],"hidden":[500],'
    b'"hidden":[300,100],"i":[{"dtype":"int64","high":"shape":[1,784]}],"n":["0:wb","2:wb","4:wb","body.0:wb",'
    b'"body.2:wb","body.4:wb","head:wb"]}{"a":[["","l":{"i":[{"shape":[1,3,32,32]}],"n":["conv1:w","bn1:wbmvn",'
    b'{"b":{"kind":"built-in","name":"mlp","overrides":{"hidden":[300,100]},"task":{"input":{"channels":3,"height":32,'
    b'"kind":"image","width":32},"output":{"kind":"classes","n":10}}},'
    b'{"b":{"kind":"built-in","name":"lenet5","task":{"input":{"channels":1,"height":28,"kind":"image","width":28},'
    b'"output":{"kind":"classes","n":10}}},"i":[{"shape":[1,1,28,28]}],"n":["conv1:wb","conv2:wb","fc1:wb","fc2:wb",'
    b'"fc3:wb","head:wb"]}'
)
"""What headers hold often, the most usual last. Part of the format: never changed, a new one is a new version."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a packed file.

    Args:
        name: its name in the module's state.
        shape: sizes of its dimensions.
        kind: one of `KINDS`.
    """

    name: str
    shape: Shape
    kind: str


def in_order(names: Iterable[str]) -> list[str]:
    """The order of tensors in a file: by module, and within it weight, bias and statistics.

    Example:
        >>> in_order(["b.bias", "b.weight", "a.x"])
        ['a.x', 'b.weight', 'b.bias']
    """

    def key(name: str) -> tuple[str, int, str]:
        module, _, last = name.rpartition(".")
        return module, list(_LETTERS).index(last) if last in _LETTERS else len(_LETTERS), last

    return sorted(names, key=key)


def write_header(structure: Structure, entries: Sequence[Entry]) -> bytes:
    """Give the header of a file.

    Args:
        structure: its fingerprint and versions are not kept.
        entries: in the order of `in_order`.
    Raises:
        ArtifactError: the structure and the tensors do not fit each other; names the tensor.
    """
    shapes = {entry.name: entry.shape for entry in entries}
    for name, resized in structure.sizes.items():
        if shapes.get(name) != resized.after:
            raise ArtifactError(
                f"'{name}' is to be written with the shape {shapes.get(name)}; its structure says {resized.after}.",
                remedy="Make the codes and the structure from the same model.",
            )
    head = structure.ledger_head
    raw_head = bytes.fromhex(head) if head is not None and _is_digest(head) else b""
    document = {
        "a": _unexpected(structure),
        "b": structure.builder.model_dump(mode="json", exclude_defaults=True),
        "h": head if head is not None and not raw_head else None,
        "i": [one.model_dump(mode="json", exclude_defaults=True) for one in structure.inputs],
        "l": dict(structure.aliases),
        "n": _shorten([entry.name for entry in entries]),
    }
    text = _dumps({key: value for key, value in document.items() if value})
    numbers, modules = bytearray([1 if raw_head else 0]), _Modules()
    for entry in entries:
        resized = structure.sizes.get(entry.name)
        numbers += _shape_bytes(entry, entry.shape if resized is None else resized.before, modules)
    short = deflate(text)
    return varint(len(short)) + short + bytes(numbers) + raw_head


def read_header(data: bytes, start: int) -> tuple[Structure, list[Entry], int]:
    """Read a header.

    Args:
        data: the file.
        start: where its header begins.
    Returns:
        structure: with an empty fingerprint, as this follows from the tensors.
        entries: of the tensors, in their order in the file.
        end: the byte after the header.
    Raises:
        ArtifactError: it is no header.
    """
    try:
        return _read(data, start)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError, zlib.error, ConfigError) as e:
        reason = e.message if isinstance(e, ConfigError) else str(e)
        raise ArtifactError(f"The header of a packed file is corrupt: {reason}.", remedy="Write it again.") from None


def _read(data: bytes, start: int) -> tuple[Structure, list[Entry], int]:
    length, at = read_varint(data, start)
    content = parse_json(inflate(data[at : at + length]))
    at += length
    has_head, at = data[at], at + 1
    names = _lengthen(content.get("n", []))
    entries: list[Entry] = []
    sizes: dict[str, Resized] = {}
    modules = _Modules()
    for name in names:
        entry, before, at = _read_shape(name, data, at, modules)
        entries.append(entry)
        if before != entry.shape:
            sizes[name] = Resized(before=before, after=entry.shape)
    head = content.get("h")
    if has_head:
        head, at = data[at : at + 32].hex(), at + 32
    if at > len(data):
        raise ValueError("it is cut off")
    plain = {"builder": content["b"], "sizes": sizes, "aliases": content.get("l", {}), "inputs": content.get("i", [])}
    structure = Structure(**plain, ledger_head=head, fingerprint="")
    return structure.model_copy(update={"attributes": _with_expected(sizes, content.get("a"))}), entries, at


# text -----------------------------------------------------------------------------------------------------------------


def deflate(text: bytes) -> bytes:
    """Shorten bytes that resemble the usual header."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _WORDS)
    return coder.compress(text) + coder.flush()


def inflate(data: bytes) -> bytes:
    """Undo `deflate`."""
    coder = zlib.decompressobj(-15, _WORDS)
    text = coder.decompress(data, _LEAST_TEXT + _MOST_TEXT * len(data))
    if not coder.eof or coder.unused_data:
        raise ValueError("its text is cut off or too long")
    return text


def varint(number: int) -> bytes:
    """A number as bytes, seven bits each, the lowest first.

    Example:
        >>> varint(5), varint(300), read_varint(varint(300), 0)
        (b'\\x05', b'\\xac\\x02', (300, 2))
    """
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out) + bytes([number])


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a number, and where the next one begins."""
    number = shift = 0
    while data[at] > 127:
        number |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if shift > 63:
            raise ValueError("a number has too many bytes")
    return number | data[at] << shift, at + 1


def _dumps(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _is_digest(text: str) -> bool:
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


# names ----------------------------------------------------------------------------------------------------------------


def _shorten(names: Sequence[str]) -> list[str]:
    """Names by module: "conv1:wb" for `conv1.weight` and `conv1.bias`; a name of another kind ends in a colon."""
    out: list[list[str]] = []
    for name in names:
        module, dot, last = name.rpartition(".")
        letter = _LETTERS.get(last)
        if letter is None or (module == "" and dot):
            out.append([name, ""])
        elif out and out[-1][0] == module and out[-1][1]:
            out[-1][1] += letter
        else:
            out.append([module, letter])
    return [f"{module}:{letters}" for module, letters in out]


def _lengthen(short: Any) -> list[str]:
    if not isinstance(short, list):
        raise TypeError("its names are no list")
    names: list[str] = []
    for text in short:
        module, _, letters = text.rpartition(":")
        names += [f"{module}.{_SUFFIXES[letter]}".lstrip(".") for letter in letters] if letters else [module]
    if len(set(names)) != len(names):
        raise ValueError("a name stands in it twice")
    return names


# shapes ---------------------------------------------------------------------------------------------------------------


class _Modules:
    """The first dimension of each module's first tensor, now and before: the shape that its bias is likely to have."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[Shape, Shape]] = {}

    def expected(self, name: str) -> tuple[Shape, Shape] | None:
        """What a tensor's shape is likely to be, and was before."""
        return self._first.get(name.rpartition(".")[0])

    def saw(self, name: str, shape: Shape, before: Shape) -> None:
        """Remember a tensor."""
        self._first.setdefault(name.rpartition(".")[0], (shape[:1], before[:1]))


def _shape_bytes(entry: Entry, before: Shape, modules: _Modules) -> bytes:
    kind = KINDS.index(entry.kind)
    derived = modules.expected(entry.name) == (entry.shape, before)
    modules.saw(entry.name, entry.shape, before)
    if derived:
        return bytes([kind | _DERIVED << 4])
    if len(entry.shape) >= _DERIVED or len(before) != len(entry.shape):
        raise ArtifactError(
            f"'{entry.name}' has the shape {entry.shape}, before {before}; a packed file holds up to six dimensions, "
            "the same number before and after."
        )
    changed = entry.shape != before
    numbers = (*entry.shape, *(before if changed else ()))
    first = kind | len(entry.shape) << 4 | (_RESIZED if changed else 0)
    return bytes([first]) + b"".join(varint(n) for n in numbers)


def _read_shape(name: str, data: bytes, at: int, modules: _Modules) -> tuple[Entry, Shape, int]:
    first, at = data[at], at + 1
    kind, n_dims = KINDS[first & 15], first >> 4 & 7
    expected = modules.expected(name)
    if n_dims == _DERIVED:
        if expected is None:
            raise ValueError(f"the shape of '{name}' follows from nothing")
        return Entry(name, expected[0], kind), expected[1], at
    numbers = []
    for _ in range(n_dims * (2 if first & _RESIZED else 1)):
        number, at = read_varint(data, at)
        numbers.append(number)
    shape, before = tuple(numbers[:n_dims]), tuple(numbers[-n_dims:] if n_dims else ())
    modules.saw(name, shape, before)
    return Entry(name, shape, kind), before, at


# attributes -----------------------------------------------------------------------------------------------------------


def expected_attributes(sizes: Mapping[str, Resized]) -> list[Attribute]:
    """The integer attributes that modules of common kinds have, by the shapes of their weights."""
    usual = {1: ("num_features",), 2: ("out_features", "in_features"), 4: ("out_channels", "in_channels")}
    out: list[Attribute] = []
    for name, resized in sizes.items():
        module, _, last = name.rpartition(".")
        if last != "weight":
            continue
        pairs = zip(usual.get(len(resized.before), ()), resized.before, resized.after, strict=False)
        out += [Attribute(module=module, name=n, before=a, after=b) for n, a, b in pairs if a != b]
    return out


def _plain(value: Value) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _unexpected(structure: Structure) -> list[Any]:
    """How the attributes differ from those expected: the places of expected ones that are not, and the others."""
    ordered = {name: structure.sizes[name] for name in in_order(structure.sizes)}
    expected = expected_attributes(ordered)
    missing = [place for place, one in enumerate(expected) if one not in structure.attributes]
    others = sorted((a for a in structure.attributes if a not in expected), key=lambda a: (a.module, a.name))
    rows = [[a.module, a.name, _plain(a.before), _plain(a.after)] for a in others]
    return [missing, *rows] if missing or rows else []


def _with_expected(sizes: Mapping[str, Resized], stored: Any) -> tuple[Attribute, ...]:
    missing, *rows = stored or [[]]
    if not all(type(place) is int for place in missing):
        raise TypeError("the places of its attributes are no numbers")
    kept = [one for place, one in enumerate(expected_attributes(sizes)) if place not in set(missing)]
    others = [Attribute(module=m, name=n, before=_value(a), after=_value(b)) for m, n, a, b in rows]
    return (*kept, *others)


def _value(stored: Any) -> Value:
    return tuple(stored) if isinstance(stored, list) else stored
