"""Every recipe in configs/, run through its own script under every launch: two steps, and a resume to the third.

On the shipped tiny base and rendered questions; nothing else is overridden but lengths and step counts.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import get_scheduler

from open_r1 import world
from open_r1.prompts import REPO_ROOT
from support import read_jsonl

RECIPES = sorted(
    str(path.relative_to(REPO_ROOT / "configs").with_suffix("")) for path in (REPO_ROOT / "configs").rglob("*.yaml")
)
LAUNCHES = ("zero2", "zero3", "ddp")
BASE = REPO_ROOT / "configs/tiny/base"
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about rendered scenes, as prepare_dataset.sh writes them; no step sees one twice."""
    folder = tmp_path_factory.mktemp("data")
    world.write_sat(folder / "world.parquet", 120, 5, world.LEVELS["easy"])
    environment = {**os.environ, "PYTHON": sys.executable, "SAT_PARQUET": str(folder / "world.parquet")}
    command = ["sh", str(REPO_ROOT / "src/data/SAT/prepare_dataset.sh"), "--total_num", "100"]
    subprocess.run([*command, "--output_dir", str(folder)], env=environment, check=True, capture_output=True)
    examples = json.loads((folder / "SAT_train_100.json").read_text())
    (folder / "held_out.json").write_text(json.dumps(examples[:8]))
    return folder / "SAT_train_100.json"


def optimizer_steps(value: object) -> set[int]:
    """The steps that an optimizer's state counts, wherever they are in what was saved."""
    if isinstance(value, dict):
        found = {int(state["step"]) for state in value.values() if isinstance(state, dict) and "step" in state}
        return found.union(*(optimizer_steps(part) for part in value.values()))
    return set()


@pytest.mark.distributed
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_and_goes_on(recipe, launch, quick_python, data, tmp_path):
    settings = yaml.safe_load((REPO_ROOT / f"configs/{recipe}.yaml").read_text())
    is_sft = Path(recipe).name.startswith("sft")
    arguments = ["--logging_steps", "1", "--save_steps", "1"]
    arguments += [] if is_sft else ["--max_completion_length", "96"]
    if "eval_strategy" in settings:
        arguments += ["--eval_dataset_name", str(data.with_name("held_out.json"))]
    script = "run_sft.sh" if is_sft else "run_grpo_SAT.sh"
    output = tmp_path / "out"

    def run(steps: int) -> str:
        result = subprocess.run(
            ["sh", str(REPO_ROOT / "src/open-r1-multimodal" / script), *arguments, "--max_steps", str(steps)],
            env={
                **os.environ,
                "PYTHON": str(quick_python),
                "CONFIG": str(REPO_ROOT / f"configs/{recipe}.yaml"),
                "MODEL": str(BASE),
                "DATA": str(data),
                "OUTPUT": str(output),
                "ACCELERATE_CONFIG": launch,
                "HF_HUB_OFFLINE": "1",
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    run(STEPS - 1)
    resumed = run(STEPS)
    assert f"resuming from {output}/checkpoint-{STEPS - 1}" in resumed

    # ZeRO really ran, on both processes; and the optimizer that took the third step had taken the two before it
    checkpoint = output / f"checkpoint-{STEPS}"
    files = sorted(checkpoint.glob("global_step*/*optim_states.pt")) or [checkpoint / "optimizer.pt"]
    assert len(files) == (1 if launch == "ddp" else 2)
    assert any(checkpoint.glob("global_step*/zero_pp_rank_1_*model_states.pt")) == (launch == "zero3")
    for file in files:
        assert optimizer_steps(torch.load(file, weights_only=False)) == {STEPS}

    logs = [log for log in read_jsonl(output / "log.jsonl") if "loss" in log]
    assert [log["step"] for log in logs] == list(range(1, STEPS + 1))
    for log in logs:
        assert math.isfinite(log["loss"]) and 0 < log["grad_norm"] < 1e4
    # A resumed step has the rate that the checkpoint was left with; a schedule that began anew would be at its start.
    rates = [log["learning_rate"] for log in logs]
    assert rates == pytest.approx([rate(settings, step, STEPS - 1) for step in range(1, STEPS + 1)], rel=1e-4)
    if not is_sft:
        rows = read_jsonl(output / "trajectories/train.jsonl")
        assert [row["step"] for row in rows] == [n + 1 for n in range(STEPS) for _ in range(len(rows) // STEPS)]
        assert len(rows) == STEPS * settings["completions_per_step"]

    if settings.get("use_peft"):
        assert not (output / "model.safetensors").exists()  # the base stays as it is
        adapter = load_file(output / "adapter_model.safetensors")
        before = load_file(output / "checkpoint-1/adapter_model.safetensors")
        assert not any("visual" in name for name in adapter) and settings["freeze_vision"]
        assert all(adapter[name].any() and not torch.equal(adapter[name], before[name]) for name in adapter)
        assert {line.split()[-1] for line in resumed.splitlines() if line.startswith(("vision", "merger", "lang"))} == {
            "0"
        }
        if launch == "zero2":  # saved without DeepSpeed's state of the whole model, and the same
            (states,) = checkpoint.glob("global_step*/mp_rank_00_model_states.pt")
            module = torch.load(states, weights_only=False)["module"]
            kept = {name.replace(".default.", "."): value for name, value in module.items() if "lora_" in name}
            assert kept.keys() == adapter.keys() and all(torch.equal(kept[name], adapter[name]) for name in kept)
    else:
        trained, base = load_file(output / "model.safetensors"), load_file(BASE / "model.safetensors")
        assert trained.keys() - {"lm_head.weight"} == base.keys()  # ZeRO writes the tied head as well
        assert [name for name in base if torch.equal(trained[name], base[name].float())] == []


def rate(settings: dict, step: int, total: int) -> float:
    """The learning rate of a step of a run that is launched for `total` steps; of SAT's GRPO the paper's line."""
    if settings["lr_scheduler_type"] == "warmup_stable_decay":
        return settings["learning_rate"] * (1 - (step - 1) / 3750)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings["learning_rate"])
    warmup = settings.get("warmup_steps", 0)
    schedule = get_scheduler(settings["lr_scheduler_type"], optimizer, warmup, total)
    return schedule.lr_lambdas[0](step - 1) * settings["learning_rate"]
