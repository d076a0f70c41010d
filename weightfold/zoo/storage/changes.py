"""Changes of what a zoo holds, each in one transaction that is checked within it."""

from __future__ import annotations

from dataclasses import replace

from weightfold.errors import ArtifactError, ConfigError
from weightfold.fingerprint import digest as digest_of
from weightfold.zoo.storage.catalogue import MAX_DEPTH, Catalogue, Content
from weightfold.zoo.storage.contents import Reader, to_blob
from weightfold.zoo.storage.objects import Objects

_AGAIN = "Nothing was changed. Another process changed the zoo meanwhile, or the difference was made of other tensors."
N_SHOWN = 8


def switch(
    catalogue: Catalogue, objects: Objects, digest: str, blob: bytes, parent: str, lossy: bool, decoded: str
) -> None:
    """Keep a content as a difference from now on; see `Zoo.switch`."""
    if lossy == (decoded == digest):
        raise ConfigError(
            f"A {'lossy' if lossy else 'lossless'} difference whose result has the digest {decoded[:12]}."
        )
    with objects.lease():
        base = _known(catalogue, parent)
        try:
            found = digest_of(Reader(catalogue, objects).decode(blob, base))
        except ArtifactError as error:
            raise ArtifactError(
                f"The difference to {parent[:12]} cannot be read: {error.message}", remedy=_AGAIN
            ) from None
        if found != decoded:
            raise ArtifactError(
                f"The difference to {parent[:12]} gives {found[:12]} instead of {decoded[:12]}.", remedy=_AGAIN
            )
        name = objects.put(blob)
        with catalogue.writing():
            old = _known(catalogue, digest)
            if _known(catalogue, parent).decoded != base.decoded:
                raise ArtifactError(f"The content {parent[:12]} was packed anew while it was used.", remedy=_AGAIN)
            _check_chain(catalogue, digest, parent)
            if old.decoded != decoded and catalogue.children(digest):
                raise ArtifactError(
                    f"What reading {_names(catalogue, digest)} gives must stay, for others are differences to it: "
                    f"{_list(catalogue, catalogue.children(digest))}.",
                    remedy="Pack a parent losslessly.",
                )
            if old.lossy and not lossy:
                raise ArtifactError(f"{_names(catalogue, digest)} was packed lossily; what was lost is not in the zoo.")
            moved = replace(old, blob=name, stored_bytes=len(blob), base=parent, decoded=decoded)
            catalogue.move_content(moved)


def unpack(catalogue: Catalogue, objects: Objects, digest: str) -> None:
    """Keep a content in full again; see `Zoo.unpack`."""
    with objects.lease():
        content = _known(catalogue, digest)
        if content.base is None:
            return
        blob = to_blob(Reader(catalogue, objects).state(content))
        name = objects.put(blob)
        with catalogue.writing():
            now = _known(catalogue, digest)
            if now.decoded != content.decoded:
                raise ArtifactError(f"The content {digest[:12]} was packed anew while it was unpacked.", remedy=_AGAIN)
            catalogue.move_content(replace(now, blob=name, stored_bytes=len(blob), base=None))


def restore(catalogue: Catalogue, objects: Objects, content: Content) -> None:
    """Put a content back that is there, but lossily, or damaged; it was just written in full. Within a transaction."""
    held = _known(catalogue, content.digest)
    if held.blob == content.blob:
        return
    if not held.lossy:
        try:
            Reader(catalogue, objects).state(held)
            return
        except ArtifactError:
            pass
    elif catalogue.children(held.digest):
        raise ConfigError(
            f"The zoo holds this model as {_names(catalogue, held.digest)}, packed lossily, and others are differences "
            f"to that: {_list(catalogue, catalogue.children(held.digest))}.",
            remedy="Unpack those first: weightfold zoo rm --unpack, or remove them.",
        )
    catalogue.move_content(content)


def remove(catalogue: Catalogue, objects: Objects, name: str, children: bool, unpack_first: bool) -> list[str]:
    """Take a model away; see `Zoo.remove`."""
    digest = catalogue.digest_of(name)
    if unpack_first and digest is not None and catalogue.names_of(digest) == [name]:
        for child in catalogue.children(digest):
            unpack(catalogue, objects, child)
    with catalogue.writing():
        digest = catalogue.digest_of(name)
        if digest is None:
            raise ConfigError(f"The model '{name}' was removed by someone else meanwhile.")
        if catalogue.names_of(digest) != [name]:
            catalogue.remove_model(name)
            return [name]
        needed = catalogue.children(digest)
        if needed and not children:
            raise ConfigError(
                f"'{name}' cannot be removed: others are stored as differences to it: {_list(catalogue, needed)}.",
                remedy="--unpack stores them in full first, --children removes them too.",
            )
        return _remove_below(catalogue, digest)


def _remove_below(catalogue: Catalogue, digest: str) -> list[str]:
    gone: list[str] = []
    for child in catalogue.children(digest):
        gone += _remove_below(catalogue, child)
    for name in catalogue.names_of(digest):
        catalogue.remove_model(name)
        gone.append(name)
    catalogue.remove_content(digest)
    return gone


def _check_chain(catalogue: Catalogue, digest: str, parent: str) -> None:
    """Refuse a ring, and a chain of differences that is too long."""
    above, at = 0, parent
    while at is not None:
        if at == digest:
            raise ArtifactError(
                f"{_names(catalogue, parent)} is itself a difference to {_names(catalogue, digest)}.",
                remedy="Choose another parent, or unpack that one.",
            )
        held = _known(catalogue, at)
        above, at = above + 1, held.base
    below = _height(catalogue, digest)
    if above + below > MAX_DEPTH:
        raise ArtifactError(
            f"A chain of {above + below} differences would be longer than {MAX_DEPTH}.",
            remedy="Choose a parent nearer to what is stored in full.",
        )


def _height(catalogue: Catalogue, digest: str) -> int:
    return max((1 + _height(catalogue, child) for child in catalogue.children(digest)), default=0)


def _known(catalogue: Catalogue, digest: str) -> Content:
    found = catalogue.content(digest)
    if found is None:
        raise ArtifactError(f"The zoo holds no content {digest[:12]}.", remedy="It was removed, or never added.")
    return found


def _names(catalogue: Catalogue, digest: str) -> str:
    names = catalogue.names_of(digest)
    return f"'{names[0]}'" if names else digest[:12]


def _list(catalogue: Catalogue, digests: list[str]) -> str:
    more = f" and {len(digests) - N_SHOWN} more" if len(digests) > N_SHOWN else ""
    return ", ".join(_names(catalogue, digest) for digest in digests[:N_SHOWN]) + more
