"""Compare evaluation results: a table, a bar chart, and paired tests over the questions that they share.

    python scripts/compare.py src/eval/results/CVBench_result_*_reasoning.json
    python scripts/compare.py src/eval/results/*_reasoning.json     several benchmarks: a line a score, a column a model
    python scripts/compare.py logs/MODEL/*_samples_blink.jsonl      lmms-eval's log: its score, and ours

Of each benchmark, the other results are compared with the first one. The difference of two results is paired by
question; a question that was asked in several rotations counts once, with its mean. If each question was asked once,
there is also the p-value of McNemar's exact test. Warnings say what else differs between the results: values move by
ten points with the prompt or the parser alone.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import Mistake, command_line, printable, run, use_environment

use_environment()

from open_r1.answers.checker import Unread
from open_r1.answers.collapse import constant_answers
from open_r1.answers.statistics import TOTAL, unread_warning
from open_r1.base.files import FIGURE_MARK, check_replaceable, replacing
from open_r1.evaluation.lmms_eval import read_samples
from open_r1.evaluation.results import read_scored
from open_r1.reporting.comparison import accuracy_cell, markdown, paired_table, percent
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
SAMPLES = ".jsonl"  # lmms-eval's files
Result = Mapping[str, Any]
Models = Sequence[tuple[str, Mapping[str, Result]]]  # name, and its results by benchmark


def benchmark_of(result: Result) -> str:
    """What was asked; the evaluation records it."""
    return result.get("benchmark", "unnamed")


def stem_of(path: Path) -> str:
    """What tells a file from others; lmms-eval's begin with a date, in a folder that has the model's name."""
    stem = path.stem.partition("_samples_")[0] if path.suffix == SAMPLES else path.stem
    return path.parent.name if stem.replace("_", "").isdigit() else stem


def name_results(
    paths: Sequence[Path],
    results: Sequence[Result],
    chosen: Sequence[str] | None,
) -> list[str]:
    """What to call each result: by its file, or as the user chose.

    Results of one model on several benchmarks have one name.

    Raises:
        Mistake: too many or too few chosen names, or one of them twice.
    """
    benchmarks = [benchmark_of(result) for result in results]
    stems = list(map(stem_of, paths))
    kind, wanted = "results", stems
    if len(set(benchmarks)) > 1:
        files = [BENCHMARKS[name].name if name in BENCHMARKS else name for name in benchmarks]
        prefixes = [f"{file}_result_" for file in files]
        stems = [stem.removeprefix(start) for stem, start in zip(stems, prefixes, strict=True)]
        kind, wanted = "models", list(dict.fromkeys(stems))
    defaults = short_names(wanted)
    if len(set(zip(stems, benchmarks, strict=True))) < len(stems):  # one name in two folders
        stems = wanted = defaults = list(map(str, paths))
    names = chosen or defaults
    if repeated := [name for name, count in Counter(chosen).items() if count > 1]:
        raise Mistake(f"--names: {repeated[0]} twice; each result or model needs a name of its own")
    if len(names) != len(wanted):
        defaults = f" ({', '.join(defaults)})" if kind == "models" else ""
        raise Mistake(f"--names: {len(names)} names for {len(wanted)} {kind}{defaults}")
    return list(names) if kind == "results" else [names[wanted.index(stem)] for stem in stems]


def short_names(stems: Sequence[str]) -> list[str]:
    """File names without what all begin and end with, at whole words, unless two were the same."""
    if len(stems) == 1:
        return list(stems)
    words = [stem.split("_") for stem in stems]
    for end in (0, -1):
        while min(map(len, words)) > 1 and len({stem[end] for stem in words}) == 1:
            words = [stem[1:] if end == 0 else stem[:-1] for stem in words]
    names = ["_".join(stem) for stem in words]
    return names if len(set(names)) == len(names) else list(stems)


def by_model(names: Sequence[str], results: Sequence[Result]) -> Models:
    """The results of each model; of one benchmark alone, each result is one."""
    if len(set(map(benchmark_of, results))) == 1:
        return [(name, {benchmark_of(result): result}) for name, result in zip(names, results, strict=True)]
    models: dict[str, dict[str, Result]] = {}
    for name, result in zip(names, results, strict=True):
        models.setdefault(name, {})[benchmark_of(result)] = result
    return list(models.items())


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
    rows = [
        [name, *(accuracy_cell(result["scores"].get(column), 2) for column in columns)]
        for name, result in zip(names, results, strict=True)
    ]
    chances = [results[0]["scores"].get(column, {}).get("chance") for column in columns]
    rows.append(["chance", *(percent(chance, 2) for chance in chances)])
    return markdown(["", *columns], rows)


def detail_table(names: Sequence[str], results: Sequence[Result]) -> str:
    """The other scores, and the shares of responses that could not be read or were cut off: a column a result."""
    tasks = {row["task"] for result in results for row in result["results"]}
    labels = dict.fromkeys(label for result in results for label in result["scores"])
    rows = [
        [label, *(accuracy_cell(result["scores"].get(label), 2) for result in results)]
        for label in labels
        if label not in tasks and label != TOTAL
    ]
    shares = [result["shares"] for result in results]
    for key in ("unparsable_share", "truncated_share"):
        rows.append([key.replace("_", " "), *(percent(share[key], 2) for share in shares)])
    for reason in Unread:
        unread = [share.get("unread_shares", {}).get(reason.value) for share in shares]
        rows.append([f"unread: {reason.value}", *(percent(share, 2) for share in unread)])
    return markdown(["", *names], rows)


def joint_table(models: Models, benchmarks: Sequence[str]) -> str:
    """Every score of several benchmarks, in %, with its interval and bounds: a line a score, a column a model."""
    rows = []
    for benchmark in benchmarks:
        results = [of_model[benchmark] for _, of_model in models if benchmark in of_model]
        tasks = [row["task"] for result in results for row in result["results"]]
        others = [label for result in results for label in result["scores"]]
        for label in dict.fromkeys([*tasks, TOTAL, *others]):
            asked = [of_model.get(benchmark, {"scores": {}}) for _, of_model in models]
            scores = [result["scores"].get(label) for result in asked]
            chance = next((score["chance"] for score in scores if score), None)
            cells = [accuracy_cell(score, 2) for score in scores]
            rows.append([f"{benchmark}: {label}", percent(chance, 2), *cells])
    return markdown(["", "chance", *(name for name, _ in models)], rows)


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
    for number, (name, of_model) in enumerate(models):
        shown = [
            (at, of_model[benchmark]["scores"][label])
            for at, (benchmark, label, _) in enumerate(columns)
            if benchmark in of_model and label in of_model[benchmark]["scores"]
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
    parser = command_line(__doc__)
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT", help="result file of the evaluation, or samples of lmms-eval"
    )
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="names for the results or, where these are of several benchmarks, for models (default: from the files)",
    )
    parser.add_argument(
        "--chart", type=chart_path, metavar="FILE", help="PNG, SVG or PDF (default: comparison.png beside the first)"
    )
    args = parser.parse_args()
    chart = args.chart or args.results[0].parent / "comparison.png"
    check_replaceable(chart)
    results = [read_samples(path) if path.suffix == SAMPLES else read_scored(path) for path in args.results]
    names = list(map(printable, name_results(args.results, results, args.names)))
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
            of_group, rows = [name for name, _ in group], [result["results"] for _, result in group]
            print(f"\n{paired_table(f'{benchmark}, against {of_group[0]}', of_group, rows)}")
    draw(chart, models, columns)
    for name, result in zip(names, results, strict=True):
        which = name if len(benchmarks) == 1 else f"{name}, {benchmark_of(result)}"
        for warning in filter(None, [unread_warning(result["shares"]), *constant_answers(result["results"])]):
            print(f"warning: {which}: {printable(warning)}", file=sys.stderr)
    for condition in differing(results, CONDITIONS):
        print(f"warning: the {condition} differ; the results are not like for like", file=sys.stderr)
    for benchmark, group in groups.items():
        for condition in differing([result for _, result in group], QUESTIONS):
            print(f"warning: {benchmark}: the {condition} differ; the results are not like for like", file=sys.stderr)
    print(f"\n{printable(chart)}")


if __name__ == "__main__":
    run(main)
