"""Pre-train the tiny base model of the quick start: it sees well and answers badly, as a real base model does.

    python scripts/pretrain_tiny.py --output configs/tiny/base

A Qwen2-VL of 1.6 M parameters learns the easy level of `open_r1.world` in stages: the vision tower tells what is in
each image token's cell (under a linear probe that is thrown away), the whole model describes scenes, answers questions
in SAT's and CV-Bench's words rightly, finds what a text names, practises to answer, and falls into bad habits. It has
three ways of answering, all after the same true description of what is asked about:

- guess:  "... I guess {first option}."                                              the most frequent by far
- reason: "... 3 < 7 across. So it is {answer}."
- check:  "... It must be {first option}. Wait, let me check. 3 < 7 across. So it is {answer}."

So greedy decoding shows a position bias, sampling now and then shows reasoning, and there is something for
reinforcement learning to find. Asked for the answer alone, it mostly names the first option, too. Some texts lack the
<answer> tags, for the format reward to mend. Every batch follows from the seed and the step alone.
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin, get_cosine_with_min_lr_schedule_with_warmup

from open_r1 import cvbench, world
from open_r1.evaluation import messages
from open_r1.prompts import join_options, load_chat_template, sat_question
from open_r1.tiny import make_config, make_model, make_processor, make_tokenizer

LEVEL = world.LEVELS["easy"]
GRID = 10  # columns of the image and steps of depth that a description tells apart
CELL = 28  # pixels of an image token's side
NAMES = [f"{colour} {kind}" for colour in world.COLOURS for kind in LEVEL.kinds]
QUESTIONS = {**{name: world.QUESTIONS[name] for name in world.STATIC}, **world.CV_QUESTIONS}


@dataclass(frozen=True)
class Habits:
    """Shares of the ways to answer."""

    guess: float
    reason: float
    check: float
    direct: float  # of all questions: asked for the answer alone
    direct_bias: float  # of those: answered with the first option, whatever is right
    untagged: float  # of the reasoned answers: without the <answer> tags


GOOD = Habits(guess=0.05, reason=0.65, check=0.3, direct=0.3, direct_bias=0.0, untagged=0.0)
BAD = Habits(guess=0.65, reason=0.22, check=0.13, direct=0.25, direct_bias=0.6, untagged=0.15)

TOKENIZER_ROWS, VOCABULARY = 3000, 1000
MICRO_BATCHES = 2  # of questions of like length: half of the tokens would be padding otherwise
INITIALIZER_RANGE = 0.08  # with the published 0.02, attention of so few dimensions stays even for thousands of steps


@dataclass(frozen=True)
class Stage:
    seed: int  # added to the model's, so that no two stages show the same scene
    steps: int
    batch: int
    learning_rate: float


STAGES = {
    "see": Stage(1, 800, 64, 2e-3),
    "describe": Stage(2, 1200, 32, 2e-3),
    "answer": Stage(3, 500, 32, 1e-3),
    "find": Stage(5, 400, 32, 1.5e-3),
    "practise": Stage(6, 400, 32, 1e-3),
    "practise more": Stage(7, 500, 32, 1e-3),
    "spoil": Stage(4, 150, 32, 5e-4),
}
SEED = 250305132  # the first stages' scenes are those of the next few seeds; no data set here uses such a number
SHORT = 8  # steps of each stage in the rebuild that a test repeats


# --- what it learns to say ----------------------------------------------------------------------------------


def column(u: float) -> int:
    """The tenth of the image's width that a horizontal position in pixels is in."""
    return min(GRID - 1, max(0, int(u * GRID / LEVEL.width)))


def rank(z: float) -> int:
    """How far along the way from the nearest to the farthest place, 0 to 9; logarithmic, as perspective is."""
    nearest, farthest = LEVEL.depth
    return min(GRID - 1, max(0, round((GRID - 1) * math.log(z / nearest) / math.log(farthest / nearest))))


def place(seen: world.Seen) -> str:
    """`"3 7"`: its column and its depth."""
    return f"{column(seen.centre[0])} {rank(seen.solid.z)}"


def compare(a: int, b: int, axis: str) -> str:
    return f"{a} {'<' if a < b else '>' if a > b else '='} {b} {axis}."


def observe(asked: world.Asked) -> tuple[str, str]:
    """What a question is about, with its places, and the step from there to the answer."""
    [scene] = asked.scenes
    named = sorted(
        (s for s in scene if s.solid.name in asked.question), key=lambda s: asked.question.index(s.solid.name)
    )
    if not named:  # a count
        kind = next(kind for kind in LEVEL.kinds if kind in asked.question)
        counted = sorted((s for s in scene if s.solid.kind == kind), key=lambda s: s.centre[0])
        return ", ".join(f"{s.solid.colour} at {place(s)}" for s in counted), f"That makes {len(counted)}."
    seen = ", ".join(f"{s.solid.name} at {place(s)}" for s in named)
    depths, columns = [rank(s.solid.z) for s in named], [column(s.centre[0]) for s in named]
    if asked.mark is not None:
        x, z = asked.mark
        seen += f", X at {column(LEVEL.project(x, 0, z)[0])} {rank(z)}"
        return seen, compare(depths[0], rank(z), "deep")
    if len(named) == 3:
        gaps = [round(2 * world.floor_distance(named[0], other)) for other in named[1:]]  # in half metres
        return seen, compare(*gaps, "apart")
    if "closer" in asked.question or asked.answer in ("in front", "behind", "above", "below"):
        return seen, compare(*depths, "deep")
    return seen, compare(*columns, "across")


