"""The trainer against what the reference got wrong: who gets which reward, what is sampled, what is left behind."""

import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from trl import GRPOTrainer

from open_r1.base.errors import Mistake
from open_r1.base.images import open_image
from open_r1.configs import FreezeArguments
from open_r1.models.families import end_token_ids, vision_token_ids
from open_r1.models.loading import load_model, load_processor
from open_r1.models.trained import freeze
from open_r1.rewards import accuracy_reward
from open_r1.running.data import count_prompt_tokens, load_dataset
from open_r1.tasks.examples import read_examples
from open_r1.trainer.metrics import BLIND
from open_r1.trainer.trainer import Qwen2VLGRPOConfig, Qwen2VLGRPOTrainer
from support import falling, load_weights, make_config, make_trainer, read_jsonl, vowel_share, write_examples


@pytest.fixture(scope="module")
def run(tiny_model, examples_json, tmp_path_factory):
    """A finished run of two steps with two prompts in every micro-batch and evaluation after each step."""
    output = tmp_path_factory.mktemp("run")
    seen = []

    def spy(completions, prompts, solution, images, **kwargs):
        seen.extend(zip(prompts, solution, images, strict=True))
        return vowel_share(completions)

    trainer = make_trainer(
        tiny_model,
        examples_json,
        output,
        reward_funcs=[spy, accuracy_reward],
        eval_data=examples_json,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        num_generations_eval=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return trainer, before, seen, output


def test_every_parameter_moves(run):
    trainer, before, _, _ = run
    still = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    # the bias of keys shifts every score of a softmax alike, so it has no gradient by construction
    assert [name for name in still if "k_proj.bias" not in name and "attn.qkv.bias" not in name] == []


def test_checkpoints_leave_as_many_hooks_as_there_were(tiny_model, examples_json, tmp_path):
    """They are switched off and on twice a step, and every token of a rollout runs through the hooks."""
    trainer = make_trainer(tiny_model, examples_json, tmp_path, gradient_checkpointing=True)
    embeddings = trainer.plain_model().get_input_embeddings()
    before = len(embeddings._forward_hooks)
    trainer.train()
    assert trainer.plain_model().is_gradient_checkpointing and len(embeddings._forward_hooks) == before == 1


def test_each_reward_belongs_to_its_prompt(run, examples_json):
    """The reference stacked completions generation-major and rewarded them prompt-major."""
    *_, seen, _ = run
    solutions = {row["prompt"][0]["content"]: row["solution"] for row in read_examples(examples_json)}
    assert seen
    for prompt, solution, images in seen:
        text = next(part["text"] for part in prompt[0]["content"] if part["type"] == "text")
        assert solutions[text] == solution
        assert open_image(images[0]).getpixel((0, 0)) == Image.new("RGB", (1, 1), solution).getpixel((0, 0))


def test_trajectories_hold_every_completion_once(run):
    *_, output = run
    rows = read_jsonl(output / "trajectories/train.jsonl")
    assert [row["step"] for row in rows] == [1] * 16 + [2] * 16  # 8 a micro-batch, 2 micro-batches a step
    for start in range(0, len(rows), 4):
        group = rows[start : start + 4]
        assert len({row["prompt"] for row in group}) == 1
        assert {row["group"] for row in group} == {start % 16 // 4}
        rewards = torch.tensor([sum(row["rewards"].values()) for row in group])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert torch.allclose(torch.tensor([row["advantage"] for row in group]), advantages, atol=1e-4)
    for row in rows:
        assert row["prompt"].endswith("<think>") and row["prompt"].count("<|image_pad|>") == 1
        assert row["solution"] in row["prompt"] and set(row["rewards"]) == {"spy", "accuracy_reward"}
        assert Path(row["images"][0]).is_file()
        assert 1 <= row["length"] <= 12 and (row["ended"] or row["length"] == 12)


def test_evaluation_during_training(run):
    trainer, _, _, output = run
    assert [log["step"] for log in trainer.state.log_history if "eval_reward" in log] == [1, 2]
    assert [row["step"] for row in read_jsonl(output / "trajectories/eval.jsonl")] == [1] * 16 + [2] * 16


def test_the_log_describes_the_completions_and_the_seconds_of_its_step(run):
    trainer, *_, output = run
    rows = read_jsonl(output / "trajectories/train.jsonl")
    logs = [log for log in trainer.state.log_history if "step_time" in log]
    assert len(logs) == 2
    for log in logs:
        of_step = [row for row in rows if row["step"] == log["step"]]
        tokens = sum(row["length"] for row in of_step)
        assert log["rollout/tokens_per_second"] == pytest.approx(tokens / log["time/rollout"])
        groups = [[row["completion"] for row in of_step[at : at + 4]] for at in range(0, 16, 4)]
        identical = sum(len(set(group)) == 1 for group in groups) / len(groups)
        assert log["completions/identical_groups"] == identical < 1
        seconds = [log[f"time/{part}"] for part in ("rollout", "scoring", "update")]
        assert min(seconds) > 0 and sum(seconds) == pytest.approx(log["step_time"], rel=1e-6)
        assert 0 < log["packing/tokens_saved"] < 1


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_the_held_out_questions_are_asked_without_their_images_too(shared_prefix, tiny_model, examples_json, tmp_path):
    def needs_images(completions, images, **kwargs):
        return [float(len(each)) for each in images]

    settings = {"eval_strategy": "steps", "num_generations_eval": 1, "per_device_eval_batch_size": 8}
    settings["shared_prefix"] = shared_prefix
    trainer = make_trainer(tiny_model, examples_json, tmp_path, needs_images, examples_json, **settings)
    trainer.evaluate(metric_key_prefix=BLIND)
    rows = read_jsonl(tmp_path / "trajectories/blind.jsonl")
    assert len(rows) == 8
    assert all(row["images"] == [] and "image_pad" not in row["prompt"] for row in rows)
    [log] = trainer.state.log_history
    assert log["blind_rewards/needs_images/mean"] == 0
    assert not any(name.startswith("eval_") for name in log)
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_rewards/needs_images/mean"] == 1
    assert len(read_jsonl(tmp_path / "trajectories/eval.jsonl")) == 8


def test_checkpoint_carries_prompt_pixels_and_neutral_generation(run, tiny_model):
    *_, output = run
    processor = load_processor(output / "checkpoint-2")
    assert processor.chat_template == load_processor(tiny_model, chat_template="base").chat_template
    assert processor.image_processor.size["longest_edge"] == 12544
    generation = json.loads((output / "checkpoint-2/generation_config.json").read_text())
    assert "top_k" not in generation and "repetition_penalty" not in generation
    assert set(generation["eos_token_id"]) == set(end_token_ids(processor))


def test_checkpoint_settings_do_not_reach_the_rollout(run, tiny_model):
    """The tiny checkpoint ships top_k 1 and a repetition penalty, as the published one does."""
    shipped = json.loads((tiny_model / "generation_config.json").read_text())
    assert shipped["top_k"] == 1 and shipped["repetition_penalty"] == 1.05
    trainer, _, _, output = run
    groups = {}
    for row in read_jsonl(output / "trajectories/train.jsonl"):
        groups.setdefault((row["step"], row["group"]), set()).add(row["completion"])
    assert all(len(completions) > 1 for completions in groups.values())  # top_k 1 would make them equal
    assert trainer.generation_config.top_k == 0 and trainer.generation_config.repetition_penalty == 1.0


def test_vision_tokens_are_never_sampled_and_every_end_counts(tiny_model, examples_json, tmp_path):
    sampled = []

    def spy(completions, completion_ids, **kwargs):
        sampled.extend(completion_ids)
        return vowel_share(completions)

    # At this temperature every token is about equally likely: 512 draws from about 280 tokens
    trainer = make_trainer(
        tiny_model,
        examples_json,
        tmp_path,
        reward_funcs=spy,
        temperature=1e3,
        max_completion_length=64,
        max_steps=4,
    )
    trainer.train()
    ids = [i for completion in sampled for i in completion]
    assert len(ids) > 500
    assert not set(ids) & set(vision_token_ids(trainer.processing_class))
    ends = set(end_token_ids(trainer.processing_class))
    assert len(ends) == 2 and ends == {completion[-1] for completion in sampled if completion[-1] in ends}
    assert all(not set(completion[:-1]) & ends for completion in sampled)


# Where a checkpoint lies: in the second epoch, whose steps are of two micro-batches and, the last
# one, of the third that is left; behind a rollout that serves two steps.
RESUMES = {
    "after three steps": ({}, 8, 3),
    "behind a short step": ({"steps_per_generation": 3}, 3, 2),
    "behind a rollout of two steps": ({"num_iterations": 2}, 8, 2),
}


@pytest.mark.parametrize("case", RESUMES)
def test_resume_continues_step_weights_order_and_trajectories(case, tiny_model, tmp_path):
    changes, examples, at = RESUMES[case]
    data = write_examples(tmp_path, count=examples)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 6, **changes}
    make_trainer(tiny_model, data, tmp_path / "whole", **settings).train()
    # as if killed: later checkpoints may be there, rows of the lost steps and half a line remain
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    with (tmp_path / "broken/trajectories/train.jsonl").open("a") as file:
        file.write('{"step": 5, "half')
    resumed = make_trainer(tiny_model, data, tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"broken/checkpoint-{at}"))
    assert resumed.state.global_step == 4
    whole, again = (load_weights(tmp_path / name / "checkpoint-4") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert read_jsonl(tmp_path / "whole/trajectories/train.jsonl") == read_jsonl(
        tmp_path / "broken/trajectories/train.jsonl"
    )


@pytest.mark.parametrize("changes", [{"num_iterations": 2}, {"steps_per_generation": 3, "sync_ref_model": True}])
def test_a_resume_inside_a_rollout_says_that_it_cannot_repeat_the_run(
    changes, tiny_model, examples_json, tmp_path, capsys
):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 4, **changes}
    make_trainer(tiny_model, examples_json, tmp_path, **settings).train()
    said = capsys.readouterr().err
    assert "a rollout serves" not in said and "sync_ref_model" not in said
    resumed = make_trainer(tiny_model, examples_json, tmp_path, **{**settings, "max_steps": 2})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    window = resumed.args.steps_per_generation * resumed.args.num_iterations
    line = f"warning: a rollout serves {window} micro-batches, and this run goes on after 2 of them"
    said = capsys.readouterr().err
    assert line in said
    assert ("warning: sync_ref_model: a checkpoint does not hold the ref" in said) == ("sync_ref_model" in changes)
    rows = read_jsonl(tmp_path / "trajectories/train.jsonl")
    sampled = {row["prompt"] for row in rows if row["step"] == 1}
    again = {row["prompt"] for row in rows if row["step"] == 2}
    assert sampled <= again  # the questions of the rollout that was lost


