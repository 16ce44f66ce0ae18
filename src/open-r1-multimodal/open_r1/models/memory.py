"""Counts the memory that a recipe needs on each GPU, from the model's configuration alone.

The model is built without its numbers (torch's `meta` device), so a count takes a second and no
download of weights. Counted are weights, gradients, optimiser, reference model, teacher, what autograd keeps
for one micro-batch, the LM head's tiles, the rollout's cache, and of a known card the share that
vLLM takes; not counted are the CUDA context (about 0.5 GB) and the allocator's fragments.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)
from trl import GRPOConfig, ModelConfig
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCAB_CHUNK_SIZE

from open_r1.base.errors import Mistake
from open_r1.configs import FreezeArguments
from open_r1.models.families import family_of, find_family
from open_r1.models.loading import load_config, resolve_dtype
from open_r1.models.trained import freeze, get_adapter_config
from open_r1.settings.processes import Launch

FP32 = 4  # bytes
ANSWER_TOKENS = 32  # of an SFT example; no recipe bounds them
# DeepSpeed's defaults, in parameters: what is reduced at a time, and what ZeRO-3 keeps gathered
REDUCE_BUCKET = 500_000_000
ZERO3_LIVE = 1_000_000_000
ATTENTION = "counted_attention"


@dataclass(frozen=True)
class Load:
    """What one GPU works on at a time.

    Attributes:
        prompts: in a micro-batch, each once: the completions of a group share theirs.
        prompt_tokens, completion_tokens: the longest, image tokens included.
        patches: of a prompt's images.
        completions: in a micro-batch; SFT has one answer a prompt.
        rollout: completions that are sampled here at once; 0 for SFT, and where vLLM samples.
    """

    prompts: int
    prompt_tokens: int
    completion_tokens: int
    patches: int
    completions: int
    rollout: int = 0

    @property
    def packed_tokens(self) -> int:
        """The length of the micro-batch as one row."""
        return self.prompts * self.prompt_tokens + self.completions * self.completion_tokens


@dataclass(frozen=True)
class MemoryCount:
    """Bytes on one GPU. `base` lies there all the time, the others for a phase of a step."""

    base: dict[str, float]
    rollout: dict[str, float]
    backward: dict[str, float]
    update: dict[str, float]

    @property
    def peak(self) -> float:
        """The most at any time, in bytes."""
        phases = (self.rollout, self.backward, self.update)
        return sum(self.base.values()) + max(sum(phase.values()) for phase in phases)

    def with_vllm(self, share: float, card: float, sleeps: bool) -> "MemoryCount":
        """The same with the share that vLLM takes of a card of so many bytes.

        It keeps weights and cache all the time, or with TRL's `vllm_enable_sleep_mode` during a rollout.
        """
        engine = {"vLLM": share * card}
        if sleeps:
            return replace(self, rollout=self.rollout | engine)
        return replace(self, base=self.base | engine)

    def largest_share(self, card: float, sleeps: bool) -> float:
        """The largest share of a card, in hundredths, that is left for vLLM; 0 where nothing is.

        With 72 GB all the time and 8 GB for a phase, on a card of 100 GB: 0.2, or 0.28 if it sleeps.
        """
        beside = sum(self.base.values()) + sum(self.rollout.values()) if sleeps else self.peak
        return max(math.floor(100 * (card - beside) / card) / 100, 0.0) if self.peak <= card else 0.0


class _SavedAttention(torch.autograd.Function):
    """What fused attention keeps for the backward pass: inputs, output, and a number a query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return _SavedAttention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def build_model(
    config: PreTrainedConfig, model_args: ModelConfig, freezing: FreezeArguments, launch: Launch
) -> PreTrainedModel:
    """The policy as it is trained (frozen, with its adapter, in its dtype), without numbers."""
    dtype = dtype_of(config, model_args)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
        freeze(model, freezing)
        if model_args.use_peft:
            model = get_peft_model(model, get_adapter_config(model_args, freezing, family_of(model)))
    if launch.zero_stage or model_args.load_in_4bit:
        model.to(dtype)  # PEFT makes adapters float32; DeepSpeed, and TRL for QLoRA, bring them back
    return model


