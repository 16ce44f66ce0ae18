"""The doctor: its memory count against peak memory on the CPU, and what it finds in runs that are broken."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, Qwen2VLProcessor
from trl import ModelConfig
from trl.trainer import grpo_trainer

from open_r1 import grpo, sft
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.configs import FreezeArguments, GRPOScriptArguments
from open_r1.doctor import cost, environment, rewards
from open_r1.doctor.cost import checkpoint_bytes
from open_r1.doctor.examination import FAMILIES, examine
from open_r1.doctor.finding import Finding, Status
from open_r1.doctor.run import MEASURED_STEPS, Run
from open_r1.doctor.survey import survey
from open_r1.engines.shared_prefix import Prompt
from open_r1.models.families import find_family
from open_r1.models.loading import load_config, load_processor
from open_r1.models.memory import (
    Load,
    MemoryCount,
    activation_bytes,
    build_model,
    cache_bytes,
    count_memory,
    count_run,
)
from open_r1.rewards import accuracy_reward, bare_accuracy_reward, get_reward_funcs
from open_r1.running.data import count_prompt_tokens
from open_r1.running.entry import Command
from open_r1.settings.processes import Launch
from open_r1.settings.recipes import merge_recipes
from open_r1.tasks.examples import read_examples
from open_r1.tiny import make_config as make_model_config
from open_r1.tiny import make_model, make_processor, make_tokenizer
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from support import families, load_weights, make_config, make_trainer, run_grpo, write_examples

# Trains two steps of the recipe at hand with a model of no size, which imports and allocates all that a run does,
# and then with the model itself: what comes on top is the model's.
MEASURE = """
import gc, sys
sys.path.insert(0, {tests!r})
from support import vowel_share
from open_r1.{script} import COMMAND
from open_r1.settings.recipes import read_recipe

def train(model):
    arguments = ["--model_name_or_path", model, *{arguments!r}]
    COMMAND.build_trainer(*read_recipe(COMMAND.arguments, arguments)).train()

# Of this process's own memory: getrusage's peak begins with that of the process that started this one.
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

