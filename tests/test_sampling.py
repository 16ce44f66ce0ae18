"""Groups without signal give way to others, and which prompts are asked follows from seed, step and pass rates."""

import json
import math
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from open_r1.base.errors import REPO_ROOT
from open_r1.configs import check_settings
from open_r1.settings.recipes import PLANNED_PROCESSES
from open_r1.trainer.sampling import (
    PASS_RATES,
    PassRates,
    draw_prompts,
    find_signal,
    refill_size,
    replace_prompts,
)
from open_r1.trainer.trainer import ROW, Qwen2VLGRPOTrainer
from support import Scripted, fake_completions, launch_env, make_config, read_jsonl

NAN = float("nan")


def questions(count: int) -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"Is it {row}?"}] for row in range(count)]})


def one_in_four(completions, training_row, **kwargs):
    """Every fourth prompt divides its completions; of the others a third always succeeds, the rest never."""
    return [float(k % 2 if row % 4 == 0 else row % 4 == 1) for k, row in enumerate(training_row)]


def every_other(completions, training_row, **kwargs):
    """Every other prompt divides its completions."""
    return [float(k % 2 if row % 2 == 0 else row % 4 == 1) for k, row in enumerate(training_row)]


def never(completions, **kwargs):
    return [0.0] * len(completions)


def make_trainer(model: Path, output: Path, reward=one_in_four, rows: int = 16, **changes) -> Qwen2VLGRPOTrainer:
    """Four prompts x two completions a step."""
    settings = {"num_generations": 2, "max_completion_length": 6, "min_signal_groups": 0.5, **changes}
    return Qwen2VLGRPOTrainer(str(model), reward, make_config(output, **settings), train_dataset=questions(rows))


def logged(trainer: Qwen2VLGRPOTrainer, name: str) -> list[float]:
    return [event[f"signal/{name}"] for event in trainer.state.log_history if f"signal/{name}" in event]


def asked(rows: list[dict]) -> dict[int, list[int]]:
    """Step -> the training rows of its groups, in the order of its passes."""
    steps: dict[int, dict[int, int]] = {}
    for row in rows:
        steps.setdefault(row["step"], {})[row["group"]] = row["row"]
    return {step: list(groups.values()) for step, groups in steps.items()}


def passes_of(rows: list[dict]) -> list[list[list[dict]]]:
    """A step's rows by pass and group of two."""
    passes = [[row for row in rows if row["refill"] == refill] for refill in range(rows[-1]["refill"] + 1)]
    return [[each[k : k + 2] for k in range(0, len(each), 2)] for each in passes]


def has_signal(group: list[dict]) -> bool:
    return group[0]["advantage"] != group[1]["advantage"]


# --- the pure part --------------------------------------------------------------------------------------------


def test_a_group_has_signal_when_its_known_rewards_differ():
    rewards = [[1, NAN], [0, NAN], [1, 1], [1, 1], [NAN, NAN], [NAN, NAN], [1, 0], [NAN, NAN]]
    # the last two: one completion of a group without a reward is no difference to the other
    advantages = torch.tensor([0.7, -0.7, 1e-4, 1e-4, 0, 0, 1e-4, 0])
    assert find_signal(advantages, torch.tensor(rewards), 2).tolist() == [True, False, False, False]


def test_fresh_prompts_come_first_and_there_are_always_enough():
    def draw(count, taken, seed="7/0/1"):
        return draw_prompts(count, lambda row: 0.0, taken, 10, random.Random(seed))

    assert draw(4, {0, 1, 2}) == draw(4, {0, 1, 2}) != draw(4, {0, 1, 2}, seed="7/0/2")
    assert len(set(draw(4, {0, 1, 2}))) == 4 and not set(draw(4, {0, 1, 2})) & {0, 1, 2}
    assert set(draw(5, set(range(7)))[:3]) == {7, 8, 9}
    assert set(draw(10, set(range(10)))) == set(range(10))


def test_a_refill_asks_no_more_than_is_likely_to_be_missing():
    """Of several processes each has a use for its own empty groups' worth; without any signal a whole pass is asked."""

    def size(*groups, share=0.5, wanted=1.0):
        return refill_size([[letter == "+" for letter in each] for each in groups], share, wanted)

    assert size("+++++++-", share=7 / 8) == 2 and size("+++++++-", share=1.0) == 1
    assert size("++++--------", share=1 / 3) == size("------------", share=0.0) == 12  # never more than the rollout
    assert size("++++----", wanted=0.75) == 4  # two are missing
    assert size("+++-", "+---", share=1.0) == 3  # one process's three: the other cannot help it
    assert size("+++-", "+---", share=1.0, wanted=0.75) == 1  # two are missing, of each one


