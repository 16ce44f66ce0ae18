"""Recipes and overlays mean what they say; and each of them runs through its own script.

The runs are two steps, and a resume to the third, on the shipped tiny base and rendered questions; nothing else is
overridden but lengths, batches, step counts and a teacher's name. The launches go round over the recipes, an overlay
runs under ZeRO-2 in one process, one with a teacher in two, and nightly each recipe runs under every launch, and each
overlay in two processes.
"""

import json
import math
import os
import re
import subprocess
import sys
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import get_scheduler
from trl import ModelConfig

from open_r1.base.errors import REPO_ROOT
from open_r1.base.prompts import load_chat_template
from open_r1.configs import GRPOScriptArguments, Qwen2VLGRPOConfig
from open_r1.models.families import FAMILIES
from open_r1.settings.recipes import merge_recipes, read_recipe
from open_r1.tiny import save_tiny_model
from open_r1.world.parquet import write_sat
from open_r1.world.scene import LEVELS
from support import read_jsonl, save_teacher

CONFIGS = REPO_ROOT / "configs"
FOLDERS = ("*.yaml", "tiny/*.yaml", "laptop/*.yaml")
RECIPES = sorted(str(path.relative_to(REPO_ROOT)) for glob in FOLDERS for path in CONFIGS.glob(glob))
LAUNCHES = ("zero2", "zero3", "ddp")
ALONE = " in one process"
MAIN = ("configs/grpo_sat.yaml", "configs/sft_sat.yaml")  # the paper's two, which the others build on
OVERLAYS = sorted(path.stem for path in (CONFIGS / "overlays").glob("*.yaml"))
# Every overlay over the paper's recipe, so the README's combinations too. QLoRA is a recipe of its own; vLLM needs it:
# test_vllm.py.
OVERLAID = [
    f"configs/{'sft' if name == 'cold_start' else 'grpo'}_sat.yaml configs/overlays/{name}.yaml"
    for name in OVERLAYS
    if name not in ("qlora", "vllm")
]
# (recipes, launch)
RUNS = [*product(MAIN, LAUNCHES), *zip([name for name in RECIPES if name not in MAIN], cycle(LAUNCHES), strict=False)]
# a teacher is a second model for ZeRO
RUNS += [(config, "zero2" if "distill" in config else f"zero2{ALONE}") for config in OVERLAID]
NIGHTLY = [
    pytest.param(*run, marks=pytest.mark.nightly)
    for run in [*product(RECIPES, LAUNCHES), *((config, "zero2") for config in OVERLAID)]
    if run not in RUNS
]
BASE = REPO_ROOT / "configs/tiny/base"
# Recipes of models that the tiny base is no small one of: they run on a random one of the family.
FAMILY_OF = {
    "configs/qwen3_5_2b.yaml": "qwen3_5",
    "configs/smolvlm_256m.yaml": "smolvlm",
    "configs/internvl3_1b.yaml": "internvl",
}
STEPS = 3
COMPLETIONS = 32  # a step: two micro-batches on each of two processes, and four on one


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about rendered scenes, as prepare_dataset.sh writes them; no step sees one twice."""
    folder = tmp_path_factory.mktemp("data")
    write_sat(folder / "world.parquet", 120, 5, LEVELS["easy"])
    environment = {**os.environ, "PYTHON": sys.executable, "SAT_PARQUET": str(folder / "world.parquet")}
    command = ["sh", str(REPO_ROOT / "src/data/SAT/prepare_dataset.sh"), "--total_num", "100"]
    subprocess.run([*command, "--output_dir", str(folder)], env=environment, check=True, capture_output=True)
    examples = json.loads((folder / "SAT_train_100.json").read_text())
    (folder / "held_out.json").write_text(json.dumps(examples[:8]))
    for example in examples:
        answer = example["messages"][-1]
        answer["content"] = f"<think>The picture shows it.</think>\n<answer>{answer['content']}</answer>"
    (folder / "reasoned.json").write_text(json.dumps(examples))
    return folder / "SAT_train_100.json"


@pytest.fixture(scope="module")
def random_models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder of a tiny random checkpoint, whose tokenizer knows the questions."""
    folder = tmp_path_factory.mktemp("models")
    questions = [example["messages"][0]["content"] for example in json.loads(data.read_text())]
    made = {}
    for name in FAMILY_OF.values():
        texts = [load_chat_template("instruct", FAMILIES[name].templates), *questions]
        made[name] = save_tiny_model(folder / name, texts, name)
    return made


