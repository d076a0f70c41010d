"""What of an exported program (`.pt2`) reaches PyTorch's loader: only what was read here and is plain data.

The loader is made for trusted files. It evaluates the expressions of sizes, looks operators up by walking attributes
from `torch`, imports the class of an enumeration that a tree of arguments names, unpickles, opens libraries, and writes
names into the source text of a `forward` that it then runs. So the archive is taken apart, every text in it is checked
by what the loader does with it, and a new archive is put together of what passed; nothing else is handed on.

| part | what passes |
|---|---|
| sizes | the expressions of `expressions` |
| operators | `torch.ops.aten` but those that open files; control flow; arithmetic on sizes |
| names | ASCII identifiers, as they become Python source; paths of tensors without quotes |
| trees of arguments | tuples, lists, dicts and the outputs of transformers; no enumeration |
| tensors | raw bytes that are as long as their shape says; nothing pickled |
| left out | sample inputs (after they were read as plain tensors), guards, sources of nodes |
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from weightfold.runtime.expressions import SYMBOL, refusal

_CODE = (".so", ".cpp", ".dll", ".dylib", ".cubin", ".ptx", ".o", ".a")
_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"
_CONFIGS = {_WEIGHTS: "model_weights_config.json", _CONSTANTS: "model_constants_config.json"}
_MODEL, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_FIXED = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little"}
_VERSION = ".data/version"
_IGNORED = (".data/", "extra/")
MAX_DEPTH = 100
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,999}|")
_PATH = re.compile(r"[^\x00-\x1f\x7f\"'\\]{0,1000}")
_FILE = re.compile(r"[A-Za-z0-9_]{1,200}")
_TYPE = re.compile(r"builtins\.(tuple|list|dict)|collections\.OrderedDict|transformers(\.[A-Za-z_]\w*)+", re.ASCII)
_ATEN = re.compile(r"torch\.ops\.aten\.([a-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)", re.ASCII)
_OPENS_FILES = frozenset({"from_file", "save", "_print", "warn"})
_LOOPS = "cond while_loop map_impl scan associative_scan wrap_with_set_grad_enabled wrap_with_autocast flex_attention"
_SIZES = "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift rshift"
_TORCH = "sym_not sym_int sym_float sym_ite sym_max sym_min sym_sqrt"
_PREDISPATCH = "_add_batch_dim _remove_batch_dim _vmap_increment_nesting _vmap_decrement_nesting"
_OPERATORS = frozenset(
    [f"torch.ops.higher_order.{name}" for name in _LOOPS.split()]
    + [f"_operator.{name}" for name in _SIZES.split()]
    + [f"torch.{name}" for name in _TORCH.split()]
    + [f"torch._functorch.predispatch.{name}" for name in _PREDISPATCH.split()]
    + ["math.trunc"]
)
_LEFT_OUT = {"guards_code": [], "custom": "", "source_fn_stack": "", "from_node": "", "treespec_namedtuple_fields": {}}
"""Parts that no forward needs, and what stands in their place."""


class RefusedError(ValueError):
    """A part of a program is none of those that a graph of operators needs; says which."""


class CompiledError(RefusedError):
    """A program holds a compiled library or its source."""


def checked_archive(data: bytes) -> bytes:
    """Take a program apart, check every part, and put together what the loader is to read.

    Raises:
        RefusedError: a part would be run, imported or looked up outside the operators of a graph, or is damaged.
    """
    parts = _members(data)
    model = _json(parts[_MODEL], _MODEL)
    clean = {_MODEL: _text(_cleaned(model, "", 0)), _SAMPLES: b"", _VERSION: b"6\n"} | _FIXED
    for folder, config in _CONFIGS.items():
        clean |= _tensors(parts, folder, config)
    if _SAMPLES in parts:
        _check_samples(parts[_SAMPLES])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in clean.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


# the archive ----------------------------------------------------------------------------------------------------------


def _members(data: bytes) -> dict[str, bytes]:
    """The archive's files by their names below its one folder; they are no larger than the archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        compiled = [info.filename for info in infos if info.filename.endswith(_CODE) or "aotinductor" in info.filename]
        if compiled:
            raise CompiledError(f"it holds compiled code ('{compiled[0]}')")
        _check_stored(infos, len(data))
        parts = {info.filename.partition("/")[2]: archive.read(info) for info in infos}
    if len({info.filename.partition("/")[0] for info in infos}) != 1 or len(parts) != len(infos):
        raise RefusedError("its files do not lie in one folder, or one of them stands twice")
    for name, wanted in _FIXED.items():
        if parts.get(name, b"" if name != "byteorder" else wanted).strip() != wanted:
            raise RefusedError(f"its '{name}' is not {wanted.decode()!r}: it is older than PyTorch 2.8, or damaged")
    needed = (_MODEL, *(folder + config for folder, config in _CONFIGS.items()))
    for name in needed:
        if name not in parts:
            raise RefusedError(f"it lacks '{name}'")
    for name in parts:
        known = name in needed or name in _FIXED or name == _SAMPLES or name.startswith(_IGNORED)
        tensor = name.startswith((_WEIGHTS, _CONSTANTS)) and _FILE.fullmatch(name.rpartition("/")[2])
        if not known and not tensor and name not in ("version", ""):
            raise RefusedError(f"'{name}' is no part of a graph and its tensors")
    return parts


