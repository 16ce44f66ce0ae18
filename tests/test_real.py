"""What random weights cannot judge, on a real language model (SmolLM2-135M-Instruct): rounding, babble, commands."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional
from transformers import GenerationConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

from benchmarks.published import make_256m_config
from laptop.language_model import copy_language_model, extend_tokenizer, load_language_model
from open_r1.answers.checker import judge
from open_r1.base.errors import REPO_ROOT
from open_r1.base.prompts import load_chat_template
from open_r1.engines.agreement import InFloat32
from open_r1.engines.decoding import generate
from open_r1.engines.shared_prefix import encode_prompt, score_completions
from open_r1.models.loading import load_model, load_processor
from open_r1.running.data import load_dataset
from open_r1.tiny import make_model as make_random_model
from open_r1.trainer.rows import with_images_inside
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from open_r1.world.parquet import write_cvbench, write_sat
from open_r1.world.scene import LEVELS
from support import make_config, vowel_share

pytestmark = pytest.mark.real
STEP = ["--completions_per_step", 8, "--max_completion_length", 24]
TEXT = "There are 2024 red balls (3 4) left of <think>it's</think> <answer>A</answer>\n\nSo the cup isn't on the table."


@pytest.fixture(scope="module")
def language_model():
    return load_language_model()


def make_smolvlm(language_model, tokenizer):
    """The language model as SmolVLM2-256M, which has it for its own; the vision tower has random weights."""
    tokenizer = extend_tokenizer(tokenizer, "smolvlm")
    model = make_random_model(make_256m_config(tokenizer))
    copy_language_model(language_model, model, tokenizer)
    tile = {"size": {"longest_edge": 512}, "max_image_size": {"longest_edge": 512}}
    video = SmolVLMVideoProcessor(**tile, num_frames=1, fps=1)
    template = load_chat_template("instruct", "smolvlm")
    images = SmolVLMImageProcessor(**tile)
    return model, SmolVLMProcessor(images, tokenizer, video, image_seq_len=64, chat_template=template)


@pytest.fixture(scope="module")
def as_smolvlm(tmp_path_factory, language_model) -> Path:
    folder = tmp_path_factory.mktemp("smolvlm")
    model, processor = make_smolvlm(*language_model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shape", ["real_model", "as_smolvlm"])
def test_logits_are_the_language_models(request, language_model, shape):
    model, tokenizer = language_model
    folder = request.getfixturevalue(shape)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    processor = load_processor(folder)
    assert processor.tokenizer(TEXT)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        logits = load_model(folder, dtype="float32")(input_ids=ids).logits
        assert (logits[..., : len(tokenizer)] - model(input_ids=ids).logits).abs().max() < 1e-4


@pytest.fixture(scope="module")
def typed(quick_python):
    """Runs a command and returns what it prints."""

    def run(script: str, *arguments: object, **env: object) -> str:
        command = ["sh" if script.endswith(".sh") else quick_python, REPO_ROOT / script, *arguments]
        env = {**os.environ, "PYTHON": quick_python, **env}
        result = subprocess.run(
            list(map(str, command)), env={k: str(v) for k, v in env.items()}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        return result.stdout + result.stderr

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory, typed) -> Path:
    """A rendered world: `SAT_train_48.json` to train on, `cvbench` with 12 questions."""
    folder = tmp_path_factory.mktemp("world")
    write_sat(folder / "SAT.parquet", 48, seed=11, level=LEVELS["easy"])
    write_cvbench(folder / "cvbench", 12, seed=12, level=LEVELS["easy"])
    typed(
        "src/data/SAT/prepare_dataset.sh", "--total_num", 48, "--output_dir", folder, SAT_PARQUET=folder / "SAT.parquet"
    )
    return folder


@pytest.fixture
def trainer(real_model, world, tmp_path):
    """How to make a trainer of a dtype."""

    def make(dtype: str, **changes: object) -> Qwen2VLGRPOTrainer:
        processor = load_processor(real_model, chat_template="base", max_pixels=12544)
        return Qwen2VLGRPOTrainer(
            model=load_model(real_model, dtype=dtype),
            reward_funcs=vowel_share,
            args=make_config(tmp_path, bf16=False, max_completion_length=48, **changes),
            train_dataset=load_dataset(world / "SAT_train_48.json", processor),
            processing_class=processor,
            peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        )

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_scores_are_those_of_the_plain_forward_pass(trainer, dtype):
    """In 16 bits they are as far from float32 as the plain pass is: nothing but rounding is between them."""
    trainer = trainer(dtype)
    model, processor = trainer.model, trainer.processing_class
    texts = [
        "The red circle is left of the blue square.</think> <answer>left</answer>",
        "Wait, let me check again.</think>\n<answer>right</answer>",
    ]
    row = with_images_inside(trainer.train_dataset[0])
    prompt = encode_prompt(trainer.plain_model(), processor, row["prompt"])
    rows = [torch.tensor([*processor.tokenizer(text)["input_ids"], processor.tokenizer.eos_token_id]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)

    def plain(row: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of one completion, by the model's own forward pass over prompt and completion."""
        whole = torch.cat([prompt.input_ids, row])[None]
        kinds = (whole == processor.image_token_id).int()
        logits = model(input_ids=whole, mm_token_type_ids=kinds, **prompt.image_inputs).logits[0]
        logps = functional.log_softmax(logits.float(), dim=-1)[len(prompt.input_ids) - 1 : -1]
        return logps.gather(1, row[:, None])[:, 0]

    def packed() -> torch.Tensor:
        logps, *_ = score_completions(model, trainer.family, [prompt] * 2, ids, mask, batch_size=2)
        return torch.cat([logps[index, : len(row)] for index, row in enumerate(rows)])

    model.eval()
    with torch.no_grad():
        with InFloat32(torch.device("cpu")):
            exact = torch.cat([plain(row) for row in rows])
        by_hand, ours = torch.cat([plain(row) for row in rows]), packed()
    if dtype == "float32":
        assert (ours - by_hand).abs().max() < 1e-4
    else:
        rounding, of_ours = ((values - exact).abs().mean() for values in (by_hand, ours))
        assert 0.001 < of_ours < 1.5 * rounding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_with_lora(trainer, dtype):
    trainer = trainer(dtype, max_steps=1, learning_rate=1e-4)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    [log] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log["grad_norm"] > 0 and log["kl"] < 1e-3
    assert log["entropy"] > 0.5, "a language model's, not a random one's (10.8) nor a dead one's"
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)


