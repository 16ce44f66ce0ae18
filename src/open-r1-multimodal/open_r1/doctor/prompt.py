"""Checks the prompt of the first example: what the model reads, and what a saved processor would write."""

import inspect
from collections.abc import Iterator
from pathlib import Path

from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from open_r1.doctor.finding import Checks, Finding, failed, passed, warned
from open_r1.doctor.subject import Patient
from open_r1.models.families import family_of_processor
from open_r1.models.loading import load_processor
from open_r1.rewards import accuracy_reward, format_reward
from open_r1.running.data import Row, opens_think

SHOWN = 60  # characters of a prompt's end


def render(processor: ProcessorMixin, row: Row, **template_kwargs: str) -> str:
    """An example's prompt as text."""
    messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_kwargs)


def rendered(patient: Patient) -> Iterator[Finding]:
    """The question is in it, and a place for each image."""
    row, processor = patient.prepared_data["train_dataset"][0], patient.prepared_data["processing_class"]
    text = render(processor, row, **patient.template_kwargs)
    places, mend = text.count(processor.image_token), "mend the chat_template"
    if row["prompt"][-1]["content"].strip() not in text:
        yield failed("the prompt does not hold the question", mend)
    elif places != len(row["images"]):
        yield failed(f"the prompt has {places} places for {len(row['images'])} images", mend)
    else:
        yield passed(f"{len(text)} characters, {places} images, ends with {text[-SHOWN:]!r}")


def tags(patient: Patient) -> Iterator[Finding]:
    """Those that rewards look for: the prompt opens `<think>`, or asks for both."""
    rewards = [inspect.unwrap(reward) for reward in patient.reward_funcs]
    if not {accuracy_reward, format_reward}.intersection(rewards):
        return
    row, processor = patient.prepared_data["train_dataset"][0], patient.prepared_data["processing_class"]
    text = render(processor, row, **patient.template_kwargs)
    what = "the prompt neither ends with <think> nor asks for <think> and <answer>"
    remedy = "--chat_template base or instruct, or a template of yours with the tags"
    if opens_think(processor, **patient.template_kwargs):
        yield passed("the prompt opens <think>; completions start inside")
    elif "<think>" in text and "<answer>" in text:
        yield passed("the prompt asks for <think> and <answer>")
    else:
        yield (failed if format_reward in rewards else warned)(f"{what}, which is rewarded", remedy)


def saved(patient: Patient) -> Iterator[Finding]:
    """A checkpoint's processor renders what the run's does, under the same bounds for images."""
    row, processor = patient.prepared_data["train_dataset"][0], patient.prepared_data["processing_class"]
    folder = Path(patient.scratch.name, "processor")
    processor.save_pretrained(folder)
    again = load_processor(str(folder))
    same_text = render(again, row, **patient.template_kwargs) == render(processor, row, **patient.template_kwargs)
    bounds = family_of_processor(processor).pixel_bounds
    if not same_text or bounds(again) != bounds(processor):
        lost = "its image bounds" if same_text else "its prompt"
        yield failed(f"a saved processor has lost {lost}", "save_pretrained of this processor's class is at fault")
    else:
        yield passed("a saved processor renders the same text, with the same image bounds")


CHECKS: Checks = {"rendered": rendered, "tags": tags, "saved": saved}
