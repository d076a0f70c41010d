"""Conditions, the index and search: against plain Python, and against looking at every vector."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from weightfold.errors import ArtifactError, ConfigError
from weightfold.zoo.find import index as index_module
from weightfold.zoo.find.index import Index
from weightfold.zoo.find.search import INDEX, index_of, search, vector_of
from weightfold.zoo.find.where import condition
from weightfold.zoo.store import Zoo

from ..conftest import near, net

FACTS = {
    "accuracy": 0.95,
    "tags": {"dataset": "mnist", "deep": {"x": 3}},
    "license": "mit",
    "labels": ["cat", "dog", 3],
    "done": True,
    "year": "2024",
    "a.b": 1,
    "none": None,
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("accuracy > 0.9", True),
        ("accuracy>0.9 and tags.dataset==mnist", True),
        ("accuracy>0.9 and tags.dataset==cifar", False),
        ("accuracy < 0.9 or license = mit", True),
        ("not accuracy < 0.9 and not (license == gpl)", True),
        ("tags.deep.x >= 3", True),
        ("tags.deep.x != 3", False),
        ("license in [mit, 'apache-2.0']", True),
        ("license in [gpl]", False),
        ("labels has cat", True),
        ("labels has 3", True),
        ("labels has bird", False),
        ("done == true", True),
        ("done == yes", False),
        ("year == 2024", True),
        ("year > 2023", True),
        ("a.b == 1", True),
        ("none == null", True),
        ("missing == 3", False),
        ("missing != 3", False),
        ("not missing == 3", True),
        ("tags > 3", False),
        ("tags.dataset.more == 3", False),
        ('license == "mit"', True),
        ("license has mi", True),
        ("1e3 == 3 or accuracy <= 9.5e-1", True),
        ("labels in []", False),
    ],
)
def test_conditions(text: str, holds: bool) -> None:
    assert condition(text)(FACTS) is holds


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("", 0),
        ("accuracy >", 10),
        ("accuracy > 0.9 and", 18),
        ("(accuracy > 0.9", 15),
        ("accuracy > 0.9)", 14),
        ("accuracy", 8),
        ("accuracy ! 3", 9),
        ("> 3", 0),
        ("a in [1 2]", 8),
        ("a in [[1]]", 6),
        ("a == 'open", 5),
        ("and == 3", 0),
        ("(" * 60 + "a == 1" + ")" * 60, 50),
        ("not " * 60 + "a == 1", 200),
    ],
)
def test_a_condition_that_cannot_be_read_says_where(text: str, at: int) -> None:
    with pytest.raises(ConfigError, match=rf"at {at}\b"):
        condition(text)


def test_conditions_run_no_code() -> None:
    with pytest.raises(ConfigError):
        condition("__import__('os').system('true') == 0")
    assert condition("__class__ == 3")(FACTS) is False
    assert condition("tags.__class__ == dict")(FACTS) is False
    with pytest.raises(ConfigError, match="characters"):
        condition("a == 1 or " * 2000 + "a == 1")


def clustered(n: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(max(1, n // 50), 16))
    return (centres[generator.integers(len(centres), size=n)] + 0.1 * generator.normal(size=(n, 16))).astype(np.float32)


def exact(vectors: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    return np.argsort(np.linalg.norm(vectors.astype(np.float64) - query, axis=1), kind="stable")[:k].tolist()


def test_a_small_index_is_exact() -> None:
    vectors = clustered(500)
    index = Index(16)
    index.add([str(i) for i in range(500)], vectors)
    for query in clustered(20, 1):
        found = index.search(query, 7)
        assert [name for name, _ in found] == [str(i) for i in exact(vectors, query, 7)]
        assert found[0][1] == pytest.approx(np.linalg.norm(vectors[int(found[0][0])].astype(np.float64) - query))
    assert index.n_cells == 0


def test_a_large_index_finds_nearly_all_and_follows_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "PER_CELL", 100)
    vectors = clustered(6000)
    index = Index(16, exact=1000)
    for first in range(0, 6000, 1500):
        index.add([str(i) for i in range(first, first + 1500)], vectors[first : first + 1500])
    assert index.n_cells >= 30
    gone = set(range(0, 6000, 7))
    index.remove([str(i) for i in gone])
    index.add(["new", "5"], clustered(2, 9))
    assert len(index) == 6000 - len(gone) + 1
    changed = vectors.copy()
    changed[list(gone)] = 1e6
    changed[5] = clustered(2, 9)[1]
    changed = np.concatenate([changed, clustered(2, 9)[:1]])
    hits = 0
    queries = vectors[::60] + 0.01
    for query in queries:
        true = {"new" if i == 6000 else str(i) for i in exact(changed, query, 10)}
        found = {name for name, _ in index.search(query, 10)}
        assert not found & {str(i) for i in gone}
        hits += len(true & found)
    assert hits >= 0.99 * 10 * len(queries)
    assert index.search(clustered(2, 9)[0], 1)[0][0] == "new"


def test_an_index_is_kept_and_read_back(tmp_path: Path) -> None:
    index = Index(16, exact=100)
    index.add([f"ä{i}" for i in range(900)], clustered(900))
    index.remove(["ä3"])
    index.save(tmp_path / "index.npz")
    again = Index.load(tmp_path / "index.npz")
    for query in clustered(10, 2):
        assert index.search(query) == again.search(query)
    assert "ä3" not in again
    assert again.n_cells == index.n_cells > 0


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a zip", b"\x00" * 100])
def test_a_damaged_index_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "index.npz").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"index\.npz"):
        Index.load(tmp_path / "index.npz")


def test_an_index_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    index = Index(4)
    index.add(["a", "b"], np.ones((2, 4), np.float32))
    index.save(tmp_path / "index.npz")
    with np.load(tmp_path / "index.npz") as held:
        parts = {name: held[name] for name in held.files}
    spoilt = {
        "vectors": np.full((2, 4), np.nan, np.float32),
        "ids": np.zeros(3, np.uint8),
        "gone": np.zeros(3, bool),
        "starts": np.array([-1, 1]),
        "facts": np.array([1, 1 << 40, 5, 2, 1]),
    }
    for name, value in spoilt.items():
        np.savez(tmp_path / "index.npz", **{**parts, name: value})
        with pytest.raises(ArtifactError, match=r"index\.npz"):
            Index.load(tmp_path / "index.npz")
    np.savez_compressed(tmp_path / "index.npz", **{**parts, "ids": np.zeros(1 << 22, np.uint8)})
    with pytest.raises(ArtifactError, match=r"index\.npz"):
        Index.load(tmp_path / "index.npz")


def test_a_full_disk_leaves_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(16)
    index.add(["a"], clustered(50)[:1])
    index.save(tmp_path / "index.npz")
    before = (tmp_path / "index.npz").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    index.add(["b"], clustered(50)[1:2])
    with pytest.raises((OSError, ArtifactError)):
        index.save(tmp_path / "index.npz")
    assert (tmp_path / "index.npz").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["index.npz"]


def test_vectors_that_do_not_fit_are_refused() -> None:
    index = Index(4)
    for ids, vectors in ((["a"], np.zeros((1, 3))), (["a", "a"], np.zeros((2, 4))), (["a"], np.full((1, 4), np.nan))):
        with pytest.raises(ConfigError):
            index.add(ids, vectors.astype(np.float32))
    with pytest.raises(ConfigError):
        index.search(np.zeros(5, np.float32))
    assert index.search(np.zeros(4, np.float32)) == []


def test_search_by_likeness_conditions_and_classes(zoo: Zoo) -> None:
    base = net(0).state_dict()
    zoo.add(base, name="base", facts={"accuracy": 0.9, "classes": [3, 5, 7]})
    zoo.add(near(base, 1), name="child", facts={"accuracy": 0.95, "classes": [3, 5]})
    zoo.add(net(7).state_dict(), name="other", facts={"accuracy": 0.99})
    like = vector_of(zoo, "child")
    hits = search(zoo, like=like)
    assert [h.card.name for h in hits] == ["child", "base", "other"]
    assert hits[0].distance == pytest.approx(0.0)
    assert [h.card.name for h in search(zoo, where="accuracy >= 0.95")] == ["child", "other"]
    assert [h.card.name for h in search(zoo, like=like, where="accuracy > 0.98 or name == base")] == ["base", "other"]
    assert [h.card.name for h in search(zoo, classes=["3", "5"])] == ["base", "child"]
    assert [h.card.name for h in search(zoo, classes=["7"], like=like)] == ["base"]
    assert [h.card.name for h in search(zoo, like=like, k=1)] == ["child"]


def test_the_index_beside_a_zoo_follows_it(zoo: Zoo) -> None:
    states = {f"m{i}": net(i).state_dict() for i in range(6)}
    for name, state in states.items():
        zoo.add(state, name=name)
    like = vector_of(zoo, "m3")
    assert search(zoo, like=like, k=2, exact=3)[0].card.name == "m3"
    assert (Path(zoo.folder) / INDEX).exists()
    zoo.remove("m3")
    zoo.add(near(states["m3"], 1), name="new")
    assert search(zoo, like=like, k=1, exact=3)[0].card.name == "new"
    (Path(zoo.folder) / INDEX).write_bytes(b"damaged")
    assert len(index_of(zoo, 3)) == 6
    assert zoo.verify() == []
