"""Held-out figures are over questions, each once, whatever the batches and processes that they come in."""

import json
import subprocess

import numpy as np
import pytest
from datasets import Dataset

from open_r1.heldout import held_out_figures
from open_r1.prompts import REPO_ROOT
from open_r1.trainer import Qwen2VLGRPOTrainer
from support import launch_env, make_config, read_jsonl

FIGURES = ("reward", "reward_std", "rewards/long/mean", "rewards/yes/mean", "completions/mean_length", "kl", "entropy")


def long(completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def yes(completions, answer, **kwargs):
    return [None if each == "unknown" else float(each == "yes") for each in answer]


def questions(count: int) -> Dataset:
    answers = ["yes" if row == 1 else "unknown" if row == 3 else "no" for row in range(count)]
    prompts = [[{"role": "user", "content": f"Is it {row}?"}] for row in range(count)]
    return Dataset.from_dict({"prompt": prompts, "answer": answers})


def make_trainer(model, output, **changes) -> Qwen2VLGRPOTrainer:
    args = make_config(output, **{"eval_strategy": "steps", "max_completion_length": 6, **changes})
    data = questions(5)
    return Qwen2VLGRPOTrainer(str(model), [long, yes], args, train_dataset=data, eval_dataset=data)


def row(reward, other, length, ended):
    return {"rewards": {"a": reward, "b": other}, "length": length, "ended": ended}


def test_the_figures_of_a_few_rows():
    rows = [row(1.0, None, 4, True), row(3.0, 1.0, 8, False), row(0.0, None, 6, True), row(None, None, 2, True)]
    figures = held_out_figures(rows, [1.0, 2.0], group_size=2)
    assert figures["reward"] == pytest.approx((1 + 5 + 0) / 3)  # a row without any reward has no part in it
    assert figures["rewards/a/mean"] == pytest.approx(4 / 3) and figures["rewards/b/mean"] == 1
    assert figures["reward_std"] == pytest.approx(np.std([1, 5, 0], ddof=1))
    assert figures["completions/mean_length"] == 5 and figures["completions/max_length"] == 8
    assert figures["completions/clipped_ratio"] == 0.25
    assert figures["completions/mean_terminated_length"] == 4 and figures["completions/min_terminated_length"] == 2


@pytest.mark.parametrize("generations", [1, 2])
def test_every_batch_size_gives_the_figures_of_one_batch(generations, tiny_model, tmp_path):
    """Greedy, so that the completions are the same. TRL's would be the means of uneven batches' means."""
    logs = []
    for batch in (4, 10):
        trainer = make_trainer(
            tiny_model,
            tmp_path / str(batch),
            per_device_eval_batch_size=batch,
            num_generations_eval=generations,
            generation_kwargs={"do_sample": False},
        )
        logs.append(trainer.evaluate())
        rows = read_jsonl(tmp_path / str(batch) / "trajectories/eval.jsonl")
        assert len(rows) == 5 * generations
        assert [each["group"] for each in rows] == [index // generations for index in range(len(rows))]
        assert logs[-1]["eval_rewards/yes/mean"] == pytest.approx(1 / 4)
        assert logs[-1]["eval_rewards/long/mean"] == pytest.approx(np.mean([each["length"] for each in rows]))
        trainer.evaluate()  # and a second one starts from nothing
        assert len(read_jsonl(tmp_path / str(batch) / "trajectories/eval.jsonl")) == 2 * 5 * generations
    for name in FIGURES:
        assert logs[0][f"eval_{name}"] == pytest.approx(logs[1][f"eval_{name}"], rel=1e-4), name
    assert "eval_tokens" not in logs[0]


WORKER = """
import json, sys
sys.path.insert(0, {tests!r})
from test_heldout import make_trainer
trainer = make_trainer({model!r}, {output!r}, per_device_eval_batch_size=4, num_generations_eval=int({generations!r}),
                       generation_kwargs={{"do_sample": False}})
logs = trainer.evaluate()
if trainer.is_world_process_zero():
    json.dump(logs, open({output!r} + "/logs.json", "w"))
"""


@pytest.mark.distributed
@pytest.mark.parametrize("generations", [1, 2])
def test_two_processes_give_the_figures_of_one(generations, tiny_model, quick_python, tmp_path):
    """Five questions over two ranks with batches of four: the ranks get eight, and count five."""
    logs = []
    for processes in ("1", "2"):
        output = tmp_path / processes
        output.mkdir()
        script = output / "worker.py"
        values = {"tests": str(REPO_ROOT / "tests"), "model": str(tiny_model), "output": str(output)}
        script.write_text(WORKER.format(**values, generations=generations))
        launch = [quick_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        env = launch_env(tiny_model, output, output, OMP_NUM_THREADS="1")
        subprocess.run([*launch, str(script)], env=env, check=True)
        assert len(read_jsonl(output / "trajectories/eval.jsonl")) == 5 * generations
        logs.append(json.loads((output / "logs.json").read_text()))
    for name in FIGURES:
        assert logs[0][f"eval_{name}"] == pytest.approx(logs[1][f"eval_{name}"], rel=1e-4), name
