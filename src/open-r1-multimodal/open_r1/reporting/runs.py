"""Reads the folder of a run (arguments, log, completions), and trusts nothing in it.

A run may still be going on: the last line of a file may be half written. Anything else that is damaged is an error in
one line. Completions are kept as columns of numbers; their texts stay in the file until somebody asks for one.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from pydantic import Field

from open_r1.answers.judgement import Judgement
from open_r1.answers.reflection import ACCURACY, concluded
from open_r1.base.errors import Mistake
from open_r1.base.fields import Count, Expected, Record, Text, check, is_usable
from open_r1.base.files import read_json
from open_r1.base.images import image_file, is_stored, local_path
from open_r1.base.trajectories import NUMBERS, CompletionRecord
from open_r1.models.image_tags import IMAGE_TAGS
from open_r1.tasks.examples import DELIMITERS, read_list, read_table
from open_r1.tasks.mixture import parts_of

FORMAT = "format_reward"  # as the trainer logs the registry's reward
# Those of a run's arguments that its page and its model card show.
SETTINGS = (
    *("reward_funcs", "reward_weights", "learning_rate", "lr_scheduler_type", "beta", "loss_type"),
    *("scale_rewards", "num_generations", "num_iterations", "temperature", "max_completion_length"),
    *("max_prompt_length", "max_pixels", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "freeze_vision", "use_peft", "seed"),
)
TEACHER = "teacher_model_name_or_path"
NAMES = ("model_name_or_path", TEACHER, "dataset_name", "eval_dataset_name", "output_dir")  # models, data, folders
MAX_PATH = 4096  # characters, as Linux has it
_YEAR_10000 = 253402300800  # in seconds since 1970
_IMAGE_TAGS = re.compile("|".join(map(re.escape, IMAGE_TAGS)))
# A place where a template's own text may end and a question begin, and the other way round.
_QUESTION_STARTS = re.compile(r"\n|[.:?!] ")
_QUESTION_ENDS = re.compile(r"\n|  |<\|")


Time = Annotated[float, Field(ge=0, lt=_YEAR_10000), Expected("seconds since 1970")]


class Event(Record):
    """What every line of log.jsonl holds beside its metrics."""

    step: Count
    time: Time | None = None
    guard: Text = ""
    warning: Text = ""


class DataInfo(Record):
    """What a run says of a set of examples: how many, and the SHA-256 of all fields."""

    rows: Count
    content: Text


class DataSets(Record):
    """The sets of a run; None where one is read as a stream."""

    train: DataInfo | None = None


class RunInfo(Record):
    """What is read of run.json; an older run has less in it, or no such file."""

    command: Text | None = None
    world_size: Count | None = None
    max_steps: Annotated[int | None, Expected("a number of steps")] = None  # -1: those of the epochs
    model: Text | None = None
    dataset: Text | None = None
    eval_dataset: Text | None = None
    arguments: dict[str, Any] = Field(default={})
    reward_funcs: Annotated[list[Text], Expected("a list of names"), Field(default=[])]
    data: DataSets = DataSets()
    recipes: Annotated[list[Text], Expected("a list of names"), Field(default=[])]
    changed: dict[str, Any] = Field(default={})  # of the arguments those that the command line gave

    @property
    def overrides(self) -> dict[str, Any]:
        """What the command line changed, but for the names of models, data and folders."""
        return {name: value for name, value in self.changed.items() if name not in NAMES}


def read_lines(file: BinaryIO) -> Iterator[tuple[str, int, Any]]:
    """Every line of a JSON Lines file: where it stands (for errors), its byte offset, its content.

    A half-written last line is left out.

    Raises:
        Mistake: another line is not JSON; the message names file and line.
    """
    offset = 0
    for number, line in enumerate(file, start=1):
        origin = f"{file.name}, line {number}"
        if not line.isspace():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                # Without its end it is being written, or a crash cut it; the crash of a machine may also leave zeros.
                if not line.endswith(b"\n") or not file.read(1):
                    return
                raise Mistake(f"{origin}: not JSON; delete the line or restore the file from a copy") from error
            yield origin, offset, record
        offset += len(line)


# --- the log ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoggedRun:
    """What a run says about itself.

    Attributes:
        path: its folder.
        info: the content of run.json.
        events: the log's events in order, each with `step` and metrics.
    """

    path: Path
    info: RunInfo
    events: list[dict[str, Any]]

    def series(self, name: str) -> "Series":
        """A metric of the log against steps; a value that is no finite number is left out."""
        points = {event["step"]: float(event[name]) for event in self.events if is_usable(event.get(name))}
        steps = sorted(points)
        return Series(np.array(steps, dtype=np.int64), np.array([points[step] for step in steps]))

    def evaluations(self, kind: str) -> list[tuple[str, str]]:
        """The evaluations in the log, as the prefix of their metrics and the name of their set ("" for one without).

        Args:
            kind: "eval", or "blind" for those without images.
        """
        pattern = re.compile(rf"({kind}_(?:(.+)_)?)rewards/{ACCURACY}/mean")
        matches = (pattern.fullmatch(name) for event in self.events for name in event)
        return list(dict.fromkeys((match[1], match[2] or "") for match in matches if match))

    @property
    def warnings(self) -> list[tuple[int, str, str]]:
        """Step, guard and sentence of each warning, in their order."""
        return [(e["step"], e["guard"], e["warning"]) for e in self.events if "guard" in e and "warning" in e]


@dataclass(frozen=True)
class Series:
    """Values (n,) or (n, k) against increasing steps (n,)."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


