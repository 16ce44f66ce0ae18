"""Writes the model card of a run, its `README.md`: what was trained on what, what it scores, how to load and ask it."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from open_r1.answers.statistics import TOTAL, table
from open_r1.base.fields import check
from open_r1.base.files import replace_file
from open_r1.base.trajectories import CompletionRecord
from open_r1.evaluation.results import read_scored
from open_r1.reporting.comparison import markdown
from open_r1.reporting.curves import held_out_accuracies
from open_r1.reporting.runs import SETTINGS, TEACHER, LoggedRun, open_or_empty, read_lines, read_run, scan_trajectories

CARD = "README.md"
MAX_SHOWN_CHARS = 10_000  # of a text
TAGS = ["trl", "grpo", "vision-language", "spatial-reasoning", "open-r1-multimodal"]


def write_card(folder: Path, results: Sequence[Path] = ()) -> Path:
    """Write `README.md` in a run's folder.

    Args:
        folder: that training wrote.
        results: of evaluations of its model.

    Raises:
        OSError, Mistake: not a run, a damaged file.
    """
    path = folder / CARD
    replace_file(path, model_card(folder, results).encode("utf-8", errors="replace"))
    return path


def model_card(folder: Path, results: Sequence[Path] = ()) -> str:
    """The card's text, with the header that the Hub reads."""
    run, evaluated = read_run(folder), [read_scored(path) for path in results]
    parts = [
        f"# {folder.resolve().name}",
        introduction(run),
        "## Results",
        held_out_line(folder, run),
        *(benchmark_part(result) for result in evaluated),
        "## How to load and ask it",
        usage(folder, run),
        "## How it was trained",
        training_table(run),
    ]
    return "\n\n".join([f"---\n{header(folder, run, evaluated)}\n---", *filter(None, parts)]) + "\n"


def header(folder: Path, run: LoggedRun, results: Sequence[dict[str, Any]]) -> str:
    """The YAML header, made and checked by huggingface_hub."""
    name = folder.resolve().name
    scores = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=result["benchmark"],
            dataset_name=result["benchmark"],
            metric_type="accuracy",
            metric_value=round(100 * result["scores"][TOTAL]["accuracy"], 2),
        )
        for result in results
    ]
    base = run.info.model
    is_public = bool(base) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()
    data = ModelCardData(
        base_model=base if is_public else None,
        library_name="peft" if (folder / "adapter_config.json").is_file() else "transformers",
        pipeline_tag="image-text-to-text",
        tags=[tag for tag in TAGS if tag != "grpo" or run.info.command != "sft"],
        model_name=name,
        eval_results=scores or None,
    )
    return data.to_yaml().strip()


def introduction(run: LoggedRun) -> str:
    """One paragraph: what this model is."""
    rewards = " and ".join(f"`{name}`" for name in run.info.reward_funcs)
    how = f"with GRPO and the rewards {rewards}" if rewards else "by supervised fine-tuning"
    if run.info.arguments.get(TEACHER):
        how += " and a teacher"
    data = run.info.data.train
    digest = f" ({data.rows:,} examples, SHA-256 `{data.content[:16]}`)" if data else ""
    return (
        f"`{public(run.info.model)}`, trained {how} on `{public(run.info.dataset)}`{digest} by an open "
        "implementation of R1-Zero for vision-language models, on [TRL](https://github.com/huggingface/trl)."
    )


def public(name: str | None) -> str:
    """A name on the Hub as it is; of a path on this machine, which is nobody's business, its last part."""
    return Path(name or "").name if os.path.isabs(name or "") else name or ""


def held_out_line(folder: Path, run: LoggedRun) -> str:
    """The accuracy of the last evaluation on held-out questions, with its interval; empty without one."""
    with scan_trajectories(folder / "trajectories/eval.jsonl") as held_out:
        lines = [line for line in held_out_accuracies(run, held_out) if len(line.points)]
    sentences = []
    for line in lines:
        interval = "" if line.low is None else f" (95 % interval {100 * line.low[-1]:.1f} - {100 * line.high[-1]:.1f})"
        step, accuracy = line.points.steps[-1], 100 * line.points.values[-1]
        sentences.append(f"{line.label[:1].upper() + line.label[1:]} at step {step}: {accuracy:.1f} %{interval}.")
    return " ".join(sentences)


def benchmark_part(result: dict[str, Any]) -> str:
    """The scores of a result file, as the evaluation prints them."""
    prompt = result.get("prompt") or {}
    asked = f"prompt {prompt['name']}, {prompt['style']}; " if prompt else ""
    return f"**{result['benchmark']}** ({asked}greedy):\n\n{table(result['scores'])}"


def usage(folder: Path, run: LoggedRun) -> str:
    """Code that loads the model and asks it one question."""
    lines = ["from transformers import AutoModelForImageTextToText, AutoProcessor", ""]
    if (folder / "adapter_config.json").is_file():
        lines += [f'model = AutoModelForImageTextToText.from_pretrained("{public(run.info.model)}", dtype="auto")']
        lines += ['model.load_adapter("path/to/this")']
    else:
        lines += ['model = AutoModelForImageTextToText.from_pretrained("path/to/this", dtype="auto")']
    style = (run.info.arguments.get("chat_template_kwargs") or {}).get("style", "reasoning")
    lines += [
        'processor = AutoProcessor.from_pretrained("path/to/this")',
        'content = [{"type": "image", "url": "photo.jpg"}, {"type": "text", "text": "Which chair is closer?"}]',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,',
        f'    return_tensors="pt", style="{style}",',
        ")",
        "print(processor.decode(model.generate(**inputs, max_new_tokens=700)[0], skip_special_tokens=True))",
    ]
    note = "The chat template of the training is saved with the model"
    prompt = first_prompt(folder)
    example = "." if prompt is None else f"; a prompt:\n\n{code_block(prompt)}"
    return f"{code_block(chr(10).join(lines), 'python')}\n\n{note}{example}"


def first_prompt(folder: Path) -> str | None:
    """The prompt of a run's first completion."""
    with open_or_empty(folder / "trajectories/train.jsonl") as file:
        for origin, _, line in read_lines(file):
            return check(CompletionRecord, line, origin).prompt
    return None


def training_table(run: LoggedRun) -> str:
    """Recipe and settings, as Markdown."""
    rows = [("recipe", " + ".join(map(public, run.info.recipes)))]
    rows += [("data", public(run.info.dataset)), ("held-out", public(run.info.eval_dataset))]
    if teacher := run.info.arguments.get(TEACHER):
        rows.append(("teacher", public(str(teacher))))
    shown = ("max_steps", "completions_per_step", *SETTINGS)
    rows += [(name, run.info.arguments[name]) for name in shown if name in run.info.arguments]
    rows += [(f"changed: {name}", value) for name, value in run.info.overrides.items() if name not in shown]
    return markdown(["setting", "value"], [(name, _cell(value)) for name, value in rows if value not in (None, "")])


def _cell(value: Any) -> str:
    return "".join(f"\\{letter}" if letter in "|<>[]`*_\\" else letter for letter in " ".join(str(value).split())[:200])


def code_block(text: str, language: str = "") -> str:
    """The text in a Markdown code block that it cannot end: the fence is longer than any run of backticks in it."""
    text = text[:MAX_SHOWN_CHARS]
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 3)
    return f"{fence}{language}\n{text}\n{fence}"
