"""Runs that survive: a killed run, continued, ends as an undisturbed one; half-written checkpoints do not count."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import ModelConfig

from open_r1 import grpo
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.running import checkpoints
from open_r1.running.callbacks import add_run_callbacks
from open_r1.running.checkpoints import (
    MANIFEST,
    CompleteCheckpoints,
    check_split,
    copy_model,
    final_checkpoint,
    find_defect,
    has_begun,
    is_finished,
    last_complete_checkpoint,
    resolve_checkpoint,
    seal,
)
from open_r1.running.data import DataArguments
from open_r1.running.entry import Settings, find_checkpoint, finish
from open_r1.running.provenance import all_arguments, check_same_run
from open_r1.settings.processes import Launch
from open_r1.trainer import recorder
from support import (
    launch_env,
    load_weights,
    make_config,
    make_trainer,
    processes_naming,
    read_jsonl,
    run_grpo,
    write_examples,
)

STEPS = 16
# Where a run of one process is killed: between the micro-batches of a step, with half a file of a checkpoint written,
# before its seal, with a rollout half written down.
PLACES = ("substep", "checkpoint file", "seal", "trajectories")


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


def test_a_manifest_that_lists_no_files(tmp_path):
    """An empty one is what a full disk leaves; one of another kind ends the run before it starts anew."""
    checkpoint = make_checkpoint(tmp_path, 3)
    (checkpoint / MANIFEST).write_text("\0\0")
    assert resolve_checkpoint("auto", str(tmp_path)) is None
    (checkpoint / MANIFEST).write_text("[1]")
    with pytest.raises(Mistake, match=f"checkpoint-3: {MANIFEST} lists no files; delete the folder"):
        resolve_checkpoint("auto", str(tmp_path))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_over_them(tmp_path):
    for step in (3, 4, 5):
        make_checkpoint(tmp_path, step, is_complete=step != 5)
        (tmp_path / f"checkpoint-{step}/global_step/optim.pt").unlink()  # to save space
    with pytest.raises(
        Mistake, match=r"/checkpoint-4: global_step/optim\.pt is missing, and no other checkpoint is whole"
    ):
        resolve_checkpoint("auto", str(tmp_path))


def test_a_checkpoint_that_is_named_must_be_one(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3)
    assert resolve_checkpoint(str(checkpoint), "elsewhere") == str(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    for name, reason in (
        ("nowhere", "no folder nowhere; auto goes on from the newest one in OUTPUT$"),
        ("checkpoint-3", "no folder checkpoint-3; did you mean .*/checkpoint-3\\?$"),
        (str(tmp_path), ".* is no checkpoint of a run"),
        (str(checkpoint), r".*3: model\.safetensors is missing"),
    ):
        with pytest.raises(FileNotFoundError, match=f"^resume_from_checkpoint: {reason}"):
            resolve_checkpoint(name, str(tmp_path))


def test_a_checkpoint_of_another_run_is_no_leave_to_write_over_this_one(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "first", 3)
    make_checkpoint(tmp_path / "second", 5)
    with pytest.raises(Mistake, match=r"second: holds an earlier run \(checkpoint-5\)"):
        resolve_checkpoint(str(checkpoint), str(tmp_path / "second"))
    make_checkpoint(tmp_path / "first", 5)  # its own run may go back
    assert resolve_checkpoint(str(checkpoint), str(tmp_path / "first")) == str(checkpoint)


@pytest.mark.parametrize("state", ["", "{]", "[]", '{"zebra": 1}', '{"global_step": "x"}', '{"epoch": NaN}', "[" * 999])
def test_a_damaged_state_is_one_line(state, tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3)
    (checkpoint / "trainer_state.json").write_text(state)
    with pytest.raises(Mistake, match=r"3/trainer_state\.json: .*; resume from another checkpoint, or start"):
        is_finished(str(checkpoint), make_config(tmp_path, max_steps=6))


def test_a_launch_loads_only_what_it_would_have_written(tmp_path):
    """The names are DeepSpeed's and transformers'; test_a_launch_that_cannot_continue has real ones."""
    files = {
        "alone": ["model.safetensors"],
        "ddp": ["optimizer.pt", "scheduler.pt"],
        "zero2": ["global_step1/mp_rank_00_model_states.pt", "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        "zero3": [
            f"global_step1/zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
            for rank in (0, 1)
            for kind in ("model", "optim")
        ],
    }
    for folder, names in files.items():
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
    saved = {folder: Launch.of_checkpoint(tmp_path / folder) for folder in files}
    assert saved == {"alone": None, "ddp": Launch(0, 0), "zero2": Launch(1, 2), "zero3": Launch(2, 3)}
    for folder, launch in (("ddp", Launch(4, 0)), ("zero2", Launch(1, 2)), ("zero3", Launch(2, 3))):
        check_split(str(tmp_path / folder), launch)
    for folder, launch, reason in (
        ("alone", Launch(1, 0), "holds the model without optimizer and schedule"),
        ("ddp", Launch(1, 2), "was written by a launch without ZeRO, and this is 1 process under ZeRO-2"),
        ("zero2", Launch(2, 2), "was written by 1 process under ZeRO-2, and this is 2 processes under ZeRO-2"),
        ("zero3", Launch(2, 2), "was written by 2 processes under ZeRO-3, and this is 2 processes under ZeRO-2"),
    ):
        with pytest.raises(ValueError, match=f"{folder}: {reason}.*in another OUTPUT"):
            check_split(str(tmp_path / folder), launch)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_file_counts_in_place_of_the_launch(stage, tmp_path, monkeypatch):
    """`--deepspeed FILE`, beside a checkpoint of ZeRO-2."""
    # where transformers keeps the file: the next test's models are not of it
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", None)
    checkpoint, file = make_checkpoint(tmp_path, 1, is_complete=False), tmp_path / "zero.json"
    (checkpoint / "global_step/zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    args = make_config(tmp_path, deepspeed=str(file), resume_from_checkpoint=str(checkpoint))
    refused = pytest.raises(Mistake, match="written by 1 process under ZeRO-2, and this is 1 process under ZeRO-3")
    with refused if stage == 3 else contextlib.nullcontext():
        assert find_checkpoint(grpo.COMMAND, Settings(None, args, None), Launch(1, 0)) == str(checkpoint)


def test_stages_of_the_launches_we_offer(monkeypatch, tmp_path):
    folder = REPO_ROOT / "src/open-r1-multimodal/configs"
    stages = {path.stem: Launch.of_config(str(path), 2).zero_stage for path in folder.glob("*.yaml")}
    assert stages == {"ddp": 0, "zero2": 2, "cpu": 2, "zero3": 3}
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')  # DeepSpeed's own file
    launch = f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {tmp_path}/ds.json}}\n"
    (tmp_path / "launch.yaml").write_text(launch)
    assert Launch.of_config(str(tmp_path / "launch.yaml"), 2) == Launch(2, 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Launch.of_this_process() == Launch(4, 0)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert Launch.of_this_process() == Launch(4, 3)


def test_another_run_in_the_folder_is_not_continued(tmp_path, tiny_model):
    """What is learned and how must be the same; how long, and what is saved and logged, may change."""

    def record(model: str = str(tiny_model), processes: int = 1, command: str = "grpo", **changes: object) -> dict:
        arguments = all_arguments(DataArguments("data.json"), make_config(tmp_path, **changes), ModelConfig(model))
        return {"command": command, "world_size": processes, "arguments": arguments}

    check_same_run(tmp_path, record())  # no run yet
    (tmp_path / "run.json").write_text(json.dumps(record()))
    for changes in ({"max_steps": 9, "save_steps": 3, "logging_steps": 5}, {"gradient_checkpointing": True}):
        check_same_run(tmp_path, record(**changes))
    halved = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    check_same_run(tmp_path, record(processes=2, **halved))  # as many completions on two processes
    check_same_run(tmp_path, record(os.path.relpath(tiny_model)))
    for other, name in (
        (record("other/model"), "model_name_or_path"),
        (record(learning_rate=1.0), "learning_rate"),
        (record(num_generations=2), "num_generations"),
        (record(papo_coef=0.01), "papo_coef"),
        (record(generation_kwargs={"min_p": 0.1}), "generation_kwargs"),
        (record(steps_per_generation=4), "examples_per_rollout"),
        (record(processes=2), "examples_per_step"),
        (record(command="sft"), "command"),
    ):
        with pytest.raises(ValueError, match=rf"{tmp_path}: holds a run with {name} .*, not .*; choose another OUTPUT"):
            check_same_run(tmp_path, other)
    (tmp_path / "run.json").write_text("{")
    check_same_run(tmp_path, record("other/model"))  # nothing to compare with


def test_a_run_of_epochs_is_finished_too(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 6)
    state = {"global_step": 6, "max_steps": 6, "num_train_epochs": 2, "epoch": 2.0}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert is_finished(str(checkpoint), make_config(tmp_path, max_steps=-1, num_train_epochs=2))
    assert not is_finished(str(checkpoint), make_config(tmp_path, max_steps=-1, num_train_epochs=3))
    assert is_finished(str(checkpoint), make_config(tmp_path, max_steps=6))
    assert not is_finished(str(checkpoint), make_config(tmp_path, max_steps=7))
    # cut in its second epoch by max_steps, of which transformers counts epochs up
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "epoch": 1.2}))
    assert not is_finished(str(checkpoint), make_config(tmp_path, max_steps=-1, num_train_epochs=2))


def test_a_finished_run_leaves_its_best_weights(tmp_path):
    """Also in a folder that was moved; and what is not whole is not put in their place."""
    last, best = make_checkpoint(tmp_path, 6), make_checkpoint(tmp_path, 2)
    state = {"global_step": 6, "best_model_checkpoint": "elsewhere/checkpoint-2"}
    (last / "trainer_state.json").write_text(json.dumps(state))
    args = make_config(tmp_path)
    assert final_checkpoint(str(last), args) == last
    args.load_best_model_at_end = True
    assert final_checkpoint(str(last), args) == best
    (best / "model.safetensors").unlink()
    with pytest.raises(Mistake, match=r"2: the best checkpoint model\.safetensors is missing; bring it back"):
        final_checkpoint(str(last), args)


def test_images_may_break_once_there_is_a_checkpoint(tmp_path):
    """A run that was killed before its first one starts anew, and wants them whole."""
    args = make_config(tmp_path, resume_from_checkpoint="auto")
    (tmp_path / "log.jsonl").write_text("{}")
    make_checkpoint(tmp_path, 1, is_complete=False)
    assert not has_begun(args)
    make_checkpoint(tmp_path, 2)
    assert has_begun(args)


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    """Of the best one the folder may have been named in other words."""
    monkeypatch.chdir(tmp_path.parent)
    args = make_config(tmp_path, save_total_limit=2)
    callback = CompleteCheckpoints(args)
    assert args.save_total_limit is None  # the trainer itself deletes nothing
    for step in (1, 2, 3, 5):
        make_checkpoint(tmp_path, step, is_complete=step != 3)
    callback.on_train_begin(args, TrainerState(global_step=2, is_world_process_zero=True), TrainerControl())
    assert find_defect(tmp_path / "checkpoint-5")  # this run is going to write over it
    make_checkpoint(tmp_path, 4, is_complete=False)
    state = TrainerState(global_step=4, is_world_process_zero=True)
    state.best_model_checkpoint = f"{tmp_path.name}/checkpoint-1"
    callback.on_save(args, state, TrainerControl())
    left = {path.name: find_defect(path) is None for path in tmp_path.glob("checkpoint-*")}
    assert left == {"checkpoint-1": True, "checkpoint-2": True, "checkpoint-4": True, "checkpoint-5": False}


@pytest.fixture
def linked(tmp_path):
    """A run whose checkpoint 4 was moved to another disk, and its place there."""
    make_checkpoint(tmp_path / "run", 2)
    moved = make_checkpoint(tmp_path / "disk", 4)
    (tmp_path / "run/checkpoint-4").symlink_to(moved)
    return tmp_path / "run", moved


def test_a_run_goes_on_from_a_link_and_not_past_one_that_leads_nowhere(linked):
    run, moved = linked
    assert resolve_checkpoint("auto", str(run)) == str(run / "checkpoint-4")
    moved.rename(moved.with_name("elsewhere"))
    for wanted in ("auto", str(run / "checkpoint-4")):
        with pytest.raises(Mistake):
            resolve_checkpoint(wanted, str(run))
    (run / "checkpoint-4").unlink()
    assert resolve_checkpoint("auto", str(run)) == str(run / "checkpoint-2")


def test_what_a_link_leads_to_is_neither_deleted_nor_written(linked, capsys):
    run, moved = linked
    args = make_config(run, save_total_limit=1)
    (run / "checkpoint-7").symlink_to("gone")
    callback = CompleteCheckpoints(args)
    callback.on_train_begin(args, TrainerState(global_step=5, is_world_process_zero=True), TrainerControl())
    make_checkpoint(run, 6, is_complete=False)
    callback.on_save(args, TrainerState(global_step=6, is_world_process_zero=True), TrainerControl())
    assert [path.name for path in run.iterdir()] == ["checkpoint-6"]
    assert find_defect(moved) is None
    assert f"checkpoint-4: removed, a link; {moved}, where it led, is left as it is" in capsys.readouterr().out


def test_the_model_of_a_finished_run_is_copied_without_the_state(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3)
    (checkpoint / "optimizer.pt").touch()
    copy_model(str(checkpoint), str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "model.safetensors", "trainer_state.json"}


def test_a_finished_run_says_that_it_is_not_uploaded_again(tmp_path, capsys):
    args = make_config(tmp_path, push_to_hub=True, hub_model_id="me/tiny")
    finish(str(make_checkpoint(tmp_path, 2)), args)
    told = f"--push_to_hub: nothing was uploaded now; upload it with `hf upload me/tiny {tmp_path} . --exclude"
    assert told in capsys.readouterr().err


class Death(TrainerCallback):
    """Kills the process, as the kernel's out-of-memory killer does, at the n-th of a kind of moment."""

    def __init__(self, place: str, count: int):
        self.place, self.count = place, count

    def reached(self, place: str) -> None:
        self.count -= place == self.place
        if place == self.place and self.count <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_substep_end(self, *args, **kwargs):
        self.reached("substep")