def dtype_of(config: PreTrainedConfig, model_args: ModelConfig) -> torch.dtype:
    """What a recipe loads a model's weights in."""
    dtype = resolve_dtype(model_args.dtype)
    return (config.dtype or torch.float32) if dtype == "auto" else dtype


def weight_bytes(model: nn.Module, model_args: ModelConfig) -> float:
    """Bytes of the weights; bitsandbytes quantises all linear layers but the head and adapters."""
    quantised = set()
    if model_args.load_in_4bit or model_args.load_in_8bit:
        quantised = {
            module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in name and not name.endswith("lm_head")
        }
    # a scale for 64 weights, in float32, or in 8 bits with a float32 for 256 of them
    scale = (1 + FP32 / 256) / 64 if model_args.use_bnb_nested_quant else FP32 / 64
    packed = 0.5 + scale if model_args.load_in_4bit else 1
    return sum(p.numel() * (packed if p in quantised else p.element_size()) for p in model.parameters())


def teacher_bytes(args: TrainingArguments, model_args: ModelConfig) -> float:
    """Bytes of the weights of a run's teacher, as `Qwen2VLGRPOTrainer` loads it; 0 without one."""
    setting = "teacher_model_name_or_path"
    if not (name := getattr(args, setting, None)):
        return 0
    config = load_config(name, settings=setting)
    with torch.device("meta"):
        count = AutoModelForImageTextToText.from_config(config).num_parameters()
    return count * (2 if args.bf16 or args.fp16 else dtype_of(config, model_args).itemsize)


@contextmanager
def _count_saved(model: nn.Module) -> Iterator[Counter[str]]:
    """In the block, add up the bytes that autograd keeps (each storage once), by kind of layer.

    A kind is `block` of the vision tower, or of the decoder what its configuration calls the layer.
    """
    saved: Counter[str] = Counter()
    storages = {p.untyped_storage()._cdata: p for p in model.parameters()}  # kept alive, so that no address recurs
    current = [""]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in storages:
            storages[storage._cdata] = storage
            saved[current[0]] += storage.nbytes()
        return tensor

    handles = []
    for layer, kind in kinds_of_layers(model):
        handles.append(layer.register_forward_pre_hook(lambda *_, kind=kind: current.__setitem__(0, kind)))
        handles.append(layer.register_forward_hook(lambda *_: current.__setitem__(0, "")))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
    for handle in handles:
        handle.remove()


def kinds_of_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The vision tower's layers and the decoder's, each with its kind; see `_count_saved`."""
    text = model.get_decoder()
    blocks = [(block, "block") for block in family_of(model).vision_blocks(model)]
    kinds = getattr(text.config, "layer_types", None) or ["layer"] * len(text.layers)
    return blocks + list(zip(text.layers, kinds, strict=True))


def activation_bytes(model: nn.Module, load: Load, gradient_checkpointing: bool) -> float:
    """What autograd keeps of one micro-batch's forward pass, found by running it without numbers.

    With checkpointing: every layer's input, and all of the one layer that is being computed again, of the kind that
    keeps most. On top come the gradients that are alive in the backward pass of an MLP: three of its width. Of a gated
    delta net it is what transformers' torch kernels keep, over the row as one sequence; fla's keep less. These work in
    chunks of 64 tokens, so that completions of far fewer keep up to half as much again.
    """
    family, text = family_of(model), model.get_decoder()
    dtype = next(model.parameters()).dtype
    tokens, blocks = load.packed_tokens, len(family.vision_blocks(model))
    with torch.device("meta"), _count_saved(model) as saved:
        states = family.run_tower(model, load.prompts * load.patches, dtype)  # (patches, width)
        # Whatever is trained in the vision tower or the adapter, the gradient goes through the whole decoder.
        embedded = torch.empty(1, tokens, text.config.hidden_size, dtype=dtype, requires_grad=True)
        # a mask that is whole is taken as it is: to make one, transformers would look at positions without numbers
        text(inputs_embeds=embedded, attention_mask=torch.empty(1, 1, 1, 1), use_cache=False)
    flowing = 3 * tokens * text.config.intermediate_size * embedded.element_size()
    if not gradient_checkpointing:
        return saved.total() + flowing
    inputs = len(text.layers) * embedded.nbytes + family.trains_vision(model) * blocks * states.nbytes
    number = Counter(kind for _, kind in kinds_of_layers(model))
    return saved[""] + inputs + flowing + max(saved[kind] / number[kind] for kind in number)


def head_bytes(model: PreTrainedModel, load: Load, is_cpu: bool) -> float:
    """TRL's fused LM head: a tile of logits, and in the backward pass the gradients in float32."""
    weight = model.get_output_embeddings().weight  # (V, H)
    # On a GPU only the completions' positions are projected, and kernels work inside the tile; on a CPU all are,
    # half a dozen copies of a tile in float32 are alive at once, and memory that is not written costs nothing.
    scored = load.packed_tokens if is_cpu else load.completions * load.completion_tokens
    rows, columns = min(scored, TOKEN_CHUNK_SIZE), min(VOCAB_CHUNK_SIZE, weight.shape[0])
    tile = rows * (columns * (weight.element_size() + 6 * FP32) if is_cpu else VOCAB_CHUNK_SIZE * weight.element_size())
    return tile + FP32 * (scored * weight.shape[1] + weight.requires_grad * weight.numel())


