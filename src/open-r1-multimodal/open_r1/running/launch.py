"""Starts a training command in several processes: one check first, then accelerate's launcher.

    python launch.py SCRIPT RECIPE [ARGUMENTS]

`launch.sh` calls it, on each of several machines, and tells what it takes from the environment.
What is wrong there, and what one process can find wrong before the others start, is told in one
line (exit code 2). Of processes that fail, one tells why; the last line names the first to fail.
A signal (Ctrl-C, SIGTERM, SIGHUP) ends them all in one line that says where the same command
continues.
"""

import contextlib
import importlib
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import psutil

if str(Path(__file__).parent) in sys.path:  # where Python looks first; open_r1's modules are no top-level ones
    sys.path.remove(str(Path(__file__).parent))

from open_r1.base.errors import STOPS, Mistake, Stopped, first_line, take_traceback_option
from open_r1.base.prompts import REPO_ROOT
from open_r1.running.failures import continues, ended_by, last_word, told_once
from open_r1.running.launch_settings import LaunchSettings, read_launch
from open_r1.running.orphans import follow_launcher, lead

STALE_SECONDS = 60
OTHER_TORCH = (
    "install torch for CUDA 12.6 (UV_TORCH_BACKEND=cu126 bash setup.sh), or train on the CPU: CUDA_VISIBLE_DEVICES=-1"
)
HANDLED_SECONDS = 1  # after which a handler has run, if it can


