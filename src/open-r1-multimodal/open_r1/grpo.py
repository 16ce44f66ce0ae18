"""Train with GRPO: a recipe and a prepared dataset in, checkpoints and trajectories out.

Launch it with `run_grpo_SAT.sh`, or by hand: `accelerate launch open_r1/grpo.py --config configs/grpo_sat.yaml
--dataset_name SAT_train_15000.json`. It leaves `output_dir` with Hugging Face checkpoints and `trajectories/`.
"""

from dataclasses import dataclass, field

from trl import ModelConfig

from open_r1.data import DataArguments, load_datasets_from_args, load_processor_from_args, opens_think
from open_r1.entry import run
from open_r1.modeling import FreezeArguments, freeze, get_adapter_config, load_model_from_args
from open_r1.rewards import accuracy_reward, check_gold, get_reward_funcs
from open_r1.trainer import Qwen2VLGRPOConfig, Qwen2VLGRPOTrainer


@dataclass
class GRPOScriptArguments(FreezeArguments, DataArguments):
    """What is asked, what is rewarded and what is trained."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={
            "help": "Rewards by registry name (accuracy, format, length) or as module:function; "
            "reward_weights weighs them."
        },
    )


def build_trainer(
    script_args: GRPOScriptArguments, training_args: Qwen2VLGRPOConfig, model_args: ModelConfig
) -> Qwen2VLGRPOTrainer:
    """The trainer that a parsed recipe describes."""
    template_kwargs = training_args.chat_template_kwargs or {}
    processor = load_processor_from_args(model_args, script_args)
    reward_funcs = get_reward_funcs(script_args.reward_funcs, think_prefilled=opens_think(processor, **template_kwargs))
    checks = [check_gold] if accuracy_reward in reward_funcs else []
    train_dataset, eval_dataset = load_datasets_from_args(script_args, processor, template_kwargs, checks)
    model = load_model_from_args(model_args)
    freeze(model, script_args.freeze_vision, script_args.freeze_llm, script_args.freeze_merger)
    return Qwen2VLGRPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=get_adapter_config(model_args, script_args),
    )


if __name__ == "__main__":
    run("grpo", (GRPOScriptArguments, Qwen2VLGRPOConfig, ModelConfig), build_trainer)
