"""On-policy distillation: the term is TRL's DistillationTrainer's, a teacher's scores are plain transformers'."""

import json
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Image as ImageFeature
from datasets import List
from peft import LoraConfig
from trl import DistillationConfig, DistillationTrainer

from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.configs import FreezeArguments, check_settings
from open_r1.models.loading import load_model, load_processor
from open_r1.models.trained import freeze
from open_r1.running.data import load_dataset
from open_r1.tiny import save_tiny_model
from open_r1.trainer.distillation import sampled_kl
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from support import (
    fake_completions,
    launch_env,
    load_weights,
    make_config,
    make_trainer,
    save_teacher,
    vowel_share,
    write_mixed,
)
from test_perception import backward, micro_batches
from test_shared_prefix import ADAPTED, script

FAMILIES = ("qwen2_vl", "internvl")


@pytest.fixture(scope="module")
def teachers(tiny_models, tmp_path_factory):
    """Model type -> folder of a teacher of the tiny model."""
    folder = tmp_path_factory.mktemp("teachers")
    return {name: save_teacher(folder / name, tiny_models[name], name) for name in FAMILIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Examples, every other one without an image."""
    return write_mixed(tmp_path_factory.mktemp("data"), 12)


def make_student(model, teacher, data, output, **changes):
    """A trainer that learns from its teacher alone, on completions of every awkward kind."""
    changes = {"beta": 0.0, "reward_weights": [0.0], "loss_type": "dapo", "optim": "sgd", **changes}
    trainer = make_trainer(model, data, output, teacher_model_name_or_path=str(teacher), **changes)
    return ready(trainer)


def ready(trainer):
    """A trainer in the middle of a step, on known completions."""
    end = trainer.processing_class.tokenizer.eos_token_id
    script(trainer, partial(fake_completions, end=end, longest=trainer.max_completion_length))
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def padded(trainer, inputs):
    """A micro-batch as TRL's trainer takes it: every row with its own copy of prompt and images."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    images = [prompt.image_inputs for prompt in inputs["prompts"]]
    is_image = (ids == trainer.processing_class.image_token_id).long()
    more = trainer.family.plain_inputs(is_image)
    return {**inputs, **trainer.family.join_images(images, ids.device), **more}


# ---- the mathematics


def test_the_estimate_has_the_divergences_value_and_gradient():
    """Over all tokens, each as often as it is sampled, both are those of KL(p || q) by the book."""
    torch.manual_seed(0)
    logits, q = torch.randn(9, requires_grad=True), torch.randn(9).log_softmax(dim=-1)
    p = logits.log_softmax(dim=-1)
    kl = (p.exp() * (p - q)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    estimate = (p.exp().detach() * sampled_kl(p, q)).sum()
    (gradient,) = torch.autograd.grad(estimate, logits)
    assert estimate.item() == pytest.approx(kl.item(), rel=1e-5) and torch.allclose(gradient, expected, atol=1e-6)


# ---- the term


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_teacher_scores_as_plain_transformers_does(model_type, tiny_models, teachers, data, tmp_path):
    """Completion by completion, without a shared prefix, over the tokens that policy and teacher share."""
    trainer = make_student(tiny_models[model_type], teachers[model_type], data, tmp_path, distill_coef=0.7)
    teacher = load_model(teachers[model_type], dtype="float32")
    rows = trainer.model.config.get_text_config().vocab_size
    assert teacher.config.get_text_config().vocab_size == rows + 24
    for inputs in micro_batches(trainer):
        mask = inputs["completion_mask"]
        with torch.no_grad():
            student_logps, teacher_logps = (
                score_plainly(model, trainer, inputs, rows) for model in (trainer.model, teacher)
            )
        total = ((student_logps - teacher_logps) * mask).sum().item()
        loss = trainer.compute_loss(trainer.model, inputs).item()
        assert loss == pytest.approx(0.7 * total / inputs["num_items_in_batch"].item(), rel=1e-4)
        assert trainer._metrics["train"]["distill/kl"][-1] == pytest.approx(total / mask.sum().item(), rel=1e-4)


def score_plainly(model, trainer, inputs, rows):
    """Log-probabilities (B, C) over the first `rows` of the vocabulary, with a copy of the prompt for each row."""
    batch, start = padded(trainer, inputs), inputs["prompt_ids"].shape[1]
    images = {name: batch[name] for name in (*trainer.family.image_inputs, "mm_token_type_ids") if name in batch}
    ids, attention = (
        torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
    )
    logits = model(input_ids=ids, attention_mask=attention, **images).logits[:, start - 1 : -1, :rows]
    return logits.log_softmax(dim=-1).gather(2, inputs["completion_ids"][..., None])[..., 0]


@pytest.mark.parametrize("model_type, lora", [("qwen2_vl", False), ("qwen2_vl", True), ("internvl", False)])
def test_loss_and_gradients_are_those_of_trls_trainer(model_type, lora, tiny_models, data, tmp_path):
    """The whole vocabulary's divergence, with a frozen tower of the policy's, whose features are not the teacher's."""
    teacher = save_teacher(tmp_path / "teacher", tiny_models[model_type], model_type, padding=0)  # TRL has no cut
    processor = load_processor(tiny_models[model_type], chat_template="base", max_pixels=12544)

    def policy():
        model = load_model(tiny_models[model_type], dtype="float32")
        freeze(model, FreezeArguments(freeze_vision=True))
        return model

    adapter = {"peft_config": LoraConfig(target_modules=ADAPTED, init_lora_weights=False) if lora else None}
    dataset = load_dataset(data, processor)
    settings = {"teacher_model_name_or_path": str(teacher), "distill_whole_vocabulary": True, "reward_weights": [0.0]}
    settings |= {"beta": 0.0, "loss_type": "dapo", "temperature": 0.8, "optim": "sgd"}
    args = make_config(tmp_path, **settings)
    ours = ready(Qwen2VLGRPOTrainer(policy(), vowel_share, args, dataset, processing_class=processor, **adapter))
    args = DistillationConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, temperature=0.8, seed=7
    )
    trls = DistillationTrainer(
        policy(),
        load_model(teacher, dtype="float32"),
        args,
        dataset.cast_column("images", List(ImageFeature(mode="RGB"))),
        processing_class=processor,
        **adapter,
    )
    trls.model.load_state_dict(ours.model.state_dict())
    trls.model.train()
    batches = list(micro_batches(ours))
    losses, gradients = backward(ours, batches, lambda inputs: ours.compute_loss(ours.model, inputs))
    theirs, expected = backward(trls, batches, lambda inputs: trls.compute_loss(trls.model, padded(ours, inputs)))
    assert losses == pytest.approx(theirs, abs=1e-5) and min(losses) > 1e-2
    assert gradients.keys() == expected.keys() and len(gradients) > 3
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7 * largest, name


def test_a_policy_comes_closer_to_its_teacher(tiny_model, data, tmp_path):
    """Sampling for itself; of rewards without a weight no spread is logged, whose absence would be warned of."""
    teacher = save_teacher(tmp_path / "teacher", tiny_model, opinion=1)
    changes = {"teacher_model_name_or_path": str(teacher), "reward_weights": [0.0], "beta": 0.0, "max_steps": 5}
    changes |= {"learning_rate": 3e-3, "per_device_train_batch_size": 16, "distill_whole_vocabulary": True}
    trainer = make_trainer(tiny_model, data, tmp_path, **changes)
    before = [parameter.clone() for parameter in trainer.teacher.parameters()]
    trainer.train()
    assert all(map(torch.equal, before, trainer.teacher.parameters()))
    logs = [log for log in trainer.state.log_history if "distill/kl" in log]
    assert logs[-1]["distill/kl"] < 0.5 * logs[0]["distill/kl"]
    assert all(log["reward"] == 0 and log["rewards/vowel_share/mean"] and "reward_std" not in log for log in logs)


def test_an_evaluation_asks_no_teacher(tiny_model, data, tmp_path, monkeypatch):
    teacher = save_teacher(tmp_path / "teacher", tiny_model)
    settings = {"teacher_model_name_or_path": str(teacher), "per_device_eval_batch_size": 16}
    trainer = make_trainer(tiny_model, data, tmp_path, eval_data=data, **settings)
    monkeypatch.setattr(trainer, "_ask_teacher", None)
    assert trainer.evaluate()["eval_reward"] > 0


def test_micro_batches_without_a_token_are_taken(tiny_model, data, tmp_path):
    """All completions cut: nothing to learn from, and every process runs as many forward passes."""
    trainer = make_student(
        *(tiny_model, save_teacher(tmp_path / "teacher", tiny_model), data, tmp_path), distill_whole_vocabulary=True
    )
    for inputs in micro_batches(trainer):
        inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        assert loss.item() == 0


@pytest.mark.distributed
def test_two_zero_3_processes_match_one(tiny_model, data, quick_python, tmp_path):
    """Both models are split; some rows have no image."""
    teacher = save_teacher(tmp_path / "teacher", tiny_model)
    changes = {"teacher_model_name_or_path": str(teacher), "distill_whole_vocabulary": True, "distill_coef": 3.0}
    worker = [str(Path(__file__).with_name("worker_shared_prefix.py")), str(tiny_model), str(data)]
    env = launch_env(tiny_model, data, tmp_path, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    one, two = (
        [*worker, str(tmp_path / name), rows, json.dumps(changes)] for name, rows in (("one", "6"), ("two", "3"))
    )
    subprocess.run([quick_python, *one], env=env, check=True)
    subprocess.run([quick_python, *worker, str(tmp_path / "none"), "6"], env=env, check=True)
    config = REPO_ROOT / "src/open-r1-multimodal/configs/zero3.yaml"
    launch = [quick_python, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--mixed_precision", "no", "--num_processes", "2", "--main_process_port", "0"]
    subprocess.run([*launch, *two], env=env, check=True)
    none, one, two = (load_weights(tmp_path / name) for name in ("none", "one", "two"))
    assert any((one[name] - none[name]).abs().max() > 1e-4 for name in one)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


# ---- what cannot teach


def test_another_family_is_refused(tiny_model, tiny_models, data, tmp_path):
    other = tiny_models["qwen2_5_vl"]
    with pytest.raises(
        Mistake, match=f"teacher_model_name_or_path: {other} is of qwen2_5_vl, and the policy of qwen2_vl"
    ):
        make_student(tiny_model, other, data, tmp_path)


def test_another_vocabulary_is_refused(tiny_model, data, tmp_path):
    other = save_tiny_model(tmp_path / "other", ["the same the same"], vocab_size=260)
    with pytest.raises(Mistake, match=r"teacher_model_name_or_path: the vocabulary of .* is not the policy's"):
        make_student(tiny_model, other, data, tmp_path)


def test_a_teacher_with_fewer_rows_is_refused(tiny_model, data, tmp_path):
    """The policy would write tokens of which the teacher has no opinion."""
    padded_policy = save_teacher(tmp_path / "policy", tiny_model)
    with pytest.raises(Mistake, match=r"\d+ rows\) is not the policy's .*; name a larger model of the same tokenizer"):
        make_student(padded_policy, tiny_model, data, tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher_model_name_or_path": "x", "shared_prefix": False}, "_path: needs the shared prefix"),
        ({"reward_weights": [0.0, 0.0]}, "reward_weights: all are 0, and without a teacher"),
        ({"distill_coef": 0.0}, "distill_coef 0.0: expected a number above 0"),
    ],
)
def test_what_it_does_not_go_with_is_one_line(changes, message, tmp_path):
    args = make_config(tmp_path, **changes)
    with pytest.raises(Mistake, match=message):
        check_settings(args, args.shared_prefix)
