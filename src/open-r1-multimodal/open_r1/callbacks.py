"""What a run shows while it trains and leaves in its folder beside trajectories and checkpoints.

`RunLog` writes `run.json`, what was run, and `log.jsonl`, one line a log event. `ProgressLines` prints one line a log
event, `Warnings` one when a guard of `guards.py` begins to warn.
"""

import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from open_r1.files import append_rows, keep_rows, read_json, replace_file
from open_r1.guards import new_warnings

RUN, LOG = "run.json", "log.jsonl"
_SECRET = re.compile(r"(?:^|_)(?:token|password|secret|api_key)$", re.IGNORECASE)
SHORT = {"accuracy_reward": "accuracy", "format_reward": "format"}  # in a line; other rewards keep their name
RECENT_STEPS = 20  # whose seconds the ETA expects of the steps to come
# What stays the same when a run continues: what is learned, from what, and by which rule. How long it goes on, what it
# saves, logs, evaluates and how much fits on a device at once may change.
CONTINUED = (
    *("command", "model_name_or_path", "model_revision", "dtype", "use_peft", "lora_r", "lora_alpha"),
    *("lora_target_modules", "load_in_4bit", "load_in_8bit", "freeze_vision", "freeze_llm", "freeze_merger"),
    *("dataset_name", "dataset_config", "dataset_train_split", "question_column", "answer_column", "image_column"),
    *("options_column", "chat_template", "chat_template_kwargs", "max_prompt_length", "max_pixels", "min_pixels"),
    *("reward_funcs", "reward_weights", "num_generations", "examples_per_step", "max_completion_length"),
    *("temperature", "top_p", "top_k", "beta", "epsilon", "epsilon_high", "loss_type", "scale_rewards"),
    *("num_iterations", "importance_sampling_level", "rotate_options"),
    *("min_signal_groups", "max_refills", "skip_solved", "skip_hopeless", "rescale_by_signal"),
    *("papo_coef", "papo_mask_ratio", "rollout_noise"),
    *("optim", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "seed"),
)


def add_run_callbacks(
    trainer: Trainer, command: str, script_args: Any, model_args: Any, recipes: Sequence[str] = ()
) -> None:
    """Give a trainer its run files, and lines of progress in place of transformers' bar and dictionaries.

    Args:
        trainer: of GRPO or SFT.
        command: "grpo" or "sft".
        script_args: dataclass with `dataset_name` and `eval_dataset_name`.
        model_args: dataclass with `model_name_or_path`.
        recipes: names of the files that the settings come from.
    """
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressLines())
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
            }
        )
    )
    trainer.add_callback(Warnings())  # behind the line and the event that it is about


def whole_path(name: str | None) -> str | None:
    """A name, as it is found from any folder where it is a file or a folder."""
    return os.path.abspath(name) if name and os.path.exists(name) else name


# --- run.json and log.jsonl -----------------------------------------------------------------------------------


