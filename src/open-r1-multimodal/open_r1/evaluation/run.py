"""Runs an evaluation: answers what is not answered yet, scores everything, and loses no work."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_r1.answers.collapse import constant_answers
from open_r1.answers.statistics import TOTAL, judge_row, response_shares, score, table, unread_warning
from open_r1.base.errors import FileMistake, Mistake, naming_option, printable
from open_r1.base.fields import Record, check
from open_r1.base.files import append_rows, read_json, read_rows, replace_file, to_json
from open_r1.base.hub import model_folder
from open_r1.base.locks import is_main_process, owned
from open_r1.evaluation.lmms_eval import write_samples
from open_r1.evaluation.results import AnsweredRow, check_rows, read_result
from open_r1.tasks.benchmarks import SUITES, Benchmark, Item, MissingImages, digest, find_benchmark, locate, read

if TYPE_CHECKING:  # re-scoring starts without torch
    from accelerate import PartialState

    from open_r1.engines.backends import Backend
    from open_r1.evaluation.answering import Answerer

DEFAULT_BENCHMARK = "CV-Bench"
MEASURED = ("parser", "accuracy", "scores", "shares", "results")  # what scoring adds to a result


# --- names and places -----------------------------------------------------------------------------


def newest_grpo_output(outputs: Path) -> Path | None:
    """The newest model of a GRPO run: a folder with trajectories, or a complete checkpoint in one."""
    times = {}
    for trajectories in outputs.glob("*/trajectories"):
        run = trajectories.parent
        # Both files are written when the rest of the model is there.
        for mark in (*run.glob("trainer_state.json"), *run.glob("checkpoint-*/complete.json")):
            model = mark.parent
            if (model / "config.json").is_file() or (model / "adapter_config.json").is_file():
                times[model] = mark.stat().st_mtime
    return max(times, key=times.get, default=None)


def model_name(model_path: str) -> str:
    """The model's name for a file: its folder's, with the run's name before a `checkpoint-N`."""
    path = Path(model_path)
    if path.is_dir():
        path = Path(os.path.abspath(path))  # "." and ".." have names
    is_checkpoint = path.name.startswith("checkpoint-") and path.parent.name
    return f"{path.parent.name}_{path.name}" if is_checkpoint else path.name


def result_path(args: argparse.Namespace) -> Path:
    """Where the result of a run with these options is written."""
    mode = "reasoning" if args.use_reasoning_prompt else "no_reasoning"
    name = f"{find_benchmark(args.benchmark).name}_result_{model_name(args.model_path)}_{mode}.json"
    return args.output_dir / name


def partial_paths(path: Path) -> list[Path]:
    """The unfinished work of a result: one file of JSON lines a process."""
    return sorted(path.parent.glob(f"{path.stem}.partial*.jsonl"))


def put_aside(path: Path) -> None:
    """Rename a file by the time it was written, so that nothing measured is ever lost."""
    written = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S-%f")
    aside = path.with_name(f"{path.stem}.{written}{path.suffix}.old")
    path.replace(aside)
    print(printable(f"{path} is not what is asked for (other settings, parser or rows); it is now {aside.name}"))


# --- results --------------------------------------------------------------------------------------


def make_result(rows: Sequence[dict[str, Any]], about: dict[str, Any], parser: str) -> dict[str, Any]:
    """The content of a result file.

    Args:
        rows: with responses; judged here.
        about: what the responses depend on (`args`, `settings`, ...); recorded as it is.
        parser: how answers are read, `lenient` or `strict`.
    """
    judged = [judge_row(row, parser) for row in rows]
    benchmark = find_benchmark(about["benchmark"])
    scores = score(judged, benchmark.combinations, circular=benchmark.circular, adjusted=benchmark.adjusted)
    sources = {row.get("source") for row in judged}
    accuracy = {name: value["accuracy"] for name, value in scores.items() if name not in sources}
    for name in benchmark.combinations:
        accuracy.setdefault(name, None)  # not every group was asked
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


