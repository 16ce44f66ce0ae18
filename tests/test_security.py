"""What is never trusted: checkpoints of others, the current folder, the folder of a run; and one owner of an output."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import TrainerState

from fake_run import row, write_run
from open_r1 import grpo
from open_r1.base.errors import REPO_ROOT, Mistake, run
from open_r1.base.locks import IN_USE, owned
from open_r1.evaluation import run as evaluation
from open_r1.reporting.page import write_report
from open_r1.reporting.runs import KnownImages, read_run
from open_r1.rewards import get_reward_funcs
from open_r1.running import entry
from open_r1.running.checkpoints import (
    LoadWeightsMixin,
    check_unused,
    deepspeed_classes,
    loading_no_code,
    resolve_checkpoint,
    seal,
)
from open_r1.running.data import store_image
from open_r1.running.entry import check_run
from open_r1.running.orphans import LAUNCHER
from support import make_trainer, run_grpo

LAUNCHES = REPO_ROOT / "src/open-r1-multimodal/configs"
PACKAGE = {"PYTHONPATH": str(REPO_ROOT / "src/open-r1-multimodal")}


def start(code: str, *arguments: object, **options: object) -> subprocess.Popen:
    """A Python that runs this code with our package on its path."""
    env = {**os.environ, **PACKAGE, **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=env, text=True, stdout=subprocess.PIPE, **options
    )


# --- checkpoints of others --------------------------------------------------------------------------------------


class Hostile:
    """A pickle of it runs a shell when it is loaded, which makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def refusal(file: Path, reason: str = r"it asks for \w+\.system, and could run code") -> str:
    """The whole line, as a pattern."""
    return f"{file}: not loaded: {reason}; resume from another checkpoint, or start anew in another OUTPUT"


def deepspeed_state() -> dict[str, object]:
    """One object of every kind that DeepSpeed's files hold under ZeRO-2 and 3, in 16 and in 32 bits."""
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scale = {"init_scale": 65536, "scale_window": 1000, "min_scale": 1, "delayed_shift": 2}
    return {
        "module": OrderedDict(weight=torch.arange(3.0)),
        "param_shapes": [OrderedDict(weight=torch.Size([3]))],
        "param_slice_mappings": [OrderedDict(weight=fragment_address(numel=3, start=0))],
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": CreateLossScaler(torch.float32, 1, False, None),
        "loss_scaler of fp16": CreateLossScaler(torch.float16, 0, True, {**scale, "consecutive_hysteresis": False}),
        "ds_config": {"zero_optimization": {"stage": 3}},
    }


