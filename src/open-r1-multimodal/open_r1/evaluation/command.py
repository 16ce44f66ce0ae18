"""The command line of the evaluation, which `test_qwen2vl_CVBench.py` and the Python function share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from open_r1.answers.statistics import PARSERS
from open_r1.base.errors import REPO_ROOT, command_line, given, positive
from open_r1.base.videos import MAX_FRAMES
from open_r1.evaluation.run import DEFAULT_BENCHMARK, newest_grpo_output
from open_r1.tasks.benchmarks import BENCHMARKS, SUITES, find_benchmark

RESULTS = REPO_ROOT / "src/eval/results"
DEFAULT_MODEL = "Qwen/Qwen2-VL-2B"
# The names in answering.BACKENDS, which imports torch -> questions a batch; vLLM batches those that it gets by itself.
BATCH_SIZES = {"hf": 32, "vllm": 256}


def folder_or_file(text: str) -> Path:
    """A path that is given. Raises what `given` raises."""
    return Path(given(text))


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The options of an evaluation.

    Args:
        argv: the command line; None: this process's.
        description: for `--help`.
    """
    parser = command_line(description)
    add = parser.add_argument
    add(
        "--model_path",
        type=given,
        help=f"folder or Hub name (default: the newest GRPO output in outputs/, else {DEFAULT_MODEL})",
    )
    add(
        "--prompt",
        type=given,
        default="auto",
        metavar="{auto,base,instruct}",
        help="chat template, or a Jinja file with the styles reasoning and direct; auto: the one that the checkpoint "
        "was trained with, if this project saved it, else instruct for a model that ships ChatML, else base",
    )
    add(
        "--use_reasoning_prompt",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for reasoning in <think> and an answer in <answer>",
    )
    add(
        "--benchmark",
        type=given,
        metavar="NAME",
        help=f"{', '.join(BENCHMARKS)}; easi-8, eight spatial ones in turn; or your own as module:NAME "
        f"(default: {DEFAULT_BENCHMARK}, or the one that the file of --precomputed_json names)",
    )
    add(
        "--dataset_path",
        type=given,
        help="Hub id, parquet (or .jsonl) file, or folder; for easi-8 a folder with one folder a benchmark (default: "
        "the benchmark's on the Hub)",
    )
    add("--family", type=given, help="the model's family, if it is one of your own: module:NAME")
    add(
        "--limit",
        type=positive,
        metavar="N",
        help="ask only N questions, drawn by a fixed seed; each task keeps its share of them",
    )
    add("--bs", type=positive, help="questions a batch; answers are saved after each (default: 32; 256 with vllm)")
    add("--max_new_tokens", type=positive, default=700, help="longest response (default: %(default)s, as in training)")
    add(
        "--max_pixels",
        type=positive,
        help="larger images are shrunk to this area in pixels (default: the checkpoint's training; 401408, the "
        "paper's, for a published one)",
    )
    add(
        "--max_frames",
        type=positive,
        default=MAX_FRAMES,
        help="most frames of a video, evenly spaced (default: %(default)s)",
    )
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="auto: bfloat16 on a GPU")
    add(
        "--backend", choices=BATCH_SIZES, default="hf", help="what generates: hf is transformers (default: %(default)s)"
    )
    add(
        "--parser",
        choices=PARSERS,
        default="lenient",
        help="lenient: a response without <answer> counts when it clearly names one option; strict: as in training "
        "(default: %(default)s)",
    )
    add("--output_dir", type=folder_or_file, default=RESULTS, help="(default: src/eval/results)")
    add(
        "--precomputed_json",
        type=folder_or_file,
        metavar="FILE",
        help="score the responses of a result file again, without a model. Of the other options --parser, --output_dir "
        "and --export have an effect, and --benchmark if the file names none. A file of the paper's own code gets "
        "the scores 2D, 3D and CV-Bench (the official one) if --dataset_path names the data that were asked",
    )
    add(
        "--export",
        choices=["lmms-eval"],
        help="also write the responses in the form of lmms-eval's logs, one line of JSON for each",
    )
    args = parser.parse_args(argv)
    if args.benchmark is None and not args.precomputed_json:
        args.benchmark = DEFAULT_BENCHMARK
    if args.benchmark and args.benchmark not in SUITES:
        find_benchmark(args.benchmark)
    if args.family:
        from open_r1.models.families import use_family  # imports torch

        use_family(args.family)
    args.bs = args.bs or BATCH_SIZES[args.backend]
    if args.model_path is None:
        args.model_path = str(newest_grpo_output(REPO_ROOT / "outputs") or DEFAULT_MODEL)
    return args
