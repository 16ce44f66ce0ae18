"""Load a policy and its processor the way a recipe says: architecture, dtype, attention, pixels, what trains."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from open_r1.configs import FreezeArguments
from open_r1.families import PARTS, Family, end_token_ids, family_of, find_family
from open_r1.hub import model_folder
from open_r1.prompts import load_chat_template


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


def check_model(model_args: ModelConfig) -> Family:
    """Fetch the policy of a recipe from the Hub, and see that it can be loaded, without doing so.

    Returns:
        Its family.

    Raises:
        OSError: there is no such model.
        ValueError: it is of a type that this project was not tested with, or the recipe cannot train it.
        ImportError: the recipe quantises, and bitsandbytes is not there.
    """
    name = model_args.model_name_or_path
    folder = model_folder(name, model_args.model_revision)
    where = f"model_name_or_path: {name}"
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise OSError(f"{where} holds an adapter; make a model of it with scripts/export.py")
    if not (any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))):
        raise OSError(f"{where} holds no model (config.json, *.safetensors)")
    family = check_model_type(name, model_args.model_revision)
    quantises = model_args.load_in_4bit or model_args.load_in_8bit
    if quantises and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit, load_in_8bit: bitsandbytes is not installed; run setup.sh again")
    if quantises and not model_args.use_peft:
        raise ValueError("load_in_4bit, load_in_8bit: quantised weights cannot be trained; set use_peft: true")
    return family


def check_model_type(model_name_or_path: str, revision: str | None = None) -> Family:
    """The family of a model; ValueError for a type that this project was not tested with."""
    config = AutoConfig.from_pretrained(model_name_or_path, revision=revision)
    try:
        return find_family(config.model_type)
    except ValueError as error:
        raise ValueError(f"model_name_or_path: {model_name_or_path} is {error}") from error


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
    check_model_type(model_name_or_path, revision)
    if Path(model_name_or_path).is_dir():  # an adapter remembers the name, and is loaded from other folders
        model_name_or_path = str(Path(model_name_or_path).resolve())
    torch_dtype = resolve_dtype(dtype)
    return AutoModelForImageTextToText.from_pretrained(
        model_name_or_path,
        revision=revision,
        dtype=torch_dtype,
        attn_implementation=resolve_attn_implementation(attn_implementation, torch_dtype),
        quantization_config=quantization_config,
    )


def adapter_base(folder: str | Path) -> Path | None:
    """The folder of the base model that a LoRA run's folder names; None for a folder of whole weights.

    Raises:
        OSError: there is no such base model, here or on the hub; the message names both.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        return None
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    try:
        return model_folder(base)
    except OSError as error:
        raise OSError(f"{folder} is an adapter without its base model: {error}") from error


def load_checkpoint(folder: str | Path, dtype: str | None = "auto", base: str | Path | None = None) -> PreTrainedModel:
    """A model to use: `load_model`, or for a LoRA run's folder its base with the adapter merged into the weights.

    Args:
        dtype: see `load_model`.
        base: folder in place of the base model that the adapter names.

    Raises:
        OSError, ValueError: what `adapter_base` and `load_model` raise.
    """
    base = base or adapter_base(folder)
    if base is None:
        return load_model(str(folder), dtype=dtype)
    model = load_model(str(base), dtype=dtype)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)


def load_model_from_args(model_args: ModelConfig) -> PreTrainedModel:
    """`load_model` with the values of TRL's `ModelConfig`.

    Raises:
        OSError, ValueError, ImportError: see `check_model`.
    """
    check_model(model_args)
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


