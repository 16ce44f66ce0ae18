"""An engine that does not sample from the policy is stopped before the first step; test_vllm.py has the real one."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from transformers import BitsAndBytesConfig, PreTrainedModel

from open_r1.base.errors import Mistake
from open_r1.engines import agreement
from open_r1.engines.agreement import InFloat32, check_agreement, difference
from open_r1.engines.shared_prefix import images_of
from open_r1.engines.vllm_backends import whole_weight
from open_r1.models.loading import load_model, load_processor
from open_r1.running.data import load_dataset
from open_r1.sft import AnswerCollator
from open_r1.tiny import make_config, make_model, make_processor, make_tokenizer
from open_r1.trainer import callbacks
from open_r1.trainer.callbacks import check_engine
from open_r1.trainer.rows import put_images
from support import make_trainer


def test_the_difference_is_that_of_known_tokens():
    scored = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]])
    total, count = difference([[-1.5, None], [-2.0]], scored).tolist()
    assert (total, count) == (1.5, 2)
    assert difference([[0.0, None]], scored[:1]).tolist() == [1, 1]  # of a token that was certain
    assert difference([], torch.zeros(0, 3)).tolist() == [0, 0]


@pytest.mark.parametrize(
    "mean, rounding, stops",
    [
        (0.005, 0.0, False),
        (0.0051, 0.0, True),
        (0.045, 0.03, False),
        (0.046, 0.03, True),
        (math.nan, 0.03, True),
    ],
)
def test_rounding_is_no_difference(mean, rounding, stops):
    if not stops:
        return check_agreement(mean, rounding, "bfloat16")
    with pytest.raises(
        Mistake, match=r"(?s)^use_vllm: .*chat template.*max_pixels.*expanded twice.*checkpoint"
    ) as told:
        check_agreement(mean, rounding, "bfloat16")
    assert f"differ by {mean:.3f} in the mean" in str(told.value)
    assert f"the policy's own in bfloat16 differ by {rounding:.3f})" in str(told.value)


@pytest.mark.parametrize(
    "model_type, autocast", [*((name, False) for name in ("qwen2_vl", "qwen3_5", "smolvlm")), ("qwen2_vl", True)]
)
def test_what_is_computed_in_float32_is_what_a_copy_would_give(tiny_models, examples_json, model_type, autocast):
    """Bit for bit, and the model keeps its weights of 16 bits; a policy under autocast, too."""
    model = load_model(tiny_models[model_type], dtype="float32" if autocast else "bfloat16")
    rows = load_dataset(examples_json, processor := load_processor(tiny_models[model_type]))
    inputs = AnswerCollator(processor=processor)([rows[0], rows[1]])
    inputs = {name: each.bfloat16() if each.is_floating_point() else each for name, each in inputs.items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded = model(**inputs).logits
        with InFloat32(torch.device("cpu")):
            wide = model(**inputs).logits
    dtypes = {parameter.dtype for parameter in model.parameters()}
    assert torch.float32 in dtypes if autocast else dtypes == {torch.bfloat16}
    inputs = {name: each.float() if each.is_floating_point() else each for name, each in inputs.items()}
    with torch.no_grad():
        exact = model.float()(**inputs).logits
    assert wide.dtype == torch.float32 and torch.equal(wide, exact)
    assert not torch.equal(rounded.float(), exact)


def test_what_is_computed_in_float32_has_unpacked_weights_of_4_bits(tiny_model):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = load_model(tiny_model, dtype="bfloat16", quantization_config=settings)
    model.train()  # else bitsandbytes packs them anew for a CPU, whose kernel has 16 bits alone
    copy = load_model(tiny_model, dtype="bfloat16")
    with InFloat32(torch.device("cpu")):
        weights = {name: whole_weight(weight).float() for name, weight in model.named_parameters()}
    for name, weight in weights.items():
        copy.get_parameter(name).data = weight
    packed = model.model.language_model.layers[0].mlp.up_proj.weight.clone()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        with InFloat32(torch.device("cpu")):
            wide = model(input_ids=ids).logits
        assert torch.allclose(wide, copy(input_ids=ids).logits, atol=1e-6)
        assert (model(input_ids=ids).logits.float() - wide).abs().max() > 1e-4
    assert torch.equal(packed, model.model.language_model.layers[0].mlp.up_proj.weight)


def test_flash_attention_keeps_its_16_bits():
    """Its kernels take nothing else, and what follows is computed in float32 again."""
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.define("of_a_test(Tensor x) -> Tensor")
        library.impl("of_a_test", lambda x: x * 2 if x.dtype == torch.bfloat16 else torch.empty(0), "CPU")
        with InFloat32(torch.device("cpu")):
            x = torch.ops.flash_attn.of_a_test(torch.ones(3))
            assert (x.dtype, (x + x).dtype, (x + x).tolist()) == (torch.bfloat16, torch.float32, [4, 4, 4])


class Engine:
    """Samples as the trainer's own backend does, and says what a model gives each token, or a little else."""

    def __init__(self, trainer, error: float = 0.0, model: PreTrainedModel | None = None):
        self.trainer, self.own, self.error = trainer, trainer.backend, error
        self.model = model or trainer.model

    def encode(self, prompt):
        return self.own.encode(prompt)

    def generate(self, prompts, repeats, settings):
        settings.update(do_sample=True, **self.trainer.args.generation_kwargs)  # as an engine samples
        answer = self.own.generate(prompts, repeats, settings)
        rows = [prompt for prompt, count in zip(answer.prompts, repeats, strict=True) for _ in range(count)]
        logprobs = []
        for prompt, ids in zip(rows, answer.ids, strict=True):
            inputs = torch.cat([prompt.input_ids, torch.tensor(ids)])[None]
            kinds = (inputs == self.trainer.processing_class.image_token_id).int()
            logits = self.model(input_ids=inputs, mm_token_type_ids=kinds, **prompt.image_inputs).logits
            scores = logits[0, len(prompt) - 1 : -1].float()
            logprobs.append((scores.log_softmax(dim=-1)[range(len(ids)), ids] + self.error).tolist())
        return replace(answer, logprobs=logprobs)


