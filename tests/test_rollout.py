"""Grouped rollout against transformers' own `generate` on repeated prompts."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicLayer, GenerationConfig

from open_r1.backends import load_transformers
from open_r1.evaluate.answering import generation_settings, messages
from open_r1.families import end_token_ids, family_of, vision_token_ids
from open_r1.images import open_image
from open_r1.modeling import load_model, load_processor
from open_r1.prompts import REPO_ROOT
from open_r1.rollout import RoomyLayer, generate
from open_r1.shared_prefix import encode_prompt, pack
from open_r1.tasks.benchmarks import BENCHMARKS, read
from open_r1.world.parquet import write_cvbench
from open_r1.world.scene import LEVELS
from support import enlarge, families

BASE = REPO_ROOT / "configs/tiny/base"


def make_messages(count: int) -> list[list[dict]]:
    """Prompts of different lengths with one or two images of different sizes."""
    conversations = []
    for row in range(count):
        pixels = (
            np.random.default_rng((row, k)).integers(256, size=(84, 56 + 28 * row, 3)) for k in range(1 + row % 2)
        )
        images = [Image.fromarray(each.astype(np.uint8)) for each in pixels]
        content = [{"type": "image", "image": image} for image in images]
        conversations.append([{"role": "user", "content": [*content, {"type": "text", "text": "Which? " * (row + 1)}]}])
    return conversations


@pytest.fixture(scope="module")
def loaded(tiny_models):
    """Model type -> (model, processor); weights enlarged, so that greedy decoding does not repeat one token."""
    loaded = {}
    for name, path in tiny_models.items():
        model = load_model(path, dtype="float32").eval()
        enlarge(model)
        loaded[name] = model, load_processor(path, chat_template="base")
    return loaded


def stock_generate(model, processor, conversations, repeats, config):
    """`generate` on every prompt repeated, cut after the first end token."""
    rows = [messages for messages, count in zip(conversations, repeats, strict=True) for _ in range(count)]
    inputs = processor.apply_chat_template(
        rows,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    completions = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
    return [cut(completion, config.eos_token_id) for completion in completions]


def cut(ids: list[int], ends: list[int]) -> list[int]:
    """The ids up to and with the first end."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


@pytest.mark.parametrize("model_type", families("qwen2_vl", "qwen3_5", "smolvlm", "internvl"))
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"suppress_tokens": [70, 80, 90]}])
def test_greedy_tokens_are_those_of_generate(model_type, settings, loaded):
    model, processor = loaded[model_type]
    # many ends, so that rows finish at different steps and the batch shrinks on the way
    config = GenerationConfig(
        max_new_tokens=48,
        do_sample=False,
        eos_token_id=list(range(30, 45)),
        pad_token_id=processor.tokenizer.pad_token_id,
        **settings,
    )
    conversations, repeats = make_messages(4), [2, 1, 3, 2]
    prompts = [encode_prompt(model, processor, messages) for messages in conversations]
    ours = generate(model, prompts, repeats, config)
    assert len({len(completion) for completion in ours}) > 1  # uneven
    assert ours == stock_generate(model, processor, conversations, repeats, config)


def test_sampling_follows_the_policy(loaded):
    """First tokens of many samples of one prompt, against the model's own probabilities."""
    model, processor = loaded["qwen2_vl"]
    (messages,) = make_messages(1)
    prompt = encode_prompt(model, processor, messages)
    config = GenerationConfig(
        max_new_tokens=1, do_sample=True, top_k=0, top_p=1.0, temperature=2.0, eos_token_id=[0], pad_token_id=0
    )
    torch.manual_seed(0)
    tokens = torch.tensor(generate(model, [prompt], [4000], config))[:, 0]
    logits = model(
        input_ids=prompt.input_ids[None],
        position_ids=prompt.position_ids[:, None],
        **prompt.image_inputs,
    ).logits[0, -1]
    expected = (logits / 2.0).softmax(-1)
    observed = torch.bincount(tokens, minlength=len(expected)) / len(tokens)
    deviation = (observed - expected).abs() / (expected * (1 - expected) / len(tokens)).sqrt().clamp(min=1e-4)
    assert deviation.max() < 5  # standard deviations


def test_ends_at_every_end_token_and_at_the_limit(loaded):
    model, processor = loaded["qwen2_vl"]
    prompts = [encode_prompt(model, processor, messages) for messages in make_messages(2)]
    config = GenerationConfig(max_new_tokens=20, do_sample=True, top_k=0, eos_token_id=[50, 60, 70, 80], pad_token_id=0)
    torch.manual_seed(0)
    for completion in generate(model, prompts, [16, 16], config):
        assert 1 <= len(completion) <= 20
        assert not set(completion[:-1]) & {50, 60, 70, 80}
        assert len(completion) == 20 or completion[-1] in {50, 60, 70, 80}


def test_the_cache_with_room_holds_what_the_plain_one_holds():
    torch.manual_seed(0)
    roomy, plain = RoomyLayer(), DynamicLayer()
    roomy.room = 3
    for length in (5, 1, 1, 1, 1, 1):
        keys, values = torch.randn(2, 4, 2, length, 8)
        for mine, theirs in zip(roomy.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(mine, theirs)
    for layer in (roomy, plain):
        layer.reorder_cache(torch.tensor([3, 0, 0]))
    keys, values = torch.randn(2, 3, 2, 1, 8)
    for mine, theirs in zip(roomy.update(keys, values), plain.update(keys, values), strict=True):
        assert torch.equal(mine, theirs)
    assert roomy.get_seq_length() == plain.get_seq_length() == 11


def test_a_trained_model_gives_vision_tokens_nothing(tmp_path):
    """So the softmax that is scored, the whole one, is the one that is sampled, which leaves them out."""
    model, processor = load_model(BASE, dtype="float32").eval(), load_processor(str(BASE))
    write_cvbench(tmp_path, 12, 3, LEVELS["easy"])
    items = read(BENCHMARKS["CV-Bench"], str(tmp_path))
    conversations = [messages([open_image(image) for image in item.images], item.prompt) for item in items]
    prompts = [encode_prompt(model, processor, conversation, style="reasoning") for conversation in conversations]
    never = vision_token_ids(processor)
    settings = {**generation_settings(processor, 96), "do_sample": True, "temperature": 1.0, "top_k": 0}
    torch.manual_seed(0)
    shares = []
    for prompt, ids in zip(prompts, generate(model, prompts, [1] * 12, GenerationConfig(**settings)), strict=True):
        completion = torch.tensor([ids])
        packed = pack(family_of(model), [prompt], completion, torch.ones_like(completion))
        with torch.no_grad():
            logits = model(**packed.model_inputs).logits[0]  # (C, V)
        shares.append(logits.softmax(dim=-1)[:, never].sum(dim=-1))
    assert torch.cat(shares).mean() < 1e-4


def test_a_folders_own_sampling_settings_change_no_greedy_answer(tiny_model, tmp_path):
    """Qwen2-VL's carry a repetition penalty; and the weights are in the dtype that was asked for."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({**settings, "repetition_penalty": 9.0, "do_sample": True})
    )
    answers = []
    for source in (tiny_model, folder):
        processor = load_processor(str(source))
        backend = load_transformers(source, processor, "cpu", dtype="bfloat16")
        assert backend.model.dtype == torch.bfloat16 and not backend.model.training
        prompt = backend.encode([{"role": "user", "content": "What colour is picture 3? red or blue"}])
        greedy = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=end_token_ids(processor))
        answers.append(backend.generate([prompt], [1], greedy).ids)
    assert answers[0] == answers[1] and len(answers[0][0]) > 2