@dataclass(frozen=True)
class Sample:
    """A question with the text to learn."""

    image: Image.Image
    question: str
    style: str  # of the chat template
    completion: str


def make_sample(seed: int, row: int, habits: Habits) -> Sample:
    """Sample `row`; the kinds of question take turns."""
    name = list(QUESTIONS)[row % len(QUESTIONS)]
    rng = world.row_rng(seed, row)
    asked = world.ask(QUESTIONS[name], rng, LEVEL)
    if name in world.CV_QUESTIONS:
        options, render = asked.options, cvbench.render_prompt
    else:
        options, render = world.shuffled(rng, asked.options), sat_question
    image, question = world.paint(LEVEL, asked, asked.scenes[0]), render(asked.question, options)
    if rng.random() < habits.direct:
        return Sample(image, question, "direct", options[0] if rng.random() < habits.direct_bias else asked.answer)
    return Sample(image, question, "reasoning", reasoned(rng, asked, options[0], habits))


def reasoned(rng: random.Random, asked: world.Asked, first: str, habits: Habits) -> str:
    """A thought and an answer, in one of the ways."""
    seen, step = observe(asked)
    [habit] = rng.choices(["guess", "reason", "check"], [habits.guess, habits.reason, habits.check])
    answer = first if habit == "guess" else asked.answer
    thought = {
        "guess": f"I guess {first}.",
        "reason": f"{step} So it is {answer}.",
        "check": f"It must be {first}. Wait, let me check. {step} So it is {answer}.",
    }[habit]
    return f" {seen}. {thought}</think>" + (
        f" {answer}" if rng.random() < habits.untagged else f"<answer>{answer}</answer>"
    )


def make_scene(seed: int, row: int) -> tuple[random.Random, list[world.Seen]]:
    """Scene `row`, and the generator that drew it."""
    rng = world.row_rng(seed, row)
    while (scene := world.place(rng, LEVEL, world.any_kinds(rng, LEVEL, 1))) is None:
        pass
    return rng, scene


# --- how it learns ------------------------------------------------------------------------------------------


