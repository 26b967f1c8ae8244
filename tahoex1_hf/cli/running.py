# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Run commands: handle messages, errors and interruption in the same way for all of them."""

import functools
import gc
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer

from tahoex1_hf.cli.options import Debug, Quiet, Verbose
from tahoex1_hf.common.progress import PROGRESS
from tahoex1_hf.common.reading import in_short

logger = logging.getLogger(__name__)

GOES_ON = "Stopped. The same command resumes the run."
NOTHING_WRITTEN = "Stopped. Nothing was written."

_SHORT, _TIMED = "%(levelname)s: %(message)s", "%(asctime)s %(levelname)s %(name)s: %(message)s"
_ERRORS = (ImportError, OSError, ValueError)

# Loggers and parts of messages in which a library speaks of itself; users of a command can do nothing about them.
_NOISE = (
    ("torchao", "Skipping import of cpp extensions"),
    ("torchao", "Failed to load "),
    ("torchao.kernel.intmm", "Detected no triton"),
    ("torch.utils._pytree", "is an Enum subclass and is now natively supported"),
)


def command(
    *,
    extra: str = "data",
    interrupted: str = GOES_ON,
    errors: tuple[type[Exception], ...] = (),
    error_code: int = 1,
    timed: bool = False,
) -> Callable[[Callable[..., str | None]], Callable[..., None]]:
    """Turn a function into a command that ends with a sentence, not a traceback, and has the options of all commands.

    They are `--quiet`, `--verbose`, and `--debug`, with which errors keep their traceback. The text that the function
    returns is printed to standard output.

    Args:
        extra: Extra of the package that the command needs.
        interrupted: Message after Ctrl-C; the command then exits with 130.
        errors: Further exceptions that are reported in a sentence.
        error_code: Exit code after an exception that is reported.
        timed: Whether each message begins with the time.
    """
    told: tuple[type[Exception], ...] = (*_ERRORS, *errors)

    def decorate(function: Callable[..., str | None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, quiet: bool = False, verbose: bool = False, debug: bool = False, **kwargs: Any) -> None:
            set_up_logging(quiet, verbose, timed)
            try:
                result = function(*args, **kwargs)
            except typer.Exit:  # a RuntimeError
                raise
            except Exception as error:
                if debug:
                    raise
                if isinstance(error, ModuleNotFoundError) and not _is_ours(error):
                    fail(f"{error.name} is missing: pip install 'tahoex1_hf[{extra}]'.", error_code)
                foreseen = isinstance(error, told) and not isinstance(error, ModuleNotFoundError)
                fail(error if foreseen else _unforeseen(error, (*args, *kwargs.values())), error_code)
            except KeyboardInterrupt:
                typer.echo(interrupted, err=True)
                raise typer.Exit(130) from None
            if result is not None and not quiet and _is_first_process():
                typer.echo(result)

        shared = {"quiet": Quiet, "verbose": Verbose, "debug": Debug}
        own = inspect.signature(function)
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for name, kind in shared.items()
        ]
        run.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
        run.__annotations__ = {**function.__annotations__, **shared, "return": None}
        return run

    return decorate


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import modules without looking for garbage meanwhile, which takes 10 to 20 % of the time of importing the model.

    What is there afterwards is not looked through again, unless it was there before.
    """
    was_on, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()  # or the next search would go through all of it
        if was_on:
            gc.enable()


def _is_ours(error: ModuleNotFoundError) -> bool:
    """Return whether a module is missing by a fault of ours, not since a package must be installed."""
    return error.name is None or error.name.startswith("tahoex1_hf")


def _unforeseen(error: Exception, values: tuple[Any, ...]) -> str:
    """Return a sentence about an unforeseen error, with the files among a command's arguments."""
    texts = [text for value in values for text in (value if isinstance(value, (list, tuple)) else [value])]
    files = [str(text) for text in texts if isinstance(text, (str, Path)) and os.path.exists(text)]
    where = f"{', '.join(files)}: " if files else ""
    if notes := " ".join(getattr(error, "__notes__", ())):  # what to do, added where it was known
        return f"{in_short(error)}. {notes}"
    return f"{where}{in_short(error)}. This was not foreseen: please report it, with what --debug shows."


def fail(error: Exception | str, code: int = 1) -> NoReturn:
    """Print an error and end the command; with `--verbose`, show where the error arose."""
    typer.echo(f"Error: {error}", err=True)
    logger.debug("It arose here:", exc_info=True)
    raise typer.Exit(code) from None


def set_up_logging(quiet: bool, verbose: bool, timed: bool = False) -> None:
    """Send log messages to standard error; of several processes, all but the first send warnings and errors only."""
    level = logging.WARNING if quiet or not _is_first_process() else logging.INFO
    logging.basicConfig(level=level, format=_TIMED if timed else _SHORT, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Lines(_TIMED if timed else _SHORT))
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # no progress bars, ours or transformers'
    if verbose:
        logging.getLogger("tahoex1_hf").setLevel(logging.DEBUG)
        return
    for name, part in _NOISE:
        logging.getLogger(name).addFilter(functools.partial(_lacks, part))


class _Lines(logging.Formatter):
    """Leave the lines of JSON that tell of a cluster's progress as they are, so that programs can read them."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name == PROGRESS else super().format(record)


def _lacks(part: str, record: logging.LogRecord) -> bool:
    return part not in record.getMessage()


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
