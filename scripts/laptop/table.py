"""Compares models that answered the same questions, each trained with one seed or several.

    python scripts/laptop/table.py --model cold_start results/*_result_start_reasoning.json \
        --model grpo grpo/seed*/CVBench_result_*.json results/grpo/SAT-test_result_*.json

The table has a row for each model. For each benchmark there are three columns: accuracy in % over all seeds, with
Wilson's 95 % interval over the questions; the lowest and the highest seed; and the difference to the first model in
points, paired by question, with a 95 % bootstrap interval over questions and seeds.
"""

import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src/open-r1-multimodal"))
from open_r1.base.errors import Mistake, command_line, run, use_environment

use_environment()

import numpy as np

from open_r1.answers.statistics import outcomes
from open_r1.evaluation.results import read_scored
from open_r1.reporting.comparison import compare, markdown, reached_cells

Seeds = list[Mapping[Hashable, float]]  # of each seed, what every question earned


def read(files: Sequence[str]) -> dict[str, Seeds]:
    """Benchmark -> what each seed of a model earned at each question; a file is one seed on one benchmark."""
    found: dict[str, Seeds] = {}
    for name in files:
        result = read_scored(Path(name))
        found.setdefault(result.get("benchmark", ""), []).append(outcomes(result["results"]))
    return found


def cells(benchmark: str, model: Seeds, reference: Seeds) -> list[str]:
    """A model's three columns for one benchmark."""
    questions = list(reference[0])
    for seed in [*model, *reference]:
        if seed.keys() != reference[0].keys():
            raise Mistake(f"{benchmark}: results about other questions than the first model's")
    return reached_cells(compare(lambda seed: np.array([seed[question] for question in questions]), model, reference))


def main() -> None:
    """Command line entry point."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--model", nargs="+", action="append", required=True, metavar="X", help="a name, then its result files"
    )
    models = {name: read(files) for name, *files in parser.parse_args().model}
    first = next(iter(models))
    benchmarks = models[first]
    for name, found in models.items():
        if found.keys() != benchmarks.keys():
            raise Mistake(f"--model {name}: results of {', '.join(found) or 'nothing'}, not of {', '.join(benchmarks)}")
    header = [column for name in benchmarks for column in (name, "lowest - highest seed", f"against {first}")]
    rows = []
    for name, found in models.items():
        of_benchmarks = [cells(benchmark, found[benchmark], benchmarks[benchmark]) for benchmark in benchmarks]
        rows.append([name, str(len(next(iter(found.values())))), *(cell for three in of_benchmarks for cell in three)])
    print(markdown(["model", "seeds", *header], rows))


if __name__ == "__main__":
    run(main)
