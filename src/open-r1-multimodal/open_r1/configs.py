"""The settings that a recipe can hold beside TRL's own, and how they go together."""

import importlib.util
import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from trl import GRPOConfig, ModelConfig, SFTConfig

from open_r1.base.errors import Mistake
from open_r1.settings.generation import reshaping
from open_r1.settings.options import check_options
from open_r1.settings.recipes import count_processes

# TRL's own, which it checks in the first step
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


@dataclass
class DataArguments:
    """What is asked, and how it looks to the model; names of TRL's `ScriptArguments` mean the same."""

    dataset_name: str = HfArg(
        help="What to train on: a JSON, JSON Lines, CSV or parquet file, a folder that datasets "
        "reads or has saved, a name on the Hub, or a YAML file that mixes several of these "
        "(open_r1/tasks/mixture.py).",
    )
    task: str | None = HfArg(
        default=None,
        help="pretext: dataset_name and eval_dataset_name are folders of pictures without labels, and questions are "
        "made about them; a tenth of a folder's pictures is held out (open_r1/tasks/pretext.py). None: they hold "
        "questions.",
    )
    dataset_config: str | None = HfArg(
        default=None, help="Configuration of a folder or a Hub data set that has several."
    )
    dataset_train_split: str = HfArg(
        default="train",
        help="Split of a folder or a Hub data set to train on.",
    )
    dataset_test_split: str = HfArg(
        default="test", help="Split of eval_dataset_name, when it is a folder or on the Hub."
    )
    eval_dataset_name: str | None = HfArg(
        default=None,
        help="Held-out examples, in any form that dataset_name may have. The model answers them whenever a checkpoint "
        "is saved, unless eval_strategy and eval_steps say otherwise.",
    )
    question_column: str | None = HfArg(
        default=None,
        help="Field with the question. None: messages, conversations, prompt, question or problem.",
    )
    answer_column: str | None = HfArg(
        default=None, help="Field with the answer. None: that of the dialogue, solution or answer."
    )
    image_column: str | None = HfArg(
        default=None, help="Field with the image or the list of images. None: images or image."
    )
    options_column: str | None = HfArg(
        default=None,
        help="Field with the options, which are then written after the question as in SAT.",
    )
    drop_unshown: bool = HfArg(
        default=False,
        help="Train on rows with parts that their prompt does not show (videos, tools, a system message that the chat "
        "template leaves out), without these parts, which are named and counted. By default such rows are refused.",
    )
    chat_template: str | None = HfArg(
        default=None,
        help="Name in configs/chat_templates (base, instruct) or file of the prompt; it is saved "
        "with every checkpoint. None keeps the checkpoint's own.",
    )
    max_prompt_length: int | None = HfArg(
        default=1024,
        help="Examples with a longer prompt (tokens, images included) are left out; none is truncated.",
    )
    max_pixels: int | None = HfArg(
        default=401408,
        help="Larger images are shrunk to this area in pixels.",
    )
    min_pixels: int | None = HfArg(
        default=3136,
        help="Smaller images are enlarged to this area in pixels.",
    )


@dataclass
class FreezeArguments:
    """What kind of model it is, and what of it is not trained."""

    freeze_vision: bool = HfArg(default=False, help="Do not train the vision tower.")
    freeze_llm: bool = HfArg(default=False, help="Do not train the language model.")
    freeze_merger: bool | None = HfArg(
        default=None,
        help="Do not train the merger, the layers between vision tower and language model. "
        "None: as freeze_vision says.",
    )
    family: str | None = HfArg(
        default=None,
        help="Your own model family, as module:NAME (docs/families.md). None: one of this project's.",
    )


@dataclass
class GRPOScriptArguments(FreezeArguments, DataArguments):
    """What is asked, what is rewarded and what is trained."""

    trainer: str | None = HfArg(
        default=None,
        help="Your own subclass of Qwen2VLGRPOTrainer, as module:class. None: Qwen2VLGRPOTrainer.",
    )

    reward_funcs: list[str] = HfArg(
        default_factory=lambda: ["accuracy", "format"],
        help="Rewards by registry name (accuracy, bare_accuracy, consistency, format, length, "
        "order_consistency, repetition, soft_overlong; docs/rewards.md) or as "
        "module:function, with parameters as in 'length(target_length=500)'; reward_weights weighs them.",
    )
    rotate_options: bool = HfArg(
        default=False,
        help="Ask every question in two orders of its options: as it is, and with its first option last. The reward "
        "order_consistency needs this; an epoch is twice as long. The question must contain its options as "
        "in SAT: 'a, b or c'.",
    )


