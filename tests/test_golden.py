"""The seeded values of a short run of every part, which a refactoring keeps; tests/data/golden.json holds them.

    python tests/test_golden.py        writes that file anew, for a change that is meant to change them

Numbers may differ by a thousandth, as other CPUs round otherwise; texts and keys may not. What a kind of CPU without
the same random numbers samples is another run: there, write the file at the commit to compare with.
"""

import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import ModelConfig, TrlParser

from fake_run import fake_events, fake_rows, write_images, write_run
from open_r1.base.errors import REPO_ROOT
from open_r1.configs import Qwen2VLSFTConfig, SFTScriptArguments
from open_r1.evaluation.run import evaluate, result_path
from open_r1.models.loading import load_model, load_processor
from open_r1.reporting.page import write_report
from open_r1.rewards import get_reward_funcs
from open_r1.running.data import load_dataset
from open_r1.sft import build_trainer
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from open_r1.world.parquet import write_cvbench, write_sat
from open_r1.world.scene import LEVELS
from support import load_script, make_config, read_jsonl, vowel_share

GOLDEN = Path(__file__).parent / "data/golden.json"
BASE = REPO_ROOT / "configs/tiny/base"
PREPARE = REPO_ROOT / "src/data/SAT/process_dataset.py"
EVALUATE = REPO_ROOT / "src/eval/test_qwen2vl_CVBench.py"
TOKENS = 96  # of a completion
CLOCK = re.compile("time|second|runtime")  # in the name of what is never twice the same


def prepare(folder: Path) -> Path:
    """Easy rendered questions, as prepare_dataset.sh writes them."""
    write_sat(folder / "world.parquet", 60, 5, LEVELS["easy"])
    command = [sys.executable, str(PREPARE), "--parquet", str(folder / "world.parquet"), "--total_num", "48"]
    subprocess.run([*command, "--output_dir", str(folder)], check=True, capture_output=True)
    return folder / "SAT_train_48.json"


def sha256(value: Any) -> str:
    """The digest of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def rounded(value: Any) -> Any:
    """The value with six significant digits of every float in it."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def logged(trainer: Any) -> dict[str, Any]:
    """The keys of a step's log event, and the values of every step's but those of the clock."""
    steps = [event for event in trainer.state.log_history if "loss" in event]
    return {
        "log_keys": sorted(steps[0]),
        "steps": [{key: event[key] for key in sorted(event) if not CLOCK.search(key)} for event in steps],
    }


# --- what is measured -----------------------------------------------------------------------------------------


def measure_grpo(data: Path, folder: Path, shared_prefix: bool) -> dict[str, Any]:
    """Two steps of GRPO with rewards of every kind."""
    processor = load_processor(BASE, chat_template="base", max_pixels=12544)
    trainer = Qwen2VLGRPOTrainer(
        model=load_model(BASE, dtype="float32"),
        reward_funcs=[*get_reward_funcs(["accuracy", "format"], think_prefilled=True), vowel_share],
        args=make_config(
            folder,
            shared_prefix=shared_prefix,
            max_completion_length=TOKENS,
            per_device_train_batch_size=8,
            learning_rate=5e-5,
        ),
        train_dataset=load_dataset(data, processor),
        processing_class=processor,
    )
    trainer.train()
    first = read_jsonl(folder / "trajectories/train.jsonl")[0]
    return {
        "first_prompt": first["prompt"],
        "first_completion": first["completion"],
        "row_keys": sorted(first),
        **logged(trainer),
    }


def measure_sft(data: Path, folder: Path) -> dict[str, Any]:
    """Two steps of the tiny recipe."""
    parser = TrlParser((SFTScriptArguments, Qwen2VLSFTConfig, ModelConfig))
    settings = {
        "config": REPO_ROOT / "tests/data/sft.yaml",
        "model_name_or_path": BASE,
        "dataset_name": data,
        "output_dir": folder,
        "use_cpu": True,
        "max_steps": 2,
        "save_strategy": "no",
        "learning_rate": 5e-5,
    }
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    trainer = build_trainer(*parser.parse_args_and_config(arguments))
    trainer.train()
    return logged(trainer)


def measure_evaluation(data: Path, folder: Path) -> dict[str, Any]:
    """A dozen questions, answered greedily and scored."""
    write_cvbench(folder / "cvbench", 12, 3, LEVELS["easy"])
    script = load_script(EVALUATE)
    args = script.parse_args(
        [
            *("--model_path", str(BASE), "--dataset_path", str(folder / "cvbench"), "--output_dir", str(folder)),
            *("--max_new_tokens", str(TOKENS), "--dtype", "float32"),
        ]
    )
    evaluate(args)
    result = json.loads(result_path(args).read_text())
    responses = [row["response"] for row in result["results"]]
    return {
        "result_keys": sorted(result),
        "row_keys": sorted(result["results"][0]),
        "first_response": responses[0],
        "responses": sha256(responses),
        "accuracy": result["accuracy"],
        "total": result["scores"]["Total"],
    }


def measure_report(data: Path, folder: Path) -> dict[str, Any]:
    """The page of a made-up run: what its script browses, without the images' bytes, and its headline figures."""
    questions = write_images(folder / "images", 6)
    rows = fake_rows(questions, range(1, 5), 4, prompts=2, group=4)
    held_out = fake_rows(questions, (2, 4), 4, prompts=6, group=1)
    page = write_report(write_run(folder / "run", rows, held_out, fake_events(4, eval_every=2))).read_text()
    browsed = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page).group(1))
    for image in browsed["images"]:
        del image["source"]
    figures = re.search(r'<dl class="figures">(.*?)</dl>', page, re.DOTALL).group(1)
    return {
        "keys": sorted(browsed),
        "figures": [" ".join(re.sub("<[^>]*>", " ", line).split()) for line in figures.split("</div>")[:-1]],
        "completions": {
            name: sum(len(group["completions"]) for step in source["steps"] for group in step["groups"])
            for name, source in browsed["sources"].items()
        },
        "browsed": sha256(rounded(browsed)),
    }


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "grpo, shared prefix": partial(measure_grpo, shared_prefix=True),
    "grpo, TRL's path": partial(measure_grpo, shared_prefix=False),
    "sft": measure_sft,
    "evaluation": measure_evaluation,
    "report": measure_report,
}


def measure(part: str, data: Path, folder: Path) -> dict[str, Any]:
    """A part's values, as JSON gives them back."""
    torch.set_num_threads(1)
    return json.loads(json.dumps(PARTS[part](data, folder)))


# --- the comparison -------------------------------------------------------------------------------------------


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every text and number in a value, by the way to it."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for at, item in items for key, leaf in leaves(item, f"{name}/{at}").items()}


def is_same(golden: Any, now: Any) -> bool:
    """Whether a number is as close as another CPU comes, or anything else the same."""
    if isinstance(golden, float) and isinstance(now, float):
        return math.isclose(golden, now, rel_tol=1e-3, abs_tol=1e-7)  # absolute: for what is nothing but rounding
    return golden == now


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("part", PARTS)
def test_values_are_those_of_before(part, data, tmp_path):
    golden = leaves(json.loads(GOLDEN.read_text(encoding="utf-8"))[part])
    now = leaves(measure(part, data, tmp_path))
    assert list(now) == list(golden)
    assert {name: (value, now[name]) for name, value in golden.items() if not is_same(value, now[name])} == {}


def main() -> None:
    """Write tests/data/golden.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare(folder)
        golden = {}
        for number, part in enumerate(PARTS):
            (folder / str(number)).mkdir()
            golden[part] = measure(part, data, folder / str(number))
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
