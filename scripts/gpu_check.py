"""Measure this repository on one NVIDIA GPU, as `scripts/gpu_check.sh` starts it.

Each measurement (benchmarks/gpu.py) may fail or be impossible: the reason stands in the table, and the next one
follows. When the time is over, what is left says so. The table is printed and left in OUTPUT as `gpu_check.md`, and all
figures in full as `gpu_check.json`. One that failed, other than for want of memory, is exit code 1.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.front_door import Mistake, first_line, run, use_environment

use_environment()

if "--rehearsal" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU

import torch

from open_r1.files import MADE_BY, check_replaceable, replace_file
from open_r1.prompts import REPO_ROOT

STEPS = ("step, stock TRL", "step, this trainer")


class TimeUp(BaseException):
    """The minutes are over; no library's `except Exception` takes it for an error of its own."""


@dataclass(frozen=True)
class Outcome:
    """What came of a measurement: its figures, or why there are none."""

    name: str
    figures: dict[str, float] | None = None
    reason: str = ""
    failed: bool = False
    seconds: float = 0.0  # that it took, with loading


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


def attempt(name: str, measure: Callable[[], dict[str, float]], deadline: float) -> Outcome:
    """Measure, whatever comes of it.

    Args:
        deadline: on the monotonic clock; a measurement that passes it is cut off.
    """
    from benchmarks.gpu import Impossible, release

    start = time.monotonic()
    if start >= deadline:
        return Outcome(name, reason="not run: the time was over")
    print(f"== {name}", file=sys.stderr, flush=True)
    failed, figures = False, None

    def ring(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, deadline - start)
    try:
        figures, reason = measure(), ""
    except TimeUp:
        reason = "cut off: the time was over"
    except Impossible as error:
        reason = f"not run: {error}"
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {first_line(error)}"
    except Exception as error:
        traceback.print_exc()
        reason, failed = f"failed: {type(error).__name__}: {first_line(error)}", True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    release()
    return Outcome(name, figures, reason, failed, time.monotonic() - start)


def ratios(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """By what factor stock TRL takes more seconds and bytes than this trainer."""
    figures = {outcome.name: outcome.figures for outcome in outcomes}
    stock, ours = (figures.get(name) or {} for name in STEPS)
    return {name: stock[name] / ours[name] for name in ours if name in stock and name.endswith((", s", ", GB"))}


def table(outcomes: Sequence[Outcome]) -> str:
    """A row a figure, as Markdown."""
    rows = []
    for outcome in outcomes:
        if outcome.figures is None:
            rows.append((outcome.name, "-", outcome.reason))
        else:
            rows += [(outcome.name, figure, f"{value:.4g}") for figure, value in outcome.figures.items()]
    rows += [
        ("stock TRL / this trainer", name.rpartition(",")[0], f"{value:.2f}x")
        for name, value in ratios(outcomes).items()
    ]
    lines = [" | ".join(cell.replace("|", "/") for cell in row) for row in rows]
    return "\n".join(["| measured | figure | value |", "|---|---|---|", *(f"| {line} |" for line in lines)])


def describe(bench: Any) -> str:
    """What was measured on what."""
    preset = bench.preset
    if bench.is_toy:
        return "A rehearsal of the check itself: a toy model on the CPU. No figure here says anything about a GPU."
    card = torch.cuda.get_device_properties(0)
    return (
        f"{card.name}, {card.total_memory / 1e9:.0f} GB, {date.today().isoformat()}. Qwen2-VL-2B's configuration, "
        f"random weights, {preset.dtype}; a step is {preset.prompts_per_step} prompts with an image of "
        f"{preset.image_side}x{preset.image_side}, {preset.group_size} completions each, of {preset.min_length} to "
        f"{preset.max_length} tokens."
    )


def main() -> None:
    """Command line entry point."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=minutes, default=9, help="after which no more is measured (default: 9)")
    parser.add_argument("--output", type=Path, default=REPO_ROOT / "outputs/gpu_check", help="(default: %(default)s)")
    parser.add_argument(
        "--rehearsal", action="store_true", help="run the check itself, on a toy model and the CPU; it measures nothing"
    )
    args = parser.parse_args()
    if not (args.rehearsal or torch.cuda.is_available()):
        raise Mistake("no GPU: nothing to check; `--rehearsal` runs the check itself on a toy model and the CPU")
    from benchmarks import gpu  # it imports all that trains

    check_replaceable(args.output / "gpu_check.json", args.output / "gpu_check.md")
    args.output.mkdir(parents=True, exist_ok=True)
    deadline = start + 60 * args.minutes
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        bench = gpu.prepare(Path(folder).resolve(), args.rehearsal)
        about = {"about": describe(bench), "python": platform.python_version(), "torch": torch.__version__}
        outcomes: list[Outcome] = []
        for name, measure in gpu.MEASUREMENTS.items():
            outcomes.append(attempt(name, lambda measure=measure: measure(bench), deadline))
            result = {
                "made_by": MADE_BY,
                **about,
                "ratios": ratios(outcomes),
                "outcomes": [asdict(outcome) for outcome in outcomes],
            }
            replace_file(args.output / "gpu_check.json", json.dumps(result, indent=1).encode() + b"\n")
    text = f"{about['about']}\n\n{table(outcomes)}\n"
    replace_file(args.output / "gpu_check.md", f"{text}\n<!-- {MADE_BY} -->\n".encode())
    print(f"{text}\n{args.output / 'gpu_check.md'}, gpu_check.json: {(time.monotonic() - start) / 60:.1f} minutes")
    if bad := [outcome for outcome in outcomes if outcome.failed]:
        raise Mistake(f"{len(bad)} of {len(outcomes)} failed; first {bad[0].name}: {bad[0].reason}")


if __name__ == "__main__":
    run(main, stopped="every finished measurement is in gpu_check.json in OUTPUT")