def _check_stored(infos: list[zipfile.ZipInfo], size: int) -> None:
    packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise RefusedError(f"'{packed[0]}' is compressed, which torch.export.save does not do")
    if sum(info.file_size for info in infos) > size:
        raise RefusedError("its files are larger than it is itself")


def _check_samples(data: bytes) -> None:
    """Sample inputs are left out; but damaged ones are told."""
    from weightfold.data.pickled import Archive, DamagedError

    try:
        if data:
            Archive(data).content()
    except DamagedError as error:
        raise RefusedError(f"its sample inputs are damaged: {error}") from None


# tensors --------------------------------------------------------------------------------------------------------------


def _tensors(parts: Mapping[str, bytes], folder: str, config: str) -> dict[str, bytes]:
    """The list of tensors in one folder, and their bytes."""
    table = _json(parts[folder + config], config)
    entries = table.get("config")
    if not isinstance(entries, dict):
        raise RefusedError(f"'{config}' lists no tensors")
    clean: dict[str, bytes] = {}
    for name, entry in entries.items():
        path, meta = _field(entry, "path_name", str), _field(entry, "tensor_meta", dict)
        if not _PATH.fullmatch(name) or not _FILE.fullmatch(path):
            raise RefusedError(f"{name!r} is no name of a tensor")
        if _field(entry, "use_pickle", bool) or (folder == _CONSTANTS and not path.startswith("tensor_")):
            raise RefusedError(f"'{name}' is pickled, or no tensor")
        if folder + path not in parts:
            raise RefusedError(f"the bytes of '{name}' are missing")
        clean[folder + path] = parts[folder + path]
        sizes = [_field(size, "as_int", int) for size in _field(meta, "sizes", list)]
        if not all(0 <= size < 1 << 48 for size in sizes) or (not parts[folder + path] and prod(sizes)):
            raise RefusedError(f"'{name}' of shape {tuple(sizes)} has no bytes")
    clean[folder + config] = _text(_cleaned(table, "", 0))
    return clean


def _field(value: Any, name: str, kind: type) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if type(found) is not kind:
        raise RefusedError(f"'{name}' of a tensor is {type(found).__name__}, not {kind.__name__}")
    return found


# texts ----------------------------------------------------------------------------------------------------------------


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise RefusedError(f"'{name}' is no JSON") from None
    if not isinstance(value, dict):
        raise RefusedError(f"'{name}' is no table")
    return value


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def _cleaned(value: Any, key: str, depth: int) -> Any:
    """A copy of plain data in which every text is one that its key allows.

    Args:
        key: under which the value stands; for the items of a list, that of the list.
    """
    if depth > MAX_DEPTH:
        raise RefusedError("it is nested too deeply")
    if key in _LEFT_OUT:
        return _LEFT_OUT[key]
    if isinstance(value, dict):
        check = _KEYS.get(key, _check_name)
        for name in value:
            check(name)
        free = key in _KEYS or key in _BY_NAME
        return {name: _cleaned(item, "" if free else name, depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item, key, depth + 1) for item in value]
    if isinstance(value, str):
        return _TEXTS.get(key, _check_name)(value)
    if type(value) is int and value.bit_length() > 64:
        raise RefusedError(f"'{key}' holds a number of {value.bit_length()} binary digits")
    return value


