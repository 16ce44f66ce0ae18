"""Compare evaluation results: a table, a bar chart, and paired tests over the questions that they share.

    python scripts/compare.py src/eval/results/CVBench_result_*_reasoning.json
    python scripts/compare.py src/eval/results/*_reasoning.json     several benchmarks: a line a score, a column a model

The first result is the one that the others are compared with, of each benchmark its own. The difference of two results
is paired: each question is its own control. Its p-value is McNemar's exact test; a question in several rotations counts
as right when it is right in all of them. Warnings say what else differs: values move by ten points with the prompt or
the parser alone.
"""

import argparse
import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import Mistake, printable, run, use_environment

use_environment()

from open_r1.answers.checker import Unread
from open_r1.answers.statistics import TOTAL, mcnemar, outcomes, paired_difference, unread_warning
from open_r1.base.files import FIGURE_MARK, check_replaceable, replacing
from open_r1.evaluate.results import read_scored
from open_r1.tasks.benchmarks import BENCHMARKS

CHART_FORMATS = (".png", ".svg", ".pdf")
# What two results must share to be compared, and how a warning names it; of two benchmarks the questions differ.
CONDITIONS = {
    "prompt": "prompts",
    "parser": "parsers",
    "generation": "generation settings",
    "pixels": "image sizes",
    "dtype": "number formats",
}
QUESTIONS = {"questions": "questions"}
Result = Mapping[str, Any]
Models = Sequence[tuple[str, Mapping[str, Result]]]  # name, and its results by benchmark


def benchmark_of(result: Result) -> str:
    """What was asked; the evaluation records it."""
    return result.get("benchmark", "unnamed")


def name_results(paths: Sequence[Path], results: Sequence[Result]) -> list[str]:
    """What to call each result: by its file. Those of one model on several benchmarks have one name."""
    benchmarks = [benchmark_of(result) for result in results]
    if len(set(benchmarks)) == 1:
        return short_names([path.stem for path in paths]) or list(map(str, paths))
    files = [BENCHMARKS[name].name if name in BENCHMARKS else name for name in benchmarks]
    stems = [path.stem.removeprefix(f"{file}_result_") for path, file in zip(paths, files, strict=True)]
    distinct = list(dict.fromkeys(stems))
    names = short_names(distinct)
    if names is None or len(set(zip(stems, benchmarks, strict=True))) < len(stems):
        return list(map(str, paths))
    return [names[distinct.index(stem)] for stem in stems]


def rename(names: Sequence[str], results: Sequence[Result], given: Sequence[str]) -> list[str]:
    """The names that the user gave, in place of `name_results`: one a result, of several benchmarks one a model.

    Raises:
        ValueError: too many or too few.
    """
    if len(set(map(benchmark_of, results))) == 1:
        if len(given) != len(results):
            raise Mistake(f"--names: {len(given)} names for {len(results)} results")
        return list(given)
    distinct = list(dict.fromkeys(names))
    if len(given) != len(distinct):
        raise Mistake(f"--names: {len(given)} names for {len(distinct)} models ({', '.join(distinct)})")
    return [given[distinct.index(name)] for name in names]


def by_model(names: Sequence[str], results: Sequence[Result]) -> Models:
    """The results of each model; of one benchmark alone, each result is one."""
    if len(set(map(benchmark_of, results))) == 1:
        return [(name, {benchmark_of(result): result}) for name, result in zip(names, results, strict=True)]
    models: dict[str, dict[str, Result]] = {}
    for name, result in zip(names, results, strict=True):
        models.setdefault(name, {})[benchmark_of(result)] = result
    return list(models.items())


def short_names(stems: Sequence[str]) -> list[str] | None:
    """File names without what all of them begin and end with, at whole words; None if that leaves two the same."""
    words = [stem.split("_") for stem in stems]
    while len(words) > 1 and all(len(own) > 1 and own[0] == words[0][0] for own in words):
        words = [own[1:] for own in words]
    while len(words) > 1 and all(len(own) > 1 and own[-1] == words[0][-1] for own in words):
        words = [own[:-1] for own in words]
    names = ["_".join(own) for own in words]
    return names if len(set(names)) == len(names) else None


def differing(results: Sequence[Result], conditions: Mapping[str, str]) -> list[str]:
    """The names of the conditions under which not all results were made; unknown ones differ from known ones."""
    return [
        name
        for key, name in conditions.items()
        if len({json.dumps(result.get(key), sort_keys=True) for result in results}) > 1
    ]


def score_table(names: Sequence[str], results: Sequence[Result]) -> str:
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


def detail_table(names: Sequence[str], results: Sequence[Result]) -> str:
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


def joint_table(models: Models, benchmarks: Sequence[str]) -> str:
    """Every score of several benchmarks, in %, with its interval and bounds: a line a score, a column a model."""
    lines = [f"| | chance | {' | '.join(name for name, _ in models)} |", f"|:-|-:|{'-:|' * len(models)}"]
    for benchmark in benchmarks:
        results = [found[benchmark] for _, found in models if benchmark in found]
        tasks = [row["task"] for result in results for row in result["results"]]
        others = [label for result in results for label in result["scores"]]
        for label in dict.fromkeys([*tasks, TOTAL, *others]):
            scores = [found[benchmark]["scores"].get(label) if benchmark in found else None for _, found in models]
            chance = next((f"{100 * score['chance']:.2f}" for score in scores if score), "-")
            lines.append(f"| {benchmark}: {label} | {chance} | {' | '.join(map(interval, scores))} |")
    return "\n".join(lines)


