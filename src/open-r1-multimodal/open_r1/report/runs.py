"""Reads the folder that a run leaves (arguments, log, completions), and trusts none of it.

A run may still be going on: the last line of a file may be half written. Anything else that is damaged is an error in
one line. Completions are kept as columns of numbers; their texts stay in the file until somebody asks for one.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from open_r1.base.errors import Mistake
from open_r1.base.fields import TEXT, Check, Fields, check, is_count, is_integer, is_number, is_usable, maybe
from open_r1.base.files import read_json
from open_r1.base.images import local_path
from open_r1.base.trajectories import NUMBERS, OPTIONAL, REQUIRED
from open_r1.models.image_tags import IMAGE_TAGS
from open_r1.tasks.examples import read_list
from open_r1.tasks.mixture import parts_of

ACCURACY, FORMAT = "accuracy_reward", "format_reward"  # as the trainer logs the registry's rewards
MAX_REWARDS = 32  # a run has a handful; more is a damaged file, and each is a column
MAX_PATH = 4096  # characters, as Linux has it
_YEAR_10000 = 253402300800  # in seconds since 1970
_IMAGE_TAGS = re.compile("|".join(map(re.escape, IMAGE_TAGS)))
# A place where a template's own text may end and a question begin, and the other way round.
_QUESTION_STARTS = re.compile(r"\n|[.:?!] ")
_QUESTION_ENDS = re.compile(r"\n|  |<\|")


# --- untrusted data -----------------------------------------------------------------------------------------


def _is_time(value: Any) -> bool:
    return is_number(value) and 0 <= value < _YEAR_10000


EVENT: Fields = {"step": Check(is_count, "a number of steps")}
EVENT_OPTIONAL: Fields = {"time": Check(_is_time, "seconds since 1970"), "guard": TEXT, "warning": TEXT}
INFO_OPTIONAL: Fields = {
    "command": TEXT,
    "started": TEXT,
    "world_size": Check(is_count, "a number of processes"),
    "max_steps": Check(is_integer, "a number of steps"),
    "model": TEXT,
    "dataset": maybe(TEXT),
    "eval_dataset": maybe(TEXT),
    "arguments": Check(lambda value: isinstance(value, dict), "an object"),
}


def read_lines(file: BinaryIO, required: Fields, optional: Fields) -> Iterator[tuple[int, dict[str, Any]]]:
    """The byte offset and the object of every line of a JSON Lines file; a half-written last line is left out.

    Raises:
        ValueError: another line is not JSON, or a field has the wrong type; the message names file, line and field.
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
            yield offset, check(record, required, optional, origin)
        offset += len(line)


# --- the log ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run says about itself.

    Attributes:
        path: its folder.
        info: the content of run.json; empty for an older run.
        events: the log's events in order, each with `step` and metrics.
        max_steps: how many steps it was to take; None when unknown.
    """

    path: Path
    info: dict[str, Any]
    events: list[dict[str, Any]]
    max_steps: int | None

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
        found = (pattern.fullmatch(name) for event in self.events for name in event)
        return list(dict.fromkeys((match[1], match[2] or "") for match in found if match))

    @property
    def steps_done(self) -> int:
        """The last step that the log knows of."""
        return max((event["step"] for event in self.events), default=0)

    @property
    def warnings(self) -> list[tuple[int, str, str]]:
        """Step, guard and sentence of each warning, in their order."""
        return [(e["step"], e["guard"], e["warning"]) for e in self.events if "guard" in e and "warning" in e]

    @property
    def last_time(self) -> float | None:
        """Seconds since 1970 of the last event, where events have a time."""
        return max((event["time"] for event in self.events if "time" in event), default=None)


@dataclass(frozen=True)
class Series:
    """Values (n,) or (n, k) against increasing steps (n,)."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


def read_run(path: Path) -> Run:
    """Read run.json and log.jsonl; without the latter, the log in the newest trainer_state.json.

    Raises:
        OSError, ValueError: not the folder of a run, or a damaged file; one line.
    """
    if not path.is_dir():
        raise Mistake(f"{path}: no such folder")
    states = [state for state in (path / "trainer_state.json", *_checkpoint_states(path)) if state.is_file()]
    has_log, has_info = (path / "log.jsonl").is_file(), (path / "run.json").is_file()
    if not (states or has_log or has_info or (path / "trajectories").is_dir()):
        raise Mistake(f"{path}: nothing of a run in it (run.json, log.jsonl, trajectories/, trainer_state.json)")
    info = check(read_json(path / "run.json"), {}, INFO_OPTIONAL, path / "run.json") if has_info else {}
    state = _read_state(states)
    events = [check(event, EVENT, EVENT_OPTIONAL, f"{state['origin']}: log_history") for event in state["log_history"]]
    if has_log:
        with (path / "log.jsonl").open("rb") as file:
            events = [event for _, event in read_lines(file, EVENT, EVENT_OPTIONAL)]
    max_steps = info.get("max_steps", state.get("max_steps"))
    return Run(path, info, events, max_steps if is_count(max_steps) and max_steps > 0 else None)


def _checkpoint_states(path: Path) -> list[Path]:
    """trainer_state.json of every checkpoint, the newest first."""
    numbers = [(re.fullmatch(r"checkpoint-(\d{1,18})", folder.name), folder) for folder in path.glob("checkpoint-*")]
    found = sorted(((int(match[1]), folder) for match, folder in numbers if match), reverse=True)
    return [folder / "trainer_state.json" for _, folder in found]