def train(model: Path, data: Path, output: Path, place: str | None = None, count: int = 1) -> None:
    """Start or continue a run of `STEPS` steps that saves after every second; it dies at the count-th `place`."""
    moments = Death(place or "", count)
    write_file, write_rows, write_seal = torch.save, recorder.append_rows, seal

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

    torch.save, recorder.append_rows = save_half, append_half
    checkpoints.seal = lambda checkpoint: (moments.reached("seal"), write_seal(checkpoint))
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer = make_trainer(model, data, output, callbacks=[moments], max_steps=STEPS, disable_tqdm=True, **saving)
    trainer.add_callback(CompleteCheckpoints(trainer.args))
    add_run_callbacks(trainer, "grpo", DataArguments(str(data)), ModelConfig(str(model)))
    trainer.train(resume_from_checkpoint=resolve_checkpoint("auto", str(output)))
    trainer.save_model(str(output))


@pytest.mark.slow
def test_one_process_killed_at_four_moments(tmp_path, tiny_model, examples_json, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")  # imports once, so that a start takes a second
    context.set_forkserver_preload(["open_r1.trainer.trainer", "deepspeed"])

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


@pytest.mark.distributed
def test_two_processes_under_zero2_killed_after_a_checkpoint(tmp_path, tiny_model, examples_json, quick_python):
    """The launcher and its processes at once, in a step after the first whole checkpoint."""
    arguments = ["--max_steps", str(STEPS), "--save_steps", "2", "--save_total_limit", "2"]
    arguments += ["--reward_funcs", "support:vowel_share", "--learning_rate", "1e-3"]

    def start(output: Path) -> subprocess.Popen:
        env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHON": str(quick_python)}
        return subprocess.Popen(
            ["sh", str(REPO_ROOT / "src/open-r1-multimodal/run_grpo_SAT.sh"), *arguments],
            env=launch_env(tiny_model, examples_json, output, **env),
            stdout=(tmp_path / "log").open("a"),
            stderr=subprocess.STDOUT,
        )

    assert start(tmp_path / "whole").wait() == 0, (tmp_path / "log").read_text()[-3000:]
    process, deadline = start(tmp_path / "killed"), time.monotonic() + 120
    while last_complete_checkpoint(tmp_path / "killed") is None:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.02)
    time.sleep(random.Random(0).uniform(0, 1))
    process.kill()
    for worker in processes_naming(str(tmp_path / "killed")):  # in sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert start(tmp_path / "killed").wait() == 0, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "log").read_text().count("resuming from") == 1
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