def test_prompts_are_passed_over_for_others_that_never_are():
    chances = {0: 1.0, 1: 1.0, 2: 0.5}

    def replace(rows, taken, size=10, seed=0):
        return replace_prompts(rows, lambda row: chances.get(row, 0.0), taken, size, random.Random(seed))

    assert replace([3, 4], {3, 4}) == [3, 4]
    first, second, third = replace([0, 3, 1], {0, 1, 3})
    assert second == 3 and first != third and {first, third} <= {4, 5, 6, 7, 8, 9}
    assert replace([0, 1], {0, 1}, size=3) == [0, 1]  # 2 is of the kind itself: nobody is left
    assert len(set(replace([0, 1], {0, 1}, size=4))) == 2
    kept = Counter(replace([2], {2}, seed=seed)[0] == 2 for seed in range(1000))
    assert 400 < kept[True] < 600


def test_pass_rates_count_the_first_reward(tmp_path):
    def rows(row, rewards, step=1):
        return [{"step": step, "row": row, "rewards": {"accuracy": each, "format": 1.0}} for each in rewards]

    rates = PassRates()
    rates.add([*rows(3, [1.0, 0.0, 0.6]), *rows(4, [1.0, None, 1.0]), *rows(5, [0.5, 0.0]), *rows(6, [None])])
    rates.add([{"step": 1, "rewards": {"accuracy": 1.0}}])  # of an older run, which did not count rows
    assert rates.counts == {3: [2, 3], 4: [2, 2], 5: [0, 2]}
    assert [rates.chance(row, 0.25, 0.75) for row in (3, 4, 5, 6)] == [0.0, 0.25, 0.75, 0.0]

    lines = rows(3, [1.0], step=1) + rows(3, [0.0, 0.0], step=2)
    (tmp_path / "trajectories").mkdir()
    torn = "".join(json.dumps(row) + "\n" for row in lines) + '{"step": 2'
    (tmp_path / "trajectories/train.jsonl").write_text(torn)
    counts = [PassRates.of_run(tmp_path, step).counts for step in (0, 1, 2)]
    assert counts == [{}, {3: [1, 1]}, {3: [1, 3]}]


# --- a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refilled(tiny_model, tmp_path_factory):
    """A run in which half of the prompts have signal, and three of four groups must; completions of any length.

    A refill of one group is half a micro-batch.
    """
    output = tmp_path_factory.mktemp("refilled")
    settings = {"max_steps": 4, "min_signal_groups": 0.75, "rescale_by_signal": True}
    trainer = make_trainer(tiny_model, output, every_other, **settings)
    end = trainer.processing_class.tokenizer.eos_token_id
    trainer.backend = Scripted(trainer.backend, lambda ids: fake_completions(ids, end, trainer.max_completion_length))
    rollouts = []
    sample = trainer._sample_groups
    trainer._sample_groups = lambda rows: rollouts.append(sample(rows)) or rollouts[-1]
    trainer.train()
    return trainer, read_jsonl(output / "trajectories/train.jsonl"), rollouts


