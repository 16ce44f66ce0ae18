"""Prepared examples as the `datasets.Dataset` that a trainer takes, without prompts that are too long."""

from dataclasses import dataclass, field

from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from tqdm import tqdm
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from open_r1.sat import read_examples


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


def opens_think(processor: ProcessorMixin, **template_kwargs: str) -> bool:
    """Whether the chat template ends a prompt inside an opened `<think>`, so that completions start there."""
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=False, **template_kwargs
    )
    return prompt.rstrip().endswith("<think>")


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
    # vLLM's own way to ask a processor for this; the pixels are not touched
    per_image = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] if sizes else []
    return len(ids) + sum(per_image) - len(per_image)


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
