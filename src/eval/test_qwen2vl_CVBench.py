"""Evaluate a base or instruct model on CV-Bench, or on another set of spatial questions.

    python test_qwen2vl_CVBench.py                                             the newest GRPO output, else Qwen2-VL-2B
    python test_qwen2vl_CVBench.py --model_path Qwen/Qwen2-VL-2B-Instruct --no-use_reasoning_prompt
    accelerate launch test_qwen2vl_CVBench.py --model_path ...                 on every GPU of the machine
    python test_qwen2vl_CVBench.py --precomputed_json results/X.json           score saved responses again, no model

It writes results/CVBench_result_{model}_{reasoning|no_reasoning}.json: every response and how it was read, the scores
with 95 % intervals, and the settings that they depend on. Decoding is greedy without a repetition penalty. Every batch
is saved, so the same command continues an interrupted run. An earlier result with other settings, or with missing rows,
is renamed and kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "open-r1-multimodal"))
from open_r1.base.errors import run, use_environment

use_environment()

from open_r1.evaluation import run as evaluation
from open_r1.evaluation.command import parse_args


def main() -> None:
    evaluation.run(parse_args(description=__doc__))


if __name__ == "__main__":
    run(main, stopped="the same command continues where it was")
