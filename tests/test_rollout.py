"""Grouped rollout against transformers' own `generate` on repeated prompts."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig

from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.engines import decoding as rollout
from open_r1.engines.decoding import generate, next_tokens, tokens_between_looks
from open_r1.engines.shared_prefix import encode_prompt
from open_r1.models.loading import load_model, load_processor
from open_r1.models.memory import cache_bytes
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

    @cache
    def load(model_type):
        model = load_model(tiny_models[model_type], dtype="float32").eval()
        enlarge(model)
        return model, load_processor(tiny_models[model_type], chat_template="base")

    return load


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
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3, "suppress_tokens": [70, 80, 90]}])
def test_greedy_tokens_are_those_of_generate(model_type, settings, loaded):
    model, processor = loaded(model_type)
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
    model, processor = loaded("qwen2_vl")
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


# --- what a GPU needs, held on a CPU ------------------------------------------------------------------------------


def test_a_drawn_token_is_that_of_multinomial():
    """From the same state of the generator, so a seed gives what it gave when `multinomial` drew."""
    scores = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)) * 3
    scores[:, 7] = -float("inf")
    torch.manual_seed(1)
    expected = [torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0] for _ in range(20)]
    for _ in range(2):  # a seed repeats its tokens
        torch.manual_seed(1)
        drawn = [next_tokens(scores, do_sample=True)[0] for _ in range(20)]
        assert torch.equal(torch.stack(drawn), torch.stack(expected))
    assert torch.equal(next_tokens(scores, do_sample=False)[0], scores.argmax(dim=-1))


@pytest.mark.parametrize("model_type", families("qwen2_vl", "qwen3_5"))
def test_what_is_sampled_after_an_end_is_cut(model_type, loaded, monkeypatch):
    """Ended rows are found after 16 tokens, as on a GPU: the same tokens, and at most 15 that nobody reads."""
    model, processor = loaded(model_type)
    prompts, repeats = [encode_prompt(model, processor, messages) for messages in make_messages(3)], [3, 2, 3]
    config = GenerationConfig(max_new_tokens=60, do_sample=False, eos_token_id=list(range(30, 90)), pad_token_id=0)
    expected = generate(model, prompts, repeats, config)
    monkeypatch.setattr(rollout, "tokens_between_looks", lambda device: tokens_between_looks(torch.device("cuda")))
    passes = []
    hook = model.register_forward_pre_hook(lambda *args: passes.append(args))
    assert generate(model, prompts, repeats, config) == expected
    hook.remove()
    longest = max(map(len, expected))
    assert min(map(len, expected)) < longest < 60
    assert longest <= len(passes) <= longest + 15


def test_scores_that_become_nan_on_the_way_end_the_rollout(loaded):
    model, processor = loaded("qwen2_vl")
    prompts = [encode_prompt(model, processor, messages) for messages in make_messages(2)]
    passes = []

    def spoil(module, args, output):
        passes.append(output)
        if len(passes) == 5:
            output.logits[1, :, 3] = float("nan")

    hook = model.register_forward_hook(spoil)
    for do_sample in (True, False):
        config = GenerationConfig(max_new_tokens=12, do_sample=do_sample, eos_token_id=[0], pad_token_id=0)
        passes.clear()
        with pytest.raises(Mistake, match="scores of the next token are no numbers"):
            generate(model, prompts, [1, 1], config)
    hook.remove()


class HostWaits(TorchDispatchMode):
    """Counts what a host waits for a GPU for, where the meta device stands for one.

    These are values that it reads, shapes that hang on values, and copies from one to the other. There is no value on
    the meta device: whatever is read is true, or many.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name == "aten::_local_scalar_dense" and args[0].is_meta:
            self.count += 1
            return True if args[0].dtype == torch.bool else 1000
        result = function(*args, **kwargs or {})
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        # multinomial reads its probabilities where no dispatch mode sees it
        self.count += name in ("aten::nonzero", "aten::multinomial") or len(devices) > 1
        return result


@pytest.mark.parametrize("model_type", families("qwen2_vl", "qwen3_5"))
def test_the_host_waits_for_a_gpu_once_in_16_tokens(model_type, loaded, tiny_models):
    """Under a recipe's sampling settings and others, behind prompts of different lengths."""
    model, processor = loaded(model_type)
    questions = [[{"role": "user", "content": "Which? " * count}] for count in (1, 4)]
    prompts = [encode_prompt(model, processor, messages) for messages in questions]
    on_gpu = load_model(tiny_models[model_type], dtype="float32").eval().to("meta")

    config = GenerationConfig(
        max_new_tokens=20,
        **{"do_sample": True, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7},
        **{"repetition_penalty": 1.1, "suppress_tokens": [5, 6], "eos_token_id": [1, 2], "pad_token_id": 0},
    )
    waits = []
    on_gpu.register_forward_pre_hook(lambda *args: waits.append(counted.count))
    with HostWaits() as counted, pytest.raises(Mistake, match="no numbers"):  # as "was there any NaN?" is true
        generate(on_gpu, prompts, [2, 2], config)
    assert [after - before for before, after in pairwise(waits[1:])] == [0] * 14 + [1] + [0] * 3


def test_the_lm_head_of_a_frozen_model_is_not_copied_for_each_prompt(loaded):
    """A matmul of a view copies it on a CPU: 2 of 11 s of a rollout, where 8 prompts meet 49,163 tokens."""
    model, processor = loaded("qwen2_vl")
    prompts = [encode_prompt(model, processor, messages) for messages in make_messages(3)]
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=[0], pad_token_id=0)
    tokens, width = model.get_output_embeddings().weight.shape
    model.requires_grad_(False)
    with torch.profiler.profile(record_shapes=True) as profile:
        generate(model, prompts, [1, 1, 1], config)
    model.requires_grad_(True)
    shapes = [event.input_shapes for event in profile.events()]
    assert [[3, width], [width, tokens]] in shapes and not any([3, width, tokens] in inputs for inputs in shapes)


def test_keys_and_values_stay_in_one_buffer_of_the_size_that_is_counted(loaded, monkeypatch):
    """Prompt and longest completion for every row, from the first token to the last, also when rows are dropped."""
    model, processor = loaded("qwen2_vl")
    prompts = [encode_prompt(model, processor, messages) for messages in make_messages(2)]
    config = GenerationConfig(max_new_tokens=200, do_sample=False, eos_token_id=list(range(30, 45)), pad_token_id=0)
    rows, buffers = [], []

    def note(module, args, kwargs, output):
        layers = kwargs["past_key_values"].layers
        rows.append(len(layers[0].keys))
        buffers.append([layer.buffer.untyped_storage() for layer in layers])

    hook = model.register_forward_hook(note, with_kwargs=True)
    generate(model, prompts, [4, 4], config)
    hook.remove()
    assert rows[:2] == [2, 8] and 1 < len(set(rows[1:])) < len(rows) - 1  # prefill; then rows are dropped
    assert {tuple(part.data_ptr() for part in parts) for parts in buffers[1:]} == {
        tuple(part.data_ptr() for part in buffers[1])
    }
    a_token, _ = cache_bytes(model.config.get_text_config(), 4)
    assert sum(part.nbytes() for part in buffers[1]) == 8 * (max(map(len, prompts)) + 200) * a_token
