"""The tiny base of the quick start: what is shipped is what its script makes, and it has the flaw that it claims."""

import importlib.util
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from transformers import GenerationConfig

from open_r1.answers import extract_answer, judge
from open_r1.evaluate.answering import generation_settings, messages
from open_r1.modeling import load_model, load_processor
from open_r1.prompts import REPO_ROOT, sat_question
from open_r1.reflection import find_reflections
from open_r1.rollout import generate
from open_r1.shared_prefix import encode_prompt
from open_r1.world import questions
from open_r1.world.parquet import write_sat
from open_r1.world.render import paint
from open_r1.world.scene import LEVELS
from support import read_jsonl, run_grpo

BASE = REPO_ROOT / "configs/tiny/base"
SCRIPT = REPO_ROOT / "scripts/pretrain_tiny.py"
RECORD = json.loads((BASE / "build.json").read_text())
QUESTIONS = 60


@pytest.fixture(scope="module")
def pretrain():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("pretrain_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def answers():
    """(options, right one, greedy completion, sampled completion) of questions that the model was not trained on."""
    model, processor = load_model(str(BASE), dtype="float32").eval(), load_processor(str(BASE))
    level, asked = LEVELS["easy"], []
    for row in range(QUESTIONS):
        rng = random.Random(f"held out {row}")
        one = questions.ask(questions.QUESTIONS[questions.STATIC[row % len(questions.STATIC)]], rng, level)
        asked.append((one, questions.shuffled(rng, one.options)))
    prompts = [
        encode_prompt(
            model, processor, messages([paint(level, one, one.scenes[0])], sat_question(one.question, options))
        )
        for one, options in asked
    ]
    settings = generation_settings(processor, 96)
    torch.manual_seed(0)
    texts = [
        [
            processor.decode(ids, skip_special_tokens=True)
            for ids in generate(model, prompts, [1] * len(prompts), config)
        ]
        for config in (
            GenerationConfig(**settings),
            GenerationConfig(**{**settings, "do_sample": True, "top_k": 0, "top_p": 1.0}),
        )
    ]
    return [
        (options, one.answer, greedy, sampled) for (one, options), greedy, sampled in zip(asked, *texts, strict=True)
    ]


def test_the_shipped_model_is_small_safe_and_the_recorded_one():
    weights = list(BASE.glob("*.safetensors"))
    assert [path.name for path in weights] == ["model.safetensors"] and weights[0].stat().st_size <= 4_000_000
    assert not [path for pattern in ("*.bin", "*.pt", "*.pkl") for path in BASE.glob(pattern)]
    assert load_model(str(BASE), dtype="float32").num_parameters() == RECORD["parameters"]


@pytest.mark.slow
def test_a_short_rebuild_takes_the_same_course(pretrain):
    _, _, losses = pretrain.build(RECORD["seed"], pretrain.SHORT)
    assert list(losses) == list(RECORD["short_losses"]) == list(pretrain.STAGES)
    for name, values in losses.items():
        assert values == pytest.approx(RECORD["short_losses"][name], rel=0.02), name
        assert values[-1] < values[0]
    # The first stage's schedule is that of the whole build, so its first steps are, too.
    assert losses["see"] == pytest.approx(RECORD["losses"]["see"][: pretrain.SHORT], rel=0.02)


def test_no_two_stages_show_the_same_scene(pretrain):
    assert len({stage.seed for stage in pretrain.STAGES.values()}) == len(pretrain.STAGES)


def test_the_base_sees_but_guesses(answers):
    greedy = [judge(text, right, options, lenient=True) for options, right, text, _ in answers]
    first = sum(verdict.answer == options[0] for verdict, (options, *_) in zip(greedy, answers, strict=True))
    assert first / QUESTIONS > 0.6  # a position bias: chance is about 0.4
    assert sum(verdict.correct for verdict in greedy) / QUESTIONS < 0.65


def test_the_base_now_and_then_reasons_and_is_right_more_often_then(answers):
    reasoned = [(options, right, text) for options, right, _, text in answers if "So it is" in text]
    assert 0.1 < len(reasoned) / QUESTIONS < 0.6
    right = sum(judge(text, right, options, lenient=True).correct for options, right, text in reasoned)
    guessed = sum(judge(text, right, options, lenient=True).correct for options, right, text, _ in answers)
    assert right / len(reasoned) > guessed / QUESTIONS + 0.15
    texts = [text for *_, text in answers]
    assert any(find_reflections(text) for text in texts)
    assert any(extract_answer(text) is None for text in texts)  # something for the format reward to mend


@pytest.mark.slow
def test_grpo_from_the_base_learns_to_reason(tmp_path, quick_python):
    """The quick start's GRPO run, its first third."""
    write_sat(tmp_path / "SAT_train.parquet", 400, 11, LEVELS["easy"])
    env = {**os.environ, "PYTHON": sys.executable, "SAT_PARQUET": str(tmp_path / "SAT_train.parquet")}
    prepare = ["sh", str(REPO_ROOT / "src/data/SAT/prepare_dataset.sh"), "--total_num", "400"]
    subprocess.run([*prepare, "--output_dir", str(tmp_path)], env=env, check=True, capture_output=True)
    recipe = {"CONFIG": str(REPO_ROOT / "configs/tiny/grpo.yaml"), "PYTHON": str(quick_python)}
    steps = ["--max_steps", "20", "--eval_strategy", "no", "--eval_on_start", "false"]
    done = run_grpo(BASE, tmp_path / "SAT_train_400.json", tmp_path / "run", *steps, **recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    accuracy = [row["rewards/accuracy_reward/mean"] for row in read_jsonl(tmp_path / "run/log.jsonl") if "loss" in row]
    assert len(accuracy) == 20
    assert sum(accuracy[-4:]) / 4 > sum(accuracy[:4]) / 4 + 0.1
