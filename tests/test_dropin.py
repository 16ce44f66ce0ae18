"""`Qwen2VLGRPOTrainer` in place of `trl.GRPOTrainer`: only the class name changes.

The first part is what TRL's own suite (tests/test_grpo_trainer.py) asks of vision-language models, told again on a tiny
local model and rendered data of its data sets' form, since there is no hub here: training, padding to a multiple,
beta > 0, importance sampling, several images. Left out are its tests of other architectures (Gemma, LLaVA), which this
class refuses, of LoRA (test_lora.py), of Liger kernels and vLLM, which need a GPU, and of tools, which need a model
that calls them.
"""

import importlib.util
import inspect
import io
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from open_r1 import grpo
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.engines.attention import ATTENTION
from open_r1.engines.vllm_backends import load_vllm
from open_r1.models.loading import load_processor
from open_r1.rewards import format_reward, soft_overlong_reward
from open_r1.settings.recipes import read_recipe
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer, unique_names
from support import pretend_vllm, read_jsonl

MESSAGE = [{"role": Value("string"), "content": Value("string")}]
IMAGE_ROWS = Features({"prompt": MESSAGE, "image": ImageFeature()})


def noise(row: int) -> Image.Image:
    return Image.effect_noise((56 + 28 * (row % 2), 56), 80).convert("RGB")


def question(row: int) -> list[dict]:
    return [{"role": "user", "content": f"What is in picture {row}?"}]


def one_image(rows: int = 4) -> Dataset:
    """The form of TRL's `zen-image`: a conversation and an `image` column."""
    data = {"prompt": [question(row) for row in range(rows)], "image": [noise(row) for row in range(rows)]}
    return Dataset.from_dict(data, features=IMAGE_ROWS)


def several_images(rows: int = 4) -> Dataset:
    """The form of TRL's `zen-multi-image`: an `images` column with one image or more."""
    data = {
        "prompt": [question(row) for row in range(rows)],
        "images": [[noise(k) for k in range(1 + row % 2)] for row in range(rows)],
    }
    return Dataset.from_dict(data, features=Features({"prompt": MESSAGE, "images": List(ImageFeature())}))


def by_length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def stock_config(output: Path, **changes: object) -> GRPOConfig:
    """TRL's own configuration class, as its tests set it."""
    settings = {"learning_rate": 0.1, "per_device_train_batch_size": 3, "num_generations": 3, "report_to": "none"}
    settings |= {"max_completion_length": 8, "use_cpu": True, "bf16": False, "max_steps": 4}
    return GRPOConfig(str(output), **{**settings, **changes})


