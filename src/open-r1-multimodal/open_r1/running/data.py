"""Prepares examples as the data set that a trainer takes: images checked, long prompts left out."""

import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from tqdm import tqdm
from transformers import ProcessorMixin
from trl import ModelConfig
from trl.data_utils import prepare_multimodal_messages

from open_r1.base.errors import Mistake, printable
from open_r1.base.images import (
    EXTENSIONS,
    STORED,
    BrokenImage,
    ImageSource,
    check_image,
    image_bytes,
    image_size,
    opened,
)
from open_r1.base.prompts import join_options
from open_r1.configs import DataArguments
from open_r1.models.families import control_tokens, family_of_processor
from open_r1.models.loading import load_processor
from open_r1.models.templates import try_template
from open_r1.tasks.examples import Columns
from open_r1.tasks.mixture import iter_mixture, parts_of
from open_r1.tasks.unshown import NOTHING, PROMPT_FIELDS, unshown_texts

Row = dict[str, Any]
ROTATION_OF = "rotation_of"  # which question a row asks in one of two orders of its options
# How many images may break before a run stops: a share of the prompts, but this many at least.
BROKEN_SHARE, LEAST_BROKEN = 0.01, 10


def most_broken(prompts: int) -> int:
    """How many images may break during a run over so many prompts; half of them at most."""
    return max(min(LEAST_BROKEN, prompts // 2), int(BROKEN_SHARE * prompts))


def load_processor_from_args(
    model_args: ModelConfig, data_args: DataArguments, template_kwargs: dict[str, Any]
) -> ProcessorMixin:
    """`load_processor` with the values of a recipe, and its chat template tried."""
    processor = load_processor(
        model_args.model_name_or_path,
        chat_template=data_args.chat_template,
        min_pixels=data_args.min_pixels,
        max_pixels=data_args.max_pixels,
        revision=model_args.model_revision,
    )
    name = data_args.chat_template or str(model_args.model_name_or_path)
    try_template(processor, name, **template_kwargs)  # a template for texts alone will do, for data without images
    return processor


def load_datasets_from_args(
    data_args: DataArguments,
    processor: ProcessorMixin,
    template_kwargs: dict[str, str],
    checks: Sequence[Callable[[Row], None]] = (),
    max_answer_length: int | None = None,
    rotate_options: bool = False,
    has_begun: bool = False,
) -> tuple[Dataset, Dataset | None]:
    """`load_dataset` with the values of a recipe: what to train on; what is held out, never rotated."""
    load = partial(
        load_dataset,
        processor=processor,
        max_prompt_length=data_args.max_prompt_length,
        columns=columns_of(data_args),
        config=data_args.dataset_config,
        task=data_args.task,
        checks=checks,
        max_answer_length=max_answer_length,
        has_begun=has_begun,
        drop_unshown=data_args.drop_unshown,
        **template_kwargs,
    )
    train, held_out = data_args.dataset_name, data_args.eval_dataset_name
    return (
        load(train, split=data_args.dataset_train_split, rotate_options=rotate_options),
        load(held_out, split=data_args.dataset_test_split) if held_out else None,
    )


def columns_of(data_args: DataArguments) -> Columns:
    """The columns that a recipe names."""
    return Columns(
        data_args.question_column,
        data_args.answer_column,
        data_args.image_column,
        data_args.options_column,
    )


def opens_think(processor: ProcessorMixin, **template_kwargs: str) -> bool:
    """Whether the chat template ends a prompt inside an opened `<think>`: completions start there."""
    return _around_question(processor, **template_kwargs).rstrip().endswith("<think>")


def asks_for_thought(processor: ProcessorMixin, **template_kwargs: str) -> bool:
    """Whether the chat template opens `<think>`, or asks for one."""
    return "<think>" in _around_question(processor, **template_kwargs)


def _around_question(processor: ProcessorMixin, **template_kwargs: str) -> str:
    message = {"role": "user", "content": ""}
    return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False, **template_kwargs)


def store_image(source: ImageSource) -> str:
    """The path of an image file; bytes are written to a file in the cache of `datasets`."""
    data = image_bytes(source)
    if data is None:
        return str(source["path"] if isinstance(source, dict) else source)
    with opened(data) as image:
        extension = EXTENSIONS[image.format]
    digest = hashlib.sha256(data).hexdigest()
    path = Path(datasets.config.HF_DATASETS_CACHE, STORED, f"{digest}.{extension}")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # every process of a run may write it
        temporary.write_bytes(data)
        os.replace(temporary, path)
    return str(path)


def render_prompt(example: Row, processor: ProcessorMixin, **template_kwargs: str) -> str:
    """The text of an example's prompt; a Mistake where it has not one image token an image."""
    images = example["images"]
    messages = prepare_multimodal_messages(example["prompt"], images=images)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_kwargs)
    if (marks := text.count(processor.image_token)) != len(images):
        raise Mistake(f"chat_template: writes {marks} {processor.image_token} for {len(images)} images")
    return text


