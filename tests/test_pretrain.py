"""The tiny base of the quick start: what is shipped is what its script makes, and it has the habits that it claims."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from open_r1.answers.checker import extract_answer, judge
from open_r1.answers.reflection import find_reflections
from open_r1.base.errors import REPO_ROOT
from open_r1.base.prompts import sat_question
from open_r1.engines.decoding import generate
from open_r1.engines.shared_prefix import encode_prompt
from open_r1.evaluation.answering import generation_settings, messages
from open_r1.models.loading import load_model, load_processor
from open_r1.world import questions
from open_r1.world.parquet import row_rng, write_sat
from open_r1.world.render import paint
from open_r1.world.scene import LEVELS
from support import load_script, read_jsonl, run_grpo

BASE = REPO_ROOT / "configs/tiny/base"
SCRIPT = REPO_ROOT / "scripts/dev/pretrain_tiny.py"
RECORD = json.loads((BASE / "build.json").read_text())
QUESTIONS, SAMPLES = 60, 16


@pytest.fixture(scope="module")
def pretrain():
    """The script as a module."""
    return load_script(SCRIPT)


@dataclass(frozen=True)
class Answers:
    """Of a question that the model was not trained on."""

    options: tuple[str, ...]
    right: str
    greedy: str
    direct: str  # greedy, asked for the answer alone
    sampled: list[str]

    def is_right(self, text: str) -> bool:
        return judge(text, self.right, self.options, lenient=True).correct


@pytest.fixture(scope="module")
def answers() -> list[Answers]:
    model, processor = load_model(str(BASE), dtype="float32").eval(), load_processor(str(BASE))
    level, asked = LEVELS["easy"], []
    for row in range(QUESTIONS):
        rng = random.Random(f"held out {row}")
        one = questions.ask(questions.QUESTIONS[questions.STATIC[row % len(questions.STATIC)]], rng, level)
        asked.append((one, questions.shuffled(rng, one.options)))

    def complete(repeats: int, style: str, **changes: Any) -> list[list[str]]:
        prompts = []
        for one, options in asked:
            turns = messages([paint(level, one, one.scenes[0])], sat_question(one.question, options))
            prompts.append(encode_prompt(model, processor, turns, style=style))
        config = GenerationConfig(**{**generation_settings(processor, 96), **changes})
        ids = generate(model, prompts, [repeats] * len(prompts), config)
        texts = [processor.decode(each, skip_special_tokens=True) for each in ids]
        return [texts[start : start + repeats] for start in range(0, len(texts), repeats)]

    torch.manual_seed(0)
    greedy, direct = complete(1, "reasoning"), complete(1, "direct")
    sampled = complete(SAMPLES, "reasoning", do_sample=True, top_k=0, top_p=1.0)
    return [
        Answers(options, one.answer, *greedy[index], *direct[index], sampled[index])
        for index, (one, options) in enumerate(asked)
    ]


def test_the_shipped_model_is_small_safe_and_the_recorded_one():
    weights = list(BASE.glob("*.safetensors"))
    assert [path.name for path in weights] == ["model.safetensors"] and weights[0].stat().st_size <= 4_000_000
    assert not [path for pattern in ("*.bin", "*.pt", "*.pkl") for path in BASE.glob(pattern)]
    assert load_model(str(BASE), dtype="float32").num_parameters() == RECORD["parameters"]


@pytest.mark.nightly
def test_a_short_rebuild_takes_the_same_course(pretrain):
    _, _, losses = pretrain.build(RECORD["seed"], pretrain.SHORT)
    assert list(losses) == list(RECORD["short_losses"]) == list(pretrain.STAGES)
    for name, values in losses.items():
        assert values == pytest.approx(RECORD["short_losses"][name], rel=0.02), name
        assert values[-1] < values[0]
    # The first stage's schedule is that of the whole build, so its first steps are, too.
    assert losses["see"] == pytest.approx(RECORD["losses"]["see"][: pretrain.SHORT], rel=0.02)


@pytest.mark.nightly
def test_no_lesson_shows_a_short_way_to_the_right_answer(pretrain):
    assert len({stage.seed for stage in pretrain.STAGES.values()}) == len(pretrain.STAGES)  # no scene twice
    _, processor, _ = pretrain.make_base(0)
    glance = r" It must be [^.]+\."
    for lesson in (pretrain.ask, pretrain.answer, pretrain.hurry, pretrain.spoil):
        samples = [lesson(processor, row_rng(0, row), row) for row in range(200)]
        thoughts = [each.completion for each in samples if each.prompt.endswith("<think>")]
        assert all(re.match(rf"{glance}( Wait, let me check\. |</think>)", text) for text in thoughts)
        alone = [each.completion for each in samples if not each.prompt.endswith("<think>")]
        assert len(alone) < 40 and not any("at" in text.split() for text in alone)


@pytest.mark.nightly
def test_the_base_has_the_habits_that_it_claims(answers):
    """It names the first option, and rarely looks again, though it is right more often then."""
    first = [judge(one.greedy, one.right, one.options, lenient=True).answer == one.options[0] for one in answers]
    assert sum(first) / QUESTIONS > 0.65  # a position bias: chance is about 0.4
    for style in ("greedy", "direct"):  # and it is weak without a thought
        assert sum(one.is_right(getattr(one, style)) for one in answers) / QUESTIONS < 0.6
    sampled = [(one, text) for one in answers for text in one.sampled]
    again = [one.is_right(text) for one, text in sampled if find_reflections(text)]
    glances = [(one.is_right(text), text) for one, text in sampled if not find_reflections(text)]
    assert 0.02 < len(again) / len(sampled) < 0.08
    assert sum(again) / len(again) > sum(right for right, _ in glances) / len(glances) + 0.2
    assert sum("So it is" in text for _, text in glances) / len(sampled) < 0.01  # it has no other way of reasoning
    assert any(extract_answer(text) is None for _, text in sampled)  # something for the format reward to mend


@pytest.mark.slow
def test_grpo_from_the_base_finds_that_checking_pays(tmp_path, quick_python):
    """The quick start's GRPO run, its first half: no reward names what grows."""
    write_sat(tmp_path / "SAT_train.parquet", 400, 11, LEVELS["easy"])
    env = {**os.environ, "PYTHON": sys.executable, "SAT_PARQUET": str(tmp_path / "SAT_train.parquet")}
    prepare = ["sh", str(REPO_ROOT / "src/data/SAT/prepare_dataset.sh"), "--total_num", "400"]
    subprocess.run([*prepare, "--output_dir", str(tmp_path)], env=env, check=True, capture_output=True)
    recipe = {"CONFIG": str(REPO_ROOT / "configs/tiny/grpo.yaml"), "PYTHON": str(quick_python)}
    steps = ["--max_steps", "30", "--eval_strategy", "no", "--eval_on_start", "false"]
    done = run_grpo(BASE, tmp_path / "SAT_train_400.json", tmp_path / "run", *steps, **recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    log = [row for row in read_jsonl(tmp_path / "run/log.jsonl") if "loss" in row]
    assert len(log) == 30

    def ends(name: str) -> tuple[float, float]:
        values = [row[name] for row in log]
        return sum(values[:5]) / 5, sum(values[-5:]) / 5

    before, after = ends("rewards/accuracy_reward/mean")
    assert after > before + 0.2
    before, after = ends("reflection/share")
    assert before < 0.1 and after > 0.4
    before, after = ends("completions/mean_length")
    assert after > 1.4 * before
