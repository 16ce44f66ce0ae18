"""What a user gets wrong is one line, before any process of a run starts; what fails in a run is told once."""

import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
import yaml
from safetensors.torch import save_file

from open_r1 import grpo, sft
from open_r1.base import errors as front_door
from open_r1.base.files import append_rows
from open_r1.base.prompts import REPO_ROOT
from open_r1.configs import LOSS_TYPES
from open_r1.running import entry
from open_r1.running.entry import Command, check, train
from open_r1.running.failures import FIRST, Mistake, full_disk, last_word, told_once
from open_r1.settings.limits import CHOICES, LIMITS, NEEDED
from open_r1.settings.recipes import PLANNED_PROCESSES, read_recipe
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from open_r1.world.parquet import write_cvbench
from open_r1.world.scene import LEVELS
from support import launch_env, load_script, make_trainer, run_grpo, vowel_share, write_examples

LAUNCHES = REPO_ROOT / "src/open-r1-multimodal/configs"
RECIPE = {
    **yaml.safe_load((REPO_ROOT / "configs/grpo_sat.yaml").read_text()),
    **{"dtype": "float32", "bf16": False, "use_cpu": True},
}


@pytest.fixture(autouse=True)
def no_plan(monkeypatch):
    """A check notes the planned processes in its process; here that must not outlive a test."""
    monkeypatch.setenv(PLANNED_PROCESSES, "")


