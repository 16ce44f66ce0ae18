"""Compare evaluation results: a table, a bar chart, and paired tests over the questions that they share.

    python scripts/compare.py src/eval/results/CVBench_result_*_reasoning.json

The first result is the one that the others are compared with. The difference of two results is paired: each question
is its own control. Its p-value is McNemar's exact test; a question in several rotations counts as right when it is
right in all of them. Warnings say what else differs: values move by ten points with the prompt or the parser alone.
"""

import argparse
import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.front_door import printable, run, use_environment

use_environment()

from open_r1.answers import Unread
from open_r1.evaluate.results import read_scored
from open_r1.evaluate.statistics import TOTAL, mcnemar, outcomes, paired_difference, unread_warning
from open_r1.files import replacing

CHART_FORMATS = (".png", ".svg", ".pdf")
# What two results must share to be compared, and how a warning names it.
CONDITIONS = {
    "benchmark": "benchmarks",
    "prompt": "prompts",
    "parser": "parsers",
    "questions": "questions",
    "generation": "generation settings",
    "pixels": "image sizes",
    "dtype": "number formats",
}


def short_names(paths: Sequence[Path]) -> list[str]:
    """The file names without what all of them begin and end with, at whole words; the stems if that leaves nothing."""
    words = [path.stem.split("_") for path in paths]
    while len(words) > 1 and all(len(own) > 1 and own[0] == words[0][0] for own in words):
        words = [own[1:] for own in words]
    while len(words) > 1 and all(len(own) > 1 and own[-1] == words[0][-1] for own in words):
        words = [own[:-1] for own in words]
    names = ["_".join(own) for own in words]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def differing_conditions(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the conditions under which not all results were made; unknown ones differ from known ones."""
    return [
        name
        for key, name in CONDITIONS.items()
        if len({json.dumps(result.get(key), sort_keys=True) for result in results}) > 1
    ]


def score_table(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy in %, its 95 % interval and its bounds: a line a result, a column a task and the Total."""
    tasks = dict.fromkeys(row["task"] for result in results for row in result["results"])
    columns = [*tasks, TOTAL]
    lines = [f"| | {' | '.join(columns)} |", f"|:-|{'-:|' * len(columns)}"]
    for name, result in zip(names, results, strict=True):
        lines.append(f"| {name} | {' | '.join(interval(result['scores'].get(column)) for column in columns)} |")
    chances = (results[0]["scores"].get(column) for column in columns)
    cells = [f"{100 * value['chance']:.2f}" if value else "-" for value in chances]
    lines.append(f"| chance | {' | '.join(cells)} |")
    return "\n".join(lines)


def detail_table(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """The other scores, and the shares of responses that could not be read or were cut off: a column a result."""
    tasks = {row["task"] for result in results for row in result["results"]}
    labels = dict.fromkeys(label for result in results for label in result["scores"])
    lines = [f"| | {' | '.join(names)} |", f"|:-|{'-:|' * len(names)}"]
    for label in (label for label in labels if label not in tasks and label != TOTAL):
        lines.append(f"| {label} | {' | '.join(interval(result['scores'].get(label)) for result in results)} |")
    for key in ("unparsable_share", "truncated_share"):
        cells = [f"{100 * result['shares'][key]:.2f}" for result in results]
        lines.append(f"| {key.replace('_', ' ')} | {' | '.join(cells)} |")
    for reason in Unread:
        shares = [result["shares"].get("unread_shares", {}).get(reason.value) for result in results]
        cells = ["-" if share is None else f"{100 * share:.2f}" for share in shares]
        lines.append(f"| unread: {reason.value} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(value: Mapping[str, Any] | None) -> str:
    """`"45.20 (41.0 - 49.0) [45.2 - 47.9]"`, or a dash for a score that there is none of."""
    if value is None:
        return "-"
    low, high = (100 * bound for bound in value["interval"])
    bounds = " [{:.1f} - {:.1f}]".format(*(100 * bound for bound in value["bounds"])) if "bounds" in value else ""
    return f"{100 * value['accuracy']:.2f} ({low:.1f} - {high:.1f}){bounds}"


def paired_line(name: str, first: Mapping[Hashable, bool], second: Mapping[Hashable, bool]) -> str:
    """How `second` differs from `first` over the questions that both answered.

    Raises:
        ValueError: they share none.
    """
    shared = first.keys() & second.keys()
    if not shared:
        raise ValueError(f"{name}: shares no question with the first result")
    only_first = sum(first[key] and not second[key] for key in shared)
    only_second = sum(second[key] and not first[key] for key in shared)
    difference, low, high = (100 * value for value in paired_difference(only_first, only_second, len(shared)))
    p = mcnemar(only_first, only_second)
    return (
        f"| {name} | {difference:+.2f} ({low:+.1f} - {high:+.1f}) | {only_second} | {only_first} "
        f"| {len(shared)} | {p:.2g} |"
    )


def draw(path: Path, names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> None:
    """A group of bars a score, with 95 % intervals and the level of chance."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a dollar sign in a name is a dollar sign
    from matplotlib import pyplot as plt

    labels = list(results[0]["scores"])
    width = 0.8 / len(results)
    figure, axes = plt.subplots(figsize=(max(6, 1.1 * len(labels)), 4), layout="constrained")
    for number, (name, result) in enumerate(zip(names, results, strict=True)):
        shown = [(at, result["scores"][label]) for at, label in enumerate(labels) if label in result["scores"]]
        x = [at + (number - (len(results) - 1) / 2) * width for at, _ in shown]
        height = [100 * value["accuracy"] for _, value in shown]
        # An interval of quantiles may lie beside its own point estimate by a rounding error.
        below = [max(0, 100 * (value["accuracy"] - value["interval"][0])) for _, value in shown]
        above = [max(0, 100 * (value["interval"][1] - value["accuracy"])) for _, value in shown]
        axes.bar(x, height, width, yerr=(below, above), capsize=2, label=name)
    chance = [100 * results[0]["scores"][label]["chance"] for label in labels]
    edges = [[at + side for at in range(len(labels))] for side in (-0.45, 0.45)]
    axes.hlines(chance, *edges, "k", "dotted")
    axes.set_xticks(range(len(labels)), labels, rotation=20)
    axes.set_ylabel("accuracy in %, 95 % interval; dotted: chance")
    axes.set_ylim(0, 100)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)


def chart_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in CHART_FORMATS:
        raise argparse.ArgumentTypeError(f"expected a name that ends in {', '.join(CHART_FORMATS)}, not {text!r}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="result file of the evaluation")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call the results (default: by their files)")
    parser.add_argument(
        "--chart", type=chart_path, metavar="FILE", help="PNG, SVG or PDF (default: comparison.png beside the first)"
    )
    args = parser.parse_args()
    chart = args.chart or args.results[0].parent / "comparison.png"
    results = [read_scored(path) for path in args.results]
    names = [printable(name) for name in args.names or short_names(args.results)]
    if len(names) != len(results):
        raise ValueError(f"--names: {len(names)} names for {len(results)} results")
    print(score_table(names, results))
    print("accuracy in % (95 % interval) [if every response that could not be read were wrong - right]")
    print(f"\n{detail_table(names, results)}")
    first, *others = (outcomes(result["results"]) for result in results)
    if others:
        print(f"\n| against {names[0]} | {TOTAL} in points | it alone right | not it | shared | McNemar p |")
        print("|:-|-:|-:|-:|-:|-:|")
    for name, other in zip(names[1:], others, strict=True):
        print(paired_line(name, first, other))
    draw(chart, names, results)
    for name, result in zip(names, results, strict=True):
        if warning := unread_warning(result["shares"]):
            print(f"warning: {name}: {warning}", file=sys.stderr)
    for condition in differing_conditions(results):
        print(f"warning: the {condition} differ; the results are not like for like", file=sys.stderr)
    print(f"\n{printable(chart)}")


if __name__ == "__main__":
    run(main)