def read_run(path: Path) -> LoggedRun:
    """Read run.json and log.jsonl, as far as they are there.

    Raises:
        OSError, Mistake: not the folder of a run, or a damaged file; one line.
    """
    if not path.is_dir():
        raise Mistake(f"{path}: no such folder")
    info_file, log_file = path / "run.json", path / "log.jsonl"
    if not (info_file.is_file() or log_file.is_file() or (path / "trajectories").is_dir()):
        raise Mistake(f"{path}: nothing of a run in it (run.json, log.jsonl, trajectories/)")
    info = check(RunInfo, read_json(info_file), info_file) if info_file.is_file() else RunInfo()
    events = []
    with open_or_empty(log_file) as file:
        for origin, _, event in read_lines(file):
            check(Event, event, origin)
            events.append(event)
    return LoggedRun(path, info, events)


def open_or_empty(path: Path) -> BinaryIO:
    """The file, or an empty one where there is none."""
    return (path if path.is_file() else Path(os.devnull)).open("rb")


# --- the images ---------------------------------------------------------------------------------------------


class KnownImages:
    """The image files that a page may show: a run's own, and those that its data sets name or hold."""

    def __init__(self, run: LoggedRun):
        self.folders = [run.path.resolve()]
        self.names: set[str] = set()
        for source in filter(None, (run.info.dataset, run.info.eval_dataset)):
            with suppress(OSError, ValueError):  # moved, or no data set any more: it names nothing
                for part in parts_of(source):
                    self._add(Path(part.path).absolute())

    def _add(self, path: Path) -> None:
        if path.is_dir() or path.suffix == ".parquet":
            self.folders.append((path if path.is_dir() else path.parent).resolve())
        elif path.is_file():
            # not `read_records`: a run's folder may be a stranger's, and `datasets` reads more kinds of files
            records = list(read_table(path)) if path.suffix in DELIMITERS else read_list(path)
            files = map(image_file, _texts(records))
            self.names |= {os.path.abspath(path.parent / local_path(file)) for file in files}

    def __contains__(self, reference: str) -> bool:
        path = image_file(reference)
        if os.path.abspath(path) in self.names or is_stored(Path(path)):
            return True
        real = Path(os.path.realpath(path))  # a link leads out of a folder
        return any(real.is_relative_to(folder) for folder in self.folders)


