"""Answers a benchmark's questions with a model: greedily, in batches of like length.

The prompts are rendered and the completions decoded by the code that training rolls out with
(`engines.backends`); only the sampling is greedy here.
"""

import copy
import hashlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, ProcessorMixin

from open_r1.base.errors import Mistake
from open_r1.base.images import BrokenImage
from open_r1.base.prompts import check_text, load_chat_template
from open_r1.base.videos import picture_sizes, pictures
from open_r1.engines.backends import Backend, load_transformers
from open_r1.engines.shared_prefix import Prompt
from open_r1.engines.vllm_backends import load_vllm
from open_r1.models.families import control_tokens, end_token_ids, family_of_processor, vision_token_ids
from open_r1.models.files import read_object
from open_r1.models.loading import adapter_base, check_template, load_processor
from open_r1.tasks.benchmarks import Item

PAPER_MAX_PIXELS = 401408  # what the paper trains and evaluates at
BACKENDS = {"hf": load_transformers, "vllm": load_vllm}
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096  # of a weight file, for its fingerprint


@dataclass(frozen=True)
class ItemResponse:
    """The response to one item; `error` says why it could not be asked."""

    response: str
    tokens: int
    truncated: bool
    error: str | None = None


# --- prompts and images ---------------------------------------------------------------------------


def trained_with(folder: str | Path) -> dict[str, Any] | None:
    """The settings of the run that left a model or checkpoint in a folder, as `run.json` has them; None without one."""
    folder = Path(folder)
    with suppress(OSError, Mistake):
        run = read_object((folder.parent if folder.name.startswith("checkpoint-") else folder) / "run.json")
        return run["arguments"] if isinstance(run.get("arguments"), dict) else None
    return None


def choose_chat_template(name: str, own: str | None, folder: str = "", is_trained: bool = False) -> tuple[str, str]:
    """The name and the text of the chat template to evaluate with.

    Args:
        name: `base`, `instruct` or a file; or `auto`, which never looks at the path: the template of a checkpoint that
            was trained here is used as it is, and so is one that knows `style`, as those of this project do; otherwise
            a checkpoint that ships ChatML is an instruct model, any other a base model.
        own: the checkpoint's chat template, if it has one.
        folder: where its family's templates are; see `Family.templates`.
        is_trained: whether a run of this project left the checkpoint.

    Raises:
        Mistake: no such file or name.
    """
    if name == "auto" and own is not None and (is_trained or re.search(r"\bstyle\b", own)):
        names = {load_chat_template(name, folder): name for name in ("base", "instruct")}
        return names.get(own, "checkpoint"), own
    if name == "auto":
        name = "instruct" if "<|im_start|>" in (own or "") else "base"
    return name, load_chat_template(name, folder)


def check_prompts(items: Sequence[Item], processor: ProcessorMixin) -> None:
    """Raise Mistake, with the question, for a prompt that the model would not read as text."""
    controls = control_tokens(processor)
    for item in items:
        try:
            check_text(item.prompt, controls)
        except Mistake as error:
            raise Mistake(f"question {item.id}: {error}") from error


