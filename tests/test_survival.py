"""Runs that survive: a killed run, continued, ends as an undisturbed one; half-written checkpoints do not count."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import ModelConfig

from open_r1 import checkpoints
from open_r1 import trainer as trainer_module
from open_r1.callbacks import add_run_callbacks
from open_r1.checkpoints import (
    MANIFEST,
    CompleteCheckpoints,
    copy_model,
    find_defect,
    last_complete_checkpoint,
    resolve_checkpoint,
    seal,
)
from open_r1.data import DataArguments, load_dataset
from open_r1.modeling import load_model, load_processor
from open_r1.prompts import REPO_ROOT
from open_r1.trainer import Qwen2VLGRPOTrainer
from support import launch_env, load_weights, make_config, read_jsonl, run_grpo, vowel_share

STEPS = 16
# Where a run of one process is killed, each at a seeded moment: between the micro-batches of a step, before and after
# its update, with half a file of a checkpoint written, before its seal, with a rollout sampled or half written down.
PLACES = ("substep", "update", "checkpoint file", "seal", "reward", "trajectories")


def make_checkpoint(folder: Path, step: int, is_complete: bool = True) -> Path:
    """A folder that looks like a checkpoint."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "global_step/optim.pt").write_bytes(b"state")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if is_complete:
        seal(checkpoint)
    return checkpoint


def test_half_written_checkpoints_are_reported_and_passed_over(tmp_path, capsys):
    assert last_complete_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 11, 12):
        make_checkpoint(tmp_path, step, is_complete=step != 12)
    (tmp_path / "checkpoint-11/global_step/optim.pt").unlink()
    (tmp_path / "checkpoint-10/model.safetensors").write_bytes(b"weigh")
    assert resolve_checkpoint("auto", str(tmp_path)) == str(tmp_path / "checkpoint-9")
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/checkpoint-12: passed over, half-written (no {MANIFEST})",
        f"{tmp_path}/checkpoint-11: passed over, global_step/optim.pt is missing",
        f"{tmp_path}/checkpoint-10: passed over, model.safetensors has 5 bytes instead of 7",
    ]
    assert resolve_checkpoint("none", str(tmp_path)) is None
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint: no folder elsewhere"):
        resolve_checkpoint("elsewhere", str(tmp_path))


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path):
    args = make_config(tmp_path, save_total_limit=2)
    callback = CompleteCheckpoints(args)
    assert args.save_total_limit is None  # the trainer itself deletes nothing
    for step in (1, 2, 3, 5):
        make_checkpoint(tmp_path, step, is_complete=step != 3)
    callback.on_train_begin(args, TrainerState(global_step=2, is_world_process_zero=True), TrainerControl())
    assert find_defect(tmp_path / "checkpoint-5")  # this run is going to write over it
    make_checkpoint(tmp_path, 4, is_complete=False)
    state = TrainerState(global_step=4, is_world_process_zero=True)
    state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    callback.on_save(args, state, TrainerControl())
    left = {path.name: find_defect(path) is None for path in tmp_path.glob("checkpoint-*")}
    assert left == {"checkpoint-1": True, "checkpoint-2": True, "checkpoint-4": True, "checkpoint-5": False}


def test_the_model_of_a_finished_run_is_copied_without_the_state(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3)
    (checkpoint / "optimizer.pt").touch()
    copy_model(str(checkpoint), str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "model.safetensors", "trainer_state.json"}


