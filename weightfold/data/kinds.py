"""What a file is that was passed as weights and holds none: told by its first bytes, with what to do about it."""

from __future__ import annotations

from pathlib import Path

_UNPACK = "Unpack it, and pass the file of weights that it holds."
_HEADS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file that it stands for",
        "Fetch the file: git lfs pull.",
    ),
    (b"<!doctype html", "a web page", "Download the file itself: the address of a page about it was saved."),
    (b"<html", "a web page", "Download the file itself: the address of a page about it was saved."),
    (b"<?xml", "an XML text", "Download the file itself: an answer of the server was saved."),
    (b"\x1f\x8b", "compressed (gzip)", _UNPACK),
    (b"bzh", "compressed (bzip2)", _UNPACK),
    (b"\xfd7zxz", "compressed (xz)", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed (zstandard)", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"rar!", "a RAR archive", _UNPACK),
    (
        b"\x93numpy",
        "an array of NumPy",
        "Name its tensors: safetensors.numpy.save_file({'weight': numpy.load(path)}, 'model.safetensors').",
    ),
    (b"\x89hdf", "an HDF5 file, as Keras writes", "Load it where it was made, and write its arrays as safetensors."),
    (b"gguf", "a GGUF file of llama.cpp", "Pass the safetensors files of the model that it was converted from."),
)


def told(path: Path) -> tuple[str, str] | None:
    """What a file is and what to do, if it is one of those that are taken for weights now and then.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "empty", "Copy or download it again."
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:32].lower()
    for mark, kind, remedy in _HEADS:
        if start.startswith(mark):
            return kind, remedy
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if path.suffix == ".safetensors" and head.startswith(b"PK"):
        return "a zip archive, as torch.save writes", "Give its name the ending .pt."
    if path.suffix != ".safetensors" and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "a safetensors file", "Give its name the ending .safetensors."
    if start.startswith((b"{", b"[")) and path.suffix != ".safetensors":
        return "a text (JSON)", "Pass the file of weights beside it."
    return None
