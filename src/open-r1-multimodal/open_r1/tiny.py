"""Tiny random models of the real architectures, for tests, smoke tests and the quick start.

Only the size shrinks: the configuration, model, processor and tokenizer classes are the ones that the published
checkpoints load with, and the special tokens are Qwen's. The BPE vocabulary is trained on the spot.

    python -m open_r1.tiny --output outputs/tiny-qwen2-vl
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    set_seed,
)

from open_r1.prompts import load_chat_template
from open_r1.tasks.examples import read_examples

# Qwen2-VL's special tokens in the order of their ids (151643 ... 151656 in the published vocabulary)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MODEL_CLASSES = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}


def make_tokenizer(texts: Iterable[str] = (), vocab_size: int = 256) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer of Qwen's kind.

    Args:
        texts: what to learn merges from; with none every token is one byte.
        vocab_size: most tokens to learn before the special tokens are added, at least 256 (the bytes).
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    return build_tokenizer(learned["vocab"], [tuple(merge) for merge in learned["merges"]])


def build_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Qwen2Tokenizer:
    """Qwen's tokenizer from a byte-level vocabulary and its merges; the special tokens get the ids behind it."""
    vocab = vocab | {token: len(vocab) + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def make_processor(
    tokenizer: Qwen2Tokenizer, model_type: str = "qwen2_vl", chat_template: str = "base"
) -> ProcessorMixin:
    """The processor of the family, with images up to 112x112 pixels (16 image tokens of 28x28)."""
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    template = load_chat_template(chat_template)
    if model_type == "qwen3_vl":
        images, videos = Qwen2VLImageProcessor(patch_size=16, size=size), Qwen3VLVideoProcessor()
        return Qwen3VLProcessor(images, tokenizer, videos, chat_template=template)
    processor_class = Qwen2VLProcessor if model_type == "qwen2_vl" else Qwen2_5_VLProcessor
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor()
    return processor_class(images, tokenizer, videos, chat_template=template)


def vision_token_arguments(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """The ids of vision tokens, by their names in a configuration."""
    tokens = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def make_config(
    tokenizer: Qwen2Tokenizer,
    model_type: str = "qwen2_vl",
    hidden_size: int = 64,
    num_layers: int = 2,
    vision_size: int = 32,
    vision_layers: int = 2,
) -> PreTrainedConfig:
    """The family's configuration at a size that trains on a CPU: heads of 16 dimensions in text and vision."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}  # of head_dim / 2 = 8
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 16,
        "num_key_value_heads": hidden_size // 32,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    common = {"tie_word_embeddings": True, **vision_token_arguments(tokenizer)}
    if model_type == "qwen2_vl":
        vision = {
            "depth": vision_layers,
            "embed_dim": vision_size,
            "num_heads": vision_size // 16,
            "hidden_size": hidden_size,
        }
        return Qwen2VLConfig(text_config=text, vision_config=vision, **common)
    vision = {
        "depth": vision_layers,
        "hidden_size": vision_size,
        "num_heads": vision_size // 16,
        "intermediate_size": 2 * vision_size,
        "out_hidden_size": hidden_size,
    }
    if model_type == "qwen2_5_vl":
        vision |= {"window_size": 56, "fullatt_block_indexes": [vision_layers - 1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **common)
    text |= {"head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}}
    vision |= {"deepstack_visual_indexes": [0, vision_layers - 1], "num_position_embeddings": 64}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **common)


def make_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised float32 model of the configuration's family, the same for the same seed."""
    set_seed(seed)
    model = MODEL_CLASSES[config.model_type](config)
    model.generation_config = own_sampling_settings(config.get_text_config())
    return model


def own_sampling_settings(text: PreTrainedConfig) -> GenerationConfig:
    """What the published checkpoints carry and a trainer must never inherit.

    These settings disagree with the log-probabilities that it computes.
    """
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.bos_token_id],
        pad_token_id=text.pad_token_id,
        do_sample=True,
        top_k=1,
        repetition_penalty=1.05,
    )


def save_tiny_model(
    output: str | Path,
    texts: Sequence[str] = (),
    model_type: str = "qwen2_vl",
    vocab_size: int = 1024,
    seed: int = 0,
    chat_template: str = "base",
) -> Path:
    """Build a tiny model with its processor and save both as a checkpoint that transformers loads."""
    tokenizer = make_tokenizer(texts, vocab_size)
    make_processor(tokenizer, model_type, chat_template).save_pretrained(output)
    make_model(make_config(tokenizer, model_type), seed).save_pretrained(output)
    return Path(output)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m open_r1.tiny",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, help="folder to write the checkpoint to")
    parser.add_argument("--data", help="prepared SAT JSON whose questions and answers the tokenizer learns")
    parser.add_argument("--model_type", choices=MODEL_CLASSES, default="qwen2_vl", help="architecture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    args = parser.parse_args()
    try:
        examples = read_examples(args.data) if args.data else []
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    texts = [load_chat_template("base"), load_chat_template("instruct")]
    texts += [f"{example['prompt'][-1]['content']} {example['solution']}" for example in examples]
    output = save_tiny_model(args.output, texts, args.model_type, seed=args.seed)
    print(f"{output}: a random {args.model_type} checkpoint with a tokenizer trained on {len(texts)} texts")


if __name__ == "__main__":
    main()