def messages(images: Sequence[Any], text: str) -> list[dict[str, Any]]:
    """One user turn, its images first."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def placeholders(item: Item) -> list[Any]:
    """Placeholders for an item's pictures, a video's frames among them, in a prompt that is rendered and not asked."""
    with suppress(BrokenImage):
        return [size for data in item.images for size in picture_sizes(data)]
    return list(item.images)


# --- answers --------------------------------------------------------------------------------------


class Answerer:
    """Puts questions to a backend, greedily, and reads what comes back as text.

    Args:
        backend: who generates; its chat template has the style of the questions.
        processor: the backend's.
        max_new_tokens: longest response.
    """

    def __init__(self, backend: Backend, processor: ProcessorMixin, max_new_tokens: int) -> None:
        self.backend, self.processor = backend, processor
        self.generation_config = GenerationConfig(**generation_settings(processor, max_new_tokens))
        # The other thread sets the padding of the processor's tokenizer, while this one is in use.
        self.tokenizer = copy.deepcopy(processor.tokenizer)

    def length(self, item: Item) -> int:
        """About how many tokens the prompt has; batches are sorted by it."""
        sizes = []
        for data in item.images:
            with suppress(BrokenImage):
                sizes += picture_sizes(data)
        text = len(self.tokenizer(item.prompt)["input_ids"])
        return text + family_of_processor(self.processor).count_image_tokens(self.processor, sizes)

    def encode(self, item: Item) -> Prompt | ItemResponse:
        """What can be done before the model is free, also in another thread.

        An item without a usable image has its response already, which says so.
        """
        try:
            images = [picture for data in item.images for picture in pictures(data)]
        except BrokenImage as error:
            return ItemResponse("", 0, False, str(error))
        return self.backend.encode(messages(images, item.prompt))

    def answer(self, encoded: Sequence[Prompt | ItemResponse]) -> list[ItemResponse]:
        """Answer encoded items, in their order."""
        prompts = [prompt for prompt in encoded if not isinstance(prompt, ItemResponse)]
        if not prompts:
            return list(encoded)
        completions = self.backend.generate(prompts, [1] * len(prompts), self.generation_config)
        answers = iter(map(self.read, completions.ids))
        return [prompt if isinstance(prompt, ItemResponse) else next(answers) for prompt in encoded]

    def read(self, ids: Sequence[int]) -> ItemResponse:
        """A completion as text."""
        cleaning = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        has_end = bool(ids) and ids[-1] in self.generation_config.eos_token_id
        return ItemResponse(self.tokenizer.decode(ids, **cleaning), len(ids), truncated=not has_end)


def generation_settings(processor: ProcessorMixin, max_new_tokens: int) -> dict[str, Any]:
    """Every setting, so that none is inherited from a checkpoint (Qwen2-VL's penalty is 1.05)."""
    return {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": 0,
        "eos_token_id": end_token_ids(processor),
        "pad_token_id": processor.tokenizer.pad_token_id,
        "suppress_tokens": vision_token_ids(processor),
    }


def load_prompting(
    folder: str | Path, prompt: str, max_pixels: int | None = None, **template_kwargs: str
) -> tuple[ProcessorMixin, str]:
    """The processor, with the chat template to evaluate with, and that template's name.

    Args:
        prompt: see `choose_chat_template`.
        max_pixels: larger images are shrunk to this area. None: the bound that the checkpoint was
            trained with here, or the paper's for a published checkpoint.
        template_kwargs: that the chat template will be rendered with.

    Raises:
        Mistake: what `load_processor`, `choose_chat_template` and `check_template` raise.
    """
    processor = load_processor(str(folder), max_pixels=max_pixels)
    family = family_of_processor(processor)
    own, is_trained = processor.chat_template, trained_with(folder) is not None
    name, processor.chat_template = choose_chat_template(prompt, own, family.templates, is_trained)
    if max_pixels is None and family.pixel_bounds(processor)[1] >= family.published_pixels:
        family.bound_images(processor, max_pixels=PAPER_MAX_PIXELS)
    check_template(processor, str(folder) if prompt == "auto" else prompt, **template_kwargs)
    return processor, name


def model_fingerprint(folder: Path) -> str:
    """A text that changes with the model in a folder: the Hub's commit, or a hash of sampled weights.

    For a LoRA run's folder, of the adapter and of its base.
    """
    if folder.parent.name == "snapshots":  # the Hub's cache
        return folder.name
    total = hashlib.sha256()
    if base := adapter_base(folder):
        total.update(model_fingerprint(base).encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        total.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for block in range(SAMPLED_BLOCKS):
                file.seek(block * size // SAMPLED_BLOCKS)
                total.update(file.read(BLOCK_BYTES))
    return total.hexdigest()


# --- the loop -------------------------------------------------------------------------------------


def make_batches(answerer: Answerer, items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Batches of like length, for little padding; the longest first: memory runs out at once or never."""
    ordered = sorted(items, key=answerer.length, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def answer_batches(answerer: Answerer, batches: Sequence[Sequence[Item]]) -> Iterator[list[tuple[Item, ItemResponse]]]:
    """Answer one batch after the other; the next one is prepared in a thread while the model works.

    Without a batch there is nothing to do: of several processes, one may get none.
    """

    def encode(batch: Sequence[Item]) -> list[Prompt | ItemResponse]:
        return [answerer.encode(item) for item in batch]

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(encode, batches[0]) if batches else None
        for number, batch in enumerate(batches, start=1):
            encoded = ahead.result()
            if number < len(batches):
                ahead = pool.submit(encode, batches[number])
            yield list(zip(batch, answerer.answer(encoded), strict=True))
