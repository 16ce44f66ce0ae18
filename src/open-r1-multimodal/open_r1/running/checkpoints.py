"""Saves, finds and checks checkpoints: a run resumes from whole ones, and no file of them runs code."""

import functools
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from accelerate import PartialState
from accelerate.utils import is_peft_model, patch_environment
from torch import nn
from torch.serialization import load, register_package, safe_globals
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState, TrainingArguments

from open_r1.base.errors import MissingFile, Mistake, first_line, printable
from open_r1.base.files import MANIFEST, delete, replacing
from open_r1.models.loading import adapter_folder, check_adapter, restore_weights
from open_r1.settings.processes import Launch

# What a checkpoint holds for resuming alone. The rest is the model, as `save_model` writes it.
RESUME_FILES = ("optimizer*", "scheduler*", "rng_state*", "global_step*", "latest", "zero_to_*", MANIFEST)
ANOTHER_CHECKPOINT = "resume from another checkpoint, or start anew in another OUTPUT"


def list_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every `checkpoint-*` in a run's folder, whole or not, oldest step first."""
    paths = Path(output_dir).glob("checkpoint-*")
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in matches if match)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; of a link the link alone: what it leads to is not this run's to delete."""
    if checkpoint.is_symlink():
        target = checkpoint.readlink()
        print(printable(f"{checkpoint}: removed, a link; {target}, where it led, is left as it is"))
    else:
        unseal(checkpoint)  # first, so that a kill in between leaves no checkpoint that looks whole
    delete(checkpoint)


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint complete: its manifest, {file: bytes}, appears at once and last."""
    with replacing(checkpoint / MANIFEST) as temporary:
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
        sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
        sizes.pop(MANIFEST, None)  # an older one
        temporary.write_text(json.dumps(sizes))


def is_sealed(checkpoint: Path) -> bool:
    """Whether a checkpoint was declared complete."""
    return (checkpoint / MANIFEST).exists()


def unseal(checkpoint: Path) -> None:
    """Take the declaration back, before the checkpoint is written over or deleted."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)


def half_written(checkpoint: Path) -> str | None:
    """How it shows that a checkpoint was never declared complete, in words, or None when it was."""
    if not is_sealed(checkpoint):
        return f"half-written (no {MANIFEST})"
    if not (checkpoint / MANIFEST).read_bytes().strip(b"\0"):  # as a crash of the machine leaves it
        return f"half-written ({MANIFEST} is empty)"
    return None


