"""Rows with and without images in one set: the same numbers, and the same work in every process."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from open_r1.base.errors import REPO_ROOT
from open_r1.configs import FreezeArguments
from open_r1.engines.decoding import generate
from open_r1.engines.shared_prefix import encode_prompt
from open_r1.models.families import FAMILIES, family_of
from open_r1.models.loading import accept_missing_images, load_model, load_processor
from open_r1.models.trained import freeze
from open_r1.running.data import load_dataset
from open_r1.sft import AnswerCollator
from support import families, launch_env, run_grpo, write_mixed


def messages(image: bool) -> list[dict]:
    content = [{"type": "image", "image": Image.effect_noise((84, 84), 60).convert("RGB")}] if image else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": "Where?"}]}]


def tower(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    family = family_of(model)
    named = model.named_parameters()
    return {name: p.grad for name, p in named if family.part_of(name) in ("vision tower", "merger")}


@pytest.mark.parametrize("model_type", families("qwen2_vl", "qwen3_5", "smolvlm", "internvl"))
@pytest.mark.parametrize("image", [True, False])
def test_a_blank_image_changes_no_number(model_type, image, tiny_models):
    """Logits and gradients are bit for bit the same; without an image the tower has gradients, and they are zero."""
    processor = load_processor(tiny_models[model_type], chat_template="base")
    inputs = processor.apply_chat_template(
        [messages(image)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    results = []
    for always in (None, False, True):
        model = load_model(tiny_models[model_type], dtype="float32")
        if always is not None:
            accept_missing_images(model, always)
        logits = model(**inputs).logits
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
        gradients = tower(model).values()
        if image or not always:
            assert all((gradient is not None) == image for gradient in gradients)
        else:
            assert all(gradient is not None and not gradient.any() for gradient in gradients)
    for logits, gradients in results[1:]:
        assert torch.equal(logits, results[0][0])
        for name, gradient in results[0][1].items():
            assert gradient is None or torch.equal(gradient, gradients[name]), name


def test_a_model_that_learns_from_images_alone_takes_a_batch_without_one(tiny_model):
    model = load_model(tiny_model, dtype="float32")
    freeze(model, FreezeArguments(freeze_llm=True))
    accept_missing_images(model, always_encode=False)
    model(torch.arange(20)[None]).logits.square().mean().backward()
    assert all(gradient is not None and not gradient.any() for gradient in tower(model).values())


@pytest.mark.parametrize("model_type", families("qwen2_vl", "qwen3_5", "smolvlm", "internvl"))
def test_the_tower_runs_once_a_prompt_and_not_for_every_token(model_type, tiny_models):
    processor = load_processor(tiny_models[model_type], chat_template="base")
    model = load_model(tiny_models[model_type], dtype="float32")
    accept_missing_images(model, always_encode=True)
    calls = []
    FAMILIES[model_type].vision_tower(model).register_forward_hook(lambda *args: calls.append(1))
    config = model.generation_config
    config.max_new_tokens, config.do_sample = 6, False
    prompt = encode_prompt(model, processor, messages(False))
    assert not prompt.image_inputs
    ours = generate(model, [prompt], [2], config)
    assert len(calls) == 1 and len(ours) == 2
    model.generate(input_ids=prompt.input_ids[None], max_new_tokens=6, do_sample=False)
    assert len(calls) == 2


def test_a_slice_without_images_is_a_batch_without_images(tiny_model):
    """TRL cuts a batch of mixed rows into micro-batches whose image tensors may be empty."""
    model = load_model(tiny_model, dtype="float32")
    accept_missing_images(model, always_encode=False)
    ids = torch.arange(20)[None]
    empty = {"pixel_values": torch.zeros(0, 1176), "image_grid_thw": torch.zeros(0, 3, dtype=torch.long)}
    kinds = torch.zeros_like(ids)
    assert torch.equal(model(ids, **empty, mm_token_type_ids=kinds).logits, model(ids).logits)


def test_sft_batches_mix_rows_and_replace_a_broken_image(tiny_model, tmp_path, capsys):
    processor = load_processor(tiny_model, chat_template="base")
    rows = list(load_dataset(write_mixed(tmp_path), processor, style="direct"))
    collator = AnswerCollator(processor=processor, template_kwargs={"style": "direct"})
    counts = {(0, 1): 1, (1, 0): 1, (1, 3): 0, (1, 2, 3, 4): 2}
    for indices, images in counts.items():
        batch = collator([rows[index] for index in indices])
        assert len(batch.get("image_grid_thw", [])) == images
        for ids, labels, index in zip(batch["input_ids"], batch["labels"], indices, strict=True):
            assert processor.decode(labels[labels != -100]) == rows[index]["solution"] + "<|im_end|>"
            assert (ids == processor.image_token_id).any() == (index % 2 == 0)
    alone = collator([rows[0]])
    Path(rows[2]["images"][0]).write_bytes(b"")
    assert torch.equal(collator([rows[0], rows[2]])["input_ids"][1], alone["input_ids"][0])
    assert capsys.readouterr().err.count("; the row before it is repeated") == 1


# --- several processes ----------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("zero, shared_prefix", [("cpu", "false"), ("zero3", "true"), ("zero3", "false")])
def test_grpo_under_zero(zero, shared_prefix, tiny_model, quick_python, tmp_path):
    """One prompt a rank and micro-batch: in every step some ranks have an image and others have none."""
    arguments = ["--max_steps", "4", "--reward_funcs", "support:vowel_share", "--report_to", "none"]
    arguments += ["--per_device_train_batch_size", "4", "--completions_per_step", "8", "--save_steps", "4"]
    arguments += ["--shared_prefix", shared_prefix, "--freeze_vision", "false"]
    env = {"ACCELERATE_CONFIG": zero, "OMP_NUM_THREADS": "1", "PYTHON": str(quick_python)}
    result = run_grpo(tiny_model, write_mixed(tmp_path), tmp_path / "out", *arguments, **env)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out/trajectories/train.jsonl").read_text().splitlines()]
    assert {len(row["images"]) for row in rows} == {0, 1} and {row["step"] for row in rows} == {1, 2, 3, 4}


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [pytest.param("cpu", marks=pytest.mark.nightly), "zero3"])
def test_sft_under_zero(zero, tiny_model, quick_python, tmp_path):
    arguments = "--max_steps 4 --per_device_train_batch_size 1 --report_to none --save_steps 4"
    result = subprocess.run(
        ["sh", str(REPO_ROOT / "src/open-r1-multimodal/run_sft.sh"), *arguments.split()],
        env=launch_env(
            tiny_model,
            write_mixed(tmp_path),
            tmp_path / "out",
            CONFIG=str(REPO_ROOT / "tests/data/sft.yaml"),
            ACCELERATE_CONFIG=zero,
            OMP_NUM_THREADS="1",
            PYTHON=str(quick_python),
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out/model.safetensors").is_file()