def divergence_bytes(model: PreTrainedModel, load: Load) -> float:
    """TRL's divergence over the vocabulary, in float32: a tile of either model's logits, and the head's gradient."""
    weight = model.get_output_embeddings().weight  # (V, H)
    rows = min(load.completions * load.completion_tokens, TOKEN_CHUNK_SIZE)
    return FP32 * (2 * rows * VOCAB_CHUNK_SIZE + weight.requires_grad * weight.numel())


def copy_bytes(model: nn.Module, gradient_checkpointing: bool) -> float:
    """Weights of linear layers as autocast rounds them to 16 bits.

    It keeps those that are trained for the rest of a forward pass, which then holds them all. What is
    frozen it rounds at each use, and without checkpointing autograd keeps that.
    """
    weights = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    weights.discard(model.get_output_embeddings().weight)  # the fused head takes slices of it
    kept = (p for p in weights if p.requires_grad or not gradient_checkpointing)
    return 2 * sum(p.numel() for p in kept if p.dtype == torch.float32)


def rollout_bytes(model: PreTrainedModel, load: Load) -> float:
    """The cache of all completions at full length, and the scores of the next tokens in float32."""
    config = model.config.get_text_config()
    size = model.get_output_embeddings().weight.element_size()
    a_token, a_completion = cache_bytes(config, size)
    tokens = load.prompt_tokens + load.completion_tokens
    return load.rollout * (a_token * tokens + a_completion + config.vocab_size * (size + 2 * FP32))


def cache_bytes(config: PreTrainedConfig, size: int) -> tuple[int, int]:
    """Bytes of a decoder's cache: for each token, and for a completion of any length.

    A layer that attends keeps keys and values of each token, in numbers of `size` bytes. A gated
    delta net keeps the last inputs of its convolution, and its state in float32.
    """
    kinds = getattr(config, "layer_types", None) or []
    recurrent = kinds.count("linear_attention")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * (config.num_hidden_layers - recurrent) * config.num_key_value_heads * head_dim * size
    if not recurrent:
        return a_token, 0
    values = config.linear_num_value_heads * config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * config.linear_key_head_dim + values
    state = values * config.linear_key_head_dim
    return a_token, recurrent * (channels * config.linear_conv_kernel_dim * size + state * FP32)


