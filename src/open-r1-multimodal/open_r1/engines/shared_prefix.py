"""Scores the G completions of a group behind a single copy of the prompt that they share.

A micro-batch of groups becomes one packed row without padding:

    [prompt minus its last token] [last prompt token, c1 minus its last] [last prompt token, c2 minus its last] ...
     prefix, attends to itself     branch, attends to the prefix and itself

and so on for the next prompt. Every branch position predicts one completion token, positions go on from the prompt in
each branch, and the image is encoded once. The numbers are those of scoring G separate sequences
(tests/test_shared_prefix.py); the work is that of the unique tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from open_r1.engines.attention import ATTENTION, IMAGE_ATTENTION
from open_r1.engines.layout import Layout, locate_group
from open_r1.engines.recurrent import share_states
from open_r1.models.families import Family, ImageInputs, family_of


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that was rendered, tokenized and preprocessed once. P tokens."""

    input_ids: torch.Tensor  # (P,), image tokens expanded
    position_ids: torch.Tensor  # (P,), or of M-RoPE (3, P): time, height, width
    image_inputs: ImageInputs = field(default_factory=dict)  # empty without images
    image_features: Any = None  # the vision tower's output, where it is frozen; see `encode_images`
    images: tuple[Image.Image, ...] = ()  # as given, for an engine that encodes them itself

    def __len__(self) -> int:
        return len(self.input_ids)

    def continue_positions(self, count: int) -> torch.Tensor:
        """Positions (count,) or (3, count) of the text tokens that follow the prompt."""
        start = self.position_ids.max() + 1
        axes = self.position_ids.shape[:-1]
        return (start + torch.arange(count, device=self.position_ids.device)).expand(*axes, count)


def encode_prompt(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompt: list[dict[str, Any]] | str,
    **template_kwargs: Any,
) -> Prompt:
    """Render, tokenize and preprocess one conversation whose image parts hold images; on the CPU.

    Args:
        model: gives the positions (not wrapped).
        processor: with the chat template and the pixel bounds.
        prompt: messages with parts of type `image` (an image or a path) and `text`; or a text.
        template_kwargs: for the chat template.
    """
    if isinstance(prompt, str):
        inputs = processor(text=[prompt], return_tensors="pt", return_mm_token_type_ids=True)
    else:
        inputs = processor.apply_chat_template(
            [prompt],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **template_kwargs,
        )
    family = family_of(model)
    return Prompt(inputs["input_ids"][0], family.positions(model, inputs), family.images_of(inputs))


