"""What a user gets wrong is one line, before any process of a run starts; what fails in a run is told once."""

import importlib
import re
import resource
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
import yaml
from safetensors.torch import save_file

from open_r1 import grpo, sft
from open_r1.base import errors as front_door
from open_r1.base.errors import REPO_ROOT
from open_r1.base.files import append_rows
from open_r1.configs import LOSS_TYPES
from open_r1.running import entry
from open_r1.running.entry import Command, check_run, train
from open_r1.running.failures import Mistake, exit_on_error, full_disk, last_word
from open_r1.settings.limits import CHOICES, LIMITS, NEEDED
from open_r1.settings.recipes import PLANNED_PROCESSES
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
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
            check_run(command, ["--config", str(tmp_path / "recipe.yaml"), *arguments], launch, processes=2)
        except Mistake as mistake:
            return str(mistake)
        return ""

    return find


def test_nothing_is_wrong_with_the_papers_recipe(find_mistake, tmp_path):
    assert find_mistake() == ""
    assert not (tmp_path / "out").exists()


RECIPE_FILE, NO_RECIPE = "{folder}/recipe.yaml", "CONFIG, --config: no recipe"
MODEL = "MODEL, model_name_or_path"
# What is wrong, in the recipe or as an argument -> how its line begins; rows differ in kind.
MISTAKES = [
    ({"num_generation": 4}, f"{RECIPE_FILE}: unknown setting 'num_generation'; did you mean num_"),
    ({"num_generations": "eight"}, f"{RECIPE_FILE}: num_generations: invalid int value: 'eight'"),
    ({"num_generations": [8]}, f"{RECIPE_FILE}: num_generations: expected one value, not [8]"),
    ({"learning_rate": None}, f"{RECIPE_FILE}: learning_rate: needs a value"),
    ({"optim": "adamw_foo"}, f"{RECIPE_FILE}: optim: 'adamw_foo' is none of adamw_torch, "),
    ({"reward_funcs": "accuracy format"}, f"{RECIPE_FILE}: reward_funcs: expected a list, [acc"),
    ({"reward_funcs": []}, "reward_funcs: needs a value"),
    ({"reward_funcs": 5}, f"{RECIPE_FILE}: reward_funcs: expected a list of texts, not 5 (int)"),
    ({"reward_funcs": [None]}, f"{RECIPE_FILE}: reward_funcs: expected a list of texts, not [None]"),
    ({"reward_funcs": ["accuracy", {"format": 0.5}]}, f"{RECIPE_FILE}: reward_funcs: expected a list of texts, not ["),
    ({"resume_from_checkpoint": True}, f"{RECIPE_FILE}: resume_from_checkpoint: expected a text, not True (bool)"),
    ({"chat_template": ["base"]}, f"{RECIPE_FILE}: chat_template: expected a text, not ['base'] (list)"),
    ({"output_dir": date(2024, 1, 2)}, f"{RECIPE_FILE}: output_dir: expected a text, not 2024-01-02 (date)"),
    ({"generation_kwargs": [1]}, f"{RECIPE_FILE}: generation_kwargs: expected names and values, not [1] (list)"),
    ({"chat_template_kwargs": {1: 2}}, f"{RECIPE_FILE}: chat_template_kwargs: 1 is no name"),
    ({"model_name_or_path": 5}, f"{MODEL}: 5: "),
    ({"model_name_or_path": None}, "model_name_or_path: needs a value; name a model in the recipe, or in MODEL"),
    ("--chat_template_kwargs {{'style':'direct'}}", "chat_template_kwargs: not JSON (Expecting property name "),
    ("--generation_kwargs top_p=0.9", "generation_kwargs: expected JSON, as in "),
    ("--accelerator_config no.json", "accelerator_config: no file no.json"),
    ("--deepspeed {folder}/broken.jinja", "deepspeed: {folder}/broken.jinja: not JSON"),
    ("--deepspeed {few}", "deepspeed: {few}: expected an object"),
    ({"rotate_options": True, "num_generations": 32}, "rotate_options: a process asks both "),
    ({"generation_kwargs": {"num_beams": 3}}, "generation_kwargs: num_beams: "),
    ("--use_vllm true --shared_prefix false", "shared_prefix: with use_vllm it must be true"),
    ("--use_vllm true --top_p 0.9", "top_p: vLLM's log-probabilities are those behind it, "),
    ('--use_vllm true --generation_kwargs {{"top_k":20}}', "top_k: vLLM's log-probabilities "),
    ("--freeze_vision true --freeze_llm true", "freeze_vision, freeze_merger, freeze_llm: nothing "),
    ("--load_in_4bit true", "load_in_4bit, load_in_8bit: weights that bitsandbytes quantised"),
    ("--torch_compile true", "torch_compile: "),
    ("--train_sampling_strategy sequential", "train_sampling_strategy: shuffle_dataset says"),
    ('--model_init_kwargs {{"revision":"x"}}', "model_init_kwargs: this command loads the model itself"),
    ("--enable_jit_checkpoint true", "enable_jit_checkpoint: a run that a signal ends goes on from its newest whole"),
    ("--eval_strategy steps", "eval_strategy steps: there are no held-out examples"),
    ("--completions_per_step 60", "completions_per_step 60 is not a multiple of 16 "),
    ("--completions_per_step -64", "completions_per_step -64: "),
    ("--learning_rate -1e-5", "learning_rate -1e-05: expected a number of at least 0"),
    ("--learning_rate nan", "learning_rate nan: expected a finite number"),
    (f"--max_steps {10**400}", f"max_steps {10**400}: expected a finite number of at most 64 bits"),
    ("--dataloader_num_workers -1", "dataloader_num_workers -1: expected a number of at least 0"),
    ("--top_entropy_quantile -0.5", "top_entropy_quantile -0.5: expected a number of at least 0 and at most 1"),
    ("--ref_model_sync_steps 0", "ref_model_sync_steps 0: expected a number of at least 1"),
    ("--delta 0.3", "delta 0.3: expected a number above 1; it bounds the ratio itself"),
    ("--temperature 0", "temperature 0.0: expected a number above 0; completions are sampled"),
    ("--num_generations 1", "num_generations 1: expected a number of at least 2; "),
    ("--num_generations 6", "num_generations 6: a rollout of 64 completions "),
    ("--loss_type cispo", "epsilon_high: with loss_type cispo it is the largest ratio itself"),
    ("--loss_type gpro", "loss_type: 'gpro' is none of grpo, "),
    ("--reward_weights 1 2 3", "reward_weights: 3 for 2 reward_funcs (accuracy, format); "),
    ("--max_pixels 1", "max_pixels 1: expected a number of at least 784; "),
    ("--max_pixels 3000", "min_pixels 3136 is more than max_pixels 3000; min_pixels: "),
    ("--per_device_train_batch_size 0", "per_device_train_batch_size 0: "),
    ("--max_steps -5", "max_steps -5: expected a number of at least 1, or -1; "),
    ("--save_steps 0", "save_steps 0.0: expected a number above 0; save_strategy: no "),
    ("--max_steps many", "--max_steps/--max-steps: invalid int value: 'many'"),
    ("--max_step 1", "unknown argument '--max_step'; did you mean max_steps?"),  # no abbreviations
    ("quickly", "unknown argument 'quickly'"),
    ("--torch_dtype bfloat16", "unknown argument '--torch_dtype'; did you mean dtype?"),
    ("--batch-size=2", "unknown argument '--batch-size=2'; did you mean per_device_train_batch_size?"),
    ({"model": "x"}, f"{RECIPE_FILE}: unknown setting 'model'; did you mean model_name_or_path?"),
    ("--config dr-grpo.yaml", f"{NO_RECIPE} dr-grpo.yaml; did you mean configs/overlays/dr_grpo.yaml?"),
    ("--config papo", f"{NO_RECIPE} papo; did you mean configs/overlays/papo.yaml?"),
    ("--config {folder}/recip.yaml", NO_RECIPE + " {folder}/recip.yaml; did you mean {folder}/rec"),
    ("--config zzz.yaml,papo.yaml", f"{NO_RECIPE} zzz.yaml,papo.yaml; several stand between blanks in CONFIG, and "),
    ("--config zzz.yaml", f"{NO_RECIPE} zzz.yaml; configs/README.md lists them"),
    ("--chat_template lama", "chat_template: no file 'lama'"),
    ("--chat_template {folder}/broken.jinja", "chat_template: "),
    ("--reward_funcs accuracy order_consistency", "reward_funcs: order_consistency "),
    ("--reward_funcs acuracy", "reward_funcs: unknown reward 'acuracy'"),
    ("--reward_funcs no_such_module:f", "reward_funcs: no module 'no_such_module'"),
    ("--resume_from_checkpoint /no", "resume_from_checkpoint: no folder /no"),
    ("--output_dir {data}", "{data} is a file; name a folder"),
    ("--dataset_name /no.json", "/no.json: no such file"),
    ("--task jigsaw", "task: 'jigsaw' is none of pretext"),
    ("--task pretext", "{data}: 0 pictures (.jpg, "),
    ("--dataset_name {model}", "{model} is the folder of a model; name the data (DATA and MODEL "),
    ("--dataset_name {few}", "{few}: a step asks 8 different prompts (64 completions / "),
    ("--model_name_or_path /no/model", f"{MODEL}: /no/model: no such file or folder"),
    ("--model_name_or_path ~nobody/model", f"{MODEL}: ~nobody/model: no such file or folder"),
    ("--model_name_or_path no/model", f"{MODEL}: no/model: neither here nor to be had"),
    ("--model_name_or_path {data}", MODEL + ": {data} is a file; name the folder of a model"),
]


