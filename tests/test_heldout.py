"""Held-out figures are over questions, each once, whatever the batches and processes that they come in."""

import json
import subprocess

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.sft import Qwen2VLSFTTrainer
from open_r1.trainer.metrics import BLIND, check_best, figures_of
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from support import Scripted, launch_env, make_config, read_jsonl

FIGURES = (
    *("reward", "reward_std", "frac_reward_zero_std", "rewards/long/mean", "rewards/yes/mean", "loss", "kl", "entropy"),
    *("completions/mean_length", "completions/clipped_ratio", "completions/max_terminated_length"),
)
WEIGHTS = [0.5, 3.0]
LONGEST = 6


def long(completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def yes(completions, answer, **kwargs):
    return [None if each == "unknown" else float(each == "yes") for each in answer]


def questions(count: int) -> Dataset:
    answers = ["yes" if row == 1 else "unknown" if row == 3 else "no" for row in range(count)]
    prompts = [[{"role": "user", "content": f"Is it {row}?"}] for row in range(count)]
    return Dataset.from_dict({"prompt": prompts, "answer": answers})


def make_trainer(model, output, **changes) -> Qwen2VLGRPOTrainer:
    """A trainer whose policy is not its reference any more, and whose completions, of unequal lengths, a test knows."""
    settings = {"eval_strategy": "steps", "max_completion_length": LONGEST, "reward_weights": WEIGHTS, **changes}
    data = settings.pop("eval_dataset", questions(5))
    args = make_config(output, **settings)
    trainer = Qwen2VLGRPOTrainer(str(model), [long, yes], args, train_dataset=questions(5), eval_dataset=data)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    end = trainer.eos_token_ids[0]
    trainer.backend = Scripted(trainer.backend, lambda prompts: completions(prompts, end))
    return trainer


def completions(prompts: list[list[int]], end: int) -> list[list[int]]:
    """Of each row's prompt and its number among those of the same prompt: lengths from 1 to the limit.

    Half of those that reach the limit end there, and half are cut.
    """
    rows, last, number = [], None, 0
    for prompt in prompts:
        last, number = prompt, number + 1 if prompt == last else 0
        question = sum(prompt)
        length = 1 + (question + 4 * number) % LONGEST
        tokens = [40 + (7 * question + 13 * number + 5 * place) % 80 for place in range(length)]
        rows.append(tokens if length == LONGEST and number % 2 else [*tokens[:-1], end])
    return rows


def row(reward, other, length, ended):
    return {"rewards": {"a": reward, "b": other}, "length": length, "ended": ended}


def test_the_figures_of_a_few_rows():
    rows = [row(1.0, None, 4, True), row(3.0, 1.0, 8, False), row(0.0, None, 6, True), row(None, None, 2, True)]
    figures = figures_of(rows, [1.0, 2.0], group_size=2)
    assert figures["frac_reward_zero_std"] == 0
    assert figures["completions/max_terminated_length"] == 6  # the longest of all, 8, was cut
    assert figures["reward"] == pytest.approx((1 + 5 + 0) / 3)  # a row without any reward has no part in it
    assert figures["rewards/a/mean"] == pytest.approx(4 / 3) and figures["rewards/b/mean"] == 1
    assert figures["reward_std"] == pytest.approx(np.std([1, 5, 0], ddof=1))
    assert figures["completions/mean_length"] == 5 and figures["completions/max_length"] == 8
    assert figures["completions/clipped_ratio"] == 0.25
    assert figures["completions/mean_terminated_length"] == 4 and figures["completions/min_terminated_length"] == 2


@pytest.mark.parametrize("generations", [1, 2])
def test_every_batch_size_gives_the_figures_of_one_batch(generations, tiny_model, tmp_path):
    """TRL's would be the means of uneven batches' means: of completions of unequal length, in kl and entropy too."""
    logs = []
    for batch in (4, 10):
        trainer = make_trainer(
            tiny_model,
            tmp_path / str(batch),
            per_device_eval_batch_size=batch,
            num_generations_eval=generations,
        )
        logs.append(trainer.evaluate())
        rows = read_jsonl(tmp_path / str(batch) / "trajectories/eval.jsonl")
        assert len(rows) == 5 * generations
        assert [each["group"] for each in rows] == [index // generations for index in range(len(rows))]
        trainer.evaluate()  # and a second one starts from nothing
        assert len(read_jsonl(tmp_path / str(batch) / "trajectories/eval.jsonl")) == 2 * 5 * generations
    for name in FIGURES:
        assert logs[0][f"eval_{name}"] == pytest.approx(logs[1][f"eval_{name}"], rel=1e-4), name
    assert "eval_tokens" not in logs[0]

    lengths = [each["length"] for each in rows]
    earned = [WEIGHTS[0] * each["length"] + WEIGHTS[1] * (each["rewards"]["yes"] or 0) for each in rows]
    assert len(set(lengths)) > 2 and logs[0]["eval_kl"] > 1e-3  # else nothing above could be wrong
    assert logs[0]["eval_reward"] == pytest.approx(np.mean(earned))
    assert logs[0]["eval_rewards/yes/mean"] == pytest.approx(1 / 4)
    assert logs[0]["eval_rewards/long/mean"] == pytest.approx(np.mean(lengths))
    groups = np.reshape(earned, (5, generations))
    assert logs[0]["eval_frac_reward_zero_std"] == pytest.approx(np.mean(groups.std(axis=1) < 1e-6))


def test_a_completion_ends_by_its_last_token_not_by_its_length(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, num_generations_eval=4, per_device_eval_batch_size=20)
    logs = trainer.evaluate()
    rows = read_jsonl(tmp_path / "trajectories/eval.jsonl")
    at_the_limit = [each["length"] == LONGEST for each in rows]
    cut = [long and index % 2 == 1 for index, long in enumerate(at_the_limit)]
    assert [not each["ended"] for each in rows] == cut
    assert 0 < sum(cut) < sum(at_the_limit)
    assert logs["eval_completions/clipped_ratio"] == pytest.approx(np.mean(cut))


def test_what_a_process_got_to_be_even_counts_nowhere(tiny_model, tmp_path):
    """Of a batch of four two are questions of their own; the tokens of the others have no part in kl and entropy."""
    trainer = make_trainer(tiny_model, tmp_path, num_generations_eval=1, per_device_eval_batch_size=4)
    trainer.model.eval()
    trainer.get_eval_dataloader()
    trainer.recorder.begin_evaluation(2)
    batch = trainer._generate_and_score_completions([questions(5)[index] for index in range(4)])
    assert batch["completion_mask"].any(dim=1).tolist() == [True, True, False, False]
    assert len(read_jsonl(tmp_path / "trajectories/eval.jsonl")) == 2


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "luspo", "dapo"])
def test_what_a_process_got_to_be_even_has_no_part_in_the_loss(loss_type, tiny_model, tmp_path):
    settings = {"num_generations_eval": 1, "per_device_eval_batch_size": 4, "loss_type": loss_type}
    trainer = make_trainer(tiny_model, tmp_path, eval_dataset=questions(2), **settings)
    alone = trainer.evaluate()["eval_loss"]
    trainer.get_eval_dataloader()
    logs = {"eval_loss": float("nan")}  # transformers' own
    with torch.no_grad():
        batch = trainer._generate_and_score_completions([questions(5)[index] for index in range(4)])
        trainer.compute_loss(trainer.model, batch)
    trainer.log(logs)
    assert alone > 1e-5 and logs["eval_loss"] == pytest.approx(alone, rel=1e-4)


