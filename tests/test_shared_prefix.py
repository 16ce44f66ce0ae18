"""The shared prefix against stock TRL: same log-probabilities, same gradients, same training, less work."""

import subprocess
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from datasets import Image as ImageFeature
from datasets import List
from peft import LoraConfig
from trl import GRPOTrainer

from open_r1.base.errors import REPO_ROOT
from open_r1.configs import FreezeArguments
from open_r1.engines.attention import attend_groups, attend_paths
from open_r1.engines.shared_prefix import Prompt, pack
from open_r1.engines.vllm_backends import collapse_image_tokens
from open_r1.models.families import FAMILIES
from open_r1.models.loading import load_model, load_processor
from open_r1.models.trained import freeze
from open_r1.running.data import load_dataset
from open_r1.trainer.sampling import shuffle_groups
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer, Scored
from support import (
    Scripted,
    fake_completions,
    families,
    launch_env,
    load_weights,
    make_config,
    slow_varlen,
    vowel_share,
    write_examples,
    write_mixed,
)

ADAPTED = ["q_proj", "v_proj", "in_proj_qkv", "in_proj_a"]  # the last two of a gated delta net


@pytest.fixture(scope="module")
def datasets_by_images(tmp_path_factory):
    """Number of images an example -> prepared JSON file."""
    folder = tmp_path_factory.mktemp("data")
    return {count: write_examples(folder / str(count), 12, count) for count in (1, 2)}


def make_trainers(model_path, data, output, *, freeze_vision=False, lora=False, **changes):
    """Stock TRL and ours on the same weights, data and completions, without shuffling across micro-batches."""
    trainers = []
    for trainer_class in (GRPOTrainer, Qwen2VLGRPOTrainer):
        processor = load_processor(model_path, chat_template="base", max_pixels=12544)
        dataset = load_dataset(data, processor)
        if trainer_class is GRPOTrainer:
            dataset = dataset.cast_column("images", List(ImageFeature(mode="RGB")))  # paths -> decoded images
        model = load_model(model_path, dtype="float32")
        freeze(model, FreezeArguments(freeze_vision=freeze_vision))
        trainer = trainer_class(
            model=model,
            reward_funcs=vowel_share,
            args=make_config(output, **{"optim": "sgd", **changes}),
            train_dataset=dataset,
            processing_class=processor,
            peft_config=LoraConfig(target_modules=ADAPTED, init_lora_weights=False) if lora else None,
        )
        end = processor.tokenizer.eos_token_id
        script(trainer, partial(fake_completions, end=end, longest=trainer.max_completion_length))
        trainers.append(trainer)
    return trainers


def script(trainer, complete):
    """Let a trainer learn from these completions in place of sampled ones, on either path."""
    if hasattr(trainer, "backend"):
        trainer.backend = Scripted(trainer.backend, complete)
    else:
        trainer._generate_single_turn = lambda ids, *args: (complete(ids), None)