def count_prompt_tokens(
    example: Row, processor: ProcessorMixin, text: str | None = None, **template_kwargs: str
) -> int:
    """Length of an example's prompt in tokens, image tokens included, from the images' headers alone.

    Args:
        text: what `render_prompt` made of it; None renders it.
    """
    text = render_prompt(example, processor, **template_kwargs) if text is None else text
    sizes = [image_size(image) for image in example["images"]]
    family = family_of_processor(processor)
    images = family.count_image_tokens(processor, sizes) + family.count_frame_tokens(processor, sizes)
    # each image has one token in the text
    return len(processor.tokenizer(text)["input_ids"]) - len(sizes) + images


def warn_of_unshown(*sets: Any) -> None:
    """Name the columns that belong into a prompt, and that a trainer shows no model.

    Args:
        sets: data sets of either kind, dictionaries of such, or None; empty columns do not count.
    """
    unshown = {}  # names in their order
    for data in sets:
        for part in data.values() if isinstance(data, dict) else [data]:
            names = getattr(part, "column_names", None) or ()
            for name in (name for name in names if name in PROMPT_FIELDS):
                is_stream = isinstance(part, IterableDataset)  # whose cells are not known yet
                if is_stream or any(cell.as_py() not in NOTHING for cell in part.data.column(name)):
                    unshown[name] = None
    if unshown:
        names = ", ".join(unshown)
        print(f"warning: no prompt shows the columns {names}; only rewards get them", file=sys.stderr)


def in_two_orders(example: Row, question: int) -> list[Row]:
    """A question as it is, and with its first option last; both under its number, `ROTATION_OF`."""
    *system, asked = example["prompt"]
    options, rotated = example["options"], [*example["options"][1:], *example["options"][:1]]
    before, listed, after = asked["content"].rpartition(join_options(options) if options else "\n")
    if len(options) < 2 or not listed or example["solution"] not in options:
        raise Mistake("rotate_options: needs a question that lists its options, 'a, b or c', its answer among them")
    again = {**asked, "content": before + join_options(rotated) + after}
    first = {**example, ROTATION_OF: question}
    return [first, {**first, "prompt": [*system, again], "options": rotated}]


@contextmanager
def naming(source: str | Path, row: int) -> Iterator[None]:
    """In the block, what is wrong with a row is told with its file and number."""
    try:
        yield
    except (Mistake, jinja2.TemplateError) as error:  # a template of the user's may refuse a row
        raise Mistake(f"{source}: row {row}: {error}") from error


