"""`generation_kwargs`: every setting of transformers acts in a rollout as in `generate`, or is refused in one line."""

import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig

from open_r1.engines.decoding import generate
from open_r1.engines.shared_prefix import encode_prompt
from open_r1.models.loading import load_model, load_processor
from open_r1.settings.generation import (
    REFUSED,
    REFUSED_BY_VLLM,
    TAKEN,
    check_generation,
    next_token_processors,
    with_tokens,
)
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from support import enlarge, make_config
from test_heldout import long, questions

NO_PROCESSOR = {"pad_token_id"}  # what stands left of a shorter prompt
VALUES = {  # of each setting, one that changes what a model of 300 tokens says
    "do_sample": False,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.99,
    "top_h": 0.01,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.9,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(20, 150)],
    "sequence_bias": [[[7], 90.0]],
    "min_new_tokens": 8,
    "suppress_tokens": list(range(150)),
    "begin_suppress_tokens": list(range(150)),
    "exponential_decay_length_penalty": [0, 5.0],
    "watermarking_config": {"bias": 50.0, "greenlist_ratio": 0.1},
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "eos_token_id": list(range(250)),
    "pad_token_id": 5,
}
WITHOUT_EFFECT_ON_SOUND_SCORES = {"remove_invalid_values", "renormalize_logits", "pad_token_id"}


def fields() -> set[str]:
    """Every setting that the installed transformers has."""
    return {name for name in vars(GenerationConfig()) if name[0] != "_" and name != "transformers_version"}


def test_what_is_taken_or_refused_is_a_setting_of_transformers():
    assert TAKEN | REFUSED.keys() <= fields()
    assert not TAKEN & REFUSED.keys()
    assert set(VALUES) == TAKEN


class Reader(GenerationConfig):
    """A configuration that notes which settings are read."""

    read: ClassVar[set[str]] = set()

    def __getattribute__(self, name):
        Reader.read.add(name)
        return super().__getattribute__(name)


def test_what_is_taken_is_what_transformers_makes_processors_of():
    settings = Reader(do_sample=True, eos_token_id=[0])
    Reader.read.clear()
    model = GenerationMixin()
    model.config = PreTrainedConfig(vocab_size=10)
    next_token_processors(model, settings, 1, "cpu")
    assert TAKEN - Reader.read == set(), "taken, and read by nothing"


@pytest.fixture(scope="module")
def asked(tiny_model):
    model = load_model(tiny_model, dtype="float32").eval()
    enlarge(model)
    processor = load_processor(tiny_model, chat_template="base")
    prompt = encode_prompt(model, processor, [{"role": "user", "content": "Which?"}])

    def answers(**settings):
        torch.manual_seed(1)
        plain = {"do_sample": True, "top_k": 0, "temperature": 3.0, "eos_token_id": list(range(60)), "pad_token_id": 0}
        return generate(model, [prompt], [4], GenerationConfig(max_new_tokens=12, **{**plain, **settings}))

    return answers


@pytest.mark.parametrize("name", sorted(TAKEN - WITHOUT_EFFECT_ON_SOUND_SCORES))
def test_a_setting_that_is_taken_acts(name, asked):
    check_generation({name: VALUES[name]}, vocabulary=300)
    assert asked(**{name: VALUES[name]}) != asked()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": 0.5}, "temperature: completions are scored at the trainer's own temperature"),
        ({"stop_strings": ["</answer>"]}, "stop_strings: whether a completion is whole .* eos_token_id names others"),
        ({"num_beams": 3}, "num_beams: completions are sampled token by token"),
        ({"max_new_tokens": 9}, "max_new_tokens: max_completion_length says"),
        ({"no_such_setting": 1}, "no_such_setting is no setting of a rollout; those that are: .*top_p"),
        ({"repetition_penaltee": 1.1}, r"repetition_penaltee is no setting of a rollout; did you mean repetition_pen"),
        ({"top_p": 3.0}, "top_p 3.0: expected a number above 0 and at most 1"),
        ({"top_p": "0.5"}, "top_p '0.5': "),
        ({"bad_words_ids": [[4000]]}, r"bad_words_ids \[\[4000\]\]: "),
        ({"sequence_bias": {"no": 1.0}}, "sequence_bias "),
        ({"eos_token_id": "end"}, "eos_token_id 'end': "),
    ],
    ids=str,
)
def test_a_setting_that_would_not_act_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=f"^generation_kwargs: {message}") as error:
        check_generation({"top_k": 3, **settings}, vocabulary=300)
    assert "\n" not in str(error.value)


def test_the_trainer_refuses_it_before_it_loads_weights(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *args, **kwargs: pytest.fail("loads"))
    args = make_config(tmp_path, generation_kwargs={"stop_strings": ["."]})
    with pytest.raises(ValueError, match=r"^generation_kwargs: stop_strings: "):
        Qwen2VLGRPOTrainer(str(tiny_model), long, args, train_dataset=questions(4))


def test_names_of_vllm_are_checked_against_its_own(monkeypatch):
    def sampling_params(n=1, temperature=1.0, seed=None, stop=None, max_tokens=16, stop_token_ids=None): ...

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=sampling_params))
    check_generation({"seed": 3, "stop_token_ids": [5]}, 300, use_vllm=True)
    for settings, message in [
        ({"sead": 3}, "sead is no setting of a rollout; did you mean seed?"),
        ({"num_beams": 3}, "num_beams is no setting of a rollout; those that are: "),
        *(({name: 2}, f"{name}: ") for name in REFUSED_BY_VLLM),
    ]:
        with pytest.raises(ValueError) as error:
            check_generation(settings, 300, use_vllm=True)
        assert str(error.value).startswith(f"generation_kwargs: {message}")


def test_the_recipes_own_tokens_win_and_what_must_not_occur_stays_banned():
    ban = {"suppress_tokens": [8, 9]}
    assert with_tokens(None, "eos_token_id", [1, 2], ban) == {"eos_token_id": [1, 2], "suppress_tokens": [8, 9]}
    own = {"eos_token_id": 5, "suppress_tokens": [3, 8], "top_k": 4}
    expected = {"eos_token_id": [5], "suppress_tokens": [3, 8, 9], "top_k": 4}
    assert with_tokens(own, "eos_token_id", [1, 2], ban) == expected
    with_bias = with_tokens({"logit_bias": {3: 1.0, 8: 2.0}}, "stop_token_ids", [1], {"logit_bias": {8: -100.0}})
    assert with_bias == {"logit_bias": {3: 1.0, 8: -100.0}, "stop_token_ids": [1]}


def test_the_recipes_settings_reach_the_rollout(tiny_model, tmp_path):
    own = {"eos_token_id": [40, 41], "repetition_penalty": 1.5, "do_sample": False, "suppress_tokens": [70]}
    args = make_config(tmp_path, generation_kwargs=own)
    trainer = Qwen2VLGRPOTrainer(str(tiny_model), long, args, train_dataset=questions(4))
    settings = trainer.generation_config
    assert (settings.eos_token_id, settings.repetition_penalty, settings.do_sample) == ([40, 41], 1.5, False)
    assert 70 in settings.suppress_tokens and len(settings.suppress_tokens) > 1
    assert trainer.eos_token_ids == [40, 41]  # by which TRL tells a whole completion
