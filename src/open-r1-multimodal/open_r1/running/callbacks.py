"""Shows progress while a run trains, and writes its log and `run.json`."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
from huggingface_hub.errors import OfflineModeIsEnabled
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from open_r1.answers.collapse import answered
from open_r1.answers.statistics import Row
from open_r1.base.errors import Mistake, first_line, printable
from open_r1.base.files import append_rows, keep_rows, replace_file
from open_r1.reporting.card import write_card
from open_r1.running.guards import ANSWERS, LOOKED_AT, new_warnings
from open_r1.running.live import LivePlot, in_notebook
from open_r1.running.provenance import (
    RUN,
    all_arguments,
    changes,
    describe_code,
    read_record,
    settings_in_force,
    without_secrets,
)

LOG = "log.jsonl"
SHORT = {"accuracy_reward": "accuracy", "format_reward": "format"}  # names of rewards in a line


def add_run_callbacks(
    trainer: Trainer,
    command: str,
    script_args: Any,
    model_args: Any,
    recipes: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
    continued: Path | None = None,
) -> None:
    """Give a trainer its run files, and lines of progress in place of transformers' bar.

    Args:
        trainer: of GRPO or SFT.
        command: "grpo" or "sft".
        script_args: dataclass with `dataset_name` and `eval_dataset_name`.
        model_args: dataclass with `model_name_or_path`.
        recipes: names of the files that the settings come from.
        record: more for `run.json`, which wins over what is found here: `arguments` as they were
            before the trainer filled them in, and `data`.
        continued: folder of the run that this one goes on with; None: its own.
    """
    for callback in (ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # the last is another in a notebook
        trainer.remove_callback(callback)
    trainer.add_callback(LivePlot() if in_notebook() else ProgressLines())
    trainer.add_callback(
        RunLog(
            {
                "command": command,
                "recipes": list(recipes),
                "model": model_args.model_name_or_path,
                "dataset": whole_path(script_args.dataset_name),
                "eval_dataset": whole_path(script_args.eval_dataset_name),
                "reward_funcs": getattr(trainer, "reward_func_names", []),
                "arguments": all_arguments(script_args, trainer.args, model_args),
                "world_size": trainer.args.world_size,
                "code": describe_code(),
                **(record or {}),
            },
            continued,
        )
    )
    trainer.add_callback(Warnings(getattr(trainer, "recorder", None)))  # behind the line and the event that it is about


def whole_path(name: str | None) -> str | None:
    """A name, as it is found from any folder where it is a file or a folder."""
    return os.path.abspath(name) if name and os.path.exists(name) else name


class ModelCardMixin:
    """Mixin for a `Trainer`: the card of a run (`open_r1.reporting.card`), and one line if the Hub refuses it."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md`; a trainer in a script of the user's leaves TRL's."""
        folder = Path(self.args.output_dir)
        if not (folder / RUN).is_file():
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_card(folder)

    def init_hf_repo(self, token: str | None = None) -> None:
        """Make the repository that a run is pushed to; raises Mistake when it cannot be made."""
        name = self.args.hub_model_id or self.args.output_dir
        with _told_by_hub(name, "`hf auth login`, and name a repository of yours in --hub_model_id"):
            super().init_hf_repo(token)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the model with its card; raises Mistake when the Hub does not take it."""
        again = f"all is saved in {self.args.output_dir}; {upload_advice(self.hub_model_id, self.args.output_dir)}"
        with _told_by_hub(self.hub_model_id, again):
            return super().push_to_hub(*args, **kwargs)


def upload_advice(repository: str | None, folder: str) -> str:
    """How to upload the model in a run's folder by hand, without the run's checkpoints: the end of a sentence."""
    name = repository or Path(folder).name
    return f'upload it with `hf upload {name} {folder} . --exclude "checkpoint-*"`'


@contextmanager
def _told_by_hub(repository: str | None, advice: str) -> Iterator[None]:
    """What the Hub refuses in the block, or a network, becomes a Mistake."""
    try:
        yield
    except (httpx.HTTPError, OfflineModeIsEnabled, RuntimeError) as error:
        # while it sends large files, huggingface_hub wraps what went wrong in a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (httpx.HTTPError, OfflineModeIsEnabled)):
            raise
        raise Mistake(f"--push_to_hub: the Hub does not take {repository} ({first_line(cause)}); {advice}") from error


# --- run.json and log.jsonl -----------------------------------------------------------------------------------


class RunLog(TrainerCallback):
    """Write `run.json` when training starts and a line of `log.jsonl` at every log event.

    Args:
        run: what `run.json` holds beside what only a started run knows.
        continued: folder of the run that this one goes on with; None: its own.
    """

    def __init__(self, run: Mapping[str, Any], continued: Path | None = None):
        self.run, self.continued = run, continued

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control, **kwargs):
        """Describe the run, and drop the log of steps that are about to be repeated."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        record = {**self.run, "started": started, "world_size": args.world_size}
        record["max_steps"] = state.max_steps
        if state.global_step:
            then = read_record(self.continued or folder)
            kept = settings_in_force(args, kwargs.get("optimizer"))
            record |= describe_resume(then, record, state.global_step, kept)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / RUN, json.dumps(record, indent=2).encode() + b"\n")
        # A run that starts anew keeps nothing, not even an evaluation before its first step.
        keep_rows(folder / LOG, lambda row: 0 < state.global_step >= row["step"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control, logs, **kwargs):
        if state.is_world_process_zero:
            row = {"step": state.global_step, "time": time.time(), **without_secrets(logs)}
            append_rows(Path(args.output_dir) / LOG, [row])


def describe_resume(
    then: Mapping[str, Any], now: Mapping[str, Any], step: int, kept: Mapping[str, Any]
) -> dict[str, Any]:
    """Say what a run goes on with that it did not begin with; returns what `run.json` holds of it.

    Args:
        then, now: the record of the run so far, and of this launch.
        step: where it goes on.
        kept: what it keeps of the optimizer's settings against its arguments.
    """
    changed = changes(then, now, but=kept)
    for text in changed:
        print(f"warning: changed since this run began: {text}", file=sys.stderr)
    for name, value in kept.items():
        print(
            f"warning: {name} stays {value}, not {now['arguments'][name]}: a resume restores the "
            "optimizer as it was; to change it, train from the checkpoint's weights (MODEL) in another "
            "OUTPUT",
            file=sys.stderr,
        )
    resume = {"step": step, "time": now["started"], "changed": changed, "kept": kept}
    return {
        "started": then.get("started", now["started"]),
        "arguments": {**now["arguments"], **kept},
        "resumes": [*then.get("resumes", []), resume],
    }


# --- one line a log event -------------------------------------------------------------------------------------


def describe(logs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The figures of a log event that tell how training goes, as cells of a fixed width.

    Args:
        logs: of GRPO or SFT, as the trainer logs them.
        prefix: "eval_" for an evaluation, "blind_" for one without images.
    """
    is_reward = re.compile(rf"{prefix}rewards/(.+)/mean").fullmatch
    names = [match[1] for match in map(is_reward, logs) if match]
    if names:
        cells = [] if prefix else [("reward", "reward", "6.3f")]  # "held-out" stands there
        cells += [(SHORT.get(name, name), f"rewards/{name}/mean", "5.3f") for name in names]
        cells += [("length", "completions/mean_length", "4.0f"), ("kl", "kl", "6.4f")]
    else:
        cells = [("loss", "loss", "7.4f"), ("token accuracy", "mean_token_accuracy", "5.3f")]
    texts = []
    for label, key, form in cells:
        if prefix + key in logs:
            value = logs[prefix + key]
            texts.append(f"{label} {'-' if value is None else format(value, form)}")
    return texts


class ProgressLines(TrainerCallback):
    """Print a line for every logged step and evaluation, from the main process."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None  # of an evaluation

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control, **kwargs):
        self.first_step, self.start = state.global_step, time.perf_counter()  # of this session
        self.seconds: list[float] = []  # of the steps since the last line

    def on_step_begin(self, *args, **kwargs):
        self.step_start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.step_start)

    def on_log(self, args: TrainingArguments, state: TrainerState, control, logs, **kwargs):
        """Print the event; the summary at the end of training is left to the run files."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        kinds = {"eval_": "held-out", "blind_": "without image"}
        prefix = next((kind for kind in kinds if any(key.startswith(kind) for key in logs)), "")
        if not state.is_world_process_zero or not (prefix or "loss" in logs):
            return
        cells = [f"step {state.global_step:{len(str(state.max_steps))}}/{state.max_steps}"]
        if prefix:
            title = kinds[prefix]
            cells += [f"{title:13}" if f"{prefix}reward" in logs else title, *describe(logs, prefix)]
        else:
            # as long as the steps of this session took, evaluations and checkpoints included
            done, elapsed = state.global_step - self.first_step, time.perf_counter() - self.start
            left = tqdm.format_interval((state.max_steps - state.global_step) * elapsed / max(done, 1))
            cells += [*describe(logs), f"{fmean(self.seconds or [0.0]):5.1f} s", f"ETA {left}"]
            self.seconds.clear()
        print("  ".join(cells), flush=True)

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control, **kwargs):
        """Show on a terminal how far an evaluation is; nothing of it stays."""
        if state.is_world_process_zero:
            if self.bar is None:
                batches = len(kwargs["eval_dataloader"])
                self.bar = tqdm(total=batches, desc="held-out", leave=False, disable=None)
            self.bar.update(1)


# --- warnings -------------------------------------------------------------------------------------------------


class Warnings(TrainerCallback):
    """Print what the guards find, when it begins, and log it as an event of its own.

    Args:
        recorder: of a GRPO run's completions, of which the newest rollout and the held-out questions are looked at;
            None for SFT. A run that goes on begins anew with what was answered.
    """

    def __init__(self, recorder: Any = None):
        self.recorder = recorder
        self.asked: list[Row] = []  # since the newest event of a step
        self.answers: dict[int, dict[str, list[Row]]] = {}  # what the events of steps are to have as well

    def on_log(self, args: TrainingArguments, state: TrainerState, control, logs, **kwargs):
        """Look at a step's event, and at those before it, which a checkpoint brings along."""
        if not state.is_world_process_zero:
            return
        step, is_step = state.global_step, "loss" in logs
        if self.recorder is not None:
            records = self.recorder.newest if is_step else self.recorder.held_out
            self.asked += filter(None, map(answered, records))
        if not is_step:
            return
        if self.recorder is not None:
            self.answers = dict([*self.answers.items(), (step, {ANSWERS: self.asked})][-LOOKED_AT:])
            self.asked = []
        events = (event for event in state.log_history if "loss" in event)
        warnings = new_warnings([{**event, **self.answers.get(event["step"], {})} for event in events])
        for name, sentence in warnings.items():
            print(f"warning: step {step}: {name}: {printable(sentence)}", file=sys.stderr, flush=True)
            row = {"step": step, "time": time.time(), "guard": name, "warning": sentence}
            append_rows(Path(args.output_dir) / LOG, [row])
