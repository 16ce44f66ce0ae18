"""How a run fails: one line for what a user can correct, else a traceback; and the launcher's last line."""

import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_r1.base.errors import Mistake, account, first_line, is_mistake, let_one_tell
from open_r1.base.files import MANIFEST

MISTAKE = 2  # exit code, as argparse's
# How Python, safetensors and torch say that a file could not be written to its end.
NO_ROOM = re.compile(r"No space left|quota exceeded|File too large|PytorchStreamWriter|unexpected pos \d")


@contextmanager
def full_disk(folder: str | Path) -> Iterator[None]:
    """Inside it, what fails because the folder that a model is saved in takes no more becomes a `Mistake`."""
    try:
        yield
    except Exception as error:
        if not NO_ROOM.search(str(error)):
            raise
        # torch's RuntimeError is an assertion, which tells a user nothing
        reason = "half a file was written" if isinstance(error, RuntimeError) else first_line(error)
        raise Mistake(
            f"{folder}: takes no more, is the disk full? ({reason}); make room and start the same command again; "
            "a run of training goes on from its newest whole checkpoint"
        ) from error


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print what goes wrong inside, in one of the processes of a launch, and exit."""
    try:
        yield
    except Exception as error:
        let_one_tell()
        sys.stderr.write(account(error))
        sys.stderr.flush()
        sys.exit(MISTAKE if is_mistake(error) else 1)


def last_word(failures: Mapping[int, Any], processes: int) -> tuple[int, str]:
    """The exit code of a failed launch, and a line that names the rank (empty after a `Mistake`).

    Args:
        failures: rank -> torch's `ProcessFailure`; the first entry failed first, and the launcher
            ended the others.
        processes: number of processes of the launch.
    """
    rank, failure = next(iter(failures.items()))
    name = f"rank {rank} of {processes}"
    if failure.exitcode < 0:
        return ended_by(name, -failure.exitcode)
    if failure.exitcode == MISTAKE:
        return MISTAKE, ""
    traceback = "; its traceback is above" if failure.exitcode == 1 else ""
    return failure.exitcode, f"error: {name} ended with exit code {failure.exitcode}{traceback}"


def ended_by(name: str, number: int) -> tuple[int, str]:
    """The exit code and the line of a process that a signal ended."""
    cause = ", as the kernel does when memory runs out" if number == signal.SIGKILL else ""
    return 128 + number, f"error: {name} was ended by {signal.Signals(number).name}{cause}"


def continues(output_dir: str, resumes: bool) -> str:
    """Where a stopped run goes on: at its last whole checkpoint, if it resumes by itself."""
    manifests = Path(output_dir).glob(f"checkpoint-*/{MANIFEST}") if resumes else []
    matches = (re.fullmatch(r"checkpoint-(\d+)", path.parent.name) for path in manifests)
    steps = [int(match[1]) for match in matches if match]  # a user may keep copies beside them
    where = f"continues at step {max(steps)}" if steps else "starts from the beginning"
    return f"the same command {where}"
