"""Finds what a record holds that its prompt would not show the model: videos, tools, a system message.

Any field of a record may be meant for a reward. But some are part of the prompt wherever their data set is used: a
video, the mark in a text that stands for it, the tools that may be called. A prompt without them asks something else.
"""

import mimetypes
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from open_r1.answers.checker import is_letter

# Beside questions, dialogues and images, the fields that TRL, transformers and LLaMA-Factory make prompts of.
PROMPT_FIELDS = ("videos", "video", "audios", "audio", "tools", "documents", "chat_template_kwargs")
PROMPT_FIELDS += ("system", "history", "input")
MARK = re.compile(r"<(image|video|audio)[ _-]?(\d*)>")  # stands for a medium in a text
NUMBERED_IMAGE = re.compile(r"image_?\d+")  # the name of a field with one of several images
OPTIONS = ("options", "choices")  # the fields that multiple choice is usually kept in
LABEL = re.compile(r"^[(\[]?[A-Za-z][)\].:]+\s*")  # in front of an option: "A. left"
SPOKEN = ("role", "content", "from", "value")  # what of a message a prompt shows
NOTHING = (None, "", [], {}, "[]", "{}")  # LLaMA-Factory writes its tools as JSON


def medium_of(value: Any) -> str | None:
    """What a field holds, by the name of its file: an image, a video, an audio file; of a list its first item's."""
    if isinstance(value, list):
        return medium_of(value[0]) if value else None
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:  # as datasets stores a file
        return medium_of(value["path"]) or "image"
    if not isinstance(value, str) or "\n" in value:
        return None
    kind = (mimetypes.guess_type(value)[0] or "").partition("/")[0]
    return kind if kind in ("image", "video", "audio") else None


def unshown_fields(record: Mapping[str, Any], shown: Collection[str | None], images: int) -> list[str]:
    """The fields that belong into a prompt and are not in it.

    Args:
        record: its fields that are not null.
        shown: the fields that its prompt, its options and its answer are made of.
        images: how many images the prompt shows.
    """
    unshown = []
    for name, value in record.items():
        if name in shown or value in NOTHING:
            continue
        medium = medium_of(value)
        if medium == "image" and (not images or NUMBERED_IMAGE.fullmatch(name)):
            unshown.append(f"the image in the field {name} (--image_column names it)")
        elif medium in ("video", "audio"):
            unshown.append(
                f"the {medium} in the field {name} (only images are shown; of a video give frames as images)"
            )
        elif name in PROMPT_FIELDS:
            unshown.append(f"the field {name}")
    return unshown


def unshown_options(record: Mapping[str, Any], solution: str | None, question: str) -> list[str]:
    """The options that the answer is a letter of, where the question names none of them."""
    question = " ".join(question.casefold().split())
    for name in OPTIONS:
        options = record.get(name)
        if not (solution and options and isinstance(options, list) and all(isinstance(text, str) for text in options)):
            continue
        texts = (" ".join(LABEL.sub("", text).casefold().split()) for text in options)
        if is_letter(solution, options) and not any(text in question for text in texts):
            hint = f"--options_column {name} writes them behind the question"
            return [f"the {name}, of which the answer is a letter ({hint})"]
    return []


def unshown_in_messages(messages: Sequence[Any], form: str) -> list[str]:
    """What messages and their parts hold beside role and content: media, calls of tools, a thought kept apart."""
    keys = set()
    for message in messages:
        for key, value in message.items():  # a number or a flag is a note about a message
            if key not in SPOKEN and isinstance(value, str | list | Mapping) and value not in NOTHING:
                keys.add(key)
        content = message.get("content", message.get("value"))
        for part in content if isinstance(content, list) else []:
            keys |= {key for key in part if key not in ("type", part.get("type")) and part[key] is not None}
    return [f"the {key} of a message in {form}" for key in sorted(map(str, keys))]


def unshown_marks(prompt: Sequence[Mapping[str, str]], images: int) -> list[str]:
    """The marks in a prompt's texts that stand for a medium which is not there."""
    marks = {
        mark[0]
        for message in prompt
        for mark in MARK.finditer(message["content"])
        if mark[1] != "image" or int(mark[2] or 0) > images
    }
    return [f"what {mark} stands for" for mark in sorted(marks)]


def unshown_texts(prompt: Sequence[Mapping[str, str]], rendered: str) -> list[str]:
    """The messages whose texts do not stand in the rendered prompt, one behind the other; kinds of space are one."""
    rest, missing = " ".join(rendered.split()), []
    for message in prompt:
        text = " ".join(message["content"].split())
        _, shown, behind = rest.partition(text) if text else ("", "", rest)
        if text and not shown:
            missing.append(f"the {message['role']} message, which the chat template leaves out")
        rest = behind if shown else rest
    return missing
