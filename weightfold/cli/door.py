"""The one door through which a command's errors leave: one clear message on stderr, and an exit code.

0 done | 1 a defect of weightfold | 2 something to put right: arguments, files, data | 130 interrupted, also by SIGTERM
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from weightfold.errors import WeightfoldError

Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON, and nothing else, on stdout.")]

DEFECT, WRONG, INTERRUPTED = 1, 2, 130


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command's errors out in words, and give it the option `--debug`, which prints the traceback before them."""

    @functools.wraps(command)
    def run(debug: bool = False, **values: Any) -> None:
        try:
            with _ended_like_an_interruption():
                command(**values)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError:
            _silence_stdout()
            raise typer.Exit(WRONG) from None
        except (KeyboardInterrupt, Exception) as error:
            if debug:
                traceback.print_exc()
            code, message = explain(error)
            complain(message)
            raise typer.Exit(code) from None

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    run.__annotations__["debug"] = Debug
    return run


@contextmanager
def _ended_like_an_interruption() -> Iterator[None]:
    """Have the signals that end a process (a scheduler's, a closed terminal's) do what Ctrl-C does, for a while."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def explain(error: BaseException) -> tuple[int, str]:
    """Choose the exit code and the words for an error.

    Example:
        >>> explain(ValueError("odd"))
        (1, "ValueError: odd\\n  -> This is a defect of weightfold or of the model's code; run again with --debug.")
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "Interrupted; nothing half-written was left behind."
    if isinstance(error, WeightfoldError):
        return WRONG, str(error)
    if isinstance(error, OSError) and error.errno is not None:
        place = f"'{error.filename}'" if error.filename else "A file"
        return WRONG, f"{place} could not be read or written: {error.strerror}.\n  -> Check the path, the space left."
    text = str(error).strip().partition("\n")[0]
    return (
        DEFECT,
        f"{type(error).__name__}: {text}\n  -> This is a defect of weightfold or of the model's code; "
        "run again with --debug.",
    )


def complain(message: str) -> None:
    """Print an error on stderr, in red on a terminal."""
    first, _, rest = message.partition("\n")
    typer.secho(f"Error: {first}", err=True, fg=typer.colors.RED)
    if rest:
        typer.echo(rest, err=True)


def warn(message: str) -> None:
    """Print a warning on stderr, in yellow on a terminal."""
    typer.secho(f"Warning: {message}", err=True, fg=typer.colors.YELLOW)


def _silence_stdout() -> None:
    """Keep the interpreter from complaining once more when it flushes a pipe that nobody reads."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