def test_deepspeed_loads_objects_of_its_own_and_no_others(tmp_path):
    """With what reads a checkpoint's files for ZeRO-2 and 3; a launch does it in the test below."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    file, mark = tmp_path / "states.pt", tmp_path / "it_ran"
    state = deepspeed_state()
    torch.save(state, file)

    def load() -> dict:
        with loading_no_code(deepspeed_classes()):
            return TorchCheckpointEngine().load(str(file))

    loaded = load()
    assert {name: type(value) for name, value in loaded.items()} == {name: type(state[name]) for name in state}
    assert loaded["param_slice_mappings"] == state["param_slice_mappings"]
    assert vars(loaded["loss_scaler of fp16"]) == vars(state["loss_scaler of fp16"])
    for is_zip in (True, False):  # torch's format, and the one before it
        torch.save({**state, "client": Hostile(mark)}, file, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(Mistake, match=f"^{refusal(file)}$"):
            load()
    torch.save({"a": torch.zeros(99)}, file)
    for damaged in (b"\x80\x02no pickle", b"", file.read_bytes()[:600]):
        file.write_bytes(damaged)
        with pytest.raises(Mistake, match=refusal(file, "it is damaged, or no run saved it")):
            load()
    torch.save(Hostile(mark), file)
    assert not mark.exists()
    TorchCheckpointEngine().load(str(file))  # outside, as DeepSpeed wants it
    assert mark.exists()


class ByName:
    """Pickled as the attribute of a class, as Python 3.11.2 pickles the member of an enum."""

    def __init__(self, owner: type, name: str):
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple:
        return getattr, (self.owner, self.name)


def test_a_zero_stage_is_read_by_its_name_and_no_other_attribute(tmp_path):
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    file = tmp_path / "states.pt"
    torch.save(ByName(ZeroStageEnum, "gradients"), file)
    with loading_no_code(deepspeed_classes()):
        assert torch.load(file, weights_only=False) is ZeroStageEnum.gradients
    for owner, name in ((fragment_address, "__init__"), (ZeroStageEnum, "__class__")):
        torch.save(ByName(owner, name), file)
        with (
            pytest.raises(Mistake, match=refusal(file, "it asks for getattr, and could run code")),
            loading_no_code(deepspeed_classes()),
        ):
            torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "name, arguments", [("_prepare_for_training", [2, [], "x"]), ("_load_rng_state", ["x"]), ("_load_best_model", [])]
)
def test_wherever_a_trainer_loads_states_under_deepspeed_none_runs_code(name, arguments, tmp_path):
    """Also in the end, from the best checkpoint. The trainer's own methods ask for the unsafe unpickler here."""
    planted, mark = tmp_path / "states.pt", tmp_path / "it_ran"
    torch.save(Hostile(mark), planted)

    class Unsafe:
        is_deepspeed_enabled, is_fsdp_enabled = True, False
        state = TrainerState(best_model_checkpoint="x")

    setattr(Unsafe, name, lambda self, *arguments: torch.load(str(planted), weights_only=False))
    trainer = type("Guarded", (LoadWeightsMixin, Unsafe), {})()
    with pytest.raises(Mistake, match=f"^{refusal(planted)}$"):
        getattr(trainer, name)(*arguments)
    assert not mark.exists()


SHORT = {"max_completion_length": 2, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model, examples_json) -> Path:
    """One that a run of one process wrote."""
    output = tmp_path_factory.mktemp("run")
    trainer = make_trainer(tiny_model, examples_json, output, **SHORT, max_steps=1)
    trainer.train()
    return output / "checkpoint-1"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_of_a_checkpoint_that_would_run_code_ends_the_run(name, checkpoint, tiny_model, examples_json, tmp_path):
    planted = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, planted)
    torch.save(Hostile(tmp_path / "it_ran"), planted / name)
    seal(planted)  # whoever changes a file can list it, too
    trainer = make_trainer(tiny_model, examples_json, tmp_path, **SHORT, max_steps=2)
    with pytest.raises(Mistake, match=f"^{refusal(planted / name)}$"):
        trainer.train(resume_from_checkpoint=resolve_checkpoint("auto", str(tmp_path)))
    assert not (tmp_path / "it_ran").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.distributed
@pytest.mark.parametrize(
    "how, states", [pytest.param("cpu", "model_states", marks=pytest.mark.nightly), ("zero3", "optim_states")]
)
def test_a_launch_under_zero_ends_at_a_file_that_would_run_code(
    how, states, tmp_path, tiny_model, examples_json, quick_python
):
    """`cpu` is ZeRO-2. That both go on with files of their own is held by test_recipes.py."""
    arguments = ["--save_steps", "1", "--reward_funcs", "support:vowel_share", "--max_completion_length", "4"]
    env = {"ACCELERATE_CONFIG": how, "PYTHON": str(quick_python), "OMP_NUM_THREADS": "1"}

    def launch(steps: int) -> subprocess.CompletedProcess:
        return run_grpo(tiny_model, examples_json, tmp_path / "out", *arguments, "--max_steps", str(steps), **env)

    assert launch(1).returncode == 0
    planted = max(tmp_path.glob(f"out/checkpoint-1/global_step1/*{states}.pt"))  # of the last process that has one
    torch.save(Hostile(tmp_path / "it_ran"), planted)
    seal(tmp_path / "out/checkpoint-1")
    result = launch(2)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert re.fullmatch(f"error: {refusal(planted)}", result.stderr.splitlines()[-1])
    assert not (tmp_path / "it_ran").exists()


