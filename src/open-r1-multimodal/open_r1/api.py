"""The commands as Python functions, for notebooks and scripts: train, evaluate, ask and report.

    from open_r1 import evaluate, train

    run = train("configs/tiny/grpo.yaml", dataset_name="SAT_train.json", reward_funcs=["accuracy", short], max_steps=20)
    run.curve("reward")                                  # step -> value, of any metric in log.jsonl
    evaluate(run, "CV-Bench", dataset_path="cvbench")    # a table with intervals

Each calls what the command calls, with the same settings, files and errors (`open_r1.base.errors.Mistake`). Training
takes one process here; `run_grpo_SAT.sh` starts several.
"""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from markupsafe import escape

from open_r1.answers.statistics import table
from open_r1.base.errors import Mistake
from open_r1.base.files import read_json
from open_r1.evaluation import asking
from open_r1.evaluation import run as evaluation
from open_r1.evaluation.command import parse_args
from open_r1.reporting.overlay import read_curves, write_pages
from open_r1.reporting.page import key_figures
from open_r1.reporting.runs import open_or_empty, read_lines, read_run
from open_r1.running import entry
from open_r1.running.launch_settings import defaults_on_cpu
from open_r1.tasks.benchmarks import SUITES

entry.quiet()


@dataclass(frozen=True)
class TrainedRun:
    """What training left in a folder; shown in a notebook as its first and last figures."""

    folder: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        """Every line of `log.jsonl`: a step, the time, and metrics."""
        return read_run(self.folder).events

    def curve(self, metric: str) -> dict[int, float]:
        """A metric of the log, step -> value; empty for one that was not logged."""
        series = read_run(self.folder).series(metric)
        return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))

    def completions(self, kind: str = "train") -> list[dict[str, Any]]:
        """Every completion, as `trajectories/{train,eval,blind}.jsonl` holds it."""
        with open_or_empty(self.folder / f"trajectories/{kind}.jsonl") as file:
            return [row for _, _, row in read_lines(file)]

    def figures(self) -> list[tuple[str, str, str]]:
        """Name, first and last value of each figure at the head of the report."""
        return key_figures(read_curves(self.folder)[1])

    def __str__(self) -> str:
        return "\n".join(f"{name}: {first} -> {last}" for name, first, last in self.figures())

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{'</td><td>'.join(map(escape, figures))}</td></tr>" for figures in self.figures())
        return f"<table><tr><th>{escape(self.folder.name)}</th><th>first</th><th>last</th></tr>{rows}</table>"


@dataclass(frozen=True)
class Evaluation:
    """A result file: its scores, each with a 95 % interval, and every response; shown as a table."""

    path: Path
    content: dict[str, Any]

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Name of a score -> `accuracy`, `interval`, `chance`, `n` and more."""
        return self.content["scores"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every response, with how it was read."""
        return self.content["results"]

    def __str__(self) -> str:
        return table(self.scores)

    _repr_markdown_ = __str__


def train(*recipes: str, command: str = "grpo", **settings: Any) -> TrainedRun:
    """Train in this process, as `run_grpo_SAT.sh` or `run_sft.sh` does in its own processes.

    Args:
        recipes: recipe and overlays, named as in CONFIG.
        command: "grpo" or "sft".
        settings: settings that override the recipe's, by name. Rewards, an advantage or a trainer may be given as
            functions or classes, also as those of a notebook's cell.

    Raises:
        Mistake: what the command would print as its one-line error.
    """
    if torch.cuda.device_count() > 1:
        raise Mistake("train: one process takes one GPU; set CUDA_VISIBLE_DEVICES=0, or use run_grpo_SAT.sh for all")
    arguments = [part for name, value in settings.items() for part in to_arguments(name, value)]
    on_cpu = [] if torch.cuda.is_available() else defaults_on_cpu(recipes, arguments)
    configs = [part for recipe in recipes for part in ("--config", recipe)]
    folder = entry.train(import_module(f"open_r1.{command}").COMMAND, [*on_cpu, *arguments, *configs])
    return TrainedRun(Path(folder))


def evaluate(model: str | Path | TrainedRun, benchmark: str = "CV-Bench", **options: Any) -> Evaluation:
    """Evaluate a model as `test_qwen2vl_CVBench.py` does, or read its result if that is there already.

    Args:
        model: a run, a folder or a Hub name.
        benchmark: one of the command's, or `module:NAME`; not easi-8, which is several.
        options: options of the command, by name: `dataset_path`, `limit`, `max_new_tokens`, `output_dir`, ...

    Raises:
        Mistake: what the command would print as its one-line error.
    """
    if benchmark in SUITES:
        raise Mistake(f"{benchmark}: name one of {', '.join(SUITES[benchmark])}; the command takes all at once")
    arguments = ["--model_path", name_of(model), "--benchmark", benchmark]
    for name, value in options.items():
        is_flag = isinstance(value, bool)
        arguments += [f"--{'' if value else 'no-'}{name}"] if is_flag else to_arguments(name, value)
    with redirect_stderr(io.StringIO()) as said:
        try:
            args = parse_args(arguments)
        except SystemExit as error:
            raise Mistake(said.getvalue().rpartition("error: ")[2]) from error
    with redirect_stdout(io.StringIO()):  # the table that a notebook shows of what is returned
        evaluation.run(args)
    path = evaluation.result_path(args)
    return Evaluation(path, read_json(path))


def ask(model: str | Path | TrainedRun, image: Any, question: str, **options: Any) -> str:
    """The greedy completion of a model for a question about an image (a path or a picture); see `asking.ask`."""
    return asking.ask(name_of(model), asking.Query(question, [image]), **options)


def report(*runs: str | Path | TrainedRun, output: str | Path | None = None) -> Path:
    """Make the report of one run, or a page with the curves of several, and return its path (`scripts/report.py`)."""
    return write_pages([Path(name_of(run)) for run in runs], None if output is None else Path(output))


def name_of(model: str | Path | TrainedRun) -> str:
    """The name or path of a model, as the commands take it."""
    return str(model.folder if isinstance(model, TrainedRun) else model)


def to_arguments(name: str, value: Any) -> list[str]:
    """A setting as arguments of the command line; None means the default, and gives no argument.

    >>> to_arguments("reward_funcs", ["accuracy", "format"])
    ['--reward_funcs', 'accuracy', 'format']
    """
    if value is None:
        return []
    values = value if isinstance(value, list | tuple) else [value]
    return [f"--{name}", *map(_to_text, values)]


def _to_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    return named(value) if isinstance(value, Callable) else str(value)


def named(function: Callable[..., Any]) -> str:
    """`module:name` of a function or class, by which a recipe finds it."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__name__", "")
    if not module or getattr(import_module(module), name, None) is not function:
        raise Mistake(f"{function!r}: a setting takes functions that have a name in a module or a notebook's cell")
    return f"{module}:{name}"


__all__ = ("Evaluation", "TrainedRun", "ask", "evaluate", "report", "train")
