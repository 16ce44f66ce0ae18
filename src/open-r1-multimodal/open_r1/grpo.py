"""Train with GRPO: a recipe and a prepared dataset in, checkpoints and trajectories out.

Launch it with `run_grpo_SAT.sh`, or by hand: `accelerate launch open_r1/grpo.py --config configs/grpo_sat.yaml
--dataset_name SAT_train_15000.json`. It leaves `output_dir` with Hugging Face checkpoints and `trajectories/`.
"""

from typing import Any

from open_r1.base.errors import Mistake

# Above the libraries, since the package silences what they say when they are imported
# isort: split
from trl import ModelConfig

from open_r1.base.plugins import import_named
from open_r1.configs import (
    GRPOScriptArguments,
    Qwen2VLGRPOConfig,
    check_cispo,
    check_rotation,
    check_settings,
    longest_row,
    unused_vllm,
)
from open_r1.models.loading import check_model, check_teacher, load_config, load_model_from_args
from open_r1.models.trained import check_saved_modules, freeze, get_adapter_config
from open_r1.rewards import check_columns, check_gold, get_reward_funcs, needs_gold
from open_r1.running.checkpoints import has_begun
from open_r1.running.data import load_datasets_from_args, load_processor_from_args, opens_think
from open_r1.running.entry import Command, run_command
from open_r1.settings.generation import check_generation
from open_r1.trainer.callbacks import AskBlind
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer


def prepare(
    script_args: GRPOScriptArguments, training_args: Qwen2VLGRPOConfig, model_args: ModelConfig
) -> dict[str, Any]:
    """What the trainer takes beside the weights; Mistake for what no run can start with."""
    choose_trainer(script_args.trainer)
    check_settings(training_args, training_args.shared_prefix)
    check_rotation(script_args, training_args)
    check_cispo(training_args)
    if training_args.use_vllm:
        if model_args.load_in_8bit:
            raise Mistake("load_in_8bit: vLLM is not handed weights of 8 bits; load_in_4bit goes with use_vllm")
        training_args.vllm_max_model_length = longest_row(script_args, training_args)
    peft_config = get_adapter_config(model_args, script_args, family=check_model(model_args))
    template_kwargs = training_args.chat_template_kwargs or {}
    processor = load_processor_from_args(model_args, script_args, template_kwargs)
    check_generation(training_args.generation_kwargs, len(processor.tokenizer), training_args.use_vllm)
    if teacher := training_args.teacher_model_name_or_path:
        check_teacher(teacher, load_config(model_args.model_name_or_path, model_args.model_revision), processor)
    reward_funcs = get_reward_funcs(
        script_args.reward_funcs,
        think_prefilled=opens_think(processor, **template_kwargs),
        max_completion_length=training_args.max_completion_length,
    )
    checks = [check_gold] if any(map(needs_gold, reward_funcs)) else []
    train_dataset, eval_dataset = load_datasets_from_args(
        *(script_args, processor, template_kwargs, checks),
        rotate_options=script_args.rotate_options,
        has_begun=has_begun(training_args),
    )
    if script_args.trainer is None:  # one of the user's may add what its rewards need
        check_columns(reward_funcs, train_dataset.column_names)
    prompts = training_args.generation_batch_size // training_args.num_generations
    if len(train_dataset) < prompts:
        raise Mistake(
            f"{script_args.dataset_name}: a step asks {prompts} different prompts "
            f"({training_args.generation_batch_size} completions / num_generations), and there are {len(train_dataset)}"
        )
    return {
        "processing_class": processor,
        "reward_funcs": reward_funcs,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "peft_config": peft_config,
    }


def choose_trainer(name: str | None) -> type[Qwen2VLGRPOTrainer]:
    """The class that trains, `Qwen2VLGRPOTrainer` or a user's."""
    if name is None:
        return Qwen2VLGRPOTrainer
    trainer = import_named("trainer", "trainer", name)
    if not (isinstance(trainer, type) and issubclass(trainer, Qwen2VLGRPOTrainer)):
        raise Mistake(f"trainer: {name} is no subclass of open_r1.trainer.trainer.Qwen2VLGRPOTrainer")
    return trainer


def build_trainer(
    script_args: GRPOScriptArguments,
    training_args: Qwen2VLGRPOConfig,
    model_args: ModelConfig,
    prepared: dict[str, Any] | None = None,
) -> Qwen2VLGRPOTrainer:
    """The trainer that a parsed recipe describes; `prepared` is what `prepare` returned, if it was called before."""
    prepared = prepared or prepare(script_args, training_args, model_args)
    # TRL loads the reference model by these
    training_args.model_init_kwargs = {**(training_args.model_init_kwargs or {}), "revision": model_args.model_revision}
    model = load_model_from_args(model_args)
    freeze(model, script_args)
    check_saved_modules(model, prepared["peft_config"])
    trainer = choose_trainer(script_args.trainer)(model=model, args=training_args, **prepared)
    trainer.add_callback(AskBlind(trainer))
    if trainer.is_world_process_zero() and (line := unused_vllm(training_args, model_args)):
        print(line)
    return trainer


COMMAND = Command("grpo", (GRPOScriptArguments, Qwen2VLGRPOConfig, ModelConfig), prepare, build_trainer)

if __name__ == "__main__":
    run_command(COMMAND)
