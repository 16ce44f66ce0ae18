"""Start a training command in several processes: accelerate's launcher, with a check before and a short word after.

    python launch.py --config_file ACCELERATE.yaml --num_processes N [--mixed_precision no] SCRIPT.py ARGUMENTS

`launch.sh` calls it. What one process can find wrong is told in one line before the others start (exit code 2). Of
processes that fail, the first tells why; the last line names its rank.
"""

import argparse
import importlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

if str(Path(__file__).parent) in sys.path:  # where Python looks first; open_r1's modules are no top-level ones
    sys.path.remove(str(Path(__file__).parent))

from open_r1.failures import last_word, told_once
from open_r1.orphans import follow_launcher, lead

STALE_SECONDS = 60


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--config_file", required=True)
    parser.add_argument("--num_processes", type=int, required=True)
    parser.add_argument("--mixed_precision")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args()


def check(launch: argparse.Namespace) -> None:
    """Everything that the processes would find wrong before they load weights."""
    follow_launcher()
    with told_once():
        entry = importlib.import_module("open_r1.entry")
        command = importlib.import_module(f"open_r1.{launch.script.stem}").COMMAND
        entry.check(command, launch.arguments, launch.config_file, launch.num_processes)


def clear_stale_builds(folder: Path) -> None:
    """Delete the locks that a killed compiler left in torch's folder of extensions: torch would wait for ever.

    A lock is stale when it is a minute old and nobody compiles beside it (ninja works in the extension's folder).
    """
    for lock in folder.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > STALE_SECONDS and str(lock.parent) not in working_folders():
            lock.unlink(missing_ok=True)


def working_folders() -> set[str]:
    """The current folders of all processes that this user may look at."""
    return {process.info["cwd"] for process in psutil.process_iter(["cwd"])}


def main() -> None:
    """Check in a process of its own, which takes what it read along, and launch."""
    launch = parse()
    lead()
    for stop in (signal.SIGINT, signal.SIGTERM):  # until torch takes over; the check goes with its parent
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
    checking = multiprocessing.get_context("fork").Process(target=check, args=[launch], daemon=True)
    checking.start()
    # Imports torch, as the check does meanwhile.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import launch as settings_of_launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    checking.join()
    if checking.exitcode:
        sys.exit(checking.exitcode if checking.exitcode > 0 else f"error: signal {-checking.exitcode} ended the check")
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        clear_stale_builds(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    # accelerate gives processes under DeepSpeed the current folder, where a random.py would go before Python's.
    settings_of_launch.env_var_path_add = lambda name, _: os.environ.get(name, "")
    logging.disable(logging.ERROR)  # in this process: what torch's launcher says of failures is in the last word
    try:
        launch_command(launch_command_parser().parse_args(["--main_process_port", "0", *sys.argv[1:]]))
    except ChildFailedError as error:
        code, line = last_word(error.failures, launch.num_processes)
        print(line, end="\n" if line else "", file=sys.stderr)
        sys.exit(code)
    except subprocess.CalledProcessError as error:  # of the one process of a launch that is not distributed
        sys.exit(error.returncode)
    except SignalException as stopped:
        sys.exit(f"stopped by {stopped.sigval.name}")


if __name__ == "__main__":
    main()
