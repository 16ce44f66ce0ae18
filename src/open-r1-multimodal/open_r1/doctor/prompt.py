"""Checks the prompt of the first example: what it contains, and whether a checkpoint saves the same."""

import inspect
from collections.abc import Iterator
from pathlib import Path

from open_r1.doctor.finding import Checks, Finding, failed, passed, warned
from open_r1.doctor.run import Run
from open_r1.models.families import family_of_processor
from open_r1.models.loading import load_processor
from open_r1.rewards import accuracy_reward, format_reward
from open_r1.running.data import render_prompt

SHOWN = 60  # characters of a prompt's end


def rendered(run: Run) -> Iterator[Finding]:
    """The prompt has the question in it, and a place for each image."""
    row = run.rows[0]
    text = render_prompt(row, run.processor, **run.template_kwargs)
    places, mend = text.count(run.processor.image_token), "correct the chat_template"
    if row["prompt"][-1]["content"].strip() not in text:
        yield failed("the prompt does not contain the question", mend)
    else:
        yield passed(f"{len(text)} characters, {places} images, ends with {text[-SHOWN:]!r}")


def tags(run: Run) -> Iterator[Finding]:
    """The tags that rewards look for: the prompt opens `<think>`, or asks for `<think>` and `<answer>`."""
    rewards = [inspect.unwrap(reward) for reward in run.reward_funcs]
    if accuracy_reward not in rewards and format_reward not in rewards:
        return
    text = render_prompt(run.rows[0], run.processor, **run.template_kwargs)
    what = "the prompt neither ends with <think> nor asks for the tags that are rewarded"
    remedy = "--chat_template base or instruct, or your own template with the tags"
    if run.prompt_opening:
        yield passed("the prompt opens <think>; completions start inside")
    elif "<think>" in text and "<answer>" in text:
        yield passed("the prompt asks for <think> and <answer>")
    elif format_reward in rewards:
        yield failed(what, remedy)
    else:
        yield warned(what, remedy)


def saved(run: Run) -> Iterator[Finding]:
    """A checkpoint's processor renders what the run's does, under the same bounds for images."""
    folder = Path(run.scratch.name, "processor")
    run.processor.save_pretrained(folder)
    again, bounds = load_processor(str(folder)), family_of_processor(run.processor).pixel_bounds
    row, kwargs = run.rows[0], run.template_kwargs
    same_text = render_prompt(row, again, **kwargs) == render_prompt(row, run.processor, **kwargs)
    if not same_text or bounds(again) != bounds(run.processor):
        lost = "its image bounds" if same_text else "its prompt"
        yield failed(f"a saved processor has lost {lost}", "the save_pretrained of its class is wrong")
    else:
        yield passed("a saved processor renders the same text, with the same image bounds")


CHECKS: Checks = (rendered, tags, saved)
