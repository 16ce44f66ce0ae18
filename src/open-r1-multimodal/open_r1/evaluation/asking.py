"""Asks a checkpoint one question: loads it, renders the prompt as the evaluation does, and answers greedily."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from trl.data_utils import prepare_multimodal_messages

from open_r1.base.errors import Mistake, naming_option
from open_r1.base.hub import model_folder
from open_r1.base.images import open_image
from open_r1.base.prompts import check_text
from open_r1.engines.backends import load_transformers
from open_r1.evaluation.answering import generation_settings, load_prompting, trained_with
from open_r1.models.families import control_tokens
from open_r1.tasks.unshown import unshown_texts


@dataclass(frozen=True)
class Query:
    """A question as it is put to a model.

    Attributes:
        question: the user's text.
        images: in front of it, as whatever `open_r1.base.images.open_image` takes.
        system: texts of system messages before it.
        unshown: what its record holds that no prompt shows (`open_r1.tasks.unshown`).
        origin: of the record, for errors.
    """

    question: str
    images: Sequence[Any] = ()
    system: Sequence[str] = ()
    unshown: Sequence[str] = ()
    origin: str = "the question"


def style_of(folder: Path) -> dict[str, str]:
    """What the chat template of a trained model was rendered with, such as `direct` of SFT; empty for another model."""
    kwargs = (trained_with(folder) or {}).get("chat_template_kwargs")
    style = kwargs.get("style") if isinstance(kwargs, dict) else None
    return {"style": style} if isinstance(style, str) else {}


def ask(model: str, asked: Query, chat_template: str = "auto", max_new_tokens: int = 700) -> str:
    """A checkpoint's greedy completion.

    Args:
        model: folder of a run (LoRA too) or Hub name.
        asked: the question.
        chat_template: base, instruct or a file; auto: as the evaluation chooses, in the style of the run's training.
        max_new_tokens: of the longest answer.

    Raises:
        Mistake: no such model, a prompt that does not show all of its record, or no tokens for an answer.
    """
    if max_new_tokens < 1:
        raise Mistake(f"max_new_tokens: expected a number above 0, not {max_new_tokens}")
    given = [{"role": "system", "content": text} for text in asked.system]
    given.append({"role": "user", "content": asked.question})
    conversation = prepare_multimodal_messages(given, [open_image(image) for image in asked.images])
    with naming_option("--model"):
        folder = model_folder(model)
    style = style_of(folder) if chat_template == "auto" else {}
    processor, _ = load_prompting(folder, chat_template, **style)
    with naming_option(asked.origin):
        for message in given:
            check_text(message["content"], control_tokens(processor))
    rendered = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False, **style)
    if unshown := [*asked.unshown, *unshown_texts(given, rendered)]:
        raise Mistake(f"{asked.origin}: its prompt does not show {', '.join(unshown)}")
    backend = load_transformers(folder, processor, "cuda" if torch.cuda.is_available() else "cpu", **style)
    settings = GenerationConfig(**generation_settings(processor, max_new_tokens))
    (ids,) = backend.generate([backend.encode(conversation)], [1], settings).ids
    return processor.decode(ids, skip_special_tokens=True)
