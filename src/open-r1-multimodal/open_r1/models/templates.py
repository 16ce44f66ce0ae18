"""Tries a chat template, which is a stranger's program, in a bounded process of its own before it is used."""

import json
import math
import os
import resource
import select
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from transformers import ProcessorMixin

from open_r1.base.errors import Mistake, first_line

MOST_SECONDS = 10
MOST_MEMORY = 2**30  # bytes beside those that the process has
MOST_LETTERS = 100_000  # of a prompt with one image and one word
MOST_REASON = 500  # letters of an error, which a template may write itself
_IN_TEMPLATE = "<template>"  # as Jinja names the file of a template that it got as text


class TooSlowError(Exception):
    """A template took all the time there is."""


def try_template(processor: ProcessorMixin, source: str, **template_kwargs: Any) -> str:
    """The prompt that a processor's chat template makes of one message with an image and a word.

    Args:
        source: what an error calls the template: its file, its name, or the model that it came with.
        template_kwargs: what it is going to be rendered with.

    Raises:
        ValueError: it cannot be rendered, or takes too long or too much memory; one line with the source and, where it
            is known, the template's line.
    """
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}

    def render() -> str:
        return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False, **template_kwargs)

    try:
        return within_bounds(render)
    except ValueError as error:
        raise Mistake(f"chat_template: {source}: {error}") from error


def within_bounds(render: Callable[[], str]) -> str:
    """What a function returns, called in a child of this process that may take so long, and so much memory.

    Nothing less would end what Python cannot interrupt, 10**10**9 for one.

    Raises:
        ValueError: what it raised, or that it took too much; one line.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        _be_the_child(render, sender)
    os.close(sender)
    with open(receiver, "rb") as answer:
        ready, _, _ = select.select([answer], [], [], MOST_SECONDS + 1)
        if not ready:
            os.kill(child, signal.SIGKILL)
        content = answer.read()
    os.waitpid(child, 0)
    if not content:
        raise Mistake(f"has not made a prompt after {MOST_SECONDS} s, or in {MOST_MEMORY // 2**20} MiB; it may loop")
    answered = json.loads(content)
    if "error" in answered:
        raise Mistake(answered["error"])
    return answered["text"]


def _be_the_child(render: Callable[[], str], sender: int) -> NoReturn:
    """Answer through the pipe, and be gone without anything that the parent is going to do at its own end."""
    try:
        signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
        _bound_memory()
        try:
            text = render()
            if len(text) > MOST_LETTERS:
                raise Mistake(f"makes a prompt of {len(text)} letters of one image and one word")
            answer = {"text": text}
        except Exception as error:  # a template can raise anything
            answer = {"error": describe(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(sender, json.dumps(answer).encode())
    finally:  # whatever happened, this process must not go on as its parent
        os._exit(0)


def _stop(*_: Any) -> NoReturn:
    raise TooSlowError(f"has not made a prompt after {MOST_SECONDS} s; it may loop")


def _bound_memory() -> None:
    """Take no more memory than `MOST_MEMORY` from now on, where the system tells how much this process has."""
    statistics = Path("/proc/self/statm")
    if statistics.is_file():
        size = int(statistics.read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = min(size + MOST_MEMORY, math.inf if most == resource.RLIM_INFINITY else most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def describe(error: BaseException) -> str:
    """What went wrong in a template, with its line there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _IN_TEMPLATE]
    if isinstance(error, jinja2.TemplateSyntaxError):
        lines.append(error.lineno)
    reason = first_line(error) or type(error).__name__
    if isinstance(error, MemoryError):
        reason = f"takes more than {MOST_MEMORY // 2**20} MiB"
    elif not isinstance(error, jinja2.TemplateError | TooSlowError | ValueError):
        reason = f"{type(error).__name__}: {reason}"
    return (f"line {lines[-1]}: {reason}" if lines else reason)[:MOST_REASON]
