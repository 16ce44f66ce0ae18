"""Finds the images of a data set's row, and puts them into its prompt or takes them out."""

from typing import Any

from trl.data_utils import is_conversational, prepare_multimodal_messages

from open_r1.base.errors import Mistake
from open_r1.base.images import ImageSource


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
        ValueError: for images beside a prompt that is rendered text, and for parts that are neither image nor text.
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