def without_secrets(value: Any) -> Any:
    """A copy for JSON: tokens and passwords are left out at any depth, what JSON has no word for becomes text."""
    if isinstance(value, Mapping):
        return {str(key): without_secrets(item) for key, item in value.items() if not _SECRET.search(str(key))}
    if isinstance(value, list | tuple | set):
        return [without_secrets(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def all_arguments(script_args: Any, args: TrainingArguments, model_args: Any) -> dict[str, Any]:
    """Every setting of a run, as `run.json` holds it."""
    return without_secrets({**asdict(model_args), **asdict(script_args), **args.to_dict()})


def check_same_run(
    output_dir: str, processes: int, command: str, script_args: Any, args: TrainingArguments, model_args: Any
) -> None:
    """See that the run in a folder is the one that these arguments continue, by what it left in `run.json`.

    Args:
        output_dir: the folder.
        processes: of this launch.
        command: "grpo" or "sft".
        script_args, args, model_args: of this launch.

    Raises:
        ValueError: when that run trained something else, or in another way.
    """
    try:
        run = read_json(Path(output_dir) / RUN)
        then = {**run["arguments"], "command": run["command"]}
        then["examples_per_step"] = examples_per_step(then, run["world_size"])
    except (OSError, ValueError, TypeError, KeyError):  # of an older run, or damaged: nothing to compare
        return
    now = {**all_arguments(script_args, args, model_args), "command": command}
    now["examples_per_step"] = examples_per_step(now, processes)
    for name in CONTINUED:
        if name in then and then[name] != now.get(name) and not same_file(then[name], now.get(name)):
            raise ValueError(
                f"{output_dir}: holds a run with {name} {then[name]}, not {now.get(name)}; choose another OUTPUT, "
                "or move this one away"
            )


def examples_per_step(arguments: Mapping[str, Any], processes: int) -> int:
    """Examples (of GRPO: completions) in one optimiser step over all processes."""
    return arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] * processes


def same_file(one: Any, other: Any) -> bool:
    """Whether two names lead to one file or folder."""
    return (
        isinstance(one, str)
        and isinstance(other, str)
        and os.path.exists(one)
        and os.path.realpath(one) == os.path.realpath(other)
    )


class RunLog(TrainerCallback):
    """Write `run.json` when training starts and a line of `log.jsonl` at every log event.

    Args:
        run: what `run.json` holds beside `started`, `world_size` and `max_steps`, which only a started run knows.
    """

    def __init__(self, run: Mapping[str, Any]):
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Describe the run, and drop the log of steps that are about to be repeated."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if state.global_step:
            started = first_start(folder / RUN) or started
        record = {**self.run, "started": started, "world_size": args.world_size, "max_steps": state.max_steps}
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / RUN, json.dumps(record, indent=2).encode() + b"\n")
        # A run that starts anew keeps nothing, not even an evaluation before its first step.
        keep_rows(folder / LOG, lambda row: 0 < state.global_step >= row["step"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Write the event down."""
        if state.is_world_process_zero:
            row = {"step": state.global_step, "time": time.time(), **without_secrets(logs)}
            append_rows(Path(args.output_dir) / LOG, [row])


def has_begun(args: TrainingArguments) -> bool:
    """Whether these arguments go on with a run that has taken a step."""
    return args.resume_from_checkpoint == "auto" and (Path(args.output_dir) / LOG).is_file()


def first_start(path: Path) -> str | None:
    """When the run that left this `run.json` started; None when there is none to read."""
    try:
        return read_json(path)["started"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


# --- one line a log event -------------------------------------------------------------------------------------


def describe(logs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The figures of a log event that tell how training goes, as cells of equal width from event to event.

    Args:
        logs: of GRPO or SFT, as the trainer logs them.
        prefix: "eval_" for an evaluation, "blind_" for one without images.
    """
    found = (re.fullmatch(rf"{prefix}rewards/(.+)/mean", key) for key in logs)
    names = [match[1] for match in found if match]
    if names:
        cells = [] if prefix else [("reward", "reward", "6.3f")]  # "held-out" stands there
        cells += [(SHORT.get(name, name), f"rewards/{name}/mean", "5.3f") for name in names]
        cells += [("length", "completions/mean_length", "4.0f"), ("kl", "kl", "6.4f")]
    else:
        cells = [("loss", "loss", "7.4f"), ("token accuracy", "mean_token_accuracy", "5.3f")]
    values = [(label, logs[prefix + key], form) for label, key, form in cells if prefix + key in logs]
    return [f"{label} {'-' if value is None else format(value, form)}" for label, value, form in values]


def evaluations(logs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The evaluations in a log event: the prefix of their figures, the kind (eval, blind) and the name of their set."""
    found = (
        re.fullmatch(r"((eval|blind)_(?:(.+)_)?)(?:completions/mean_length|mean_token_accuracy)", key) for key in logs
    )
    return [(match[1], match[2], match[3] or "") for match in found if match] or [("eval_", "eval", "")]


class ProgressLines(TrainerCallback):
    """Print a line for every logged step and evaluation, from the main process."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None  # of an evaluation

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; steps before a resume took another session's time."""
        self.first_step, self.start = state.global_step, time.perf_counter()
        self.steps_seconds = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.since_log: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """A step starts with its rollout."""
        self.step_start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Its update is done."""
        seconds = time.perf_counter() - self.step_start
        self.steps_seconds += seconds
        self.recent.append(seconds)
        self.since_log.append(seconds)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Print the event; the summary at the end of training is left to the run files."""
        self.close_bar()
        is_evaluation = any(key.startswith(("eval_", "blind_")) for key in logs)
        if not state.is_world_process_zero or not (is_evaluation or "loss" in logs):
            return
        cells = [f"step {state.global_step:{len(str(state.max_steps))}}/{state.max_steps}"]
        if is_evaluation:
            for prefix, kind, name in evaluations(logs):
                title = {"blind": "without image", "eval": "held-out"}[kind] + (f" {name}" if name else "")
                cells += [f"{title:13}" if f"{prefix}reward" in logs else title, *describe(logs, prefix)]
        else:
            seconds = sum(self.since_log) / max(len(self.since_log), 1)
            self.since_log.clear()
            left = self.seconds_left(state)
            cells += [*describe(logs), f"{seconds:5.1f} s", f"ETA {tqdm.format_interval(left)}"]
        print("  ".join(cells), flush=True)

    def seconds_left(self, state: TrainerState) -> float:
        """What the steps to come take: as long as recent ones, and their share of evaluations and checkpoints."""
        done = state.global_step - self.first_step
        if not done:
            return 0.0
        between = max(time.perf_counter() - self.start - self.steps_seconds, 0.0) / done
        return (state.max_steps - state.global_step) * (sum(self.recent) / len(self.recent) + between)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Show on a terminal how far an evaluation is; nothing of it stays."""
        if state.is_world_process_zero:
            if self.bar is None:
                self.bar = tqdm(total=len(eval_dataloader), desc="held-out", leave=False, disable=None)
            self.bar.update(1)

    def close_bar(self) -> None:
        """The evaluation is over."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


# --- warnings -------------------------------------------------------------------------------------------------


class Warnings(TrainerCallback):
    """Tell what the guards find, when it begins: on the terminal, and as an event of its own in `log.jsonl`."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Look at a step's event, and at those before it, which a checkpoint brings along."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        found = new_warnings([event for event in state.log_history if "loss" in event])
        for name, sentence in found.items():
            print(f"warning: step {state.global_step}: {name}: {sentence}", file=sys.stderr, flush=True)
        rows = [{"step": state.global_step, "time": time.time(), "guard": k, "warning": v} for k, v in found.items()]
        if rows:
            append_rows(Path(args.output_dir) / LOG, rows)
