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

if str(Path(__file__).parent) in sys.path:  # the script's folder, whose modules are open_r1's
    sys.path.remove(str(Path(__file__).parent))

from open_r1.base.errors import REPO_ROOT, STOPS, Mistake, Stopped, first_line, take_traceback_option
from open_r1.running.failures import continues, ended_by, exit_on_error, last_word
from open_r1.running.launch_settings import LaunchSettings, read_launch
from open_r1.running.orphans import follow_launcher, lead

STALE_SECONDS = 60
OTHER_TORCH = (
    "install torch for CUDA 12.6 (UV_TORCH_BACKEND=cu126 bash setup.sh), or train on the CPU: CUDA_VISIBLE_DEVICES=-1"
)
HANDLED_SECONDS = 1  # after which Python has run a signal's handler, unless C++ keeps its thread


def check_launch(launch: LaunchSettings, plan: SimpleQueue) -> None:
    """Find everything that the processes would find wrong before they load weights.

    Args:
        launch: what is going to run.
        plan: receives the output folder, whether the same command continues there, and the precision
            that the settings ask for, by accelerate's name. accelerate gets it whatever its own
            configuration file says: with neither bf16 nor fp16 transformers would follow that file,
            and DeepSpeed would cast the float32 weights of the recipe.
    """
    follow_launcher()
    for number in STOPS:
        if signal.getsignal(number) is stop_once:  # its parent's, who speaks for it
            signal.signal(number, signal.SIG_DFL)
    with exit_on_error():
        if os.environ.get("DS_ACCELERATOR") != "cpu":
            check_gpus(launch.num_processes // launch.machine.count)
        entry = importlib.import_module("open_r1.running.entry")
        command = importlib.import_module(f"open_r1.{launch.script.stem}").COMMAND
        args = entry.check_run(command, launch.arguments, launch.config_file, launch.num_processes)
        precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
        plan.put((args.output_dir, args.resume_from_checkpoint == "auto", precision))


def check_gpus(processes: int) -> None:
    """Raise Mistake unless torch can use a GPU for each process: one of them or the driver may be too old."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's paragraphs about the same
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
        reason = ""
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = f" ({first_line(error).partition('. ')[0].rstrip('.')})"
        old = gpu_without_kernels() if usable else None
    if usable < processes:
        raise Mistake(
            f"{processes} processes need a GPU each, and torch {torch.__version__} can use "
            f"{usable}{reason}; update the driver (CUDA 13 needs 580 or newer), {OTHER_TORCH}"
        )
    if old:
        raise Mistake(f"{old}; {OTHER_TORCH}")


def gpu_without_kernels() -> str | None:
    """In words, the first GPU that is older than all that torch was built for; None if there is none."""
    import torch

    names = (re.match(r"sm_(\d+)", name) for name in torch.cuda.get_arch_list())
    built_for = [int(name[1]) for name in names if name]
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if built_for and 10 * major + minor < min(built_for):
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and "
                f"torch {torch.__version__} was built for {min(built_for) / 10} and newer"
            )
    return None


def clear_stale_builds(folder: Path) -> None:
    """Delete locks that a killed compiler left in torch's folder of extensions: torch would wait for ever.

    A lock is stale when it is a minute old and no process (ninja) works in the folder that holds it.
    """
    working_in = {process.info["cwd"] for process in psutil.process_iter(["cwd"])}
    for lock in folder.glob("*/lock"):
        is_old = time.time() - lock.stat().st_mtime > STALE_SECONDS
        if is_old and str(lock.parent) not in working_in:
            lock.unlink(missing_ok=True)


def stop_once(number: int, _: Any = None) -> None:
    """Signal handler: unwind, once."""
    for other in STOPS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


def say_stopped(number: int, run: list) -> None:
    """The last line of a launch that a signal ends; `run` is empty until the check is done."""
    state = continues(*run) if run else "nothing has started"
    print(f"\nstopped by {signal.Signals(number).name}; {state}", file=sys.stderr, flush=True)


def hear_signals(run: list) -> None:
    """End by a signal also while torch's C++ waits for other machines, and no handler of Python's runs."""
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)

    def listen() -> None:
        while number := os.read(heard, 1)[0]:
            time.sleep(HANDLED_SECONDS)
            has_begun = psutil.Process().children()
            if signal.getsignal(number) is stop_once and not has_begun:  # `stop_once` did not run
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
    """Check in a process of its own, whose memory goes with it, and launch; exit if either fails.

    Args:
        launch: what to start.
        run: receives the arguments of `continues` once the check is done.
    """
    fork = multiprocessing.get_context("fork")
    plan = fork.SimpleQueue()
    checking = fork.Process(target=check_launch, args=[launch, plan])  # no daemon: it has a child (templates.py)
    checking.start()
    # Imports torch, as the check does meanwhile.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import launch as settings_of_launch
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    checking.join()
    if code := checking.exitcode:
        if code < 0:
            code, line = ended_by("the check", -code)
            print(line, file=sys.stderr)
        sys.exit(code)
    *place, precision = plan.get()
    run += place
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        clear_stale_builds(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    # Under DeepSpeed accelerate puts the current folder on PYTHONPATH: a random.py there would be imported.
    settings_of_launch.env_var_path_add = lambda name, _: os.environ.get(name, "")
    logging.disable(logging.ERROR)  # in this process: `last_word` says what torch's launcher would
    machine = f"machine {launch.machine.rank} of {launch.machine.count}"
    meeting = f"{launch.machine.address}:{launch.machine.port}"
    if launch.machine.count > 1:
        print(f"{machine}: meets the others at {meeting}", flush=True)
        hear_signals(run)
    try:
        launch_command(launch_command_parser().parse_args(launch.for_accelerate(precision)))
    except ChildFailedError as error:
        code, line = last_word(error.failures, launch.num_processes)
    except subprocess.CalledProcessError as error:  # of one process, without torch's launcher
        code, line = error.returncode, ""
        if code < 0:
            code, line = ended_by("the process", -code)
    except ConnectionError:  # accelerate's, of machine 0
        port = launch.machine.port
        code, line = 2, f"error: MASTER_PORT: {port} is in use; choose another, on all machines"
    except DistError as error:
        code = 1
        line = (
            f"error: {machine} did not meet the others at {meeting} ({first_line(error)}); start "
            "every machine with the same NUM_MACHINES, MASTER_ADDR and MASTER_PORT, within ten minutes"
        )
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
            signal.signal(number, stop_once)
    run: list = []
    try:
        with exit_on_error():
            launch = read_launch(sys.argv[1], sys.argv[2], sys.argv[3:], os.environ)
        if launch.is_examined:
            doctor = str(REPO_ROOT / "scripts/doctor.py")
            os.execv(sys.executable, [sys.executable, doctor, *launch.for_doctor()])
        lead()
        # torchrun's --signals_to_handle: `stop_once` handles the others
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        start(launch, run)
    except Stopped as stopped:
        end_children()
        say_stopped(stopped.number, run)
        sys.exit(128 + stopped.number)


if __name__ == "__main__":
    main()
