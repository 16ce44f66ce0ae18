"""Runs an evaluation: answers what is not answered yet, scores everything, and loses no work."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_r1.answers.statistics import judge_row, response_shares, score, table, unread_warning
from open_r1.base.errors import Mistake, naming_option, printable
from open_r1.base.fields import Record, check
from open_r1.base.files import append_rows, read_json, read_rows, replace_file, to_json
from open_r1.base.hub import model_folder
from open_r1.base.locks import owned
from open_r1.evaluate.results import AnsweredRow, read_result
from open_r1.tasks.benchmarks import BENCHMARKS, Item, digest, read

if TYPE_CHECKING:  # re-scoring starts without torch
    from accelerate import PartialState

    from open_r1.evaluate.answering import Answerer

MEASURED = ("parser", "accuracy", "scores", "shares", "results")  # in a result file, what scoring adds


# --- names and places ---------------------------------------------------------------------------------------


def newest_grpo_output(outputs: Path) -> Path | None:
    """The newest model that a GRPO run left: a folder with trajectories, or a complete checkpoint in one."""
    runs = [folder.parent for folder in outputs.glob("*/trajectories")]
    # Both files are written when the rest of the model is there.
    marks = [mark for run in runs for mark in (run / "trainer_state.json", *run.glob("checkpoint-*/complete.json"))]
    models = ("config.json", "adapter_config.json")
    found = [mark for mark in marks if mark.is_file() and any(mark.with_name(name).is_file() for name in models)]
    return max(found, key=lambda mark: mark.stat().st_mtime).parent if found else None


def model_name(model_path: str) -> str:
    """The model's name for a file: its last path component, with the run's name before a `checkpoint-N`."""
    path = os.path.abspath(model_path) if os.path.isdir(model_path) else model_path  # whatever "." and ".." lead to
    names = [part for part in path.split("/") if part]
    return "_".join(names[-2:] if path.rstrip("/").rpartition("/")[2].startswith("checkpoint-") else names[-1:])


def result_path(args: argparse.Namespace) -> Path:
    """Where the result of a run with these options is written."""
    mode = "reasoning" if args.use_reasoning_prompt else "no_reasoning"
    name = f"{BENCHMARKS[args.benchmark].name}_result_{model_name(args.model_path)}_{mode}.json"
    return args.output_dir / name


def partial_paths(path: Path) -> list[Path]:
    """The unfinished work of a result: one file of JSON lines a process."""
    return sorted(path.parent.glob(f"{path.stem}.partial*.jsonl"))


def put_aside(path: Path) -> None:
    """Rename a file that is in the way by the time it was written, so that nothing measured is ever lost."""
    written = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S-%f")
    aside = path.with_name(f"{path.stem}.{written}{path.suffix}.old")
    path.replace(aside)
    print(printable(f"{path} was made with other settings; it is now {aside.name}"))


# --- results ------------------------------------------------------------------------------------------------


def make_result(rows: Sequence[dict[str, Any]], about: dict[str, Any], parser: str) -> dict[str, Any]:
    """The content of a result file.

    Args:
        rows: with responses; judged here.
        about: what the responses depend on (`args`, `settings`, ...); recorded as it is.
        parser: how answers are read, `lenient` or `strict`.
    """
    judged = [judge_row(row, parser) for row in rows]
    combination = BENCHMARKS[about["benchmark"]].combination
    scores = score(judged, combination)
    sources = {row.get("source") for row in judged}
    accuracy = {name: value["accuracy"] for name, value in scores.items() if name not in sources}
    if combination is not None:
        accuracy.setdefault(combination[0], None)  # not every source was asked
    return {
        **about,
        "parser": parser,
        "accuracy": accuracy,
        "scores": scores,
        "shares": response_shares(judged),
        "results": judged,
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, in a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, to_json(result, indent=1))


def report(path: Path, result: dict[str, Any]) -> None:
    """Print what was measured."""
    counts, prompt = result["shares"], result.get("prompt")
    print(table(result["scores"]))
    print(
        f"{counts['responses']} responses: {counts['unparsable_share']:.1%} without a readable answer, "
        f"{counts['truncated_share']:.1%} cut off"
        + (f"; {counts['image_errors']} without a usable image count as wrong" if counts["image_errors"] else "")
    )
    if warning := unread_warning(counts):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"prompt: {prompt['name']}, {prompt['style']}; " if prompt else "", f"parser: {result['parser']}", sep="")
    print(printable(path))


def join_rows(rows: Sequence[dict[str, Any]], items: Sequence[Item], origin: Path) -> list[dict[str, Any]]:
    """Rows as the reference writes them, in the data set's order, with the id, type and source of their questions.

    Raises:
        ValueError: a row asks something else than the question at its place; the message names it.
    """
    if len(rows) > len(items):
        raise Mistake(f"{origin}: {len(rows)} rows, but the data set has {len(items)} questions")
    for number, (row, item) in enumerate(zip(rows, items, strict=False)):
        if row["question"] not in (item.question, item.prompt) or row["ground_truth"] != item.answer:
            raise Mistake(
                f"{origin}: row {number}: {row['question']!r} is not the data set's {item.question!r} with the answer "
                f"{item.answer}; give the --dataset_path that was evaluated"
            )
    return [
        {**row, "id": item.id, "rotation": item.rotation, "type": item.type, "source": item.source}
        for row, item in zip(rows, items, strict=False)
    ]


def rescore(args: argparse.Namespace) -> None:
    """Read saved responses again: a result file of this script or of the reference, or a plain list of rows.

    The reference's rows know neither type nor source; with --dataset_path they get them, by their place in it.
    """
    content = read_result(args.precomputed_json)
    rows = content["results"]
    about = {key: value for key, value in content.items() if key not in MEASURED}
    if about.setdefault("benchmark", args.benchmark) not in BENCHMARKS:
        raise Mistake(f"{args.precomputed_json}: unknown benchmark {about['benchmark']!r}")
    if args.dataset_path and not any("id" in row for row in rows):
        items = read(BENCHMARKS[about["benchmark"]], args.dataset_path)
        rows = join_rows(rows, items, args.precomputed_json)
    path = args.output_dir / args.precomputed_json.name
    result = make_result(rows, about, args.parser)
    if path.exists() and read_json(path) != result:
        put_aside(path)
    write_result(path, result)
    report(path, result)


# --- unfinished work ----------------------------------------------------------------------------------------


def collect(path: Path, settings: dict[str, Any]) -> dict[tuple[Any, Any], dict[str, Any]]:
    """What has been answered under these settings, by id and rotation; work whose first line is another is put aside.

    Raises:
        ValueError: a line in the middle is damaged.
    """
    done = {}
    for partial in partial_paths(path):
        header, *rows = read_rows(partial) or [settings]
        check(Record, header, f"{partial}: line 1")
        if header != settings:
            put_aside(partial)
            continue
        for line, row in enumerate(rows, start=2):
            check(AnsweredRow, row, f"{partial}: line {line}")
            done[row["id"], row["rotation"]] = row
    return done


# --- the run ------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Evaluate, or score saved responses again, as the only one that writes the result.

    Raises:
        Mistake: another process writes it.
    """
    path = args.output_dir / args.precomputed_json.name if args.precomputed_json else result_path(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    with owned(path, is_file=True):
        (rescore if args.precomputed_json else evaluate)(args)


def evaluate(args: argparse.Namespace) -> None:
    """Answer what is not answered yet, then score everything."""
    with naming_option("--model_path"):
        folder = model_folder(args.model_path)
    items = read(BENCHMARKS[args.benchmark], args.dataset_path, args.limit)

    import accelerate
    import torch
    import transformers

    from open_r1.evaluate.answering import (
        BACKENDS,
        Answerer,
        check_prompts,
        generation_settings,
        load_prompting,
        messages,
        model_fingerprint,
    )
    from open_r1.models.families import family_of_processor

    # accelerate takes processes on the CPU for one another's strangers, each the main one, unless it is told of it.
    on_cpu = not torch.accelerator.is_available() or accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU")
    # A process that is done waits for the slowest, which may take longer than the default timeout.
    state = accelerate.PartialState(cpu=on_cpu, timeout=timedelta(days=1))
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if state.device.type == "cuda" else "float32"
    style = "reasoning" if args.use_reasoning_prompt else "direct"
    processor, prompt_name = load_prompting(folder, args.prompt, args.max_pixels, style=style)
    check_prompts(items, processor)
    least_pixels, most_pixels = family_of_processor(processor).pixel_bounds(processor)
    settings = {
        "benchmark": args.benchmark,
        "questions": digest(items),
        "model": model_fingerprint(folder),
        "prompt": {"name": prompt_name, "style": style, "template": processor.chat_template},
        "generation": generation_settings(processor, args.max_new_tokens),
        "pixels": {"min": least_pixels, "max": most_pixels},
        "backend": args.backend,
        "dtype": dtype,
    }
    state.print(f"{args.model_path}: {len(items)} prompts, chat template {prompt_name}, style {style}")
    path = result_path(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = read_json(path) if path.exists() else None
    answered = isinstance(earlier, dict) and settings.items() <= earlier.items()
    state.wait_for_everyone()  # nobody writes before all have read
    if answered:
        if state.is_main_process:
            print("answered before; the responses are scored again")
            args.precomputed_json = path
            rescore(args)
        return

    if state.is_main_process:
        collect(path, settings)  # mends or puts aside what a killed run left
    state.wait_for_everyone()
    done = collect(path, settings)
    missing = [item for item in items if item.key not in done]
    state.wait_for_everyone()  # nobody writes before all have read
    if missing:
        backend = BACKENDS[args.backend](folder, processor, state.device, dtype, style=style)
        partial = path.with_name(f"{path.stem}.partial{state.process_index}.jsonl")
        if not partial.exists() or partial.stat().st_size == 0:
            append_rows(partial, [settings])
        try:
            answer(Answerer(backend, processor, args.max_new_tokens), missing, args.bs, partial, state)
        except torch.OutOfMemoryError as error:
            raise Mistake(f"--bs {args.bs}: out of memory; a smaller one continues where this was") from error
    if not state.is_main_process:
        return

    done = collect(path, settings)
    example = processor.apply_chat_template(
        messages(items[0].images, items[0].prompt), add_generation_prompt=True, style=style
    )
    about = {
        "args": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        **settings,
        "prompt_example": example,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type,
        },
    }
    result = make_result([done[item.key] for item in items], about, args.parser)
    if path.is_file():
        put_aside(path)
    write_result(path, result)
    for partial in partial_paths(path):
        partial.unlink()
    report(path, result)


def answer(answerer: "Answerer", items: Sequence[Item], batch_size: int, partial: Path, state: "PartialState") -> None:
    """Answer this process's share of the items; each batch is on disk before the next one starts.

    Returns when all processes have answered theirs.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from open_r1.evaluate.answering import answer_batches, make_batches

    batches = make_batches(answerer, items, batch_size)[state.process_index :: state.num_processes]
    count, start = sum(map(len, batches)), time.perf_counter()
    with tqdm(total=count, desc="answering", unit="question", disable=not state.is_local_main_process) as bar:
        for answered in answer_batches(answerer, batches):
            append_rows(partial, [{**item.to_row(), **response.to_row()} for item, response in answered])
            bar.update(len(answered))
    seconds = time.perf_counter() - start
    rate = f"{count} questions in {seconds:.1f} s, {count / seconds:.2f} a second"
    told = gather_object([f"process {state.process_index}: {rate}"])
    if state.is_main_process:  # whose bar is gone: a line of another process could run into it
        print("\n".join(told))