@dataclass
class SignalArguments:
    """Which prompts are asked: a group whose completions all earn the same teaches nothing."""

    min_signal_groups: float = HfArg(
        default=0.0,
        help="Share of a rollout's groups that must have signal, which means that their completions earn different "
        "rewards. While fewer have it, new prompts are sampled, as many as are likely to be enough, and their groups "
        "with signal replace those without; the step keeps its number of completions. DAPO asks for all groups (1.0), "
        "GPG for 0.4. 0 takes every group as it was sampled.",
    )
    max_refills: int = HfArg(
        default=3,
        help="The most refills of a rollout for min_signal_groups; after them it is used as it is.",
    )
    skip_solved: float = HfArg(
        default=0.0,
        help="Probability that a prompt whose completions so far all succeeded (first reward above "
        "0.5) is replaced by another. With 1 it is never asked again.",
    )
    skip_hopeless: float = HfArg(
        default=0.0,
        help="Probability that a prompt whose completions so far all failed is replaced by another. With 1 it is never "
        "asked again.",
    )
    rescale_by_signal: bool = HfArg(
        default=False,
        help="Multiply advantages by groups / groups with signal of a rollout, so that groups "
        "without signal do not shrink the step (the alpha of GPG). Trajectories have the advantages "
        "before this factor.",
    )

    @property
    def signal_settings(self) -> list[str]:
        """Those that change something; max_refills alone does not."""
        names = ("min_signal_groups", "skip_solved", "skip_hopeless", "rescale_by_signal")
        return [name for name in names if getattr(self, name)]


RESUME = (
    "auto: go on from the newest whole checkpoint in output_dir, or start anew if there is none. "
    "none: start anew; output_dir must hold no run. A checkpoint's folder: go on from there, even if "
    "data and settings have changed since (changes are printed, and noted in run.json)."
)


@dataclass
class Qwen2VLGRPOConfig(SignalArguments, GRPOConfig):
    """TRL's `GRPOConfig` and what this trainer adds to it."""

    resume_from_checkpoint: str | None = HfArg(default=None, help=RESUME)

    completions_per_step: int | None = HfArg(
        default=None,
        help="Completions in one optimiser step over all processes. When set, "
        "gradient_accumulation_steps follows from it, per_device_train_batch_size and the "
        "number of processes, so that a recipe means the same on any number of GPUs. An "
        "explicit gradient_accumulation_steps above 1 overrides it.",
    )

    shared_prefix: bool = HfArg(
        default=True,
        help="Encode, prefill and score the prompt of a group once instead of once a completion. "
        "The numbers are the same; false uses TRL's way.",
    )

    advantage: str | None = HfArg(
        default=None,
        help="How rewards become advantages: leave_one_out, or your own function as "
        "module:function, with the signature of those in open_r1/trainer/advantages.py. None: as "
        "in TRL, relative to the group, by scale_rewards and multi_objective_aggregation.",
    )
    papo_coef: float = HfArg(
        default=0.0,
        help="Weight of PAPO's perception term, which rewards the policy for other token probabilities "
        "when its image is masked; it costs one more forward pass over the rollout. 0: none.",
    )
    papo_mask_ratio: float = HfArg(
        default=0.6,
        help="Share of an image's patches that are black in PAPO's term.",
    )
    teacher_model_name_or_path: str | None = HfArg(
        default=None,
        help="A larger model of the policy's family and tokenizer, which scores its completions: "
        "the loss draws the policy towards it (on-policy distillation). None: no teacher.",
    )
    distill_coef: float = HfArg(
        default=1.0,
        help="Weight of the divergence KL(policy || teacher) per token, which is added to the loss of the rewards. "
        "With reward_weights of 0 the policy learns from the teacher alone.",
    )
    distill_whole_vocabulary: bool = HfArg(
        default=False,
        help="true: compute the divergence over the whole vocabulary, as TRL's DistillationTrainer does; false: "
        "estimate it from the sampled token.",
    )
    rollout_noise: float = HfArg(
        default=0.0,
        help="Sample the second half of each group from noisy images (NoisyRollout). The value is the step of "
        "diffusion, of 1000, at which the noise starts; it falls to 0 over the run. All completions are scored with "
        "the clean image. 0: no noise.",
    )

    def __post_init__(self):
        if self.loss_type not in LOSS_TYPES:
            raise Mistake(f"loss_type: {self.loss_type!r} is none of {', '.join(LOSS_TYPES)}")
        self.resolve_accumulation()
        self.check_group_size()
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"  # transformers would take the loss, which says nothing about answers
        super().__post_init__()

    @property
    def world_size(self) -> int:
        """The processes of the run; before a launch, those that are planned."""
        return max(count_processes(), super().world_size)

    def resolve_accumulation(self) -> None:
        """Set `gradient_accumulation_steps` from `completions_per_step`; see its help."""
        if not self.completions_per_step or self.gradient_accumulation_steps > 1:
            return
        batch, processes = self.per_device_train_batch_size, count_processes()
        per_pass = batch * processes
        if self.completions_per_step % per_pass:
            below = self.completions_per_step // per_pass * per_pass
            fitting = [str(size) for size in (below, below + per_pass) if size]
            raise Mistake(
                f"completions_per_step {self.completions_per_step} is not a multiple of "
                f"{per_pass} (per_device_train_batch_size {batch} x {processes} processes); "
                f"{' and '.join(fitting)} would fit"
            )
        self.gradient_accumulation_steps = self.completions_per_step // per_pass

    def check_group_size(self) -> None:
        """TRL's check, naming the sizes that fit."""
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        size = self.generation_batch_size or self.per_device_train_batch_size * count_processes() * steps
        if self.num_generations < 2 or size % self.num_generations:
            fitting = ", ".join(str(group) for group in range(2, size + 1) if size % group == 0)
            raise Mistake(
                f"num_generations {self.num_generations}: a rollout of {size} completions "
                "(per_device_train_batch_size x processes x accumulation) holds groups of "
                f"{fitting or 'no size'}"
            )


