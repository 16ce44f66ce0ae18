"""Rollout without an inference server: every prompt is encoded and prefilled once, then its completions are decoded.

`generate` samples what transformers' `generate` samples from repeated prompts (tests/test_rollout.py), without its
repeated image encoding and prefill, without copying the cache for every token, and without computing finished rows
to the end.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, DynamicLayer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from open_r1.decoding import next_token_processors
from open_r1.families import family_of
from open_r1.front_door import Mistake
from open_r1.shared_prefix import Prompt, enable_grouping, join_images

# Dropping finished rows copies the cache of the others, so it waits until an eighth of the rows has finished.
KEEP_BELOW = 7 / 8


class RoomyLayer(DynamicLayer):
    """A cache layer that writes new tokens into room it has ahead.

    transformers' `DynamicLayer` copies all that it holds for every token, which is most of the time of decoding with
    a small model; its `StaticLayer` attends over all the room, filled or not.
    """

    room = 128  # tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, K, new, D) and return all keys and values (B, K, T, D), in one dtype (autocast gives two)."""
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffer = None
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.buffer is None or end > self.buffer.shape[-2]:
            batch, heads, _, dim = key_states.shape
            buffer = key_states.new_empty(2, batch, heads, end + self.room, dim)
            if start:
                buffer[0, :, :, :start], buffer[1, :, :, :start] = self.keys, self.values
            self.buffer = buffer
        self.buffer[0, :, :, start:end], self.buffer[1, :, :, start:end] = key_states, value_states
        self.keys, self.values = self.buffer[:, :, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep or repeat rows; the room is made anew for them."""
        super().reorder_cache(beam_idx)
        self.buffer = None


def make_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model of this configuration: with room where it attends to all, else as transformers has it.

    Rows are picked with `reorder_cache`, which the layers of recurrent parts have too.
    """
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def generate(
    model: PreTrainedModel, prompts: Sequence[Prompt], repeats: Sequence[int], generation_config: GenerationConfig
) -> list[list[int]]:
    """Sample completions, several of each prompt.

    Args:
        model: the language model decodes with `shared_prefix.grouped_attention` from then on.
        prompts: U encoded prompts of any lengths.
        repeats: how many completions of each.
        generation_config: sampling settings; `max_new_tokens` and `eos_token_id` are needed.

    Returns:
        The token ids of each completion with its end token, if it came to one; the prompts' order, repeats together.

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

    cache = make_cache(model.config)
    outputs = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **join_images(family_of(model), prompts, device),
    )
    cache.reorder_cache(owner.to(device))
    if not outputs.logits.isfinite().all():
        raise Mistake("the model's scores of the next token are no numbers: its weights are NaN, infinite or too large")
    logits = outputs.logits[owner.to(device), -1]  # (B, V)
    is_padded = bool((mask == 0).any())
    mask = mask[owner].to(device)  # (B, P)

    # The processors of `generate` itself, so that every sampling setting means here what it means there.
    generation_config, _ = model._prepare_generation_config(generation_config)
    process = next_token_processors(model, generation_config, ids.shape[1], device)
    history = ids[owner].to(device)  # (B, P + generated), what repetition penalties look at
    ends = torch.tensor(generation_config.eos_token_id, device=device).view(-1)

    output = torch.full((len(owner), generation_config.max_new_tokens), -1, device=device)  # (B, N)
    rows = torch.arange(len(owner), device=device)  # the completions that are still in the batch
    is_open = torch.ones_like(rows, dtype=torch.bool)
    for step in range(generation_config.max_new_tokens):
        scores = process(history, logits.float())  # (B, V)
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(dim=-1), num_samples=1)  # (B, 1)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        output[rows, step] = torch.where(is_open, token[:, 0], -1)
        is_open = is_open & ~torch.isin(token[:, 0], ends)
        remaining = int(is_open.sum())
        if remaining == 0 or step + 1 == generation_config.max_new_tokens:
            break
        history = torch.cat([history, token], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        if remaining <= KEEP_BELOW * len(rows):
            kept = is_open.nonzero()[:, 0]
            cache.reorder_cache(kept)
            rows, token, history, mask, next_position, is_open = (
                state[kept] for state in (rows, token, history, mask, next_position, is_open)
            )
        logits = model(
            input_ids=token,
            attention_mask=mask if is_padded else None,
            position_ids=(next_position + step)[:, None].expand(*positions.shape[:-2], -1, 1),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return [row[row >= 0].tolist() for row in output.cpu()]
