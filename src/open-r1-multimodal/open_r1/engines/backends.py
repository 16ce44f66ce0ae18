"""The interface of a rollout engine, for training and evaluation, and its implementation by transformers.

Another engine is a class with these two methods, as those of `vllm_backends`; for evaluation also a function in
`open_r1.evaluation.answering.BACKENDS` that loads it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from open_r1.engines.decoding import generate
from open_r1.engines.shared_prefix import Prompt, encode_images, encode_prompt, prepare_model
from open_r1.models.loading import load_checkpoint, reset_generation_config


@dataclass(frozen=True)
class Completions:
    """What was sampled, the completions of one prompt together, in the prompts' order.

    Attributes:
        ids: the tokens of each, with its end token if it came to one.
        logprobs: of each token where the engine knows them, else None.
        prompts: those that were asked, with what generating found out about them.
    """

    ids: list[list[int]]
    logprobs: list[list[float]] | None
    prompts: Sequence[Prompt]


class Backend(Protocol):
    """Generates completions."""

    def encode(self, prompt: list[dict[str, Any]] | str) -> Prompt:
        """What can be done before the model is free: see `shared_prefix.encode_prompt`. Safe in another thread."""

    def generate(self, prompts: Sequence[Prompt], repeats: Sequence[int], settings: GenerationConfig) -> Completions:
        """Sample `repeats` completions of each prompt; `settings` has `max_new_tokens` and `eos_token_id`."""


class TransformersBackend:
    """transformers, over `decoding.generate`: a prompt is encoded and prefilled once.

    Args:
        model: gives the prompts' positions (not wrapped).
        processor: renders the prompts.
        borrow: a context in which the model, whole on this process, may generate.
        keep_features: hand the vision tower's output out with the prompts; right where it is frozen.
        template_kwargs: for the chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        borrow: Callable[[], AbstractContextManager[PreTrainedModel]],
        keep_features: bool = False,
        **template_kwargs: Any,
    ):
        self.model, self.processor, self.borrow = model, processor, borrow
        self.keep_features, self.template_kwargs = keep_features, template_kwargs

    def encode(self, prompt: list[dict[str, Any]] | str) -> Prompt:
        return encode_prompt(self.model, self.processor, prompt, **self.template_kwargs)

    def generate(self, prompts: Sequence[Prompt], repeats: Sequence[int], settings: GenerationConfig) -> Completions:
        with self.borrow() as model:
            if self.keep_features:
                prompts = [encode_images(self.model, prompt) for prompt in prompts]
            return Completions(generate(model, prompts, repeats, settings), None, prompts)


def load_transformers(
    folder: str | Path,
    processor: ProcessorMixin,
    device: torch.device | str,
    dtype: str = "auto",
    **template_kwargs: Any,
) -> TransformersBackend:
    """transformers with the model of a folder on a device; a LoRA run's folder is merged into its base.

    Raises:
        Mistake: what `load_checkpoint` raises.
    """
    model = load_checkpoint(folder, dtype=dtype).to(device).eval()
    prepare_model(model, processor)
    reset_generation_config(model, processor)
    return TransformersBackend(model, processor, lambda: nullcontext(model), **template_kwargs)