def _texts(value: Any) -> Iterator[str]:
    """Every short text in a JSON value, at any depth."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and len(value) < MAX_PATH and "\0" not in value:
            yield value


# --- the completions ----------------------------------------------------------------------------------------

JUDGEMENTS = tuple(Judgement)
MAX_READ = 500  # completions whose thoughts are read, evenly over the file: a long one takes milliseconds

COLUMNS = np.dtype(
    [
        ("offset", np.int64),  # of the line in the file, in bytes
        ("dataset", np.int64),  # which of `datasets` it is a completion for
        ("group", np.int64),  # the same number for the completions of one prompt in one step, unique in the file
        ("prompt", np.int64),  # the same number for the same text and images, wherever they recur
        ("has_reflections", np.bool_),  # whether the run looked for them
        ("reflective", np.bool_),
        ("judgement", np.int64),  # which of `JUDGEMENTS`, from 1 on; 0: none was made
        *((name, np.dtype(kind)) for name, kind in NUMBERS.items()),  # the record's own
    ]
)


@dataclass(frozen=True)
class Thoughts:
    """Whether answers are what the thoughts before them come to.

    Attributes:
        asked: completions that were read, of questions with known options.
        steps: (k,) of those of them that name an option last in the thought, and one as their answer.
        against: (k,) bool, whether it is another.
    """

    asked: int
    steps: np.ndarray
    against: np.ndarray


@dataclass(frozen=True)
class Trajectories:
    """A trajectory file: every completion as a row of numbers, and its text on demand.

    Attributes:
        file: stays open, so that a run that rewrites its file on resuming does not move the texts.
        rows: (n,) of `COLUMNS`.
        rewards: name -> (n,); NaN where a reward function gave none.
        datasets: names of the evaluation sets in the file; "" for one without a name.
        head, tail: what all prompts share before and behind the question, their image tags left out.
    """

    file: BinaryIO
    rows: np.ndarray
    rewards: dict[str, np.ndarray]
    datasets: tuple[str, ...]
    head: str
    tail: str

    def __enter__(self) -> "Trajectories":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> CompletionRecord:
        """The whole record of one completion."""
        self.file.seek(self.rows["offset"][index])
        return CompletionRecord.model_validate(json.loads(self.file.readline()))

    def of_dataset(self, name: str) -> "Trajectories":
        """The completions of one evaluation set."""
        among = self.rows["dataset"] == self.datasets.index(name)
        return replace(self, rows=self.rows[among], rewards={name: r[among] for name, r in self.rewards.items()})

    def last_tenth(self) -> "Trajectories":
        """The completions of the last tenth of the steps, at least one."""
        steps = np.unique(self.rows["step"])
        late = np.isin(self.rows["step"], steps[len(steps) - -(-len(steps) // 10) :])
        return replace(self, rows=self.rows[late], rewards={name: r[late] for name, r in self.rewards.items()})

    @cached_property
    def steps(self) -> dict[int, list[list[int]]]:
        """Step, in order -> the rows of each of its groups, in the file's order."""
        groups: dict[int, list[int]] = {}
        for index, group in enumerate(self.rows["group"].tolist()):
            groups.setdefault(group, []).append(index)
        steps: dict[int, list[list[int]]] = {}
        for rows in groups.values():
            steps.setdefault(int(self.rows["step"][rows[0]]), []).append(rows)
        return dict(sorted(steps.items()))

    @cached_property
    def thoughts(self) -> Thoughts:
        """Of up to `MAX_READ` completions."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), MAX_READ), dtype=int))
        asked = [record for record in map(self.read, chosen) if record.options]
        read = [(record.step, *concluded(record.completion, record.options)) for record in asked]
        both = [(step, thought != answer) for step, thought, answer in read if None not in (thought, answer)]
        steps, against = (np.array(column) for column in zip(*both, strict=True)) if both else (np.empty(0),) * 2
        return Thoughts(len(asked), steps, against)

    def correct(self) -> np.ndarray:
        """(n,) 1.0 where the accuracy reward says right, 0.0 where it says wrong, NaN where there is none."""
        reward = self.rewards.get(ACCURACY)
        if reward is None:
            return np.full(len(self), np.nan)
        return np.where(np.isnan(reward), np.nan, (reward > 0.5).astype(float))

    def question(self, prompt: str) -> tuple[str, str, str]:
        """A prompt without its image tags, divided into the shared head, its own question and the shared tail."""
        prompt = _IMAGE_TAGS.sub("", prompt)
        middle = len(prompt) - len(self.tail)
        if middle <= len(self.head):
            return "", prompt, ""
        return self.head, prompt[len(self.head) : middle], self.tail


def scan_trajectories(path: Path) -> Trajectories:
    """Read a trajectory file once, in order; a file that is not there has no rows.

    Raises:
        OSError, Mistake: a damaged line; the message names file, line and field.
    """
    file = open_or_empty(path)
    try:
        return _scan(file)
    except BaseException:
        file.close()
        raise


def _scan(file: BinaryIO) -> Trajectories:
    rows: list[tuple] = []
    rewards: list[dict[str, float | None]] = []
    prompts: dict[tuple[str, ...], int] = {}  # text and images
    datasets: dict[str, int] = {}
    groups: dict[tuple[int, int, int, int], int] = {}
    numbers = attrgetter(*NUMBERS)
    for origin, offset, line in read_lines(file):
        record = check(CompletionRecord, line, origin)
        prompt = prompts.setdefault((record.prompt, *record.images), len(prompts))
        # In files of older runs each batch of an evaluation counts its groups from 0; the prompt tells them apart.
        dataset = datasets.setdefault(record.dataset or "", len(datasets))
        group = groups.setdefault((record.step, dataset, record.group, prompt), len(groups))
        has_reflections, reflective = record.reflections is not None, bool(record.reflections)
        judgement = JUDGEMENTS.index(record.judgement) + 1 if record.judgement in JUDGEMENTS else 0
        rows.append((offset, dataset, group, prompt, has_reflections, reflective, judgement, *numbers(record)))
        rewards.append(record.rewards)
    head, tail = _template({_IMAGE_TAGS.sub("", text) for text, *_ in prompts})
    columns = np.array(rows, dtype=COLUMNS)
    return Trajectories(file, columns, _columns(rewards), tuple(datasets), head, tail)


def _columns(rewards: list[dict[str, float | None]]) -> dict[str, np.ndarray]:
    """Name -> one number for each completion; functions that never gave one are left out."""
    names = dict.fromkeys(name for row in rewards for name, reward in row.items() if is_usable(reward))
    return {name: np.array([row[name] if is_usable(row.get(name)) else np.nan for row in rewards]) for name in names}


def _template(prompts: set[str]) -> tuple[str, str]:
    """The shared beginning and end of all prompts without what questions merely happen to share."""
    if len(prompts) < 2:
        return "", ""
    head, tail = _shared(prompts), _shared({prompt[::-1] for prompt in prompts})[::-1]
    starts = [match.end() for match in _QUESTION_STARTS.finditer(head)]
    ends = _QUESTION_ENDS.search(tail)
    return head[: starts[-1]] if starts else "", tail[ends.start() :] if ends else ""


def _shared(texts: set[str]) -> str:
    """What all texts begin with: the first and the last one in alphabetical order do."""
    first, last = min(texts), max(texts)
    length = 0
    while length < len(first) and first[length] == last[length]:
        length += 1
    return first[:length]