@pytest.mark.parametrize("wrong, message", MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line(find_mistake, tmp_path, tiny_model, examples_json, wrong, message):
    few = write_examples(tmp_path / "few", count=7)
    (tmp_path / "broken.jinja").write_text("{% for %}")
    places = {"folder": tmp_path, "model": tiny_model, "data": examples_json, "few": few}
    told = find_mistake(**wrong) if isinstance(wrong, dict) else find_mistake(*wrong.format(**places).split())
    assert told.startswith(message.format(**places)) and "\n" not in told, told


def test_every_limit_is_that_of_a_setting():
    hints = [get_type_hints(kind) for command in (grpo.COMMAND, sft.COMMAND) for kind in command.arguments]
    assert {*LIMITS, *CHOICES, *NEEDED} <= set().union(*hints)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lora_rr: 4", r"{path}: unknown setting 'lora_rr'; did you mean lora_r\?"),
        ("a: [", r"{path}: not YAML \("),
        ("a: " + "[" * 500 + "]" * 500, r"{path}: not YAML \(nested too deep\)"),
        ("run_name: 2024-13-45", r"{path}: not YAML \(no timestamp \(month must .* line 1, column 11"),
        ("max_steps: " + "9" * 5000, r"{path}: not YAML \(no int "),
        ("max_steps: 1\nmax_steps: 2", r"{path}: not YAML \(max_steps is there twice in .* line 2, column 1"),
        ("4", r"{path}: a recipe must contain a YAML mapping"),
        ("env: 4", r"{path}: env: expected names and values"),
        ("env: {1: x}", r"{path}: env: 1: cannot be set \("),
        ("env: {A=B: 1}", r"{path}: env: 'A=B': cannot be set \("),
        ('env: {A: "\\0"}', r"{path}: env: 'A': cannot be set \("),
        ("base: overlay.yaml", r"{path}: base: leads back to this file"),
        ("base: [recipe.yaml, none.yaml]", r"{path}: base: no file .*/none\.yaml"),
        (None, r"CONFIG, --config: no recipe {path}; "),
    ],
)
def test_a_mistake_in_an_overlay_names_it(find_mistake, tmp_path, text, message):
    path = tmp_path / "overlay.yaml"
    if text is not None:
        path.write_text(text)
    told = find_mistake("--config", str(path))
    assert re.match(message.format(path=path), told) and "\n" not in told, told