def interval(value: Mapping[str, Any] | None) -> str:
    """`"45.20 (41.0 - 49.0) [45.2 - 47.9]"`, or a dash for a score that there is none of."""
    if value is None:
        return "-"
    low, high = (100 * bound for bound in value["interval"])
    bounds = " [{:.1f} - {:.1f}]".format(*(100 * bound for bound in value["bounds"])) if "bounds" in value else ""
    return f"{100 * value['accuracy']:.2f} ({low:.1f} - {high:.1f}){bounds}"


def paired_table(benchmark: str, names: Sequence[str], results: Sequence[Result]) -> str:
    """How the results of a benchmark differ from the first one."""
    first, *others = (outcomes(result["results"]) for result in results)
    lines = [
        f"| {benchmark}, against {names[0]} | {TOTAL} in points | right where the first is wrong "
        "| wrong where the first is right | questions of both | McNemar p |",
        "|:-|-:|-:|-:|-:|-:|",
    ]
    return "\n".join(
        [*lines, *(paired_line(name, first, other) for name, other in zip(names[1:], others, strict=True))]
    )


def paired_line(name: str, first: Mapping[Hashable, bool], second: Mapping[Hashable, bool]) -> str:
    """How `second` differs from `first` over the questions that both answered.

    Raises:
        ValueError: they share none.
    """
    shared = first.keys() & second.keys()
    if not shared:
        raise Mistake(f"{name}: shares no question with the first result")
    only_first = sum(first[key] and not second[key] for key in shared)
    only_second = sum(second[key] and not first[key] for key in shared)
    difference, low, high = (100 * value for value in paired_difference(only_first, only_second, len(shared)))
    p = mcnemar(only_first, only_second)
    return (
        f"| {name} | {difference:+.2f} ({low:+.1f} - {high:+.1f}) | {only_second} | {only_first} "
        f"| {len(shared)} | {p:.2g} |"
    )


def draw(path: Path, models: Models, columns: Sequence[tuple[str, str, str]]) -> None:
    """A group of bars a score, with 95 % intervals and the level of chance.

    Args:
        columns: of each group its benchmark, the score's name there, and what to call it.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a dollar sign in a name is a dollar sign
    from matplotlib import pyplot as plt

    width = 0.8 / len(models)
    figure, axes = plt.subplots(figsize=(max(6, 1.1 * len(columns)), 4), layout="constrained")
    chances: dict[int, float] = {}
    for number, (name, found) in enumerate(models):
        shown = [
            (at, found[benchmark]["scores"][label])
            for at, (benchmark, label, _) in enumerate(columns)
            if benchmark in found and label in found[benchmark]["scores"]
        ]
        x = [at + (number - (len(models) - 1) / 2) * width for at, _ in shown]
        height = [100 * value["accuracy"] for _, value in shown]
        # An interval of quantiles may lie beside its own point estimate by a rounding error.
        below = [max(0, 100 * (value["accuracy"] - value["interval"][0])) for _, value in shown]
        above = [max(0, 100 * (value["interval"][1] - value["accuracy"])) for _, value in shown]
        axes.bar(x, height, width, yerr=(below, above), capsize=2, label=name)
        chances = {at: 100 * value["chance"] for at, value in shown} | chances
    edges = [[at + side for at in chances] for side in (-0.45, 0.45)]
    axes.hlines(list(chances.values()), *edges, "k", "dotted")
    axes.set_xticks(range(len(columns)), [shown_as for _, _, shown_as in columns], rotation=20)
    axes.set_ylabel("accuracy in %, 95 % interval; dotted: chance")
    axes.set_ylim(0, 100)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=FIGURE_MARK[path.suffix])


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
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="what to call the results, of several benchmarks the models (default: by their files)",
    )
    parser.add_argument(
        "--chart", type=chart_path, metavar="FILE", help="PNG, SVG or PDF (default: comparison.png beside the first)"
    )
    args = parser.parse_args()
    chart = args.chart or args.results[0].parent / "comparison.png"
    check_replaceable(chart)
    results = [read_scored(path) for path in args.results]
    names = name_results(args.results, results)
    if args.names:
        names = rename(names, results, args.names)
    names = list(map(printable, names))
    models = by_model(names, results)
    benchmarks = list(dict.fromkeys(map(benchmark_of, results)))
    groups = {
        benchmark: [
            (name, result) for name, result in zip(names, results, strict=True) if benchmark_of(result) == benchmark
        ]
        for benchmark in benchmarks
    }
    explained = "accuracy in % (95 % interval) [bounds: all unread answers wrong, all right]"
    if len(benchmarks) == 1:
        print(f"{score_table(names, results)}\n{explained}\n\n{detail_table(names, results)}")
        columns = [(benchmarks[0], label, label) for label in results[0]["scores"]]
    else:
        print(f"{joint_table(models, benchmarks)}\n{explained}")
        columns = [(benchmark, TOTAL, benchmark) for benchmark in benchmarks]
    for benchmark, group in groups.items():
        if len(group) > 1:
            print(f"\n{paired_table(benchmark, *zip(*group, strict=True))}")
    draw(chart, models, columns)
    for name, result in zip(names, results, strict=True):
        if warning := unread_warning(result["shares"]):
            which = name if len(benchmarks) == 1 else f"{name}, {benchmark_of(result)}"
            print(f"warning: {which}: {warning}", file=sys.stderr)
    for condition in differing(results, CONDITIONS):
        print(f"warning: the {condition} differ; the results are not like for like", file=sys.stderr)
    for benchmark, group in groups.items():
        for condition in differing([result for _, result in group], QUESTIONS):
            print(f"warning: {benchmark}: the {condition} differ; the results are not like for like", file=sys.stderr)
    print(f"\n{printable(chart)}")


if __name__ == "__main__":
    run(main)