def find_defect(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not complete, in words, or None when it is.

    Raises:
        Mistake: it is a link that leads nowhere, or its manifest lists no files.
    """
    path = Path(checkpoint)
    if path.is_symlink() and not path.exists():
        raise Mistake(
            f"{path}: a link to {path.readlink()}, which is not there; "
            "bring it back, or delete the link to go on from the one before"
        )
    if reason := half_written(path):
        return reason
    try:
        sizes = json.loads((path / MANIFEST).read_bytes()).items()
    except (ValueError, AttributeError, RecursionError) as error:
        raise Mistake(
            f"{path}: {MANIFEST} lists no files; delete the folder to go on from the one before it"
        ) from error
    for name, size in sizes:
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run; newer ones are named and passed over."""
    for _, checkpoint in reversed(list_checkpoints(output_dir)):
        defect = find_defect(checkpoint)
        if defect is None:
            return str(checkpoint)
        PartialState().print(printable(f"{checkpoint}: passed over, {defect}"))
    return None


def resolve_checkpoint(resume_from_checkpoint: str | None, output_dir: str) -> str | None:
    """The checkpoint that a run goes on from, if any.

    Args:
        resume_from_checkpoint: `auto`: the newest complete one of the output folder; `none`; a path.
        output_dir: the run's folder.

    Raises:
        MissingFile: the path is no checkpoint, or one that is known to be half-written.
        Mistake: an earlier run's work would be written over, or its checkpoints were damaged.
    """
    if resume_from_checkpoint == "auto":
        if newest := last_complete_checkpoint(output_dir):
            return newest
        check_undamaged(output_dir)
    if resume_from_checkpoint in ("auto", "none", None):
        check_unused(output_dir, resume_from_checkpoint)
        return None
    path = Path(resume_from_checkpoint)
    if not path.is_dir():
        here = Path(output_dir, path)
        hint = f"did you mean {here}?" if here.is_dir() else "auto goes on from the newest one in OUTPUT"
        raise MissingFile(f"resume_from_checkpoint: no folder {path}; {hint}")
    if not (path / "trainer_state.json").is_file():
        reason = "is no checkpoint of a run (no trainer_state.json)"
        raise MissingFile(f"resume_from_checkpoint: {path} {reason}")
    if is_sealed(path) and (defect := find_defect(path)):
        raise MissingFile(f"resume_from_checkpoint: {path}: {defect}")
    if os.path.realpath(path.parent) != os.path.realpath(output_dir):  # of another run
        check_unused(output_dir, "none")
    return resume_from_checkpoint


def check_undamaged(output_dir: str | Path) -> None:
    """Raise Mistake for a checkpoint that was whole once, where none is: a run from step 0 would write over it."""
    for _, checkpoint in reversed(list_checkpoints(output_dir)):
        if not half_written(checkpoint) and (defect := find_defect(checkpoint)):
            reason = f"{defect}, and no other checkpoint is whole"
            raise Mistake(f"{checkpoint}: {reason}; bring it back, or start anew in another OUTPUT")


def check_unused(output_dir: str | Path, resume_from_checkpoint: str | None = None) -> None:
    """Raise Mistake if a run that starts anew would write over something of worth.

    That is the model of a run that ended or, when it is told to start anew, also checkpoints and
    rollouts. What a run that was killed before its first checkpoint left is nothing to `auto`.
    """
    folder = Path(output_dir)
    rollouts = [path for path in folder.glob("trajectories/*.jsonl") if path.stat().st_size]
    has_run = rollouts or (folder / "log.jsonl").exists()
    works = sorted(folder.glob("*.safetensors")) if has_run else []
    if resume_from_checkpoint != "auto":
        paths = [path for _, path in list_checkpoints(folder)]
        works += [path for path in paths if is_sealed(path) or path.is_symlink()] + rollouts
    if works:
        name = works[0].relative_to(folder)
        raise Mistake(
            f"{folder}: holds an earlier run ({name}), and a new one would write over it; "
            "choose another OUTPUT, or move this one away"
        )


def has_begun(args: TrainingArguments) -> bool:
    """Whether these arguments go on from a checkpoint in the output folder."""
    checkpoints = (path for _, path in list_checkpoints(args.output_dir))
    return args.resume_from_checkpoint == "auto" and any(map(is_sealed, checkpoints))


def read_state(checkpoint: str) -> TrainerState:
    """What the trainer noted in a checkpoint: the optimizer steps that were done, among much else.

    Raises:
        Mistake: the file is damaged.
    """
    path = Path(checkpoint, "trainer_state.json")
    try:
        state = TrainerState.load_from_json(str(path))
        known = [state.global_step, state.epoch or 0.0]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise Mistake(f"{path}: not a trainer's state ({first_line(error)}); {ANOTHER_CHECKPOINT}") from error
    if not all(type(number) in (int, float) and 0 <= number < math.inf for number in known):
        raise Mistake(f"{path}: global_step and epoch are no numbers of steps and epochs; {ANOTHER_CHECKPOINT}")
    return state


def is_finished(checkpoint: str, args: TrainingArguments) -> bool:
    """Whether a run with these arguments has no step left after the checkpoint."""
    state = read_state(checkpoint)
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return (state.epoch or 0) >= args.num_train_epochs


def final_checkpoint(checkpoint: str, args: TrainingArguments) -> Path:
    """The checkpoint whose weights a finished run leaves in its folder: the last one or, where asked for, the best.

    Args:
        checkpoint: the last one.
        args: of the run.

    Raises:
        Mistake: the best one is gone or damaged.
    """
    best = read_state(checkpoint).best_model_checkpoint
    if not args.load_best_model_at_end or best is None:
        return Path(checkpoint)
    path = Path(checkpoint).with_name(Path(best).name)  # the run's folder may have been moved since
    if not path.is_dir() or (defect := find_defect(path)):
        reason = defect if path.is_dir() else "is not there"
        raise Mistake(f"{path}: the best checkpoint {reason}; bring it back, or add --load_best_model_at_end false")
    return path


def check_split(checkpoint: str, launch: Launch) -> None:
    """Raise Mistake if a launch cannot load the optimizer's state of a checkpoint."""
    saved = Launch.of_checkpoint(checkpoint)
    if saved is None:
        raise Mistake(
            f"{checkpoint}: holds the model without optimizer and schedule (save_only_model), so the run "
            f"cannot go on; train from it (MODEL={checkpoint}) in another OUTPUT"
        )
    is_split_alike = not saved.zero_stage or saved.num_processes == launch.num_processes
    if saved.zero_stage != launch.zero_stage or not is_split_alike:
        raise Mistake(
            f"{checkpoint}: was written by {saved}, and this is {launch}; launch as then "
            "(NUM_PROCESSES, NUM_MACHINES, ACCELERATE_CONFIG), or start anew in another OUTPUT"
        )


def copy_model(checkpoint: Path, output_dir: str) -> None:
    """Copy a checkpoint's model and processor, without what only a resume needs, into a folder."""
    ignore = shutil.ignore_patterns(*RESUME_FILES)
    shutil.copytree(checkpoint, output_dir, ignore=ignore, dirs_exist_ok=True)


class CompleteCheckpoints(TrainerCallback):
    """Seal every checkpoint once all processes have written their part; delete old ones after that.

    It takes `save_total_limit` over from the trainer, which would delete the last good checkpoint
    before the new one is complete, and counts half-written ones as good.
    """

    def __init__(self, args: TrainingArguments):
        self.limit = args.save_total_limit
        args.save_total_limit = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control, **kwargs):
        """Take back the seals of checkpoints that are going to be written over, never through a link.

        And log, save and evaluate as often as these arguments say, not as the resumed state does.
        """
        state.compute_steps(args, state.max_steps)
        if state.is_world_process_zero:
            for step, checkpoint in list_checkpoints(args.output_dir):
                if step > state.global_step:
                    remove(checkpoint) if checkpoint.is_symlink() else unseal(checkpoint)

    def on_save(self, args: TrainingArguments, state: TrainerState, control, **kwargs):
        """Seal the new checkpoint; keep `save_total_limit` complete ones and the best."""
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if not self.limit:
            return
        checkpoints = list_checkpoints(args.output_dir)
        past = [path for step, path in checkpoints if step <= state.global_step]
        newest = [path for path in past if is_sealed(path)][-self.limit :]
        best = os.path.realpath(state.best_model_checkpoint or ".")  # or a relative path
        for checkpoint in past:
            if checkpoint not in newest and os.path.realpath(checkpoint) != best:
                remove(checkpoint)