@pytest.fixture
def trainers(tiny_models, datasets_by_images, tmp_path, monkeypatch):
    """Makes stock TRL's trainer and ours; both keep the given order, by which completions share an optimiser step."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("open_r1.trainer.trainer.shuffle_groups", lambda batch: batch)

    def make(model_type="qwen2_vl", images=1, **changes):
        return make_trainers(tiny_models[model_type], datasets_by_images[images], tmp_path, **changes)

    return make


def rollout_and_gradients(trainer):
    """One generation batch through the trainer: rollout tensors, the log-probabilities, all gradients."""
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    scored = []
    original = trainer._get_per_token_logps_and_entropies

    def spy(*args, **kwargs):
        scored.append(original(*args, **kwargs))
        return scored[-1]

    trainer._get_per_token_logps_and_entropies = spy
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    losses = []
    for step in range(trainer.args.steps_per_generation):
        trainer._step = step
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(rows))
        loss.backward()
        losses.append(loss.item())
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return losses, [values for scores in scored for values in scores[:2] if values is not None], gradients


def assert_same_scores_and_gradients(stock, ours):
    stock_losses, stock_scores, stock_gradients = rollout_and_gradients(stock)
    losses, scores, gradients = rollout_and_gradients(ours)
    assert losses == pytest.approx(stock_losses, abs=1e-5)
    assert len(scores) == len(stock_scores)
    for mine, theirs in zip(scores, stock_scores, strict=True):
        assert mine.shape == theirs.shape and (mine - theirs).abs().max() < 1e-5
    assert set(gradients) == set(stock_gradients) and len(gradients) > 3
    largest = max(gradient.norm() for gradient in stock_gradients.values())
    for name, gradient in stock_gradients.items():
        # rounding noise aside: the bias of keys, for one, has no gradient but noise
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7 * largest, name
    return scores


@pytest.mark.parametrize("model_type", families("qwen2_vl", "qwen3_5", "smolvlm", "internvl"))
def test_scores_and_gradients_of_every_family(model_type, trainers):
    assert_same_scores_and_gradients(*trainers(model_type, images=2, per_device_train_batch_size=8))


@pytest.mark.parametrize("model_type, checkpointing", [("qwen2_vl", True), ("qwen3_5", False)])
def test_scores_and_gradients_over_paths(model_type, checkpointing, trainers, monkeypatch):
    """The way of a GPU, with a slow kernel in place of its own."""
    monkeypatch.setattr(
        "open_r1.engines.attention.choose_attention", lambda query: partial(attend_paths, varlen=slow_varlen)
    )
    settings = {"per_device_train_batch_size": 16, "gradient_checkpointing": checkpointing}
    assert_same_scores_and_gradients(*trainers(model_type, **settings))


def test_scores_under_autocast(trainers, monkeypatch):
    """Float32 weights, computation in bfloat16: as far from TRL's as TRL's are from its own in float32, or less."""
    exact, *_ = trainers()
    stock, ours = trainers(bf16=True)
    for attend in (attend_groups, partial(attend_paths, varlen=slow_varlen)):
        monkeypatch.setattr("open_r1.engines.attention.choose_attention", Mock(return_value=attend))
        for right, theirs, mine in zip(*(rollout_and_gradients(t)[1] for t in (exact, stock, ours)), strict=True):
            rounding = (theirs.float() - right).abs().mean()
            assert 0 < rounding < 0.05 and (mine.float() - theirs.float()).abs().mean() <= rounding


CASES = {
    "one prompt a micro-batch": {},
    "several prompts a micro-batch": {"per_device_train_batch_size": 16},
    "groups cut by micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "groups of six in micro-batches of four": {"num_generations": 6, "gradient_accumulation_steps": 3},
    "no reference model": {"beta": 0.0},
    "old log-probabilities": {"steps_per_generation": 4},
    "two iterations": {"num_iterations": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"lora": True},
    "frozen vision tower": {"freeze_vision": True},
    "truncated completions masked": {"mask_truncated_completions": True},
    "high-entropy tokens only": {"top_entropy_quantile": 0.5},
    "entropy bonus": {"entropy_coef": 0.1},
    "sequence-level ratios": {"importance_sampling_level": "sequence"},
    "temperature": {"temperature": 0.7},
    **{f"loss {name}": {"loss_type": name} for name in ("bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")},
}


# The quick suite takes the cases that differ most; TRL itself computes what is made of log-probabilities.
QUICK = ("one prompt a micro-batch", "groups of six in micro-batches of four", "two iterations", "LoRA")
MARKED = [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", MARKED)
def test_scores_and_gradients_of_every_option(case, trainers):
    assert_same_scores_and_gradients(*trainers(**CASES[case]))


@pytest.mark.parametrize("case", ["several prompts a micro-batch", "groups cut by micro-batches", "LoRA"])
def test_scores_and_gradients_through_a_recurrent_state(case, trainers):
    """Where groups begin and end, and what trains, matter there in other ways than to attention."""
    settings = {**CASES[case], "mask_truncated_completions": True}  # some completions are empty
    settings["gradient_checkpointing"] = case == "LoRA"
    assert_same_scores_and_gradients(*trainers("qwen3_5", **settings))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"num_iterations": 2, "steps_per_generation": 4}, id="rollouts serve several steps"),
        pytest.param({"lora": True, "gradient_checkpointing": True}, id="LoRA, checkpointing", marks=pytest.mark.slow),
    ],
)
def test_five_steps_end_in_the_same_weights(changes, trainers):
    both = trainers(max_steps=5, learning_rate=0.1, num_train_epochs=9, **changes)
    before = {name: p.detach().clone() for name, p in both[0].model.named_parameters()}
    for trainer in both:
        trainer.train()
    stock, ours = (dict(trainer.model.named_parameters()) for trainer in both)
    assert any((stock[name] - before[name]).abs().max() > 1e-4 for name in before)
    assert all(torch.allclose(stock[name], ours[name], atol=1e-5) for name in before)


def test_a_frozen_tower_encodes_each_image_once_a_step(trainers):
    """Rollout, reference and policy share its features; the step is the one that encodes again."""
    norms = []
    for shared in (True, False):
        _, trainer = trainers(images=2, freeze_vision=True, max_steps=2, max_completion_length=64)
        trainer.backend = trainer.make_backend(keep_features=shared)  # really generate
        calls = []
        for model in (trainer.model, trainer.ref_model):
            tower = trainer.family.vision_tower(model)
            tower.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        torch.manual_seed(0)
        trainer.train()
        norms.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log])
        # two steps of two prompts: once each; or once in the rollout, and a micro-batch in reference and policy
        assert len(calls) == (4 if shared else 2 * (1 + 2 + 2))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and all(norms[0])


def test_the_tokens_saved_are_those_of_repeated_prompts_and_padding(trainers):
    """Two prompts of 5 and 3 tokens, with completions of 1 and 4, and of 2, where TRL has three rows of 5 + 4."""
    _, trainer = trainers()
    long, short = make_prompt(5), make_prompt(3)
    completion_mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    mask = torch.cat([torch.tensor([[1] * 5, [1] * 5, [0, 0, 1, 1, 1]]), completion_mask], dim=1)
    scored = Scored([long, long, short])
    trainer._get_per_token_logps_and_entropies(trainer.model, torch.full_like(mask, 65), mask, 4, pixel_values=scored)
    # all but a prompt's last token once, and a place to predict each completion token from
    packed = (4 + 1 + 4) + (2 + 2)
    assert trainer._metrics[trainer._mode()]["packing/tokens_saved"] == [pytest.approx(1 - packed / (3 * 9))]


def test_the_switch_off_is_trls_path(trainers, tiny_model, tmp_path):
    """`shared_prefix: false` in our trainer equals stock TRL bit for bit."""
    stock, ours = trainers()
    off = Qwen2VLGRPOTrainer(
        model=load_model(tiny_model, dtype="float32"),
        reward_funcs=vowel_share,
        args=make_config(tmp_path, optim="sgd", shared_prefix=False),
        train_dataset=ours.train_dataset,
        processing_class=ours.processing_class,
    )
    script(off, ours.backend.complete)
    assert not off.shared_prefix and ours.shared_prefix
    stock_losses, stock_scores, _ = rollout_and_gradients(stock)
    losses, scores, _ = rollout_and_gradients(off)
    assert losses == stock_losses
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(scores, stock_scores, strict=True))


# ---- packing, without a model


def make_prompt(length: int, first: int = 0) -> Prompt:
    return Prompt(torch.arange(first, first + length), torch.arange(length).expand(3, length))


def test_a_packed_row_holds_each_prompt_once():
    red, blue = make_prompt(3, first=100), make_prompt(2, first=200)
    ids = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0], [7, 8, 9], [0, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]])
    batch = pack(FAMILIES["qwen2_vl"], [red, red, blue, blue, blue], ids, mask)
    # prompt minus its last token | last prompt token, completion minus its last
    assert batch.model_inputs["input_ids"].tolist() == [[100, 101, 102, 1, 2, 102, 200, 201, 5, 201, 7, 8]]
    assert batch.model_inputs["scored"].tolist() == [2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert batch.labels.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.model_inputs["position_ids"][0].tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2, 1, 2, 3]]
    assert torch.equal(batch.unpack(batch.labels.float()), ids.float() * mask)
    first, second = batch.model_inputs["layout"].groups
    assert (first.start, first.prefix, first.length) == (0, 2, 6)
    assert (second.start, second.prefix, second.length) == (6, 1, 6)
    # a token of a branch sees the prefix and what came before it in its branch
    assert first.mask.tolist() == [
        [True, True, True, False, False],
        [True, True, True, True, False],
        [True, True, True, True, True],
    ]


def test_equal_prompts_that_are_not_the_same_are_kept_apart():
    """Two examples may have the same text and different images."""
    prompts = [make_prompt(4), make_prompt(4)]
    batch = pack(FAMILIES["qwen2_vl"], prompts, torch.tensor([[1], [2]]), torch.ones(2, 1))
    assert batch.model_inputs["input_ids"].shape == (1, 8)


def test_a_batch_without_any_completion_token_still_has_a_graph(trainers):
    """Every completion was cut and is masked: the step must go through, with a gradient of zero."""
    _, trainer = trainers(mask_truncated_completions=True, beta=0.0, max_steps=1)
    script(trainer, lambda prompt_ids: [[65] * 12 for _ in prompt_ids])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_shuffling_keeps_groups_together():
    prompts = [make_prompt(2) for _ in range(6)]
    rows = [prompt for prompt in prompts for _ in range(4)]
    batch = {"prompts": rows, "row": torch.arange(24), "total": torch.tensor(24), "names": list(range(24))}
    orders = set()
    for seed in range(5):
        torch.manual_seed(seed)
        shuffled = shuffle_groups(batch)
        order = shuffled["row"].tolist()
        assert sorted(order) == list(range(24)) and shuffled["names"] == order and shuffled["total"] == 24
        assert all(order[i : i + 4] == list(range(order[i], order[i] + 4)) for i in range(0, 24, 4))
        assert all(shuffled["prompts"][i] is rows[row] for i, row in enumerate(order))
        orders.add(tuple(order))
    assert len(orders) > 1


def test_image_tokens_are_collapsed_for_vllm():
    """vLLM expands each image token itself; handing it expanded ones silently doubles them."""
    assert collapse_image_tokens([5, 9, 9, 9, 6, 9, 9, 7], image_token_id=9) == [5, 9, 6, 9, 7]
    assert collapse_image_tokens([1, 1, 2, 2], image_token_id=9) == [1, 1, 2, 2]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "zero, model_type, rows",
    [("cpu", "qwen2_vl", "mixed"), ("zero3", "qwen2_vl", "mixed"), ("zero3", "qwen3_5", "with an image")],
)
def test_two_zero_processes_match_one(zero, model_type, rows, tiny_models, datasets_by_images, quick_python, tmp_path):
    """Three groups of four over two ranks: their micro-batches of three hold one prompt here and two there."""
    model = tiny_models[model_type]
    data = datasets_by_images[1] if rows == "with an image" else write_mixed(tmp_path, 12)
    worker = [str(Path(__file__).with_name("worker_shared_prefix.py")), str(model), str(data)]
    env = launch_env(model, data, tmp_path, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    subprocess.run([quick_python, *worker, str(tmp_path / "one"), "6"], env=env, check=True)
    config = REPO_ROOT / f"src/open-r1-multimodal/configs/{zero}.yaml"
    launch = [quick_python, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--mixed_precision", "no", "--num_processes", "2", "--main_process_port", "0"]
    subprocess.run([*launch, *worker, str(tmp_path / "two"), "3"], env=env, check=True)
    before, one, two = (load_weights(path) for path in (model, tmp_path / "one", tmp_path / "two"))
    assert any((one[name] - before[name]).abs().max() > 1e-4 for name in one)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
