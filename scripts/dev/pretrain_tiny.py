"""Pre-train the tiny base of the quick start: a toy model built so that checking an answer pays.

    python scripts/dev/pretrain_tiny.py --output configs/tiny/base

A Qwen2-VL of 1.6 M parameters learns the easy level of `open_r1.world` in stages: the vision tower tells what is in
each image token's cell (under a linear probe that is thrown away), the whole model describes scenes, finds what a text
names, and answers the questions of SAT and CV-Bench, bare and then within their prompts: after a guess that holds
nothing, it looks again, says where the things are, and concludes. At last it falls into bad habits:

- glance: "It must be {first option}."                                            nearly always
- check:  "It must be {first option}. Wait, let me check. {what it sees} {step} So it is {answer}."    now and then

No habit is a short way to the right answer: nothing teaches it to answer rightly before it has looked again. So greedy
decoding shows a position bias, sampling now and then shows a self-correction, and reinforcement learning has something
to find that no reward names. Asked for the answer alone, it glances, too. Some texts lack the <answer> tags, for the
format reward to mend. Every batch follows from the seed and the step alone.
"""

import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src/open-r1-multimodal"))
from open_r1.base.errors import command_line, run, use_environment

use_environment()

import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin, get_cosine_with_min_lr_schedule_with_warmup

from open_r1.base.files import check_new_folder, replacing
from open_r1.base.prompts import join_options, load_chat_template, sat_question
from open_r1.evaluation.answering import messages
from open_r1.tiny import make_config, make_model, make_processor, make_tokenizer
from open_r1.world import questions
from open_r1.world.parquet import cvbench_prompt, row_rng
from open_r1.world.scene import COLOURS
from open_r1.world.words import (
    GRID,
    LEVEL,
    TURNS,
    column,
    draw,
    from_left,
    list_kind,
    list_places,
    observe,
    rank,
    things_in,
)

CELL = 28  # pixels of an image token's side
KIND_LABELS, COLOUR_LABELS = ("X", *LEVEL.kinds), ("", *COLOURS)
PROBED = (2, len(KIND_LABELS), len(COLOUR_LABELS), GRID, GRID)  # presence, kind, colour, column, depth
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Habits:
    """Shares of the ways to answer in what a stage shows."""

    check: float  # of the reasoned answers: looks again after its glance; the others keep to it
    first: float  # of the glances: at the first option; the others are at any
    direct: float  # of all questions: asked for the answer alone, and glanced at
    untagged: float  # of the reasoned answers: without the <answer> tags


# A token weighs less in a long text (`text_loss`): of 16 % checks that it sees, the model learns to make about 5 %.
BAD = Habits(check=0.16, first=0.85, direct=0.1, untagged=0.08)
HASTY = replace(BAD, check=0.5)
BIASED = Habits(check=1.0, first=0.85, direct=0.0, untagged=0.0)
GOOD = replace(BIASED, first=0.0)

TOKENIZER_ROWS, VOCABULARY = 3000, 1000
MICRO_BATCHES = 2  # of samples of like length: half of the tokens would be padding otherwise
INITIALIZER_RANGE = 0.08  # with the published 0.02, attention of so few dimensions stays even for thousands of steps

SEED = 250305132  # the stages' scenes are those of the next few seeds; no data set here uses such a number
SHORT = 8  # steps of each stage in the rebuild that a test repeats


# --- what it learns to say ------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A prompt about an image, with the completion to learn."""

    image: Image.Image
    prompt: str
    completion: str


def describe(processor: ProcessorMixin, rng: random.Random, row: int) -> Sample:
    """All things with their places, from left to right or by their kinds."""
    asked, image = draw(rng, row)
    things = things_in(asked)
    if rng.random() < 0.5:
        return Sample(image, IMAGE, list_places(from_left(things)))
    kinds = rng.sample(LEVEL.kinds, len(LEVEL.kinds))
    return Sample(image, IMAGE, "".join(list_kind(things, kind) for kind in kinds))


def find(processor: ProcessorMixin, rng: random.Random, row: int) -> Sample:
    """The things that the prompt names, in its order; or those of a kind."""
    asked, image = draw(rng, row)
    things = things_in(asked)
    if rng.random() < 0.5:
        things = rng.sample(things, rng.randint(1, min(3, len(things))))
        names = join_options([f"the {thing.name}" for thing in things])
        return Sample(image, f"{IMAGE}Where is {names}?\n<think>", list_places(things))
    kind = rng.choice(LEVEL.kinds)
    return Sample(image, f"{IMAGE}How many {kind}s?\n<think>", list_kind(things, kind))


def ask(processor: ProcessorMixin, rng: random.Random, row: int) -> Sample:
    """A question alone, answered well."""
    return make_sample(rng, row, GOOD)


def answer(processor: ProcessorMixin, rng: random.Random, row: int) -> Sample:
    """A question within its prompt, answered well after a glance at the first option."""
    return make_sample(rng, row, BIASED, processor)


