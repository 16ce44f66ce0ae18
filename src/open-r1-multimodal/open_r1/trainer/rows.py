"""Finds and opens a row's images, puts them into its prompt or takes them out, and renders the prompt as text."""

import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from accelerate.utils import gather_object
from PIL import Image
from transformers import ProcessorMixin
from trl.data_utils import is_conversational, prepare_multimodal_messages

from open_r1.base.errors import Mistake, printable
from open_r1.base.images import BrokenImage, ImageSource, image_name, open_image
from open_r1.engines.shared_prefix import images_of


def row_images(row: dict[str, Any]) -> list[ImageSource]:
    """The images of a dataset's row, by TRL's rule: those of `images` where there is such a column, else `image`."""
    if "images" in row:
        return list(row["images"] or [])
    return [] if row.get("image") is None else [row["image"]]


def put_images(messages: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    """The messages with these images in place of their own."""
    following = iter(images)
    return [
        {
            **message,
            "content": [
                {**part, "image": next(following)} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in messages
    ]


def with_images_inside(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose images are parts of its prompt.

    Raises:
        Mistake: for images beside a prompt that is rendered text, and for parts that are neither image nor text.
    """
    images = row_images(row)
    if not is_conversational(row):
        if images:
            raise Mistake("prompt: a text has no place for images; give a conversation ([{role, content}])")
        return row
    prompt = prepare_multimodal_messages(row["prompt"], images=images)
    kinds = {part["type"] for message in prompt for part in message.get("content") or []}
    if others := sorted(kinds - {"image", "text"}):
        raise Mistake(f"prompt: a part of type {others[0]} is not shown to the model; of a video give frames as images")
    return {**{name: value for name, value in row.items() if name not in ("image", "images")}, "prompt": prompt}


def prompts_with_images(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Each row's prompt with its images inside; equal neighbours share one object."""
    prompts = []
    for _, group in groupby(rows, key=lambda row: (row["prompt"], row_images(row))):
        group = list(group)
        prompts += [with_images_inside(group[0])["prompt"]] * len(group)
    return prompts


def without_images(row: dict[str, Any]) -> dict[str, Any]:
    """The row as if it had no images."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [part for part in message["content"] if part["type"] != "image"]}
            for message in prompt
        ]
    nothing = {name: value for name, value in (("images", []), ("image", None)) if name in row}
    return {**row, **nothing, "prompt": prompt}


def render_with_images(
    processor: ProcessorMixin,
    prompt: list[dict[str, Any]] | str,
    images: list[ImageSource],
    **template_kwargs: Any,
) -> tuple[str, list[str]]:
    """A prompt of the data set as text, and the names of its images.

    Args:
        processor: with the chat template.
        prompt: of a row.
        images: of the row, which go in front of the prompt's text.
        template_kwargs: for the chat template.
    """
    if not isinstance(prompt, str):
        messages = prepare_multimodal_messages(prompt, images=images)
        images = images_of(messages)
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_kwargs)
    return prompt, [image_name(image) or "(not a file)" for image in images]


class ImageReader:
    """Opens images in training, with a blank in place of one that broke since the data set was checked.

    A run ends only when more than `allowed` broke.

    Args:
        allowed: how many images may break, see `open_r1.running.data.most_broken`.
    """

    def __init__(self, allowed: int):
        self.allowed = allowed
        self.broken: set[str] = set()  # what is wrong with each

    def open(self, sources: Sequence[ImageSource]) -> tuple[list[Image.Image], bool]:
        """The images, a blank in place of one that is broken, and whether one is."""
        images, is_broken = [], False
        for source in sources:
            try:
                images.append(open_image(source))
            except BrokenImage as error:
                images.append(Image.new("RGB", (56, 56), "white"))
                is_broken = True
                message = str(error)
                if message not in self.broken:
                    self.broken.add(message)
                    line = f"warning: {printable(error)}; completions about it earn nothing"
                    print(line, file=sys.stderr, flush=True)
        return images, is_broken

    def check(self) -> None:
        """Add up what broke in all processes, which must all come here.

        Raises:
            Mistake: it is more than may break.
        """
        self.broken.update(gather_object(sorted(self.broken)))
        if len(self.broken) > self.allowed:
            raise Mistake(
                f"{len(self.broken)} images broke during training (allowed: {self.allowed}); "
                f"restore the data; one of them: {min(self.broken)}"
            )