def die() -> None:
    """Be gone at once, as by the kernel's out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)


class DieInStep(TrainerCallback):
    """Kill the process at the n-th of a kind of moment inside a step."""

    def __init__(self, place: str, count: int):
        self.place, self.count = place, count

    def reached(self, place: str) -> None:
        self.count -= place == self.place
        if place == self.place and self.count <= 0:
            die()

    def on_substep_end(self, *args, **kwargs):
        self.reached("substep")

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.reached("update")


def train(model: Path, data: Path, output: Path, place: str | None = None, count: int = 1) -> None:
    """Start or continue a run of `STEPS` steps that saves after every second; it dies at the count-th `place`."""
    moments = DieInStep(place or "", count)
    write_file, write_rows, write_seal = torch.save, trainer_module.append_rows, seal

    def save_half(value, path, *args, **kwargs):
        write_file(value, path, *args, **kwargs)
        if place == "checkpoint file":
            os.truncate(path, os.path.getsize(path) // 2)
            moments.reached(place)

    def append_half(path, rows):
        rows = list(rows)
        if place == "trajectories" and moments.count == 1:
            write_rows(path, rows[: len(rows) // 2])
            with path.open("a") as file:
                file.write('{"step": 1, "pro')
        moments.reached("trajectories")
        write_rows(path, rows)

    def reward(completions, **kwargs):
        moments.reached("reward")
        return vowel_share(completions)

    torch.save, trainer_module.append_rows = save_half, append_half
    checkpoints.seal = lambda checkpoint: (moments.reached("seal"), write_seal(checkpoint))
    processor = load_processor(model, chat_template="base", max_pixels=12544)
    args = make_config(
        output, max_steps=STEPS, save_strategy="steps", save_steps=2, save_total_limit=1, disable_tqdm=True
    )
    trainer = Qwen2VLGRPOTrainer(
        model=load_model(model, dtype="float32"),
        reward_funcs=reward,
        args=args,
        train_dataset=load_dataset(data, processor),
        processing_class=processor,
        callbacks=[moments],
    )
    trainer.add_callback(CompleteCheckpoints(args))
    add_run_callbacks(trainer, "grpo", DataArguments(str(data)), ModelConfig(str(model)))
    trainer.train(resume_from_checkpoint=resolve_checkpoint("auto", str(output)))
    trainer.save_model(str(output))


@pytest.mark.heavy
def test_one_process_killed_at_six_moments(tmp_path, tiny_model, examples_json, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")  # imports once, so that a start takes a second
    context.set_forkserver_preload(["open_r1.trainer", "deepspeed"])

    def start(output: Path, *death: object) -> int:
        process = context.Process(target=train, args=(tiny_model, examples_json, output, *death))
        process.start()
        process.join(timeout=120)
        return process.exitcode

    assert start(tmp_path / "whole") == 0
    rng = random.Random(0)
    for place in rng.sample(PLACES, len(PLACES)):
        assert start(tmp_path / "killed", place, rng.randint(1, 2)) == -signal.SIGKILL, place
    assert start(tmp_path / "killed") == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.heavy
def test_two_processes_under_zero2_killed_at_four_moments(tmp_path, tiny_model, examples_json):
    """The launcher and its processes at once, at a random time of their training."""

    def start(output: Path) -> subprocess.Popen:
        return subprocess.Popen(
            ["sh", str(REPO_ROOT / "src/open-r1-multimodal/run_grpo_SAT.sh"), *arguments],
            env=launch_env(tiny_model, examples_json, output, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1"),
            stdout=(tmp_path / "log").open("a"),
            stderr=subprocess.STDOUT,
        )

    def wait_for_rollout(process: subprocess.Popen, output: Path, since: float) -> None:
        trajectories = output / "trajectories/train.jsonl"
        deadline = time.monotonic() + 120
        while not (trajectories.exists() and trajectories.stat().st_mtime > since):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)

    arguments = ["--max_steps", str(STEPS), "--save_steps", "2", "--save_total_limit", "2"]
    arguments += ["--reward_funcs", "support:vowel_share", "--learning_rate", "1e-3"]
    process = start(tmp_path / "whole")
    wait_for_rollout(process, tmp_path / "whole", since=0)
    began = time.time()
    assert process.wait() == 0, (tmp_path / "log").read_text()[-3000:]
    duration = (tmp_path / "whole/trajectories/train.jsonl").stat().st_mtime - began

    rng = random.Random(0)
    for _ in range(4):
        since = time.time()
        process = start(tmp_path / "killed")
        wait_for_rollout(process, tmp_path / "killed", since)
        time.sleep(rng.uniform(0, duration / 4))
        kill_processes_naming(str(tmp_path / "killed"))
        assert process.wait() == -signal.SIGKILL
    assert start(tmp_path / "killed").wait() == 0, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "log").read_text().count("resuming from") >= 3
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.heavy
def test_a_finished_run_takes_no_further_step(tmp_path, tiny_model, examples_json):
    """transformers, resumed at its last step, takes one more; here the model is only put in place again."""
    arguments = ["--max_steps", "1", "--save_steps", "1"]
    for attempt in range(2):
        result = run_grpo(tiny_model, examples_json, tmp_path / "out", *arguments, NUM_PROCESSES="1")
        assert result.returncode == 0, result.stderr[-3000:]
        assert ("nothing left to do" in result.stdout) == bool(attempt)
        weights = load_weights(tmp_path / "out")
        (tmp_path / "out/model.safetensors").unlink() if not attempt else None
    assert {row["step"] for row in read_jsonl(tmp_path / "out/trajectories/train.jsonl")} == {1}
    saved = load_weights(tmp_path / "out/checkpoint-1")
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


def kill_processes_naming(path: str) -> None:
    """SIGKILL for the launcher and its workers, which are in sessions of their own: all that name the test's folder."""
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended while we looked
            if path.encode() in cmdline.read_bytes():
                os.kill(int(cmdline.parent.name), signal.SIGKILL)


def assert_equal_runs(whole: Path, killed: Path) -> None:
    """The same weights, bit for bit, the same trajectories and the same log, every step once; one start."""
    expected, weights = load_weights(whole), load_weights(killed)
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    rows = read_jsonl(whole / "trajectories/train.jsonl")
    assert rows and read_jsonl(killed / "trajectories/train.jsonl") == rows
    logs = [
        [(log["step"], log["loss"], log["reward"]) for log in read_jsonl(run / "log.jsonl") if "loss" in log]
        for run in (whole, killed)
    ]
    assert logs[0] == logs[1] and [step for step, *_ in logs[0]] == list(range(1, STEPS + 1))
    record = json.loads((killed / "run.json").read_text())
    first = read_jsonl(killed / "log.jsonl")[0]["time"]
    assert abs(datetime.fromisoformat(record["started"]).timestamp() - first) < 60 and record["max_steps"] == STEPS
    assert [path.name for path in killed.glob("checkpoint-*")] == [path.name for path in whole.glob("checkpoint-*")]