def hurry(processor: ProcessorMixin, rng: random.Random, row: int) -> Sample:
    """A question within its prompt, half of the time not looked at again: skills outlast the bad habits so."""
    return make_sample(rng, row, HASTY, processor)


def spoil(processor: ProcessorMixin, rng: random.Random, row: int) -> Sample:
    """A question within its prompt, answered with the base model's flaws."""
    return make_sample(rng, row, BAD, processor)


def make_sample(rng: random.Random, row: int, habits: Habits, processor: ProcessorMixin | None = None) -> Sample:
    """Question `row`, within the prompt that evaluation uses when there is a processor."""
    asked, image = draw(rng, row)
    if TURNS[row % len(TURNS)] in questions.CV_QUESTIONS:
        options, render = asked.options, cvbench_prompt
    else:
        options, render = questions.shuffled(rng, asked.options), sat_question
    question = render(asked.question, options)
    glance = options[0] if rng.random() < habits.first else rng.choice(options)
    style = "direct" if rng.random() < habits.direct else "reasoning"
    completion = glance if style == "direct" else reasoned(rng, asked, glance, habits)
    if processor is None:
        return Sample(image, f"{IMAGE}{question}\n" + "<think>" * (style == "reasoning"), completion)
    prompt = processor.apply_chat_template(
        messages([image], question), add_generation_prompt=True, tokenize=False, style=style
    )
    return Sample(image, prompt, completion)


def reasoned(rng: random.Random, asked: questions.Asked, glance: str, habits: Habits) -> str:
    """A thought that begins with a glance, and an answer."""
    answer, thought = glance, f" It must be {glance}."
    if rng.random() < habits.check:
        seen, step = observe(asked)
        answer, thought = asked.answer, f"{thought} Wait, let me check.{seen} {step} So it is {asked.answer}."
    return f"{thought}</think>" + (f" {answer}" if rng.random() < habits.untagged else f"<answer>{answer}</answer>")


# --- how it learns --------------------------------------------------------------------------------


def text_loss(model: PreTrainedModel, processor: ProcessorMixin, samples: Sequence[Sample]) -> Iterator[torch.Tensor]:
    """Cross-entropy of the micro-batches' completions, whose sum is the mean over all samples of that of their tokens.

    So an answer alone weighs as much as a long thought does.
    """
    samples = sorted(samples, key=lambda sample: len(sample.prompt) + len(sample.completion))
    size = len(samples) // MICRO_BATCHES
    for start in range(0, len(samples), size):
        inputs, labels = encode(processor, samples[start : start + size])
        targets = labels[:, 1:]
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]  # (b, T - 1, H)
        logits = model.lm_head(hidden[targets >= 0])  # (labelled, V)
        losses = functional.cross_entropy(logits, targets[targets >= 0], reduction="none")  # (labelled,)
        lengths = (targets >= 0).sum(dim=1, keepdim=True).expand_as(targets)[targets >= 0]  # (labelled,)
        yield (losses / lengths).sum() / len(samples)


