"""The parts of a run: nested state, measurements, settings, rewinding a ledger, the one-shot."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from weightfold.data import load
from weightfold.errors import ArtifactError, DataError, LedgerError
from weightfold.ledger import Ledger
from weightfold.models import Classes, NextToken, Regression, TableInput, TaskSpec, TextInput
from weightfold.training import TrainConfig
from weightfold.training.checkpoint import read_checkpoint, write_checkpoint
from weightfold.training.measure import Score, evaluate, latency_ms, paired_difference
from weightfold.training.nested import join, split
from weightfold.training.oneshot import OneShotConfig, fold_trained
from weightfold.training.result import comparison
from weightfold.training.rewind import rewind

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.text(max_size=4) | st.integers() | st.tuples(st.text(max_size=3), st.integers()), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_nested_state_survives_the_checkpoint(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    folder = tmp_path_factory.mktemp("state")
    write_checkpoint(folder, {"value": value, "tensor": torch.arange(3)})
    state = read_checkpoint(folder)
    assert state is not None
    assert state["value"] == value
    assert torch.equal(state["tensor"], torch.arange(3))


def test_an_optimiser_s_state_survives_to_the_bit() -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    again = torch.optim.AdamW(net.parameters())
    again.load_state_dict(join(*split(optimizer.state_dict())))
    for p in net.parameters():
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(again.state[p][key]), torch.as_tensor(value))


def test_what_is_not_plain_is_refused_by_its_place() -> None:
    with pytest.raises(ArtifactError, match=r"'state\.a\[1\]' cannot be kept"):
        split({"a": [1, object()]})


def test_scores_agree_with_numpy() -> None:
    data = load("digits", limit=200)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    score = evaluate(net, data, "test", torch.device("cpu"))
    inputs, targets = next(data.batches("test", 10_000))
    logits = net(inputs).detach().double().numpy()
    right = logits.argmax(1) == targets.numpy()
    log_sum = np.log(np.exp(logits).sum(1))
    assert score.value == right.mean()
    assert score.loss == pytest.approx((log_sum - logits[np.arange(len(right)), targets.numpy()]).mean(), rel=1e-5)
    assert net.training


def test_regression_is_scored_by_its_explained_variance(tmp_path: Path) -> None:
    rows = ["a,b,y", *(f"{i},{i % 7},{3 * i - (i % 7)}" for i in range(200))]
    (tmp_path / "line.csv").write_text("\n".join(rows))
    data = load(tmp_path / "line.csv", output="regression")

    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 1)

    _, targets = next(data.batches("test", 10_000))
    score = evaluate(Constant(), data, "test", torch.device("cpu"))
    assert score.value == pytest.approx(1 - float((targets**2).sum() / ((targets - targets.mean()) ** 2).sum()))
    assert score.answers is None


def test_the_paired_interval_is_that_of_the_textbook() -> None:
    """Newcombe 1998, method 1 (Wald): (b - c) / n +- 1.96 sqrt(b + c - (b - c)^2 / n) / n."""
    old = torch.tensor([True] * 90 + [False] * 10)
    new = old.clone()
    new[:4], new[95:] = False, True
    facts = paired_difference(Score(0, 0.9, old), Score(0, 0.91, new))
    assert facts is not None
    half = 1.96 * sqrt(9 - 1 / 100) / 100
    assert (facts["gained"], facts["lost"]) == (5, 4)
    assert facts["interval"] == pytest.approx([0.01 - half, 0.01 + half])
    assert paired_difference(Score(0, 0, None), Score(0, 0, None)) is None


def test_latency_is_measured_in_turns() -> None:
    calls: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(self.name)
            return torch.mm(x, x) if self.name == "slow" else x

    times = latency_ms({"slow": Noted("slow"), "fast": Noted("fast")}, torch.ones(200, 200), rounds=6)
    assert times["slow"] > times["fast"] > 0
    switches = sum(a != b for a, b in itertools.pairwise(calls))
    assert switches >= 6


@pytest.mark.parametrize(
    ("task", "model", "optimizer"),
    [
        (TaskSpec(input=TableInput(n_features=3), output=Regression()), "mlp", "sgd"),
        (TaskSpec(input=TextInput(vocab=9, context=4), output=NextToken(vocab=9)), "char-gpt", "adamw"),
        (TaskSpec(input=TextInput(vocab=9, context=4), output=Classes(n=2)), "gru", "adamw"),
    ],
)
def test_what_is_left_open_follows_the_data(task: TaskSpec, model: str, optimizer: str) -> None:
    config = TrainConfig().resolved(task)
    assert (config.model, config.optimizer) == (model, optimizer)
    assert TrainConfig(model="x:y", lr=0.5, optimizer="sgd").resolved(task).lr == 0.5


def test_a_rewound_ledger_goes_on_with_the_same_hashes(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with Ledger.create(path, run={"seed": 1}) as ledger:
        blob = ledger.put_blob(b"x")
        ledger.append("edit", {"blob": blob})
        ledger.log_metrics(1, {"loss": 1.0})
        middle = ledger.head
        ledger.append("edit", {"n": 2})
        ledger.log_metrics(2, {"loss": float("nan")})
        head = ledger.head
    rewind(path, 2, 1)
    with Ledger.open(path) as ledger:
        ledger.verify()
        assert ledger.head == middle
        assert ledger.metrics("loss") == [(1, 1.0)]
        assert ledger.get_blob(blob) == b"x"
        ledger.append("edit", {"n": 2})
        assert ledger.head == head
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(("-wal", "-shm"))] == ["a.db"]


def test_a_ledger_shorter_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "a.db", run={}):
        pass
    with pytest.raises(LedgerError, match="holds 1 entries; the checkpoint has seen 3"):
        rewind(tmp_path / "a.db", 3, 0)


def test_differences_are_in_percent_and_points() -> None:
    dense = {"score": 0.9, "parameters": 200, "macs": 10, "size_bytes": 0}
    folded = {"score": 0.91, "parameters": 50, "macs": 15, "size_bytes": 0}
    rows = {row["key"]: row for row in comparison({"score": "accuracy", "arms": {"dense": dense, "folded": folded}})}
    assert rows["score"]["change"] == pytest.approx(1.0)
    assert rows["parameters"]["change"] == -75
    assert rows["macs"]["change"] == 50
    assert rows["size_bytes"]["change"] is None
    assert rows["seconds"]["dense"] is None


def test_a_trained_network_is_folded_at_once(finished: tuple[Path, dict], tmp_path: Path) -> None:
    out, before = finished
    config = OneShotConfig(model=str(out / "dense.safetensors"), data="digits", keep=0.5, samples=256)
    run = fold_trained(config, tmp_path / "small")
    dense, folded = (run["results"]["arms"][name] for name in ("dense", "folded"))
    assert dense["fingerprint"] == before["results"]["arms"]["dense"]["fingerprint"]
    assert folded["widths"] == [["body.0", 24, 12], ["body.2", 24, 12]]
    assert folded["parameters"] < dense["parameters"]
    again = fold_trained(config, tmp_path / "again")
    assert again["results"]["head"] == run["results"]["head"]


def test_a_macs_budget_is_met(finished: tuple[Path, dict], tmp_path: Path) -> None:
    config = OneShotConfig(model=str(finished[0] / "dense.safetensors"), data="digits", macs=0.6, samples=256)
    arms = fold_trained(config, tmp_path / "small")["results"]["arms"]
    assert 0.4 < arms["folded"]["macs"] / arms["dense"]["macs"] <= 0.6


def test_a_gated_one_shot_takes_back_what_costs_too_much(finished: tuple[Path, dict], tmp_path: Path) -> None:
    config = OneShotConfig(model=str(finished[0] / "dense.safetensors"), data="digits", keep=0.1, max_increase=0.0)
    run = fold_trained(config, tmp_path / "same")
    assert any(not event["accepted"] for event in run["results"]["arms"]["folded"]["events"])


def test_a_one_shot_that_cannot_work_leaves_no_folder(
    finished: tuple[Path, dict], tmp_path: Path, tiny: Callable
) -> None:
    model = str(finished[0] / "dense.safetensors")
    with pytest.raises(DataError, match="too few"):
        fold_trained(OneShotConfig(model=model, data="digits", samples=1, keep=0.5), tmp_path / "few")
    (tmp_path / "t.csv").write_text("\n".join(["a,b,c", *(f"{i},{i % 3},{'xy'[i % 2]}" for i in range(60))]))
    with pytest.raises(DataError, match="fails on 't'"):
        fold_trained(OneShotConfig(model=model, data=str(tmp_path / "t.csv"), keep=0.5), tmp_path / "other")
    assert not (tmp_path / "few").exists()
    assert not (tmp_path / "other").exists()
