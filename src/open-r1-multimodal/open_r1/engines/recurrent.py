"""Runs recurrent layers over a packed row: a completion starts from the state that its prompt left.

Attention sees a prefix through keys and values; a gated delta net sees it through a matrix that it
carries from token to token, and through the last inputs of its convolution. So of a packed row (see
`shared_prefix`) a recurrent layer runs over the prefixes as one batch, and then over all branches
as another that goes on from there: two runs whatever the row holds, because under ZeRO-3 the
processes exchange its weights at each run.

Both runs are transformers' own forward pass with its own kernels (fla's and causal-conv1d's where
they are installed, on a GPU, else torch's). Ours is the cache between them, which lets gradients
through. The layers' classes are in `RECURRENT_LAYERS`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from open_r1.engines.layout import Layout

RECURRENT_LAYERS = ("Qwen3_5GatedDeltaNet",)  # classes whose `forward` takes the cache as `cache_params`


class Carried(LinearAttentionLayer):
    """What one recurrent layer carries from token to token, as a cache layer with gradients.

    transformers' layer copies new states over the old ones, which the backward pass still needs. While it records the
    past it replaces a convolution's inputs instead, and the layer takes no kernel that writes in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.activate_past_recording()

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """Take a new state (B, heads, D, D), and give it back."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    def select(self, rows: torch.Tensor) -> None:
        """Carry these rows of the batch; the gradients of a row that is repeated add up."""
        for index, conv in self.conv_states.items():
            self.conv_states[index] = conv[rows, :, -self.conv_kernel_size[index] :]  # (B, channels, kernel or fewer)
        for index, state in self.recurrent_states.items():
            self.recurrent_states[index] = state[rows]


def share_states(model: nn.Module) -> None:
    """Let a model's recurrent layers run over packed rows; other inputs give what they gave."""
    for decoder_layer in model.modules():
        for mixer in decoder_layer.children():
            if type(mixer).__name__ in RECURRENT_LAYERS:
                mixer.layout = None
                mixer.forward = partial(run_packed, mixer, mixer.forward)
                # A decoder layer is given the layout, and not all of them hand it on. A hook also runs in front of the
                # second pass of gradient checkpointing, which may follow another micro-batch.
                decoder_layer.register_forward_pre_hook(partial(tell_layout, mixer), with_kwargs=True)


def tell_layout(mixer: nn.Module, decoder_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a decoder layer: its recurrent part learns a packed row's layout, or None."""
    mixer.layout = kwargs.get("layout")


def run_packed(
    mixer: nn.Module, forward: Callable[..., torch.Tensor], hidden_states: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """In place of the `forward` of a recurrent layer, which does the work.

    Args:
        hidden_states: (B, L, hidden); B = 1 for a packed row.

    Returns:
        Likewise.
    """
    layout: Layout | None = mixer.layout
    if layout is None:
        return forward(hidden_states=hidden_states, **kwargs)
    runs, states, carried = layout.runs, hidden_states[0], Carried()
    cache = Cache(layers=[carried] * (mixer.layer_idx + 1))  # the layer looks into it at its own number
    prefixes = forward(
        hidden_states=states[runs.prefixes], attention_mask=runs.is_prefix, cache_params=cache
    )  # (N, P, hidden)
    carried.select(runs.owner)
    branches = forward(hidden_states=states[runs.branches], cache_params=cache)  # (B, C, hidden)
    outputs = torch.cat([prefixes[runs.is_prefix], branches[runs.is_branch]])  # (L, hidden)
    return torch.empty_like(states).index_copy(0, runs.order, outputs)[None]
