"""Read a whole zoo and say what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weightfold.errors import ArtifactError, WeightfoldError
from weightfold.zoo.storage import tables
from weightfold.zoo.storage.catalogue import Catalogue
from weightfold.zoo.storage.contents import Reader, read_extras
from weightfold.zoo.storage.objects import Objects


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Args:
        kind: "catalogue", "content" or "extras".
        names: models that are affected.
        message: what is wrong, with the blob's path.
        remedy: what to do.
    """

    kind: str
    names: tuple[str, ...]
    message: str
    remedy: str | None = None


def verify(
    catalogue: Catalogue, objects: Objects, progress: Callable[[int, int, str], None] | None = None
) -> list[Problem]:
    """Check the catalogue, read every blob, decode every content; see `Zoo.verify`."""
    found = [Problem("catalogue", (), text, "Restore a copy of the zoo's folder.") for text in catalogue.damages()]
    reader = Reader(catalogue, objects)
    found += _row_problems(catalogue)
    contents = _parents_first(catalogue.bases())
    for at, digest in enumerate(contents):
        names = tuple(catalogue.names_of(digest))
        found += _content_problems(catalogue, objects, reader, digest, names)
        if progress is not None:
            progress(at + 1, len(contents), names[0] if names else digest[:12])
    return found + _extras_problems(catalogue, objects)


def _row_problems(catalogue: Catalogue) -> list[Problem]:
    found = []
    for name in catalogue.names():
        try:
            catalogue.model(name)
        except ArtifactError as error:
            found.append(Problem("catalogue", (name,), error.message, error.remedy))
    return found


def _content_problems(
    catalogue: Catalogue, objects: Objects, reader: Reader, digest: str, names: tuple[str, ...]
) -> list[Problem]:
    with objects.lease():
        try:
            content = catalogue.content(digest)  # as it is now: others may pack or remove meanwhile
            if content is not None:
                reader.state(content)
        except WeightfoldError as error:
            return [Problem("content", names, error.message, error.remedy)]
        except (
            Exception
        ) as error:  # bytes that have their digest and still do not decode: of a newer version, or made so
            return [Problem("content", names, f"{type(error).__name__}: {error}", "Is this weightfold old?")]
    return []


def _extras_problems(catalogue: Catalogue, objects: Objects) -> list[Problem]:
    found = []
    with objects.lease():
        for blob, names in catalogue.beside().items():
            try:
                data = objects.read(blob)
                if data.startswith(b"{"):
                    read_extras(data)
                else:
                    tables.from_bytes(data)
            except ArtifactError as error:
                remedy = f"Remove {', '.join(map(repr, names[:3]))} and add again from the source."
                found.append(Problem("extras", names, error.message, remedy))
    return found


def _parents_first(bases: Mapping[str, str | None]) -> list[str]:
    """Order contents so that children follow their parent, whose tensors are then at hand."""
    below: dict[str | None, list[str]] = {}
    for digest, base in bases.items():
        below.setdefault(base, []).append(digest)
    order, stack = [], list(reversed(below.get(None, [])))
    while stack:
        digest = stack.pop()
        order.append(digest)
        stack += reversed(below.get(digest, []))
    return order + sorted(set(bases) - set(order))