def _read_state(states: Sequence[Path]) -> dict[str, Any]:
    """The one that went furthest of the run's own and the newest checkpoint's; a crash may have cut the latter."""
    furthest = {"origin": None, "log_history": []}
    for path in states:
        try:
            state = read_json(path)
        except ValueError:
            continue
        if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
            raise Mistake(f"{path}: log_history: expected a list")
        if len(state["log_history"]) > len(furthest["log_history"]):
            furthest = {**state, "origin": path}
        if path.parent.name.startswith("checkpoint-"):
            break
    return furthest


# --- the images ---------------------------------------------------------------------------------------------


class KnownImages:
    """The image files that a page may show: a run's own, and those that its data sets name or, of a folder, hold."""

    def __init__(self, run: Run):
        self.folders = [run.path.resolve()]
        self.names: set[str] = set()
        for source in filter(None, (run.info.get("dataset"), run.info.get("eval_dataset"))):
            with suppress(OSError, ValueError):  # moved, or no data set any more: it names nothing
                for part in parts_of(source):
                    self._add(Path(part.path).absolute())

    def _add(self, path: Path) -> None:
        """The images of one data set; raises OSError or ValueError for one that cannot be read."""
        if path.is_dir() or path.suffix == ".parquet":
            self.folders.append((path if path.is_dir() else path.parent).resolve())
        elif path.is_file():
            self.names |= {os.path.abspath(path.parent / local_path(text)) for text in _texts(read_list(path))}

    def __contains__(self, path: str) -> bool:
        if os.path.abspath(path) in self.names:
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

COLUMNS = np.dtype(
    [
        ("offset", np.int64),  # of the line in the file, in bytes
        ("size", np.int64),  # of the line's text, in characters
        ("dataset", np.int64),  # which of `datasets` it is a completion for
        ("group", np.int64),  # the same number for the completions of one prompt in one step, unique in the file
        ("prompt", np.int64),  # the same number for the same text and images, wherever they recur
        ("has_reflections", np.bool_),  # whether the run looked for them
        ("reflective", np.bool_),
        *((name, np.dtype(kind)) for name, kind in NUMBERS.items()),  # the record's own
    ]
)


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

    def read(self, index: int) -> dict[str, Any]:
        """The whole record of one completion."""
        self.file.seek(self.rows["offset"][index])
        return json.loads(self.file.readline())

    def of_dataset(self, name: str) -> "Trajectories":
        """The completions of one evaluation set."""
        among = self.rows["dataset"] == self.datasets.index(name)
        return replace(self, rows=self.rows[among], rewards={name: r[among] for name, r in self.rewards.items()})

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
        OSError, ValueError: a damaged line; the message names file, line and field.
    """
    file = (path if path.is_file() else Path(os.devnull)).open("rb")
    try:
        return _scan(file)
    except BaseException:
        file.close()
        raise


def _scan(file: BinaryIO) -> Trajectories:
    rows: list[tuple] = []
    rewards: dict[str, dict[int, float]] = {}
    prompts: dict[bytes, int] = {}
    datasets: dict[str, int] = {}
    groups: dict[tuple[int, int, int, int], int] = {}
    head = tail = None
    for offset, record in read_lines(file, REQUIRED, OPTIONAL):
        prompt = record["prompt"]
        digest = hashlib.blake2b(repr((prompt, record["images"])).encode(), digest_size=16).digest()
        if digest not in prompts:
            text = _IMAGE_TAGS.sub("", prompt)
            head = text if head is None else _shared(head, text)
            tail = text[::-1] if tail is None else _shared(tail, text[::-1])
        prompt_id = prompts.setdefault(digest, len(prompts))
        # An evaluation in several batches counts its groups anew in each.
        dataset = datasets.setdefault(record.get("dataset") or "", len(datasets))
        key = (record["step"], dataset, record.get("group", 0), prompt_id)
        for name, reward in record["rewards"].items():
            if is_usable(reward):
                rewards.setdefault(name, {})[len(rows)] = float(reward)
        if len(rewards) > MAX_REWARDS:
            raise Mistake(f"{file.name}: more than {MAX_REWARDS} names of rewards")
        reflections = record.get("reflections")
        rows.append(
            (
                offset,
                len(record["completion"]),
                dataset,
                groups.setdefault(key, len(groups)),
                prompt_id,
                reflections is not None,
                bool(reflections),
                *(record.get(name, 0) for name in NUMBERS),
            )
        )
    columns = {}
    for name, values in rewards.items():
        columns[name] = np.full(len(rows), np.nan)
        columns[name][list(values)] = list(values.values())
    head, tail = _template(head, tail[::-1]) if len(prompts) > 1 else ("", "")
    return Trajectories(file, np.array(rows, dtype=COLUMNS), columns, tuple(datasets), head, tail)


def _shared(first: str, second: str) -> str:
    """What two texts begin with alike."""
    if second.startswith(first):  # as soon as the template alone is left
        return first
    return first[: next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))]


def _template(head: str, tail: str) -> tuple[str, str]:
    """The shared beginning and end of the prompts without what questions merely happen to share."""
    starts = [match.end() for match in _QUESTION_STARTS.finditer(head)]
    ends = _QUESTION_ENDS.search(tail)
    return head[: starts[-1]] if starts else "", tail[ends.start() :] if ends else ""
