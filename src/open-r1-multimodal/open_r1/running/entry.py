"""What the commands `grpo.py` and `sft.py` share: read a recipe, start or resume, train, save."""

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from accelerate.utils import DeepSpeedPlugin, is_peft_model
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import Trainer, TrainingArguments
from transformers.utils import ENV_VARS_TRUE_VALUES
from transformers.utils.logging import disable_progress_bar

from open_r1.base.errors import Mistake, account, take_traceback_option
from open_r1.base.locks import check_free, owned
from open_r1.configs import check_attention, check_bfloat16
from open_r1.models.families import use_family
from open_r1.models.loading import check_weights
from open_r1.models.trained import parameter_table
from open_r1.running.callbacks import add_run_callbacks, upload_advice
from open_r1.running.checkpoints import (
    CompleteCheckpoints,
    check_split,
    copy_model,
    final_checkpoint,
    is_finished,
    read_state,
    resolve_checkpoint,
)
from open_r1.running.failures import exit_on_error, full_disk
from open_r1.running.machines import check_shared, decide_once
from open_r1.running.orphans import follow_launcher
from open_r1.running.provenance import all_arguments, check_same_run, describe_inputs
from open_r1.settings.processes import Launch
from open_r1.settings.recipes import PLANNED_PROCESSES, overridden, read_recipe, split_arguments


def resolve_report_to(report_to: list[str]) -> list[str]:
    """`auto` is wandb when a key or an offline mode is set, else tensorboard: no prompt blocks a run.

    Where wandb is switched off it is tensorboard, too. WANDB_DISABLED was transformers' switch, which wandb ignores.
    """
    if report_to != ["auto"]:
        return report_to
    mode, switch = os.environ.get("WANDB_MODE"), os.environ.get("WANDB_DISABLED", "")
    is_off = mode == "disabled" or switch.upper() in ENV_VARS_TRUE_VALUES
    return ["wandb" if not is_off and (mode == "offline" or has_login()) else "tensorboard"]


def has_login() -> bool:
    """Whether wandb finds a key for its server: in the environment, or where `wandb login` writes it."""
    netrc = Path(os.path.expanduser("~/.netrc"))
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    return "WANDB_API_KEY" in os.environ or (netrc.is_file() and server in netrc.read_text())


def check_login(report_to: Sequence[str]) -> None:
    """Raise Mistake where wandb would ask for a login once the weights are loaded, and a run without a terminal end."""
    needs_login = os.environ.get("WANDB_MODE", "online") == "online"
    if "wandb" in report_to and needs_login and not has_login():
        raise Mistake("report_to: wandb has no key; wandb login, WANDB_MODE=offline, or --report_to tensorboard")


def prepare_process() -> None:
    """Silence noise, and find no module beside the script or in the current folder by accident."""
    quiet()
    # Python looks first beside the script, where open_r1's modules would hide a user's of the same names.
    sys.path[:] = [folder for folder in sys.path if folder != str(Path(__file__).parents[1])]
    os.environ["PYTHONSAFEPATH"] = "1"  # for Pythons started from here with `-c` and `-m`


def quiet() -> None:
    """Silence noise at the start of a run: single warnings, and bars of local files."""
    # DeepSpeed's calls
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # It prints that a helper is built, in each process and each time, and nothing else.
        importlib.import_module("deepspeed.comm.torch").print = lambda *_: None
    # The checkpoints of a frozen vision tower; one that learns is seen to (`trained.guide_gradients`).
    warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
    warnings.filterwarnings("ignore", "Both num_training_steps and num_stable_steps are specified")
    downloads_are_shown = not are_progress_bars_disabled()
    disable_progress_bar()  # of loading and writing weights; it takes the bars of downloads along
    if downloads_are_shown:
        enable_progress_bars()


class Settings(NamedTuple):
    """What a recipe and the command line say, as the dataclasses of a `Command`."""

    script_args: Any
    args: TrainingArguments
    model_args: Any


@dataclass(frozen=True)
class Command:
    """A training command. The functions take script, trainer and model arguments, in this order.

    Args:
        name: "grpo" or "sft".
        arguments: the dataclasses that a recipe and the command line fill.
        prepare: everything that a trainer takes and that needs no weights, by its name there.
        build_trainer: the trainer itself; it takes what `prepare` returned behind them.
    """

    name: str
    arguments: tuple[type, type, type]
    prepare: Callable[..., dict[str, Any]]
    build_trainer: Callable[..., Trainer]


