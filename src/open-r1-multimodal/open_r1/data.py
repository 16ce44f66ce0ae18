"""Prepared examples as the `datasets.Dataset` that a trainer takes, without prompts that are too long."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from qwen_vl_utils import process_vision_info
from tqdm import tqdm
from transformers import ProcessorMixin
from trl import ModelConfig
from trl.data_utils import prepare_multimodal_messages

from open_r1.modeling import load_processor
from open_r1.sat import DECODE_ERRORS, read_examples


@dataclass
class DataArguments:
    """What is asked, and how it looks to the model."""

    dataset_name: str = field(metadata={"help": "Prepared JSON file to train on."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Prepared JSON file of held-out examples, for eval_strategy."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Name in configs/chat_templates (base, instruct) or file of the prompt; it is saved with every "
            "checkpoint. None keeps the checkpoint's own."
        },
    )
    max_prompt_length: int | None = field(
        default=1024,
        metadata={"help": "Examples with a longer prompt (tokens, images included) are left out; none is truncated."},
    )
    max_pixels: int | None = field(
        default=401408, metadata={"help": "Larger images are shrunk to this area in pixels."}
    )
    min_pixels: int | None = field(
        default=3136, metadata={"help": "Smaller images are enlarged to this area in pixels."}
    )


def load_processor_from_args(model_args: ModelConfig, data_args: DataArguments) -> ProcessorMixin:
    """`load_processor` with the values of a recipe."""
    return load_processor(
        model_args.model_name_or_path,
        chat_template=data_args.chat_template,
        min_pixels=data_args.min_pixels,
        max_pixels=data_args.max_pixels,
        revision=model_args.model_revision,
    )


def opens_think(processor: ProcessorMixin, **template_kwargs: str) -> bool:
    """Whether the chat template ends a prompt inside an opened `<think>`, so that completions start there."""
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=False, **template_kwargs
    )
    return prompt.rstrip().endswith("<think>")


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image, decoded, in RGB."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white instead of scaling it
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def open_image(path: str) -> Image.Image:
    """Decode an image file to RGB and close it.

    Raises:
        OSError: one line that names the file, when it is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except OSError as error:
        raise OSError(f"image {path}: {error}; run prepare_dataset.sh again") from error


def store_image(reference: str) -> str:
    """The path of an image: the path itself, or a file in the `datasets` cache for a base64 data URL.

    So that an image is decoded when it is used, and trajectories name it instead of repeating it.

    Raises:
        ValueError: when the data URL holds no image.
    """
    if not reference.startswith("data:image"):
        return reference
    digest = hashlib.sha256(reference.encode()).hexdigest()
    path = Path(datasets.config.HF_DATASETS_CACHE) / "open_r1_images" / f"{digest}.png"
    if not path.exists():
        messages = [{"role": "user", "content": [{"type": "image", "image": reference}]}]
        try:
            image = process_vision_info(messages)[0][0]
        except DECODE_ERRORS as error:
            raise ValueError(f"image {reference[:40]}...: not an image in base64 ({error})") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{digest}.{os.getpid()}.tmp")  # every process of a run may write it
        image.save(temporary, format="PNG")
        os.replace(temporary, path)
    return str(path)


def count_image_tokens(processor: ProcessorMixin, sizes: Sequence[tuple[int, int]]) -> int:
    """Tokens of images of these heights and widths, all together; the pixels are not touched."""
    # vLLM's own way to ask a processor for this
    return sum(processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]) if sizes else 0


def count_prompt_tokens(example: dict, processor: ProcessorMixin, **template_kwargs: str) -> int | None:
    """Length of an example's prompt in tokens, those of its images included, from the images' headers alone.

    Returns:
        The count, or None when the question holds an image token of its own, which no image would fill.
    """
    messages = prepare_multimodal_messages(example["prompt"], images=example["images"])
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_kwargs)
    ids = processor.tokenizer(text)["input_ids"]
    if ids.count(processor.image_token_id) != len(example["images"]):
        return None
    sizes = []
    for path in example["images"]:
        with Image.open(path) as image:
            sizes.append((image.height, image.width))
    return len(ids) - len(sizes) + count_image_tokens(processor, sizes)  # each image has one token in the text


def load_dataset(
    json_path: str, processor: ProcessorMixin, max_prompt_length: int | None = None, **template_kwargs: str
) -> Dataset:
    """Read a prepared JSON file; leave out, never truncate, the prompts over `max_prompt_length` tokens.

    Args:
        json_path: what `prepare_dataset.sh` wrote, or any file in the same form.
        processor: renders and measures the prompts.
        max_prompt_length: in tokens, image tokens included; None keeps every length.
        template_kwargs: for the chat template.

    Raises:
        ValueError: when no example is left.
    """
    examples = read_examples(json_path)
    for example in examples:
        example["images"] = [store_image(image) for image in example["images"]]
    state = PartialState()
    progress = tqdm(examples, desc="measuring prompts", unit="prompt", disable=not state.is_main_process)
    lengths = [count_prompt_tokens(example, processor, **template_kwargs) for example in progress]
    limit = max_prompt_length or float("inf")
    kept = [
        example for example, length in zip(examples, lengths, strict=True) if length is not None and length <= limit
    ]
    stray = sum(length is None for length in lengths)
    if len(kept) < len(examples):
        state.print(
            f"{json_path}: kept {len(kept)} of {len(examples)} examples; left out {len(examples) - len(kept) - stray} "
            f"with a prompt over {max_prompt_length} tokens, {stray} with an image token in the question"
        )
    if not kept:
        raise ValueError(f"{json_path}: no example left; raise max_prompt_length or lower max_pixels")
    return Dataset.from_list(kept)