# What ends a run of `faulty:reward`, in order: a pattern of its last line.
ENDS = (
    r"",  # the launcher: nobody is left to tell
    r"error: rank 0 of 2 was ended by SIGKILL",
    r"error: .*: takes no more, is the disk full\? \(.*File too large: .*train\.jsonl",
    r"error: .*: takes no more, is the disk full\? ",
)


@pytest.mark.nightly
def test_200_steps_with_five_faults(tmp_path, tiny_model, quick_python):
    """The same command, started again after every end: each step's completions are there once, and a model."""
    data, output = write_examples(tmp_path / "data"), tmp_path / "run"
    arguments = ["--max_steps", "200", "--save_steps", "20", "--save_total_limit", "2", "--logging_steps", "1"]
    arguments += ["--reward_funcs", "faulty:reward", "--max_completion_length", "4", "--completions_per_step", "8"]
    lines, printed = [], ""
    for end in (*ENDS, None):
        # A process that a launcher starts dies with it; those of the quick Python are a server's.
        python = sys.executable if end == "" else str(quick_python)
        result = run_grpo(tiny_model, data, output, *arguments, PYTHON=python, OMP_NUM_THREADS="1")
        assert "Traceback" not in result.stderr, result.stderr[-5000:]
        assert (result.returncode == 0) == (end is None), (end, result.returncode, result.stderr[-3000:])
        lines.append(result.stderr.strip().splitlines()[-1] if end else "")
        printed += result.stdout + result.stderr
    assert all(re.match(end, line) for end, line in zip(ENDS, lines[:-1], strict=True)), lines
    assert len(list((tmp_path / "faults").iterdir())) == 5
    assert printed.count("resuming from") == len(ENDS)
    rows = read_jsonl(output / "trajectories/train.jsonl")
    assert [row["step"] for row in rows] == [step for step in range(1, 201) for _ in range(8)]
    assert [log["step"] for log in read_jsonl(output / "log.jsonl") if "loss" in log] == list(range(1, 201))
    damaged = [row for row in rows if row["images"] == [str(data.parent / "images/5_0.png")]]
    assert {row["step"] > 170 for row in damaged if row["rewards"] == {"reward": None}} == {True}
    assert all(row["advantage"] == 0 for row in damaged if row["step"] > 172)
    assert "images/5_0.png: corrupt image; completions about it earn nothing" in printed
    assert all(weights.isfinite().all() for weights in load_weights(output).values())