@pytest.fixture(scope="module")
def policy(real_model):
    return load_model(real_model, dtype="float32").eval(), load_processor(real_model, chat_template="base")


def test_greedy_completions_are_those_of_generate(policy, world):
    model, processor = policy
    rows = load_dataset(world / "SAT_train_48.json", processor)
    messages = [with_images_inside(rows[index])["prompt"] for index in range(4)]
    prompts = [encode_prompt(model, processor, message) for message in messages]
    settings = {"max_new_tokens": 64, "do_sample": False, "repetition_penalty": 1.0}
    settings |= {"eos_token_id": [0, 2], "pad_token_id": 0}
    ours = generate(model, prompts, [1] * 4, GenerationConfig(**settings))
    for prompt, mine in zip(prompts, ours, strict=True):
        kinds = (prompt.input_ids == processor.image_token_id).int()[None]
        whole = model.generate(
            input_ids=prompt.input_ids[None],
            mm_token_type_ids=kinds,
            **prompt.image_inputs,
            generation_config=GenerationConfig(**settings),
        )
        assert mine == whole[0, len(prompt.input_ids) :].tolist()


def test_first_tokens_are_drawn_with_the_models_probabilities(policy, world):
    """3,000 draws at temperature 1: the shares of the likeliest tokens, each within four standard errors."""
    model, processor = policy
    draws, at_once = 3000, 100  # a cache of 0.7 GB
    message = with_images_inside(load_dataset(world / "SAT_train_48.json", processor)[0])["prompt"]
    prompt = encode_prompt(model, processor, message)
    with torch.no_grad():
        kinds = (prompt.input_ids == processor.image_token_id).int()[None]
        logits = model(input_ids=prompt.input_ids[None], mm_token_type_ids=kinds, **prompt.image_inputs).logits
    probabilities, tokens = logits[0, -1].softmax(dim=-1).topk(10)
    torch.manual_seed(0)
    settings = {"do_sample": True, "top_k": 0, "repetition_penalty": 1.0}
    settings = GenerationConfig(max_new_tokens=1, eos_token_id=[2], pad_token_id=0, **settings)
    batches = [generate(model, [prompt], [at_once], settings) for _ in range(draws // at_once)]
    drawn = torch.tensor([ids[0] for batch in batches for ids in batch])
    for token, probability in zip(tokens, probabilities, strict=True):
        share = (drawn == token).float().mean()
        assert abs(share - probability) < 4 * (probability * (1 - probability) / draws).sqrt()


def test_the_doctor_finds_a_healthy_model_healthy(typed, real_model, world):
    """The command, in 16 bits; test_doctor_real.py has its checks in every precision."""
    recipe = ["--config", "tests/data/grpo.yaml", "--model_name_or_path", real_model]
    data = ["--dataset_name", world / "SAT_train_48.json", "--dtype", "bfloat16", "--output_dir", world / "doctor"]
    said = typed("scripts/doctor.py", *recipe, *data, *STEP)
    for check in ("batching", "reference", "sight", "shared prefix", "memory", "hours"):
        assert "pass" in next(line for line in said.splitlines() if f"  {check}  " in line), said


def test_from_training_to_its_page(typed, real_model, world, tmp_path):
    """Two steps in bfloat16 with LoRA as the scripts launch them, then evaluated, asked, exported, shown."""
    recipes = f"{REPO_ROOT}/tests/data/grpo.yaml {REPO_ROOT}/configs/overlays/lora.yaml"
    launch = {"CONFIG": recipes, "MODEL": real_model, "DATA": world / "SAT_train_48.json", "OUTPUT": tmp_path / "run"}
    sizes = [*STEP, "--max_steps", 2, "--dtype", "bfloat16", "--reward_funcs", "accuracy", "format"]
    typed("src/open-r1-multimodal/run_grpo_SAT.sh", *sizes, NUM_PROCESSES=1, **launch)
    whole = tmp_path / "whole"
    typed("scripts/export.py", "--adapter", tmp_path / "run", "--output", whole)
    results = ["--dataset_path", world / "cvbench", "--output_dir", tmp_path / "results", "--max_new_tokens", 24]
    typed("src/eval/test_qwen2vl_CVBench.py", "--model_path", whole, *results)
    [result] = (tmp_path / "results").glob("*.json")
    assert json.loads(result.read_text())["scores"]["Total"]["n"] == 12
    question = ["--image", next(world.glob("**/*.png")), "--question", "Is the red circle left?"]
    assert typed("scripts/ask.py", "--model", whole, *question, "--max_new_tokens", 24).strip()
    typed("scripts/report.py", tmp_path / "run")
    assert (tmp_path / "run/report.html").stat().st_size > 20_000


def test_the_answer_checker_reads_an_untuned_models_babble_as_a_person_does():
    """50 completions of the untrained model, judged by hand: the option that each commits itself to, or none."""
    rows = json.loads((Path(__file__).parent / "data/untuned.json").read_text())
    wrong = []
    for row in rows:
        verdict = judge(row["response"], row["options"][0], row["options"], lettered=row["lettered"], lenient=True)
        answer = verdict.answer
        if answer and row["lettered"]:
            answer = row["options"]["ABCDEF".index(answer[1])]
        if answer != row["said"]:
            wrong.append((row["response"], row["said"], answer))
    assert len(rows) == 50
    assert all(said is None for _, said, _ in wrong), "an answer that a person sees is read, and read right"
    assert len(wrong) <= 1, wrong
