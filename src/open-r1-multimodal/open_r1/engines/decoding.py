"""Samples completions with transformers: a prompt is prefilled once for all its completions.

`generate` samples what transformers' `generate` samples from repeated prompts (tests/test_rollout.py), without its
repeated image encoding and prefill, without copying the cache for every token, and without computing finished rows
to the end. Between two looks at which rows have ended the host does not wait for a GPU: it launches the kernels of one
token after another, unless a setting such as `no_repeat_ngram_size` reads the tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, DynamicLayer, GenerationConfig, PreTrainedModel

from open_r1.base.errors import Mistake
from open_r1.engines.shared_prefix import Prompt, enable_grouping, join_images
from open_r1.models.families import family_of
from open_r1.settings.generation import next_token_processors

# Dropping finished rows copies the others' cache, so it waits until an eighth has finished.
KEEP_BELOW = 7 / 8
NO_NUMBERS = "the model's scores of the next token are no numbers: its weights are NaN, infinite or too large"


class RoomyLayer(DynamicLayer):
    """A cache layer that writes new tokens into room it has ahead.

    transformers' `DynamicLayer` copies all that it holds for every token, which is most of the time of decoding with
    a small model; its `StaticLayer` attends over all the room, filled or not. With room for a whole completion its
    keys and values stay where they are until rows are dropped.

    Args:
        room: for how many tokens behind those that come first.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, K, new, D), under autocast of two dtypes; return all keys and values (B, K, T, D)."""
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, length, dim = key_states.shape
            self.buffer = key_states.new_empty(2, batch, heads, length + self.room, dim)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.buffer[0, :, :, start:end], self.buffer[1, :, :, start:end] = key_states, value_states
        self.keys, self.values = self.buffer[:, :, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep or repeat rows, with the room behind them; fewer rows move to the front of the buffer."""
        length = self.get_seq_length()
        held = self.buffer[:, beam_idx, :, :length]
        if held.shape[1] > self.buffer.shape[1]:
            self.buffer = held.new_empty(*held.shape[:3], *self.buffer.shape[3:])
        self.buffer = self.buffer[:, : held.shape[1]]
        self.buffer[:, :, :, :length] = held
        self.keys, self.values = self.buffer[:, :, :, :length]


