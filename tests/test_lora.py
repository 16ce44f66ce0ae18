"""LoRA: the adapter alone is trained and saved, the reference is the model without it, the export is the same model."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from trl import ModelConfig
from trl.generation.vllm_generation import VLLMGeneration

from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.configs import FreezeArguments
from open_r1.engines.vllm_backends import adapted_weights, check_vllm_adapter, whole_weight
from open_r1.grpo import GRPOScriptArguments, build_trainer
from open_r1.models.families import FAMILIES, family_of
from open_r1.models.loading import (
    adapter_base,
    check_model,
    load_checkpoint,
    load_model,
    load_processor,
)
from open_r1.models.trained import get_adapter_config, guide_gradients, parameter_table
from open_r1.running.data import load_dataset
from open_r1.settings.recipes import read_recipe
from open_r1.sft import AnswerCollator
from open_r1.trainer.trainer import Qwen2VLGRPOConfig
from support import families, launch_env, load_weights, pretend_vllm

LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0.0", "--freeze_vision", "true"]
LORA += ["--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse(recipe: str, *arguments: str) -> tuple[GRPOScriptArguments, Qwen2VLGRPOConfig, ModelConfig]:
    args = ["--config", str(REPO_ROOT / f"{recipe}.yaml"), "--use_cpu", "true", "--bf16", "false"]
    return read_recipe((GRPOScriptArguments, Qwen2VLGRPOConfig, ModelConfig), [*args, *arguments])


def make_trainer(model, data, output, *arguments):
    settings = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)]
    settings += ["--reward_funcs", "support:vowel_share", "--learning_rate", "1e-2", "--max_steps", "2"]
    settings += ["--save_steps", "1", "--disable_tqdm", "true"]
    return build_trainer(*parse("tests/data/grpo", *settings, *LORA, *arguments))


@pytest.fixture(scope="module")
def run(tiny_model, examples_json, tmp_path_factory):
    """A finished GRPO run of two steps with an adapter, and the base weights before it."""
    output = tmp_path_factory.mktemp("lora")
    trainer = make_trainer(tiny_model, examples_json, output)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model(str(output))
    return trainer, before, output


def test_adapter_alone_is_trained(run):
    trainer, before, _ = run
    for name, parameter in trainer.model.named_parameters():
        # B starts at zero and A's gradient goes through it, so A moves from the second step on
        assert torch.equal(before[name], parameter) == (family_of(trainer.model).part_of(name) != "adapter"), name
    table = {line[:16].strip(): line.split()[-1] for line in parameter_table(trainer.model).splitlines()}
    assert table["language model"] == table["vision tower"] == "0" and table["adapter"] == table["all"] != "0"


def test_reference_is_the_model_without_its_adapter(run):
    trainer, _, _ = run
    assert trainer.ref_model is None and trainer.beta > 0
    logs = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert logs[0] == pytest.approx(0, abs=1e-6) and logs[1] > 1e-6  # equal to the policy at first, not later


def test_only_the_adapter_is_saved(run, tiny_model):
    *_, output = run
    for folder in (output, output / "checkpoint-1", output / "checkpoint-2"):
        assert not (folder / "model.safetensors").exists()
        size = (folder / "adapter_model.safetensors").stat().st_size
        assert size < (tiny_model / "model.safetensors").stat().st_size / 5


def test_resume_is_exact(run, tiny_model, examples_json, tmp_path):
    *_, output = run
    resumed = make_trainer(tiny_model, examples_json, tmp_path)
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-1"))
    trained = dict(run[0].model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_the_best_adapter_is_the_one_at_the_end(run, tiny_model, examples_json, tmp_path):
    *_, output = run
    trainer = make_trainer(tiny_model, examples_json, tmp_path)
    trainer.state.best_model_checkpoint = str(output / "checkpoint-2")
    trainer._load_best_model()
    trained = dict(run[0].model.named_parameters())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in trainer.model.named_parameters())
    trainer.state.best_model_checkpoint = str(tmp_path)
    with pytest.raises(Mistake, match=r"holds no adapter_model\.safetensors$"):
        trainer._load_best_model()


def test_export_is_the_adapted_model(run, tiny_model, examples_json, tmp_path, monkeypatch):
    *_, output = run
    import export

    def run_export(adapter, output, *options):
        monkeypatch.setattr(sys, "argv", ["export.py", "--adapter", str(adapter), "--output", str(output), *options])
        export.main()

    run_export(output, tmp_path / "merged")
    processor = load_processor(tmp_path / "merged")
    rows = load_dataset(examples_json, processor)
    inputs = AnswerCollator(processor=processor)([rows[0], rows[1]])
    base = load_model(tiny_model, dtype="float32")
    with torch.no_grad():
        plain = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, output).eval()(**inputs).logits
        merged = load_model(tmp_path / "merged", dtype="float32")(**inputs).logits
    assert (adapted - merged).abs().max() < 1e-5 < (adapted - plain).abs().max()
    assert load_weights(tmp_path / "merged").keys() == load_weights(tiny_model).keys()  # the names vLLM knows
    assert processor.chat_template == load_processor(tiny_model, chat_template="base").chat_template
    with pytest.raises(OSError, match=r"merged exists; name another folder"):
        run_export(output, tmp_path / "merged")
    with pytest.raises(Mistake, match=r"--adapter: no adapter_config\.json"):
        run_export(tiny_model, tmp_path / "other")
    with pytest.raises(SystemExit):  # argparse says which there are
        run_export(output, tmp_path / "other", "--dtype", "float23")


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("setting", ["target_modules", "modules_to_save"])
def test_an_adapter_of_one_use_of_tied_weights_is_merged_into_that_use(tiny_model, tmp_path, setting, modules):
    """PEFT changes the other use, too; and a configuration that says tied would tie them again when vLLM loads it."""
    base = load_model(tiny_model, dtype="float32")
    assert base.config.tie_word_embeddings
    config = LoraConfig(r=4, **{"target_modules": ["q_proj"], setting: modules})
    model = get_peft_model(base, config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += parameter.requires_grad * 0.1 * torch.randn_like(parameter)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    merged = load_checkpoint(tmp_path / "adapter", "float32", base=tiny_model)
    merged.save_pretrained(tmp_path / "merged")
    loaded = load_model(tmp_path / "merged", dtype="float32")
    assert not loaded.config.tie_word_embeddings
    with torch.no_grad():
        for model in (merged, loaded):
            assert torch.allclose(model(input_ids=ids).logits, adapted, atol=1e-4)


@pytest.mark.parametrize("model_type", families("qwen2_vl", "qwen3_vl", "smolvlm", "internvl"))
def test_a_frozen_part_gets_no_adapter(tiny_models, tmp_path, model_type):
    """In Qwen2.5-VL and Qwen3-VL the vision tower has layers of the language model's names."""
    arguments = ["--output_dir", str(tmp_path), "--dataset_name", "x", "--lora_target_modules", "all-linear"]
    _, _, model_args = parse("tests/data/grpo", "--use_peft", "true", *arguments)
    flags = {"vision tower": "freeze_vision", "merger": "freeze_merger", "language model": "freeze_llm"}
    for frozen in ({"vision tower", "merger"}, {"merger"}, {"language model"}, set()):
        freezing = FreezeArguments(**{flags[part]: True for part in frozen})
        if frozen == {"language model"}:
            freezing.freeze_merger = False
        model = load_model(tiny_models[model_type], dtype="float32")
        model.add_adapter(get_adapter_config(model_args, freezing, FAMILIES[model_type]))
        names = [name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name]
        assert {FAMILIES[model_type].part_of(name) for name in names} == {
            "vision tower",
            "merger",
            "language model",
        } - frozen


