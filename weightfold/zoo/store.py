"""A zoo: one folder that keeps many models, each content once, and gives every one back as it was.

    zoo.db   the catalogue: names, cards, where each content lies
    blobs/   safetensors files and differences, under the SHA-256 of their bytes
    lock     held by writers, so that a sweep never meets them

A model is acknowledged when `add` returns: its blob was flushed to the disk before the catalogue named it. What is
read is verified twice, the blob by its bytes and the tensors by their digest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from weightfold.artifact.files import make_folder, sync
from weightfold.errors import ArtifactError, ConfigError, WeightfoldError
from weightfold.weights.symmetry import Symmetries
from weightfold.zoo.cache import size_of
from weightfold.zoo.card import Card
from weightfold.zoo.exchange.adding import Record, Wanted, check, content_of, free_name, model_of, records
from weightfold.zoo.exchange.describe import Traced, Tracer
from weightfold.zoo.exchange.imports import Imported, read_model
from weightfold.zoo.exchange.writing import write_model
from weightfold.zoo.storage import changes, tables
from weightfold.zoo.storage.catalogue import Catalogue, Content, Model
from weightfold.zoo.storage.check import Problem, verify
from weightfold.zoo.storage.contents import Reader, read_extras
from weightfold.zoo.storage.naming import find
from weightfold.zoo.storage.objects import WAIT_S, Objects, Swept

CATALOGUE = "zoo.db"
BATCH = 64
BATCH_BYTES = 1 << 27
"""Models of one transaction: so many, or so many bytes."""
Source = str | Path | nn.Module | Mapping[str, Tensor]
Refused = Callable[[Source, WeightfoldError], None]
Progress = Callable[[int, int, str], None]


def _writable(folder: Path) -> bool:
    return all(os.access(path, os.W_OK) for path in (folder, folder / CATALOGUE))


class Zoo:
    """A folder of models; see `Zoo.open`. Any number of processes may read and write it at once.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder, Zoo.open(f"{folder}/zoo") as zoo:
        ...     card = zoo.add({"w": torch.ones(2, 3)}, name="ones", facts={"accuracy": 0.5})
        ...     (card.n_parameters, zoo.card(card.digest[:8]).name, zoo.state("ones")["w"].sum().item())
        (6, 'ones', 6.0)
    """

    def __init__(self, folder: Path, catalogue: Catalogue, objects: Objects, tracer: Tracer | None = None) -> None:
        self.folder = folder
        self._catalogue, self._objects = catalogue, objects
        self._reader = Reader(catalogue, objects)
        self._tracer = tracer or Tracer()
        self._tables: dict[str, Symmetries] = {}
        self._written: dict[int, tuple[Symmetries, bytes]] = {}

    @classmethod
    def open(
        cls, folder: str | Path, *, create: bool = True, readonly: bool | None = None, tracer: Tracer | None = None
    ) -> Zoo:
        """Open the zoo in a folder; a context manager.

        Args:
            folder: of the zoo; made if it is missing.
            create: make a new zoo where there is none.
            readonly: write nothing, so that it can be listed, read and verified where it cannot be written; None: where
                its folder cannot be written.
            tracer: what was traced before, to share it with other zoos.
        Raises:
            ArtifactError: there is none, the folder holds something else, or its catalogue is damaged or gone.
        """
        folder = Path(folder)
        orphaned = any((folder / "blobs").glob("*/*"))  # looked at first: a catalogue is made before any blob
        there = (folder / CATALOGUE).is_file()
        if orphaned and not there:
            raise ArtifactError(
                f"The zoo '{folder}' has lost its catalogue: there are blobs and no {CATALOGUE}.",
                remedy=f"Restore a copy of {CATALOGUE}, or move the blobs away: a new catalogue would have them swept.",
            )
        if not there and folder.is_dir() and any(p.name not in ("blobs", "lock") for p in folder.iterdir()):
            raise ArtifactError(
                f"The folder '{folder}' is no zoo: it holds other files and no {CATALOGUE}.",
                remedy="Name a zoo, or a folder that is new or empty.",
            )
        if not there and (not create or readonly):
            raise ArtifactError(f"There is no zoo at '{folder}'.", remedy="Check the path; zoo add makes a new one.")
        if there and (readonly or (readonly is None and not _writable(folder))):
            return cls(folder, Catalogue(folder / CATALOGUE, readonly=True), Objects(folder, readonly=True), tracer)
        made = not folder.exists()
        make_folder(folder)
        if made:
            sync(folder.absolute().parent)
        objects = Objects(folder)
        objects.prepare()
        return cls(folder, Catalogue(folder / CATALOGUE), objects, tracer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the catalogue."""
        self._catalogue.close()

    def __len__(self) -> int:
        return self._catalogue.n_models()

    # adding -----------------------------------------------------------------------------------------------------------

    def add(
        self,
        source: Source,
        *,
        name: str | None = None,
        facts: Mapping[str, Any] | None = None,
        parent: str | None = None,
        model: str | nn.Module | None = None,
        example: Any = None,
    ) -> Card:
        """Add a model; durable on return. The same model under the same name once more changes nothing.

        Args:
            source: a run or export of weightfold, a file of tensors, a Hugging Face folder, a module, tensors by name.
            name: unique in the zoo; None: after the file or folder.
            facts: accuracy, data, license, tags: anything that JSON holds.
            parent: what the model comes from.
            model: what tensors belong to, for the semantic hash: a module, a built-in name, package.module:function.
            example: of the model's input: tensors as in `weightfold.trace`, or texts such as "1x3x32x32".
        Raises:
            ArtifactError: the source cannot be read or stored; nothing was changed.
            ConfigError: the name belongs to another model, or is none.
        """
        return self._add([source], [Wanted(name, facts, parent)], model, example)[0]

    def add_many(
        self,
        sources: Sequence[Source],
        *,
        names: Sequence[str] | None = None,
        facts: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
        parents: Sequence[str | None] | None = None,
        model: str | nn.Module | None = None,
        example: Any = None,
        refused: Refused | None = None,
        progress: Progress | None = None,
    ) -> list[Card]:
        """Add models, 64 in a transaction; see `add`.

        Args:
            facts: of each, or the same of all.
            refused: called with a source that cannot be added and why; without it the first such error is raised.
            progress: called with the number of models done, of all, and the last name.
        Returns:
            cards: of the models that were added, in their order.
        """
        count = len(sources)
        each = list(facts) if isinstance(facts, Sequence) else [facts] * count
        for what, given in (("names", names), ("facts", each), ("parents", parents)):
            if given is not None and len(given) != count:
                raise ConfigError(f"There are {count} sources and {len(given)} {what}.")
        wishes = [Wanted(names[i] if names else None, each[i], parents[i] if parents else None) for i in range(count)]
        return self._add(sources, wishes, model, example, refused, progress)

    def _add(
        self,
        sources: Sequence[Source],
        wishes: Sequence[Wanted],
        model: str | nn.Module | None,
        example: Any,
        refused: Refused | None = None,
        progress: Progress | None = None,
    ) -> list[Card]:
        cards: list[Card] = []
        with ThreadPoolExecutor(1) as disk:  # writes one batch while the next is worked out
            written: Future[list[Card]] | None = None
            for batch in self._batches(sources, wishes, model, example, refused, progress):
                made = records(*map(list, zip(*batch, strict=True)))
                cards += written.result() if written is not None else []
                written = disk.submit(self._write_or_tidy, made, refused)
            return cards + (written.result() if written is not None else [])

    def _batches(
        self,
        sources: Sequence[Source],
        wishes: Sequence[Wanted],
        model: str | nn.Module | None,
        example: Any,
        refused: Refused | None,
        progress: Progress | None,
    ) -> Iterator[list[tuple[Imported, Wanted, Traced]]]:
        """Read models, so many at a time as are hashed and written together."""
        batch: list[tuple[Imported, Wanted, Traced]] = []
        size = 0
        for at, (source, wish) in enumerate(zip(sources, wishes, strict=True)):
            try:
                item = read_model(source)
                check(item, wish)
                batch.append((item, wish, self._tracer.trace(item, model, example)))
                size += size_of(item.state)
            except WeightfoldError as error:
                if refused is None:
                    raise
                refused(source, error)
            if len(batch) >= BATCH or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
            if progress is not None:
                progress(at + 1, len(sources), str(wish.name or (source if isinstance(source, str | Path) else "")))
        if batch:
            yield batch

    def _write_or_tidy(self, made: Sequence[Record], refused: Refused | None) -> list[Card]:
        """Write models; if that fails, give the space of their blobs back unless others are at work."""
        try:
            return self._write(made, refused)
        except WeightfoldError:
            with suppress(WeightfoldError):
                self.sweep(wait_s=0.0)
            raise

    def _write(self, made: Sequence[Record], refused: Refused | None) -> list[Card]:
        """Write the blobs of some models, then name them all in one transaction."""
        founds = {id(r.traced.found): r.traced.found for r in made if r.traced.found is not None}
        data = (
            [r.blob for r in made] + [r.extras for r in made if r.extras] + [self._bytes_of(f) for f in founds.values()]
        )
        names: list[str] = []
        clashes: list[tuple[Source, WeightfoldError]] = []
        with self._objects.lease():
            digests = iter(self._objects.put_many(data))
            blobs = [next(digests) for _ in made]
            extras = [next(digests) if record.extras else None for record in made]
            tables_of = {key: next(digests) for key in founds}
            with self._catalogue.writing():
                for record, blob, extra in zip(made, blobs, extras, strict=True):
                    try:
                        names.append(self._enter(record, blob, extra, tables_of.get(id(record.traced.found))))
                    except ConfigError as error:
                        if refused is None:
                            raise
                        clashes.append((record.item.source or record.item.name, error))
                cards = [self.card(name) for name in names]
        if refused is not None:
            for source, error in clashes:
                refused(source, error)
        return cards

    def _enter(self, record: Record, blob: str, extras: str | None, symmetries: str | None) -> str:
        name, there = free_name(self._catalogue, record)
        content = content_of(record, blob)
        if not self._catalogue.add_content(content):
            changes.restore(self._catalogue, self._objects, content)
        if not there:
            self._catalogue.add_model(model_of(record, name, extras, symmetries))
        return name

    def _bytes_of(self, found: Symmetries) -> bytes:
        if id(found) not in self._written:
            self._written[id(found)] = found, tables.to_bytes(found)
        return self._written[id(found)][1]

    # reading ----------------------------------------------------------------------------------------------------------

    def cards(self) -> list[Card]:
        """Cards of all models, in the order in which they were added."""
        return self._catalogue.cards()

    def card(self, ref: str) -> Card:
        """The card of one model.

        Args:
            ref: its name, or at least 6 first digits of its content's digest.
        Raises:
            ConfigError: there is none, or several; names near matches.
        """
        card = self._catalogue.card(find(self._catalogue, ref))
        return self.card(ref) if card is None else card

    def state(self, ref: str) -> dict[str, Tensor]:
        """The tensors of a model, verified, in the order of their names: the caller's own, ties kept as one object.

        Raises:
            ConfigError: there is no such model.
            ArtifactError: a blob is missing or damaged; names blob, model and remedy.
        """
        with self._objects.lease():
            return self._reader.state(self._content(ref))

    def symmetries(self, ref: str) -> Symmetries | None:
        """The symmetries of a model's architecture, where it was traced when the model was added.

        Raises:
            ArtifactError: their blob is missing or damaged.
        """
        with self._objects.lease():
            model = self._model(ref)
            if model.symmetries is None:
                return None
            if model.symmetries not in self._tables:
                self._tables[model.symmetries] = tables.from_bytes(self._objects.read(model.symmetries))
            return self._tables[model.symmetries]

    def get(self, ref: str, path: str | Path) -> Path:
        """Write a model to a file, or into a folder with the texts that lay beside it, each file at one stroke.

        Args:
            path: a file that ends in .safetensors, replaced if it exists; anything else is a folder, into which
                `model.safetensors`, and `config.json` and the like, are written.
        Returns:
            file: the safetensors file; `weightfold.load` rebuilds the model where the zoo knows how.
        Raises:
            ArtifactError: the model is damaged, or the file cannot be written; nothing half-written is left.
        """
        with self._objects.lease():
            model = self._model(ref)
            state = self._reader.state(self._content(model.name))
            extras = read_extras(self._objects.read(model.extras)) if model.extras else {}
        return write_model(state, extras, Path(path))

    def _model(self, ref: str) -> Model:
        model = self._catalogue.model(find(self._catalogue, ref))
        return self._model(ref) if model is None else model

    def _content(self, ref: str) -> Content:
        content = self._catalogue.content(self._model(ref).digest)
        return self._content(ref) if content is None else content

    # changing ---------------------------------------------------------------------------------------------------------

    def switch(self, digest: str, *, blob: bytes, parent: str, lossy: bool, decoded: str) -> None:
        """Keep a content as a difference to another one from now on; verified by decoding before anything changes.

        Args:
            digest: of the content.
            blob: the difference, as `weightfold.zoo.delta.codec.encode` gives it.
            parent: digest of the content that it is a difference to.
            lossy: whether decoding gives other tensors than were added.
            decoded: digest of what decoding gives; equal to `digest` unless `lossy`.
        Raises:
            ArtifactError: decoding gives something else, the chain would be a ring or too long, or what others are
                differences to would change; nothing was changed.
        """
        changes.switch(self._catalogue, self._objects, digest, blob, parent, lossy, decoded)

    def unpack(self, ref: str) -> None:
        """Keep a model in full again, as what reading it gives.

        Raises:
            ArtifactError: it is damaged, or the disk is full; nothing was changed.
        """
        changes.unpack(self._catalogue, self._objects, self.card(ref).digest)

    def remove(self, ref: str, *, children: bool = False, unpack: bool = False) -> list[str]:
        """Take a model away. Its content goes with its last name; the blobs go with the next sweep.

        Args:
            children: take those away too that are kept as differences to it, and theirs.
            unpack: keep those in full first.
        Returns:
            names: that were taken away.
        Raises:
            ConfigError: others are kept as differences to it; names them.
        """
        return changes.remove(self._catalogue, self._objects, find(self._catalogue, ref), children, unpack)

    def sweep(self, wait_s: float = WAIT_S) -> Swept | None:
        """Delete blobs that nothing needs any more; None where others were at work all the time."""
        return self._objects.sweep(self._catalogue.blobs, wait_s)

    def verify(self, progress: Progress | None = None) -> list[Problem]:
        """Read everything and compare it with its digests.

        Args:
            progress: called with the number of contents done, of all, and a name.
        """
        return verify(self._catalogue, self._objects, progress)
