"""Errors that end a command in one line, and the start of every script in the Python that has the packages.

A script that users call by its path puts this package's folder on `sys.path`, calls `use_environment()` and only then
imports what `setup.sh` installed; `run` ends it. Any Python 3 must be able to read this file, and it needs nothing
installed.
"""

import argparse
import importlib.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[4]
PROBE = "trl"  # no other package depends on it, so that a Python which has it has all that setup.sh installs
CHOSEN = "OPEN_R1_PYTHON"  # environment variable: the Python that the script was started anew with
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TRACEBACK, TRACEBACK_OPTION = "OPEN_R1_TRACEBACK", "--traceback"
PAUSE = 1  # seconds that a failing process waits before it exits; see `let_one_tell`


class Mistake(ValueError):
    """What a user can mend, in one line: what, where, and what to do."""

    def __init__(self, error: Any):
        super().__init__(" ".join(str(error).split()))


class FileMistake(Mistake, OSError):
    """A mistake about a file or folder."""


class MissingFile(FileMistake, FileNotFoundError):
    """There is no such file or folder."""


class UserCodeError(Mistake):
    """A function or class of the user's raised, which is told with its traceback."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def command_line(description: str, **settings: Any) -> argparse.ArgumentParser:
    """A command's parser: it shows the description as it stands, and takes no abbreviated options."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=raw, allow_abbrev=False, **settings)


def positive(text: str) -> int:
    """A command line's number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {printable(text)!r}")
    return int(text)


def given(text: str) -> str:
    """A command line's text that is not blank, for argparse; `"$NAME"` of an unset shell variable is refused."""
    if not text.strip():
        reason = "expected a value, got none; leave the option out for its default"
        raise argparse.ArgumentTypeError(reason)
    return text


def is_mistake(error: BaseException) -> bool:
    """Whether one line says all that a user needs: a `Mistake`, or the system's error about a file.

    Everything else is a bug, ours or in a user's code, and keeps its traceback.
    """
    return isinstance(error, Mistake) or (isinstance(error, OSError) and error.errno is not None)


def take_traceback_option() -> None:
    """Take `--traceback` out of the command line and set OPEN_R1_TRACEBACK=1: a `Mistake` then prints its traceback."""
    if TRACEBACK_OPTION in sys.argv:
        sys.argv.remove(TRACEBACK_OPTION)
        os.environ[TRACEBACK] = "1"


def account(error: BaseException) -> str:
    """What is printed of an error that ends a command: a traceback where it helps, then one line."""
    reason = first_line(error) if is_mistake(error) else f"{type(error).__name__}: {error}"
    line = f"error: {printable(reason)}\n"
    if isinstance(error, UserCodeError) and error.__cause__ is not None:
        return "".join(traceback.format_exception(error.__cause__)) + line
    if is_mistake(error) and os.environ.get(TRACEBACK, "0") == "0":
        return line
    return "".join(traceback.format_exception(error)) + (line if is_mistake(error) else "")


@contextmanager
def settings_of(*libraries: str) -> Iterator[None]:
    """In the block, a ValueError or ImportError raised by these libraries becomes a Mistake.

    For where a user's settings go to them. A ValueError from any other code is a bug, and stays one.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        is_theirs = any(f"/site-packages/{name}/" in raised_in for name in libraries)
        if isinstance(error, Mistake) or not is_theirs:
            raise
        raise Mistake(error) from error


@contextmanager
def naming_option(option: str) -> Iterator[None]:
    """In the block, what is wrong with a file or folder is told with the option that named it."""
    try:
        yield
    except (OSError, Mistake) as error:
        raise Mistake(f"{option}: {error}") from error


def printable(text: Any) -> str:
    """Text for a terminal, with escapes for control characters but line ends and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in str(text))


def stop(number: int, _: Any = None) -> None:
    """Signal handler: unwind, so that files are closed and temporary ones removed."""
    raise Stopped(number)


def run(main: Callable[[], None], stopped: str = "nothing was written") -> None:
    """Run a command; what a user can mend, and a signal, end it in one line.

    The exit code is 1 for an error, 128 and its number for a signal.

    Args:
        main: the command.
        stopped: what an interrupted command leaves, and what continues it.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # for Pythons started from here with `-c` and `-m`
    path = Path(sys.argv[0])
    name = path.parent.name if path.stem == "__main__" else path.stem
    for number in STOPS[1:]:
        if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` ignores SIGHUP, and so do we then
            signal.signal(number, stop)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # one that is closed (`>&-`) is None
        stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is shown as escapes
    take_traceback_option()
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        let_one_tell()
        if not is_mistake(error):
            raise
        *shown, line = account(error).splitlines()
        sys.exit("\n".join([*shown, f"{name}: {line}"]))
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a launch get the signal, one prints it
            print(f"\n{name}: {signal.Signals(number).name}: {stopped}", file=sys.stderr)
        sys.exit(128 + number)


def let_one_tell() -> None:
    """Wait before a failing process of a launch exits, so that of all its processes only one prints the reason.

    Torch's launcher ends all others by SIGTERM as soon as one has ended. Local rank 0 waits least: where all fail
    alike it prints the reason. Where one was killed, the launcher does.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PAUSE if os.environ["LOCAL_RANK"] == "0" else 3 * PAUSE)


def first_line(error: BaseException) -> str:
    """What an error says in its first line; libraries go on to explain it in paragraphs."""
    return str(error).strip().split("\n")[0]


def use_environment(is_needed: bool = True) -> None:
    """Go on when this Python has the packages; else start the script anew with the environment's Python.

    PYTHON wins over the active environment (virtual or conda), and that over the `.venv` of `setup.sh`, as in
    `scripts/env.sh`. Without one the script ends in one line, if the packages are needed.
    """
    started = os.environ.pop(CHOSEN, None)
    if importlib.util.find_spec(PROBE):
        return
    environments = (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), str(REPO_ROOT / ".venv"))
    pythons = [os.environ.get("PYTHON", "")]
    pythons += [os.path.join(folder, "bin", "python") for folder in environments if folder]
    python = next((python for python in pythons if os.access(python, os.X_OK)), None)
    if python is None or python == started:
        if not is_needed:
            return
        sys.exit(
            f"error: {python or sys.executable} does not have this repository's packages; "
            f"run `bash setup.sh` in {REPO_ROOT}"
        )
    arguments = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]  # Python 3.10 knows -X and -m too
    os.execve(python, [python, *arguments], {**os.environ, CHOSEN: python})