CASES = {
    "pad_to_multiple_of": (one_image, {"pad_to_multiple_of": 8}),
    "beta": (one_image, {"beta": 0.1}),
    "importance sampling": (one_image, {"steps_per_generation": 2}),
    "several images": (several_images, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_trl_asks_of_vision_language_models(case, tiny_model, tmp_path):
    make, changes = CASES[case]
    trainer = Qwen2VLGRPOTrainer(
        model=str(tiny_model),
        reward_funcs=by_length,
        args=stock_config(tmp_path, **changes),
        train_dataset=make(),
    )
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None
    for name, parameter in before.items():
        assert not torch.equal(parameter, trainer.model.get_parameter(name)), f"{name} has not changed"


# --- signature and defaults -----------------------------------------------------------------------------------


def test_the_signature_is_trls(tiny_model, tmp_path):
    theirs, ours = (list(inspect.signature(kind.__init__).parameters) for kind in (GRPOTrainer, Qwen2VLGRPOTrainer))
    assert ours[:-2] == theirs[: len(ours) - 2]  # what follows is handed on as it came, by position too
    by_position = (by_length, stock_config(tmp_path), one_image(), None, None, None, [])
    assert Qwen2VLGRPOTrainer(str(tiny_model), *by_position).reward_funcs == [by_length]


def test_a_name_loads_as_in_trl(tiny_model, tmp_path):
    """In float32 unless asked otherwise: plain AdamW rounds updates of 1e-6 to bfloat16 weights away."""
    for kwargs, dtype in [(None, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)]:
        dtypes = []
        for kind in (GRPOTrainer, Qwen2VLGRPOTrainer):
            args = stock_config(tmp_path, model_init_kwargs=kwargs, beta=0.1)
            trainer = kind(model=str(tiny_model), reward_funcs=by_length, args=args, train_dataset=one_image())
            dtypes.append({p.dtype for model in (trainer.model, trainer.ref_model) for p in model.parameters()})
        assert dtypes == [{dtype}, {dtype}]
    assert trainer.model.config.get_text_config()._attn_implementation == ATTENTION
    assert set(trainer.model.generation_config.eos_token_id) == set(trainer.eos_token_ids)


@pytest.mark.parametrize("kwargs, revision", [({"revision": "v2"}, "v2"), (None, "main")])
def test_everything_of_a_name_is_of_its_revision(kwargs, revision, tmp_path, monkeypatch):
    asked = []

    def note(*of):
        asked.append(of)
        if len(asked) == 2:
            raise FileNotFoundError

    for name in ("check_model_files", "check_weights"):
        monkeypatch.setattr(f"open_r1.trainer.trainer.{name}", note)
    with pytest.raises(FileNotFoundError):
        Qwen2VLGRPOTrainer("org/model", by_length, stock_config(tmp_path, model_init_kwargs=kwargs), one_image())
    assert asked == [("org/model", revision)] * 2


def test_the_reference_of_a_recipe_is_of_its_revision(tiny_model, examples_json, tmp_path, monkeypatch):
    asked, create = [], grpo_trainer.create_model_from_path

    def note(name: str, **settings: object) -> PreTrainedModel:
        asked.append((name, settings["revision"]))
        return create(name, **settings)

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", note)
    arguments = ["--config", str(REPO_ROOT / "tests/data/grpo.yaml"), "--use_cpu", "true", "--model_revision", "v2"]
    arguments += ["--dataset_name", str(examples_json), "--output_dir", str(tmp_path)]
    arguments += ["--model_name_or_path", str(tiny_model)]
    grpo.build_trainer(*read_recipe(grpo.COMMAND.arguments, arguments))
    assert asked == [(str(tiny_model), "v2")]


def test_an_engine_computes_in_the_dtype_of_the_policy(tiny_model, tmp_path, monkeypatch):
    """A policy given by its name is loaded in float32 if nothing else is asked for; mixed precision computes in 16."""

    def stop(processor, dtype):
        raise FileNotFoundError(dtype)

    monkeypatch.setattr("open_r1.configs.need_vllm", lambda option: None)
    monkeypatch.setattr("open_r1.engines.vllm_backends.engine_settings", stop)
    name = str(tiny_model)
    for model, changes, dtype in [
        (name, {}, "float32"),
        (name, {"model_init_kwargs": {"dtype": "bfloat16"}}, "bfloat16"),
        (AutoModelForImageTextToText.from_pretrained(name, dtype=torch.bfloat16), {}, "bfloat16"),
        (name, {"bf16": True}, "bfloat16"),
    ]:
        args = stock_config(tmp_path, use_vllm=True, vllm_mode="colocate", **changes)
        with pytest.raises(FileNotFoundError, match=f"^{dtype}$"):
            Qwen2VLGRPOTrainer(model, by_length, args, one_image())


def test_a_reference_that_is_not_whole_is_one_line(tiny_model, tmp_path):
    """TRL loads it by the policy's name, and would make up what is missing."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    policy = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "mlp" in name))
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(OSError, match=f"{folder}: weights are missing: .*mlp"):
        Qwen2VLGRPOTrainer(policy, by_length, stock_config(tmp_path, beta=0.1), one_image())
    Qwen2VLGRPOTrainer(policy, by_length, stock_config(tmp_path), one_image())  # which has none


@pytest.mark.parametrize("option, value", [("torch_compile", True), ("ds3_gather_for_generation", False)])
def test_what_the_shared_prefix_does_not_go_with(option, value, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=f"{option}: .*--shared_prefix false"):
        Qwen2VLGRPOTrainer(str(tiny_model), by_length, stock_config(tmp_path, **{option: value}), one_image())


def test_vllm_that_is_not_there_is_one_line(tiny_model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    line = "vLLM is not installed; setup.sh installs it on a machine with an NVIDIA GPU"
    with pytest.raises(Mistake, match=f"^use_vllm: {line}"):
        Qwen2VLGRPOTrainer(str(tiny_model), by_length, stock_config(tmp_path, use_vllm=True), one_image())
    with pytest.raises(Mistake, match=f"^--backend vllm: {line}"):
        load_vllm(tiny_model, None, "cpu")


# --- tools and environments, which stay on TRL's path ---------------------------------------------------------

CALLING = "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
CALLING += "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}{% endfor %}"
CALLING += "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{% endfor %}"


class Weather:
    """An environment that adds to a prompt and has no tools."""

    def reset(self, **row: object) -> str:
        return " It rains."


def look(place: str) -> str:
    """What is there.

    Args:
        place: to look at.
    """
    return place


@pytest.fixture
def calling(tiny_model) -> ProcessorMixin:
    """A processor whose template shows calls of tools, and whose tokenizer is said to read them."""
    processor = load_processor(tiny_model)
    processor.chat_template, processor.tokenizer.response_template = CALLING, {}
    return processor


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_an_environment_without_tools_says_its_part(calling, tiny_model, tmp_path):
    seen = []

    def spy(prompts, completions, **kwargs):
        seen.extend(prompt[-1]["content"][-1]["text"] for prompt in prompts)
        return by_length(completions)

    args = stock_config(tmp_path, max_steps=1)
    Qwen2VLGRPOTrainer(
        *(str(tiny_model), spy, args, one_image()), processing_class=calling, environment_factory=Weather
    ).train()
    assert len(seen) == 3 and all(text.endswith(" It rains.") for text in seen)


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
@pytest.mark.parametrize("name, given", [("tools", [look]), ("environment_factory", Weather)])
def test_a_colocated_engine_beside_tools_is_refused(name, given, calling, tiny_model, tmp_path, monkeypatch):
    pretend_vllm(monkeypatch.setattr)
    args, beside = stock_config(tmp_path, use_vllm=True, vllm_mode="colocate"), {name: given}
    with pytest.raises(Mistake, match=r"^tools, environment_factory: .*; add --use_vllm false$"):
        Qwen2VLGRPOTrainer(str(tiny_model), by_length, args, one_image(), processing_class=calling, **beside)


# --- rewards --------------------------------------------------------------------------------------------------


def test_rewards_of_one_name_are_told_apart():
    assert unique_names(["a", "b", "a", "a"]) == ["a", "b", "a_2", "a_3"]


def dictionary(completions, **kwargs):
    return dict.fromkeys(range(len(completions)), 1.0)


async def word(completions, **kwargs):
    return [1.0] * (len(completions) - 1) + ["good"]


async def divides(completions, **kwargs):
    return [1 / 0 for _ in completions]


@pytest.mark.parametrize(
    "reward, message",
    [
        (dictionary, r"dictionary returned \{0: 1.0, .*; expected a list of 3"),
        (word, r"word returned 'good' for completion 2 \(asked 'What is in picture 0\?'\); expected a list of 3"),
        (divides, rf"divides raised ZeroDivisionError: division by zero \({__file__}, line \d+\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_reward_that_is_none_is_named_in_one_line(reward, message, tiny_model, tmp_path):
    trainer = Qwen2VLGRPOTrainer(str(tiny_model), [by_length, reward], stock_config(tmp_path), one_image(1))
    with pytest.raises(Mistake, match=f"^reward_funcs: {message}") as raised:
        trainer.train()
    assert "\n" not in str(raised.value)
    assert trainer.reward_funcs == [by_length, reward]
    if reward is divides:  # a bug keeps its traceback, and the line comes last
        assert isinstance(raised.value.__cause__, ZeroDivisionError)


# --- dataset forms --------------------------------------------------------------------------------------------


def png(row: int) -> bytes:
    buffer = io.BytesIO()
    noise(row).save(buffer, "PNG")
    return buffer.getvalue()


def paths(folder: Path) -> list[str]:
    for row in range(4):
        (folder / f"{row}.png").write_bytes(png(row))
    return [str(folder / f"{row}.png") for row in range(4)]


QUESTIONS = [question(row) for row in range(4)]


def rows_of(features: Features | None = None, **columns: list) -> Dataset:
    return Dataset.from_dict({"prompt": QUESTIONS, **columns}, features)


FORMS = {
    "image feature": lambda folder: one_image(),
    "images feature": lambda folder: several_images(),
    "paths": lambda folder: rows_of(image=paths(folder)),
    "bytes": lambda folder: rows_of(image=[png(row) for row in range(4)]),
    "dicts": lambda folder: rows_of(images=[[{"bytes": png(row), "path": None}] for row in range(4)]),
    "texts": lambda folder: rows_of(prompt=[f"What is {row}?" for row in range(4)]),
    "some with an image": lambda folder: rows_of(IMAGE_ROWS, image=[noise(0), None, noise(1), None]),
    "some with images": lambda folder: rows_of(images=[[], paths(folder)[:2], None, paths(folder)[:1]]),
}
# images of their rows, where it is not one of each
COUNTS = {"images feature": [1, 2, 1, 2], "texts": [0] * 4}
COUNTS |= {"some with an image": [1, 0, 1, 0], "some with images": [0, 2, 0, 1]}


@pytest.mark.parametrize("shared_prefix", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_dataset_forms(form, shared_prefix, tiny_model, tmp_path):
    """Without a solution, which no reward asks for; the rows come to the reward as the dataset has them."""
    dataset, counts, columns = FORMS[form](tmp_path), COUNTS.get(form, [1] * 4), []

    def reward(prompts, completions, **kwargs):
        columns.append({"image", "images"} & set(kwargs))
        assert all(isinstance(completion, str) == isinstance(prompts[0], str) for completion in completions)
        return [float(len(str(completion))) for completion in completions]

    args = stock_config(tmp_path / "out", gradient_accumulation_steps=2, max_steps=2)
    args.shared_prefix = shared_prefix
    trainer = Qwen2VLGRPOTrainer(model=str(tiny_model), reward_funcs=reward, args=args, train_dataset=dataset)
    assert trainer.shared_prefix == shared_prefix
    trainer.train()
    rows = read_jsonl(tmp_path / "out/trajectories/train.jsonl")
    assert len(rows) == 12 and all(row["solution"] is None for row in rows)
    assert sorted(row["prompt"].count("<|image_pad|>") for row in rows) == sorted(3 * counts)
    assert all(row["prompt"].count("<|image_pad|>") == len(row["images"]) for row in rows)
    assert all(seen == {"image", "images"} & set(dataset.column_names) for seen in columns)


def test_one_question_about_two_pictures(tiny_model, tmp_path):
    """Neighbours of the same text have one prompt only if they show the same."""
    data = {"prompt": [question(0)] * 2, "image": [noise(0), noise(2)]}
    dataset = Dataset.from_dict(data, features=IMAGE_ROWS)
    args = stock_config(tmp_path, per_device_train_batch_size=6, max_steps=1)
    trainer = Qwen2VLGRPOTrainer(str(tiny_model), by_length, args, dataset)
    sampled = []
    sample = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: sampled.append((rows, sample(rows))) or sampled[-1][1]
    trainer.train()
    [(rows, output)] = sampled
    assert len(set(output["prompts"])) == 2
    for row, prompt in zip(rows, output["prompts"], strict=True):
        shown = trainer.processing_class.image_processor(images=[row["image"]], return_tensors="pt")["pixel_values"]
        assert torch.equal(prompt.image_inputs["pixel_values"], shown)
    assert all(row["images"] == ["(not a file)"] for row in read_jsonl(tmp_path / "trajectories/train.jsonl"))


def test_our_rewards_are_told_of_the_run(tiny_model, tmp_path):
    """In a script of one's own, too: where the template opens `<think>`, no completion would have the format."""
    rewards, processor = [by_length, format_reward, soft_overlong_reward], load_processor(tiny_model, "base")
    config, dataset = stock_config(tmp_path), one_image()
    trainer = Qwen2VLGRPOTrainer(str(tiny_model), rewards, config, dataset, processing_class=processor)
    own, form, overlong = trainer.reward_funcs
    assert own is by_length and trainer.reward_func_names == [reward.__name__ for reward in rewards]
    assert form(["I see.</think><answer>3</answer>"]) == [1.0]
    assert overlong([""], completion_ids=[[0] * 8]) == [-1.0]


def test_a_text_has_no_place_for_images(tiny_model, tmp_path):
    dataset = Dataset.from_dict({"prompt": ["What?"] * 4, "image": paths(tmp_path)})
    trainer = Qwen2VLGRPOTrainer(str(tiny_model), by_length, stock_config(tmp_path), dataset)
    with pytest.raises(ValueError, match="a text has no place for images"):
        trainer.train()


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_an_image_that_breaks_in_mid_run_ends_no_run(shared_prefix, tiny_model, tmp_path, capsys, monkeypatch):
    files = paths(tmp_path)
    dataset = Dataset.from_dict({"prompt": QUESTIONS, "image": files})
    Path(files[2]).write_bytes(b"")
    args = stock_config(tmp_path / "out", max_steps=4)
    args.shared_prefix, args.mask_truncated_completions = shared_prefix, False

    def by_length(completions, image, **kwargs):
        assert set(image) <= set(files) and "images" not in kwargs  # the row as the dataset has it, nothing opened
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = Qwen2VLGRPOTrainer(str(tiny_model), by_length, args, dataset)
    compute, without_a_part = trainer._compute_loss, 0

    def count(model, inputs):
        nonlocal without_a_part
        without_a_part += int((inputs["completion_mask"].sum(dim=1) == 0).sum())
        return compute(model, inputs)

    monkeypatch.setattr(trainer, "_compute_loss", count)
    trainer.train()
    rows = read_jsonl(tmp_path / "out/trajectories/train.jsonl")
    broken = [row for row in rows if row["images"] == [files[2]]]
    assert len(rows) == 12 and len(broken) == 3 and without_a_part == 3  # in the loss
    assert all(row["advantage"] == 0 and row["rewards"] == {"by_length": None} for row in broken)
    assert capsys.readouterr().err.count(f"warning: image {files[2]}: corrupt image") == 1  # once, not once a step
    logs = [log["broken_images/completions"] for log in trainer.state.log_history if "broken_images/completions" in log]
    assert sum(logs) == 3
