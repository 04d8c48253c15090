"""What the command line says, and where: results on stdout, everything else on stderr."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
_INTERRUPTED = 130

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show log lines and warnings of the libraries.")
]


def command(
    app: typer.Typer, *examples: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds a function to the app as a command, with examples in its help.

    The command has two options more than the function, `--debug` and `--verbose`. It reports
    errors in one sentence: exit code 1 for an error, 130 for an interruption.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, debug: bool, verbose: bool, **arguments: Any) -> None:
            with _one_sentence(debug), _quiet(verbose):
                function(**arguments)

        signature = inspect.signature(function, eval_str=True)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for name, kind in (("debug", Debug), ("verbose", Verbose))
        ]
        parameters = [*signature.parameters.values(), *added]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in parameters}
        epilog = "\n\n".join(f"`{example}`" for example in examples)
        app.command(epilog=epilog)(run)
        return function

    return register


def show(result: Any, *, as_json: bool) -> None:
    """Print a result that has `to_json` and prints itself, as tables or as one JSON document."""
    if as_json:
        show_json(result.to_json())
        return
    console = Console()
    if console.is_terminal:
        console.print(result)
    else:
        typer.echo(str(result))


def show_json(data: Any) -> None:
    """Print plain data as JSON; what JSON has no number for (infinity, NaN) becomes null."""
    typer.echo(json.dumps(_finite(data), indent=1, allow_nan=False))


def say(sentence: str) -> None:
    """Print a line on stderr."""
    typer.echo(sentence, err=True)


@contextmanager
def activity(what: str) -> Iterator[None]:
    """Show on stderr what is going on, if somebody looks."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        yield


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """Yield what `graphopt.optimize` takes as `progress`: a bar on stderr, None if nobody looks."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)

        def advance(label: str, done: int, total: int) -> None:
            progress.update(task, description=label, completed=done, total=total)

        yield advance


@contextmanager
def _one_sentence(debug: bool) -> Iterator[None]:
    from .errors import GraphoptError

    try:
        yield
    except KeyboardInterrupt as error:
        say("graphopt: interrupted")
        raise typer.Exit(_INTERRUPTED) from error
    except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split())
        if not isinstance(error, (GraphoptError, OSError)):
            kind = type(error).__name__
            text = f"unexpected {kind}: {text}; please report it with the output of --debug"
        say(f"graphopt: {text}")
        raise typer.Exit(1) from error


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Silence the libraries' warnings, log lines and progress bars."""
    if verbose:
        yield
        return
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    loaded = sys.modules.get("transformers.utils.logging")  # then it has read its variables
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    shown = loaded if loaded is not None and loaded.is_progress_bar_enabled() else None
    if shown is not None:
        shown.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if shown is not None:
            shown.enable_progress_bar()


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
