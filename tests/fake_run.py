"""The folder of a run that never ran: what training leaves behind, for a policy whose progress is made up. No torch."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from open_r1.answers.judgement import judgement_of
from open_r1.base.prompts import sat_question
from open_r1.world.parquet import sat_row
from open_r1.world.scene import LEVELS

VISION = "<|vision_start|><|image_pad|><|vision_end|>"
AHA = "But wait! Let me check that again."
STARTED = 1_790_000_000  # seconds since 1970
# The words of the base template.
HEAD = (
    "A conversation between User and Assistant. The user asks a question about the image, and the Assistant solves it."
)
PROMPT = f"{VISION}{HEAD}\nUser: {{}} \nAssistant: Let me solve this step by step.\n<think>"


def row(**changes: Any) -> dict[str, Any]:
    """A trajectory row, with changes."""
    base = {
        "step": 1,
        "prompt": PROMPT.format("Where is it? Choose between the following options: left or right"),
        "images": [],
        "solution": "left",
        "completion": "It is there.</think><answer>left</answer>",
        "rewards": {"accuracy_reward": 1.0, "format_reward": 1.0},
        "advantage": 0.5,
        "length": 10,
        "ended": True,
        "group": 0,
        "options": ["left", "right"],
        "reflections": [],
        "considered": None,
        "self_corrected": False,
    }
    return base | changes


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in rows))
    return path


def write_run(
    run: Path, rows: Iterable[dict] = (), eval_rows: Iterable[dict] = (), events: Iterable[dict] = (), **info: Any
) -> Path:
    """A run of these completions and log events; an empty part leaves no file."""
    run.mkdir(parents=True, exist_ok=True)
    base = {
        "command": "grpo",
        "started": "2026-11-23T10:00:00+00:00",
        "world_size": 1,
        "max_steps": 4,
        "model": "Qwen/Qwen2-VL-2B",
        "dataset": str(run.parent),  # where tests have their images
        "eval_dataset": None,
        "reward_funcs": ["accuracy_reward", "format_reward"],
        "arguments": {"learning_rate": 1e-6, "beta": 0.04, "num_generations": 8},
    }
    (run / "run.json").write_text(json.dumps(base | info))
    for name, lines in (("log", events), ("trajectories/train", rows), ("trajectories/eval", eval_rows)):
        if lines := list(lines):
            write_lines(run / f"{name}.jsonl", lines)
    return run


def write_images(folder: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of the rendered world, as `question`, `options`, `answer` and the paths of their `images`."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = []
    for number in range(count):
        asked = sat_row(number, seed, LEVELS["easy"])
        paths = []
        for at, data in enumerate(asked["image_bytes"]):
            paths.append(folder / f"{number:06d}_{at}.png")
            paths[-1].write_bytes(data)
        questions.append(
            {
                "question": sat_question(asked["question"], asked["answers"]),
                "options": asked["answers"],
                "answer": asked["correct_answer"],
                "images": [str(path) for path in paths],
            }
        )
    return questions


def fake_rows(
    questions: list[dict], steps: Iterable[int], last: int, prompts: int = 4, group: int = 8, seed: int = 0
) -> Iterable[dict[str, Any]]:
    """The completions of a run that learns: accuracy, length and reflections grow until step `last`."""
    draw = random.Random(seed)
    for step in steps:
        progress = min(step / last, 1) ** 0.7
        for number in range(prompts):
            asked = questions[(step * prompts + number) % len(questions)]
            rewards = []
            rows = []
            for _ in range(group):
                right = draw.random() < 0.3 + 0.5 * progress
                formatted = draw.random() < 0.1 + 0.88 * min(1, 3 * progress)
                reflective = draw.random() < 0.02 + 0.3 * progress**2
                wrong = draw.choice([option for option in asked["options"] if option != asked["answer"]])
                answer = asked["answer"] if right else wrong
                considered = draw.choice(asked["options"]) if reflective else answer
                length = max(8, int(draw.gauss(40 + 180 * progress**2, 12 + 40 * progress)))
                thought = f"The picture shows several shapes. Looking at them, the answer seems to be {considered}. "
                start = len(thought)
                if reflective:
                    thought += f"{AHA} Looking once more at where they stand, it is {answer}. "
                thought += "The other shapes do not change that. " * (length // 30)
                ended = length < 256
                text = f"{thought}</think> <answer> {answer} </answer>" if formatted else f"{thought}So: {answer}."
                rewards.append(float(right and formatted and ended) + float(formatted and ended))
                rows.append(
                    {
                        "step": step,
                        "prompt": PROMPT.format(asked["question"]),
                        "images": asked["images"],
                        "solution": asked["answer"],
                        "completion": text if ended else thought,
                        "rewards": {
                            "accuracy_reward": float(right and formatted and ended),
                            "format_reward": float(formatted and ended),
                        },
                        "judgement": judgement_of(
                            text if ended else thought, asked["answer"], asked["options"], ended=ended
                        ),
                        "length": min(length, 256),
                        "ended": ended,
                        "group": number,
                        "options": asked["options"],
                        "reflections": [[start, start + len(AHA)]] if reflective else [],
                        "considered": considered if reflective else None,
                        "self_corrected": reflective and formatted and ended and considered != answer,
                    }
                )
            mean = sum(rewards) / group
            deviation = (sum((reward - mean) ** 2 for reward in rewards) / max(group - 1, 1)) ** 0.5
            for record, reward in zip(rows, rewards, strict=True):
                yield record | {"advantage": (reward - mean) / (deviation + 1e-4)}


def fake_events(steps: int, seed: int = 0, eval_every: int = 0) -> Iterable[dict[str, Any]]:
    """The log of such a run."""
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        progress = step / steps
        rollout, scoring, update = (draw.gauss(mean, mean / 15) for mean in (6 + 8 * progress, 1.4, 5 + 2 * progress))
        time = STARTED + 20 * step
        yield {
            "step": step,
            "time": time,
            "loss": draw.gauss(0, 0.01),
            "grad_norm": abs(draw.gauss(0.8, 0.2)),
            "learning_rate": 1e-6 * (1 - progress),
            "reward": 0.4 + 1.2 * progress,
            "reward_std": max(0.05, draw.gauss(0.6 - 0.3 * progress, 0.06)),
            "frac_reward_zero_std": min(1, max(0, draw.gauss(0.2 + 0.3 * progress, 0.08))),
            "entropy": max(0.1, draw.gauss(1.6 - 0.9 * progress, 0.08)),
            "kl": max(0, draw.gauss(0.08 * progress, 0.008)),
            "step_time": rollout + scoring + update + 0.4,
            "time/rollout": rollout,
            "time/scoring": scoring,
            "time/update": update,
        }
        if eval_every and step % eval_every == 0:
            yield {"step": step, "time": time + 5, "eval_rewards/accuracy_reward/mean": 0.3 + 0.4 * progress}