def longest_row(script_args: GRPOScriptArguments, args: GRPOConfig) -> int | None:
    """Tokens of the longest prompt and completion, for which an engine keeps room; None: no bound."""
    if args.vllm_max_model_length is not None or not script_args.max_prompt_length:
        return args.vllm_max_model_length
    return script_args.max_prompt_length + args.max_completion_length


def check_rotation(script_args: GRPOScriptArguments, args: Qwen2VLGRPOConfig) -> None:
    """Raise Mistake where the two orders of a question would not come before one process."""
    if not script_args.rotate_options:
        if "order_consistency" in script_args.reward_funcs:
            raise Mistake("reward_funcs: order_consistency compares two orders of options; add rotate_options: true")
        return
    chosen = [name for name in args.signal_settings if name != "rescale_by_signal"]
    if chosen:
        raise Mistake(f"rotate_options: {chosen[0]} asks one order of a question without the other; leave one out")
    batch, pair = args.per_device_train_batch_size * args.steps_per_generation, 2 * args.num_generations
    if batch % pair:
        raise Mistake(
            "rotate_options: a process asks both orders of a question, so that its rollout of "
            f"{batch} completions (per_device_train_batch_size x accumulation) must be a multiple "
            f"of {pair}, 2 x num_generations"
        )


def check_cispo(args: GRPOConfig) -> None:
    """Raise Mistake where CISPO's bound, TRL's default among them, would cut the ratio of every token."""
    bound = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo" and bound < 1:
        raise Mistake(
            f"epsilon_high: with loss_type cispo it is the largest ratio itself, not its distance from 1, and {bound} "
            "would be the weight of all tokens; configs/overlays/cispo.yaml has 5.0"
        )


def check_bfloat16(args: TrainingArguments, model_args: ModelConfig) -> None:
    """Raise Mistake where bfloat16 is asked of a GPU older than Ampere (compute capability 8.0).

    transformers does not refuse it: torch emulates bfloat16 there, so nothing fails, but every step is very slow.
    """
    options = {"bf16": args.bf16, "dtype": model_args.dtype == "bfloat16"}
    asked = [option for option, is_asked in options.items() if is_asked]
    if args.use_cpu or not asked or not torch.cuda.is_available():
        return
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise Mistake(
            f"{', '.join(asked)}: {torch.cuda.get_device_name()} (compute capability "
            f"{major}.{minor}) has no bfloat16; add --bf16 false --dtype float32, or take "
            "CONFIG=configs/smolvlm_256m.yaml, which is in float32"
        )


def check_attention(model_args: ModelConfig) -> None:
    """Raise Mistake where flash-attn is asked for by name and not installed."""
    if model_args.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise Mistake(
            "attn_implementation: flash_attention_2 needs flash-attn, which is not installed; "
            "auto or sdpa do without, and FLASH_ATTN=build bash setup.sh compiles it on a machine "
            "with a GPU"
        )


