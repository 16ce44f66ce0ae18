"""PAPO's term against a slow implementation of it, and NoisyRollout's halves: who sees what, and what is scored."""

import json
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from open_r1.base.errors import REPO_ROOT
from open_r1.configs import LOSS_TYPES, FreezeArguments, check_settings
from open_r1.engines.backends import Completions
from open_r1.engines.shared_prefix import images_of
from open_r1.models.families.tiled import Tiled
from open_r1.models.loading import load_model
from open_r1.models.trained import freeze
from open_r1.trainer.perception import (
    MOST_KL,
    perception_kl,
    split_halves,
)
from support import (
    fake_completions,
    families,
    launch_env,
    load_weights,
    make_config,
    make_trainer,
    write_examples,
    write_mixed,
)
from test_shared_prefix import script

SHARE = 0.7  # not the default
ROLLOUT = 3  # of the run, where the term is compared with the slow one


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Prepared JSON files by what their rows hold; the mixed one has rows without an image."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "one image": write_examples(folder / "one", 12),
        "two images": write_examples(folder / "two", 12, 2),
        "mixed": write_mixed(folder / "mixed", 12),
        "mixed, two images": write_mixed(folder / "mixed_two", 12, 2),
    }


def no_difference(completions, **kwargs):
    """A reward without an advantage: what is left of the loss is PAPO's term."""
    return [1.0] * len(completions)