def test_the_best_model_is_the_one_at_the_end(tiny_model, examples_json, tmp_path):
    trainer = make_trainer(
        *(tiny_model, examples_json, tmp_path, falling, examples_json),
        **{"max_steps": 3, "max_completion_length": 4, "learning_rate": 0.05, "lr_scheduler_type": "constant"},
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        **{"load_best_model_at_end": True},  # by the reward, of which more is better
        **{"num_generations_eval": 1, "per_device_eval_batch_size": 8},
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    final, best, last = (load_weights(tmp_path / name) for name in ("final", "checkpoint-1", "checkpoint-3"))
    assert all(torch.equal(final[name], best[name]) for name in best)
    assert not all(torch.equal(final[name], last[name]) for name in last)
    # TRL sends an engine weights where the step is another than the one that it has
    assert trainer._last_loaded_step != trainer.state.global_step
    trainer.state.best_model_checkpoint = str(tmp_path / "gone")
    with pytest.raises(Mistake, match=r"gone holds no model\.safetensors$"):
        trainer._load_best_model()


def test_long_prompts_are_left_out_not_cut(tiny_model, tmp_path):
    data = write_examples(tmp_path, count=6)
    processor = load_processor(tiny_model, chat_template="base")
    examples = list(read_examples(data))
    lengths = [count_prompt_tokens(example, processor) for example in examples]
    for example, length in zip(examples, lengths, strict=True):
        image = {"type": "image", "image": Image.open(example["images"][0])}
        content = [image, {"type": "text", "text": example["prompt"][0]["content"]}]
        ids = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
        )
        assert len(ids[0]) == length
    for limit in {max(lengths) - 1, *lengths}:  # as long as is allowed
        kept = load_dataset(data, processor, max_prompt_length=limit)
        assert len(kept) == sum(length <= limit for length in lengths)
    with pytest.raises(ValueError, match="no example left"):
        load_dataset(data, processor, max_prompt_length=5)