@pytest.mark.distributed
def test_a_launch_that_cannot_continue_says_so(tmp_path, tiny_model, examples_json, quick_python):
    """In one line, before it starts; and the run is left as it was."""

    def launch(*arguments: str, **env: str) -> subprocess.CompletedProcess:
        arguments = ("--save_steps", "1", "--reward_funcs", "support:vowel_share", *arguments)
        return run_grpo(tiny_model, examples_json, tmp_path / "run", *arguments, PYTHON=str(quick_python), **env)

    assert launch("--max_steps", "1").returncode == 0
    before = (tmp_path / "run/run.json").read_bytes()
    for result, reason in (
        (
            launch("--max_steps", "2", NUM_PROCESSES="1"),
            "was written by 2 processes under ZeRO-2, and this is 1 process ",
        ),
        (launch("--max_steps", "1", "--beta", "0"), "run: holds a run with beta 0.04, not 0.0; choose"),
    ):
        assert result.returncode == 2 and result.stderr.startswith("error: "), result.stderr
        assert reason in result.stderr and result.stderr.count("\n") == 1
    assert (tmp_path / "run/run.json").read_bytes() == before and not (tmp_path / "run/checkpoint-2").exists()
    result = launch("--max_steps", "2", "--logging_steps", "2")
    assert result.returncode == 0 and "resuming from" in result.stdout, result.stderr[-3000:]


