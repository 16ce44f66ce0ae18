"""What is wrong with a model's folder is one line that names it, before its weights are read; none of its code runs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from open_r1.engines.backends import load_transformers
from open_r1.evaluation.answering import load_prompting
from open_r1.models.loading import (
    check_adapter,
    check_model_files,
    check_template,
    check_weights,
    load_checkpoint,
    load_model,
    load_processor,
    restore_weights,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 4400000000\n"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def write(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Put something else in place of a file; None removes it."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def settings(name: str, **changes: object) -> Callable[[Path], None]:
    """Change a JSON file's values, `text_config__` in front for those of a part; None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in changes.items():
            *parts, key = key.split("__")
            inner = content
            for part in parts:
                inner = inner[part]
            inner[key] = value
            if value is None:
                del inner[key]
        (folder / name).write_text(json.dumps(content))

    return change


def tensors(name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the weights."""

    def change(folder: Path) -> None:
        weights = load_file(folder / name)
        edit(weights)
        save_file(weights, folder / name, {"format": "pt"})

    return change


def drop(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "layers.1." in name]:
        del weights[name]


def poison(weights: dict[str, torch.Tensor]) -> None:
    next(weight for name, weight in weights.items() if "mlp" in name).view(-1)[-1] = torch.nan


def cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


def lose_shard(folder: Path) -> None:
    files = dict.fromkeys(load_file(folder / WEIGHTS), "model-1.safetensors")
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    files[next(iter(files))] = "model-2.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def index_nothing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text("{}")


def other_ids(folder: Path) -> None:
    """A tokenizer that has the image's token somewhere else."""
    text = (folder / "tokenizer.json").read_text()
    text = text.replace("<|image_pad|>", "<|x|>").replace("<|video_pad|>", "<|image_pad|>")
    (folder / "tokenizer.json").write_text(text.replace("<|x|>", "<|video_pad|>"))


def code(folder: Path) -> None:
    """A processor whose class is in the folder, with an import that leaves a trace."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    settings("processor_config.json", processor_class="Evil", auto_map={"AutoProcessor": "evil.Evil"})(folder)


CONFIG, PROCESSOR = "config.json", "processor_config.json"
BROKEN = {
    "no config": (write(CONFIG, None), "holds no model"),
    "config cut": (write(CONFIG, b'{"model_type": "qwen2'), "config.json: not JSON"),
    "config a list": (write(CONFIG, b"[]"), "config.json: expected an object, not list"),
    "no type": (settings(CONFIG, model_type=None), "config.json: names no model_type"),
    "text alone": (settings(CONFIG, model_type="qwen2"), "is a 'qwen2' model; supported: qwen2_vl, "),
    "size a word": (settings(CONFIG, text_config__hidden_size="wide"), "cannot be loaded"),
    "fewer tokens": (settings(CONFIG, text_config__vocab_size=260), "vocab_size of config.json is 260"),
    "other ids": (other_ids, r"<\|image_pad\|> is token \d+ of the tokenizer, and image_token_id .* of different"),
    "no weights": (write(WEIGHTS, None), r"holds no model\.safetensors"),
    "weights a pointer": (write(WEIGHTS, POINTER), "model.safetensors: not a whole safetensors file"),
    "weights cut": (cut, "model.safetensors: not a whole safetensors file"),
    "pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which runs code when it is opened",
    ),
    "shard missing": (lose_shard, "model-2.safetensors is missing"),
    "index empty": (index_nothing, "index.json: has no weight_map"),
    "layer missing": (tensors(WEIGHTS, drop), r"weights are missing: \S+layers\.1\.\S+ and \d+ more"),
    "other shape": (
        settings(CONFIG, text_config__intermediate_size=8),
        r"another shape than config.json says: \S+ is \[.*\], not \[.*8\] and \d+ more",
    ),
    "NaN": (tensors(WEIGHTS, poison), r"\S+mlp\S+ holds NaN or infinite weights"),
    "no tokenizer": (write("tokenizer.json", None), r"holds no tokenizer\.json; copy it"),
    "tokenizer garbage": (write("tokenizer.json", b"{]"), "tokenizer.json: not JSON"),
    "tokenizer of nothing": (write("tokenizer.json", b"{}"), "tokenizer cannot be loaded"),
    "no processor": (write(PROCESSOR, None), r"holds no processor_config\.json; copy it"),
    "text's tokenizer": (
        settings(PROCESSOR, processor_class="Qwen2Tokenizer"),
        "cannot be loaded|holds no processor for images and text",
    ),
    "code": (code, "processor or tokenizer cannot be loaded .*custom code"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_line(name, folder, caplog):
    """From what a launch looks at in its order; and whoever loads without looking is told the same."""
    change, message = BROKEN[name]
    change(folder)

    def look() -> None:
        check_model_files(folder)
        load_processor(folder)
        check_weights(folder)
        load_model(folder)

    def load() -> None:
        load_transformers(folder, load_processor(folder), "cpu")

    for steps in (look, load):
        with pytest.raises((OSError, ValueError), match=message) as caught:
            steps()
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "ran").exists() and not caplog.messages


def test_a_whole_model_passes(tiny_models):
    """Of every family; a head tied to the embeddings is not missing."""
    for folder in tiny_models.values():
        check_weights(folder)
        check_template(load_processor(folder), "mine")
        load_model(folder, "bfloat16")


def test_code_beside_a_known_class_is_not_run(folder):
    code(folder)
    settings("processor_config.json", processor_class="Qwen2VLProcessor")(folder)
    settings("config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"})(folder)
    settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})(folder)
    load_processor(folder)
    load_model(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "path, message",
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("empty", "empty holds no model"),
        ("file", "file is a file; name the folder of a model"),
    ],
)
def test_what_is_no_folder_of_a_model(path, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for look in (check_model_files, check_weights, load_processor, load_model):
        with pytest.raises(OSError) as caught:
            look(str(tmp_path / path))
        assert message in str(caught.value) or (path == "empty" and str(tmp_path / path) in str(caught.value))


@pytest.mark.parametrize("look", [check_model_files, load_processor])
def test_the_folder_of_a_run_that_was_killed_holds_checkpoints(look, tmp_path):
    for step, time in ((10, 1), (2, 0)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/config.json").write_text("{}")
        os.utime(tmp_path / f"checkpoint-{step}/config.json", (time, time))
    with pytest.raises(OSError, match=rf"{tmp_path} holds no model .*; {tmp_path}/checkpoint-10 holds one$"):
        look(str(tmp_path))


# --- weights that come back -----------------------------------------------------------------------------------


def test_every_weight_of_every_family_comes_back(tiny_models, tmp_path):
    """From several files."""
    for name, folder in tiny_models.items():
        models = [load_model(folder, "float32") for _ in range(2)]
        with torch.no_grad():
            for parameter in models[0].parameters():
                parameter.add_(1)
        models[0].save_pretrained(tmp_path / name, max_shard_size="200KB")
        assert (tmp_path / name / INDEX).is_file()
        restore_weights(models[1], tmp_path / name)
        assert all(torch.equal(*pair) for pair in zip(*(m.parameters() for m in models), strict=True)), name


def test_a_head_in_float32_comes_back_unrounded(tiny_models, tmp_path):
    """As `cast_lm_head_to_fp32` leaves one beside weights in 16 bits."""
    models = [load_model(tiny_models["qwen2_vl"], "bfloat16") for _ in range(2)]
    for model in models:
        model.get_output_embeddings().to(torch.float32)
    with torch.no_grad():
        models[0].get_output_embeddings().weight += 1e-4
    models[0].save_pretrained(tmp_path)
    restore_weights(models[1], tmp_path)
    heads = [model.get_output_embeddings().weight for model in models]
    assert torch.equal(*heads) and heads[1].dtype == torch.float32


@pytest.mark.parametrize("name", ["layer missing", "weights cut", "other shape"])
def test_weights_that_do_not_come_back_whole_are_one_line(name, folder, tiny_model):
    change, message = BROKEN[name]
    change(folder)
    model = load_model(tiny_model, "float32")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(OSError, match=message) as caught:
        restore_weights(model, folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_another_model_do_not_come_back(tiny_models):
    with pytest.raises(OSError, match="its model cannot be loaded") as caught:
        restore_weights(load_model(tiny_models["qwen2_vl"], "float32"), tiny_models["qwen3_vl"])
    assert "\n" not in str(caught.value)


# --- adapters -----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter to break."""
    model = get_peft_model(load_model(tiny_model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


ADAPTER, ABOUT = "adapter_model.safetensors", "adapter_config.json"
BROKEN_ADAPTERS = {
    "garbage": (write(ABOUT, b"{]"), "adapter_config.json: not JSON"),
    "empty": (write(ABOUT, b"{}"), "adapter_config.json: names no base model"),
    "no weights": (write(ADAPTER, None), "holds no adapter_model.safetensors"),
    "pickle": (
        lambda folder: (folder / ADAPTER).rename(folder / "adapter_model.bin"),
        r"adapter_model\.bin is a pickle",
    ),
    "base gone": (settings(ABOUT, base_model_name_or_path="/gone"), "without its base .*gone"),
    "rank a word": (settings(ABOUT, r="four"), "its adapter cannot be loaded"),
    "weights missing": (tensors(ADAPTER, lambda weights: weights.popitem()), "weights are missing"),
    "NaN": (
        tensors(ADAPTER, lambda weights: [values.fill_(torch.nan) for values in weights.values()]),
        "its adapter cannot be loaded .*NaN",
    ),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_a_broken_adapter_is_one_line(name, adapter):
    change, message = BROKEN_ADAPTERS[name]
    change(adapter)
    with pytest.raises((OSError, ValueError), match=message) as caught:
        load_checkpoint(adapter)
    assert str(adapter) in str(caught.value) and "\n" not in str(caught.value)


def adapted(folder: Path, **settings: object) -> PeftModel:
    """A model with an adapter that does something."""
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings})
    model = get_peft_model(load_model(folder, "float32"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def test_every_adapter_of_a_model_comes_back(tiny_model, tmp_path):
    """TRL puts one of its own, `ref`, beside one that was trained before; PEFT saves it in a folder of that name."""
    models = [adapted(tiny_model) for _ in range(2)]
    for model in models:
        model.add_adapter("ref", model.peft_config["default"])
        torch.nn.init.normal_(next(p for name, p in model.named_parameters() if "lora_B.ref" in name))
    models[0].save_pretrained(tmp_path)
    assert (tmp_path / "ref/adapter_model.safetensors").is_file()
    restore_weights(models[1], tmp_path)
    first, second = (dict(model.named_parameters()) for model in models)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["q_proj"]}, r"weights that this adapter has no place for: \S+v_proj\S+ and \d+ more"),
        ({"r": 4}, r"its adapter cannot be loaded \(RuntimeError: .*: size mismatch for \S+lora_A\S+: .*shape"),
    ],
)
def test_an_adapter_of_another_form_does_not_come_back(settings, message, adapter, tiny_model):
    with pytest.raises(OSError, match=message) as caught:
        restore_weights(adapted(tiny_model, **settings), adapter)
    assert str(adapter) in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_whose_weights_did_not_arrive_is_noticed(adapter, tiny_model):
    model = adapted(tiny_model)
    with pytest.raises(OSError, match=r"weights that did not reach the model: \S+lora_\S+ and \d+ more"):
        check_adapter(model, adapter)
    restore_weights(model, adapter)
    check_adapter(model, adapter)


def test_bounds_that_no_image_fits(tiny_model):
    smallest = load_processor(tiny_model).image_processor.size["shortest_edge"]
    with pytest.raises(ValueError, match=f"--max_pixels 1: below the smallest area .* {smallest}"):
        load_prompting(tiny_model, "auto", max_pixels=1)
    load_prompting(tiny_model, "auto", max_pixels=smallest)
