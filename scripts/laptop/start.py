"""Checks whether GRPO can start from a cold start: its accuracy is above chance, and no task's answers are constant.

    python scripts/laptop/start.py outputs/laptop/results/CVBench_result_start_reasoning.json

GRPO learns nothing if the answers to a question are always the same, or always right or wrong. The exit code is 1
unless the Total is 15 points above chance and no task has constant answers (`open_r1/answers/collapse.py`).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src/open-r1-multimodal"))
from open_r1.base.errors import Mistake, run, use_environment

use_environment()

from open_r1.answers.collapse import constant_answers
from open_r1.answers.statistics import TOTAL
from open_r1.evaluation.results import read_scored

LEAST = 15  # points


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="result file of the evaluation")
    args = parser.parse_args()
    result = read_scored(args.result)
    total = result["scores"][TOTAL]
    points = 100 * (total["accuracy"] - total["chance"])
    constant = constant_answers(result["results"])
    print(f"{points:+.1f} points from chance, {len(constant)} tasks with constant answers")
    if constant:
        raise Mistake(f"{args.result}: {constant[0]}; GRPO would have nothing to choose from")
    if points < LEAST:
        raise Mistake(f"{args.result}: {points:.1f} points above chance, {LEAST} are asked for; GRPO is not started")


if __name__ == "__main__":
    run(main)
