"""Attention over a packed row: each completion sees its prompt and itself; also decoding steps and images in a row."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from open_r1.engines.layout import Layout

ATTENTION = "grouped_sdpa"  # the name under which transformers knows `grouped_attention`
# `image_attention`'s. Vision towers hand over a row of images whole only if "flash" is in the name.
IMAGE_ATTENTION = "image_flash"


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: packed groups, a decoding step, or else plain SDPA.

    Args:
        query: (B, H, L, D). key, value: (B, K, L, D) with H a multiple of K.
        layout: of a packed row, B = 1; None outside of packed scoring.

    Returns:
        (B, L, H, D), and None for the weights.
    """
    # Under autocast the rotary embedding leaves queries and keys in float32 beside values in 16 bits. A kernel takes
    # one dtype, and this is the one that autocast has SDPA take.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if layout is not None:
        return choose_attention(query)(query, key, value, layout, scaling), None
    if query.shape[2] == 1:
        return decode_attention(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def choose_attention(query: torch.Tensor) -> Callable[..., torch.Tensor]:
    """How a packed row attends: by torch's flash attention where it runs, else by SDPA."""
    return attend_paths if has_flash(query) else attend_groups


def has_flash(query: torch.Tensor) -> bool:
    """Whether torch's flash attention, `varlen_attn`, runs on queries of this device and dtype."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def attend_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None
) -> torch.Tensor:
    """Two calls of SDPA a group: one for the prefix, one for its branches as a batch behind it.

    No mask over the whole row is ever made. Shapes: see `grouped_attention`.
    """
    outputs = []
    for group in layout.groups:
        prefix = slice(group.start, group.start + group.prefix)
        prefix_key, prefix_value = key[:, :, prefix], value[:, :, prefix]
        # Without a mask the fused kernels of CPU and CUDA take fewer heads of keys, and skip what causality hides.
        attended = F.scaled_dot_product_attention(
            query[:, :, prefix], prefix_key, prefix_value, is_causal=True, scale=scaling, enable_gqa=True
        )
        outputs.append(attended[0].transpose(0, 1))  # (prefix, H, D)
        if not group.lengths:
            continue
        branch_query, branch_key, branch_value = (
            states[0][:, group.branches].transpose(0, 1) for states in (query, key, value)
        )  # (G, H or K, C, D)
        count = len(group.lengths)
        attended = attend_folded(
            branch_query,
            torch.cat([prefix_key.expand(count, -1, -1, -1), branch_key], dim=2),
            torch.cat([prefix_value.expand(count, -1, -1, -1), branch_value], dim=2),
            group.mask,
            scaling,
        )  # (G, H, C, D)
        outputs.append(attended.transpose(1, 2)[group.is_token])  # (tokens, H, D)
    return torch.cat(outputs)[None]


@cache
def takes_fewer_keys(varlen: Callable[..., torch.Tensor]) -> bool:
    """Whether a kernel takes fewer heads of keys than of queries; torch's does from 2.12 on."""
    return "enable_gqa" in inspect.signature(varlen).parameters


def attend_paths(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float | None,
    varlen: Callable[..., torch.Tensor] = varlen_attn,
) -> torch.Tensor:
    """One call a row over the keys and values along each path; what it softmaxes needs no merging.

    Flash attention aligns causality to the bottom right: the queries of a path are its last tokens. Shapes: see
    `grouped_attention`. `varlen` is the kernel.
    """
    paths, grouped = layout.paths, takes_fewer_keys(varlen)
    key, value = (states[0].transpose(0, 1).index_select(0, paths.keys) for states in (key, value))  # (T, K, D)
    if not grouped:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    attended = varlen(
        query[0].transpose(0, 1),  # (L, H, D)
        key,
        value,
        paths.query_ends,
        paths.key_ends,
        paths.most_queries,
        paths.most_keys,
        scale=scaling,
        window_size=(-1, 0),  # causal
        **({"enable_gqa": True} if grouped else {}),
    )
    return attended[None]


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """A new token a row: query (B, H, 1, D), key, value (B, K, T, D), mask (B, 1, 1, T) -> (B, 1, H, D)."""
    return attend_folded(query, key, value, attention_mask, scaling).transpose(1, 2)


def attend_folded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """SDPA with a mask and fewer heads of keys: query (B, H, C, D), key and value (B, K, T, D).

    The heads that share keys become queries of one head, so that no key is repeated. `enable_gqa` would do, but with a
    mask CUDA has no fused kernel for it.

    Args:
        mask: broadcasts to (B, 1, C, T).

    Returns:
        (B, H, C, D)
    """
    folds = query.shape[1] // key.shape[1]
    folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])  # (B, K, H / K * C, D)
    if mask is not None and mask.shape[-2] > 1:
        mask = mask.repeat(*[1] * (mask.dim() - 2), folds, 1)
    return F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling).reshape(query.shape)


def image_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface in a vision tower: patches see their image, or window.

    One call of torch's flash attention where it runs, else SDPA image by image. transformers' own SDPA reads from the
    GPU where the images end, three times a layer; here once, or not at all.

    Args:
        query, key, value: (1, H, L, D), the patches of all images in a row.
        cu_seq_lens_q: (N + 1,) int32: 0, and where each image ends.
        max_length_q: patches of the largest.

    Returns:
        (1, L, H, D), and None for the weights.
    """
    if has_flash(query):
        states = (states[0].transpose(0, 1) for states in (query, key, value))  # (L, H, D)
        ends, most = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
        return varlen_attn(*states, *ends, *most, scale=scaling)[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    images = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = [sdpa_attention_forward(module, *image, None, scaling=scaling, is_causal=False)[0] for image in images]
    return torch.cat(attended, dim=1), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
AttentionInterface.register(IMAGE_ATTENTION, image_attention)