@pytest.fixture
def find_mistake(tiny_model, examples_json, tmp_path, monkeypatch):
    """Check the paper's recipe with changes, for two processes: what it says, or nothing."""
    monkeypatch.setattr(entry, "quiet", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def find(*arguments: str, recipe: str | None = None, command: Command = grpo.COMMAND, **changes: object) -> str:
        settings = {"model_name_or_path": str(tiny_model), "dataset_name": str(examples_json)}
        settings["output_dir"] = str(tmp_path / "out")
        (tmp_path / "recipe.yaml").write_text(recipe or yaml.safe_dump({**RECIPE, **settings, **changes}))
        launch = str(LAUNCHES / "cpu.yaml")
        try:
            check(command, ["--config", str(tmp_path / "recipe.yaml"), *arguments], launch, processes=2)
        except Mistake as mistake:
            return str(mistake)
        return ""

    return find


def test_nothing_is_wrong_with_the_papers_recipe(find_mistake, tmp_path):
    assert find_mistake() == ""
    assert not (tmp_path / "out").exists()


CHANGES = [
    ({"num_generation": 4}, r".*/recipe\.yaml: unknown setting 'num_generation'; did you mean num_generations\?"),
    ({"num_generations": "eight"}, r".*/recipe\.yaml: num_generations: invalid int value: 'eight'"),
    ({"num_generations": [8]}, r".*/recipe\.yaml: num_generations: expected one value, not \[8\]"),
    ({"learning_rate": None}, r".*/recipe\.yaml: learning_rate: needs a value"),
    ({"save_strategy": False}, r".*/recipe\.yaml: save_strategy: False is none of no, steps, epoch, best"),
    ({"optim": "adamw_foo"}, r".*/recipe\.yaml: optim: 'adamw_foo' is none of adamw_torch, "),
    ({"optim": "schedule_free_adamw"}, r".*schedulefree"),
    ({"lr_scheduler_type": "linar"}, r".*/recipe\.yaml: lr_scheduler_type: 'linar' is none of linear, "),
    ({"num_generations": 6}, r"num_generations 6: a rollout of 64 completions .* holds groups of 2, 4, 8, 16, 32, 64$"),
    ({"num_generations": 1}, r"num_generations 1: "),
    ({"completions_per_step": 60}, r"completions_per_step 60 is not a multiple of 16 .*; 48 and 64 would fit"),
    ({"loss_type": "gpro"}, r"loss_type: 'gpro' is none of grpo, "),
    ({"temperature": 0}, r"temperature 0.*: expected a number above 0; completions are sampled"),
    ({"beta": float("nan")}, r"beta nan: expected a number of at least 0"),
    (
        {"reward_funcs": "accuracy format"},
        r".*/recipe\.yaml: reward_funcs: expected a list, \[accuracy, format\], not ",
    ),
    ({"reward_funcs": []}, r"reward_funcs: needs a value"),
    ({"num_generations": None}, r"num_generations: needs a value"),
    ({"reward_weights": []}, r"reward_weights: 0 for 2 reward_funcs \(accuracy, format\)"),
    ({"eval_strategy": "steps"}, r"eval_strategy steps: there are no held-out examples"),
    ({"accelerator_config": {"split": True}}, r".*/recipe\.yaml: .*unexpected keyword argument 'split'"),
    ({"max_steps": 0}, r"max_steps 0: expected a number of at least 1, or -1; -1 trains num_train_epochs"),
    ({"max_steps": -1, "num_train_epochs": 0}, r"num_train_epochs 0.*: expected a number above 0"),
    ({"torch_compile": True}, r"torch_compile: "),
    ({"use_vllm": True, "shared_prefix": False}, r"shared_prefix: with use_vllm it must be true"),
    ({"freeze_vision": True, "freeze_llm": True}, r"freeze_vision, freeze_merger, freeze_llm: nothing is left"),
    ({"load_in_4bit": True}, r"load_in_4bit, load_in_8bit: weights that bitsandbytes quantised"),
    ({"chat_template": "lama"}, r"chat_template: no file 'lama'"),
    ({"reward_funcs": ["accuracy", "order_consistency"]}, r"reward_funcs: order_consistency .*rotate_options: true"),
    ({"rotate_options": True, "num_generations": 32}, r"rotate_options: .*rollout of 32 completions .* multiple of 64"),
    ({"rotate_options": True, "min_signal_groups": 0.5}, r"rotate_options: min_signal_groups asks one order "),
    ({"generation_kwargs": {"num_beams": 3}}, r"generation_kwargs: num_beams: completions are sampled"),
    ({"generation_kwargs": {"stop_string": ["."]}}, r"generation_kwargs: stop_string is no setting of a rollout"),
    ({"cast_lm_head_to_fp32": True}, r"cast_lm_head_to_fp32: TRL finds"),
    ({"cache_implementation": "static"}, r"cache_implementation: the shared prefix has a cache of its own"),
    ({"reward_funcs": ["acuracy"]}, r"reward_funcs: unknown reward 'acuracy'"),
    ({"reward_funcs": ["no_such_module:f"]}, r"reward_funcs: no module 'no_such_module'"),
    ({"dataset_name": "/no.json"}, r"/no\.json: no such file"),
    ({"model_name_or_path": "/no/model"}, r"MODEL, model_name_or_path: /no/model: no such file or folder"),
    (
        {"model_name_or_path": "no/model"},
        r"MODEL, model_name_or_path: no/model: neither here nor to be had from the Hub",
    ),
    ({"resume_from_checkpoint": "/no"}, r"resume_from_checkpoint: no folder /no"),
]


@pytest.mark.parametrize("changes, message", CHANGES, ids=lambda value: str(value)[:40])
def test_a_mistake_in_a_recipe_is_one_line(find_mistake, changes, message):
    told = find_mistake(**changes)
    assert re.match(message, told) and "\n" not in told, told


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lerning_rate", "1"], r"unknown argument '--lerning_rate'; did you mean learning_rate\?"),
        (["--max_step", "1"], r"unknown argument '--max_step'; did you mean max_steps\?"),  # no abbreviations
        (["--beta", "much"], r"--beta: invalid float value: 'much'"),
        (["quickly"], r"unknown argument 'quickly'"),
    ],
)
def test_a_mistake_in_an_argument_is_one_line(find_mistake, arguments, message):
    assert re.match(message, find_mistake(*arguments))


