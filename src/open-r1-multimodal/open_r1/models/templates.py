"""Tries a chat template, which is a program from elsewhere, in a separate process before it is used."""

import contextlib
import multiprocessing
import resource
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import jinja2
import psutil
from transformers import ProcessorMixin

from open_r1.base.errors import Mistake, first_line

MOST_SECONDS = 10
MOST_MEMORY = 2**30  # bytes beside those that the process has
MOST_REASON = 500  # letters of an error, which a template may write itself


def try_template(processor: ProcessorMixin, source: str, **template_kwargs: Any) -> str:
    """The prompt that a processor's chat template makes of one message with an image and a word.

    transformers renders templates in Jinja's sandbox, which bounds neither time nor memory, and some of what a template
    can compute (`10 ** 10 ** 9`) nothing in the same process could interrupt.

    Args:
        source: what an error calls the template: its file, its name, or the model that it came with.
        template_kwargs: what it is going to be rendered with.

    Raises:
        Mistake: it cannot be rendered, or takes too long or too much memory; where it is known, with the template's
            line.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_prompt, args=(sender, processor, template_kwargs))
    child.start()
    sender.close()  # so that a child that dies is the end of the pipe
    text = None
    reason = f"has not made a prompt after {MOST_SECONDS} s, or in {MOST_MEMORY >> 20} MiB; it may loop"
    try:
        if receiver.poll(MOST_SECONDS):
            text, reason = receiver.recv()
    except EOFError:
        pass  # the child was killed, as where memory ends
    finally:
        child.kill()
        child.join()
    if text is None:
        raise Mistake(f"chat_template: {source}: {reason}")
    return text


def _send_prompt(sender: Connection, processor: ProcessorMixin, template_kwargs: dict[str, Any]) -> None:
    """In the child: the prompt and None, or None and what is wrong with the template."""
    if sys.platform == "linux":
        _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
        most = psutil.Process().memory_info().vms + MOST_MEMORY
        with contextlib.suppress(ValueError):  # a stricter limit holds already
            resource.setrlimit(resource.RLIMIT_AS, (most, hard_limit))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    try:
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False, **template_kwargs)
    except Exception as error:  # a template can raise anything
        sender.send((None, _describe(error)))
    else:
        sender.send((text, None))


def _describe(error: Exception) -> str:
    """What went wrong in a template, with its line there."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]  # Jinja's name of a template in text
    if isinstance(error, jinja2.TemplateSyntaxError):
        lines.append(error.lineno)
    reason = first_line(error)
    if not reason or not isinstance(error, jinja2.TemplateError | ValueError):
        reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
    return (f"line {lines[-1]}: {reason}" if lines else reason)[:MOST_REASON]
