"""Who attends in a packed row and in decoding, against plain softmax over every sequence by itself."""

from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F

from open_r1.shared_prefix import (
    Layout,
    attend_groups,
    attend_paths,
    choose_attention,
    grouped_attention,
    locate_group,
)
from support import attend_plainly, slow_varlen, slow_varlen_2_11

HEADS, KEY_HEADS, DIM = 6, 2, 16
SCALE = 0.3  # not the usual one
# of each group: tokens of the prefix, and of each branch
LAYOUTS = {
    "one group": [(7, [3, 1, 5])],
    "several groups": [(4, [2, 2]), (9, [1]), (2, [6, 3, 3, 1])],
    "a prompt of one token": [(0, [2, 3]), (3, [2])],
    "a prompt without completions": [(5, []), (3, [4, 2])],
}


def make_layout(groups, device="cpu"):
    located, start = [], 0
    for prefix, lengths in groups:
        located.append(locate_group(start, prefix, lengths, device))
        start += located[-1].length
    return Layout(located)


def make_states(layout, dtype=torch.float64, device="cpu", dim=DIM):
    """Query, key and value of a packed row, which take gradients."""
    torch.manual_seed(0)
    length = sum(group.length for group in layout.groups)
    return [
        torch.randn(1, heads, length, dim, dtype=torch.float64).to(device, dtype).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def attend_separately(query, key, value, layout, scaling):
    """What a packed row stands for: every branch as a sequence of its own behind a copy of the prefix."""
    outputs = []
    for group in layout.groups:
        prefix = list(range(group.start, group.start + group.prefix))
        outputs.append(attend_plainly(*(states[0][:, prefix] for states in (query, key, value)), scaling))
        for places, is_token in zip(group.branches, group.is_token, strict=True):
            path = prefix + places[is_token].tolist()
            attended = attend_plainly(*(states[0][:, path] for states in (query, key, value)), scaling)
            outputs.append(attended[:, group.prefix :])
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


def output_and_gradients(attend, states, layout):
    """On the CPU, in float64; the output's gradient is the same for all who attend."""
    output = attend(*states, layout, SCALE)
    torch.manual_seed(1)
    weights = torch.randn(output.shape, dtype=torch.float64).to(output)
    gradients = torch.autograd.grad((output * weights).sum(), states)
    return [tensor.detach().double().cpu() for tensor in (output, *gradients)]


@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "attend",
    [attend_groups, partial(attend_paths, varlen=slow_varlen), partial(attend_paths, varlen=slow_varlen_2_11)],
    ids=["groups", "paths", "paths of torch 2.11"],
)
def test_a_packed_row_is_its_sequences(attend, groups):
    layout = make_layout(groups)
    states = make_states(layout)
    expected = output_and_gradients(attend_separately, states, layout)
    for mine, theirs in zip(output_and_gradients(attend, states, layout), expected, strict=True):
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=0, atol=1e-10)


def test_paths_of_a_row():
    paths = make_layout([(2, [1, 2]), (1, [2])]).paths
    # prefix | prefix, branch | prefix, branch; and likewise the second group, which starts at 5
    assert paths.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 5, 6, 7]
    assert paths.query_ends.tolist() == [0, 2, 3, 5, 6, 8] and paths.key_ends.tolist() == [0, 2, 5, 9, 10, 13]
    assert (paths.most_queries, paths.most_keys) == (2, 4)