VALUES = [
    ("--learning_rate -1e-5", "learning_rate -1e-05: expected a number of at least 0"),
    ("--learning_rate nan", "learning_rate nan: "),
    ("--learning_rate inf", "learning_rate inf: "),
    ("--beta -0.1", "beta -0.1: expected a number of at least 0"),
    ("--beta -inf", "beta -inf: "),
    ("--epsilon -.2", "epsilon -0.2: "),
    ("--delta 0", "delta 0.0: expected a number above 0"),
    ("--temperature -1", "temperature -1.0: expected a number above 0; completions are sampled"),
    ("--temperature nan", "temperature nan: "),
    ("--top_p 0", "top_p 0.0: expected a number above 0 and at most 1"),
    ("--top_p 1.5", "top_p 1.5: "),
    ("--top_k -1", "top_k -1: expected a number of at least 0"),
    ("--min_p 2", "min_p 2.0: expected a number of at least 0 and at most 1"),
    ("--num_generations 0", "num_generations 0: expected a number of at least 2; "),
    ("--num_generations 6", "num_generations 6: a rollout of 64 completions "),
    ("--completions_per_step 0", "completions_per_step 0: expected a number of at least 1"),
    ("--completions_per_step -64", "completions_per_step -64: "),
    ("--max_completion_length 0", "max_completion_length 0: "),
    ("--importance_sampling_level word", "importance_sampling_level: 'word' is none of token, sequence"),
    ("--scale_rewards grp", "scale_rewards: 'grp' is none of group, batch, none"),
    ("--loss_type gpro", "loss_type: 'gpro' is none of grpo, "),
    ("--reward_weights 1 inf", "reward_weights inf: expected a finite number"),
    ("--reward_weights 1 nan", "reward_weights nan: "),
    ("--reward_weights 1 2 3", "reward_weights: 3 for 2 reward_funcs (accuracy, format); give one for each"),
    ("--reward_weights 0 -0e0", "reward_weights: all are 0, and nothing would be learned"),
    ("--reward_funcs", "--reward_funcs/--reward-funcs: expected at least one argument"),
]
SHARED_VALUES = [
    ("--max_pixels 1", "max_pixels 1: expected a number of at least 784; "),
    ("--max_pixels -1", "max_pixels -1: "),
    ("--max_pixels 3000", "min_pixels 3136 is more than max_pixels 3000; min_pixels: 3000 would fit"),
    ("--min_pixels 0", "min_pixels 0: "),
    ("--max_prompt_length 0", "max_prompt_length 0: expected a number of at least 1"),
    ("--per_device_train_batch_size 0", "per_device_train_batch_size 0: "),
    ("--per_device_train_batch_size -8", "per_device_train_batch_size -8: "),
    ("--gradient_accumulation_steps 0", "gradient_accumulation_steps 0: "),
    ("--max_steps -5", "max_steps -5: expected a number of at least 1, or -1; "),
    ("--num_train_epochs -2", "num_train_epochs -2.0: "),
    ("--save_steps 0", "save_steps 0.0: expected a number above 0; save_strategy: no saves nothing"),
    ("--save_total_limit -1", "save_total_limit -1: "),
    ("--logging_steps -1", "logging_steps -1.0: "),
    ("--warmup_steps -3", "warmup_steps -3.0: "),
    ("--weight_decay -1", "weight_decay -1.0: "),
    ("--max_grad_norm nan", "max_grad_norm nan: "),
    ("--adam_beta2 1", "adam_beta2 1.0: expected a number of at least 0 and below 1"),
    ("--seed -1", "seed -1: expected a number of at least 0 and at most 4294967295"),
    ("--seed 99999999999999999999", "seed 99999999999999999999: "),
    ("--lora_r 0", "lora_r 0: "),
    ("--lora_alpha -1", "lora_alpha -1: "),
    ("--lora_dropout 1", "lora_dropout 1.0: "),
    ("--attn_implementation flesh", "attn_implementation: 'flesh' is none of auto, eager, sdpa, "),
    ("--dtype float23", "--dtype: invalid choice: 'float23'"),
    ("--max_steps many", "--max_steps/--max-steps: invalid int value: 'many'"),
]


@pytest.mark.parametrize(
    "command, arguments, message",
    [(grpo.COMMAND, *row) for row in VALUES + SHARED_VALUES] + [(sft.COMMAND, *row) for row in SHARED_VALUES],
)
def test_a_value_that_means_nothing_is_one_line(command, arguments, message, tmp_path):
    """Before anything is made of it; a negative number is a value, however it is written."""
    recipe = ["--config", f"configs/{command.name}_sat.yaml", "--dataset_name", "x", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError) as raised:
        read_recipe(command.arguments, [*recipe, "--use_cpu", "true", "--bf16", "false", *arguments.split()])
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_every_limit_is_that_of_a_setting():
    hints = [get_type_hints(kind) for command in (grpo.COMMAND, sft.COMMAND) for kind in command.arguments]
    assert {*LIMITS, *CHOICES, *NEEDED} <= set().union(*hints)


def test_other_recipes_that_are_none(find_mistake):
    assert "recipe.yaml: not YAML: " in find_mistake(recipe="temperature: [1")
    assert "must contain a YAML mapping" in find_mistake(recipe="grpo")


