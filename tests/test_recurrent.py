"""Recurrent layers in a packed row against plain ones over every sequence by itself; what they leave in a cache."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationConfig
from transformers.models.qwen3_5 import modeling_qwen3_5

from open_r1.engines.decoding import generate
from open_r1.engines.recurrent import share_states
from open_r1.engines.shared_prefix import encode_prompt
from open_r1.models.loading import load_model, load_processor
from open_r1.tiny import make_config, make_tokenizer
from support import enlarge, make_layout

HIDDEN = 64
# Of each group the tokens of the prefix, and of each branch. A convolution sees 4 tokens, the delta rule chunks of 64.
LAYOUTS = {
    "one group": [(7, [3, 1, 5])],
    "several groups": [(4, [2, 2]), (9, [1]), (2, [6, 3, 3, 1])],
    "one token each": [(5, [1, 1, 1])],
    "a prompt of one token": [(0, [2, 3]), (0, [1]), (1, [2])],
    "a prompt without completions": [(5, []), (3, [4, 2])],
    "several chunks": [(130, [70, 1, 64])],
}


@pytest.fixture
def layers():
    """A decoder layer as transformers has it, and the same that knows of packed rows."""
    torch.manual_seed(0)
    text = make_config(make_tokenizer(), "qwen3_5", hidden_size=HIDDEN).text_config
    plain = modeling_qwen3_5.Qwen3_5DecoderLayer(text, 0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = copy.deepcopy(plain)
    share_states(ours)
    return plain, ours


def run(layer, states, **kwargs):
    return layer(states, position_embeddings=None, attention_mask=None, **kwargs)


def run_separately(layer, states, layout):
    """What a packed row stands for: every branch as a sequence of its own behind a copy of the prefix."""
    outputs = []
    for group in layout.groups:
        prefix = list(range(group.start, group.start + group.prefix))
        if prefix:
            outputs.append(run(layer, states[:, prefix])[0])
        for places, is_token in zip(group.branches, group.is_token, strict=True):
            path = prefix + places[is_token].tolist()
            outputs.append(run(layer, states[:, path])[0, group.prefix :])
    return torch.cat(outputs)[None]


def make_states(layout):
    torch.manual_seed(1)
    return torch.randn(1, sum(group.length for group in layout.groups), HIDDEN, requires_grad=True)


def gradients_of(layer, states, output):
    torch.manual_seed(2)
    return torch.autograd.grad((output * torch.randn(output.shape)).sum(), [states, *layer.parameters()])


@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS)
def test_a_packed_row_is_its_sequences(groups, layers):
    """Outputs, and the gradients of inputs and weights; so a gradient goes through the state at a prefix's end."""
    plain, ours = layers
    layout = make_layout(groups)
    states = make_states(layout)
    expected, output = run_separately(plain, states, layout), run(ours, states, layout=layout)
    assert output.shape == expected.shape and (output - expected).abs().max() < 1e-5
    theirs, mine = gradients_of(plain, states, expected), gradients_of(ours, states, output)
    largest = max(gradient.norm() for gradient in theirs)
    for name, a, b in zip(["states", *dict(plain.named_parameters())], theirs, mine, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-7 * largest, name  # rounding noise aside, as against TRL


def test_other_inputs_give_what_they_gave(layers):
    """Bit for bit: a padded batch, also after a packed row, and a cache that is gone on from."""
    plain, ours = layers
    layout = make_layout(LAYOUTS["one group"])
    run(ours, make_states(layout), layout=layout)
    torch.manual_seed(1)
    states, mask = torch.randn(2, 9, HIDDEN), torch.arange(9) >= torch.tensor([[0], [4]])
    config = make_config(make_tokenizer(), "qwen3_5").text_config
    caches = [DynamicCache(config=config) for _ in layers]
    for part in (slice(0, 7), slice(7, 8), slice(8, 9)):
        a, b = (
            layer(states[:, part], None, attention_mask=mask[:, part], past_key_values=cache)
            for layer, cache in zip((plain, ours), caches, strict=True)
        )
        assert torch.equal(a, b)


def test_checkpointing_computes_each_row_again_with_its_own_layout(layers):
    _, layer = layers
    layer.train()
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    rows = [make_layout(LAYOUTS[name]) for name in ("one group", "several groups")]
    found = []
    for layer.gradient_checkpointing in (False, True):
        states = [make_states(layout) for layout in rows]
        outputs = [run(layer, each, layout=layout) for each, layout in zip(states, rows, strict=True)]
        found.append([gradients_of(layer, each, output) for each, output in zip(states, outputs, strict=True)])
    for plain, checkpointed in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_no_kernel_for_decoding_is_taken(layers, monkeypatch):
    """They write in place, or have no backward pass; with the torch kernels of a CPU nobody would notice."""

    def refuse(*args, **kwargs):
        raise AssertionError("a kernel for decoding")

    monkeypatch.setattr(modeling_qwen3_5, "torch_recurrent_gated_delta_rule", refuse)
    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_update", refuse)
    for groups in LAYOUTS.values():
        layout = make_layout(groups)
        run(layers[1], make_states(layout), layout=layout)


def test_padding_does_not_leak_into_a_state(tiny_models):
    """Prompts of unequal lengths that are sampled together end as each alone, where nothing is padded."""
    model = load_model(tiny_models["qwen3_5"], dtype="float32").eval()
    enlarge(model)
    processor = load_processor(tiny_models["qwen3_5"], chat_template="base")
    texts = ["Where?", "What colour is the picture, and why?" * 3, "Left or right of the box?"]
    prompts = [encode_prompt(model, processor, [{"role": "user", "content": text}]) for text in texts]
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=[58, 262], pad_token_id=0)
    together = generate(model, prompts, [2, 1, 2], config)
    alone = [generate(model, [prompt], [1], config)[0] for prompt in prompts]
    assert together == [alone[row] for row in (0, 0, 1, 2, 2)] and len(set(map(len, alone))) > 1  # uneven