def count_memory(
    config: PreTrainedConfig,
    model_args: ModelConfig,
    freezing: FreezeArguments,
    load: Load,
    launch: Launch,
    has_reference: bool = False,
    teacher: float = 0,
    over_vocabulary: bool = False,
    gradient_checkpointing: bool = True,
    is_cpu: bool = False,
    has_autocast: bool = False,
) -> MemoryCount:
    """Count a training step's memory on one GPU.

    Args:
        config: of the model; see `load_config`.
        model_args: dtype, adapter, quantisation.
        has_reference: whether KL takes a model of its own; with an adapter it never does.
        teacher: bytes of its weights; see `teacher_bytes`.
        over_vocabulary: whether the divergence from it is computed over the whole vocabulary.
        is_cpu: count the CPU's way to run the LM head.
        has_autocast: weights in float32 are rounded to 16 bits where they are used.
    """
    model = build_model(config, model_args, freezing, launch)
    weights = weight_bytes(model, model_args)
    trained = [p for p in model.parameters() if p.requires_grad]
    elements = sum(p.numel() for p in trained)
    gradients = sum(p.nbytes for p in trained)
    has_zero = launch.zero_stage > 0
    # gradients summed over micro-batches: DeepSpeed is told to do it in float32 (running.entry.accumulate_in_float32)
    summed = FP32 * elements if has_zero else gradients
    base = {
        "weights": launch.share(weights, from_stage=3),
        # Adam's two moments; DeepSpeed keeps them, and a master copy of the weights, in float32
        "optimiser": launch.share(3 * FP32 * elements if has_zero else 2 * gradients, from_stage=1),
    }
    if has_reference and not model_args.use_peft:
        base["reference model"] = launch.share(weights, from_stage=3)
    if teacher:
        base["teacher"] = launch.share(teacher, from_stage=3)
    gathered = {}
    if launch.zero_stage == 3:
        size = weights / sum(p.numel() for p in model.parameters())
        gathered = {"gathered weights": min(weights, ZERO3_LIVE * size)}
    backward = {
        "gradients": launch.share(summed, from_stage=2),
        "activations": activation_bytes(model, load, gradient_checkpointing),
        "LM head": head_bytes(model, load, is_cpu),
        **gathered,
    }
    if over_vocabulary:
        backward["divergence"] = divergence_bytes(model, load)
    if has_autocast:
        backward["16-bit copies"] = copy_bytes(model, gradient_checkpointing)
    update = {"gradients": backward["gradients"]}
    if has_zero:
        backward["reduce bucket"] = REDUCE_BUCKET * gradients / elements
        # ZeRO-2 sums the gradients of a 16-bit model up in what its optimiser takes; in all else it is handed a copy.
        if launch.zero_stage == 3 or gradients == summed:
            update["gradients, flat"] = launch.share(summed, from_stage=1)
    rollout = {}
    if load.rollout:
        rollout = {"cache and scores": rollout_bytes(model, load)}
        if launch.zero_stage == 3:
            rollout["gathered weights"] = weights  # TRL gathers all of the model to sample from it
    return MemoryCount(base, rollout, backward, update)


def count_run(
    script_args: Any, args: TrainingArguments, model_args: ModelConfig, launch: Launch, is_cpu: bool = False
) -> MemoryCount:
    """Count a step of GRPO or SFT at the limits of its settings, without vLLM; see `with_vllm`.

    Args:
        script_args, args, model_args: of the run.
        launch: how; `args` were read for as many processes.
        is_cpu: see `count_memory`.

    Raises:
        Mistake: no longest prompt is set, or what `load_config` raises.
    """
    if script_args.max_prompt_length is None:
        raise Mistake("max_prompt_length: memory is counted for the longest prompt; set it")
    config = load_config(model_args.model_name_or_path, model_args.model_revision)
    image = find_family(config.model_type).count_patches(config, script_args.max_pixels or 0)
    batch, is_grpo = args.per_device_train_batch_size, isinstance(args, GRPOConfig)
    load = Load(batch, script_args.max_prompt_length, ANSWER_TOKENS, image, batch)
    if is_grpo:
        rollout = 0 if args.use_vllm else batch * args.steps_per_generation
        prompts = -(-batch // args.num_generations)
        load = Load(prompts, script_args.max_prompt_length, args.max_completion_length, image, batch, rollout)
    teacher = teacher_bytes(args, model_args)
    return count_memory(
        config,
        model_args,
        script_args,
        load,
        launch,
        has_reference=is_grpo and args.beta > 0,
        teacher=teacher,
        over_vocabulary=teacher > 0 and args.distill_whole_vocabulary,
        gradient_checkpointing=args.gradient_checkpointing,
        is_cpu=is_cpu,
        has_autocast=(args.bf16 or args.fp16) and not launch.zero_stage,
    )


def free_memory(on_cpu: bool) -> int:
    """Bytes that can be had now on this machine, or on its first card."""
    return psutil.virtual_memory().available if on_cpu else torch.cuda.mem_get_info()[0]