def padding_bias(mask: torch.Tensor, room: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores of attention so that they pass over padding: -inf there, else 0.

    A mask of two dimensions would make transformers ask the host at each token whether it hides anything, and one of
    bools would be turned into this at each token and layer.

    Args:
        mask: (B, P), 1 on the prompts' tokens.
        room: for how many tokens behind them.

    Returns:
        (B, 1, 1, P + room or a little more): CUDA's kernel wants rows at multiples of 8.
    """
    width = -(-(mask.shape[1] + room) // 8) * 8
    is_padding = F.pad(mask == 0, (0, width - mask.shape[1]))
    return torch.zeros(is_padding.shape, dtype=dtype).masked_fill(is_padding, -float("inf"))[:, None, None]


def tokens_between_looks(device: torch.device) -> int:
    """How many tokens are decoded between two looks at which rows have ended.

    At each look the host waits for the GPU. On a CPU there is nothing to wait for, and to drop rows as soon as they end
    was no slower (docs/measured.md).
    """
    return 1 if device.type == "cpu" else 16


def next_tokens(scores: torch.Tensor, do_sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of scores (B, V) the highest token, or one drawn by the softmax of them.

    Probabilities are divided by noise from an exponential distribution: each is then the highest of its row with just
    this probability. `torch.multinomial` draws the same tokens in this way, but makes the host wait for a GPU twice to
    check them.

    Returns:
        (B,) tokens, and (B,) the values at them: NaN where the scores are no numbers.
    """
    if do_sample:
        scores = scores.softmax(dim=-1)
        scores /= torch.empty_like(scores).exponential_()
    highest, token = scores.max(dim=-1)
    return token, highest


@torch.no_grad()
def generate(
    model: PreTrainedModel, prompts: Sequence[Prompt], repeats: Sequence[int], generation_config: GenerationConfig
) -> list[list[int]]:
    """Sample completions, several of each prompt.

    Of the prompts 5 6 and 7 8 9 with `repeats` [2, 1], `max_new_tokens` 3 and the end token 0:

        prefill   [_ 5 6], [7 8 9]                   (U, P), padded on the left, each prompt once
        decoding  rows of the prompts 0, 0, 1        (B,), which copy their prompt's cache
        returned  [[4, 0], [3, 2, 0], [1, 1, 1]]     the last one was cut by the limit

    Args:
        model: the language model decodes with `shared_prefix.grouped_attention` from then on.
        prompts: U encoded prompts of any lengths.
        repeats: how many completions of each.
        generation_config: sampling settings; `max_new_tokens` and `eos_token_id` are needed.

    Returns:
        The token ids of each completion, with its end token if it came to one, prompt by prompt.

    Raises:
        Mistake: the model gives no numbers.
    """
    enable_grouping(model)
    device = model.device
    owner = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(repeats))  # (B,)

    def left_pad(rows: list[torch.Tensor], value: int = 0) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")

    ids = left_pad([prompt.input_ids for prompt in prompts], generation_config.pad_token_id or 0)  # (U, P)
    mask = left_pad([torch.ones_like(prompt.input_ids) for prompt in prompts])
    padded = [F.pad(prompt.position_ids, (ids.shape[1] - len(prompt), 0)) for prompt in prompts]
    positions = torch.stack(padded, dim=-2)  # (U, P) or (3, U, P)
    next_position = torch.stack([prompt.position_ids.max() + 1 for prompt in prompts])[owner].to(device)  # (B,)

    length, longest = ids.shape[1], generation_config.max_new_tokens  # P, N
    cache = DynamicCache(config=model.config)  # whose layers for recurrent parts stay
    cache.layers = [RoomyLayer(longest) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    outputs = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=True,
        # not `logits_to_keep=1`: with frozen weights on a CPU, its view has the LM head copied for each prompt
        scored=torch.tensor([length - 1], device=device),
        **join_images(family_of(model), prompts, device),
    )
    cache.reorder_cache(owner.to(device))
    if not outputs.logits.isfinite().all():
        raise Mistake(NO_NUMBERS)
    logits = outputs.logits[owner.to(device), -1]  # (B, V)

    # The logits processors of `generate` itself, so that a sampling setting means here what it means there.
    generation_config, _ = model._prepare_generation_config(generation_config)
    process = next_token_processors(model, generation_config, length, device)
    ends = torch.tensor(generation_config.eos_token_id, device=device).view(-1)

    history = F.pad(ids, (0, longest))[owner].to(device)  # (B, P + N), what repetition penalties look at
    bias = None
    if (mask == 0).any():
        dtype = next(layer.buffer.dtype for layer in cache.layers if isinstance(layer, RoomyLayer))
        bias = padding_bias(mask, longest, dtype)[owner].to(device)  # (B, 1, 1, P + N or a little more)
    output = torch.empty(len(owner), longest, dtype=torch.long, device=device)  # (B, N)
    rows = torch.arange(len(owner), device=device)  # the completions that are still in the batch
    is_open = torch.ones_like(rows, dtype=torch.bool)
    has_nan = torch.zeros((), dtype=torch.bool, device=device)
    interval = tokens_between_looks(device)
    for step in range(longest):
        end = length + step + 1  # of what history holds with this token
        token, highest = next_tokens(process(history[:, : end - 1], logits.float()), generation_config.do_sample)
        history[:, end - 1] = token
        has_nan |= highest.isnan().any()
        if step + 1 == longest:
            break
        if (step + 1) % interval == 0:
            is_open &= ~torch.isin(history[:, end - interval : end], ends).any(dim=1)
            remaining = int(is_open.sum())
            if remaining == 0:
                break
            if remaining <= KEEP_BELOW * len(rows):
                output[rows] = history[:, length:]
                kept = is_open.nonzero()[:, 0]
                cache.reorder_cache(kept)
                rows, token, history, next_position, is_open = (
                    state[kept] for state in (rows, token, history, next_position, is_open)
                )
                bias = None if bias is None else bias[kept]
        logits = model(
            input_ids=token[:, None],
            attention_mask=None if bias is None else bias[..., :end],
            position_ids=(next_position + step)[:, None].expand(*positions.shape[:-2], -1, 1),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    output[rows] = history[:, length:]
    if has_nan:
        raise Mistake(NO_NUMBERS)
    is_end = torch.isin(output, ends)
    lengths = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, longest)
    return [row[:kept] for row, kept in zip(output.tolist(), lengths.tolist(), strict=True)]