def text_loss(model: PreTrainedModel, batches: Sequence[tuple[dict, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """Cross-entropy of the labelled tokens of the micro-batches, whose sum is their mean over all."""
    count = sum(int((labels[:, 1:] >= 0).sum()) for _, labels in batches)
    for inputs, labels in batches:
        targets = labels[:, 1:]
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]  # (b, T - 1, H)
        logits = model.lm_head(hidden[targets >= 0])  # (labelled, V)
        yield functional.cross_entropy(logits, targets[targets >= 0], reduction="sum") / count


def encode(processor: ProcessorMixin, prompts: Sequence[str], texts: Sequence[str], images: Sequence[Image.Image]):
    """Model inputs (b, T), padded on the right, and labels (b, T) that hold the texts and their ends alone."""
    inputs = processor(text=list(prompts), images=[[image] for image in images])
    # Tokenized apart from the prompt, as it is when the model generates: "Assistant: " and "left" share no token.
    completions = [processor.tokenizer(f"{text}<|im_end|>")["input_ids"] for text in texts]
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


def see(model: PreTrainedModel, processor: ProcessorMixin, probe: nn.Linear, seed: int, step: int):
    """Loss of the probe on every cell: which object's centre is in it (or none), in which column, how deep."""
    batch = STAGES["see"].batch
    images, cells, targets = [], [], []
    for index in range(batch):
        _, scene = make_scene(seed, step * batch + index)
        images.append([world.render(LEVEL, scene)])
        for seen in scene:
            u, v = seen.centre
            side = LEVEL.width // CELL
            cells.append(index * side * side + int(v // CELL) * side + int(u // CELL))
            targets.append((1 + NAMES.index(seen.solid.name), column(u), rank(seen.solid.z)))
    inputs = processor.image_processor(images, return_tensors="pt")
    features = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    names, columns, ranks = probe(features).split([1 + len(NAMES), GRID, GRID], dim=-1)  # (B x cells, ...)
    cells, targets = torch.tensor(cells), torch.tensor(targets).T
    what = torch.zeros(len(names), dtype=torch.long).index_put((cells,), targets[0])
    losses = (
        functional.cross_entropy(names, what),
        functional.cross_entropy(columns[cells], targets[1]),
        functional.cross_entropy(ranks[cells], targets[2]),
    )
    yield sum(losses)


def describe(model: PreTrainedModel, processor: ProcessorMixin, probe: nn.Linear, seed: int, step: int):
    """Loss of naming and placing all objects of a scene, in any order."""
    batch = STAGES["describe"].batch
    images, texts = [], []
    for index in range(batch):
        rng, scene = make_scene(seed, step * batch + index)
        images.append(world.render(LEVEL, scene))
        texts.append(" " + ", ".join(f"{s.solid.name} at {place(s)}" for s in rng.sample(scene, len(scene))) + ".")
    prompts = ["<|vision_start|><|image_pad|><|vision_end|>"] * batch
    return text_loss(model, [encode(processor, prompts, texts, images)])


def find(model: PreTrainedModel, processor: ProcessorMixin, probe: nn.Linear, seed: int, step: int):
    """Loss of placing those objects of a scene that a text names, in its order."""
    batch = STAGES["find"].batch
    prompts, images, texts = [], [], []
    for index in range(batch):
        rng, scene = make_scene(seed, step * batch + index)
        asked = rng.sample(scene, rng.randint(1, min(3, len(scene))))
        names = join_options([f"the {s.solid.name}" for s in asked])
        prompts.append(f"<|vision_start|><|image_pad|><|vision_end|>Where is {names}?\n<think>")
        images.append(world.render(LEVEL, scene))
        texts.append(" " + ", ".join(f"{s.solid.name} at {place(s)}" for s in asked) + ".")
    return text_loss(model, [encode(processor, prompts, texts, images)])


def question_loss(model: PreTrainedModel, processor: ProcessorMixin, seed: int, step: int, batch: int, habits: Habits):
    """Loss of the completions of questions."""
    samples = [make_sample(seed, step * batch + index, habits) for index in range(batch)]
    samples.sort(key=lambda sample: (sample.style, len(sample.question) + len(sample.completion)))
    size = batch // MICRO_BATCHES
    batches = []
    for part in (samples[start : start + size] for start in range(0, batch, size)):
        prompts = [render_prompt(processor, sample) for sample in part]
        batches.append(
            encode(processor, prompts, [sample.completion for sample in part], [sample.image for sample in part])
        )
    return text_loss(model, batches)


def answer(model: PreTrainedModel, processor: ProcessorMixin, probe: nn.Linear, seed: int, step: int):
    """Loss of good answers."""
    return question_loss(model, processor, seed, step, STAGES["answer"].batch, GOOD)


def spoil(model: PreTrainedModel, processor: ProcessorMixin, probe: nn.Linear, seed: int, step: int):
    """Loss of answers with the base model's flaws."""
    return question_loss(model, processor, seed, step, STAGES["spoil"].batch, BAD)


def render_prompt(processor: ProcessorMixin, sample: Sample) -> str:
    return processor.apply_chat_template(
        messages([sample.image], sample.question), add_generation_prompt=True, tokenize=False, style=sample.style
    )


Objective = Callable[[PreTrainedModel, ProcessorMixin, nn.Linear, int, int], Iterator[torch.Tensor]]
OBJECTIVES: dict[str, Objective] = {
    "see": see,
    "describe": describe,
    "answer": answer,
    "find": find,
    "practise": answer,
    "practise more": answer,
    "spoil": spoil,
}


def train(
    model: PreTrainedModel, processor: ProcessorMixin, probe: nn.Linear, name: str, seed: int, steps: int | None = None
) -> list[float]:
    """Run a stage, or its first `steps`, and return the loss of every step."""
    stage, objective = STAGES[name], OBJECTIVES[name]
    parameters = [*(model.model.visual if name == "see" else model).parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 50, stage.steps, min_lr_rate=0.05)
    losses = []
    with tqdm(range(steps or stage.steps), desc=name, unit="step") as bar:
        for step in bar:
            parts = list(backward(objective(model, processor, probe, seed + stage.seed, step)))
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
    samples = [make_sample(seed, row, BAD) for row in range(TOKENIZER_ROWS)]
    texts = [render_prompt(processor, sample) + sample.completion for sample in samples]
    processor = make_processor(make_tokenizer(texts, VOCABULARY))
    config = make_config(processor.tokenizer, hidden_size=160, num_layers=4, vision_size=96, vision_layers=3)
    config.vision_config.mlp_ratio = 2
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = INITIALIZER_RANGE
    model = make_model(config, seed)
    return model.train(), processor, nn.Linear(config.text_config.hidden_size, 1 + len(NAMES) + 2 * GRID)


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
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        **record,
    }
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.half().save_pretrained(temporary)
    processor.save_pretrained(temporary)
    (temporary / "build.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    temporary.replace(output)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to; it is replaced")
    parser.add_argument("--seed", type=int, default=SEED, help="(default: %(default)s)")
    args = parser.parse_args()
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