def test_a_module_to_train_whole_must_be_one_of_the_models(tiny_model, examples_json, tmp_path):
    arguments = ["--lora_modules_to_save", "merger.mlp.2", "lm_haed"]  # PEFT would pass the second one over
    with pytest.raises(Mistake, match=r"^lora_modules_to_save: the model has no module 'lm_haed'$"):
        make_trainer(tiny_model, examples_json, tmp_path, *arguments)
    assert make_trainer(tiny_model, examples_json, tmp_path, *arguments[:2])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("model_type", families("qwen2_vl", "qwen3_vl", "qwen3_5", "smolvlm", "internvl"))
def test_gradients_reach_adapters_in_the_vision_tower_and_no_frozen_tower(tiny_models, model_type, frozen):
    """Also with the checkpoints that TRL chooses under ZeRO-3."""
    family = FAMILIES[model_type]
    model = load_model(tiny_models[model_type], dtype="float32")
    left_out = family.modules_of("vision tower") if frozen else None
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", exclude_modules=left_out))
    adapted.enable_input_require_grads()
    guide_gradients(model)
    adapted.gradient_checkpointing_enable({"use_reentrant": True})
    adapted.train()
    blocks, inputs = family.vision_blocks(adapted), []
    blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0].requires_grad))
    features = family.encode_images(model, family.blank_image(model.config))
    sum(part.sum() for part in family.feature_tensors(features)).backward()
    learned = [parameter.grad for parameter in blocks.parameters() if parameter.requires_grad]
    assert bool(learned) != frozen and all(gradient is not None for gradient in learned)
    assert any(inputs) != frozen