def check_run(command: Command, arguments: Sequence[str], config_file: str, processes: int) -> TrainingArguments:
    """Find, in one process and without weights, what would end a run before its first step.

    Args:
        command: what is going to run.
        arguments: of its command line.
        config_file: accelerate's, of the launch.
        processes: that are going to run, on all machines.
    """
    prepare_process()
    os.environ[PLANNED_PROCESSES] = str(processes)
    with silence():
        launch = Launch.of_config(config_file, processes)
        settings = read_settings(command, arguments)
        args, model_args = settings.args, settings.model_args
        check_login(args.report_to)
        check_free(args.output_dir)
        checkpoint = find_checkpoint(command, settings, launch)
        if not (checkpoint and is_finished(checkpoint, args)):
            prepared = command.prepare(*settings)
            if checkpoint:  # the data of the run that it is of
                checked_data(args, prepared, checkpoint)
            check_weights(model_args.model_name_or_path, model_args.model_revision)
    return args


@contextmanager
def silence() -> Iterator[None]:
    """In the block, print nothing: the processes of the run are going to print the same again."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def read_settings(command: Command, arguments: Sequence[str]) -> Settings:
    """The settings of a command line; raises Mistake where none would train."""
    script_args, args, model_args = read_recipe(command.arguments, arguments)
    use_family(script_args.family)
    if args.eval_strategy != "no" and script_args.eval_dataset_name is None:
        raise Mistake(
            f"eval_strategy {args.eval_strategy.value}: there are no held-out examples; name them "
            "in eval_dataset_name, or eval_strategy: no"
        )
    if args.model_init_kwargs:
        raise Mistake(
            "model_init_kwargs: this command loads the model itself, by dtype, attn_implementation and model_revision; "
            "leave it out"
        )
    if args.enable_jit_checkpoint:
        raise Mistake(
            "enable_jit_checkpoint: a run that a signal ends goes on from its newest whole checkpoint; "
            "choose save_steps, and leave it out"
        )
    check_bfloat16(args, model_args)
    check_attention(model_args)
    if args.eval_strategy == "no":
        args.eval_on_start = False  # transformers would ask for an evaluation set all the same
    args.report_to = resolve_report_to(args.report_to)
    return Settings(script_args, args, model_args)


def find_checkpoint(command: Command, settings: Settings, launch: Launch) -> str | None:
    """The checkpoint that a run goes on from, or None; Mistake if this launch (settings, ZeRO, processes) cannot."""
    args = settings.args
    checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if checkpoint and args.resume_from_checkpoint == "auto":
        check_same_run(args.output_dir, describe_settings(command, settings, launch.num_processes))
    if args.deepspeed:  # in place of what accelerate was told
        launch = Launch.of_deepspeed(launch.num_processes, args.deepspeed_plugin.zero_stage, None)
    if checkpoint and not is_finished(checkpoint, args):
        check_split(checkpoint, launch)
    return checkpoint


def describe_settings(command: Command, settings: Settings, processes: int) -> dict[str, Any]:
    """What `run.json` holds of a launch's settings, as they were given."""
    return {"command": command.name, "world_size": processes, "arguments": all_arguments(*settings)}


def checked_data(args: TrainingArguments, prepared: dict[str, Any], checkpoint: str | None) -> dict[str, Any]:
    """What `run.json` holds of the data; raises Mistake if the run that continues began with others."""
    inputs = (prepared[name] for name in ("train_dataset", "eval_dataset", "processing_class"))
    data = describe_inputs(*inputs)
    if checkpoint and args.resume_from_checkpoint == "auto":
        check_same_run(args.output_dir, {"data": data})
    return data


def run_command(command: Command) -> None:
    """The whole of a training command; `launch.py` starts it in every process."""
    follow_launcher()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once; the launcher says why
    prepare_process()
    take_traceback_option()
    with exit_on_error():
        train(command, sys.argv[1:])


def train(command: Command, arguments: Sequence[str]) -> str:
    """Train as the command line says, in an output folder that is this run's own meanwhile; returns that folder."""
    settings = read_settings(command, arguments)
    output_dir = settings.args.output_dir
    os.makedirs(output_dir, exist_ok=True)
    with owned(output_dir):
        check_shared(output_dir)
        train_with(command, settings, arguments)
    return output_dir