def need_vllm(option: str) -> None:
    """Raise Mistake, which names the option that asks for it, where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise Mistake(
            f"{option}: vLLM is not installed; setup.sh installs it on a machine with an NVIDIA "
            "GPU, and without this option transformers generates"
        )


def unused_vllm(args: GRPOConfig, model_args: ModelConfig) -> str | None:
    """A line about what a run on a GPU goes without when vLLM is installed and not asked for."""
    has_gpu = torch.cuda.is_available() and not args.use_cpu
    if args.use_vllm or model_args.load_in_4bit or not has_gpu or importlib.util.find_spec("vllm") is None:
        return None
    return (
        "vLLM is installed and not used: of a 2B model on 8 GPUs decoding by transformers is "
        "about 95 % of a step of 9 to 11 s, and with configs/overlays/vllm.yaml in CONFIG a step "
        "takes 2 to 3 s (computed, not measured)"
    )


def check_shared_prefix(args: GRPOConfig, shared_prefix: bool) -> None:
    """Raise Mistake where a setting that needs the shared prefix goes without it."""
    signal = args.signal_settings if isinstance(args, SignalArguments) else []
    for name in (*signal, "advantage", "papo_coef", "rollout_noise", "teacher_model_name_or_path"):
        if getattr(args, name, None) and not shared_prefix:
            raise Mistake(
                f"{name}: needs the shared prefix, which a text model, tools, a rollout_func and "
                "shared_prefix false go without; leave it out"
            )


def check_signal(args: GRPOConfig, streams: bool) -> None:
    """Raise Mistake where the settings of `SignalArguments` cannot do what they say."""
    settings = args.signal_settings if isinstance(args, SignalArguments) else []
    if not settings:
        return
    name, batch = settings[0], args.per_device_train_batch_size * args.steps_per_generation
    if streams:
        raise Mistake(f"{name}: prompts are drawn by their number, which a train_dataset that streams has not")
    if args.remove_unused_columns:
        raise Mistake(f"{name}: the number of a row is a column; remove_unused_columns: false keeps it")
    if batch % args.num_generations:
        raise Mistake(
            f"{name}: groups are exchanged within a process, and its rollout of {batch} "
            "completions (per_device_train_batch_size x accumulation) does not hold whole ones "
            f"of num_generations {args.num_generations}"
        )


def check_settings(args: GRPOConfig, shared_prefix: bool, streams: bool = False) -> None:
    """See that settings go with each other, and with what is installed.

    Args:
        args: of the run.
        shared_prefix: whether it shares prefixes.
        streams: whether its training set has no length and no rows to pick.

    Raises:
        Mistake: for the first that does not.
    """
    check_options(args)
    if args.use_vllm and args.vllm_mode == "colocate" and not shared_prefix:
        raise Mistake(
            "shared_prefix: with use_vllm it must be true: TRL hands a colocated engine prompts "
            "whose image tokens are written out, and the engine writes them out again"
        )
    if args.use_vllm:
        if args.vllm_importance_sampling_correction and (name := reshaping(vars(args))):
            raise Mistake(
                f"{name}: vLLM's log-probabilities are those behind it, the policy's are not, and the correction would "
                "give long completions a weight near 0; leave it out, or add --vllm_importance_sampling_correction "
                "false"
            )
        need_vllm("use_vllm")
    check_shared_prefix(args, shared_prefix)
    check_signal(args, streams)
    if shared_prefix and not args.use_vllm and (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        raise Mistake(
            "fsdp: processes decode different numbers of tokens, and would wait for each other for ever; take "
            "ACCELERATE_CONFIG=zero3, or add --shared_prefix false"
        )
    unshared = {
        "torch_compile": "packs a row of another shape for every micro-batch, each compiled anew",
        "cache_implementation": "has a cache of its own",
    }
    for name, reason in unshared.items():
        if shared_prefix and getattr(args, name):
            remedy = "leave it out, or add --shared_prefix false"
            raise Mistake(f"{name}: the shared prefix {reason}; {remedy}")
    if shared_prefix and not args.ds3_gather_for_generation:
        raise Mistake("ds3_gather_for_generation: the shared prefix needs true; or add --shared_prefix false")
    if getattr(args, "rollout_noise", 0) and args.use_vllm:
        if args.vllm_mode == "server":
            raise Mistake("rollout_noise: a vLLM server is asked once a group, for one image; add --vllm_mode colocate")
        if args.vllm_importance_sampling_correction:
            raise Mistake(
                "rollout_noise: vLLM's log-probabilities are those of the noisy image, and no "
                "measure of the engine; add --vllm_importance_sampling_correction false"
            )


@dataclass
class SFTScriptArguments(FreezeArguments, DataArguments):
    """What is asked and what is trained."""

    max_answer_length: int | None = HfArg(
        default=2048, help="Examples with a longer answer (tokens) are left out; none is truncated."
    )


@dataclass
class Qwen2VLSFTConfig(SFTConfig):
    """TRL's `SFTConfig`, with the prompt of an answer without reasoning and nothing truncated."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    resume_from_checkpoint: str | None = HfArg(default=None, help=RESUME)

    chat_template_kwargs: dict | str | None = HfArg(
        default_factory=lambda: {"style": "direct"},
        help="For the chat template; `direct` asks for the answer alone, as evaluation does.",
    )
    max_length: int | None = HfArg(
        default=None,
        help="Unused: a cut would lose image tokens. See max_prompt_length and max_answer_length.",
    )
    remove_unused_columns: bool = HfArg(
        default=False, help="Unused: the collator reads the columns of a prepared dataset."
    )