@pytest.mark.parametrize(
    "text, message",
    [
        ("lora_rr: 4", r"{path}: unknown setting 'lora_rr'; did you mean lora_r\?"),
        ("lora_r: four", r"{path}: lora_r: invalid int value: 'four'"),
        ("config: x", r"{path}: unknown setting 'config'"),
        ("a: [", r"{path}: not YAML: "),
        ("4", r"{path}: a recipe must contain a YAML mapping"),
        ("env: 4", r"{path}: env: expected names and values"),
        ("base: overlay.yaml", r"{path}: base: leads back to this file"),
        ("base: [recipe.yaml, none.yaml]", r"{path}: base: no file .*/none\.yaml"),
        ("base: 4", r"{path}: base: no file .*/4"),
        ("temperature: 0", r"temperature 0.*: expected a number above 0; completions are sampled"),
        (None, r"CONFIG, --config: no recipe {path}; "),
    ],
)
def test_a_mistake_in_an_overlay_names_it(find_mistake, tmp_path, text, message):
    path = tmp_path / "overlay.yaml"
    if text is not None:
        path.write_text(text)
    told = find_mistake("--config", str(path))
    assert re.match(message.format(path=path), told) and "\n" not in told, told


def test_data_and_model_that_are_swapped_are_told(find_mistake, tiny_model, examples_json):
    told = find_mistake(dataset_name=str(tiny_model))
    assert told == f"{tiny_model} is the folder of a model; name the data (DATA and MODEL may be swapped)"
    told = find_mistake(model_name_or_path=str(examples_json))
    assert told == f"MODEL, model_name_or_path: {examples_json} is a file; name the folder of a model"


@pytest.mark.parametrize(
    "script, arguments, told",
    [
        ("scripts/ask.py", "--model {file} --image {image} --question ?", "--model: {file} is a file; name the folder"),
        (
            "scripts/ask.py",
            "--model /no/model --image {image} --question ?",
            "--model: /no/model: no such file or folder",
        ),
        ("scripts/export.py", "--adapter /no/run --output {folder}/new", "--adapter: no folder /no/run"),
        (
            "scripts/export.py",
            "--adapter {adapter} --output {folder}/new",
            "--adapter: {adapter} is an adapter without ",
        ),
        (
            "scripts/export.py",
            "--adapter {adapter} --base {file} --output {folder}/new",
            "--base: {file} is a file; name",
        ),
        (
            "src/eval/test_qwen2vl_CVBench.py",
            "--model_path /no/model --dataset_path {folder}",
            "--model_path: /no/model: ",
        ),
    ],
)
def test_the_option_that_named_a_model_is_told(tmp_path, monkeypatch, examples_json, script, arguments, told):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    write_cvbench(tmp_path, 2, 0, LEVELS["easy"])
    image = next((examples_json.parent / "images").iterdir())
    places = {"file": examples_json, "image": image, "folder": tmp_path, "adapter": tmp_path / "adapter"}
    monkeypatch.setattr(sys, "argv", ["x", *arguments.format(**places).split()])
    with pytest.raises(Mistake, match=f"^{re.escape(told.format(**places))}"):
        load_script(REPO_ROOT / script).main()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name, meant",
    [
        ("dr-grpo.yaml", "did you mean configs/overlays/dr_grpo.yaml?"),
        ("configs/dapo.yaml", "did you mean configs/overlays/dapo.yaml?"),
        ("configs/grpo_sta.yaml", "did you mean configs/grpo_sat.yaml?"),
        ("papo", "did you mean configs/overlays/papo.yaml?"),
        ("{folder}/recip.yaml", "did you mean {folder}/recipe.yaml?"),  # of the user's own
        ("zzz.yaml", "configs/README.md lists them"),
    ],
)
def test_a_mistyped_recipe_is_told_with_the_one_that_is_meant(find_mistake, tmp_path, name, meant):
    name, meant = (text.format(folder=tmp_path) for text in (name, meant))
    assert find_mistake("--config", name) == f"CONFIG, --config: no recipe {name}; {meant}"


def test_config_without_a_name(find_mistake):
    assert find_mistake("--config") == "--config: expected one argument"


def test_a_single_value_is_a_list_of_one(find_mistake):
    assert find_mistake(reward_funcs="accuracy", lora_target_modules="all-linear") == ""


def test_both_orders_of_a_question_fit_the_papers_recipe(find_mistake):
    assert find_mistake(reward_funcs=["accuracy", "order_consistency"], rotate_options=True) == ""


def test_a_template_that_is_none(find_mistake, tmp_path):
    (tmp_path / "broken.jinja").write_text("{% for %}")
    assert "\n" not in find_mistake(chat_template=str(tmp_path / "broken.jinja")) != ""


def test_too_few_prompts_for_a_step(find_mistake, tmp_path):
    data = write_examples(tmp_path, count=7)
    assert find_mistake(dataset_name=str(data)) == (
        f"{data}: a step asks 8 different prompts (64 completions / num_generations), and there are 7"
    )