def optimizer_steps(value: object) -> set[int]:
    """The steps that an optimizer's state counts, wherever they are in what was saved."""
    if isinstance(value, dict):
        found = {int(state["step"]) for state in value.values() if isinstance(state, dict) and "step" in state}
        return found.union(*(optimizer_steps(part) for part in value.values()))
    return set()


LORA = {
    "use_peft": True,
    "lora_r": 64,
    "lora_alpha": 128,
    "lora_dropout": 0.0,
    "lora_target_modules": [
        *["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        *["in_proj_qkv", "in_proj_z", "out_proj"],
    ],
    "freeze_vision": True,
    "learning_rate": 1e-5,
}
QLORA = {**LORA, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}


@pytest.mark.parametrize(
    "config, recipe, changes",
    [
        ("configs/grpo_sat_qlora.yaml", "grpo_sat", QLORA),
        ("configs/sft_sat_lora.yaml", "sft_sat", {**LORA, "learning_rate": 2e-4}),
        ("configs/grpo_sat.yaml configs/overlays/lora.yaml", "grpo_sat", LORA),
    ],
)
def test_an_adapter_changes_this_and_nothing_else(config, recipe, changes, monkeypatch, tmp_path):
    """From any folder."""
    monkeypatch.chdir(tmp_path)
    plain = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())
    assert merge_recipes(config.split()) == {**plain, **changes}


def test_the_readme_combines_recipes_that_run():
    combined = re.findall(r'CONFIG="(.+?)"', (REPO_ROOT / "README.md").read_text())
    assert combined and {config for config in combined if "vllm" not in config} <= set(OVERLAID)


