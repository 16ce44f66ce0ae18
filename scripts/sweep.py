"""Compare runs of several recipes and seeds: tables, learning curves, and all numbers in one file.

    python scripts/sweep.py outputs/sweep/none/seed* outputs/sweep/dapo/seed*

`scripts/sweep.sh` makes such runs and calls this. A run's recipe is the name of the folder that it is in; the first
one is the reference. Held-out accuracy is that of a run's own evaluations, completions are all that it sampled until
then. A result file in the run's folder (test_qwen2vl_CVBench.py --output_dir) is compared as well.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import printable, run, use_environment

use_environment()

from open_r1.base.files import MADE_BY, check_replaceable, replace_file, to_json
from open_r1.report.figures import save_recipes
from open_r1.report.sweep import Trial, compare_recipes, read_trial


def by_recipe(runs: Sequence[Path]) -> dict[str, list[Trial]]:
    """The runs of each recipe, in the order in which recipes come up."""
    recipes: dict[str, list[Trial]] = {}
    for path in runs:
        recipes.setdefault(printable(path.resolve().parent.name), []).append(read_trial(path))
    return recipes


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each recipe reached and what it took, as two Markdown tables with a line on how to read them."""
    reference = rows[0]["recipe"]
    reached = [
        f"| recipe | seeds | held-out | lowest - highest seed | against {reference} | CV-Bench | lowest - highest seed "
        f"| against {reference} |",
        "|:-|-:|-:|-:|-:|-:|-:|-:|",
    ]
    took = [
        f"| recipe | completions sampled | until {percent(rows[0]['reached']['accuracy'])} % held-out | of the seeds "
        "| seconds | tokens a completion | reflective, % |",
        "|:-|-:|-:|-:|-:|-:|-:|",
    ]
    for row in rows:
        cells = [row["recipe"], str(len(row["runs"])), *accuracy(row["held_out"]), *accuracy(row["benchmark"])]
        reached.append(f"| {' | '.join(cells)} |")
        until = row["reached"]
        cells = [row["recipe"], number(row["completions"]), number(until["completions"])]
        cells += [", ".join(map(number, until["of_seeds"])), number(row["seconds"])]
        cells += [number(row["length"], ".1f"), percent(row["reflective"])]
        took.append(f"| {' | '.join(cells)} |")
    questions = f"{rows[0]['held_out']['questions']} held-out questions"
    if rows[0]["benchmark"]:
        questions += f" and {rows[0]['benchmark']['questions']} of CV-Bench's form"
    note = (
        f"Accuracy in %, differences in points, each with its 95 % interval, over {questions}. Completions, seconds of "
        "the training steps, and length and reflective share in the last tenth of the steps are means over seeds. "
        "Completions until the reference's final accuracy are read from the mean curve and from each seed's (-: never)."
    )
    return "\n".join([*reached, "", *took, "", note, ""])


def accuracy(value: Mapping[str, Any] | None) -> list[str]:
    """`["77.2 (73.6 - 80.3)", "76.9 - 77.5", "+1.2 (-0.4 - 2.8)"]`, and dashes for what there is none of."""
    if value is None:
        return ["-", "-", "-"]
    low, high = map(percent, value["interval"])
    cells = [f"{percent(value['accuracy'])} ({low} - {high})"]
    cells.append(f"{percent(min(value['of_seeds']))} - {percent(max(value['of_seeds']))}")
    if difference := value["difference"]:
        low, high = (f"{100 * bound:+.1f}" for bound in difference["interval"])
        cells.append(f"{100 * difference['accuracy']:+.1f} ({low} - {high})")
    else:
        cells.append("-")
    return cells


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def number(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run: RECIPE/SEED")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of sweep.md, .json, .png and .svg (default: the recipes' own)"
    )
    args = parser.parse_args()
    output = args.output or args.runs[0].resolve().parents[1]
    check_replaceable(*(output / f"sweep{ending}" for ending in (".json", ".md", ".png", ".svg")))
    rows = compare_recipes(by_recipe(args.runs))
    text = tables(rows)
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / "sweep.json", to_json({"made_by": MADE_BY, "recipes": rows}, indent=1))
    replace_file(output / "sweep.md", f"{text}\n<!-- {MADE_BY} -->\n".encode())
    for ending in (".png", ".svg"):
        save_recipes(rows, output / f"sweep{ending}")
    print(text)
    print(printable(output / "sweep.png"))


if __name__ == "__main__":
    run(main)