train({none!r})
gc.collect()
resident = status("VmRSS")
train({model!r})
print("measured", status("VmHWM") - resident)
"""


# Every larger block goes back to the system when it is freed, so that the peak is what is alive, not what is cached.
MEASURED = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def save_model(folder: Path, hidden_size: int, num_layers: int) -> Path:
    tokenizer = make_tokenizer()
    make_processor(tokenizer).save_pretrained(folder)
    make_model(make_model_config(tokenizer, hidden_size=hidden_size, num_layers=num_layers)).save_pretrained(folder)
    return folder


def measure(script: str, model: Path, none: Path, arguments: list[str]) -> int:
    """Bytes that training the model takes, above training none, in a process of its own."""
    code = MEASURE.format(
        tests=str(Path(__file__).parent), script=script, arguments=arguments, none=str(none), model=str(model)
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=MEASURED)
    assert result.returncode == 0, result.stderr[-3000:]
    return int(result.stdout.splitlines()[-1].split()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, hidden_size", [("grpo", 512), ("sft", 1024), pytest.param("frozen", 1024, marks=pytest.mark.nightly)]
)
def test_count_is_the_peak_within_15_percent(tmp_path, examples_json, case, hidden_size):
    script, frozen = "sft" if case == "frozen" else case, case == "frozen"
    arguments = ["--config", str(REPO_ROOT / f"tests/data/{script}.yaml"), "--dataset_name", str(examples_json)]
    arguments += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--max_steps", "2"]
    arguments += ["--save_strategy", "no", "--disable_tqdm", "true"]
    arguments += {
        "grpo": ["--reward_funcs", "support:vowel_share"],
        "sft": ["--per_device_train_batch_size", "1"],
    }[script]
    if frozen:
        arguments += ["--freeze_vision", "true", "--freeze_llm", "true", "--freeze_merger", "false"]
    model = save_model(tmp_path / "model", hidden_size, 8)
    measured = measure(script, model, save_model(tmp_path / "none", 64, 2), arguments)
    # 4 completions of one prompt, 16 a rollout; or one prompt and its answer
    style = "reasoning" if script == "grpo" else "direct"
    processor = load_processor(model, chat_template="base", max_pixels=12544)
    prompt = max(count_prompt_tokens(example, processor, style=style) for example in read_examples(examples_json))
    load = Load(1, prompt, 32, 48, 4, 16) if script == "grpo" else Load(1, prompt, 6, 48, 1)
    counted = count_memory(
        make_model_config(make_tokenizer(), hidden_size=hidden_size, num_layers=8),
        ModelConfig(dtype="float32"),
        FreezeArguments(frozen, frozen, False if frozen else None),
        load,
        Launch(),
        has_reference=script == "grpo",
        gradient_checkpointing=False,
        is_cpu=True,
    )
    assert counted.peak == pytest.approx(measured, rel=0.15)


def test_weights_and_states_are_counted_to_the_byte():
    """By hand for Adam in float32, under ZeRO on four GPUs, and with a frozen part."""
    config = make_model_config(make_tokenizer())
    total = sum(p.numel() for p in make_model(config).parameters())
    vision = sum(p.numel() for name, p in make_model(config).named_parameters() if ".visual." in name)
    load = Load(1, 100, 10, 16, 4, 4)

    def count(launch: Launch, dtype: str = "bfloat16", **flags: bool):
        return count_memory(config, ModelConfig(dtype=dtype), FreezeArguments(**flags), load, launch, True)

    plain = count(Launch(), "float32")
    assert plain.base == {"weights": 4 * total, "optimiser": 8 * total, "reference model": 4 * total}
    assert plain.backward["gradients"] == 4 * total
    two, three = (count(Launch(4, stage)) for stage in (2, 3))
    assert two.base == {"weights": 2 * total, "optimiser": 12 * total / 4, "reference model": 2 * total}
    assert three.base["weights"] == three.base["reference model"] == 2 * total / 4
    # DeepSpeed adds gradients up in float32; ZeRO-2 in what its optimiser takes, ZeRO-3 and a float32 model copy them
    assert two.backward["gradients"] == three.backward["gradients"] == 4 * total / 4
    assert two.update == {"gradients": total} and three.update == {"gradients": total, "gradients, flat": total}
    assert count(Launch(4, 2), "float32").update == {"gradients": total, "gradients, flat": total}
    frozen = count(Launch(4, 2), freeze_vision=True)
    assert frozen.base["optimiser"] == 12 * (total - vision) / 4
    assert frozen.backward["activations"] < two.backward["activations"]
    adapted = ModelConfig(dtype="bfloat16", use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"])
    of_adapter = count_memory(config, adapted, FreezeArguments(), load, Launch(), True)
    assert "reference model" not in of_adapter.base  # it is the model without its adapter


@pytest.mark.parametrize(
    ("batch", "generations", "generation_steps", "prompts", "rollout"),
    [(8, 4, 2, 2, 16), (6, 4, 2, 2, 12), (2, 4, 4, 1, 8)],
)
def test_the_load_of_a_run_is_that_of_its_settings(
    tiny_model, tmp_path, batch, generations, generation_steps, prompts, rollout
):
    """A micro-batch may hold a part of a group, and a part of a group needs its prompt as a whole one does."""
    script_args = GRPOScriptArguments("none", max_prompt_length=200, max_pixels=12544)
    settings = {"per_device_train_batch_size": batch, "num_generations": generations, "max_completion_length": 24}
    settings["steps_per_generation"] = generation_steps
    args = make_config(tmp_path, beta=0.0, **settings)
    model_args = ModelConfig(str(tiny_model), dtype="float32")
    config = load_config(str(tiny_model))
    patches = find_family(config.model_type).count_patches(config, 12544)
    load = Load(prompts, 200, 24, patches, batch, rollout)
    expected = count_memory(config, model_args, FreezeArguments(), load, Launch(), gradient_checkpointing=False)
    assert count_run(script_args, args, model_args, Launch()) == expected
    args.use_vllm = True
    assert count_run(script_args, args, model_args, Launch()) == replace(expected, rollout={})
    with_reference = count_run(script_args, make_config(tmp_path, beta=0.1, **settings), model_args, Launch())
    assert with_reference.base["reference model"] == expected.base["weights"]
    settings |= {"beta": 0.0, "teacher_model_name_or_path": str(tiny_model)}
    taught = count_run(script_args, make_config(tmp_path, **settings), model_args, Launch())
    assert taught == replace(expected, base={**expected.base, "teacher": expected.base["weights"]})
    halved = count_run(script_args, make_config(tmp_path, bf16=True, **settings), model_args, Launch(4, 3))
    assert halved.base["teacher"] == expected.base["weights"] / 2 / 4
    whole = count_run(
        script_args, make_config(tmp_path, distill_whole_vocabulary=True, **settings), model_args, Launch()
    )
    tokens, head = batch * 24, config.text_config.vocab_size * config.text_config.hidden_size
    assert whole.backward["divergence"] == 4 * (2 * tokens * 32768 + head)


@pytest.mark.parametrize("model_type", families("qwen2_vl", "smolvlm"))
def test_every_family_and_recipe_is_counted(tiny_models, model_type, capsys, monkeypatch):
    configs = REPO_ROOT / "configs"
    recipes = [[configs / f"{name}.yaml"] for name in ("grpo_sat", "grpo_sat_lora", "sft_sat")]
    if model_type == "qwen2_vl":
        recipes = [
            [path] for path in (*configs.glob("*.yaml"), *configs.glob("tiny/*.yaml"), *configs.glob("laptop/*.yaml"))
        ]
        recipes += [[configs / "grpo_sat.yaml", path] for path in configs.glob("overlays/*.yaml")]
    for paths in recipes:
        arguments = ["--memory", *(part for path in paths for part in ("--config", str(path)))]
        arguments += ["--model_name_or_path", str(tiny_models[model_type])]
        if "teacher_model_name_or_path" in merge_recipes(paths):
            arguments += ["--teacher_model_name_or_path", str(tiny_models[model_type])]
        if "lora_target_modules" in merge_recipes(paths):
            arguments += ["--accelerate_config", "zero3", "--num_processes", "2"]
        doctor_main(monkeypatch, *arguments)
        output = capsys.readouterr().out
        assert "computed" in output and float(output.split()[-1]) > 0


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_5"])
def test_a_cache_holds_what_is_counted(model_type):
    """Keys and values grow with every token, what a recurrent layer carries does not; in bfloat16, but its state."""
    config = make_model_config(make_tokenizer(), model_type)
    text = make_model(config).to(torch.bfloat16).model.language_model
    for tokens in (5, 90):
        cache, states = DynamicCache(config=config), torch.randn(1, tokens, 64, dtype=torch.bfloat16)
        text(inputs_embeds=states, position_ids=torch.arange(tokens).expand(3, 1, -1), past_key_values=cache)
        held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
        for layer in cache.layers:
            held += [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        a_token, a_completion = cache_bytes(config.text_config, 2)
        assert sum(part.nbytes for part in held if part is not None) == a_token * tokens + a_completion
        assert (a_completion > 0) == (model_type == "qwen3_5")


@pytest.mark.parametrize(
    "use_peft, checkpointing, kept",
    [(False, True, "all"), (False, False, "all"), (True, True, "adapter"), (True, False, "all")],
)
def test_autocasts_copies_are_counted(use_peft, checkpointing, kept):
    """Two bytes a weight of a linear layer; a frozen one is held for the backward pass alone."""
    config = make_model_config(make_tokenizer())
    model_args = ModelConfig(dtype="float32", use_peft=use_peft, lora_target_modules=["q_proj", "v_proj"])
    load = Load(1, 100, 10, 16, 4, 4)
    settings = {"gradient_checkpointing": checkpointing, "has_autocast": True}
    count = count_memory(config, model_args, FreezeArguments(), load, Launch(), **settings)
    model = build_model(config, model_args, FreezeArguments(), Launch())
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    weights = [layer.weight for layer in layers if kept == "all" or layer.weight.requires_grad]
    assert count.backward["16-bit copies"] == 2 * sum(weight.numel() for weight in weights)


def test_what_is_kept_for_a_layer_is_that_of_its_kind():
    """A gated delta net keeps more than attention, in chunks: a count of one kind would miss it."""
    load = Load(1, 256, 128, 16, 4)
    counts = []
    for kinds in (["full_attention"] * 4, ["linear_attention"] + ["full_attention"] * 3, ["linear_attention"] * 4):
        config = make_model_config(make_tokenizer(), "qwen3_5", num_layers=4)
        config.text_config.layer_types = kinds
        model = build_model(config, ModelConfig(dtype="float32"), FreezeArguments(), Launch())
        counts.append(activation_bytes(model, load, gradient_checkpointing=True))
    assert counts[0] < counts[1] == pytest.approx(counts[2], rel=0.01)


# ---- The examination

RECIPE = REPO_ROOT / "tests/data/grpo.yaml"
TAGLESS = "{% for message in messages %}{% for part in message.content %}"
TAGLESS += "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}"
TAGLESS += "{% endfor %}{% endfor %}"


@pytest.fixture
def examined(tiny_model, examples_json, tmp_path, monkeypatch):
    """Examine a run on a tiny model as far as it is asked for; what the doctor finds, finding by finding."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def examine_run(*arguments: str, recipe: Path = RECIPE, command: Command = grpo.COMMAND) -> Iterator[Finding]:
        named = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(examples_json)]
        named += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--max_steps", "100"]
        named += ["--max_completion_length", "8"] if command is grpo.COMMAND else []
        return examine(Run(command, ["--config", str(recipe), *named, *arguments], Launch(2, 2)))

    return examine_run