def test_every_file_is_run_before_the_night_and_under_every_launch():
    run = {file for files, _ in RUNS for file in files.split()}
    shipped = {str(path.relative_to(REPO_ROOT)) for path in CONFIGS.rglob("*.yaml")}
    assert shipped - run == {"configs/overlays/qlora.yaml", "configs/overlays/vllm.yaml"}
    assert yaml.safe_load((CONFIGS / "grpo_sat_qlora.yaml").read_text())["base"][-1] == "overlays/qlora.yaml"
    assert {launch for _, launch in RUNS} == {*LAUNCHES, f"zero2{ALONE}"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_says_what_it_is(name):
    header = (CONFIGS / f"overlays/{name}.yaml").read_text().partition("\n\n")[0]
    parts = re.findall(r"^# (What|Why|Source|Expect|Cost):\s+\S", header, re.MULTILINE)
    assert parts == ["What", "Why", "Source", "Expect", "Cost"]
    assert f"| `overlays/{name}.yaml`" in (CONFIGS / "README.md").read_text()


def test_the_later_counts(tmp_path, monkeypatch):
    """An overlay over the recipe, arguments over both; what an overlay does not name stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OF_MINE", raising=False)
    (tmp_path / "mine.yaml").write_text("beta: 0\nreward_funcs: length\nlr_scheduler_kwargs: null\nenv: {OF_MINE: 1}\n")
    (tmp_path / "more.yaml").write_text("base: mine.yaml\nnum_generations: 4\nmax_steps: 9\n")
    types = (GRPOScriptArguments, Qwen2VLGRPOConfig, ModelConfig)
    arguments = ["--config", "configs/grpo_sat.yaml", "--max_steps", "7", "--config=more.yaml", "--bf16", "false"]
    arguments += ["--dataset_name", "x", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    script_args, args, _ = read_recipe(types, arguments)
    assert (args.beta, args.num_generations, args.max_steps, args.temperature) == (0, 4, 7, 1)
    assert script_args.reward_funcs == ["length"] and args.lr_scheduler_kwargs is None
    assert os.environ.pop("OF_MINE") == "1"


@pytest.mark.distributed
@pytest.mark.parametrize("recipe, launch", RUNS + NIGHTLY)
def test_a_recipe_trains_and_goes_on(recipe, launch, quick_python, data, random_models, tmp_path):
    settings = merge_recipes(recipe.split())
    teacher = "teacher_model_name_or_path"
    family = FAMILIES[FAMILY_OF.get(recipe, "qwen2_vl")]
    model = random_models[FAMILY_OF[recipe]] if recipe in FAMILY_OF else BASE
    is_sft = "num_generations" not in settings
    arguments = ["--logging_steps", "1", "--save_steps", "1", "--save_total_limit", str(STEPS)]
    if not is_sft:
        arguments += ["--max_completion_length", "96"]
        arguments += ["--per_device_train_batch_size", "8", "--completions_per_step", str(COMPLETIONS)]
    arguments += [f"--{teacher}", str(save_teacher(tmp_path / "teacher", model))] if teacher in settings else []
    arguments += ["--reward_funcs", "support:vowel_share"] if recipe in FAMILY_OF else []  # one that noise can earn
    if "eval_strategy" in settings:
        arguments += ["--eval_dataset_name", str(data.with_name("held_out.json")), "--per_device_eval_batch_size", "8"]
    script = "run_sft.sh" if is_sft else "run_grpo_SAT.sh"
    examples = data.with_name("reasoned.json") if "cold_start" in recipe else data
    output = tmp_path / "out"
    processes = 1 if launch.endswith(ALONE) else 2

    def run(steps: int) -> str:
        result = subprocess.run(
            ["sh", str(REPO_ROOT / "src/open-r1-multimodal" / script), *arguments, "--max_steps", str(steps)],
            env={
                **os.environ,
                "PYTHON": str(quick_python),
                "CONFIG": recipe,
                "MODEL": str(model),
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
                "DATA": str(examples),
                "OUTPUT": str(output),
                "ACCELERATE_CONFIG": launch.removesuffix(ALONE),
                "NUM_PROCESSES": str(processes),
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
    assert json.loads((output / "run.json").read_text())["recipes"] == recipe.split()

    # ZeRO really ran, on all processes; and the optimizer that took the third step had taken the two before it
    checkpoint = output / f"checkpoint-{STEPS}"
    files = sorted(checkpoint.glob("global_step*/*optim_states.pt")) or [checkpoint / "optimizer.pt"]
    assert len(files) == (processes if launch.startswith("zero") else 1)
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
        steps = range(1, STEPS + 1, settings.get("num_iterations", 1))  # that begin with a rollout
        rows = read_jsonl(output / "trajectories/train.jsonl")
        written = [row["step"] for row in rows if not row.get("refill")]
        assert written == [step for step in steps for _ in range(COMPLETIONS)]

    if settings.get("use_peft"):
        assert not (output / "model.safetensors").exists()  # the base stays as it is
        adapter = load_file(output / "adapter_model.safetensors")
        before = load_file(output / "checkpoint-1/adapter_model.safetensors")
        saved = settings.get("lora_modules_to_save") or []  # modules that are trained as they are
        of_adapter = {name for name in adapter if not any(module in name for module in saved)}
        assert (len(of_adapter) < len(adapter)) == bool(saved)
        assert not any(re.search(family.tower, name) for name in of_adapter) and settings["freeze_vision"]
        assert all(adapter[name].any() and not torch.equal(adapter[name], before[name]) for name in adapter)
        parts = [line for line in resumed.splitlines() if line.startswith(("vision", "merger", "lang"))]
        assert parts and all(line.endswith(" 0") for line in parts) == (not saved)  # no more of the model is trained
        if launch == "zero2":  # saved without DeepSpeed's state of the whole model, and the same
            (states,) = checkpoint.glob("global_step*/mp_rank_00_model_states.pt")
            module = torch.load(states, weights_only=False)["module"]
            kept = {name.replace(".default.", "."): value for name, value in module.items() if "lora_" in name}
            assert kept.keys() == of_adapter and all(torch.equal(kept[name], adapter[name]) for name in kept)
    else:
        trained, base = load_file(output / "model.safetensors"), load_file(model / "model.safetensors")
        assert trained.keys() - {"lm_head.weight"} == base.keys() - {"lm_head.weight"}  # ZeRO writes a tied one as well
        same = [name for name in base if torch.equal(trained[name], base[name].float())]
        assert same == [name for name in base if settings.get("freeze_vision") and re.search(family.tower, name)]


def rate(settings: dict, step: int, total: int) -> float:
    """The learning rate of a step of a run that is launched for `total` steps; of SAT's GRPO the paper's line."""
    if settings["lr_scheduler_type"] == "warmup_stable_decay":
        return settings["learning_rate"] * (1 - (step - 1) / 3750)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings["learning_rate"])
    warmup = settings.get("warmup_steps", 0)
    more = settings.get("lr_scheduler_kwargs")
    schedule = get_scheduler(settings["lr_scheduler_type"], optimizer, warmup, total, more)
    return schedule.lr_lambdas[0](step - 1) * settings["learning_rate"]