# --- a new run over an old one ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, kept_by",
    [
        ({}, ""),
        ({"run.json": "{}", "log.jsonl": "{}\n"}, ""),  # killed before its first checkpoint
        ({"model.safetensors": "weights"}, ""),  # a model to train, in the folder of its run
        ({"trajectories/train.jsonl": "{}\n"}, "none"),
        ({"checkpoint-3/complete.json": "{}"}, "none"),
        ({"model.safetensors": "weights", "trajectories/train.jsonl": "{}\n"}, "none auto"),
        ({"adapter_model.safetensors": "weights", "log.jsonl": "{}\n"}, "none auto"),
    ],
)
def test_a_new_run_writes_over_nothing_of_worth(tmp_path, files, kept_by):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for wanted in ("none", "auto"):
        if wanted not in kept_by:
            check_unused(tmp_path, wanted)
            continue
        with pytest.raises(ValueError, match=rf"{tmp_path}: holds an earlier run \(.*\), .*; choose another OUTPUT"):
            check_unused(tmp_path, wanted)


# --- one owner --------------------------------------------------------------------------------------------------

OWN = "import os, sys, time\nfrom open_r1.base.locks import owned\nwith owned(sys.argv[1]):\n    "


def test_a_second_run_is_told_who_is_there(tmp_path):
    told = rf"{tmp_path}: in use by process {os.getpid()} on .+ since 20.+; wait until it ends"
    with owned(tmp_path), pytest.raises(Mistake, match=told), owned(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with owned(tmp_path):  # free again
        pass


def test_the_lock_goes_with_its_process(tmp_path):
    """Also when a child of it lives on."""
    sleeper = "os.fork() or (print(os.getpid(), flush=True), time.sleep(99))\n    time.sleep(99)"
    holder = start(OWN + sleeper, tmp_path)
    child = int(holder.stdout.readline())
    with pytest.raises(Mistake, match=f"in use by process {holder.pid} on"), owned(tmp_path):
        pass
    holder.kill()
    holder.wait()
    os.kill(child, 0)  # it is there
    with owned(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)


def test_a_lock_is_not_taken_while_its_owner_deletes_it(tmp_path, monkeypatch):
    """The file that was locked is no longer the one at its path: another one is the lock."""
    lock = fcntl.flock
    taken = []

    def delete_first(file, operation):
        if not taken:
            (tmp_path / IN_USE).unlink()
        taken.append(file)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with owned(tmp_path):
        assert len(taken) == 2 and (tmp_path / IN_USE).exists()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with owned(tmp_path):
        pass
    told = capsys.readouterr().err
    assert told.startswith(f"{tmp_path}: nothing keeps a second run out") and told.count("\n") == 1


def test_the_main_process_owns_for_its_launch(tmp_path, monkeypatch):
    """Its workers come in beside it, lock nothing, and leave its lock where it is; another main process is kept out."""
    monkeypatch.setenv("RANK", "1")
    with owned(tmp_path):
        assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    with owned(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with owned(tmp_path):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(Mistake, match="in use by process"), owned(tmp_path):
            pass


@pytest.mark.parametrize("rank", ["", "x"])
def test_a_rank_that_was_left_in_the_environment_is_named(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(Mistake, match=f"^RANK: '{rank}' is no number of a process; unset it"), owned(tmp_path):
        pass


def test_a_training_whose_output_is_in_use_does_not_start(tmp_path, tiny_model, examples_json, monkeypatch):
    monkeypatch.setattr(entry, "quiet", lambda: None)
    arguments = ["--config", str(REPO_ROOT / "tests/data/grpo.yaml"), "--use_cpu", "true"]
    arguments += ["--model_name_or_path", str(tiny_model), "--dataset_name", str(examples_json)]
    arguments += ["--output_dir", str(tmp_path)]
    monkeypatch.setattr(entry, "find_checkpoint", lambda *_: pytest.fail("went on"))
    with owned(tmp_path):
        with pytest.raises(Mistake, match="in use by process"):
            check_run(grpo.COMMAND, arguments, str(LAUNCHES / "cpu.yaml"), 1)
        with pytest.raises(Mistake, match="in use by process"):
            entry.train(grpo.COMMAND, arguments)


def test_an_evaluation_whose_result_is_in_use_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda args: pytest.fail("went on"))
    asked = {"benchmark": "CV-Bench", "model_path": "org/model", "use_reasoning_prompt": True, "precomputed_json": None}
    args = Namespace(**asked, output_dir=tmp_path)
    result = evaluation.result_path(args)
    with owned(result, is_file=True), pytest.raises(Mistake, match=f"{result}: in use by process"):
        evaluation.run(args)
    assert not list(tmp_path.iterdir())


# --- workers ----------------------------------------------------------------------------------------------------

LEAD = """
import subprocess, sys
from open_r1.running.orphans import lead
lead()
subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
"""
FOLLOW = """
import os, time
from open_r1.running.orphans import follow_launcher
follow_launcher()
print(os.getpid(), flush=True)
time.sleep(99)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's part is Linux's")
def test_a_worker_ends_with_a_launcher_that_is_killed():
    launcher = start(LEAD, FOLLOW)
    worker = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}/stat").exists() and _state(worker) != "Z":
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.05)


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's part is Linux's")
def test_a_worker_whose_launcher_is_gone_does_not_begin():
    ended = subprocess.Popen(["true"])
    ended.wait()
    worker = start(FOLLOW, env={LAUNCHER: str(ended.pid)}, stderr=subprocess.PIPE)
    assert worker.communicate()[0] == "" and worker.returncode == 1


# --- the current folder -----------------------------------------------------------------------------------------


@pytest.fixture
def hostile_folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with files in it that have the names of modules."""
    for name in ("random", "json", "torch", "yaml", "signal", "colorsys"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the {name}.py of the current folder ran')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_users_reward_is_found_and_nothing_else(hostile_folder, monkeypatch):
    """In a module, a package, or a folder of modules; a library goes before them."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(hostile_folder))])
    reward = "def f(completions, **kwargs): return [0.0]\ndef rgb_to_hsv(completions, **kwargs): return [1.0]\n"
    (hostile_folder / "mine_alone.py").write_text(reward)
    (hostile_folder / "colorsys.py").write_text("raise SystemExit('ran')")
    for package in ("mine_in_package", "mine_in_folder"):
        (hostile_folder / package).mkdir()
        (hostile_folder / package / "rewards.py").write_text(reward)
    (hostile_folder / "mine_in_package/__init__.py").touch()
    names = ["mine_alone:f", "mine_in_package.rewards:f", "mine_in_folder.rewards:f"]
    assert [reward(completions=[""]) for reward in get_reward_funcs(names)] == [[0.0]] * 3
    with pytest.raises(Mistake, match="colorsys:rgb_to_hsv must take"):  # the library's, which takes three numbers
        get_reward_funcs(["colorsys:rgb_to_hsv"])
    assert str(hostile_folder) not in sys.path
    (hostile_folder / "mine_of_two.py").write_text(f"import mine_beside_it\n{reward}")
    (hostile_folder / "mine_beside_it.py").touch()
    assert get_reward_funcs(["mine_of_two:f"])
    (hostile_folder / "mine_broken.py").write_text("import mine_nowhere")
    with pytest.raises(Mistake, match="mine_nowhere"):
        get_reward_funcs(["mine_broken:f"])
    assert str(hostile_folder) not in sys.path


def test_no_command_starts_a_python_that_looks_in_the_current_folder(hostile_folder, monkeypatch):
    def ask() -> str:
        return subprocess.run([sys.executable, "-c", "import random"], capture_output=True, text=True).stderr

    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert "the random.py of the current folder ran" in ask()
    run(lambda: None)
    assert ask() == ""
    monkeypatch.delenv("PYTHONSAFEPATH")
    monkeypatch.setattr(entry, "quiet", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    entry.prepare_process()
    assert ask() == "" and str(hostile_folder) not in sys.path


def test_the_run_scripts_start_no_python_that_looks_there(hostile_folder, tmp_path):
    """Neither to ask it something nor to train."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONSAFEPATH" >>"$0.asked"\n')
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "OUTPUT": str(tmp_path / "out")}
    script = REPO_ROOT / "src/open-r1-multimodal/run_grpo_SAT.sh"
    subprocess.run(["sh", script], env=env, check=True, capture_output=True)
    assert set((tmp_path / "python.asked").read_text().splitlines()) == {"1"}


@pytest.mark.distributed
@pytest.mark.parametrize("launch", ["cpu", pytest.param("ddp", marks=pytest.mark.nightly)])
def test_no_process_of_a_launch_imports_from_there(hostile_folder, tiny_model, examples_json, launch):
    """Real interpreters, under DeepSpeed and without; also what Python imports by itself."""
    (hostile_folder / "sitecustomize.py").write_text("open('it_ran', 'w')\n")
    (hostile_folder / "mine_alone.py").write_text("def f(completions, **kwargs): return [0.0] * len(completions)\n")
    env = {"NUM_PROCESSES": "1", "ACCELERATE_CONFIG": launch}
    arguments = ("--max_steps", "1", "--reward_funcs", "mine_alone:f")
    result = run_grpo(tiny_model, examples_json, hostile_folder / "out", *arguments, **env)
    assert result.returncode == 0 and not (hostile_folder / "it_ran").exists(), result.stderr[-3000:]


# --- the folder of a run ----------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path) -> Callable[[str], str]:
    """Makes a picture and tells its path."""

    def make(name: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (28, 28), "red").save(tmp_path / name)
        return str(tmp_path / name)

    return make


def test_a_report_shows_only_images_of_the_runs_data(tmp_path, pictures):
    named, private, own = (pictures(name) for name in ("data/a.png", "private/b.png", "run/c.png"))
    beside, linked = pictures("data/beside.png"), tmp_path / "run/link.png"
    linked.symlink_to(private)
    (tmp_path / "data/rows.json").write_text(json.dumps([{"messages": [], "images": ["../data/a.png"]}]))
    images = [named, private, own, beside, str(linked), f"{tmp_path}/data/../private/b.png"]
    images += [f"{path}#xywh=0,0,14,14" for path in (named, linked)]
    run = write_run(tmp_path / "run", [row(images=images)], dataset=str(tmp_path / "data/rows.json"))
    known = KnownImages(read_run(run))
    assert [path for path in images if path in known] == [named, own, f"{named}#xywh=0,0,14,14"]
    page = write_report(run).read_text()
    assert page.count("data:image/png;base64,") == 3 and page.count("not named by the run") == 5


@pytest.mark.parametrize("dataset", [None, "array/SAT", "/dev/zero", "broken.json"])
def test_data_that_name_nothing_show_nothing(tmp_path, pictures, dataset):
    private = pictures("private/b.png")
    (tmp_path / "broken.json").write_text("[" * 100_000)
    dataset = str(tmp_path / dataset) if dataset == "broken.json" else dataset
    run = write_run(tmp_path / "run", [row(images=[private])], dataset=dataset)
    assert private not in KnownImages(read_run(run))


@pytest.mark.parametrize("suffix, separator", [("csv", ","), ("tsv", "\t")])
def test_a_table_shows_what_it_names(tmp_path, pictures, suffix, separator):
    named, private = pictures("data/a.png"), pictures("data/b.png")
    lines = ["question", "image", "answer"], ["What?", "a.png", "a ball"]
    (tmp_path / f"data/rows.{suffix}").write_text("\n".join(map(separator.join, lines)))
    known = KnownImages(read_run(write_run(tmp_path / "run", [], dataset=str(tmp_path / f"data/rows.{suffix}"))))
    assert named in known and private not in known


def test_images_that_data_hold_are_shown_from_where_the_run_put_them(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    stored = store_image({"bytes": Path(pictures("a.png")).read_bytes(), "path": None})
    other = pictures("cache/open_r1_images/b.png")
    known = KnownImages(read_run(write_run(tmp_path / "run", [], dataset="array/SAT")))
    assert stored in known and other not in known


def test_a_folder_of_data_shows_what_is_in_it(tmp_path, pictures):
    inside, outside = pictures("data/train/a.png"), pictures("other/a.png")
    run = write_run(tmp_path / "run", [row(images=[inside, outside])], dataset=str(tmp_path / "data"))
    known = KnownImages(read_run(run))
    assert inside in known and outside not in known