@pytest.mark.distributed
def test_without_zero_a_run_goes_on_with_other_processes(tmp_path, tiny_model, examples_json, quick_python):
    """The third step on one process is the one that two would have taken: prompts, rate and optimizer.

    The checkpoint that it comes from makes room for its own."""
    arguments = ("--save_steps", "1", "--reward_funcs", "support:vowel_share", "--learning_rate", "1e-3")
    arguments += ("--save_total_limit", "1")
    env = {"ACCELERATE_CONFIG": "ddp", "PYTHON": str(quick_python)}
    for name, steps, processes in (("whole", 3, 2), ("moved", 2, 2), ("moved", 3, 1)):
        result = run_grpo(
            *(tiny_model, examples_json, tmp_path / name, *arguments, "--max_steps", str(steps)),
            **env,
            NUM_PROCESSES=str(processes),
        )
        assert result.returncode == 0, result.stderr[-3000:]
    rows = [read_jsonl(tmp_path / name / "trajectories/train.jsonl") for name in ("whole", "moved")]
    assert [(row["step"], row["prompt"]) for row in rows[0]] == [(row["step"], row["prompt"]) for row in rows[1]]
    states = [torch.load(tmp_path / name / "checkpoint-3/optimizer.pt")["state"] for name in ("whole", "moved")]
    assert {float(state["step"]) for run in states for state in run.values()} == {3.0}