def test_quantised_weights_need_bitsandbytes_and_an_adapter(tiny_model, monkeypatch):
    args = {"model_name_or_path": str(tiny_model), "load_in_4bit": True}
    with pytest.raises(ValueError, match="load_in_4bit, load_in_8bit: weights that bitsandbytes quantised"):
        check_model(ModelConfig(**args))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Mistake, match="load_in_4bit, load_in_8bit: bitsandbytes is not installed") as raised:
        check_model(ModelConfig(**args, use_peft=True))
    assert "\n" not in str(raised.value)


def save_adapter(model: PreTrainedModel, folder: Path, *arguments: str) -> Path:
    """An adapter of a recipe, as a run saves it."""
    _, _, model_args = parse("tests/data/grpo", "--output_dir", "x", "--dataset_name", "x", *LORA, *arguments)
    config = get_adapter_config(model_args, FreezeArguments(), family_of(model))
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_an_adapter_names_its_base_wherever_it_was_trained(tiny_model, tmp_path, monkeypatch):
    """Also when the run was told a folder as seen from its own."""
    monkeypatch.chdir(tiny_model.parent)
    adapter = save_adapter(load_model(tiny_model.name), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert adapter_base(adapter) == tiny_model.resolve()


def test_an_adapters_base_is_of_its_revision(tiny_model, tmp_path, monkeypatch):
    asked, adapter = [], save_adapter(load_model(tiny_model), tmp_path / "adapter", "--model_revision", "v2")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "org/model"}))
    monkeypatch.setattr("open_r1.base.hub.fetch", lambda name, files, revision: asked.append((name, revision)))
    adapter_base(adapter)
    assert asked == [("org/model", "v2")]


# ---- vLLM, beside which the base weights stay as they are


@pytest.fixture
def fake_vllm(monkeypatch):
    pretend_vllm(monkeypatch.setattr)


def randomize_adapter(model: nn.Module, std: float = 0.1) -> None:
    """Give the adapter's B, which begins at zero, something to say."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=std)


def base_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights beside the adapter, copied; of 4-bit ones the packed bytes and their scales."""
    bits = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            bits[name] = parameter.detach().clone()
            if hasattr(parameter, "quant_state"):
                bits[f"{name}, scales"] = parameter.quant_state.absmax.clone()
    return bits