def accumulate_in_float32(args: TrainingArguments) -> None:
    """Let DeepSpeed sum the gradients of a step's micro-batches in float32, not in the model's dtype.

    In bfloat16 a sum stands still once it is 256 times what is added, and a step on one GPU adds
    eight micro-batches up. docs/memory.md says what this takes. Stage 1 uses another optimiser for
    it, and keeps DeepSpeed's default.
    """
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage >= 2:
        plugin.deepspeed_config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def rounded_away(trainer: Trainer) -> str | None:
    """A line where steps of the learning rate are lost in the rounding of most weights.

    Of an adapter's they are not: PEFT makes it float32.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or is_peft_model(trainer.model):
        return None
    rate, trained = trainer.args.learning_rate, [each for each in trainer.model.parameters() if each.requires_grad]
    with torch.no_grad():
        kept = sum((weight + rate == weight).sum().item() for weight in trained)
    share = kept / sum(map(torch.numel, trained))
    if not rate or share < 0.5:
        return None
    return (
        f"warning: {share:.0%} of the {trained[0].dtype} weights stay as they are in a step of learning_rate {rate:g}, "
        "and DeepSpeed alone keeps a float32 copy of them: add --dtype float32; --bf16 true still computes in 16 bits"
    )


def check_scaling(trainer: Trainer) -> None:
    """Raise Mistake where fp16's scaler of gradients would, at the first update: it takes those of float32 alone.

    DeepSpeed keeps float32 copies, and has a scaler of its own.
    """
    if not trainer.args.fp16 or trainer.is_deepspeed_enabled:
        return
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in trainer.model.parameters() if weight.requires_grad}
    if others := sorted(dtypes - {"float32"}):
        raise Mistake(
            f"fp16: without DeepSpeed it trains float32 weights alone, and those that learn are {', '.join(others)}; "
            "add --dtype float32 (it still computes in 16 bits), or --fp16 false"
        )


def save_whole_weights(args: TrainingArguments) -> None:
    """Let ZeRO-3 gather the weights that it saves: by default it leaves each process's part, which nothing loads."""
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def check_deepspeed(plugin: DeepSpeedPlugin | None) -> None:
    """Raise Mistake where a launch file says otherwise than the run; transformers would, at the first step.

    Args:
        plugin: of the trainer, which compared the two when it was made.
    """
    mismatches = plugin.hf_ds_config.mismatches if plugin else []
    if mismatches:
        values = [line.removeprefix("- ds ").replace(" vs hf ", " against the run's ") for line in mismatches]
        raise Mistake(
            f"ACCELERATE_CONFIG, deepspeed: the file says {', '.join(values)}; "
            "leave that out of the file, or write auto there"
        )


def train_with(command: Command, settings: Settings, arguments: Sequence[str]) -> None:
    """`train`, with the settings read and the output folder its own."""
    script_args, args, model_args = settings
    launch = Launch.of_this_process()
    checkpoint = decide_once(lambda: find_checkpoint(command, settings, launch))
    if checkpoint and is_finished(checkpoint, args):  # a trainer that resumes at its last step would take one more
        with full_disk(args.output_dir):
            decide_once(lambda: finish(checkpoint, args))
        return
    # Before the trainer fills them in
    record = describe_settings(command, settings, launch.num_processes)
    accumulate_in_float32(args)
    save_whole_weights(args)
    prepared = command.prepare(*settings)
    record["data"] = decide_once(lambda: checked_data(args, prepared, checkpoint))
    trainer = command.build_trainer(*settings, prepared)
    check_deepspeed(trainer.accelerator.state.deepspeed_plugin)
    check_scaling(trainer)
    say = print if trainer.is_world_process_zero() else (lambda *_, **__: None)
    say(parameter_table(trainer.model))
    if line := rounded_away(trainer):
        say(line, file=sys.stderr)
    if checkpoint:
        say(f"resuming from {checkpoint}")
        args.eval_on_start = False  # the checkpoint's step was evaluated when it was reached
    # Read now: training removes this checkpoint once it has save_total_limit newer ones.
    steps_before = read_state(checkpoint).global_step if checkpoint else 0
    trainer.add_callback(CompleteCheckpoints(args))
    recipes, _ = split_arguments(arguments)
    record["changed"] = overridden(arguments, record["arguments"])
    continued = Path(checkpoint).parent if checkpoint else None
    add_run_callbacks(trainer, command.name, script_args, model_args, recipes, record, continued)
    with full_disk(args.output_dir):
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.state.global_step == steps_before:
            data = script_args.dataset_name
            raise Mistake(f"{data}: too few examples for a step; nothing was trained, nothing saved")
        trainer.save_model(args.output_dir, _internal_call=True)  # without a push, which comes when all is there
        trainer.save_state()
        trainer.create_model_card()
    say(f"saved {args.output_dir}")
    if trainer.is_world_process_zero():
        report(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


def finish(checkpoint: str, args: TrainingArguments) -> None:
    """Leave the model of a run that has taken all of its steps in its folder, and the report."""
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    print(f"{checkpoint}: nothing left to do, all {length} are done")
    copy_model(final_checkpoint(checkpoint, args), args.output_dir)
    report(args.output_dir)
    if args.push_to_hub:
        again = upload_advice(args.hub_model_id, args.output_dir)
        print(f"--push_to_hub: nothing was uploaded now; {again}", file=sys.stderr)


def report(output_dir: str) -> None:
    """Write the report of a run that is saved, and say where; an error in it does not end the run."""
    try:
        from open_r1.reporting.page import write_report  # imports matplotlib

        print(f"report: {write_report(Path(output_dir))}")
    except Exception as error:
        print(f"no report: {account(error)}", end="", file=sys.stderr)
