"""A model family is one entry, and who generates is one class: made-up ones, which only this file knows, train."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import trl.trainer.utils
from peft import LoraConfig, get_peft_model
from PIL import Image
from qwen_vl_utils import smart_resize
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

from fake_run import row, write_lines
from open_r1.base.errors import REPO_ROOT
from open_r1.engines.shared_prefix import encode_images, encode_prompt, prepare_model, score_completions
from open_r1.engines.vllm_backends import TrainerVLLMBackend, engine_settings
from open_r1.models.families import (
    FAMILIES,
    PARTS,
    end_token_ids,
    family_of,
    qwen,
)
from open_r1.models.families.qwen import QwenVL
from open_r1.models.families.tiled import TILE, TILE_TOKENS
from open_r1.models.loading import load_model, load_processor
from open_r1.reporting.runs import scan_trajectories
from open_r1.running.data import count_prompt_tokens, load_dataset
from open_r1.tiny import make_processor, make_tokenizer, save_tiny_model
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from support import Scripted, families, load_script, make_config, read_jsonl, vowel_share, write_mixed

NAME = "made_up_vl"
UNLIKE = ("qwen2_vl", "qwen3_vl", "smolvlm", "internvl")  # families that share little code


class MadeUpConfig(Qwen2VLConfig):
    model_type = NAME


class MadeUpModel(Qwen2VLForConditionalGeneration):
    config_class = MadeUpConfig


class MadeUpProcessor(Qwen2VLProcessor):
    """Qwen2-VL's, under another name."""


@pytest.fixture
def made_up(tiny_models):
    """A family, here and in transformers, where TRL looks for the class of a reference model.

    The models of all tests are made before it: they are of every family that there is then.
    """
    trl.trainer.utils.transformers.MadeUpModel = MadeUpModel
    AutoConfig.register(NAME, MadeUpConfig)
    AutoModelForImageTextToText.register(MadeUpConfig, MadeUpModel)
    AutoProcessor.register(MadeUpConfig, MadeUpProcessor)
    FAMILIES[NAME] = replace(FAMILIES["qwen2_vl"], model_type=NAME, processor=MadeUpProcessor)
    yield FAMILIES[NAME]
    del FAMILIES[NAME], trl.trainer.utils.transformers.MadeUpModel


def make_trainer(checkpoint, data, output, max_pixels=12544, **changes):
    processor = load_processor(checkpoint, max_pixels=max_pixels)
    return Qwen2VLGRPOTrainer(
        model=load_model(str(checkpoint), dtype="float32"),
        reward_funcs=vowel_share,
        args=make_config(output, **changes),
        train_dataset=load_dataset(data, processor),
        processing_class=processor,
    )


def test_a_family_that_only_a_test_knows_trains(made_up, examples_json, tmp_path):
    checkpoint = save_tiny_model(tmp_path / "model", model_type=NAME, vocab_size=300)
    trainer = make_trainer(checkpoint, examples_json, tmp_path)
    assert family_of(trainer.model) is made_up
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    still = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    # the bias of keys shifts every score of a softmax alike, so it has no gradient by construction
    assert [name for name in still if "k_proj.bias" not in name and "attn.qkv.bias" not in name] == []
    rows = read_jsonl(tmp_path / "trajectories/train.jsonl")
    assert {row["step"] for row in rows} == {1, 2}


