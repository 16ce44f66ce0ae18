"""Decoding behind a cache that grows by a token each time, with cuDNN's attention and without it; for `gpu_check.py`.

cuDNN makes a plan for every shape that it has not met, and keeps it: what repeats one length never sees what a rollout
pays. So each way runs through lengths that are new to it, and then through the same lengths again. On a CPU there is no
cuDNN, and the figures say only that these lines run.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.step import Preset
from open_r1.rollout import generate
from open_r1.shared_prefix import Prompt, decode_attention

WAYS = {"without cuDNN": False, "with cuDNN": True}  # what plans comes last, as its memory stays


@contextmanager
def cudnn_attention(is_on: bool) -> Iterator[None]:
    """In the block, torch may choose cuDNN's attention or not."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(is_on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def time_each_way(run: Callable[[], Any], tokens: int) -> dict[str, float]:
    """Milliseconds a token of each way, through new lengths and through the same again."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    figures = {}
    for way, is_on in WAYS.items():
        for lengths in ("new lengths", "the same again"):
            with cudnn_attention(is_on):
                synchronize()
                start = time.perf_counter()
                run()
                synchronize()
                figures[f"{way}, {lengths}, ms a token"] = (time.perf_counter() - start) / tokens * 1e3
    return figures


def attention_as_lengths_grow(preset: Preset, prompt: int, tokens: int) -> dict[str, float]:
    """One layer's attention of the newest token of a step's completions; half of the prompts are padded on the left."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = preset.group_size * preset.prompts_per_step
    heads, key_heads = preset.text["num_attention_heads"], preset.text["num_key_value_heads"]
    dim, longest = preset.text["hidden_size"] // heads, prompt + tokens
    query = torch.randn(batch, heads, 1, dim, device=device, dtype=getattr(torch, preset.dtype))  # (B, H, 1, D)
    keys, values = query.new_empty(2, batch, key_heads, longest, dim).normal_()  # (B, K, T, D)
    visible = torch.ones(batch, 1, 1, longest, dtype=torch.bool, device=device)
    visible[::2, ..., : prompt // 8] = False

    def run(start: int = prompt) -> None:
        for end in range(start + 1, longest + 1):
            decode_attention(query, keys[:, :, :end], values[:, :, :end], visible[..., :end], None)

    with cudnn_attention(False):
        run(start=longest - 1)  # what is done once, such as loading kernels
    return time_each_way(run, tokens)


def rollout_as_lengths_grow(
    model: PreTrainedModel, prompts: Sequence[Prompt], group_size: int, tokens: int
) -> dict[str, float]:
    """A whole rollout with its prefill; no token ends a completion before it has so many."""
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, top_k=0, eos_token_id=[0], suppress_tokens=[0], pad_token_id=0
    )
    repeats = [group_size] * len(prompts)
    with cudnn_attention(False):
        generate(model, prompts[:1], [1], config)  # what is done once; its shapes are none of a step's
    return time_each_way(lambda: generate(model, prompts, repeats, config), tokens)