@pytest.mark.parametrize("error", [0.0, 0.006])
def test_a_policy_is_compared_and_nothing_stays(tiny_model, examples_json, tmp_path, error):
    trainer = make_trainer(tiny_model, examples_json, tmp_path)
    trainer.vllm_generation, trainer.backend = Mock(generation_kwargs={}), Engine(trainer, error)
    if error:
        with pytest.raises(Mistake, match=r"differ by 0\.006 in the mean .* .at most 0\.005; the policy"):
            check_engine(trainer)
    else:
        check_engine(trainer)
    trainer.vllm_generation.sync_weights.assert_called_once()
    assert not any(trainer._metrics.values())


def test_what_a_recipe_cuts_off_is_no_difference(tiny_model, examples_json, tmp_path):
    """The engine's log-probabilities are of the tokens that are left: it is asked without; then all is as it was."""
    trainer = make_trainer(tiny_model, examples_json, tmp_path)
    ends = {"stop_token_ids": [1]}
    asked = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "structured_outputs_regex": "a+"}
    asked["generation_kwargs"] = {**ends, "presence_penalty": 1.0}
    trainer.vllm_generation, trainer.backend = SimpleNamespace(**asked, sync_weights=Mock()), Engine(trainer)
    seen, generate = {}, trainer.backend.generate
    trainer.backend.generate = lambda *given: seen.update(vars(trainer.vllm_generation)) or generate(*given)
    check_engine(trainer)
    plain = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "structured_outputs_regex": None}
    assert {name: seen[name] for name in asked} == {**plain, "generation_kwargs": ends}
    assert {name: vars(trainer.vllm_generation)[name] for name in asked} == asked


