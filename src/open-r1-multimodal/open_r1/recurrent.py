"""Recurrent layers in a packed row: every branch starts from the state in which its prompt left them.

Attention sees a prefix through keys and values. A gated delta net sees it through a matrix that it carries from token
to token, and through the last inputs of its convolution. So in a group of a packed row (see `shared_prefix`) a
recurrent layer runs over the prefix once, and then over the branches as one batch that goes on from there.

Both runs are transformers' own forward pass, which knows how to go on from a cache; so its kernels are the ones that it
picks (fla's and causal-conv1d's where they are installed, on a GPU, else torch). Ours is the cache: it lets gradients
through.

A kind of layer is an entry in `CACHE_ARGUMENTS`. The tests then run over it.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

if TYPE_CHECKING:
    from open_r1.shared_prefix import Group, Layout

# The class of a recurrent layer -> the argument of its `forward` that takes the cache.
CACHE_ARGUMENTS = {"Qwen3_5GatedDeltaNet": "cache_params", "Lfm2ShortConv": "past_key_values"}


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

    def expand(self, count: int) -> None:
        """Carry the state of one sequence for `count` that go on from it; their gradients add up. Nothing before it."""
        for index, conv in self.conv_states.items():
            if conv is not None:
                last = conv[..., -self.conv_kernel_size[index] :]  # (1, channels, kernel or fewer)
                self.conv_states[index] = last.expand(count, -1, -1)
        for index, state in self.recurrent_states.items():
            if state is not None:
                self.recurrent_states[index] = state.expand(count, -1, -1, -1)


def share_states(model: nn.Module) -> None:
    """Let the recurrent layers of a model run over packed rows; other inputs give what they gave before."""
    for decoder_layer in model.modules():
        for mixer in decoder_layer.children():
            if type(mixer).__name__ in CACHE_ARGUMENTS:
                mixer.layout = None
                mixer.forward = partial(run_packed, mixer, mixer.forward)
                # A decoder layer is given the layout, and not all of them hand it on. A hook also runs in front of the
                # second pass of gradient checkpointing, which may follow another micro-batch.
                decoder_layer.register_forward_pre_hook(partial(tell_layout, mixer), with_kwargs=True)


def tell_layout(mixer: nn.Module, decoder_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a decoder layer: its recurrent part learns the layout of a packed row, None of another."""
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

    def go_on(states: torch.Tensor, carried: Carried) -> torch.Tensor:
        # every layer looks into the cache at its own number
        cache = Cache(layers=[carried] * (mixer.layer_idx + 1))
        return forward(hidden_states=states, **{CACHE_ARGUMENTS[type(mixer).__name__]: cache})

    return torch.cat([run_group(go_on, hidden_states[0], group) for group in layout.groups])[None]


def run_group(
    go_on: Callable[[torch.Tensor, Carried], torch.Tensor], hidden_states: torch.Tensor, group: "Group"
) -> torch.Tensor:
    """The prefix of a group, and its branches from there.

    Args:
        go_on: runs the layer over sequences (B, T, hidden) from what is carried, which it changes.
        hidden_states: (L, hidden), of the whole row.

    Returns:
        (group.length, hidden)
    """
    carried, outputs = Carried(), []
    if group.prefix:
        outputs.append(go_on(hidden_states[None, group.start : group.start + group.prefix], carried)[0])
    if group.lengths:
        carried.expand(len(group.lengths))
        branches = hidden_states[group.branches]  # (G, C, hidden)
        # A single token would take fla's kernel for decoding, which has no backward pass; the second is cut off again.
        longest = max(group.lengths)
        branches = branches.expand(-1, 2, -1) if longest == 1 else branches
        outputs.append(go_on(branches, carried)[:, :longest][group.is_token])  # (tokens, hidden)
    return torch.cat(outputs)