@pytest.mark.parametrize("part", ["vision", "llm"])
def test_freeze_freezes(tiny_model, part):
    """The reference's flags assigned to `requires_grad_`, the method, and froze nothing."""
    model = load_model(tiny_model, dtype="float32")
    freeze(model, FreezeArguments(freeze_vision=part == "vision", freeze_llm=part == "llm"))
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(trains[name] == ((".visual." in name) != (part == "vision")) for name in trains)
    assert len(set(trains.values())) == 2
    with pytest.raises(ValueError, match="nothing is left to train"):
        freeze(model, FreezeArguments(freeze_vision=True, freeze_llm=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_load_in_the_recipes_dtype(tiny_models, dtype):
    for path in tiny_models.values():
        model = load_model(path, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        assert model.config._attn_implementation == "sdpa"  # auto, on a machine without flash-attn


def test_opening_images_leaves_no_file_open(examples_json):
    """The reference kept a file handle open for every image of the dataset."""
    before = len(os.listdir("/proc/self/fd"))
    images = [open_image(example["images"][0]) for example in read_examples(examples_json)]
    assert len(os.listdir("/proc/self/fd")) == before and images[0].mode == "RGB"


def test_one_step_is_the_same_number_of_completions_on_any_number_of_gpus(monkeypatch):
    for world_size, steps in {1: 8, 2: 4, 8: 1}.items():
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        config = Qwen2VLGRPOConfig.__new__(Qwen2VLGRPOConfig)
        config.completions_per_step, config.per_device_train_batch_size = 64, 8
        config.gradient_accumulation_steps = 1
        config.resolve_accumulation()
        assert config.gradient_accumulation_steps == steps


def test_a_rollout_function_of_the_users_reaches_rewards(tiny_model, examples_json, tmp_path):
    """What it adds to a row, in place of a column too, beside the row's own fields and images."""
    seen = []

    def roll_out(prompts, trainer):
        render = trainer.processing_class.apply_chat_template
        inputs = [render([prompt], add_generation_prompt=True, tokenize=True, return_dict=True) for prompt in prompts]
        ids = [each["input_ids"][0] for each in inputs]
        end = trainer.processing_class.tokenizer.eos_token_id
        completions = [[65 + row, end] for row in range(len(prompts))]
        found = {"hint": [f"hint {row}" for row in range(len(prompts))], "question_type": ["mine"] * len(prompts)}
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, **found}

    def spy(completions, hint, question_type, solution, options, **kwargs):
        seen.extend(zip(hint, question_type, solution, options, strict=True))
        return vowel_share(completions)

    processor = load_processor(tiny_model, chat_template="base")
    trainer = Qwen2VLGRPOTrainer(
        model=load_model(tiny_model, dtype="float32"),
        reward_funcs=spy,
        args=make_config(tmp_path, max_steps=1),
        train_dataset=load_dataset(examples_json, processor),
        processing_class=processor,
        rollout_func=roll_out,
    )
    assert not trainer.shared_prefix  # theirs
    trainer.train()
    assert {(hint, kind) for hint, kind, *_ in seen} == {(f"hint {row}", "mine") for row in range(8)}
    assert all(solution in options for *_, solution, options in seen)


def test_settings_of_the_template_reach_what_is_asked_and_what_is_written_down(tiny_model, examples_json, tmp_path):
    asked = []

    settings = {"chat_template_kwargs": {"style": "direct"}, "max_steps": 1}
    trainer = make_trainer(tiny_model, examples_json, tmp_path, vowel_share, **settings)
    score = trainer._compute_loss

    def spy(model, inputs):
        asked.extend(trainer.processing_class.batch_decode([prompt.input_ids for prompt in inputs["prompts"]]))
        return score(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    written = [row["prompt"] for row in read_jsonl(tmp_path / "trajectories/train.jsonl")]
    assert len(asked) == len(written) == 8 and not any("<think>" in prompt for prompt in asked + written)
    for one, other in zip(asked, written, strict=True):  # an image is as many tokens as it has patches, or one
        assert re.sub("(<.image_pad.>)+", "", one) == other.replace("<|image_pad|>", "")


# --- what of TRL and transformers the trainer's code stands in for, or calls in private ------------------------

# By name, a hash of its source. Where one changed, see what of it, mend ours, and then write its new hash here.
SOURCES = {
    "create_model_card": "4f8a407fd9fd",
    "_calculate_rewards": "736ae29b0838",
    "_compute_loss": "80295546bbdb",
    "_generate": "2a27fdf8f5e6",
    "_generate_and_score_completions": "1fa48922792d",
    "_determine_best_metric": "7aa77355a0c3",
    "_get_grad_norm": "913ba6f52f07",
    "_get_per_token_logps_and_entropies": "ea73c3909275",
    "_get_train_sampler": "36497afb4d31",
    "_load_best_model": "0e183d55a9db",
    "_load_from_checkpoint": "4711d0506786",
    "_load_optimizer_and_scheduler": "5c1772becdfd",
    "_load_rng_state": "d5ebdfc0a088",
    "_prepare_for_training": "0a4d89b3fdfd",
    "_prepare_inputs": "f824e7fb0714",
    "_tokenize_prompts": "d2d27f7c9bfd",
    "compute_loss": "a2d6ef8bd29c",
    "evaluate": "47001f3acc99",
    "get_eval_dataloader": "301561e842dd",
    "get_train_dataloader": "2bffe5a57c53",
    "log": "1e7772819cc8",
    "init_hf_repo": "84dca1f3208c",
    "push_to_hub": "2f408e30def5",
    "save_model": "ca8d2be9f60f",
    "training_step": "9e18632f7dd8",
    "_generate_single_turn": "e0f02e4fc094",
    "_save_checkpoint": "ec91bde12364",
    "_get_eval_sampler": "115d885d2f02",
    "trl.trainer.utils:RepeatSampler": "ba139f4a43ee",
    "trl.generation.vllm_generation:VLLMGeneration._iter_named_params": "baab615d5c7b",
    "trl.generation.vllm_generation:VLLMGeneration.sync_weights": "63d669fb3230",
    "trl.trainer.utils:add_fused_lm_head": "422d009f04b6",
    "trl.trainer.utils:nanstd": "081b874388d8",
    "trl.trainer.utils:pad": "5b5cbf5245d6",
    "trl.trainer.utils:split_tensor_dict": "b61a5760a03e",
    "trl.trainer.utils:use_adapter": "edd0e493f99f",
}


def source_of(name: str) -> str:
    """The source of a method of TRL's trainer, or of `module:function` (or `module:Class.method`)."""
    module, _, path = name.rpartition(":")
    value = importlib.import_module(module) if module else GRPOTrainer
    for part in path.split("."):
        value = getattr(value, part)
    return inspect.getsource(inspect.unwrap(value))


def digest(name: str) -> str:
    return hashlib.sha256(source_of(name).encode()).hexdigest()[:12]


def test_what_is_overridden_or_called_in_private_is_as_it_was():
    assert {name: digest(name) for name in SOURCES} == SOURCES


def test_every_override_is_in_the_table():
    ours = [kind for kind in Qwen2VLGRPOTrainer.__mro__ if kind.__module__.startswith("open_r1.")]
    names = {name for kind in ours for name in vars(kind) if not name.startswith("__")}
    assert {name for name in names if callable(getattr(GRPOTrainer, name, None))} <= SOURCES.keys()