def test_a_backend_that_only_a_test_knows_is_learned_from(tiny_model, examples_json, tmp_path):
    """What it hands over is what is rewarded, scored and written down."""
    trainer = make_trainer(tiny_model, examples_json, tmp_path)
    end = trainer.processing_class.tokenizer.eos_token_id
    texts = ["aeiou", "xyz", "a b", ""]
    given = [[*trainer.processing_class.tokenizer(text)["input_ids"], end] for text in texts]
    trainer.backend = Scripted(trainer.backend, lambda rows: [given[row % 4] for row in range(len(rows))])
    trainer.train()
    rows = read_jsonl(tmp_path / "trajectories/train.jsonl")
    assert [row["completion"] for row in rows] == texts * (len(rows) // 4)
    assert [row["length"] for row in rows[:4]] == [6, 4, 4, 1] and all(row["ended"] for row in rows)
    assert all(log["grad_norm"] > 0 for log in trainer.state.log_history if "grad_norm" in log)


class Engine:
    """TRL's `VLLMGeneration`, as far as it is asked; its answers are made up."""

    def __init__(self, mode: str, tensor_parallel_size: int = 1):
        self.mode, self.tensor_parallel_size, self.generation_kwargs = mode, tensor_parallel_size, {"seed": 1}
        self.llm = Mock()  # only to forget images
        self.vllm_client, self.accelerator = Mock(), Mock(is_main_process=True)

    def generate(self, prompts, images, num_generations, profiler):
        self.asked, self.images = prompts, images
        count = len(prompts) * self.generation_kwargs.get("n", 1)
        return None, [[row] for row in range(count)], [[[-0.1 * row]] for row in range(count)], None


@pytest.mark.parametrize(
    "mode, parallel, repeats, rows, each",
    [
        ("colocate", 1, [4, 4], [0, 1], 4),  # once a prompt
        ("colocate", 1, [4, 2], [0, 0, 1], 2),  # a process with a part of a group
        ("colocate", 2, [2, 1], [0, 0, 1], 1),
        ("server", 1, [2, 2], [0, 0, 1, 1], None),  # TRL makes one of what is the same
    ],
)
def test_vllm_gets_each_image_and_as_many_tokens_as_it_reads(tiny_model, mode, parallel, repeats, rows, each):
    processor = load_processor(tiny_model, chat_template="base", max_pixels=12544)
    model, engine = load_model(tiny_model, dtype="float32"), Engine(mode, parallel)
    backend = TrainerVLLMBackend(model, processor, engine, lambda: 4, lambda: None)
    image = Image.new("RGB", (56, 56), "red")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What colour?"}]
    prompts = [backend.encode([{"role": "user", "content": parts}]), backend.encode("No picture.")]
    answer = backend.generate(prompts, repeats, GenerationConfig(max_new_tokens=9))
    assert answer.prompts is prompts and len(answer.ids) == len(answer.logprobs) == sum(repeats)
    assert engine.images == [[[image], None][row] for row in rows] and engine.max_completion_length == 9
    assert engine.generation_kwargs.get("n") == each and engine.generation_kwargs["seed"] == 1
    image_tokens = 1 if mode == "colocate" else int((prompts[0].input_ids == processor.image_token_id).sum())
    found = [ids.count(processor.image_token_id) for ids in engine.asked]
    assert found == [[image_tokens, 0][row] for row in rows] and (mode == "colocate" or image_tokens == 4)


SIZES = [[(96, 64)], [(330, 30)], [(31, 300)], [(2264, 14)], [(97, 64), (64, 97)], [(33, 32)], [(640, 480)], []]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_end_token_of_a_family_ends_a_completion_whichever_the_tokenizer_names(model_type, tiny_models):
    tokenizer = load_processor(tiny_models[model_type]).tokenizer
    ends = set(FAMILIES[model_type].end_tokens) & tokenizer.get_vocab().keys()
    assert len(ends) > 1
    for end in ends:  # a base model names one, its chat model another
        tokenizer.eos_token = end
        assert set(tokenizer.convert_tokens_to_ids(sorted(ends))) <= set(end_token_ids(tokenizer))


@pytest.mark.parametrize("model_type", families(*UNLIKE))
def test_what_the_vision_tower_gives_is_kept_only_while_it_stays_the_same(model_type, tiny_models):
    """Neither the tower trains nor the layers behind it, an adapter there included."""
    family, model = FAMILIES[model_type], load_model(tiny_models[model_type])
    for part in PARTS[:3]:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(family.part_of(name) == part)
        assert family.trains_vision(model) == (part != "language model")
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        inside = [name for name in linear if family.part_of(f"{name}.weight") == part]
        adapted = get_peft_model(model, LoraConfig(target_modules=inside))
        assert family.trains_vision(adapted) == (part != "language model")
        model = adapted.unload()


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if hasattr(FAMILIES[name], "patch_size")])
def test_the_patch_embedding_is_the_convolution_of_the_checkpoint(model_type, tiny_models, monkeypatch):
    """As a matmul, with its gradient, and in a copy of the model with the copy's weights."""
    model = load_model(tiny_models[model_type])
    embed = FAMILIES[model_type].vision_tower(model).patch_embed
    patches = torch.randn(5, embed.proj.weight[0].numel())

    def run(embed: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        states = embed(patches)
        return states, *torch.autograd.grad(states.square().sum(), embed.proj.weight)

    expected = run(embed)
    monkeypatch.setattr(qwen, "forward_of_conv", qwen.embed_patches)  # as on a GPU
    prepare_model(model, load_processor(tiny_models[model_type]))
    torch.testing.assert_close(run(embed), expected)
    copied = copy.deepcopy(embed)
    torch.nn.init.zeros_(embed.proj.weight)
    torch.testing.assert_close(run(copied), expected)


@pytest.mark.parametrize("model_type", families(*UNLIKE))
@pytest.mark.parametrize("max_pixels", [4096, 12544])
def test_prompts_within_the_bound_are_counted_without_a_pixel(model_type, max_pixels, tiny_models):
    """Those of images of any shape, several too, and what the processor writes around them."""
    processor = load_processor(tiny_models[model_type], chat_template="base", max_pixels=max_pixels)
    family, most = FAMILIES[model_type], 0
    assert family.pixel_bounds(processor)[1] <= max_pixels
    for sizes in SIZES:
        images = [Image.new("RGB", size, "red") for size in sizes]
        parts = [{"type": "image", "image": image} for image in images]
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}]}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        example = {"prompt": [{"role": "user", "content": "Which?"}], "images": images}
        assert count_prompt_tokens(example, processor) == inputs["input_ids"].shape[1]
        tokens = (inputs["input_ids"] == processor.image_token_id).sum().item()
        assert family.count_image_tokens(processor, [image.size[::-1] for image in images]) == tokens
        most = max(most, tokens // max(len(images), 1))
    if not isinstance(family, QwenVL):
        assert most == family.tiles_within(max_pixels // TILE**2) * TILE_TOKENS
        assert most * TILE**2 == family.pixel_bounds(processor)[1] * TILE_TOKENS


def test_image_tokens_are_those_that_qwen_itself_counts():
    """By `qwen_vl_utils`, the package of Qwen's authors, for images of ordinary shapes."""
    processor = make_processor(make_tokenizer(), "qwen2_vl")
    factor, bounds = 28, processor.image_processor.size
    for height, width in ((480, 640), (28, 28), (1000, 333), (57, 99)):
        limits = bounds["shortest_edge"], bounds["longest_edge"]
        resized = smart_resize(height, width, factor, *limits)
        expected = resized[0] * resized[1] // factor**2
        assert FAMILIES["qwen2_vl"].count_image_tokens(processor, [(height, width)]) == expected


@pytest.mark.parametrize("model_type", ["smolvlm", "internvl"])
def test_an_image_is_a_tile_at_least(model_type, tiny_models):
    with pytest.raises(ValueError, match=r"--max_pixels 1000: below the smallest area .* 1024"):
        load_processor(tiny_models[model_type], max_pixels=1000)
    with pytest.raises(ValueError, match="--min_pixels 2000: images are enlarged to a tile of 1024 pixels"):
        load_processor(tiny_models[model_type], min_pixels=2000)
    one = load_processor(tiny_models[model_type], min_pixels=1024, max_pixels=1024)
    assert FAMILIES[model_type].count_image_tokens(one, [(480, 640)]) == TILE_TOKENS


def test_vllm_is_refused_where_it_cannot_be_told_the_bounds(tiny_models):
    for model_type in FAMILIES.keys() & tiny_models.keys():
        processor = load_processor(tiny_models[model_type], max_pixels=12544)
        if FAMILIES[model_type].has_vllm:
            assert engine_settings(processor, "float32")["mm_processor_kwargs"]["size"]["longest_edge"] == 12544
        else:
            with pytest.raises(ValueError, match=f"vLLM: not tried with {model_type!r} models"):
                engine_settings(processor, "float32")


def test_a_token_that_is_never_read_needs_no_place(tiny_models, tmp_path):
    """InternVL3's tokenizer knows videos, and the model has no row for them."""
    folder = shutil.copytree(tiny_models["internvl"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    assert load_processor(folder).tokenizer.get_vocab()["<video>"] == config["text_config"]["vocab_size"]
    config["text_config"]["vocab_size"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="they are of different models"):
        load_processor(folder)


@pytest.mark.parametrize("model_type", families("qwen2_vl", "smolvlm", "internvl"))
@pytest.mark.parametrize("template", ["base", "instruct"])
def test_a_report_shows_a_question_without_the_marks_of_its_images(model_type, template, tmp_path):
    """However many images a prompt has: marks are no part of what the prompts share, nor of a question."""
    processor = make_processor(make_tokenizer(model_type=model_type), model_type, template)
    marks = FAMILIES[model_type].vision_tokens
    questions = ["Is it red?", "Where is the box?", "How many?"]
    prompts = []
    for images, question in enumerate(questions):
        parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        message = [{"role": "user", "content": parts}]
        prompts.append(
            processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True, style="reasoning")
        )
    prompts[0] = "".join(marks) + prompts[0]
    with scan_trajectories(write_lines(tmp_path / "train.jsonl", [row(prompt=text) for text in prompts])) as train:
        for prompt, question in zip(prompts, questions, strict=True):
            shown = train.question(prompt)
            assert question in shown[1] and not [mark for mark in marks if mark in "".join(shown)]
            if template == "base":
                assert "Assistant" in shown[0] and "<think>" in shown[2]


def test_no_other_file_of_the_package_knows_a_family():
    """But `published.py`, which makes two models by name. A default family is Qwen2-VL; SITE has a column `visual`."""
    package = REPO_ROOT / "src/open-r1-multimodal/open_r1"
    others = "|".join(name for name in FAMILIES if name not in (NAME, "qwen2_vl"))
    known = re.compile(rf"\bvisual\b|image_grid_thw|<\|vision|IMG_CONTEXT|['\"](?:{others})['\"]")
    own = {"models/image_tags.py", "models/published.py", "tasks/benchmarks/video.py"}
    found = {
        str(path.relative_to(package)): match[0]
        for path in package.rglob("*.py")
        if path.parent.name != "families" and str(path.relative_to(package)) not in own
        for match in known.finditer(path.read_text())
    }
    assert found == {}


# --- docs/families.md ---------------------------------------------------------------------------------------------

_BLOCKS = re.findall(r"```sh\n(.*?)```", (REPO_ROOT / "docs/families.md").read_text(), re.DOTALL)
PAGE = dict(zip(("MOE", "LLAVA"), _BLOCKS, strict=True))


@pytest.fixture
def typed(tmp_path, examples_json, quick_python):
    """Types commands in a folder that has this repository's in it, and says what came of them."""
    for name in ("configs", "scripts", "src"):
        (tmp_path / name).symlink_to(REPO_ROOT / name)
    env = {**os.environ, "PYTHON": str(quick_python), "NUM_PROCESSES": "1", "DATA": str(examples_json)}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OUTPUT": "out"}
    env["CONFIG"] = str(REPO_ROOT / "tests/data/grpo.yaml")

    def types(command: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", "-ec", command], cwd=tmp_path, env=env, capture_output=True, text=True)

    return types


@pytest.mark.parametrize(
    "name, model_type",
    [("MOE", "qwen3_vl_moe"), pytest.param("LLAVA", "llava_onevision", marks=pytest.mark.slow)],
)
def test_a_family_of_ones_own_as_its_page_writes_it(name, model_type, typed):
    done = typed(PAGE[name])
    assert done.returncode == 0 and "step 2/2" in done.stdout, done.stderr[-3000:]
    assert f"a random {model_type} checkpoint" in done.stdout


@pytest.mark.slow
def test_a_family_of_ones_own_answers_and_one_that_is_none_is_a_line(typed, examples_json):
    assert typed(PAGE["MOE"].rpartition("bash")[0]).returncode == 0
    image = next(examples_json.parent.rglob("*.png"))
    question = f"--image {image} --question Which? --max_new_tokens 4 --family my_family:MOE"
    assert "completion:" in typed(f"python scripts/ask.py --model moe {question}").stdout
    launch = "sh src/open-r1-multimodal/run_grpo_SAT.sh --model_name_or_path moe --max_steps 2"
    unknown = typed(launch)
    assert unknown.returncode and "a 'qwen3_vl_moe' model; supported: " in unknown.stderr
    other = typed(f"{launch} --family my_family:Qwen3VL")
    assert other.returncode and "has no family 'Qwen3VL'" in other.stderr


@pytest.fixture
def llava(tmp_path, monkeypatch, tiny_models):
    """The page's LLaVA-OneVision, and a tiny model of it; made after those of all families that there are."""
    commands = PAGE["LLAVA"].partition("python -m")[0].replace("configs/", f"{REPO_ROOT}/configs/")
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True)
    family = load_script(tmp_path / "my_llava.py").LLAVA
    monkeypatch.setitem(FAMILIES, family.model_type, family)
    return family, save_tiny_model(tmp_path / "model", model_type=family.model_type, vocab_size=300)


def test_the_pages_family_scores_as_plain_transformers(llava, examples_json, tmp_path):
    """Packed rows, with features of the rollout and without; images of any shape, several and none; in fewer grids."""
    family, folder = llava
    trainer = make_trainer(folder, examples_json, tmp_path, max_pixels=5000)
    model, processor = trainer.model, trainer.processing_class
    plain = load_model(folder, dtype="float32")
    plain.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints
    torch.manual_seed(0)
    completions = torch.randint(0, 256, (2 * len(SIZES), 7))
    prompts, expected = [], []
    for number, sizes in enumerate(SIZES):
        images = [Image.effect_noise(size, 60).convert("RGB") for size in sizes]
        parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "Which?"}]
        prompt = encode_prompt(model, processor, [{"role": "user", "content": parts}])
        prompts += [prompt, prompt]
        example = {"prompt": [{"role": "user", "content": "Which?"}], "images": images}
        assert count_prompt_tokens(example, processor) == len(prompt.input_ids)
        tokens = (prompt.input_ids == processor.image_token_id).sum()
        assert family.count_image_tokens(processor, [image.size[::-1] for image in images]) == tokens
        for completion in completions[2 * number :][:2]:
            ids = torch.cat([prompt.input_ids, completion])[None]
            logps = plain(ids, **prompt.image_inputs).logits[0, -8:-1].log_softmax(-1)
            expected.append(logps.gather(1, completion[:, None])[:, 0])
    kept = {id(prompt): encode_images(model, prompt) for prompt in prompts}
    for each in (prompts, [kept[id(prompt)] for prompt in prompts]):
        mask = torch.ones_like(completions)
        logps, *_ = score_completions(model, family, each, completions, mask, len(each))
        assert (logps - torch.stack(expected)).abs().max() < 1e-5
    logps.sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert {family.part_of(name) for name in without} == {"vision tower", "merger"}, "kept features have no gradients"


def test_the_pages_family_trains_all_of_a_model(llava, tmp_path):
    """On rows with two images and rows with none."""
    trainer = make_trainer(llava[1], write_mixed(tmp_path / "data", images_per_example=2), tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    still = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    # LLaVA-OneVision takes the tower's states in front of its last norm
    assert [name for name in still if "k_proj.bias" not in name and "post_layernorm" not in name] == []
