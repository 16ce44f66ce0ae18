"""Records a run's settings, data and code, and says which of them changed when it is resumed."""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin, Trainer, TrainingArguments

from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.base.files import file_digest, read_json
from open_r1.base.images import image_file

RUN = "run.json"
_SECRET = re.compile(r"(?:^|_)(?:token|password|secret|api_key)$", re.IGNORECASE)

# A run that goes on may change these settings; every other one, those of later versions of TRL included, decides what
# is learned, from what, or by which rule.
FREE = (
    # how long it goes on, and from where
    *("max_steps", "num_train_epochs", "output_dir", "resume_from_checkpoint", "ignore_data_skip"),
    *("restore_callback_states_from_checkpoint", "enable_jit_checkpoint"),
    # what it logs, shows, saves and uploads
    *("log_.*", "logging_.*", "report_to", "run_name", "project", "trackio_.*", "num_completions_to_print"),
    *("disable_tqdm", "debug", "skip_memory_metrics", "include_.*", "save_.*", "hub_.*", "push_.*"),
    # what it evaluates, and what it does with that
    *("eval_.*", "do_.*", ".*_full_eval", "batch_eval_metrics", "per_device_eval_batch_size"),
    *("num_generations_eval", "dataset_test_split", "prediction_loss_only", "label_names"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    # how much fits on a device and how it is computed there; `derived` has what follows from these numbers
    *("per_device_train_batch_size", "gradient_accumulation_steps", "completions_per_step"),
    *("steps_per_generation", "generation_batch_size", "auto_find_batch_size", "shared_prefix"),
    *("gradient_checkpointing.*", "activation_offloading", "attn_implementation", "use_cache", "tf32"),
    *("torch_.*", "full_determinism", "use_cpu", "local_rank", "accelerator_config", "parallelism_config"),
    *("ddp_.*", "fsdp.*", "deepspeed", "ds3_.*", "dataloader_(?!drop_last).*", "dataset_num_proc"),
    *("use_liger_kernel", "liger_.*", "pad_to_multiple_of", "trust_remote_code"),
    # who generates
    *("use_vllm", "vllm_(?!importance|structured).*", "use_transformers_.*", "transformers_.*"),
    "cache_implementation",
)


def is_free(name: str) -> bool:
    """Whether a run that goes on may have another value of a setting."""
    return re.fullmatch("|".join(FREE), name) is not None


def without_secrets(value: Any) -> Any:
    """A copy for JSON without tokens and passwords; what JSON has no word for becomes text."""
    if isinstance(value, Mapping):
        items = ((str(key), item) for key, item in value.items())
        return {key: without_secrets(item) for key, item in items if not _SECRET.search(key)}
    if isinstance(value, list | tuple | set):
        return [without_secrets(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def all_arguments(script_args: Any, args: TrainingArguments, model_args: Any) -> dict[str, Any]:
    """Every setting of a run, as `run.json` holds it."""
    return without_secrets({**asdict(model_args), **asdict(script_args), **args.to_dict()})


# --- data and code ----------------------------------------------------------------------------------------------


def describe_data(dataset: Any) -> dict[str, Any] | None:
    """How many examples a trainer gets, and digests of them; None for a stream, which is not read.

    Returns:
        `rows`: their number; `content`: of every field, an image by its file's name; `images`: of
        the files' bytes, of which some may break while a run goes on.
    """
    if not isinstance(dataset, Dataset):
        return None
    content, files = hashlib.sha256(), {}  # files in their order, each once
    for row in dataset:
        names = row.get("images") or []
        files |= dict.fromkeys(map(image_file, names))
        row = {**row, "images": [os.path.basename(name) for name in names]}
        content.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest_or_empty, files)
    images = hashlib.sha256("\n".join(digests).encode())
    return {"rows": len(dataset), "content": content.hexdigest(), "images": images.hexdigest()}


def digest_or_empty(path: str) -> str:
    """`file_digest`; what cannot be read has none."""
    try:
        return file_digest(path)
    except OSError:
        return ""


def describe_inputs(train: Any, held_out: Any, processor: ProcessorMixin) -> dict[str, Any]:
    """`describe_data` of what a trainer learns from and is measured on, and the template's digest."""
    template = hashlib.sha256(str(processor.chat_template).encode()).hexdigest()
    sets = {"train": describe_data(train), "held_out": describe_data(held_out)}
    return {**sets, "chat_template": template}


def describe_code() -> dict[str, Any]:
    """Which code runs: this project's commit, whether its files differ from it, and versions.

    `commit` and `changed` are None where there is no git, or no repository that has this file: an
    environment may lie in one of the user's.
    """
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", __file__) else None
    changed = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "commit": commit,
        "changed": None if changed is None else bool(changed),
        "versions": {"python": platform.python_version(), **installed_versions()},
    }


def _git(*arguments: str) -> str | None:
    """What git says about this project, None when it fails."""
    command = ["git", "-C", str(REPO_ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def installed_versions() -> dict[str, str]:
    """The versions of what requirements.txt and requirements-gpu.txt name and is installed."""
    files = [REPO_ROOT / "requirements.txt", REPO_ROOT / "requirements-gpu.txt"]
    texts = [path.read_text() for path in files if path.is_file()]
    lines = "\n".join(texts).splitlines()
    names = [re.match(r"[\w.-]+", line)[0] for line in lines if re.match(r"\w", line)]
    versions = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


# --- a run that goes on -----------------------------------------------------------------------------------------


def read_record(folder: str | Path) -> dict[str, Any]:
    """The `run.json` of a run's folder; empty when there is none, or one that says nothing."""
    try:
        record = read_json(Path(folder) / RUN)
        changes(record, record)  # what is damaged cannot be compared with itself
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return record


def derived(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a record, with those that follow from several: examples of a step, a rollout."""
    settings = {"command": record["command"], **record["arguments"]}
    batch = settings["per_device_train_batch_size"] * record["world_size"]
    settings["examples_per_step"] = batch * settings["gradient_accumulation_steps"]
    if steps := settings.get("steps_per_generation"):
        settings["examples_per_rollout"] = batch * steps
    return settings


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that decide what is learned and differ between two records, {name: (then, now)}."""
    try:
        before, after = derived(then), derived(now)
    except (TypeError, KeyError):  # of an older run, or damaged: nothing to compare
        return {}
    return {
        name: (before[name], after[name])
        for name in before
        if name in after and not is_free(name) and not is_same(before[name], after[name])
    }


def is_same(one: Any, other: Any) -> bool:
    """Whether two values of a setting are equal, or lead to one file or folder."""
    if one == other:
        return True
    are_paths = isinstance(one, str) and isinstance(other, str) and os.path.exists(one)
    return are_paths and os.path.realpath(one) == os.path.realpath(other)


def changed_inputs(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What of data and template differs between two records, in words; streams are not compared.

    Returns:
        What changes the questions that are learned from; and what does not, or not all of them.
    """
    before, after = then.get("data"), now.get("data")
    learned, noted = [], []
    if not before or not after:
        return learned, noted
    for name, words in (("train", "the training examples"), ("held_out", "the held-out examples")):
        old, new = before[name], after[name]
        if old and new and old["content"] != new["content"]:
            rows = "" if old["rows"] == new["rows"] else f" ({old['rows']} then, {new['rows']} now)"
            (learned if name == "train" else noted).append(words + rows)
        elif old and new and old["images"] != new["images"]:
            noted.append(f"image files of {words}")
    if before["chat_template"] != after["chat_template"]:
        learned.append("the chat template")
    return learned, noted


def changed_code(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The commit and the versions that differ between two records, {name: (then, now)}."""
    if "code" not in then or "code" not in now:
        return {}
    before, after = ({"commit": record["code"]["commit"], **record["code"]["versions"]} for record in (then, now))
    names = [name for name in before if name in after and before[name] != after[name]]
    return {name: (before[name], after[name]) for name in names}


def check_same_run(folder: str | Path, now: Mapping[str, Any]) -> None:
    """Raise Mistake unless a launch that continues the run in a folder learns what that run did.

    Args:
        folder: of the run, with its `run.json`.
        now: the launch's record, or what is known of it: `command`, `world_size` and `arguments`, or
            `data`.
    """
    then, anew = read_record(folder), "choose another OUTPUT, or move this one away"
    if settings := changed_settings(then, now):
        texts = [f"{name} {old}, not {new}" for name, (old, new) in settings.items()]
        raise Mistake(f"{folder}: holds a run with {', '.join(texts)}; {anew}")
    if changed := changed_inputs(then, now)[0]:
        raise Mistake(
            f"{folder}: {' and '.join(changed)} changed since its run began, so it cannot go on as it was; "
            f"restore them, or {anew}; --resume_from_checkpoint with a checkpoint's path goes on with what "
            "is there now"
        )


def changes(then: Mapping[str, Any], now: Mapping[str, Any], but: Collection[str] = ()) -> list[str]:
    """What changed since a run began, in words: settings but for those in `but`, code, data."""
    pairs = {**changed_settings(then, now), **changed_code(then, now)}
    texts = {name: f"{name} ({old} then, {new} now)" for name, (old, new) in pairs.items()}
    learned, noted = changed_inputs(then, now)
    return [text for name, text in texts.items() if name not in but] + learned + noted


def settings_in_force(args: TrainingArguments, optimizer: Any) -> dict[str, Any]:
    """The settings of an optimizer that differ from the arguments, by the arguments' names.

    A resume restores an optimizer with the values that it was saved with.
    """
    if optimizer is None:
        return {}
    _, expected = Trainer.get_optimizer_cls_and_kwargs(args)  # some optimizers have no betas or eps
    groups = optimizer.param_groups
    first = groups[0]
    values = {"weight_decay": max(group.get("weight_decay", 0.0) for group in groups)}
    if "initial_lr" in first:
        values["learning_rate"] = first["initial_lr"]
    if "betas" in expected:
        values["adam_beta1"], values["adam_beta2"] = first["betas"]
    if "eps" in expected:
        values["adam_epsilon"] = first["eps"]
    return {name: value for name, value in values.items() if value != getattr(args, name)}