def publish(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, beside an earlier one with another content, and print what was measured."""
    if path.exists() and read_json(path) != result:
        put_aside(path)
    write_result(path, result)
    counts, prompt = result["shares"], result.get("prompt")
    print(table(result["scores"]))
    line = f"{counts['responses']} responses: {counts['unparsable_share']:.1%} without a readable answer"
    line += f", {counts['truncated_share']:.1%} cut off"
    if counts["image_errors"]:
        line += f"; {counts['image_errors']} without a usable image count as wrong"
    print(line)
    for warning in filter(None, [unread_warning(counts), *constant_answers(result["results"])]):
        print(f"warning: {printable(warning)}", file=sys.stderr)
    start = f"prompt: {prompt['name']}, {prompt['style']}; " if prompt else ""
    print(f"{start}parser: {result['parser']}")
    print(printable(path))


def join_rows(rows: Sequence[dict[str, Any]], items: Sequence[Item], origin: Path) -> list[dict[str, Any]]:
    """The reference's rows, in the data set's order, with their questions' id, type and source.

    Raises:
        Mistake: a row asks something else than the question at its place; the message names it.
    """
    if len(rows) > len(items):
        raise Mistake(f"{origin}: {len(rows)} rows, but the data set has {len(items)} questions")
    joined = []
    for number, (row, item) in enumerate(zip(rows, items, strict=False)):
        is_asked = row["question"] in (item.question, item.prompt)
        if not is_asked or row["ground_truth"] != item.answer:
            raise Mistake(
                f"{origin}: row {number}: {row['question']!r} is not the data set's {item.question!r} "
                f"with the answer {item.answer}; give the --dataset_path that was evaluated"
            )
        known = {"id": item.id, "rotation": item.rotation, "type": item.type, "source": item.source}
        joined.append(row | known)
    return joined


def rescore(args: argparse.Namespace) -> None:
    """Read saved responses again: a result file, ours or the reference's, or a plain list of rows.

    The reference's rows know neither type nor source; from --dataset_path they get them, by place.

    Raises:
        Mistake: what `read_result` and `join_rows` raise, or the file answers another benchmark than `--benchmark`.
    """
    content = read_result(args.precomputed_json)
    rows = content["results"]
    about = {key: value for key, value in content.items() if key not in MEASURED}
    with naming_option(str(args.precomputed_json)):
        benchmark = find_benchmark(about.setdefault("benchmark", args.benchmark or DEFAULT_BENCHMARK))
    if args.benchmark not in (None, about["benchmark"]):
        raise Mistake(
            f"--benchmark {args.benchmark}: {args.precomputed_json} answers {about['benchmark']}; leave --benchmark out"
        )
    if args.dataset_path and not any("id" in row for row in rows):
        items = read(benchmark, args.dataset_path)
        rows = join_rows(rows, items, args.precomputed_json)
    path = args.output_dir / args.precomputed_json.name
    publish(path, make_result(rows, about, args.parser))


# --- unfinished work ------------------------------------------------------------------------------


def collect_answered(path: Path, settings: dict[str, Any]) -> dict[tuple[Any, Any], dict[str, Any]]:
    """What has been answered under these settings, by id and rotation; other work is put aside.

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


# --- the run --------------------------------------------------------------------------------------


def run(args: argparse.Namespace, load: "Callable[..., Backend] | None" = None) -> None:
    """Evaluate, or score saved responses again, as the only one that writes the result.

    Args:
        load: see `evaluate`.

    Raises:
        Mistake: another process writes it, or what `evaluate` and `rescore` raise.
    """
    if args.precomputed_json and args.limit:
        raise Mistake("--limit: --precomputed_json scores every response of its file; leave --limit out")
    if args.benchmark in SUITES and not args.precomputed_json:
        evaluate_suite(args)
        return
    path = args.output_dir / args.precomputed_json.name if args.precomputed_json else result_path(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    with owned(path, is_file=True):
        if args.precomputed_json:
            rescore(args)
            export(args, path)
        else:
            evaluate(args, load)


def is_there(benchmark: Benchmark, folder: str | None) -> bool:
    """Whether the files of a benchmark are in a folder or, without one, to be had from the Hub."""
    try:
        return (folder is None or Path(folder).is_dir()) and bool(locate(benchmark, folder or benchmark.hub_id))
    except FileMistake:
        return False


def evaluate_suite(args: argparse.Namespace) -> None:
    """Evaluate each benchmark of a suite that is there, by one model, and print their scores as one table.

    Raises:
        Mistake: none of them is there, or what `evaluate` raises.
    """
    names, there = SUITES[args.benchmark], {}
    for name in names:
        folder = args.dataset_path and str(Path(args.dataset_path, name))
        if is_there(find_benchmark(name), folder):
            there[name] = argparse.Namespace(**{**vars(args), "benchmark": name, "dataset_path": folder})
    line = f"{args.benchmark}: {len(there)} of {len(names)} benchmarks are there"
    if missing := [name for name in names if name not in there]:
        line += f"; not in {args.dataset_path or 'the Hub'}: {', '.join(missing)}"
    if not there:
        raise Mistake(f"{line}; each belongs in a folder of its name")
    is_main = is_main_process()
    if is_main:
        print(printable(line))
    backends: list[Backend] = []

    def load(*arguments: Any, **options: Any) -> "Backend":
        from open_r1.evaluation import answering

        if not backends:
            backends.append(answering.BACKENDS[args.backend](*arguments, **options))
        return backends[0]

    done = []
    for name, one in there.items():
        try:
            run(one, load)
            done.append(one)
        except MissingImages as error:
            if is_main:
                print(f"warning: {name} is left out: {printable(error)}", file=sys.stderr)
    if done and is_main:
        print(f"\n{table(headlines(done))}")


def headlines(runs: Sequence[argparse.Namespace]) -> dict[str, dict[str, Any]]:
    """The score that each benchmark's authors publish, or its Total where a limit left out what that needs."""
    found = {}
    for one in runs:
        scores, name = read_json(result_path(one))["scores"], find_benchmark(one.benchmark).headline
        label = one.benchmark + name.removeprefix(TOTAL) if name.startswith(TOTAL) else name
        if name not in scores:
            label, name = f"{one.benchmark}, {TOTAL}", TOTAL
        found[label] = scores[name]
    return found


def evaluate(args: argparse.Namespace, load: "Callable[..., Backend] | None" = None) -> None:
    """Answer what is not answered yet, then score everything.

    Args:
        load: loads the model to answer with, as the functions in `answering.BACKENDS` do; called only if there is
            something left to answer.
    """
    with naming_option("--model_path"):
        folder = model_folder(args.model_path)
    items = read(find_benchmark(args.benchmark), args.dataset_path, args.limit, args.max_frames)

    import accelerate
    import torch
    import transformers
    from accelerate.utils import parse_flag_from_env

    from open_r1.evaluation import answering
    from open_r1.models.families import family_of_processor

    # Unless accelerate is told of the CPU, it takes each process there for the only one.
    on_cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    # A process that is done waits for the slowest, which may take longer than the default timeout.
    state = accelerate.PartialState(cpu=on_cpu, timeout=timedelta(days=1))
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if state.device.type == "cuda" else "float32"
    style = "reasoning" if args.use_reasoning_prompt else "direct"
    processor, prompt_name = answering.load_prompting(folder, args.prompt, args.max_pixels, style=style)
    answering.check_prompts(items, processor)
    least_pixels, most_pixels = family_of_processor(processor).pixel_bounds(processor)
    settings = {
        "benchmark": args.benchmark,
        "questions": digest(items),
        "model": answering.model_fingerprint(folder),
        "prompt": {"name": prompt_name, "style": style, "template": processor.chat_template},
        "generation": answering.generation_settings(processor, args.max_new_tokens),
        "pixels": {"min": least_pixels, "max": most_pixels},
        "backend": args.backend,
        "dtype": dtype,
    }
    state.print(f"{args.model_path}: {len(items)} prompts, chat template {prompt_name}, style {style}")
    path = result_path(args)
    earlier = read_json(path) if path.exists() else None
    answered = isinstance(earlier, dict) and settings.items() <= earlier.items()
    if answered:  # unless rows were lost from the file since
        rows = check_rows(earlier.get("results"), path)
        answered = {(row.get("id"), row.get("rotation", 0)) for row in rows} == {item.key for item in items}
    state.wait_for_everyone()  # nobody writes before all have read
    if answered:
        if state.is_main_process:
            print("answered before; the responses are scored again")
            args.precomputed_json = path
            rescore(args)
            export(args, path, items)
        return

    with state.main_process_first():  # which mends or puts aside what a killed run left
        done = collect_answered(path, settings)
    state.wait_for_everyone()  # nobody writes before all have read
    if missing := [item for item in items if item.key not in done]:
        load = load or answering.BACKENDS[args.backend]
        backend = load(folder, processor, state.device, dtype, style=style)
        partial = path.with_name(f"{path.stem}.partial{state.process_index}.jsonl")
        if not partial.exists() or partial.stat().st_size == 0:
            append_rows(partial, [settings])
        answerer = answering.Answerer(backend, processor, args.max_new_tokens)
        try:
            answer(answerer, missing, args.bs, partial, state)
        except torch.OutOfMemoryError as error:
            raise Mistake(f"--bs {args.bs}: out of memory; a smaller one continues where this was") from error
    if not state.is_main_process:
        return

    done = collect_answered(path, settings)
    example = answering.messages(answering.placeholders(items[0]), items[0].prompt)
    about = {
        "args": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        **settings,
        "prompt_example": processor.apply_chat_template(example, add_generation_prompt=True, style=style),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type,
        },
    }
    publish(path, make_result([done[item.key] for item in items], about, args.parser))
    for partial in partial_paths(path):
        partial.unlink()
    export(args, path, items)


def export(args: argparse.Namespace, path: Path, items: Sequence[Item] = ()) -> None:
    """Write a result in the form that `--export` names, beside it; with its prompts where the items are known."""
    if args.export:
        print(printable(write_samples(path, read_json(path), {item.key: item.prompt for item in items})))


def answer(answerer: "Answerer", items: Sequence[Item], batch_size: int, partial: Path, state: "PartialState") -> None:
    """Answer this process's share of the items; each batch is on disk before the next one starts.

    Returns when all processes have answered theirs.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from open_r1.evaluation.answering import answer_batches, make_batches

    batches = make_batches(answerer, items, batch_size)[state.process_index :: state.num_processes]
    count, start = sum(map(len, batches)), time.perf_counter()
    with tqdm(total=count, desc="answering", unit="question", disable=not state.is_local_main_process) as bar:
        for answered in answer_batches(answerer, batches):
            append_rows(partial, [item.to_row() | vars(response) for item, response in answered])
            bar.update(len(answered))
    seconds = time.perf_counter() - start
    rate = f"{count} questions in {seconds:.1f} s, {count / seconds:.2f} a second"
    rates = gather_object([f"process {state.process_index}: {rate}"])
    if state.is_main_process:  # whose bar is gone: a line of another process could run into it
        print("\n".join(rates))