def check(launch: LaunchSettings, plan: SimpleQueue) -> None:
    """Find everything that the processes would find wrong before they load weights.

    Args:
        launch: what is going to run.
        plan: gets the output folder, whether the same command goes on there, and accelerate's name of the precision
            that the settings ask for. accelerate is told it whatever the launch's own file says: with neither bf16 nor
            fp16, transformers would take that file's word, and DeepSpeed would cast the float32 weights of the recipe.
    """
    follow_launcher()
    for number in STOPS:
        if signal.getsignal(number) is stop:  # its parent's, who speaks for it
            signal.signal(number, signal.SIG_DFL)
    with told_once():
        if os.environ.get("DS_ACCELERATOR") != "cpu":
            check_gpus(launch.num_processes // launch.machine.count)
        entry = importlib.import_module("open_r1.running.entry")
        command = importlib.import_module(f"open_r1.{launch.script.stem}").COMMAND
        args = entry.check(command, launch.arguments, launch.config_file, launch.num_processes)
        precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
        plan.put((args.output_dir, args.resume_from_checkpoint == "auto", precision))


def check_gpus(processes: int) -> None:
    """See that torch can use a GPU for every process; a driver may list them that are too old, or is too old itself."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's paragraphs about the same
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        reason = ""
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = f" ({first_line(error).partition('. ')[0].rstrip('.')})"
        old = gpu_without_kernels() if found else None
    if found < processes:
        raise Mistake(
            f"{processes} processes need a GPU each, and torch {torch.__version__} can use {found}{reason}; "
            f"update the driver (CUDA 13 needs 580 or newer), {OTHER_TORCH}"
        )
    if old:
        raise Mistake(f"{old}; {OTHER_TORCH}")


def gpu_without_kernels() -> str | None:
    """The first GPU that is older than all that torch was built for, and what it was built for; None: there is none."""
    import torch

    built_for = [int(found[1]) for name in torch.cuda.get_arch_list() if (found := re.match(r"sm_(\d+)", name))]
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if built_for and 10 * major + minor < min(built_for):
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and torch "
                f"{torch.__version__} was built for {min(built_for) / 10} and newer"
            )
    return None


def clear_stale_builds(folder: Path) -> None:
    """Delete the locks that a killed compiler left in torch's folder of extensions: torch would wait for ever.

    A lock is stale when it is a minute old and nobody compiles beside it (ninja works in the extension's folder).
    """
    working_in = {process.info["cwd"] for process in psutil.process_iter(["cwd"])}
    for lock in folder.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > STALE_SECONDS and str(lock.parent) not in working_in:
            lock.unlink(missing_ok=True)


def stop(number: int, _: Any = None) -> None:
    """Signal handler: unwind, once."""
    for other in STOPS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


def say_stopped(number: int, run: list) -> None:
    """The last line of a launch that a signal ends; `run` is empty until the check is done."""
    state = continues(*run) if run else "nothing has started"
    print(f"\nstopped by {signal.Signals(number).name}; {state}", file=sys.stderr, flush=True)


def hear_signals(run: list) -> None:
    """End by a signal also while torch waits for other machines: its C++ lets no handler of Python's run meanwhile."""
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)

    def listen() -> None:
        while number := os.read(heard, 1)[0]:
            time.sleep(HANDLED_SECONDS)
            if signal.getsignal(number) is stop and not psutil.Process().children():  # `stop` did not run
                say_stopped(number, run)
                os._exit(128 + number)

    threading.Thread(target=listen, daemon=True).start()


def end_children() -> None:
    children = psutil.Process().children(recursive=True)
    for process in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(children, timeout=10)[1]:
        process.kill()


def start(launch: LaunchSettings, run: list) -> None:
    """Check in a process of its own, which takes what it read along, and launch; exit if either fails.

    Args:
        launch: what to start.
        run: gets the output folder and whether the same command goes on there, once the check is done.
    """
    fork = multiprocessing.get_context("fork")
    plan = fork.SimpleQueue()
    checking = fork.Process(target=check, args=[launch, plan], daemon=True)
    checking.start()
    # Imports torch, as the check does meanwhile.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import launch as settings_of_launch
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    checking.join()
    if checking.exitcode:
        sys.exit(checking.exitcode if checking.exitcode > 0 else f"error: signal {-checking.exitcode} ended the check")
    *place, precision = plan.get()
    run += place
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        clear_stale_builds(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    # accelerate gives processes under DeepSpeed the current folder, where a random.py would go before Python's.
    settings_of_launch.env_var_path_add = lambda name, _: os.environ.get(name, "")
    logging.disable(logging.ERROR)  # in this process: what torch's launcher says of failures is in the last word
    machine = f"machine {launch.machine.rank} of {launch.machine.count}"
    meeting = f"{launch.machine.address}:{launch.machine.port}"
    if launch.machine.count > 1:
        print(f"{machine}: meets the others at {meeting}", flush=True)
        hear_signals(run)
    try:
        launch_command(launch_command_parser().parse_args(launch.for_accelerate(precision)))
    except ChildFailedError as error:
        code, line = last_word(error.failures, launch.num_processes)
    except subprocess.CalledProcessError as error:  # of the one process of a launch that is not distributed
        code, line = (error.returncode, "") if error.returncode > 0 else ended_by("the process", -error.returncode)
    except ConnectionError:  # accelerate's, of machine 0
        code, line = 2, f"error: MASTER_PORT: {launch.machine.port} is in use; choose another, on all machines"
    except DistError as error:
        every = "start every machine with the same NUM_MACHINES, MASTER_ADDR and MASTER_PORT, within ten minutes"
        code, line = 1, f"error: {machine} did not meet the others at {meeting} ({first_line(error)}); {every}"
    else:
        return
    if code > 128:  # a signal's: nothing is wrong with the run itself
        line += f"; {continues(*run)}"
    print(line, end="\n" if line else "", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Launch or have the doctor look at it, and end every process when a signal asks for it."""
    take_traceback_option()
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under `nohup`
            signal.signal(number, stop)
    run: list = []
    try:
        with told_once():
            launch = read_launch(sys.argv[1], sys.argv[2], sys.argv[3:], os.environ)
        if launch.is_examined:
            os.execv(sys.executable, [sys.executable, str(REPO_ROOT / "scripts/doctor.py"), *launch.for_doctor()])
        lead()
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torchrun's --signals_to_handle: `stop` handles the others
        start(launch, run)
    except Stopped as stopped:
        end_children()
        say_stopped(stopped.number, run)
        sys.exit(128 + stopped.number)


if __name__ == "__main__":
    main()