@functools.cache  # once is enough, and all that torch takes
def know_the_first_cpu() -> None:
    """Teach `torch.load` that "cpu:0" is the CPU."""

    def restore(storage: Any, place: str) -> Any:
        return storage if place == "cpu:0" else None

    register_package(0, lambda storage: None, restore)


def deepspeed_classes() -> list[type | tuple[Callable, str]]:
    """What DeepSpeed's states hold beside tensors, numbers and containers: small classes of numbers."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def get_stage(enum: type, name: str) -> ZeroStageEnum:
        """What stands in for `getattr`, by which Python 3.11.2 pickles the member of an enum."""
        if enum is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError("GLOBAL getattr")
        return ZeroStageEnum[name]

    return [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler, (get_stage, "builtins.getattr")]


@contextmanager
def loading_no_code(classes: Sequence[type | tuple[Callable, str]] = ()) -> Iterator[None]:
    """In the block `torch.load` builds tensors, numbers, containers and these classes, nothing else.

    A pickle can call any function when it is loaded. transformers loads with `weights_only=True`;
    DeepSpeed asks for `weights_only=False`, which torch's environment variable overrules.

    Raises:
        Mistake: a file asks for more, or is damaged; the line names it.
    """
    try:
        with patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD=1), safe_globals(list(classes)):
            yield
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        # torch names no file in its error, but its frame has it
        frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code is load.__code__]
        if not frames:  # no file's
            raise
        reason = "it is damaged, or no run saved it"
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it asks for {asked[1]}, and could run code"
        raise Mistake(f"{frames[-1].f_locals['f']}: not loaded: {reason}; {ANOTHER_CHECKPOINT}") from error


class LoadWeightsMixin:
    """Mixin for a `Trainer`: a checkpoint's weights come back whole, and no file of it runs code.

    Outside DeepSpeed `restore_weights` loads them, for a resume and for `load_best_model_at_end`.
    DeepSpeed loads its own files, which are parts of this process's memory; an adapter, of which it
    accepts any share, is compared. An adapter is saved alone: under ZeRO-1 and 2 accelerate would
    copy all weights for it, 4.4 GB of a 2B model. And several CPU processes are told to load the
    optimizer to "cpu:0", a place that `torch.load` does not know.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trainer's; what is pushed to the Hub goes its whole way."""
        plugin = self.accelerator.state.deepspeed_plugin
        is_adapter = plugin is not None and plugin.zero_stage < 3 and is_peft_model(self.model)
        if not is_adapter or self.args.push_to_hub:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save(output_dir)

    def _prepare_for_training(self, *args: Any) -> tuple[nn.Module, DataLoader]:
        """The trainer's: here it loads all states of a checkpoint but that of random numbers."""
        with self._loading_states():
            return super()._prepare_for_training(*args)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._loading_states():
            super()._load_rng_state(checkpoint)

    def _loading_states(self) -> AbstractContextManager[None]:
        return loading_no_code(deepspeed_classes() if self.is_deepspeed_enabled else [])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            restore_weights(self.model, best)
            return
        with self._loading_states():
            super()._load_best_model()
        if self.is_deepspeed_enabled:
            self._check_adapters(best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        know_the_first_cpu()
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:  # the weights are loaded by now
            self._check_adapters(checkpoint)

    def _check_adapters(self, checkpoint: str) -> None:
        """Raise Mistake unless the adapters, if any, are those of a checkpoint."""
        if is_peft_model(self.model):
            for name in self.model.peft_config:
                check_adapter(self.model, adapter_folder(Path(checkpoint), name), name)