def load_dataset(
    source: str | Path,
    processor: ProcessorMixin,
    max_prompt_length: int | None = None,
    *,
    columns: Columns | None = None,
    config: str | None = None,
    split: str = "train",
    task: str | None = None,
    checks: Sequence[Callable[[Row], None]] = (),
    max_answer_length: int | None = None,
    rotate_options: bool = False,
    has_begun: bool = False,
    drop_unshown: bool = False,
    **template_kwargs: str,
) -> Dataset:
    """Read a data set; what is too long or spells a control token is left out, never truncated.

    Args:
        source, columns, config, split, task: see `mixture.parts_of`.
        processor: renders and measures the prompts.
        max_prompt_length: in tokens, image tokens included; None keeps every length.
        checks: each raises Mistake for a row that cannot be trained on.
        max_answer_length: in tokens; None keeps every length.
        rotate_options: every row is followed by itself in another order of its options; see
            `in_two_orders`.
        has_begun: whether a run that found every image whole is continued: then images that broke since (`most_broken`
            at most) are named, and their rows stay, so that the others keep their places.
        drop_unshown: whether rows whose prompts do not show all that they hold are trained on, with a warning, and not
            refused.
        template_kwargs: for the chat template.

    Raises:
        Mistake: something is wrong with a row (an image that cannot be opened, what its prompt does
            not show), which is named; or no example is left.
    """
    state = PartialState()
    controls, left_out, kept = control_tokens(processor), Counter(), []
    lost, hidden = [], []  # rows, in words: with a broken image; with more than their prompt shows
    examples = iter_mixture(parts_of(source, columns, config, split, task), must_exist=not has_begun)
    bar = tqdm(examples, desc="examples", unit="", disable=not state.is_main_process)
    for origin, row, example, unshown in bar:
        with naming(origin, row):
            example["images"] = [store_image(image) for image in example["images"]]
            before = len(kept)
            for check in checks:
                check(example)
            rows = in_two_orders(example, len(kept) // 2) if rotate_options else [example]
            answer = example["solution"] or ""
            texts = [*(message["content"] for message in example["prompt"]), answer]
            broken = None
            try:
                for path in example["images"]:
                    check_image(path)
            except BrokenImage as error:
                if not has_begun:
                    raise
                broken = error
            if any(token in text for text in texts for token in controls):
                left_out["a control token of the model in their text"] += 1
            elif max_answer_length and len(processor.tokenizer(answer)["input_ids"]) > max_answer_length:
                left_out[f"an answer over {max_answer_length} tokens (max_answer_length)"] += 1
            elif broken:
                lost.append(f"{origin}: row {row}: {broken}")
                kept += rows
            else:
                prompts = [render_prompt(asked, processor, **template_kwargs) for asked in rows]
                unshown += unshown_texts(example["prompt"], prompts[0])
                lengths = map(count_prompt_tokens, rows, repeat(processor), prompts)
                if max(lengths) > (max_prompt_length or math.inf):
                    reason = f"a prompt over {max_prompt_length} tokens"
                    left_out[f"{reason} (max_prompt_length, or fewer max_pixels)"] += 1
                else:
                    kept += rows
            if unshown and len(kept) > before:  # what is left out is not trained on
                hidden.append(f"{origin}: row {row}: its prompt does not show {', '.join(unshown)}")
    if hidden:
        line = f"{hidden[0]}; rows like this: {len(hidden)}"
        if not drop_unshown:
            raise Mistake(f"{line}; mend them, or train without it by --drop_unshown true")
        state.print(f"warning: {printable(line)}, all trained on (drop_unshown)")
    if len(lost) > most_broken(len(kept)):
        raise Mistake(f"{lost[0]}; {len(lost) - 1} more images broke since the run began; restore the data")
    for line in lost:
        state.print(f"warning: {printable(line)}; completions about it earn nothing")
    reasons = ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
    if not kept:
        raise Mistake(f"{source}: no example left; left out {reasons}")
    if left_out:
        all_rows = len(kept) + left_out.total()
        state.print(f"{source}: kept {len(kept)} of {all_rows} examples; left out {reasons}")
    names = dict.fromkeys(name for row in kept for name in row)
    rows = [{name: row.get(name) for name in names} for row in kept]  # each with all names
    try:
        # A field of another kind in every row reaches the rewards as it is.
        return Dataset.from_list(rows, on_mixed_types="use_json")
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise Mistake(f"{source}: a field holds what a table cannot: {error}") from error
