"""An engine that does not sample from the policy is stopped before the first step; test_vllm.py has the real one."""

import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from open_r1.agreement import check_agreement, difference
from open_r1.front_door import Mistake
from support import make_trainer


def test_the_difference_is_that_of_known_tokens():
    scored = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]])
    total, count = difference([[-1.5, None], [-2.0]], scored).tolist()
    assert (total, count) == (1.5, 2)
    assert difference([[0.0, None]], scored[:1]).tolist() == [1, 1]  # of a token that was certain
    assert difference([], torch.zeros(0, 3)).tolist() == [0, 0]


@pytest.mark.parametrize(
    "mean, dtype, stops",
    [
        (0.005, "float32", False),
        (0.0051, "float32", True),
        (0.05, "bfloat16", False),
        (0.051, "bfloat16", True),
        (0.051, "float16", True),
        (math.nan, "float32", True),
    ],
)
def test_rounding_is_no_difference(mean, dtype, stops):
    if not stops:
        return check_agreement(mean, dtype)
    with pytest.raises(Mistake, match=r"(?s)^use_vllm: .*chat template.*max_pixels.*expanded twice.*checkpoint"):
        check_agreement(mean, dtype)


class Engine:
    """Samples as the trainer's own backend does, and says what the policy gives each token, or a little else."""

    def __init__(self, trainer, error: float):
        self.trainer, self.own, self.error = trainer, trainer.backend, error

    def encode(self, prompt):
        return self.own.encode(prompt)

    def generate(self, prompts, repeats, settings):
        answer = self.own.generate(prompts, repeats, settings)
        rows = [prompt for prompt, count in zip(answer.prompts, repeats, strict=True) for _ in range(count)]
        logprobs = []
        for prompt, ids in zip(rows, answer.ids, strict=True):
            inputs = torch.cat([prompt.input_ids, torch.tensor(ids)])[None]
            kinds = (inputs == self.trainer.processing_class.image_token_id).int()
            logits = self.trainer.model(input_ids=inputs, mm_token_type_ids=kinds, **prompt.image_inputs).logits
            picked = logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)[range(len(ids)), ids]
            logprobs.append((picked + self.error).tolist())
        return replace(answer, logprobs=logprobs)


@pytest.mark.parametrize("error", [0.0, 0.006])
def test_a_policy_is_compared_and_nothing_stays(tiny_model, examples_json, tmp_path, error):
    trainer = make_trainer(tiny_model, examples_json, tmp_path)
    trainer.vllm_generation, trainer.backend = Mock(), Engine(trainer, error)
    if error:
        with pytest.raises(Mistake, match=r"differ by 0\.006 in the mean .at most 0\.005 in float32"):
            trainer.check_engine()
    else:
        trainer.check_engine()
    trainer.vllm_generation.sync_weights.assert_called_once()
    assert not any(trainer._metrics.values())


def test_an_engine_that_is_asked_something_else_is_found_out(tiny_model, examples_json, tmp_path):
    """What the engine made of a prompt may be the mistake: the policy scores its own."""
    trainer = make_trainer(tiny_model, examples_json, tmp_path)
    trainer.vllm_generation, trainer.backend = Mock(), Engine(trainer, 0.0)
    trainer.backend.encode = lambda prompt: trainer.backend.own.encode([{"role": "user", "content": "Another one?"}])
    with pytest.raises(Mistake, match=r"^use_vllm: "):
        trainer.check_engine()