def make_papo_trainer(model, data, output, reward=no_difference, freeze_vision=False, **changes):
    """A trainer with PAPO's term, on completions of every awkward kind."""
    changes = {"papo_coef": 0.5, "papo_mask_ratio": SHARE, "beta": 0.0, "optim": "sgd", **changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.load_model", partial(load_seeing, freeze_vision=freeze_vision))
        trainer = make_trainer(model, data, output, reward, **changes)
    end = trainer.processing_class.tokenizer.eos_token_id
    longest = trainer.max_completion_length - 2  # dr_grpo divides by the limit, whether or not one comes to it
    script(trainer, lambda ids: fake_completions(ids, end, longest))
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def load_seeing(path, freeze_vision, **kwargs):
    """A random model to which its image matters, so that rounding is small beside it.

    With a frozen vision tower rollout and policy share its features.
    """
    model = load_model(path, **kwargs)
    freeze(model, FreezeArguments(freeze_vision=freeze_vision))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                parameter *= 5
            if name.endswith("A_log"):  # a gated delta net that forgets no image within a completion
                parameter.fill_(-5)
            if name.endswith("model.norm.weight"):  # the last one: larger logits
                parameter += 2
    return model


def micro_batches(trainer, rollout=0):
    """The inputs of every micro-batch of one rollout, before which there were as many as its number."""
    rows, steps = next(iter(trainer.get_train_dataloader())), trainer.args.steps_per_generation
    for step in range(steps):
        trainer._step = rollout * steps + step
        yield trainer._prepare_inputs(rows)


# ---- the mathematics


def test_the_estimate_is_the_divergence():
    """Weighted by how often each token is sampled, the estimates are KL(p || p_masked), by the book."""
    torch.manual_seed(0)
    p, masked = torch.randn(2, 9).log_softmax(dim=-1)
    expected = (p.exp() * (p - masked)).sum()
    assert (p.exp() * perception_kl(p, masked)).sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_token_that_the_masked_policy_rules_out_has_a_finite_gradient():
    logps = torch.tensor([[-300.0, -1.0, -1.0]], requires_grad=True)
    kl = perception_kl(logps, torch.tensor([[-1.0, -300.0, -2.0]]))
    kl.sum().backward()
    assert kl[0, :2].tolist() == [MOST_KL] * 2 and logps.grad[0, :2].tolist() == [0, 0]
    assert logps.grad[0, 2].item() == pytest.approx(1 - np.exp(-1), rel=1e-5)


# ---- the term in the loss


def mask_slowly(clean, black, rng):
    """Tiles whose squares, each a token, are those of a black tile with probability SHARE."""
    tiles, size = clean.clone().view(-1, *clean.shape[-3:]), clean.shape[-1] // 2  # a tiny tile has 2 x 2 tokens
    drawn = rng.random((len(tiles), 2, 2)) < SHARE
    for tile, row, column in zip(*drawn.nonzero(), strict=True):
        rows, columns = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
        tiles[tile, :, rows, columns] = black[:, rows, columns]
    return tiles.view(clean.shape)


def slow_term(trainer, inputs):
    """PAPO's term of a micro-batch by the book: each completion behind its own prompt in stock forward passes.

    The mask is drawn and the black patch made here once more, without the trainer's help. Beside the term there is the
    mean divergence of the tokens behind images, which is logged.
    """
    model, processor = trainer.model, trainer.processing_class
    total, divergences = torch.zeros((), requires_grad=True), []
    for prompt, ids, mask in zip(inputs["prompts"], inputs["completion_ids"], inputs["completion_mask"], strict=True):
        completion = ids[: mask.sum()]
        if not (prompt.image_inputs and len(completion)):
            continue
        black = processor.image_processor(images=[Image.new("RGB", (56, 56), "black")], return_tensors="pt")
        clean = prompt.image_inputs["pixel_values"]
        rng = np.random.default_rng((7, ROLLOUT, trainer.groups[prompt]))  # the seed, the rollout, its group
        if isinstance(trainer.family, Tiled):
            masked_pixels = mask_slowly(clean, black["pixel_values"].flatten(0, -4)[0], rng)
        else:
            masked_pixels = clean.clone()
            masked_pixels[torch.from_numpy(rng.random(len(clean)) < SHARE)] = black["pixel_values"][0]
        row = torch.cat([prompt.input_ids, completion])[None]
        grid = {}
        if "image_grid_thw" in prompt.image_inputs:
            types = (row == processor.image_token_id).long()
            grid = {"image_grid_thw": prompt.image_inputs["image_grid_thw"], "mm_token_type_ids": types}
        scores = []
        for pixels in (clean, masked_pixels):
            logits = model(input_ids=row, attention_mask=torch.ones_like(row), pixel_values=pixels, **grid).logits[
                0, len(prompt) - 1 : -1
            ]
            scores.append(logits.log_softmax(dim=-1).gather(1, completion[:, None])[:, 0])
        logps, masked = scores[0].double(), scores[1].double().detach()
        divergences.append((masked - logps).exp() - (masked - logps) - 1)
        total = total + divergences[-1].mean()
    return total / len(inputs["prompts"]), torch.cat(divergences).mean().item()


@pytest.mark.parametrize(
    "rows, frozen",
    [pytest.param("two images", False, marks=pytest.mark.slow), ("mixed", False), ("mixed", True)],
)
@pytest.mark.parametrize("model_type", families("qwen2_vl", "qwen3_5", "smolvlm", "internvl"))
def test_term_and_gradient_are_those_of_the_slow_one(model_type, rows, frozen, tiny_models, datasets, tmp_path):
    """Several prompts a micro-batch, with completions of any length, of a rollout that is not the first.

    Behind a frozen tower the prompts come with its features, of which a masked image must not take any.
    """
    trainer = make_papo_trainer(
        tiny_models[model_type],
        datasets[rows],
        tmp_path,
        freeze_vision=frozen,
        loss_type="grpo",
        per_device_train_batch_size=16,
    )
    group_order(trainer)
    batches = list(micro_batches(trainer, ROLLOUT))
    prompts = [prompt for inputs in batches for prompt in inputs["prompts"] if prompt.image_inputs]
    assert all((prompt.image_features is not None) == frozen for prompt in prompts)
    losses, gradients = backward(trainer, batches, lambda inputs: trainer.compute_loss(trainer.model, inputs))
    weight = -trainer.papo_coef / trainer.current_gradient_accumulation_steps
    divergences = []

    def slow_loss(inputs):
        term, divergence = slow_term(trainer, inputs)
        divergences.append(divergence)
        return weight * term

    slow_losses, expected = backward(trainer, batches, slow_loss)
    assert losses == pytest.approx(slow_losses, rel=1e-4, abs=2e-9) and min(losses) < -1e-6
    assert set(expected) == set(gradients)
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest, name
    # text alone has no divergence, and no part in its mean
    assert trainer._metrics["train"]["papo/kl"] == pytest.approx(divergences, rel=1e-3)


def backward(trainer, batches, loss_of):
    """The losses of micro-batches, and all gradients that they leave together."""
    trainer.model.zero_grad()
    losses = [loss_of(inputs) for inputs in batches]
    sum(losses).backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return [loss.item() for loss in losses], gradients


def group_order(trainer):
    """Remember the number of each prompt's group, before the groups are shuffled."""
    original = trainer._generate_and_score_completions
    trainer.groups = {}

    def remember(rows):
        output = original(rows)
        for row, prompt in enumerate(output["prompts"]):
            trainer.groups.setdefault(prompt, row // trainer.num_generations)
        return output

    trainer._generate_and_score_completions = remember


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_mean_is_that_of_the_loss_type(loss_type, tiny_model, datasets, tmp_path):
    """TRL's KL of a reference that is the masked policy, weighed alike, is the same term: they cancel."""
    trainer = make_papo_trainer(
        tiny_model, datasets["one image"], tmp_path, loss_type=loss_type, beta=0.5, steps_per_generation=4
    )
    for inputs in micro_batches(trainer):
        inputs["masked_logps"] = inputs["masked_logps"] - torch.rand(inputs["masked_logps"].shape)
        inputs["ref_per_token_logps"] = inputs["masked_logps"]
        without = {name: value for name, value in inputs.items() if name != "masked_logps"}
        alone = trainer.compute_loss(trainer.model, without).item()
        assert alone > 1e-3
        assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(0, abs=1e-5 * alone)


def test_an_evaluation_has_no_term(tiny_model, datasets, tmp_path):
    """Its loss is that of the rewards, which here make no difference."""
    data = datasets["one image"]
    trainer = make_papo_trainer(tiny_model, data, tmp_path, eval_data=data, per_device_eval_batch_size=16)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0, abs=1e-9)
    assert "papo/kl" not in trainer._metrics["train"]


def test_a_rollout_costs_one_more_pass_a_micro_batch(tiny_model, datasets, tmp_path):
    """Whatever its prompts hold: under ZeRO-3 all processes must run as many."""
    trainer = make_papo_trainer(tiny_model, datasets["mixed"], tmp_path, papo_coef=0.1, max_steps=1)
    calls = []
    trainer.model.register_forward_hook(lambda *args: calls.append(1))
    trainer.train()
    assert len(calls) == 4  # two micro-batches, with and without masks
    log = next(event for event in trainer.state.log_history if "step_time" in event)
    parts = [log[f"time/{part}"] for part in ("rollout", "scoring", "update")]  # scoring of policy and reference, both
    assert sum(parts) == pytest.approx(log["step_time"], rel=1e-6)


# ---- noise in the rollout


def test_halves_of_groups_wherever_a_process_begins():
    assert split_halves(0, 8, 8) == [(False, 4), (True, 4)]
    assert split_halves(8, 4, 8) == [(False, 4)]
    assert split_halves(12, 4, 8) == [(False, 0), (True, 4)]  # the clean prompt is scored all the same
    assert split_halves(0, 10, 5) == [(False, 3), (True, 2), (False, 3), (True, 2)]
    assert split_halves(2, 3, 8) == [(False, 2), (True, 1)]


class Watching:
    """A backend that keeps what it was asked, and answers as the one it replaces."""

    def __init__(self, backend):
        self.inner, self.asked, self.pictures = backend, [], {}

    def encode(self, conversation):
        prompt = self.inner.encode(conversation)
        self.pictures[prompt] = images_of(conversation)
        return prompt

    def generate(self, prompts, repeats, settings) -> Completions:
        self.asked.append(list(zip(prompts, repeats, strict=True)))
        return self.inner.generate(prompts, repeats, settings)


def noised_slowly(pictures, step, group):
    """The images of a prompt as NoisyRollout's schedule and formula have them at a step of three."""
    strength = round(500 / (1 + np.exp(30 * (step / 3 - 2 / 3))))
    betas = 1e-5 + (0.5e-2 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, 1000)))
    kept = np.prod(1 - betas[: strength + 1])
    rng = np.random.default_rng((7, step, group))  # the seed, the rollout, its group: a resumed run draws the same
    noisy = []
    for picture in pictures:
        pixels = np.asarray(picture) / 255
        noisy.append(kept**0.5 * pixels + (1 - kept) ** 0.5 * rng.standard_normal(pixels.shape, dtype=np.float32))
    return [(pixels.clip(0, 1) * 255).round() for pixels in noisy]


