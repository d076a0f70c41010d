"""Packing: families become differences, everything stays readable, whatever happens on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from weightfold.errors import ArtifactError, ConfigError
from weightfold.fingerprint import digest
from weightfold.weights.disguise import disguise
from weightfold.zoo.delta.steps import Lossy, by_measure, by_outputs, random_inputs
from weightfold.zoo.forest import forest
from weightfold.zoo.pack import pack
from weightfold.zoo.storage.objects import Objects
from weightfold.zoo.store import Zoo

State = dict[str, Tensor]
EXAMPLE = torch.zeros(1, 20)


def make(seed: int = 0) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return net


def tuned(net: nn.Module, seed: int, size: float = 0.01) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    twin = make()
    twin.load_state_dict({n: v + size * torch.randn(v.shape, generator=generator) for n, v in net.state_dict().items()})
    return twin


def family(zoo: Zoo, *, disguised: bool = False, roots: int = 2) -> dict[str, State]:
    """Roots, two children each, and a child of the first child."""
    held: dict[str, State] = {}
    for r in range(roots):
        nets = {f"root{r}": make(r)}
        nets |= {f"child{r}{c}": tuned(nets[f"root{r}"], 10 * r + c) for c in range(2)}
        nets[f"grand{r}"] = tuned(nets[f"child{r}0"], 10 * r + 7)
        for i, (name, net) in enumerate(nets.items()):
            if disguised:
                net = disguise(net, EXAMPLE, torch.Generator().manual_seed(100 * r + i))
            zoo.add(net, name=name, example=EXAMPLE)
            held[name] = {n: v.detach().clone() for n, v in net.state_dict().items()}
    return held


def same(zoo: Zoo, held: dict[str, State]) -> bool:
    return all(digest(zoo.state(name)) == digest(state) for name, state in held.items())


@pytest.mark.parametrize("disguised", [False, True])
def test_families_become_differences_and_come_back_bit_for_bit(zoo: Zoo, disguised: bool) -> None:
    held = family(zoo, disguised=disguised)
    plan = pack(zoo, plan=True)
    assert all(card.is_full for card in zoo.cards())
    done = pack(zoo)
    assert done.n_packed == 6
    assert (plan.n_packed, plan.after) == (done.n_packed, done.after)
    assert done.after < 0.9 * done.before
    assert same(zoo, held)
    assert not zoo.verify()
    cards = {card.digest: card for card in zoo.cards()}
    assert sum(card.stored_bytes for card in cards.values()) == done.after
    families = {name: next(c for c in name if c.isdigit()) for name in held}
    assert all(card.base is None or families[cards[card.base].name] == families[card.name] for card in cards.values())
    assert all(row.moved == disguised for row in done.rows if row.parent)
    files = [f for f in (zoo.folder / "blobs").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 1.5 * done.after + 20_000  # the old blobs are gone


def test_packing_again_changes_nothing_and_new_children_join(zoo: Zoo) -> None:
    held = family(zoo, roots=1)
    first = pack(zoo)
    again = pack(zoo)
    assert (again.n_packed, again.before, again.after) == (0, first.after, first.after)
    late = tuned(make(0), 99)
    zoo.add(late, name="late", example=EXAMPLE)
    held["late"] = {n: v.detach().clone() for n, v in late.state_dict().items()}
    done = pack(zoo)
    assert [row.name for row in done.rows if row.parent] == ["late"]
    assert same(zoo, held)


def test_chains_keep_to_their_limit(zoo: Zoo) -> None:
    net, names = make(), []
    for i in range(8):
        zoo.add(net, name=f"step{i}", example=EXAMPLE)
        names.append(f"step{i}")
        net = tuned(net, i)
    done = pack(zoo, depth=2)
    levels = {card.digest: card.base for card in zoo.cards()}

    def level(d: str) -> int:
        base = levels[d]
        return 0 if base is None else 1 + level(base)

    assert max(level(d) for d in levels) == 2
    assert done.n_packed == 7
    with pytest.raises(ConfigError, match="between 1 and"):
        pack(zoo, depth=0)


def test_strangers_stay_in_full_and_other_architectures_are_named(zoo: Zoo) -> None:
    zoo.add(make(0), name="a", example=EXAMPLE)
    zoo.add(nn.Linear(20, 5), name="b", example=EXAMPLE, parent="a")
    zoo.add({"w": torch.randn(30, 30)}, name="c")
    done = pack(zoo)
    assert done.n_packed == 0
    assert {row.name: row.parent for row in done.rows} == {"a": None, "b": None, "c": None}
    assert "lacks" in next(row.note for row in done.rows if row.name == "b")


def test_steps_are_taken_from_decoded_parents_so_errors_do_not_pile_up(zoo: Zoo) -> None:
    net, held = make(), {}
    for i in range(5):
        zoo.add(net, name=f"step{i}", example=EXAMPLE)
        held[f"step{i}"] = net.state_dict()
        net = tuned(net, i)
    done = pack(zoo, lossy=Lossy(step=0.02))
    assert done.n_packed == 4
    for row in done.rows:
        if row.parent:
            state = zoo.state(row.name)
            worst = max(float((state[n] - held[row.name][n]).abs().max()) for n in state)
            assert 0 < worst <= 0.7001 * 0.02
            assert row.step == 0.02
            assert row.change is not None
            assert zoo.card(row.name).lossy
    assert done.after < 0.5 * done.before


def test_a_bound_on_what_is_measured_is_kept(zoo: Zoo) -> None:
    family(zoo, roots=1)
    before = {card.name: zoo.state(card.name) for card in zoo.cards()}
    change = by_outputs(make(), random_inputs((EXAMPLE,), torch.Generator().manual_seed(0)))
    done = pack(zoo, lossy=Lossy(change=change, within=0.03))
    assert done.n_packed == 3
    for row in done.rows:
        assert row.parent is None or change(before[row.name], zoo.state(row.name)) <= 0.03
    steps = [row.step for row in done.rows if row.parent]
    assert all(step and step > 1e-3 for step in steps)


def test_a_bound_of_nothing_packs_exactly(zoo: Zoo) -> None:
    held = family(zoo, roots=1)
    done = pack(zoo, lossy=Lossy(change=by_measure(lambda s: float(s["0.weight"].double().sum())), within=0.0))
    assert done.n_packed == 3
    assert same(zoo, held)


def test_settings_that_say_nothing_or_too_much_are_refused() -> None:
    for settings in ({}, {"step": 0.1, "within": 0.1}, {"within": 0.1}, {"step": -1.0}):
        with pytest.raises(ConfigError):
            Lossy(**settings)  # type: ignore[arg-type]


def test_a_model_that_goes_away_meanwhile_is_left_out(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    family(zoo, roots=1)
    real = Zoo.switch

    def switch(self: Zoo, digest: str, **rest: object) -> None:
        if self.card("grand0").digest == digest:
            raise ArtifactError("The content was packed anew while it was used.")
        real(self, digest, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Zoo, "switch", switch)
    done = pack(zoo)
    row = next(row for row in done.rows if row.name == "grand0")
    assert (row.parent, row.before) == (None, row.after)
    assert "packed anew" in row.note
    assert not zoo.verify()


def test_a_full_disk_leaves_every_model_as_it_was(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    held = family(zoo, roots=1)

    def full(self: Objects, data: bytes) -> str:
        raise ArtifactError("The zoo could not be written: No space left on device.")

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", full)
        done = pack(zoo)
    assert done.n_packed == 0
    assert any("No space left" in row.note for row in done.rows)
    assert all(card.is_full for card in zoo.cards())
    assert same(zoo, held)
    assert pack(zoo).n_packed == 3


def test_two_packers_and_a_writer_at_once(zoo: Zoo) -> None:
    held = family(zoo)
    errors: list[BaseException] = []

    def packing() -> None:
        try:
            with Zoo.open(zoo.folder, create=False) as own:
                pack(own)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=packing) for _ in range(2)]
    for thread in threads:
        thread.start()
    for seed in range(5):
        late = tuned(make(0), 50 + seed)
        zoo.add(late, name=f"late{seed}", example=EXAMPLE)
        held[f"late{seed}"] = {n: v.detach().clone() for n, v in late.state_dict().items()}
    for thread in threads:
        thread.join()
    assert not errors
    assert same(zoo, held)
    assert not zoo.verify()
    assert sum(not card.is_full for card in zoo.cards()) >= 6


def test_killed_at_any_moment_no_model_is_lost(tmp_path: Path) -> None:
    with Zoo.open(tmp_path / "zoo") as zoo:
        held = family(zoo)
    script = textwrap.dedent(
        """
        import sys
        from weightfold.zoo.pack import pack
        from weightfold.zoo.store import Zoo
        with Zoo.open(sys.argv[1]) as zoo:
            print("ready", flush=True)
            pack(zoo)
        """
    )
    kills = 0
    for delay in (0.05, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "zoo")],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with Zoo.open(tmp_path / "zoo", create=False) as zoo:
            assert same(zoo, held)
            assert not zoo.verify()
    assert kills
    with Zoo.open(tmp_path / "zoo", create=False) as zoo:
        pack(zoo)
        assert sum(card.base is not None for card in zoo.cards()) == 6
        assert same(zoo, held)


def test_the_cheapest_forest() -> None:
    full = dict.fromkeys("abcdef", 10.0)
    costs = {("a", "b"): 1.0, ("b", "c"): 2.0, ("a", "c"): 3.0, ("d", "e"): 1.0, ("c", "d"): 9.5, ("e", "f"): 11.0}
    found = forest(full, costs, depth=8)
    total = sum(costs.get((c, p), costs.get((p, c), 0.0)) for c, p in found.items()) + 10 * (6 - len(found))
    assert total == 1 + 2 + 1 + 9.5 + 2 * 10  # Kruskal by hand; f stands alone
    assert "f" not in found
    order = list(found)
    assert all(p not in order or order.index(p) < order.index(c) for c, p in found.items())


def test_a_forest_starts_from_what_must_stay_and_from_declared_parents() -> None:
    full, costs = dict.fromkeys("abc", 10.0), {("a", "b"): 1.0, ("b", "c"): 1.0}
    assert forest(full, costs, depth=8) == {"a": "b", "c": "b"}
    assert forest(full, costs, depth=8, wished={"b": "a", "c": "b"}) == {"b": "a", "c": "b"}
    assert forest(full, costs, depth=8, fixed={"c": 3}) == {"b": "c", "a": "b"}
    assert forest(full, costs, depth=1, fixed={"c": 1}) == {"a": "b"}  # c is full already
    assert forest(full, costs, depth=1, wished={"b": "a"}) == {"b": "a"}
