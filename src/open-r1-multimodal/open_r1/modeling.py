"""Load a policy and its processor the way a recipe says: architecture, dtype, attention, pixels, what trains."""

import importlib.util
import logging

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from trl import ModelConfig, get_quantization_config

from open_r1.prompts import load_chat_template

logger = logging.getLogger(__name__)

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Qwen's two ends of text: a base model writes the first, a chat model the second. Both end a completion.
END_TOKENS = ("<|endoftext|>", "<|im_end|>")
# Sampling one of these would announce an image that is not there and break the next forward pass.
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def resolve_dtype(name: str | None) -> torch.dtype | str:
    """`"bfloat16"`, `"float16"`, `"float32"` -> the torch dtype; `"auto"` and None keep the checkpoint's."""
    return "auto" if name in (None, "auto") else getattr(torch, name)


def resolve_attn_implementation(name: str | None, dtype: torch.dtype | str) -> str:
    """`"auto"` and None -> `"flash_attention_2"` where it is usable, else `"sdpa"`; other names pass unchanged.

    flash-attn is usable with its package, an NVIDIA GPU of compute capability 8.0 or more, and 16-bit weights.
    """
    if name not in (None, "auto"):
        return name
    usable = (
        importlib.util.find_spec("flash_attn") is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
    )
    return "flash_attention_2" if usable else "sdpa"


def load_model(
    model_name_or_path: str,
    dtype: str | None = "bfloat16",
    attn_implementation: str | None = "auto",
    revision: str = "main",
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Load a vision-language policy by the model type in its configuration.

    Args:
        model_name_or_path: Hub name or folder.
        dtype: of the weights; see `resolve_dtype`. With plain AdamW bfloat16 weights cannot hold updates of
            1e-6; under DeepSpeed the optimizer keeps float32 master weights.
        attn_implementation: see `resolve_attn_implementation`.
        revision: branch, tag or commit on the Hub.
        quantization_config: for QLoRA.

    Raises:
        ValueError: for a model type that this project was not tested with.
    """
    config = AutoConfig.from_pretrained(model_name_or_path, revision=revision)
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"model_name_or_path: {model_name_or_path} is a {config.model_type!r} model; "
            f"supported: {', '.join(MODEL_TYPES)}"
        )
    torch_dtype = resolve_dtype(dtype)
    return AutoModelForImageTextToText.from_pretrained(
        model_name_or_path,
        revision=revision,
        dtype=torch_dtype,
        attn_implementation=resolve_attn_implementation(attn_implementation, torch_dtype),
        quantization_config=quantization_config,
    )


def load_model_from_args(model_args: ModelConfig) -> PreTrainedModel:
    """`load_model` with the values of TRL's `ModelConfig`."""
    return load_model(
        model_args.model_name_or_path,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        revision=model_args.model_revision,
        quantization_config=get_quantization_config(model_args),
    )


def load_processor(
    model_name_or_path: str,
    chat_template: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    revision: str = "main",
) -> ProcessorMixin:
    """Load the processor, left-padding, with the recipe's prompt and image size bounds.

    Args:
        model_name_or_path: Hub name or folder.
        chat_template: file or name in `configs/chat_templates`; None keeps the checkpoint's own.
        min_pixels: smaller images are enlarged to this area; None keeps the checkpoint's bound.
        max_pixels: larger images are shrunk to this area; None keeps the checkpoint's bound.
        revision: branch, tag or commit on the Hub.
    """
    processor = AutoProcessor.from_pretrained(model_name_or_path, revision=revision, padding_side="left")
    if chat_template is not None:
        processor.chat_template = load_chat_template(chat_template)
    size = processor.image_processor.size
    # The image processor reads its bounds from `size` alone; its min_pixels and max_pixels are constructor
    # arguments that a later assignment does not reach.
    processor.image_processor.size = {
        "shortest_edge": min_pixels or size["shortest_edge"],
        "longest_edge": max_pixels or size["longest_edge"],
    }
    return processor


def end_token_ids(processor: ProcessorMixin) -> list[int]:
    """Every id that ends a completion: the tokenizer's own and both of Qwen's."""
    tokenizer = processor.tokenizer
    known = [tokenizer.convert_tokens_to_ids(token) for token in END_TOKENS if token in tokenizer.get_vocab()]
    return sorted({tokenizer.eos_token_id, *known})


def vision_token_ids(processor: ProcessorMixin) -> list[int]:
    """The ids that a policy must never sample."""
    tokenizer = processor.tokenizer
    vocab = tokenizer.get_vocab()
    return sorted(vocab[token] for token in VISION_TOKENS if token in vocab)


def reset_generation_config(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Drop every sampling setting that the checkpoint carries (Qwen2-VL: top_k 1, repetition penalty 1.05).

    `generate` fills what a caller leaves unset from the model, and samples drawn that way would not follow the
    policy whose log-probabilities are trained. What is left says only where a completion ends.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=end_token_ids(processor), pad_token_id=processor.tokenizer.pad_token_id
    )


def freeze(model: PreTrainedModel, freeze_vision: bool = False, freeze_llm: bool = False) -> None:
    """Stop gradients into the vision tower (its merger included) or into the language model (head included).

    Raises:
        ValueError: when nothing would be left to train.
    """
    if freeze_vision and freeze_llm:
        raise ValueError("freeze_vision and freeze_llm: with both set nothing is left to train; unset one")
    for name, parameter in model.named_parameters():
        is_vision = ".visual." in f".{name}"
        if (is_vision and freeze_vision) or (not is_vision and freeze_llm):
            parameter.requires_grad_(False)