# --- several evaluation sets ----------------------------------------------------------------------------------


def named_sets() -> dict[str, Dataset]:
    return {"easy": questions(2), "far_away": questions(5)}


def test_each_of_several_sets_has_its_own_figures_and_completions(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path / "named", eval_dataset=named_sets())
    logs = trainer.evaluate()
    rows = read_jsonl(tmp_path / "named/trajectories/eval.jsonl")
    for name, data in named_sets().items():
        alone = make_trainer(tiny_model, tmp_path / name, eval_dataset=data)
        expected = alone.evaluate()
        for figure in FIGURES:
            assert logs[f"eval_{name}_{figure}"] == pytest.approx(expected[f"eval_{figure}"], nan_ok=True), figure
        alone_rows = read_jsonl(tmp_path / name / "trajectories/eval.jsonl")
        assert [each for each in rows if each["dataset"] == name] == [{**each, "dataset": name} for each in alone_rows]
    assert logs["eval_easy_reward"] != logs["eval_far_away_reward"] and "eval_reward" not in logs
    logged = [{name for name in event if name.endswith("_reward")} for event in trainer.state.log_history]
    assert logged == [{"eval_easy_reward"}, {"eval_far_away_reward"}]

    # without images, and transformers' own ways: a dictionary, a data set with a prefix
    trainer.evaluate(metric_key_prefix=BLIND)
    logged = [{name for name in event if name.endswith("_reward")} for event in trainer.state.log_history]
    assert logged[2:] == [{"blind_easy_reward"}, {"blind_far_away_reward"}]
    blind = read_jsonl(tmp_path / "named/trajectories/blind.jsonl")
    assert [each["dataset"] for each in blind] == ["easy"] * 2 * 4 + ["far_away"] * 5 * 4
    assert "eval_reward" in alone.evaluate()
    assert "eval_easy_reward" in alone.evaluate(named_sets())
    assert "test_reward" in alone.evaluate(questions(3), metric_key_prefix="test")