def test_dropout_is_no_difference(tiny_model, examples_json, tmp_path, monkeypatch):
    """An adapter's is on in a model that was never told to evaluate."""
    trainer = make_trainer(tiny_model, examples_json, tmp_path)
    trainer.vllm_generation, trainer.backend = Mock(generation_kwargs={}), Engine(trainer)
    trainer.model.train()
    modes, score = [], callbacks.score_completions
    spy = lambda model, *args: modes.append(model.training) or score(model, *args)  # noqa: E731
    monkeypatch.setattr(callbacks, "score_completions", spy)
    check_engine(trainer)
    assert modes == [False] and trainer.model.training


def test_an_engine_that_is_asked_something_else_is_found_out(tiny_model, examples_json, tmp_path):
    """What the engine made of a prompt may be the mistake: the policy scores its own."""
    trainer = make_trainer(tiny_model, examples_json, tmp_path)
    trainer.vllm_generation, trainer.backend = Mock(generation_kwargs={}), Engine(trainer)
    trainer.backend.encode = lambda prompt: trainer.backend.own.encode([{"role": "user", "content": "Another one?"}])
    with pytest.raises(Mistake, match=r"^use_vllm: "):
        check_engine(trainer)


@pytest.fixture(scope="module")
def uncertain(tmp_path_factory) -> Path:
    """A checkpoint that rounds as a trained one does: many layers, large weights, and several nats of entropy."""
    folder = tmp_path_factory.mktemp("uncertain")
    tokenizer = make_tokenizer((), 300)
    config = make_config(tokenizer, num_layers=8)
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.3
    model = make_model(config)
    with torch.no_grad():
        model.model.language_model.norm.weight *= 0.4
    model.bfloat16().save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
    return folder


def other_weights(engine: Engine) -> None:
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter *= 1 + 0.1 * torch.randn_like(parameter)


def other_pixels(engine: Engine) -> None:
    def encode(prompt):
        picture = Image.linear_gradient("L").convert("RGB")
        return engine.own.encode(put_images(prompt, [picture.resize(image.size) for image in images_of(prompt)]))

    engine.encode = encode


def other_question(engine: Engine) -> None:
    engine.encode = lambda prompt: engine.own.encode([{"role": "user", "content": "Another one?"}])


@pytest.mark.parametrize(
    "engine_dtype, fault",
    [
        ("bfloat16", None),
        ("float32", None),
        *(("bfloat16", fault) for fault in (other_weights, other_pixels, other_question)),
    ],
)
def test_a_right_engine_may_round_as_the_policy_does(
    uncertain, examples_json, tmp_path, monkeypatch, engine_dtype, fault
):
    """Much, or otherwise than it, or not at all; what is wrong with one still shows."""
    seen = []
    check = agreement.check_agreement
    monkeypatch.setattr(agreement, "check_agreement", lambda *found: seen.append(found) or check(*found))
    trainer = make_trainer(uncertain, examples_json, tmp_path, bf16=True)
    for parameter in trainer.model.parameters():  # not the positions' frequencies, which stay in float32
        parameter.data = parameter.data.bfloat16()
    engine = Engine(trainer, model=load_model(uncertain, dtype=engine_dtype))
    trainer.vllm_generation, trainer.backend = Mock(generation_kwargs={}), engine
    weights = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    if fault is None:
        check_engine(trainer)
    else:
        fault(engine)
        with pytest.raises(Mistake, match=r"^use_vllm: the engine samples from something else .* in bfloat16 differ"):
            check_engine(trainer)
    ((mean, rounding, dtype),) = seen
    assert dtype == "bfloat16" and rounding > 0.05  # by so much a right engine in float32 differs from the policy
    if fault is None:
        assert mean / rounding == pytest.approx(float(engine_dtype == "bfloat16"), abs=0.1)
    assert all(torch.equal(weights[name], weight) for name, weight in trainer.model.named_parameters())
