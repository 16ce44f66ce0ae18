"""Evaluate a checkpoint on CV-Bench, or on another spatial question set; base and instruct models alike.

    python test_qwen2vl_CVBench.py                                             the newest GRPO output, else Qwen2-VL-2B
    python test_qwen2vl_CVBench.py --model_path Qwen/Qwen2-VL-2B-Instruct --no-use_reasoning_prompt
    accelerate launch test_qwen2vl_CVBench.py --model_path ...                 on every GPU of the machine
    python test_qwen2vl_CVBench.py --precomputed_json results/X.json           score saved responses again, no model

It writes results/CVBench_result_{model}_{reasoning|no_reasoning}.json: every response with how it was read, the
scores with 95 % intervals, and all that they depend on. Decoding is greedy without a repetition penalty. Every batch
is saved; the same command continues an interrupted run. An earlier result made with other settings is kept aside.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "open-r1-multimodal"))
from open_r1.base.errors import given, positive, run, use_environment

use_environment()

from open_r1.answers.statistics import PARSERS
from open_r1.base.prompts import REPO_ROOT
from open_r1.base.videos import MAX_FRAMES
from open_r1.evaluate import run as evaluation
from open_r1.tasks.benchmarks import BENCHMARKS, SUITES, find_benchmark

HERE = Path(__file__).resolve().parent
DEFAULT_MODEL = "Qwen/Qwen2-VL-2B"
# Of answering.BACKENDS, which imports torch; and questions a batch: vLLM makes its own of those that it has at hand.
BATCH_SIZES = {"hf": 32, "vllm": 256}


def folder_or_file(text: str) -> Path:
    """A path that is given. Raises what `given` raises."""
    return Path(given(text))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
        default="CV-Bench",
        metavar="NAME",
        help=f"{', '.join(BENCHMARKS)}; easi-8, eight spatial ones in turn; or your own, module:NAME "
        "(default: %(default)s)",
    )
    add(
        "--dataset_path",
        type=given,
        help="Hub id, parquet (or .jsonl) file, or folder, of easi-8 the one with a folder each (default: the "
        "benchmark's on the Hub)",
    )
    add("--limit", type=positive, metavar="N", help="ask N questions only, the same share of each task, seeded")
    add("--bs", type=positive, help="questions a batch, after which they are saved (default: 32; 256 with vllm)")
    add("--max_new_tokens", type=positive, default=700, help="longest response (default: %(default)s, as in training)")
    add(
        "--max_pixels",
        type=positive,
        help="larger images are shrunk to this area (default: what the checkpoint was trained at; 401408, the paper's, "
        "for a published one)",
    )
    add("--max_frames", type=positive, default=MAX_FRAMES, help="of a video, evenly spaced (default: %(default)s)")
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
    add("--output_dir", type=folder_or_file, default=HERE / "results", help="(default: results/ beside this script)")
    add(
        "--precomputed_json",
        type=folder_or_file,
        metavar="FILE",
        help="score the responses of a result file; loads no model. One of the reference gets 2D, 3D and the official "
        "score with the --dataset_path that it asked",
    )
    add(
        "--export",
        choices=["lmms-eval"],
        help="also write the responses as lmms-eval logs them, a JSON line a question",
    )
    args = parser.parse_args(argv)
    if args.benchmark not in SUITES:
        find_benchmark(args.benchmark)
    args.bs = args.bs or BATCH_SIZES[args.backend]
    if args.model_path is None:
        args.model_path = str(evaluation.newest_grpo_output(REPO_ROOT / "outputs") or DEFAULT_MODEL)
    return args


def main() -> None:
    evaluation.run(parse_args())


if __name__ == "__main__":
    run(main, stopped="the same command continues where it was")