def images_of(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """The images in messages, in their order."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


@torch.no_grad()
def encode_images(model: PreTrainedModel, prompt: Prompt) -> Prompt:
    """The prompt with a frozen vision tower's output, which rollout, reference and policy share."""
    if not prompt.image_inputs:
        return prompt
    return replace(prompt, image_features=family_of(model).encode_images(model, prompt.image_inputs))


def join_images(family: Family, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Any]:
    """The model's image inputs of several prompts, in their order; empty without images."""
    prompts = [prompt for prompt in prompts if prompt.image_inputs]
    inputs: dict[str, Any] = dict(family.join_images([prompt.image_inputs for prompt in prompts], device))
    if prompts and all(prompt.image_features is not None for prompt in prompts):
        inputs["image_features"] = family.join_features([prompt.image_features for prompt in prompts])
    return inputs


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A micro-batch of groups as one row of L tokens; B completions of at most C tokens."""

    # input_ids (1, L), position_ids (1, L) or (3, 1, L), images, layout, scored positions (S,)
    model_inputs: dict[str, Any]
    labels: torch.Tensor  # (1, S): the token that each scored position predicts
    completion_mask: torch.Tensor  # (B, C)

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Values (1, S) of the scored positions -> (B, C), zero outside of completions."""
        return values.new_zeros(self.completion_mask.shape).masked_scatter(self.completion_mask, values)


def rows_by_prompt(prompts: Sequence[Prompt]) -> list[list[int]]:
    """The row numbers of each run of neighbours that have the same (not just an equal) prompt."""
    return [list(rows) for _, rows in groupby(range(len(prompts)), key=prompts.__getitem__)]


def pack(
    family: Family, prompts: Sequence[Prompt], completion_ids: torch.Tensor, completion_mask: torch.Tensor
) -> PackedBatch:
    """Pack completions behind their prompts.

    A prompt of tokens 7 8 9 with the completions 1 2 and 3 becomes a row that predicts their tokens:

        input_ids    7 8 | 9 1 | 9      prefix, and a branch for each completion
        position_ids 0 1 | 2 3 | 2
        scored             2 3   4      places in the row
        labels             1 2   3      what the model is to predict there

    Args:
        family: of the model that scores them.
        prompts: of each of the B rows; neighbours that are the same object share one copy.
        completion_ids: (B, C), padded on the right.
        completion_mask: (B, C), true or 1 on completion tokens; an empty row is left out.
    """
    device = completion_ids.device
    completion_mask = completion_mask.bool()
    lengths = completion_mask.sum(dim=1).tolist()
    ids, positions, scored, labels, groups, shared = [], [], [], [], [], []
    start = 0
    for rows in rows_by_prompt(prompts):
        prompt = prompts[rows[0]]
        prompt_ids, prompt_positions = prompt.input_ids.to(device), prompt.position_ids.to(device)
        shared.append(prompt)
        ids.append(prompt_ids[:-1])
        positions.append(prompt_positions[..., :-1])
        branch_lengths = [lengths[row] for row in rows if lengths[row]]
        continued = prompt.continue_positions(max(branch_lengths, default=0)).to(device)
        for row in rows:
            length = lengths[row]
            if length:
                ids += [prompt_ids[-1:], completion_ids[row, : length - 1]]
                positions += [prompt_positions[..., -1:], continued[..., : length - 1]]
                labels.append(completion_ids[row, :length])
        group = locate_group(start, len(prompt) - 1, branch_lengths, device)
        scored.append(torch.arange(start + group.prefix, start + group.length, device=device))
        groups.append(group)
        start += group.length
    if not labels:  # nothing to score: one position without a label keeps the model in the graph, with no gradient
        scored, labels = [torch.zeros(1, dtype=torch.long, device=device)], [torch.full((1,), -100, device=device)]
    model_inputs = {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat(positions, dim=-1).unsqueeze(-2),
        "layout": Layout(groups),
        "scored": torch.cat(scored),
        **join_images(family, shared, device),
    }
    if model_inputs["position_ids"].dim() == 2:
        # Positions that begin anew look like sequences of their own to transformers, which would make a mask (L, L) of
        # them; it takes a whole mask as it is, and `grouped_attention` reads none.
        model_inputs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return PackedBatch(model_inputs, torch.cat(labels)[None], completion_mask)


def score_completions(
    model: nn.Module,
    family: Family,
    prompts: Sequence[Prompt],
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    batch_size: int,
    with_entropy: bool = False,
    observe: Callable[[torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Score completions, the prompt of neighbours once.

    Args:
        model: prepared by `enable_grouping`, also behind the wrappers of a trainer.
        family: of the model.
        prompts: of each of the B rows; neighbours that are one object share it.
        completion_ids, completion_mask: (B, C), padded on the right.
        batch_size: rows of one forward pass.
        with_entropy: whether the entropies are wanted, too.
        observe: is shown the hidden states (1, S, H) that the LM head scores, inside of each forward pass, where
            ZeRO-3 has a place for what is made of them.

    Returns:
        Log-probabilities (B, C), entropies (B, C) or None, and how many tokens went through the model.
    """
    logps, entropies, tokens = [], [], 0
    # One forward a micro-batch, however many prompts it holds: under ZeRO-3 all ranks must run as many.
    for start in range(0, len(completion_ids), batch_size):
        rows = slice(start, start + batch_size)
        batch = pack(family, prompts[rows], completion_ids[rows], completion_mask[rows])
        outputs = model(**batch.model_inputs, shift_labels=batch.labels, fused_lm_head=True, observe=observe)
        logps.append(batch.unpack(outputs.log_probs))  # (b, C)
        if with_entropy:
            entropies.append(batch.unpack(outputs.entropy))
        tokens += batch.model_inputs["input_ids"].numel()
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None, tokens


def keep_scored(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the language model: keep the scored hidden states of a row, (1, S, hidden), and show them.

    So the LM head does not run over prompts. TRL's fused head would skip them too, but only with Triton.
    """
    if kwargs.get("scored") is not None:
        output.last_hidden_state = output.last_hidden_state[:, kwargs["scored"]]
    if kwargs.get("observe") is not None:
        kwargs["observe"](output.last_hidden_state)
    return output


def prepare_model(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Prepare a model (not wrapped) to be run: attention that is fast here, and what its family has to mend.

    cuDNN's attention, which torch prefers on GPUs of compute capability 9 and 10, plans anew for
    every shape (0.4 to 0.5 s, as reported), and rollouts have a new shape at every token: it is off
    in this process from then on. A vision tower that takes its images in a row attends with
    `image_attention`, also in place of flash-attn; other choices than these two stay.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    family, usual = family_of(model), ("sdpa", "flash_attention_2")
    if family.has_image_rows and model.config.vision_config._attn_implementation in usual:
        model.set_attn_implementation({"vision_config": IMAGE_ATTENTION})
    family.mend(model, processor)


def enable_grouping(model: PreTrainedModel) -> None:
    """Let a model score packed rows and decode with `grouped_attention`; not its vision tower.

    Other inputs give what they gave before.
    """
    if model.config.get_text_config()._attn_implementation == ATTENTION:
        return
    model.set_attn_implementation({"text_config": ATTENTION})
    backbone = model.base_model
    backbone.get_decoder().register_forward_hook(keep_scored, with_kwargs=True)
    share_states(backbone.get_decoder())
    encode, handed_over = backbone.get_image_features, []

    def take_features(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if "image_features" in kwargs:
            handed_over.append(kwargs.pop("image_features"))
        return args, kwargs

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        return handed_over.pop() if handed_over else encode(*args, **kwargs)

    # Not every family hands `get_image_features` the arguments that the backbone does not know itself.
    backbone.register_forward_pre_hook(take_features, with_kwargs=True)
    backbone.get_image_features = get_image_features