def test_torchs_kernel_takes_what_it_is_given():
    """Its arguments and shapes, forward and backward, on tensors without numbers: no GPU is needed for that."""
    layout = make_layout(LAYOUTS["several groups"], device="meta")
    states = make_states(layout, torch.bfloat16, device="meta")
    output = attend_paths(*states, layout, SCALE)
    assert output.shape == (1, states[0].shape[2], HEADS, DIM) and output.dtype == torch.bfloat16
    assert [gradient.shape for gradient in torch.autograd.grad(output.sum(), states)] == [s.shape for s in states]


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_decoding_step_is_the_last_row_of_attention(is_padded):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, 9, DIM, dtype=torch.float64) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    padding = [2, 0, 5] if is_padded else [0, 0, 0]
    mask = torch.stack([torch.arange(9) >= count for count in padding])[:, None, None] if is_padded else None
    output, _ = grouped_attention(None, query[:, :, -1:], key, value, mask, SCALE)
    for row, count in enumerate(padding):
        expected = attend_plainly(query[row, :, -1:], key[row, :, count:], value[row, :, count:], SCALE)
        assert torch.allclose(output[row, 0], expected[:, 0], rtol=0, atol=1e-12)


def test_no_call_has_a_mask_and_fewer_heads_of_keys(monkeypatch):
    """CUDA has no fused kernel for both, and falls to the slow one without a word."""
    called, sdpa = [], F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, enable_gqa=False, **kwargs):
        called.append((attn_mask is not None, enable_gqa))
        output = sdpa(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa, **kwargs)
        return output.transpose(1, 2).contiguous().transpose(1, 2)  # as CUDA's kernels lay it in memory

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layout = make_layout(LAYOUTS["several groups"])
    query, key, value = make_states(layout)
    grouped_attention(None, query, key, value, None, layout=layout)
    mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool)
    grouped_attention(None, query[:, :, -1:], key, value, mask)
    assert set(called) == {(True, False), (False, True)}


def test_without_a_gpu_sdpa_attends():
    assert choose_attention(torch.empty(1, dtype=torch.bfloat16)) is attend_groups


@pytest.mark.parametrize(
    "capability, dtype, attend",
    [
        ((7, 5), torch.float16, attend_groups),
        ((8, 0), torch.bfloat16, attend_paths),
        ((9, 0), torch.float16, attend_paths),
        ((9, 0), torch.float32, attend_groups),
    ],
)
def test_a_card_with_flash_attention_takes_it_for_16_bits(capability, dtype, attend, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_attention(Mock(is_cuda=True, dtype=dtype)) is attend


# --- on a GPU

CARD = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
NEEDS = {
    attend_groups: pytest.mark.skipif(CARD == (0, 0), reason="no NVIDIA GPU"),
    attend_paths: pytest.mark.skipif(CARD < (8, 0), reason="no NVIDIA GPU of compute capability 8.0, for its kernel"),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "attend, dtype",
    [
        pytest.param(attend, dtype, marks=NEEDS[attend])
        for attend, dtype in (
            (attend_groups, torch.float32),
            (attend_groups, torch.float16),
            (attend_groups, torch.bfloat16),
            (attend_paths, torch.float16),
            (attend_paths, torch.bfloat16),
        )
    ],
)
def test_a_packed_row_on_a_gpu_is_its_sequences(attend, dtype):
    for groups in [*LAYOUTS.values(), [(300, [150, 40, 260])]]:
        on_cpu, on_gpu = make_layout(groups), make_layout(groups, "cuda")
        states = make_states(on_gpu, dtype, "cuda", dim=128)
        exact = [state.detach().cpu().double().requires_grad_() for state in states]
        expected = output_and_gradients(attend_separately, exact, on_cpu)
        for mine, theirs in zip(output_and_gradients(attend, states, on_gpu), expected, strict=True):
            assert (mine - theirs).norm() <= (1e-3 if dtype == torch.float32 else 2e-2) * theirs.norm()


@pytest.mark.gpu
@NEEDS[attend_paths]
def test_a_gpu_takes_flash_attention_for_16_bits_alone():
    assert choose_attention(torch.empty(1, dtype=torch.bfloat16, device="cuda")) is attend_paths
    assert choose_attention(torch.empty(1, dtype=torch.float16, device="cuda")) is attend_paths
    assert choose_attention(torch.empty(1, dtype=torch.float32, device="cuda")) is attend_groups