@pytest.mark.slow
def test_a_finished_run_takes_no_further_step(tmp_path, tiny_model, examples_json, quick_python):
    """transformers, resumed at its last step, takes one more; here the model is only put in place again."""
    arguments = ["--max_steps", "1", "--save_steps", "1"]
    env = {"NUM_PROCESSES": "1", "PYTHON": str(quick_python)}
    for attempt in range(2):
        result = run_grpo(tiny_model, examples_json, tmp_path / "out", *arguments, **env)
        assert result.returncode == 0, result.stderr[-3000:]
        assert ("nothing left to do" in result.stdout) == bool(attempt)
        weights = load_weights(tmp_path / "out")
        (tmp_path / "out/model.safetensors").unlink() if not attempt else None
    assert {row["step"] for row in read_jsonl(tmp_path / "out/trajectories/train.jsonl")} == {1}
    saved = load_weights(tmp_path / "out/checkpoint-1")
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.parametrize("how, lora", [("ddp", False), ("zero2", True), ("zero3", False)])
def test_the_best_model_is_the_one_at_the_end_of_a_launch(how, lora, tmp_path, tiny_model, examples_json, quick_python):
    """Also when the launch was stopped in between, so that DeepSpeed's files came back before."""
    arguments = ["--reward_funcs", "support:falling", "--learning_rate", "1e-2", "--eval_dataset_name"]
    arguments += [str(examples_json), "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    arguments += ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_reward"]
    arguments += ["--max_completion_length", "4", "--num_generations_eval", "1", "--max_prompt_length", "512"]
    arguments += ["--use_peft", "true", "--lora_target_modules", "all-linear"] if lora else []
    env = {"ACCELERATE_CONFIG": how, "PYTHON": str(quick_python), "OMP_NUM_THREADS": "1"}
    for steps in (2, 3):
        result = run_grpo(tiny_model, examples_json, tmp_path / "out", *arguments, "--max_steps", str(steps), **env)
        assert result.returncode == 0, result.stderr[-3000:]
    assert "resuming from" in result.stdout
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    final, best, last = (load_file(tmp_path / "out" / folder / name) for folder in ("", "checkpoint-1", "checkpoint-3"))
    assert all(torch.equal(final[key], best[key]) for key in best)
    assert not all(torch.equal(final[key], last[key]) for key in last)


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