def test_folders_that_hold_no_model(find_mistake, tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    assert re.search(f"{tmp_path} holds no model", find_mistake(model_name_or_path=str(tmp_path)))
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter; make a model of it" in find_mistake(model_name_or_path=str(tmp_path))


@pytest.mark.parametrize("text", ["garbage", "- 1", "distributed_type: DEEPSPEED\nzero: 3", "a: [", ""])
def test_a_launch_configuration_that_is_none(tmp_path, text):
    (tmp_path / "launch.yaml").write_text(text)
    with pytest.raises(Mistake, match=r"ACCELERATE_CONFIG: .*launch\.yaml does not describe a launch: ") as raised:
        check(sft.COMMAND, [], str(tmp_path / "launch.yaml"), 2)
    assert "\n" not in str(raised.value)


def test_every_loss_type_of_trl_is_known():
    """TRL names them in its loss alone."""
    source = Path(sys.modules["trl.trainer.grpo_trainer"].__file__).read_text()
    used = set()
    for line in re.findall(r"self\.loss_type (?:in|==) (.+?):\n", source):
        used |= set(re.findall(r'"(\w+)"', line))
    assert set(LOSS_TYPES) == used


def test_a_run_that_took_no_step_is_no_result(tiny_model, examples_json, tmp_path, monkeypatch):
    """However that came about; TRL skips what does not fill a rollout, and calls it a day."""

    def build_trainer(script_args, args, model_args, prepared):
        prepared |= {"train_dataset": prepared["train_dataset"].select([0]), "reward_funcs": [vowel_share]}
        return Qwen2VLGRPOTrainer(model=str(tiny_model), args=args, **prepared)

    command = Command("grpo", grpo.COMMAND.arguments, grpo.prepare, build_trainer)
    arguments = ["--config", str(REPO_ROOT / "tests/data/grpo.yaml"), "--use_cpu", "true", "--max_steps", "1"]
    arguments += ["--model_name_or_path", str(tiny_model), "--dataset_name", str(examples_json)]
    with pytest.raises(Mistake, match="too few examples for a step; nothing was trained, nothing saved"):
        train(command, [*arguments, "--output_dir", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_step_in_which_nothing_is_rewarded_ends_the_run(tiny_model, examples_json, tmp_path):
    """None is a reward function's word for: not of this kind. Of none at all nothing can be learned."""

    def nothing(completions, **kwargs):
        return [None] * len(completions)

    trainer = make_trainer(tiny_model, examples_json, tmp_path, [nothing])
    with pytest.raises(Mistake, match=r"^reward_funcs: no completion of a step got a reward, only None \(nothing\)$"):
        trainer.train()


# --- a bug keeps its traceback ------------------------------------------------------------------------------------

PLANTED = """from open_r1.trainer import Qwen2VLGRPOTrainer

def unpack(*args, **kwargs):
    one, other = [1]  # ValueError, as many mistakes of users are

def reward(completions, **kwargs):
    return unpack()

class Trainer(Qwen2VLGRPOTrainer):
    def _prepare_inputs(self, batch):
        return unpack()
"""


@pytest.mark.parametrize(
    "place, arguments",
    [
        ("open_r1.trainer.trainer.vision_token_ids", []),  # in the trainer's construction
        ("open_r1.running.data.render_prompt", []),  # while a row is read
        (None, ["--reward_funcs", "planted_bug:reward"]),
        (None, ["--trainer", "planted_bug:Trainer"]),
    ],
    ids=["construction", "data.py", "reward", "trainer of the user's"],
)
def test_a_bug_is_told_with_file_and_line(place, arguments, tiny_model, examples_json, tmp_path, monkeypatch, capsys):
    (tmp_path / "planted_bug.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("planted_bug", None)
    if place:
        monkeypatch.setattr(place, importlib.import_module("planted_bug").unpack)
    command = ["--config", str(REPO_ROOT / "tests/data/grpo.yaml"), "--use_cpu", "true", "--max_steps", "1"]
    command += ["--model_name_or_path", str(tiny_model), "--dataset_name", str(examples_json), *arguments]
    with pytest.raises(SystemExit), told_once():
        train(grpo.COMMAND, [*command, "--output_dir", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert f'File "{tmp_path}/planted_bug.py", line 4, in unpack' in told and "not enough values to unpack" in told
    if arguments[:1] == ["--reward_funcs"]:  # what failed is the last line
        last = told.strip().splitlines()[-1]
        assert re.fullmatch(
            r"error: reward_funcs: planted_bug:reward raised ValueError: .*planted_bug.py, line 4\)", last
        )


def test_what_a_library_refuses_is_a_line_and_its_cause_is_there_on_request(
    tiny_model, examples_json, tmp_path, monkeypatch, capsys
):
    command = ["--config", str(REPO_ROOT / "tests/data/grpo.yaml"), "--dataset_name", str(examples_json)]
    command += ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path), "--save_strategy", "steps"]
    command += ["--load_best_model_at_end", "true", "--eval_strategy", "no"]  # transformers refuses
    for shown in ("0", "1"):
        monkeypatch.setenv("OPEN_R1_TRACEBACK", shown)
        with pytest.raises(SystemExit) as left, told_once():
            train(grpo.COMMAND, command)
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.splitlines()[-1].startswith("error: ")
        assert ("Traceback" in told and "training_args.py" in told) == (shown == "1")


@pytest.mark.parametrize(
    "command", ["scripts/report.py nowhere", "src/eval/test_qwen2vl_CVBench.py --bs 1 --model_path nowhere"]
)
def test_every_command_shows_the_cause_on_request(command, tmp_path):
    script, *arguments = command.split()
    for more, count in ([], 0), (["--traceback"], 1):
        started = [sys.executable, REPO_ROOT / script, *arguments, *more]
        result = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 1 and ("Traceback" in result.stderr) == bool(count), result.stderr
        assert "error: " in result.stderr.splitlines()[-1]


# --- under the run script ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"CONFIG": " "}, "error: CONFIG: names no recipe"),
        ({"NUM_PROCESSES": "two"}, "error: NUM_PROCESSES: 'two' is not a number of processes"),
        ({"NUM_PROCESSES": "0"}, "error: NUM_PROCESSES: '0' is not a number of processes"),
        ({"NUM_PROCESSES": "1.5"}, "error: NUM_PROCESSES: '1.5' is not a number of processes"),
        ({"NUM_PROCESSES": "-1"}, "error: NUM_PROCESSES: '-1' is not a number of processes"),
        ({"NUM_PROCESSES": "99999"}, "error: NUM_PROCESSES: '99999' is not a number of processes"),
        ({"ACCELERATE_CONFIG": "zero9"}, f"error: ACCELERATE_CONFIG: no file {LAUNCHES}/zero9.yaml"),
    ],
)
def test_the_script_tells_its_own(tmp_path, tiny_model, environment, message):
    result = run_grpo(tiny_model, tmp_path / "no.json", tmp_path / "out", **environment)
    assert (result.returncode, result.stderr) == (2, f"{message}\n")
    assert not (tmp_path / "out").exists()


TWO_GPUS = "echo 'GPU 0: H100 (UUID: GPU-a)'; echo 'GPU 1: H100 (UUID: GPU-b)'"


@pytest.mark.parametrize(
    "lists, visible, gpus",
    [
        ("echo 'NVIDIA-SMI has failed because it could not talk to the driver.'; exit 9", None, 0),
        ("echo 'No devices were found'", None, 0),
        ("exec sleep 60", "-1", 0),  # not asked
        (TWO_GPUS, None, 2),
        (TWO_GPUS, "", 0),
        (TWO_GPUS, "-1", 0),
        (TWO_GPUS, "NoDevFiles", 0),
        (TWO_GPUS, "1", 1),
        (TWO_GPUS, "1,GPU-a", 2),
        (TWO_GPUS, "0,-1,1", 1),
    ],
)
def test_a_gpu_is_one_that_can_be_listed_and_is_visible(tmp_path, tiny_model, examples_json, lists, visible, gpus):
    result = run_with_gpus(tmp_path, tiny_model, examples_json, lists, visible)
    assert result.returncode == 2 and ("no GPU found" in result.stdout) == (gpus == 0)
    told = f"NUM_PROCESSES: 3 is more than the {gpus} GPUs" if gpus else "ACCELERATE_CONFIG: no file"
    assert result.stderr.startswith(f"error: {told}") and result.stderr.count("\n") == 1


def run_with_gpus(
    folder: Path, model: Path, data: Path, lists: str, visible: str | None, **env: str
) -> subprocess.CompletedProcess:
    """A launch that goes no further than its script, on a machine whose nvidia-smi does this."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{lists}\n")
    (folder / "nvidia-smi").chmod(0o755)
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "NUM_PROCESSES": "3", "ACCELERATE_CONFIG": "zero9", **env}
    return run_grpo(model, data, folder / "out", **env)


@pytest.mark.parametrize("visible", ["0,1,2", "7", "99999999999999999999"])
def test_a_gpu_that_is_not_there(tmp_path, tiny_model, examples_json, visible):
    result = run_with_gpus(tmp_path, tiny_model, examples_json, TWO_GPUS, visible)
    assert (result.returncode, result.stderr) == (
        2,
        f"error: CUDA_VISIBLE_DEVICES: there is no GPU {visible[-1 if ',' in visible else 0 :]}; "
        "this machine's are 0 to 1\n",
    )


@pytest.mark.slow
def test_a_gpu_that_hangs_is_told(tmp_path, tiny_model, examples_json):
    result = run_with_gpus(tmp_path, tiny_model, examples_json, 'trap "" TERM; while :; do sleep 1; done', None)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: nvidia-smi does not answer within 10 s; ")


@pytest.mark.parametrize("threads", ["many", "0", "1.5"])
def test_threads_that_are_no_number_are_left_out(tmp_path, tiny_model, examples_json, threads):
    result = run_with_gpus(tmp_path, tiny_model, examples_json, "exit 9", None, OMP_NUM_THREADS=threads)
    assert result.stderr.splitlines()[0] == f"OMP_NUM_THREADS: '{threads}' is not a number of threads, and left out"
    assert result.stderr.splitlines()[1].startswith("error: ACCELERATE_CONFIG: ")


@pytest.mark.slow
@pytest.mark.parametrize("model, data, arguments, message", [
    ("/no/model", None, [], "error: MODEL, model_name_or_path: /no/model: no such file or folder"),
    (None, "/no.json", [], "error: /no.json: no such file"),
    (None, None, ["--num_generations", "3"], "error: num_generations 3: a rollout of 16 completions "),
    (None, None, ["--lerning_rate", "1"], "error: unknown argument '--lerning_rate'; did you mean learning_rate?"),
    (None, None, ["--reward_funcs", "mine:missing"], "error: reward_funcs: module 'mine' ("),
])  # fmt: skip
def test_one_mistake_is_one_line(tmp_path, tiny_model, examples_json, quick_python, model, data, arguments, message):
    (tmp_path / "mine.py").write_text("def score(completions, **kwargs): return [0.0] * len(completions)\n")
    result = run_grpo(
        model or tiny_model, data or examples_json, tmp_path / "out", *arguments, PYTHON=str(quick_python)
    )
    assert result.returncode == 2 and result.stderr.startswith(message), result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


FAILING = """import os, signal
steps = 0
def reward(completions, **kwargs):
    global steps
    steps += 1
    if steps == 2 and os.environ["RANK"] in {ranks}:
        {does}
    return [float(len(completion[0]["content"]) % 3) for completion in completions]
"""
OF_MINE = "error: reward_funcs: failing:reward "


@pytest.mark.distributed
@pytest.mark.parametrize(
    "ranks, does, code, tracebacks, last",
    [
        ("1", "raise KeyError('of mine')", 2, 1, rf"{OF_MINE}raised KeyError: 'of mine' \(.*/failing\.py, line 7\)"),
        ("01", "return [None]", 2, 0, rf"{OF_MINE}returned 1 rewards; expected a list of \d, a finite number .*"),
        ("1", "import trl; trl.GRPOTrainer.compute_loss = None", 1, 1, "error: rank 1 of 2 failed; .* is above"),
        ("1", "os.kill(os.getpid(), signal.SIGKILL)", 137, 0, "error: rank 1 of 2 was ended by SIGKILL, .* memory .*"),
        ("1", "os._exit(7)", 7, 0, "error: rank 1 of 2 ended with exit code 7"),
    ],
)
def test_a_failing_rank_is_told_once(
    tmp_path, tiny_model, examples_json, quick_python, ranks, does, code, tracebacks, last
):
    (tmp_path / "failing.py").write_text(FAILING.format(ranks=tuple(ranks), does=does))
    result = run_grpo(
        *[tiny_model, examples_json, tmp_path / "out", "--reward_funcs", "failing:reward"], PYTHON=str(quick_python)
    )
    lines = result.stderr.strip().splitlines()
    assert result.returncode == code and re.fullmatch(last, lines[-1]), result.stderr
    assert sum(line.startswith("Traceback") for line in lines) == tracebacks
    if "compute_loss" in does:
        assert lines[-2] == "TypeError: 'NoneType' object is not callable"
    assert "ChildFailedError" not in result.stderr and "torch/distributed/elastic" not in result.stderr


def test_a_process_alone_tells_and_leaves(monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(SystemExit) as left, told_once():
        raise Mistake("first line\n  second line")
    assert left.value.code == 2 and capsys.readouterr().err == "error: first line second line\n"
    with pytest.raises(SystemExit) as left, told_once():
        raise KeyError("of mine")
    assert left.value.code == 1 and capsys.readouterr().err.endswith("\nKeyError: 'of mine'\n")


def test_of_several_processes_the_first_tells(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("open_r1.base.errors.PAUSE", 0)
    for rank in (1, 0):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        with pytest.raises(SystemExit), told_once():
            raise Mistake(f"of {rank}")
    assert capsys.readouterr().err == "error: of 1\n" and (tmp_path / FIRST).read_text() == "1"
    assert json.loads((tmp_path / "0/error.json").read_text())["message"] == "Mistake: of 0"


@pytest.mark.parametrize(
    "error, told",
    [(Mistake("of mine"), "cvbench: error: of mine"), (OSError(28, "full"), "cvbench: error: [Errno 28] full")],
)
def test_of_several_processes_of_a_command_the_first_tells(tmp_path, monkeypatch, error, told):
    """As `accelerate launch` starts an evaluation."""
    monkeypatch.setattr("open_r1.base.errors.PAUSE", 0)
    monkeypatch.setattr(sys, "argv", ["cvbench.py"])
    codes = []
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        with pytest.raises(SystemExit) as left:
            front_door.run(raising(error))
        codes.append(left.value.code)
    assert codes == [told, 1]


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_of_several_processes_that_are_stopped_one_tells(monkeypatch, capsys, rank, lines):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as left:
        front_door.run(raising(KeyboardInterrupt()))
    assert left.value.code == 130 and capsys.readouterr().err.count("SIGINT: nothing was written") == lines


def raising(error: BaseException) -> Callable[[], None]:
    """A command that ends so."""

    def main() -> None:
        raise error

    return main


def failure(code: int, timestamp: int, error_file: str = "<N/A>") -> SimpleNamespace:
    return SimpleNamespace(exitcode=code, timestamp=timestamp, error_file=error_file)


def test_the_last_word_names_the_cause(tmp_path):
    """Not those whom the launcher ended, nor those who lost the one that was killed."""
    term, kill = -signal.SIGTERM, -signal.SIGKILL
    told = str(tmp_path / "0/error.json")
    (tmp_path / FIRST).write_text("0")
    assert last_word({0: failure(2, 5, told), 1: failure(term, 5)}, 2) == (2, "")
    assert last_word({1: failure(term, 5), 0: failure(1, 5, told)}, 2)[1].startswith("error: rank 0 of 2 failed;")
    assert last_word({0: failure(1, 5, told), 1: failure(kill, 6)}, 2)[1].startswith("error: rank 1 of 2 was ended by")
    assert last_word({0: failure(1, 5, told), 1: failure(kill, 36)}, 2)[1].startswith("error: rank 0 of 2 failed;")
    (tmp_path / FIRST).write_text("")  # rank 0 was ended before it could tell that it lost the other
    assert last_word({0: failure(term, 4, told), 1: failure(3, 5)}, 2) == (
        3,
        "error: rank 1 of 2 ended with exit code 3",
    )


@pytest.mark.slow
def test_a_signal_during_the_check_ends_it(tmp_path, tiny_model, examples_json):
    """No worker has started yet; the check goes with the launcher."""
    launcher = subprocess.Popen(
        ["sh", str(REPO_ROOT / "src/open-r1-multimodal/run_grpo_SAT.sh")],
        env=launch_env(tiny_model, examples_json, tmp_path / "out"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.wait(timeout=3)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=20) == 128 + signal.SIGTERM
    assert launcher.stderr.read() == "\nstopped by SIGTERM; nothing has started\n"
    left = subprocess.run(["ps", "-o", "pid=", "-s", str(launcher.pid)], capture_output=True, text=True)
    assert left.stdout.strip() == ""


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: append_rows(folder / "log.jsonl", [{"text": "x" * 20_000}]),
        lambda folder: torch.save({"weights": torch.zeros(20_000)}, folder / "optimizer.pt"),
        lambda folder: save_file({"weights": torch.zeros(20_000)}, folder / "model.safetensors"),
    ],
    ids=["rows", "optimizer", "weights"],
)
def test_a_full_disk_is_one_line(write, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(Mistake, match=r"^.*: takes no more, is the disk full") as told, full_disk(str(tmp_path)):
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(told.value).startswith(str(tmp_path)) and "\n" not in str(told.value)


def test_other_failures_are_no_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), full_disk(str(tmp_path)):
        raise RuntimeError("shape")