def copy_model(source: Path, target: Path, part: str = "", factor: float = 1) -> Path:
    """A model's folder in which the parameters whose name holds a part are multiplied."""
    shutil.copytree(source, target)
    weights = load_weights(target)
    weights = {name: value * factor if part in name else value for name, value in weights.items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def wrong_pin(world: SimpleNamespace) -> list[str]:
    installed = environment.version
    world.patch.setattr(environment, "version", lambda name: "1.0.1" if name == "trl" else installed(name))
    return []


def broken_image(world: SimpleNamespace) -> list[str]:
    data = write_examples(world.folder / "data")
    path = data.parent / "images/3_0.png"
    path.write_bytes(path.read_bytes()[:60])
    return ["--dataset_name", str(data)]


def no_answer(world: SimpleNamespace) -> list[str]:
    data = write_examples(world.folder / "data")
    records = json.loads(data.read_text())
    del records[2]["messages"][1]
    data.write_text(json.dumps(records))
    return ["--dataset_name", str(data), "--reward_funcs", "format", "consistency(among_right=True)"]


def leak(world: SimpleNamespace) -> list[str]:
    held_out = json.loads(world.data.read_text())[:2]
    for record in held_out:
        record["messages"][0]["content"] = "<image>What is to be seen?"
        record["images"] = [str(world.data.parent / name) for name in record["images"]]
        record["options"] = []
    (world.folder / "held_out.json").write_text(json.dumps(held_out))
    return ["--eval_dataset_name", str(world.folder / "held_out.json")]


def lost_tags(world: SimpleNamespace) -> list[str]:
    (world.folder / "own.jinja").write_text(TAGLESS)
    return ["--chat_template", str(world.folder / "own.jinja")]


def dead_tower(world: SimpleNamespace) -> list[str]:
    return ["--model_name_or_path", str(copy_model(world.model, world.folder / "model", "visual", 0))]


def other_processor(world: SimpleNamespace) -> list[str]:
    model = copy_model(world.model, world.folder / "model")
    path = model / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["merge_size"] = 1
    path.write_text(json.dumps(settings))
    return ["--model_name_or_path", str(model)]


def damaged_weights(world: SimpleNamespace) -> list[str]:
    return ["--model_name_or_path", str(copy_model(world.model, world.folder / "model", "norm", math.inf))]


def shifted_positions(world: SimpleNamespace) -> list[str]:
    original = Prompt.continue_positions
    world.patch.setattr(Prompt, "continue_positions", lambda self, count: original(self, count) + 3)
    return []


def forgotten_bounds(world: SimpleNamespace) -> list[str]:
    original = Qwen2VLProcessor.save_pretrained

    def save(self, folder):
        original(self, folder)
        path = Path(folder, "processor_config.json")
        settings = json.loads(path.read_text())
        settings["image_processor"]["size"]["longest_edge"] *= 2
        path.write_text(json.dumps(settings))

    world.patch.setattr(Qwen2VLProcessor, "save_pretrained", save)
    return []


def other_reference(world: SimpleNamespace) -> list[str]:
    original = Qwen2VLGRPOTrainer.__init__

    def make(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.ref_model.get_decoder().layers[0].mlp.down_proj.weight.data *= 2

    world.patch.setattr(Qwen2VLGRPOTrainer, "__init__", make)
    return []


# What is broken -> where the first failing line is, and what it says.
BROKEN = {
    wrong_pin: ("environment", "versions", "trl 1.0.1 is not ==1.16.0"),
    broken_image: ("data", "images", r"examples.json: row 3: image .*3_0.png: "),
    no_answer: ("data", "answers", "row 2: no answer"),
    leak: ("data", "leaks", "2 of 2 held-out questions show an image of the training set, 0 ask the same of it"),
    lost_tags: ("prompt", "tags", "neither ends with <think> nor asks for"),
    forgotten_bounds: ("prompt", "saved", "a saved processor has lost its image bounds"),
    other_reference: ("model", "reference", "policy and reference, before the first step: .* differ"),
    dead_tower: ("model", "sight", "grey images change log-probabilities by 0.0e[+]00"),
    other_processor: ("model", "image tokens", ""),
    damaged_weights: ("model", "weights", "holds NaN or infinite weights"),
    shifted_positions: ("model", "shared prefix", "shared prefix against a plain forward pass: .* differ"),
    "--reward_funcs accuracy test_doctor:constant": ("rewards", "lint", "constant gives 0.5 for each of"),
    "--max_completion_length 90000000": ("cost", "memory", r"2 x \d+.\d GB at most, of .* are free"),
    "--model_name_or_path /nowhere": ("recipe", "model", "/nowhere"),
    "--output_dir /proc/version": ("recipe", "output", "/proc/version"),
    "--num_generations 3": ("recipe", "settings", "num_generations 3"),
    "--report_to wandb": ("recipe", "tracking", "wandb has no key"),
    "--max_prompt_length 20": ("data", "prompt lengths", "no example left"),
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: getattr(broken, "__name__", broken))
def test_what_is_broken_is_the_first_to_fail(broken, examined, tiny_model, examples_json, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    family, name, pattern = BROKEN[broken]
    world = SimpleNamespace(folder=tmp_path, patch=monkeypatch, model=tiny_model, data=examples_json)
    findings = examined(*(broken.split() if isinstance(broken, str) else broken(world)))
    failure = next(finding for finding in findings if finding.verdict is Status.FAIL)
    assert (failure.family, failure.name) == (family, name) and re.search(pattern, failure.what), failure


RUNS = {
    "GRPO": [],
    "LoRA": ["--config", str(REPO_ROOT / "configs/overlays/lora.yaml"), "--learning_rate", "1e-5"],
    "TRL's path": ["--shared_prefix", "false", "--beta", "0", "--chat_template", "instruct"],
    "SFT": [],
}


@pytest.mark.parametrize("run", RUNS)
def test_nothing_fails_where_all_is_well(run, examined, monkeypatch):
    monkeypatch.setattr(environment, "versions", lambda run: iter([]))
    other = {"recipe": REPO_ROOT / "tests/data/sft.yaml", "command": sft.COMMAND} if run == "SFT" else {}
    findings = examined(*RUNS[run], **other)
    if RUNS[run]:  # what a step takes is measured of two of them
        findings = takewhile(lambda finding: finding.family != "cost", findings)
    named = {(finding.family, finding.name): finding for finding in findings}
    assert [finding for finding in named.values() if finding.verdict in (Status.WARN, Status.FAIL)] == []
    assert (("model", "reference") in named) == (run in ("GRPO", "LoRA"))
    if not RUNS[run]:
        assert {family for family, _ in named} == set(FAMILIES) - ({"rewards"} if run == "SFT" else set())
        assert "s a step" in named["cost", "hours"].what


def test_the_steps_of_an_epoch_are_those_that_are_trained(tiny_model, examples_json, tmp_path):
    """With two updates a rollout each prompt is in twice as many steps."""
    settings = {"max_steps": -1, "num_train_epochs": 1, "num_iterations": 2, "save_strategy": "no"}
    trainer = make_trainer(tiny_model, examples_json, tmp_path, **settings)
    trainer.train()
    run = SimpleNamespace(args=trainer.args, launch=SimpleNamespace(num_processes=1), rows=trainer.train_dataset)
    run.is_grpo = True
    assert cost.total_steps(run) == trainer.state.global_step > 1


@pytest.mark.parametrize(
    "share, last",
    [
        (1.5, "pass s a step, measured over 2 steps of 1/4 of the work, which are slower; 100 take"),
        (9, "skip computed, not measured: a step takes this CPU about 22.5 minutes, all 100 steps 37.5 hours"),
    ],
)
def test_what_a_slow_cpu_is_spared(share, last, examined, monkeypatch):
    """Of steps that take more than five minutes a part is measured; of what takes longer still, nothing."""
    monkeypatch.setattr(cost, "step_flops", lambda run: share * cost.MEASURED_SECONDS / cost.MEASURED_STEPS)
    monkeypatch.setattr(Run, "speed", 1)
    findings = list(examined())
    model = [finding.verdict for finding in findings if finding.family == "model"]
    assert model == [Status.PASS] * 2 + [Status.SKIP] * 4
    hours = [finding for finding in findings if finding.name == "hours"]
    assert last in re.sub(r"pass [0-9.]+ s", "pass s", f"{hours[-1].verdict} {hours[-1].what}")
    assert [finding.what for finding in hours[:-1]] == ["measuring, which takes about 2 minutes"] * (share < 2)


def test_what_would_not_end_a_run_is_warned_of(examined, tmp_path, monkeypatch):
    (tmp_path / "blind.json").write_text(json.dumps([{"question": "What?", "answer": "left"}] * 40))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=64e6))
    findings = examined("--dataset_name", str(tmp_path / "blind.json"))
    memory, images = islice((finding for finding in findings if finding.verdict is Status.WARN), 2)
    assert (memory.name, memory.what) == ("shared memory", "0.1 GB free in /dev/shm")
    assert images.name == "rows" and "blind.json: 40 rows, none has an image" in images.what
    assert "--image_column" in images.remedy


def test_what_cannot_be_counted_is_skipped(examined, tmp_path):
    (tmp_path / "unbounded.yaml").write_text("max_prompt_length: null\n")
    findings = list(examined("--config", str(tmp_path / "unbounded.yaml")))
    skipped = [(finding.family, finding.name) for finding in findings if finding.verdict is not Status.PASS]
    assert skipped == [("cost", "memory"), ("cost", "disk"), ("cost", "hours")]


def constant(completions: list, **kwargs: object) -> list[float]:
    return [0.5] * len(completions)


def silent(completions: list, **kwargs: object) -> list[None]:
    return [None] * len(completions)


async def of_length(completions: list, **kwargs: object) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def undefined(completions: list, **kwargs: object) -> list[float]:
    return [math.nan] * len(completions)


def asks_for_more(completions: list, difficulty: list, **kwargs: object) -> list[float]:
    return [0.0] * len(difficulty)


@pytest.fixture
def samples(examples_json) -> list[rewards.Probe]:
    return rewards.make_probes(read_examples(examples_json), opens_think=True, longest=64)


@pytest.mark.parametrize(
    "reward, verdict, pattern",
    [
        (accuracy_reward, Status.PASS, "1 for 20 forms of a right answer, 0 for wrong, hedged and none"),
        (bare_accuracy_reward, Status.PASS, "accuracy_reward: 0 to 1 over"),
        (*get_reward_funcs(["soft_overlong"], max_completion_length=64), Status.PASS, "overlong_reward: -1 to 0"),
        (*get_reward_funcs(["consistency(among_right=True)"]), Status.PASS, "consistency_reward: 0 to 1 over"),
        (of_length, Status.PASS, r"of_length: \d+ to \d+ over"),
        (silent, Status.FAIL, "silent gives None for each of"),
        (undefined, Status.FAIL, "undefined returned nan for completion 0"),
        (asks_for_more, Status.FAIL, "asks_for_more raised TypeError: .*difficulty"),
    ],
)
def test_the_lint_names_a_reward(reward, verdict, pattern, samples):
    finding = rewards.examine_reward(reward, samples, make_tokenizer())
    assert finding.verdict is verdict and re.search(pattern, finding.what), finding


def test_a_slow_reward_is_named(samples, monkeypatch):
    monkeypatch.setattr(rewards, "SLOW", 0)
    finding = rewards.examine_reward(of_length, samples, make_tokenizer())
    assert finding.verdict is Status.WARN and re.search(r"takes \d+ ms a completion", finding.what)


@pytest.mark.parametrize(
    "kind, text, verdict",
    [("{0}", "none", Status.FAIL), ("**{0}**", "none", Status.WARN), ("wrong", "<answer>red</answer>", Status.FAIL)],
)
def test_an_answer_that_is_misread_is_named(kind, text, verdict, samples):
    """A reader that knows no bare answer, none in a dress, or takes a wrong one."""
    first = next(index for index, sample in enumerate(samples) if sample.kind == kind)
    samples[first] = replace(samples[first], text=text)
    finding = rewards.examine_reward(accuracy_reward, samples, make_tokenizer())
    assert finding.verdict is verdict and f"accuracy_reward gives {int(kind == 'wrong')} for {text!r}" in finding.what


def test_a_survey_goes_on_after_what_is_wrong(tmp_path, monkeypatch):
    path = write_examples(tmp_path)
    for row in (2, 5):
        (tmp_path / f"images/{row}_0.png").write_bytes(b"no image")

    def check(row: dict) -> None:
        if row["solution"] == "red":
            raise Mistake("no red")

    found = survey(read_examples(path), check)
    assert (found.rows, found.images, found.decoded) == (8, 8, 8)
    assert [text.split(":")[0] for text in found.broken] == ["row 2", "row 5"]
    assert found.unusable == ["row 0: no red", "row 6: no red"]
    monkeypatch.setattr("open_r1.doctor.survey.DECODING_SECONDS", -1)
    hurried = survey(read_examples(path), check)
    assert hurried.decoded == 0 and hurried.broken == [] and hurried.shown[1] == found.shown[1]


def test_a_checkpoint_takes_what_is_counted(tiny_model, examples_json, tmp_path):
    trainer = make_trainer(
        tiny_model, examples_json, tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    arguments = ["--config", str(RECIPE), "--model_name_or_path", str(tiny_model), "--dataset_name", str(examples_json)]
    run = Run(grpo.COMMAND, [*arguments, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"], Launch())
    files = {path.name: path.stat().st_size for path in (tmp_path / "run/checkpoint-1").iterdir()}
    counted, model = checkpoint_bytes(run)
    assert model == pytest.approx(files["model.safetensors"], rel=0.1)
    assert counted == pytest.approx(files["model.safetensors"] + files["optimizer.pt"], rel=0.1)


# ---- The command


def test_the_machine_alone(monkeypatch, capsys):
    monkeypatch.setattr(environment, "version", lambda name: "0.1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    with pytest.raises(Mistake, match=r"^1 failed; first environment, versions: .*trl 0.1 is not ==1.16.0"):
        doctor_main(monkeypatch, "--json")
    findings = json.loads(capsys.readouterr().out)
    assert {finding["family"] for finding in findings} == {"environment"}


@pytest.mark.slow
def test_the_run_scripts_look_and_start_nothing(quick_python, tiny_model, examples_json, tmp_path):
    changes = ("--doctor", "--max_completion_length", "4", "--reward_funcs", "accuracy", "test_doctor:constant")
    result = run_grpo(tiny_model, examples_json, tmp_path / "out", *changes, PYTHON=str(quick_python))
    lines = result.stdout.splitlines()
    assert result.returncode == 1 and not (tmp_path / "out").exists(), result.stderr
    assert re.search(r"pass +recipe +settings +grpo, 2 processes, ZeRO-2; a step is 16 completions", result.stdout)
    failed = next(index for index, line in enumerate(lines) if line.startswith("fail"))
    assert re.match(r"fail +rewards +lint +constant gives 0.5", lines[failed]) and "-> " in lines[failed + 1]
    assert lines[-1].startswith("pass  cost         hours")
    assert re.search(r"^doctor: error: 1 failed; first rewards, lint: constant gives", result.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments, pattern",
    [
        ("--memory --config empty.yaml", "empty.yaml: a recipe must contain a YAML mapping"),
        ("--config broken.yaml", "broken.yaml: not YAML"),
        ("--memory --config {recipe} --accelerate_config zero9", "--accelerate_config: no file .*zero9"),
        ("--memory --config {recipe} --accelerate_config list.yaml", "list.yaml does not describe a launch"),
        ("--memory --config {recipe} --max_completion_lengths 3", "did you mean max_completion_length"),
        ("--memory --config {recipe} --model_name_or_path /nowhere", "/nowhere: no such file or folder"),
        ("--memory --config {recipe} --model_name_or_path llama", "llama is a 'llama' model; supported: qwen2_vl"),
        ("--beta 0", "--beta: name a recipe with --config"),
        ("--memory", "--memory: name a recipe with --config"),
        ("--num_processes 3 --num_machines 2", "--num_processes 3: 2 machines need as many each"),
    ],
)
def test_a_mistake_is_one_line(arguments, pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty.yaml", ""), ("broken.yaml", "a: ["), ("list.yaml", "- 1")):
        Path(name).write_text(text)
    LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained("llama")
    with pytest.raises(Mistake, match=pattern):
        doctor_main(monkeypatch, *arguments.format(recipe=RECIPE).split())


def test_a_machines_memory_is_for_its_own_processes():
    """Of four on two machines with CPUs; what ZeRO leaves each is counted for all."""
    counted = []
    run = SimpleNamespace(launch=Launch(4, 2, 2), on_cpu=True, args=SimpleNamespace())
    run.count = lambda launch: counted.append(launch.num_processes) or SimpleNamespace(peak=1e6)
    (finding,) = cost.memory(run)
    assert finding.what.startswith("2 x 0.0 GB at most") and counted == [4]


def test_the_doctor_measures_on_one_of_several_gpus(tiny_model, examples_json, tmp_path, monkeypatch):
    """The reference model too, which TRL would spread over all; and it logs each of its steps."""
    asked, create = [], grpo_trainer.create_model_from_path

    def note(name: str, **settings: object) -> PreTrainedModel:
        asked.append(settings["device_map"])
        return create(name, **settings)

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", note)
    arguments = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(examples_json), "--use_cpu", "true"]
    arguments += ["--output_dir", str(tmp_path), "--max_completion_length", "4", "--logging_steps", "10"]
    arguments += ["--completions_per_step", "8"]
    trainer = Run(grpo.COMMAND, ["--config", str(RECIPE), *arguments], Launch(2, 2)).trainer
    assert asked == [None]
    trainer.train()
    assert len([event for event in trainer.state.log_history if "time/rollout" in event]) == MEASURED_STEPS


def test_more_gpus_shorten_all_of_a_step_but_its_rollout(monkeypatch):
    """Of 10 s a step 4 are its rollout's, and four GPUs share the rest."""
    monkeypatch.setattr(cost, "free_memory", lambda on_cpu: 1e9)
    trainer = SimpleNamespace(args=None, state=SimpleNamespace(log_history=[]))
    trainer.state.log_history = [{"time/rollout": 3.0}, {"time/rollout": 5.0}, {"train_runtime": 20.0}]
    trainer.train = lambda: SimpleNamespace(metrics={"train_runtime": 20.0})
    args = SimpleNamespace(max_steps=100, use_vllm=False)
    run = SimpleNamespace(trainer=trainer, args=args, launch=Launch(4, 2), on_cpu=False)
    run.count = lambda launch, args: SimpleNamespace(peak=0.0)
    (finding,) = cost.hours(run)
    assert finding.what == "5.5 s a step, measured over 2 steps; 100 take 9.2 minutes"


@pytest.mark.parametrize(
    "card, share, sleeps, verdict, needed",
    [
        (80e9, 0.5, False, "fail", 88.3),  # 40 and 48.3 GB
        (80e9, 0.5, True, "pass", 75.4),
        (48e9, 0.1, False, "fail", 53.1),
    ],
)
def test_the_doctor_says_which_share_of_a_card_vllm_can_take(monkeypatch, card, share, sleeps, verdict, needed):
    """Of the paper's recipe on one card, by the figures of docs/memory.md."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (card, card))
    args = SimpleNamespace(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=share)
    args.vllm_enable_sleep_mode = sleeps
    outline = SimpleNamespace(parameters=lambda: [SimpleNamespace(nbytes=4.4e9)])
    run = SimpleNamespace(launch=Launch(1, 2), on_cpu=False, args=args, model_outline=outline)
    run.count = lambda launch: MemoryCount({"all the time": 35.4e9}, {}, {"backward": 12.9e9}, {})
    (finding,) = cost.memory(run)
    fits = "up to 0.39, or --vllm_gpu_memory_utilization up to 0.55 with --vllm_enable_sleep_mode true"
    fits = f"--vllm_gpu_memory_utilization {fits}" if card == 80e9 else "no share"
    assert finding.verdict == verdict and f"1 x {needed} GB at most, of {card / 1e9:.1f} GB of a GPU" in finding.what
    assert finding.what.endswith(f", {share * card / 1e9:.1f} of them vLLM's; fits: {fits}")
    if verdict == "fail":
        assert fits in finding.remedy or "configs/overlays/lora.yaml, more GPUs, or --vllm_mode" in finding.remedy


def doctor_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    import doctor

    monkeypatch.setattr(sys, "argv", ["doctor.py", *map(str, arguments)])
    doctor.main()