ASK, EXPORT = "scripts/ask.py", "scripts/export.py"


@pytest.mark.parametrize(
    "script, arguments, told",
    [
        (ASK, "--model {file} --image {image} --question ?", "--model: {file} is a file; name the folder"),
        (ASK, "--model /no --image {image} --question ?", "--model: /no: no such file or folder"),
        (EXPORT, "--adapter /no/run --output {folder}/new", "--adapter: no folder /no/run"),
        (EXPORT, "--adapter {adapter} --output {folder}/new", "--adapter: {adapter} is an adapter without "),
        (EXPORT, "--adapter {adapter} --base {file} --output {folder}/new", "--base: {file} is a file; name"),
    ],
)
def test_the_option_that_named_a_model_is_told(tmp_path, monkeypatch, examples_json, script, arguments, told):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    image = next((examples_json.parent / "images").iterdir())
    places = {"file": examples_json, "image": image, "folder": tmp_path, "adapter": tmp_path / "adapter"}
    monkeypatch.setattr(sys, "argv", ["x", *arguments.format(**places).split()])
    with pytest.raises(Mistake, match=f"^{re.escape(told.format(**places))}"):
        load_script(REPO_ROOT / script).main()
    assert not (tmp_path / "new").exists()


def test_a_question_is_from_the_data_or_about_an_image(monkeypatch, capsys):
    for arguments in ("", "--image a.png", "--data a.json --image a.png", "--data a.json --question ?"):
        monkeypatch.setattr(sys, "argv", ["x", "--model", "no", *arguments.split()])
        with pytest.raises(SystemExit):
            load_script(REPO_ROOT / ASK).main()
        assert "give --data, or --image and --question" in capsys.readouterr().err


