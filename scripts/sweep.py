"""Compare runs of several recipes and seeds: tables, learning curves, and all numbers in one file.

    python scripts/sweep.py outputs/sweep/none/seed* outputs/sweep/dapo/seed*

`scripts/sweep.sh` makes such runs and calls this. A run's recipe is the name of the folder that it is in; the first
recipe is the reference. Held-out accuracy is from a run's own evaluations; completions are all that it sampled before
an evaluation. A result file in the run's folder (test_qwen2vl_CVBench.py --output_dir) is compared as well.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import command_line, printable, run, use_environment

use_environment()

from open_r1.base.files import MADE_BY, check_replaceable, replace_file, to_json
from open_r1.reporting.comparison import Trial, compare_recipes, read_trial, recipe_tables
from open_r1.reporting.figures import save_recipes


def by_recipe(runs: Sequence[Path]) -> dict[str, list[Trial]]:
    """The runs of each recipe, in the order in which recipes come up."""
    recipes: dict[str, list[Trial]] = {}
    for path in runs:
        recipes.setdefault(printable(path.resolve().parent.name), []).append(read_trial(path))
    return recipes


def main() -> None:
    """Command line entry point."""
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run: RECIPE/SEED")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="for sweep.md, .json, .png and .svg (default: the one that holds the recipes' folders)",
    )
    args = parser.parse_args()
    output = args.output or args.runs[0].resolve().parents[1]
    check_replaceable(*(output / f"sweep{ending}" for ending in (".json", ".md", ".png", ".svg")))
    rows = compare_recipes(by_recipe(args.runs))
    text = recipe_tables(rows)
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / "sweep.json", to_json({"made_by": MADE_BY, "recipes": rows}, indent=1))
    replace_file(output / "sweep.md", f"{text}\n<!-- {MADE_BY} -->\n".encode())
    for ending in (".png", ".svg"):
        save_recipes(rows, output / f"sweep{ending}")
    print(text)
    print(printable(output / "sweep.png"))


if __name__ == "__main__":
    run(main)
