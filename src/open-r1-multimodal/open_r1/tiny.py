"""Tiny random models of the real architectures, for tests, smoke tests and the quick start.

Only the size shrinks: the configuration, model, processor and tokenizer classes are the ones that the published
checkpoints load with, and the special tokens are the family's. The BPE vocabulary is trained on the spot.

    python -m open_r1.tiny --output outputs/tiny-qwen2-vl
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    set_seed,
)

from open_r1.base.errors import command_line, run
from open_r1.base.files import check_new_folder
from open_r1.base.prompts import load_chat_template
from open_r1.models.families import FAMILIES, use_family
from open_r1.tasks.examples import read_examples


def make_tokenizer(
    texts: Iterable[str] = (), vocab_size: int = 256, model_type: str = "qwen2_vl"
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer of the family's kind.

    Args:
        texts: what to learn merges from; with none every token is one byte.
        vocab_size: most tokens to learn, at least 256 (the bytes); special tokens are added.
        model_type: family.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    return build_tokenizer(learned["vocab"], [tuple(merge) for merge in learned["merges"]], model_type)


def build_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], model_type: str = "qwen2_vl"
) -> PreTrainedTokenizerBase:
    """The family's tokenizer from a byte-level vocabulary and merges; special tokens come behind."""
    family = FAMILIES[model_type]
    vocab = vocab | {token: len(vocab) + i for i, token in enumerate(family.special_tokens)}
    tokenizer = family.tokenizer_class(vocab=vocab, merges=merges, **family.tokenizer_roles)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in family.special_tokens])
    return tokenizer


def make_processor(
    tokenizer: PreTrainedTokenizerBase, model_type: str = "qwen2_vl", chat_template: str = "base"
) -> ProcessorMixin:
    """The family's processor, images up to 112x112 pixels: 16 tokens, or up to 12 tiles of 32x32."""
    family = FAMILIES[model_type]
    return family.tiny_processor(tokenizer, load_chat_template(chat_template, family.templates))


def vision_token_arguments(tokenizer: PreTrainedTokenizerBase, model_type: str = "qwen2_vl") -> dict[str, int]:
    """The ids of vision tokens, by their names in a configuration."""
    tokens = FAMILIES[model_type].config_tokens
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def text_token_arguments(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids that a text configuration names; a sequence is padded with the end of text."""
    end_of_text = tokenizer.pad_token_id
    return {"bos_token_id": end_of_text, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": end_of_text}


def make_config(
    tokenizer: PreTrainedTokenizerBase,
    model_type: str = "qwen2_vl",
    hidden_size: int = 64,
    num_layers: int = 2,
    vision_size: int = 32,
    vision_layers: int = 2,
    head_dim: int = 16,
    intermediate_size: int | None = None,
) -> PreTrainedConfig:
    """The family's configuration, small: heads of `head_dim` dimensions, in the tower of 16.

    The language model's layers are twice as wide inside as outside, or of `intermediate_size`.
    """
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // head_dim,
        "num_key_value_heads": hidden_size // (2 * head_dim),
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        **text_token_arguments(tokenizer),
    }
    return AutoConfig.for_model(
        model_type,
        **FAMILIES[model_type].tiny_config(text, vision_size, vision_layers),
        **vision_token_arguments(tokenizer, model_type),
    )


def make_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised float32 model of a configuration, the same for the same seed."""
    set_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
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
    """Build a tiny model with its processor and save both as a checkpoint."""
    tokenizer = make_tokenizer(texts, vocab_size, model_type)
    make_processor(tokenizer, model_type, chat_template).save_pretrained(output)
    make_model(make_config(tokenizer, model_type), seed).save_pretrained(output)
    return Path(output)


def main() -> None:
    """Command line entry point."""
    parser = command_line(__doc__, prog="python -m open_r1.tiny")
    parser.add_argument("--output", required=True, help="folder to write the checkpoint to; a new or an empty one")
    parser.add_argument("--data", help="prepared SAT JSON whose questions and answers the tokenizer learns")
    parser.add_argument("--model_type", choices=FAMILIES, default="qwen2_vl", help="architecture")
    parser.add_argument("--family", help="a family of your own, module:NAME, in place of --model_type")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    args = parser.parse_args()
    if args.family:
        args.model_type = use_family(args.family).model_type
    check_new_folder(Path(args.output))
    examples = read_examples(args.data) if args.data else []
    texts = [load_chat_template("base"), load_chat_template("instruct")]
    texts += [f"{example['prompt'][-1]['content']} {example['solution']}" for example in examples]
    output = save_tiny_model(args.output, texts, args.model_type, seed=args.seed)
    print(f"{output}: a random {args.model_type} checkpoint with a tokenizer trained on {len(texts)} texts")


if __name__ == "__main__":
    run(main)