def reset_generation_config(model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
    """Drop every sampling setting that the checkpoint carries (Qwen2-VL: top_k 1, repetition penalty 1.05).

    `generate` fills what a caller leaves unset from the model, and samples drawn that way would not follow the
    policy whose log-probabilities are trained. What is left says only where a completion ends.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=end_token_ids(processor), pad_token_id=getattr(processor, "tokenizer", processor).pad_token_id
    )


def accept_missing_images(model: PreTrainedModel, always_encode: bool) -> None:
    """Let a model take batches in which no row has an image; see tests/test_mixed.py.

    Args:
        model: not wrapped.
        always_encode: run the vision tower on a blank image then, with weight zero, so that every process of a run
            does the same work: under ZeRO the ranks exchange what a part of the model needs whenever it runs.
    """
    backbone, family = model.base_model, family_of(model)
    blank = family.blank_image(model.config)

    def before_backbone(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        backbone.is_without_images = not family.images_of(kwargs)
        if backbone.is_without_images:  # TRL's slice of a batch has tensors of no rows then
            kwargs = {name: value for name, value in kwargs.items() if name not in family.image_inputs}
        return args, kwargs

    # Here, and not where the tokens are embedded, the tower has its usual place in the order of the exchanges.
    def before_language_model(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        is_decoding = cache is not None and cache.get_seq_length() > 0
        if backbone.is_without_images and not is_decoding:
            embeds = kwargs["inputs_embeds"]
            images = {name: value.to(embeds.device) for name, value in blank.items()}
            for part in family.feature_tensors(family.encode_images(model, images)):
                embeds = embeds + (part * 0).sum().to(embeds.dtype)
            kwargs["inputs_embeds"] = embeds
        return args, kwargs

    backbone.register_forward_pre_hook(before_backbone, with_kwargs=True)
    if always_encode:
        # in front of DeepSpeed's own hook, which a reference model has by now
        backbone.language_model.register_forward_pre_hook(before_language_model, prepend=True, with_kwargs=True)


def frozen_parts(freeze_vision: bool = False, freeze_llm: bool = False, freeze_merger: bool | None = None) -> list[str]:
    """The names in `PARTS` that are not trained.

    Raises:
        ValueError: when nothing would be left to train.
    """
    flags = (freeze_vision, freeze_vision if freeze_merger is None else freeze_merger, freeze_llm)
    if all(flags):
        raise ValueError("freeze_vision, freeze_merger, freeze_llm: nothing is left to train; unset one")
    return [part for part, frozen in zip(PARTS, flags, strict=False) if frozen]


def freeze(
    model: PreTrainedModel, freeze_vision: bool = False, freeze_llm: bool = False, freeze_merger: bool | None = None
) -> None:
    """Stop gradients into the vision tower, the language model (head included) or the merger between them.

    `freeze_merger` None follows `freeze_vision`. Raises what `frozen_parts` raises.
    """
    frozen, family = frozen_parts(freeze_vision, freeze_llm, freeze_merger), family_of(model)
    for name, parameter in model.named_parameters():
        if family.part_of(name) in frozen:
            parameter.requires_grad_(False)


def get_adapter_config(model_args: ModelConfig, freezing: FreezeArguments, family: Family) -> PeftConfig | None:
    """TRL's LoRA configuration for a recipe, with no adapter in a frozen part; None without `use_peft`."""
    config = get_peft_config(model_args)
    frozen = frozen_parts(freezing.freeze_vision, freezing.freeze_llm, freezing.freeze_merger)
    if config is not None and frozen:
        config.exclude_modules = "|".join(family.modules_of(part) for part in frozen)
    return config


def count_elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter as the model has it: whole under ZeRO-3, unpacked when quantised to 4 bits."""
    if hasattr(parameter, "quant_state"):  # bitsandbytes keeps two weights in a byte
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def parameter_table(model: nn.Module) -> str:
    """How many parameters each part of the model has and how many of them are trained, one line a part."""
    total, trained, family = Counter(), Counter(), family_of(model)
    for name, parameter in model.named_parameters():
        count, part = count_elements(parameter), family.part_of(name)
        total[part] += count
        trained[part] += count * parameter.requires_grad
    rows = [(part, total[part], trained[part]) for part in PARTS if total[part]]
    rows.append(("all", total.total(), trained.total()))
    lines = [f"{'part':<16}{'parameters':>16}{'trained':>16}"]
    return "\n".join(lines + [f"{part:<16}{count:>16,}{trains:>16,}" for part, count, trains in rows])