def test_half_of_a_group_is_sampled_from_noise_and_all_of_it_scored_clean(tiny_model, datasets, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 16, "max_steps": 3}
    settings |= {"per_device_train_batch_size": 8, "rollout_noise": 500, "max_completion_length": 4}
    data = datasets["mixed, two images"]
    trainer = make_trainer(tiny_model, data, tmp_path, eval_data=data, **settings)
    backend = trainer.backend = Watching(trainer.backend)
    scored, sample = [], trainer._generate_and_score_completions

    def spy(rows):
        batch = sample(rows)
        scored.append((trainer.model.training, trainer.state.global_step, batch["prompts"]))
        return batch

    trainer._generate_and_score_completions = spy
    trainer.train()
    noisy_groups = set()
    for (training, step, prompts), asked in zip(scored, backend.asked, strict=True):
        # one object a group, so that it is packed once
        assert all(len({id(prompt) for prompt in prompts[i : i + 4]}) == 1 for i in range(0, len(prompts), 4))
        if not training:
            assert {id(prompt) for prompt, _ in asked} == {id(prompt) for prompt in prompts}
            continue
        row = 0
        for prompt, count in asked:
            group = prompts[row]
            assert torch.equal(prompt.input_ids, group.input_ids)
            if row % 4 == 2:
                assert count == 2
                expected = noised_slowly(backend.pictures[group], step, row // 4)
                for picture, pixels in zip(backend.pictures[prompt], expected, strict=True):
                    assert np.abs(np.asarray(picture, dtype=float) - pixels).max() <= 1  # rounding
                noisy_groups.add((step, row // 4))
            else:
                assert count == (2 if group.image_inputs else 4)
                assert backend.pictures[prompt] == backend.pictures[group]
            row += count
        assert row == len(prompts)
    assert {step for step, _ in noisy_groups} == {0, 1, 2} and len({group for _, group in noisy_groups}) > 1


@pytest.mark.distributed
def test_two_zero_processes_match_one(tiny_model, datasets, quick_python, tmp_path):
    """Three groups of four over two ranks, some without an image: the second begins with the noisy half of a group."""
    data, changes = datasets["mixed"], json.dumps({"papo_coef": 100, "rollout_noise": 500})
    worker = [str(Path(__file__).with_name("worker_shared_prefix.py")), str(tiny_model), str(data)]
    env = launch_env(tiny_model, data, tmp_path, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    subprocess.run([quick_python, *worker, str(tmp_path / "one"), "6", changes], env=env, check=True)
    subprocess.run([quick_python, *worker, str(tmp_path / "none"), "6"], env=env, check=True)
    config = REPO_ROOT / "src/open-r1-multimodal/configs/zero3.yaml"
    launch = [quick_python, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--mixed_precision", "no", "--num_processes", "2", "--main_process_port", "0"]
    subprocess.run([*launch, *worker, str(tmp_path / "two"), "3", changes], env=env, check=True)
    none, one, two = (load_weights(tmp_path / name) for name in ("none", "one", "two"))
    assert any((one[name] - none[name]).abs().max() > 1e-4 for name in one)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


# ---- settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"papo_coef": 0.5, "shared_prefix": False}, "papo_coef: needs the shared prefix"),
        ({"rollout_noise": 500, "shared_prefix": False}, "rollout_noise: needs the shared prefix"),
        ({"rollout_noise": 500, "vllm_mode": "server"}, "--vllm_mode colocate"),
        ({"rollout_noise": 500, "vllm_mode": "colocate"}, "--vllm_importance_sampling_correction false"),
    ],
)
def test_what_they_do_not_go_with_is_one_line(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr("open_r1.configs.need_vllm", lambda option: None)
    args = make_config(tmp_path, use_vllm="vllm_mode" in changes, **changes)
    with pytest.raises(ValueError, match=message):
        check_settings(args, args.shared_prefix)
