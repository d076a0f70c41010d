"""Help is at once there, and complete."""

from __future__ import annotations

import json
import time

import pytest

from weightfold import __version__

from .conftest import Run, Shell

OPTIONS = (
    *("--data", "--model", "--set", "--epochs", "--batch-size", "--lr", "--optimizer", "--seed", "--method", "--keep"),
    *("--at", "--out", "--resume", "--device", "--threads", "--no-dense", "--force", "--json", "--debug"),
)
VERBS = ("show", "explain", "timeline", "verify", "replay", "undo", "diff")
WEIGHTS = ("inspect", "canon", "same", "diff", "merge")
ZOO = ("add", "list", "get", "rm", "verify")
GROUPS = {"ledger": VERBS, "zoo": ZOO}
COMMANDS = (
    *("trace", "sharing", "train", "fold", "export", *WEIGHTS, *GROUPS),
    *(f"{group} {verb}" for group, verbs in GROUPS.items() for verb in verbs),
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_no_torch(command: str, shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    before = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('HEAVY', [m for m in ('torch', 'numpy') if m in sys.modules]))"
    )
    start = time.perf_counter()
    done = shell(*command.split(), "--help", before=before)
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f" {command or 'weightfold'} --help: {seconds:.2f} s;", end="")  # shown, never judged: machines differ
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []"), "help must not wait for these"
    assert "Usage" in done.stdout


def test_help_names_every_command_and_option(cli: Run) -> None:
    text = cli("--help").stdout
    assert all(command.split()[0] in text for command in COMMANDS)
    assert "--install-completion" in text
    train = cli("train", "--help").stdout
    for option in OPTIONS:
        assert option in train, option


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_debug_and_json(command: str, cli: Run) -> None:
    text = cli(*command.split(), "--help").stdout
    if command not in GROUPS:
        assert "--debug" in text
        assert "--json" in text


def test_the_version_is_told(cli: Run) -> None:
    assert cli("--version").stdout.strip() == f"weightfold {__version__}"


def test_completion_can_be_shown(shell: Shell) -> None:
    before = "import os, sys; os.environ['_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION'] = '1'"
    done = shell("--show-completion", "bash", before=before)
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout


def test_a_misspelt_command_is_answered_with_the_nearest(cli: Run) -> None:
    done = cli("trian")
    assert done.exit_code == 2
    assert "train" in done.output


def test_the_ledger_is_read_without_torch(finished: tuple, shell: Shell) -> None:
    before = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    out = finished[0]
    for command in (
        ("show", out),
        ("verify", out),
        ("explain", out, "body.0", 3),
        ("timeline", out),
        ("diff", out, out),
    ):
        done = shell("ledger", *command, "--json", before=before)
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip() == "False"
        json.loads(done.stdout)
