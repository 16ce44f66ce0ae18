"""Tiny random models of the real architectures, for tests, smoke tests and the quick start.

Only the size shrinks: the configuration, model, processor and tokenizer classes are the ones that the published
checkpoints load with, and the special tokens are Qwen's. The BPE vocabulary is trained on the spot.

    python -m open_r1.tiny --output outputs/tiny-qwen2-vl
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    set_seed,
)

from open_r1.families import FAMILIES, QWEN_TOKENS
from open_r1.front_door import run
from open_r1.prompts import load_chat_template
from open_r1.tasks.examples import read_examples


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
    vocab = vocab | {token: len(vocab) + i for i, token in enumerate(QWEN_TOKENS)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_TOKENS])
    return tokenizer


def make_processor(
    tokenizer: Qwen2Tokenizer, model_type: str = "qwen2_vl", chat_template: str = "base"
) -> ProcessorMixin:
    """The processor of the family, with images up to 112x112 pixels (16 image tokens of 28x28)."""
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    template = load_chat_template(chat_template)
    if model_type in ("qwen3_vl", "qwen3_5"):
        images, videos = Qwen2VLImageProcessor(patch_size=16, size=size), Qwen3VLVideoProcessor()
        return Qwen3VLProcessor(images, tokenizer, videos, chat_template=template)
    processor_class = Qwen2VLProcessor if model_type == "qwen2_vl" else Qwen2_5_VLProcessor
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor()
    return processor_class(images, tokenizer, videos, chat_template=template)


def vision_token_arguments(tokenizer: Qwen2Tokenizer, model_type: str = "qwen2_vl") -> dict[str, int]:
    """The ids of vision tokens, by their names in a configuration."""
    tokens = FAMILIES[model_type].config_tokens
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def text_token_arguments(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """The ids that a text configuration names: a sequence ends with its turn, and is filled up with the end of text."""
    end_of_text = tokenizer.pad_token_id
    return {"bos_token_id": end_of_text, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": end_of_text}


def make_config(
    tokenizer: Qwen2Tokenizer,
    model_type: str = "qwen2_vl",
    hidden_size: int = 64,
    num_layers: int = 2,
    vision_size: int = 32,
    vision_layers: int = 2,
    head_dim: int = 16,
) -> PreTrainedConfig:
    """The family's configuration at a size that trains on a CPU: heads of `head_dim` dimensions, in the tower of 16."""
    section = [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]  # time, height, width: half of a head
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // head_dim,
        "num_key_value_heads": hidden_size // (2 * head_dim),
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        **text_token_arguments(tokenizer),
    }
    vision = {"depth": vision_layers, "num_heads": vision_size // 16}
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": vision_size, "hidden_size": hidden_size}
    else:
        vision |= {"hidden_size": vision_size, "intermediate_size": 2 * vision_size, "out_hidden_size": hidden_size}
    if model_type == "qwen3_vl":
        text |= {"head_dim": head_dim, "rope_parameters": {**rope, "mrope_interleaved": True}}
    if model_type == "qwen3_5":  # half of its layers recurrent, and half of a head rotated
        section = [head_dim // 8, head_dim // 16, head_dim // 16]
        text |= {"head_dim": head_dim, "full_attention_interval": 2}
        text |= {"rope_parameters": {**rope, "mrope_section": section, "partial_rotary_factor": 0.5}}
        text |= {"linear_num_key_heads": hidden_size // 32, "linear_num_value_heads": hidden_size // 16}
        text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        text |= {"initializer_range": 0.08}  # with its own 0.02 the gates of so few dimensions let no image through
    return AutoConfig.for_model(
        model_type,
        text_config=text,
        vision_config=vision | FAMILIES[model_type].tiny_vision,
        tie_word_embeddings=True,
        **vision_token_arguments(tokenizer, model_type),
    )


def make_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised float32 model of the configuration's family, the same for the same seed."""
    set_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    for name, decay in model.named_parameters():
        if name.endswith("A_log"):  # at random most heads of a gated delta net forget within a token, which none learns
            nn.init.constant_(decay, -5)
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
    parser.add_argument("--model_type", choices=FAMILIES, default="qwen2_vl", help="architecture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    args = parser.parse_args()
    examples = read_examples(args.data) if args.data else []
    texts = [load_chat_template("base"), load_chat_template("instruct")]
    texts += [f"{example['prompt'][-1]['content']} {example['solution']}" for example in examples]
    output = save_tiny_model(args.output, texts, args.model_type, seed=args.seed)
    print(f"{output}: a random {args.model_type} checkpoint with a tokenizer trained on {len(texts)} texts")


if __name__ == "__main__":
    run(main)
