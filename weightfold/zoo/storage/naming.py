"""Names of models: which are allowed, and how a model is found by a name or by the beginning of its digest."""

from __future__ import annotations

import re

from weightfold.config import nearest
from weightfold.errors import ConfigError
from weightfold.zoo.storage.catalogue import Catalogue

LONGEST, LONGEST_FOUND = 200, 120
"""Characters of a name that a user chose, and of one that was found: a digest may still come behind that."""
SHORTEST_PREFIX = 6
N_NEAR = 40
_DIGEST = re.compile(r"[0-9a-f]+")


def checked_name(name: str) -> str:
    """Refuse names that cannot be told apart on a screen.

    Raises:
        ConfigError: it is empty, too long, or holds control characters or outer blanks.
    Example:
        >>> checked_name("resnet/seed 3")
        'resnet/seed 3'
    """
    if not name or name != name.strip() or len(name) > LONGEST or not name.isprintable():
        raise ConfigError(
            f"{name!r} is no name of a model.",
            remedy=f"Take 1 to {LONGEST} printable characters without blanks at the ends.",
        )
    return name


def tidy_name(text: str) -> str:
    """A name that is allowed, near to what a file, folder or class is called.

    Example:
        >>> tidy_name("seed 3"), tidy_name(" two\\nlines"), len(tidy_name("x" * 300))
        ('seed 3', 'two_lines', 120)
    """
    plain = "".join(c if c.isprintable() else "_" for c in text.strip())
    return plain[:LONGEST_FOUND].strip() or "model"


def find(catalogue: Catalogue, ref: str) -> str:
    """The name of the model that a text stands for: a name, or the beginning of a digest.

    Models of one content share its digest; the one that was added first stands for them.

    Raises:
        ConfigError: there is none, or the digest's beginning fits several; names near matches.
    """
    if catalogue.digest_of(ref) is not None:
        return ref
    found = catalogue.find_digests(ref) if len(ref) >= SHORTEST_PREFIX and _DIGEST.fullmatch(ref) else []
    if len(found) == 1:
        return catalogue.names_of(found[0])[0]
    if found:
        names = [f"'{catalogue.names_of(digest)[0]}' ({digest[:16]})" for digest in found[:3]]
        raise ConfigError(f"'{ref}' begins several digests: {', '.join(names)}.", remedy="Give more digits, or a name.")
    names = catalogue.names()
    if not names:
        raise ConfigError(f"There is no model '{ref}': the zoo is empty.", remedy="Add models: weightfold zoo add.")
    hint = nearest(ref, names) if len(names) <= N_NEAR else nearest(ref, names).partition(" Valid: ")[0]
    if hint.startswith("Did") or len(names) <= N_NEAR:
        raise ConfigError(f"There is no model '{ref}' in the zoo.", remedy=hint)
    raise ConfigError(f"There is no model '{ref}' among {len(names):,}.", remedy="weightfold zoo list shows all names.")