def test_the_asked_share_is_reached_by_few_more(refilled):
    trainer, rows, _ = refilled
    sizes = set()
    for log in trainer.state.log_history[:-1]:
        parts = [log["time/rollout"], log["time/scoring"], log["time/update"]]  # the seconds of all its passes
        assert min(parts) > 0 and sum(parts) == pytest.approx(log["step_time"], rel=1e-6)
        of_step = [row for row in rows if row["step"] == log["step"]]
        first, *refills = passes_of(of_step)
        assert len(first) == 4 and len(refills) == log["signal/refills"] <= 3
        share, seen, found = sum(map(has_signal, first)) / 4, 4, sum(map(has_signal, first))
        for refill in refills:
            assert len(refill) == min(math.ceil((0.75 - share) * 4 * seen / found) if found else 4, 4)
            share = min(share * 4 + sum(map(has_signal, refill)), 4) / 4
            seen, found = seen + len(refill), found + sum(map(has_signal, refill))
            sizes.add(len(refill))
        assert log["signal/share"] == share >= 0.75
        assert log["signal/wasted"] == len(of_step) - 8 * share
        groups = asked(of_step)[log["step"]]
        assert len(set(groups)) == len(groups) == seen  # none is asked twice
        assert [row["group"] for row in of_step] == [index // 2 for index in range(len(of_step))]
        # figures count every completion once, however many its pass has
        assert log["frac_reward_zero_std"] == pytest.approx(1 - found / seen)
        assert log["reward"] == pytest.approx(sum(row["rewards"]["every_other"] for row in of_step) / len(of_step))
        assert log["completions/mean_length"] == pytest.approx(sum(row["length"] for row in of_step) / len(of_step))
    assert min(sizes) < 4 and len(sizes) > 1
    assert trainer.pass_rates.counts.keys() == {row["row"] for row in rows}


def test_a_refill_follows_from_seed_step_and_pass(refilled):
    """So a resumed run asks the same, and no two rollouts are replaced alike."""
    _, rows, _ = refilled
    fresh = {}  # by step and pass
    for step in range(1, 5):
        first, *refills = passes_of([row for row in rows if row["step"] == step])
        taken = {group[0]["row"] for group in first}
        for refill, groups in enumerate(refills, start=1):
            draw = random.Random(f"7/{step - 1}/{refill}")  # the seed, the steps that are done, the pass
            fresh[step, refill] = [group[0]["row"] for group in groups]
            assert fresh[step, refill] == draw_prompts(len(groups), lambda row: 0.0, taken, 16, draw)
            taken.update(fresh[step, refill])
    assert len({step for step, _ in fresh}) > 1 and max(refill for _, refill in fresh) > 1


def learned_from(rows: list[dict]) -> list[list[dict]]:
    """The groups of a step after its refills: those without signal gave way in order to those of later passes with."""
    first, *refills = passes_of(rows)
    for refill in refills:
        fresh = [group for group in refill if has_signal(group)]
        for place, group in enumerate(first):
            if fresh and not has_signal(group):
                first[place] = fresh.pop(0)
    return first


def test_the_step_learns_from_as_many_completions_and_from_the_right_ones(refilled):
    """Each with its own ids, reference and advantage, in place of one without signal; and weighed by all its tokens."""
    trainer, rows, rollouts = refilled
    decode = trainer.processing_class.batch_decode
    changed = 0
    for step, (batch, share) in enumerate(zip(rollouts, logged(trainer, "share"), strict=True), start=1):
        of_step = [row for row in rows if row["step"] == step]
        expected = [row for group in learned_from(of_step) for row in group]
        assert len(batch["completion_ids"]) == len(expected) == 8
        ids = [each[mask.bool()] for each, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
        prompts = [each[mask.bool()] for each, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
        assert all(torch.equal(a, b.input_ids) for a, b in zip(prompts, batch["prompts"], strict=True))
        assert decode(prompts) == [row["prompt"] for row in expected]
        assert decode(ids, skip_special_tokens=True) == [row["completion"] for row in expected]
        assert [len(each) for each in ids] == [row["length"] for row in expected]
        # GPG's alpha
        advantages = [row["advantage"] / share for row in expected]
        assert batch["advantages"].tolist() == pytest.approx(advantages) and len(set(advantages)) > 1
        for prompt, own, scored in zip(prompts, ids, batch["ref_per_token_logps"], strict=True):
            with torch.no_grad():
                logits = trainer.ref_model(torch.cat([prompt, own])[None]).logits[0, len(prompt) - 1 : -1]
            picked = logits.log_softmax(dim=-1).gather(1, own[:, None])[:, 0]
            assert torch.allclose(scored[: len(own)], picked, atol=1e-5) and not scored[len(own) :].any()
        assert batch["num_items_in_batch"].item() == sum(row["length"] for row in expected)
        changed += sum(row["length"] for row in expected) != sum(row["length"] for row in of_step[:8])
    assert changed  # a refill brought more or fewer tokens


def test_without_any_signal_it_goes_on(tiny_model, tmp_path):
    """Three passes of four prompts, and there are eight: the third asks some of them again."""
    trainer = make_trainer(tiny_model, tmp_path, never, rows=8, max_refills=2, max_steps=2, rescale_by_signal=True)
    trainer.train()
    assert logged(trainer, "share") == [0, 0] and logged(trainer, "refills") == [2, 2]
    assert logged(trainer, "wasted") == [24, 24]
    assert Counter(row["step"] for row in read_jsonl(tmp_path / "trajectories/train.jsonl")) == {1: 24, 2: 24}


def test_what_is_solved_is_passed_over(tiny_model, tmp_path):
    """Two epochs over eight prompts: in the second, those that are solved give way to others."""
    trainer = make_trainer(
        tiny_model, tmp_path, rows=8, max_steps=4, min_signal_groups=0.0, skip_solved=1.0, skip_hopeless=0.0
    )
    trainer.train()
    steps = asked(read_jsonl(tmp_path / "trajectories/train.jsonl"))
    solved = {1, 5}
    assert sorted(steps[1] + steps[2]) == list(range(8))
    assert all(len(set(rows)) == 4 and not set(rows) & solved for rows in (steps[3], steps[4]))
    assert trainer.pass_rates.counts[1] == [2, 2] and trainer.pass_rates.counts[2][0] == 0
    assert logged(trainer, "refills") == [0] * 4


RESUMED = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "skip_solved": 0.5,
    "skip_hopeless": 0.5,
    "max_refills": 2,
    "min_signal_groups": 0.75,
    "num_train_epochs": 2,
}


# --- over ranks -----------------------------------------------------------------------------------------------

WORKER = """
import sys
sys.path.insert(0, {tests!r})
from test_sampling import RESUMED, every_other, logged, make_trainer
output, checkpoint = sys.argv[1:]
trainer = make_trainer({model!r}, output, every_other, **RESUMED)
trainer.train(resume_from_checkpoint=checkpoint or None)
assert [len(batch["completion_ids"]) for batch in trainer._buffered_inputs] == [4, 4]
assert len(logged(trainer, "share")) == 4
"""


@pytest.mark.distributed
def test_two_ranks_run_as_many_passes_and_resume(tiny_model, quick_python, tmp_path):
    """Each exchanges groups among its own four; both decide by all eight, or one would wait for ever."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(REPO_ROOT / "tests"), model=str(tiny_model)))
    path = REPO_ROOT / "src/open-r1-multimodal/configs/zero3.yaml"
    launch = [quick_python, "-m", "accelerate.commands.launch", "--config_file", str(path), "--mixed_precision", "no"]
    launch += ["--num_processes", "2", "--main_process_port", "0", str(script)]
    env = launch_env(tiny_model, tmp_path, tmp_path, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    whole, again = tmp_path / "whole", tmp_path / "again"
    subprocess.run([*launch, str(whole), ""], env=env, check=True, timeout=400)
    rows = read_jsonl(whole / "trajectories/train.jsonl")
    for step, groups in asked(rows).items():
        of_step = [row for row in rows if row["step"] == step]
        passes = max(row["refill"] for row in of_step) + 1
        counts = [sum(row["refill"] == refill for row in of_step) for refill in range(passes)]
        assert counts[0] == 16 and set(counts[1:]) <= {4, 8, 12, 16}  # one process asks as many groups as the other
        assert len(set(groups[:16])) == len(groups[:16]) == min(sum(counts) // 2, 16)  # none is asked twice
    assert min(Counter((row["step"], row["refill"]) for row in rows).values()) < 16
    log = json.loads((whole / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert all(event["signal/share"] >= 0.75 or event["signal/refills"] == 2 for event in log)
    assert any(event["signal/share"] >= 0.75 and event["signal/refills"] > 0 for event in log)

    shutil.copytree(whole, again)
    subprocess.run([*launch, str(again), str(again / "checkpoint-2")], env=env, check=True, timeout=400)
    assert asked(read_jsonl(again / "trajectories/train.jsonl")) == asked(rows)
    assert (again / PASS_RATES).read_bytes() == (whole / PASS_RATES).read_bytes()


# --- what is refused ------------------------------------------------------------------------------------------


def test_settings_that_need_what_is_not_there_are_refused(tiny_model, tmp_path, monkeypatch):
    def refusal(shared_prefix=True, streams=False, **changes):
        with pytest.raises(ValueError) as raised:
            check_settings(make_config(tmp_path, **changes), shared_prefix, streams)
        return str(raised.value)

    assert refusal(shared_prefix=False, skip_solved=0.5).startswith("skip_solved: needs the shared prefix")
    assert refusal(streams=True, skip_hopeless=0.5).startswith("skip_hopeless: ")
    assert refusal(rescale_by_signal=True, remove_unused_columns=True).startswith("rescale_by_signal: ")
    check_settings(make_config(tmp_path), shared_prefix=False, streams=True)  # off: none of it matters
    monkeypatch.setenv(PLANNED_PROCESSES, "2")  # of two completions each, which together are a group
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    assert "its rollout of 2 completions" in refusal(min_signal_groups=0.4, **halves)
    monkeypatch.delenv(PLANNED_PROCESSES)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert refusal().startswith("fsdp: processes decode different numbers of tokens")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    args = make_config(tmp_path, min_signal_groups=1.0)
    with pytest.raises(ValueError, match=r"min_signal_groups: .* rollout_func"):
        Qwen2VLGRPOTrainer(
            *(str(tiny_model), never, args), train_dataset=questions(4), rollout_func=lambda prompts, trainer: {}
        )


def test_a_run_without_these_settings_leaves_nothing_of_them(tiny_model, tmp_path):
    seen = []

    def spy(completions, **kwargs):
        seen.append(ROW in kwargs)
        return never(completions)

    trainer = make_trainer(tiny_model, tmp_path, spy, min_signal_groups=0.0, max_steps=1)
    trainer.train()
    assert seen == [False] and logged(trainer, "share") == []
    assert not {"row", "refill"} & set(read_jsonl(tmp_path / "trajectories/train.jsonl")[0])
    assert not (tmp_path / PASS_RATES).exists()