def _check_name(text: str) -> str:
    """A name becomes part of Python source."""
    if not _NAME.fullmatch(text):
        raise RefusedError(f"{text[:80]!r} is no name of a value")
    return text


def _check_path(text: str) -> str:
    """The path of a module or tensor is written between quotes."""
    if not _PATH.fullmatch(text):
        raise RefusedError(f"{text[:80]!r} is no path of a module or tensor")
    return text


def _check_symbol(text: str) -> str:
    if not SYMBOL.fullmatch(text):
        raise RefusedError(f"{text[:80]!r} is no symbol of a size")
    return text


def _check_expression(text: str) -> str:
    reason = refusal(text)
    if reason is not None:
        raise RefusedError(f"the size {text[:80]!r} is evaluated by PyTorch's loader, and {reason}")
    return text


def _check_operator(text: str) -> str:
    aten = _ATEN.fullmatch(text)
    if text not in _OPERATORS and (aten is None or aten[1] in _OPENS_FILES or aten[1].startswith("__")):
        raise RefusedError(f"{text[:80]!r} is no operator of a graph")
    return text


def _check_string(text: str) -> str:
    """An argument such as 'same' or 'none'; it is written by `repr`."""
    if len(text) > 1000 or not text.isprintable():
        raise RefusedError(f"{text[:80]!r} is no argument of an operator")
    return text


def _check_number(text: str) -> str:
    if text not in ("Infinity", "-Infinity", "NaN", "inf", "-inf", "nan"):
        raise RefusedError(f"{text[:80]!r} is no number")
    return text


def _check_tree(text: str) -> str:
    try:
        protocol, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise RefusedError("the tree of its arguments is damaged") from None
    if protocol != 1:
        raise RefusedError(f"the tree of its arguments has the form {protocol!r}")
    _check_branch(tree, 0)
    return json.dumps([1, tree])


def _check_branch(tree: Any, depth: int) -> None:
    if depth > MAX_DEPTH or not isinstance(tree, dict) or set(tree) != {"type", "context", "children_spec"}:
        raise RefusedError("the tree of its arguments is damaged")
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    if not (kind is None or (isinstance(kind, str) and _TYPE.fullmatch(kind))) or not isinstance(children, list):
        raise RefusedError(f"{str(kind)[:80]!r} is no container of arguments")
    if context is not None:
        try:
            keys = json.loads(context)
        except (ValueError, TypeError, RecursionError):
            raise RefusedError("the tree of its arguments is damaged") from None
        for name in keys if isinstance(keys, list) else [keys]:
            if not (name is None or type(name) is int or (isinstance(name, str) and _PATH.fullmatch(name))):
                raise RefusedError(f"{str(name)[:80]!r} is no key of an argument")
    for child in children:
        _check_branch(child, depth + 1)


def _printable(text: str) -> str:
    """Text for people: it stands in comments of the source, so that a line may not end where the loader sees none."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def _refused_key(text: str) -> str:
    raise RefusedError(f"{text[:80]!r} is an object of a class of its own")


_KEYS: dict[str, Callable[[str], str]] = {
    "range_constraints": _check_symbol,
    "as_string_to_argument": _check_string,
    "config": _check_path,
    "custom_obj_values": _refused_key,
}
"""What the keys of a table may be, by the key under which it stands; elsewhere names."""
_BY_NAME = frozenset({"tensor_values", "sym_int_values", "sym_float_values", "sym_bool_values", "opset_version"})
"""Tables whose keys the model names, so that they say nothing of what stands under them."""
_TEXTS: dict[str, Callable[[str], str]] = {
    "expr_str": _check_expression,
    "target": _check_operator,
    "as_operator": _check_operator,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
    "fqn": _check_path,
    "parameter_name": _check_path,
    "buffer_name": _check_path,
    "tensor_constant_name": _check_path,
    "custom_obj_name": _refused_key,
    "class_fqn": _refused_key,
    "as_string": _check_string,
    "as_strings": _check_string,
    "as_float": _check_number,
    "as_floats": _check_number,
    "as_float_lists": _check_number,
    "real": _check_number,
    "imag": _check_number,
    "stack_trace": _printable,
    "nn_module_stack": _printable,
    "torch_fn": _printable,
    "torch_version": _printable,
}
"""What a text may be, by its key; elsewhere a name."""
