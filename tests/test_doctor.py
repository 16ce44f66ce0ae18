"""The doctor's memory count: against peak memory on the CPU, and that it says what it cannot read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trl import ModelConfig

from open_r1.data import count_prompt_tokens
from open_r1.memory import Launch, Load, count_memory
from open_r1.modeling import FreezeArguments, load_processor
from open_r1.prompts import REPO_ROOT
from open_r1.recipes import merge_recipes
from open_r1.tasks.examples import read_examples
from open_r1.tiny import make_config as make_model_config
from open_r1.tiny import make_model, make_processor, make_tokenizer

# Trains two steps of the recipe at hand with a model of no size, which imports and allocates all that a run does,
# and then with the model itself: what comes on top is the model's.
MEASURE = """
import gc, sys
sys.path.insert(0, {tests!r})
from support import vowel_share
from open_r1 import grpo, sft
from trl import ModelConfig, TrlParser
from open_r1.trainer import Qwen2VLGRPOConfig

def train(model):
    module = {{"grpo": grpo, "sft": sft}}[{script!r}]
    types = {{
        "grpo": (grpo.GRPOScriptArguments, Qwen2VLGRPOConfig, ModelConfig),
        "sft": (sft.SFTScriptArguments, sft.Qwen2VLSFTConfig, ModelConfig),
    }}[{script!r}]
    arguments = ["--model_name_or_path", model, *{arguments!r}]
    module.build_trainer(*TrlParser(types).parse_args_and_config(arguments)).train()

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
@pytest.mark.parametrize("case, hidden_size", [("grpo", 512), ("grpo", 1024), ("sft", 1024), ("frozen", 1024)])
def test_count_is_the_peak_within_15_percent(tmp_path, examples_json, case, hidden_size):
    script = "sft" if case == "frozen" else case
    arguments = ["--config", str(REPO_ROOT / f"tests/data/{script}.yaml"), "--dataset_name", str(examples_json)]
    arguments += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--max_steps", "2"]
    arguments += ["--save_strategy", "no", "--disable_tqdm", "true"]
    arguments += (
        ["--reward_funcs", "support:vowel_share"] if script == "grpo" else ["--per_device_train_batch_size", "1"]
    )
    arguments += (
        ["--freeze_vision", "true", "--freeze_llm", "true", "--freeze_merger", "false"] if case == "frozen" else []
    )
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
        FreezeArguments(case == "frozen", case == "frozen", False if case == "frozen" else None),
        load,
        Launch(),
        has_reference=script == "grpo",
        gradient_checkpointing=False,
        is_cpu=True,
    )
    print(f"{case} {hidden_size}: measured {measured / 1e6:.0f} MB, counted {counted.peak / 1e6:.0f} MB")
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
    assert two.backward["gradients"] == 2 * total / 4 and two.update["gradients in float32"] == total
    frozen = count(Launch(4, 2), freeze_vision=True)
    assert frozen.base["optimiser"] == 12 * (total - vision) / 4
    assert frozen.backward["activations"] < two.backward["activations"]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_every_family_and_recipe_is_counted(tiny_models, model_type, capsys, monkeypatch):
    sys.path.insert(0, str(REPO_ROOT / "scripts"))
    import doctor

    configs = REPO_ROOT / "configs"
    recipes = [[path] for path in sorted([*configs.glob("*.yaml"), *configs.glob("tiny/*.yaml")])]
    recipes += [[configs / "grpo_sat.yaml", path] for path in sorted(configs.glob("overlays/*.yaml"))]
    for paths in recipes:
        arguments = ["--memory", *(part for path in paths for part in ("--config", str(path)))]
        arguments += ["--model_name_or_path", str(tiny_models[model_type])]
        if "lora_target_modules" in merge_recipes(paths):
            arguments += ["--accelerate_config", "zero3", "--num_processes", "2"]
        monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments])
        doctor.main()
        output = capsys.readouterr().out
        assert "computed" in output and float(output.split()[-1]) > 0
    monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments[:3], "--accelerate_config", "zero9"])
    with pytest.raises(FileNotFoundError, match="--accelerate_config: no file"):
        doctor.main()


def test_longer_completions_and_checkpointing_change_the_activations():
    config = make_model_config(make_tokenizer())
    peaks = [
        count_memory(config, ModelConfig(), FreezeArguments(), Load(1, 100, tokens, 16, 8), Launch(), False, checkpoint)
        for tokens, checkpoint in ((100, True), (200, True), (200, False))
    ]
    short, long, whole = (count.backward["activations"] for count in peaks)
    assert short < long < whole and long / short == pytest.approx(1700 / 900, rel=0.1)