PRECISIONS = {
    "float32": ["--dtype", "float32"],
    "bfloat16": ["--dtype", "bfloat16"],
    "4 bits": ["--dtype", "bfloat16", "--load_in_4bit", "true", "--use_bnb_nested_quant", "true"],
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_vllm_leaves_the_base_bit_for_bit(tiny_model, examples_json, tmp_path, fake_vllm, precision):
    """Handed over 200 times; and what is handed over is the model that PEFT would merge, under its own names."""
    trainer = make_trainer(tiny_model, examples_json, tmp_path, "--use_vllm", "true", *PRECISIONS[precision])
    randomize_adapter(trainer.model)
    before = base_bits(trainer.model)
    for _ in range(200):
        trainer.vllm_generation.sync_weights()
    after = base_bits(trainer.model)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []

    engine = trainer.vllm_generation.llm
    assert engine.settings["quantization"] is None and engine.settings["seed"] == trainer.args.seed == 42
    policy = trainer.model
    if precision == "4 bits":  # PEFT would round the merged weights to 4 bits again: the same adapter on unpacked ones
        policy = get_peft_model(load_model(tiny_model, dtype="bfloat16"), trainer.model.peft_config["default"])
        for name, weight in policy.named_parameters():
            weight.data = whole_weight(trainer.model.get_parameter(name))
    expected = dict(policy.merge_and_unload().named_parameters())
    assert engine.weights.keys() == expected.keys()
    for name, weight in engine.weights.items():
        assert weight.dtype == expected[name].dtype and torch.equal(weight, expected[name]), name


def sync(model: PeftModel) -> dict[str, torch.Tensor]:
    """What a policy hands over."""
    engine = VLLMGeneration.__new__(VLLMGeneration)
    engine.model, engine._dist = model, SimpleNamespace(gather_params=lambda parameters: nullcontext())
    return {name: weight.clone() for name, weight in adapted_weights(engine)}


@pytest.mark.distributed
def test_vllm_is_handed_an_adapter_that_zero3_splits(tiny_model, examples_json, quick_python, tmp_path):
    """Two processes train and hand over, a layer at a time; what arrives is the base with the adapter that is saved."""
    config = REPO_ROOT / "src/open-r1-multimodal/configs/zero3.yaml"
    launch = [quick_python, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--mixed_precision", "no", "--num_processes", "2", "--main_process_port", "0"]
    worker = [str(Path(__file__).with_name("worker_lora.py")), str(tiny_model), str(examples_json), str(tmp_path)]
    env = launch_env(tiny_model, examples_json, tmp_path, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    subprocess.run([*launch, *worker], env=env, check=True)
    handed = load_file(tmp_path / "handed.safetensors")
    expected = dict(load_checkpoint(tmp_path, "float32", base=tiny_model).named_parameters())
    assert handed.keys() == expected.keys()
    assert all(torch.allclose(handed[name], expected[name], atol=1e-6) for name in handed)
    base = dict(load_model(tiny_model, dtype="float32").named_parameters())
    assert any((handed[name] - base[name]).abs().max() > 1e-4 for name in handed)


ADAPTERS = {
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "DoRA": {"target_modules": ["v_proj", "up_proj"], "use_dora": True},
    "all linear layers and their biases": {"target_modules": "all-linear", "bias": "all"},
    "a module trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "k_proj"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_vllm_is_handed_what_peft_merges(tiny_model, kind):
    base = load_model(tiny_model, dtype="float32")
    base.config.tie_word_embeddings = False
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    model = get_peft_model(base, LoraConfig(r=4, **ADAPTERS[kind]))
    randomize_adapter(model)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            parameter.data += torch.rand_like(parameter)
    check_vllm_adapter(model)
    before, handed = base_bits(model), sync(model)
    assert all(torch.equal(before[name], weight) for name, weight in base_bits(model).items())
    expected = dict(model.merge_and_unload(safe_merge=True).named_parameters())
    assert handed.keys() == expected.keys()
    assert [name for name, weight in handed.items() if not torch.equal(weight, expected[name])] == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["lm_head"]}, "one matrix as embeddings and lm_head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "one matrix as embeddings and lm_head"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, r"layers\.0\.self_attn\.q_proj has another one \(Linear"),
    ],
)
def test_an_adapter_that_vllm_cannot_be_handed_is_refused(tiny_model, settings, message):
    model = get_peft_model(load_model(tiny_model, dtype="float32"), LoraConfig(r=4, **settings))
    with pytest.raises(Mistake, match=rf"^use_vllm: .*{message}"):
        check_vllm_adapter(model)


def test_weights_of_8_bits_are_refused_beside_vllm(tiny_model, examples_json, tmp_path, fake_vllm):
    with pytest.raises(Mistake, match=r"^load_in_8bit: vLLM is not handed weights of 8 bits; load_in_4bit goes with"):
        make_trainer(tiny_model, examples_json, tmp_path, "--use_vllm", "true", "--load_in_8bit", "true")
