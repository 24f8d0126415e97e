"""What the commands share: one line and an exit code for what the user can put right, and console logging.

Exit codes: 0 done, 1 the run failed, 2 the request cannot be honoured as it stands, 128 + n stopped by signal n.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

logger = logging.getLogger(__name__)


class UsageError(Exception):
    """A request that the user can put right: one line on stderr, exit code 2."""


class RunError(Exception):
    """A run that failed and cannot go on: one line on stderr, exit code 1."""


class Interrupted(Exception):
    """A run that was stopped by a signal, after saving what it needs to go on."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` with `--verbose`, whose errors are one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--verbose", action="store_true", help="log more, and show the traceback of every error")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


@contextmanager
def user_errors(*types: type[Exception]) -> Iterator[None]:
    """Turns errors of `types`, raised while a request is being set up, into `UsageError`."""
    try:
        yield
    except types as error:
        raise UsageError(str(error) or type(error).__name__) from error


def make_folder(path: Path, what: str) -> None:
    """Makes the folder `path`, which is `what` the user named, and those above it.

    Raises:
      UsageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise UsageError(f"cannot write to {what} {path}: {reason}") from error


def run(command: Callable[[list[str]], None], argv: list[str]) -> NoReturn:
    """Runs `command(argv)` and exits; errors other than the three above keep their traceback."""
    verbose = "--verbose" in argv
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of each of its own defaults
    for name in ("train", "eval", "attn_jax"):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.captureWarnings(True)
    try:
        command(argv)
        sys.stdout.flush()
    except (UsageError, RunError, Interrupted) as error:
        logger.debug("traceback", exc_info=True)
        print("error:" if not isinstance(error, Interrupted) else "stopped:", _one_line(error), file=sys.stderr)
        match error:
            case UsageError():
                sys.exit(2)
            case Interrupted():
                sys.exit(128 + error.signum)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # who reads the output has enough, as `head` has
        logger.debug("traceback", exc_info=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is flushed at the exit
        sys.exit(128 + signal.SIGPIPE)
    sys.exit(0)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