def test_the_best_model_is_chosen_by_one_of_several_sets(tiny_model, tmp_path):
    better = "eval_far_away_rewards/long/mean"
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True}
    saving |= {"metric_for_best_model": better, "greater_is_better": True}
    trainer = make_trainer(tiny_model, tmp_path, eval_dataset=named_sets(), **saving)
    trainer.train()
    values = [event[better] for event in trainer.state.log_history if better in event]
    assert len(values) == 2 and trainer.state.best_metric == max(values)


@pytest.mark.parametrize("metric", ["eval_reward", "loss"])
def test_a_best_model_by_a_figure_of_no_set_is_refused(metric):
    name = metric.removeprefix("eval_")
    line = f"^metric_for_best_model: {metric} is of no evaluation set; eval_easy_{name} or eval_far_away_{name} would"
    with pytest.raises(Mistake, match=line):
        check_best(metric, named_sets(), ["accuracy_reward"])


@pytest.mark.parametrize("metric", ["accuracy", "eval_accuracy_reward", "rewards/accuracy/mean", "rewards/accuracy"])
def test_a_reward_in_other_words_than_the_log_is_refused_before_a_step(metric):
    line = f"^metric_for_best_model: no evaluation has {metric}; they have reward, rewards/accuracy_reward/mean"
    with pytest.raises(Mistake, match=line):
        check_best(metric, questions(1), ["accuracy_reward"])
    check_best("eval_rewards/accuracy_reward/mean", questions(1), ["accuracy_reward"])
    check_best("my_figure", questions(1), ["accuracy_reward"])
    check_best("eval_reward", questions(1), ["reward"])  # a function of this name, and the weighted sum


def test_a_best_model_by_a_figure_that_no_evaluation_has_is_one_line(tiny_model, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(tiny_model, tmp_path, eval_dataset=questions(2), metric_for_best_model="my_figure", **saving)
    with pytest.raises(Mistake, match=r"^metric_for_best_model: no evaluation has my_figure; they have .*eval_reward,"):
        trainer.train()


def test_an_evaluation_of_which_a_reward_says_nothing_is_not_the_best(tiny_model, tmp_path):
    """Its figure is no number, as that of `consistency(among_right=True)` before anything is right."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True}
    only_unknown = questions(4).select([3])
    better = "rewards/yes/mean"
    trainer = make_trainer(tiny_model, tmp_path, eval_dataset=only_unknown, metric_for_best_model=better, **saving)
    trainer.train()
    figures = [event[f"eval_{better}"] for event in trainer.state.log_history if f"eval_{better}" in event]
    assert figures == [None, None] and trainer.state.best_model_checkpoint is None


def test_supervised_training_tells_several_sets_apart(tiny_model, tmp_path):
    """The same of TRL's metrics of SFT, on texts."""
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 1, "gradient_checkpointing": False}
    answer = [{"role": "assistant", "content": "yes"}]
    data = Dataset.from_list([{"prompt": each["prompt"], "completion": answer} for each in questions(4)])
    sets = {"a": data.select([0]), "b": data.select([1, 2, 3])}
    args = SFTConfig(str(tmp_path), max_length=None, **settings)
    trainer = Qwen2VLSFTTrainer(str(tiny_model), args, train_dataset=data, eval_dataset=sets)
    logs = trainer.evaluate()
    assert {"eval_a_entropy", "eval_b_entropy", "eval_a_mean_token_accuracy"} <= logs.keys()
    assert "eval_entropy" not in logs and logs["eval_a_entropy"] != logs["eval_b_entropy"]


WORKER = """
import json, sys
sys.path.insert(0, {tests!r})
from test_heldout import make_trainer
trainer = make_trainer({model!r}, {output!r}, per_device_eval_batch_size=4, num_generations_eval=2)
logs = trainer.evaluate()
if trainer.is_world_process_zero():
    json.dump(logs, open({output!r} + "/logs.json", "w"))
"""


@pytest.mark.distributed
def test_two_processes_give_the_figures_of_one(tiny_model, quick_python, tmp_path):
    """Five questions, twice each, over two ranks with batches of four: the ranks get more, and count five."""
    logs = []
    for processes in ("1", "2"):
        output = tmp_path / processes
        output.mkdir()
        script = output / "worker.py"
        values = {"tests": str(REPO_ROOT / "tests"), "model": str(tiny_model), "output": str(output)}
        script.write_text(WORKER.format(**values))
        launch = [quick_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        env = launch_env(tiny_model, output, output, OMP_NUM_THREADS="1")
        subprocess.run([*launch, str(script)], env=env, check=True)
        assert len(read_jsonl(output / "trajectories/eval.jsonl")) == 5 * 2
        logs.append(json.loads((output / "logs.json").read_text()))
    for name in FIGURES:
        assert logs[0][f"eval_{name}"] == pytest.approx(logs[1][f"eval_{name}"], rel=1e-4), name