def test_what_is_no_mistake(find_mistake):
    """A single value is a list of one, a number a text; both orders of a question fit the paper's recipe."""
    changes = {"run_name": 7, "scale_rewards": False, "gradient_checkpointing_kwargs": '{"use_reentrant": false}'}
    assert find_mistake(reward_funcs="accuracy", lora_target_modules="all-linear", **changes) == ""
    assert find_mistake(reward_funcs=["accuracy", "order_consistency"], rotate_options=True) == ""


def test_folders_that_hold_no_model(find_mistake, tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    assert re.search(f"{tmp_path} holds no model", find_mistake(model_name_or_path=str(tmp_path)))
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter; make a model of it" in find_mistake(model_name_or_path=str(tmp_path))


@pytest.mark.parametrize("text", ["garbage", "distributed_type: DEEPSPEED\nzero: 3", "a: ["])
def test_a_launch_configuration_that_is_none(tmp_path, text):
    (tmp_path / "launch.yaml").write_text(text)
    with pytest.raises(Mistake, match=r"ACCELERATE_CONFIG: .*launch\.yaml does not describe a launch: ") as raised:
        check_run(sft.COMMAND, [], str(tmp_path / "launch.yaml"), 2)
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
    with pytest.raises(SystemExit), exit_on_error():
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
        with pytest.raises(SystemExit) as left, exit_on_error():
            train(grpo.COMMAND, command)
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.splitlines()[-1].startswith("error: ")
        assert ("Traceback" in told and "training_args.py" in told) == (shown == "1")


def test_every_command_shows_the_cause_on_request(tmp_path):
    for more, count in ([], 0), (["--traceback"], 1):
        command = [sys.executable, REPO_ROOT / "scripts/report.py", "nowhere", *more]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 1 and ("Traceback" in result.stderr) == bool(count), result.stderr
        assert "error: " in result.stderr.splitlines()[-1]


# --- under the run script ----------------------------------------------------------------------------------------


def test_the_script_tells_its_own(tmp_path, tiny_model):
    """What else is wrong with its variables: test_launch.py."""
    result = run_grpo(tiny_model, tmp_path / "no.json", tmp_path / "out", NUM_PROCESSES="two")
    line = "error: NUM_PROCESSES: 'two' is not a number of processes\n"
    assert (result.returncode, result.stderr) == (2, line) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_mistake_that_the_check_finds_is_one_line(tmp_path, tiny_model, examples_json, quick_python):
    arguments = ["--num_generations", "3"]
    result = run_grpo(tiny_model, examples_json, tmp_path / "out", *arguments, PYTHON=str(quick_python))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: num_generations 3: a rollout of 16 completions ")
    assert not (tmp_path / "out").exists()


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
        ("1", "import trl; trl.GRPOTrainer.compute_loss = None", 1, 1, "error: rank 1 of 2 ended .* 1; its .* above"),
        ("1", "os.kill(os.getpid(), signal.SIGKILL)", 137, 0, "error: rank 1 of 2 was ended by SIGKILL, .* memory .*"),
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
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for error, code, last in (
        (Mistake("first line\n  second line"), 2, "error: first line second line"),
        (OSError(28, "full"), 2, "error: [Errno 28] full"),
        (KeyError("of mine"), 1, "KeyError: 'of mine'"),
    ):
        with pytest.raises(SystemExit) as left, exit_on_error():
            raise error
        told = capsys.readouterr().err.splitlines()
        assert left.value.code == code and told[-1] == last and (len(told) == 1) == (code == 2)


TOGETHER = """import os, sys, time
from open_r1.base.errors import Mistake, run
def main():
    if os.environ["RANK"] in sys.argv[1]:
        raise Mistake(f"of {os.environ['RANK']}")
    time.sleep(60)
run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks, told", [("01", "of 0"), ("1", "of 1")])
def test_of_several_processes_of_a_command_one_tells(tmp_path, ranks, told):
    """As `accelerate launch` starts an evaluation; torch's launcher has its own report below."""
    (tmp_path / "command.py").write_text(TOGETHER)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "command.py", ranks]
    command = [sys.executable, "-m", *launcher]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    lines = [line for line in result.stderr.splitlines() if line.startswith("command: error")]
    assert result.returncode == 1 and lines == [f"command: error: {told}"], result.stderr


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_of_several_processes_that_are_stopped_one_tells(monkeypatch, capsys, rank, lines):
    monkeypatch.setenv("LOCAL_RANK", rank)

    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        front_door.run(main)
    assert left.value.code == 130 and capsys.readouterr().err.count("SIGINT: nothing was written") == lines


def test_a_command_whose_output_is_closed_ends_well(monkeypatch):
    """As `command >&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    front_door.run(lambda: print("unheard"))


def test_the_last_word_names_the_first_to_fail():
    """Behind it are those whom the launcher ended."""
    ended = SimpleNamespace(exitcode=-signal.SIGTERM)
    for code, last_line in (
        (2, ""),
        (1, "error: rank 1 of 2 ended with exit code 1; its traceback is above"),
        (7, "error: rank 1 of 2 ended with exit code 7"),
        (-11, "error: rank 1 of 2 was ended by SIGSEGV"),
        (-9, "error: rank 1 of 2 was ended by SIGKILL, as the kernel does when memory runs out"),
    ):
        failures = {1: SimpleNamespace(exitcode=code), 0: ended}
        assert last_word(failures, 2) == (code if code > 0 else 128 - code, last_line)


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