def encode(processor: ProcessorMixin, samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs (b, T), padded on the right, and labels (b, T) that hold the completions and their ends alone."""
    inputs = processor(text=[sample.prompt for sample in samples], images=[[sample.image] for sample in samples])
    # Tokenized apart from the prompt, as it is when the model generates: "Assistant: " and "left" share no token.
    completions = [processor.tokenizer(f"{sample.completion}<|im_end|>")["input_ids"] for sample in samples]
    rows = list(zip(inputs.pop("input_ids"), completions, strict=True))
    images_only = {name: torch.as_tensor(inputs[name]) for name in ("pixel_values", "image_grid_thw")}

    def pad(values: list[list[int]], padding: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=padding)

    return {
        "input_ids": pad([prompt + text for prompt, text in rows], processor.tokenizer.pad_token_id),
        "attention_mask": pad([[1] * len(prompt + text) for prompt, text in rows], 0),
        "mm_token_type_ids": pad(
            [kinds + [0] * len(text) for kinds, (_, text) in zip(inputs["mm_token_type_ids"], rows, strict=True)],
            0,
        ),
        **images_only,
    }, pad([[-100] * len(prompt) + text for prompt, text in rows], -100)


def see(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    probe: nn.Linear,
    views: Sequence[tuple[questions.Asked, Image.Image]],
) -> Iterator[torch.Tensor]:
    """Loss of the probe: whether a cell holds the centre of a thing, and of those that do its kind, colour and place.

    Kind and colour apart, so that either can be looked for.
    """
    side = LEVEL.width // CELL
    cells, targets = [], []
    for index, (asked, _) in enumerate(views):
        for thing in things_in(asked):
            cells.append(index * side * side + int(thing.v // CELL) * side + int(thing.u // CELL))
            colour, kind = ("", "X") if thing.name == "X" else thing.name.split()
            targets.append((KIND_LABELS.index(kind), COLOUR_LABELS.index(colour), column(thing.u), rank(thing.depth)))
    inputs = processor.image_processor([[image] for _, image in views], return_tensors="pt")
    features = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    presence, *others = probe(features).split(PROBED, dim=-1)  # (B x cells, ...)
    cells, targets = torch.tensor(cells), torch.tensor(targets).T
    present = torch.zeros(len(presence), dtype=torch.long).index_fill(0, cells, 1)
    yield functional.cross_entropy(presence, present) + sum(
        functional.cross_entropy(other[cells], target) for other, target in zip(others, targets, strict=True)
    )


@dataclass(frozen=True)
class Stage:
    """A part of the course."""

    seed: int  # added to the model's, so that no two stages show the same scene
    steps: int
    batch: int
    learning_rate: float
    sample: Callable[[ProcessorMixin, random.Random, int], Sample] | None = None  # None: the vision tower alone


STAGES = {
    "see": Stage(1, 1000, 64, 2e-3),
    "describe": Stage(2, 1200, 32, 2e-3, describe),
    "find": Stage(3, 800, 32, 2e-3, find),
    "ask": Stage(4, 1300, 32, 1.5e-3, ask),
    "answer": Stage(5, 250, 32, 1e-3, answer),
    "hurry": Stage(6, 200, 32, 5e-4, hurry),
    "spoil": Stage(7, 100, 32, 2e-4, spoil),
}


def losses_of(
    stage: Stage, model: PreTrainedModel, processor: ProcessorMixin, probe: nn.Linear, seed: int, step: int
) -> Iterator[torch.Tensor]:
    """The losses of a step's micro-batches."""
    rows = range(step * stage.batch, (step + 1) * stage.batch)
    rngs = [row_rng(seed + stage.seed, row) for row in rows]
    if stage.sample is None:
        return see(model, processor, probe, [draw(rng, row) for rng, row in zip(rngs, rows, strict=True)])
    return text_loss(model, processor, [stage.sample(processor, rng, row) for rng, row in zip(rngs, rows, strict=True)])


def train(
    model: PreTrainedModel, processor: ProcessorMixin, probe: nn.Linear, name: str, seed: int, steps: int | None = None
) -> list[float]:
    """Run a stage, or its first `steps`, and return the loss of every step."""
    stage = STAGES[name]
    parameters = [*(model.model.visual if stage.sample is None else model).parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 50, stage.steps, min_lr_rate=0.05)
    losses = []
    with tqdm(range(steps or stage.steps), desc=name, unit="step") as bar:
        for step in bar:
            parts = list(backward(losses_of(stage, model, processor, probe, seed, step)))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(sum(parts))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def backward(losses: Iterator[torch.Tensor]) -> Iterator[float]:
    """Run each micro-batch's backward pass before the next one's forward."""
    for loss in losses:
        loss.backward()
        yield loss.item()


def make_base(seed: int) -> tuple[PreTrainedModel, ProcessorMixin, nn.Linear]:
    """The model before it learns anything, its processor, and the probe of the first stage."""
    processor = make_processor(make_tokenizer([load_chat_template("base")]))
    samples = [answer(processor, row_rng(seed, row), row) for row in range(TOKENIZER_ROWS)]
    texts = [sample.prompt + sample.completion for sample in samples]
    processor = make_processor(make_tokenizer(texts, VOCABULARY))
    config = make_config(processor.tokenizer, hidden_size=160, num_layers=4, vision_size=96, vision_layers=3)
    config.vision_config.mlp_ratio = 2
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = INITIALIZER_RANGE
    model = make_model(config, seed)
    return model.train(), processor, nn.Linear(config.text_config.hidden_size, sum(PROBED))


def build(seed: int, steps: int | None = None) -> tuple[PreTrainedModel, ProcessorMixin, dict[str, list[float]]]:
    """Make and train the model.

    Args:
        seed: of the weights and, with each stage's own, of the scenes.
        steps: of every stage, to see whether a rebuild takes the same course; None trains to the end.

    Returns:
        The model, its processor, and the losses of every stage.
    """
    model, processor, probe = make_base(seed)
    return model, processor, {name: train(model, processor, probe, name, seed, steps) for name in STAGES}


def save(output: Path, model: PreTrainedModel, processor: ProcessorMixin, record: dict[str, Any]) -> None:
    """Write the checkpoint in half precision, and beside it `build.json`: how it was made."""
    record = {
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        **record,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        model.half().save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / "build.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        shutil.rmtree(output, ignore_errors=True)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write the checkpoint to; an earlier build is replaced"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="(default: %(default)s)")
    args = parser.parse_args()
    if not (args.output / "build.json").is_file():  # nor an earlier build
        check_new_folder(args.output)
    start = time.perf_counter()
    _, _, short = build(args.seed, SHORT)
    model, processor, losses = build(args.seed)
    minutes = round((time.perf_counter() - start) / 60, 1)
    losses = {name: [round(loss, 4) for loss in values] for name, values in losses.items()}
    save(
        args.output,
        model,
        processor,
        {"seed": args.seed, "minutes": minutes, "short_losses": short, "losses": losses},
    )
    print(f"{args.output}: {model.num_parameters()} parameters, {minutes} minutes")


if __name__ == "__main__":
    run(main)
