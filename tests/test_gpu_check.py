"""The check of a GPU: what it says without one, packages from a folder, how it goes on, a rehearsal, its arithmetic."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import zipfile
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from open_r1.base.errors import REPO_ROOT, Mistake
from support import kept_environment, write_script

SCRIPT = REPO_ROOT / "scripts/gpu_check.sh"


@pytest.fixture(scope="module")
def check():
    """The command as a module."""
    import gpu_check

    return gpu_check


@pytest.fixture(scope="module")
def gpu(check):
    from benchmarks import gpu

    return gpu


def start(folder, *arguments, python=sys.executable, **env):
    """`sh scripts/gpu_check.sh` from an unrelated folder."""
    env = {**os.environ, "PYTHON": str(python), **env}
    return subprocess.run(["sh", SCRIPT, *arguments], env=env, cwd=folder, capture_output=True, text=True)


# --- what has to be there -------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(quick_python, tmp_path):
    done = start(tmp_path, "--output", "here", python=quick_python, CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("gpu_check: error: no GPU: nothing to check; `--rehearsal` runs the check itself")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


SAID = """
Driver Version                            : 550.54.15
{label}                              : {cuda}
GPU 00000000:01:00.0
    Product Name                          : NVIDIA H200
GPU 00000000:02:00.0
    Product Name                          : NVIDIA L4
"""


@pytest.mark.parametrize(
    "label, supported, built, told",
    [
        (
            "CUDA Version",
            "12.4",
            "13.0",
            "driver too old: 550.54.15, of the NVIDIA H200, runs CUDA 12.4 and older, and torch 2.11.0 is built for "
            "CUDA 13.0; update the driver, or install a torch for CUDA 12.4 or older",
        ),
        ("CUDA UMD Version", "12.4", "13.0", "driver too old: 550.54.15, of the NVIDIA H200, runs"),
        ("CUDA Version", "13.0", "13.2", "torch 2.11.0 for CUDA 13.2 cannot use the NVIDIA H200 that"),
        ("CUDA Version", "13.0", None, "torch 2.11.0 is built without CUDA, and cannot use the NVIDIA"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_with_the_reason(
    check, monkeypatch, tmp_path, label, supported, built, told
):
    """nvidia-smi is a script that prints what the real one does in these lines; no such driver was at hand."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{SAID.format(label=label, cuda=supported)}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(Mistake, match=re.escape(told)):
        check.check_gpu()


def write_wheel(folder, name, tag="py3-none-any", release="1.0"):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{release}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", f"version = {release!r}")
        wheel.writestr(f"{name}-{release}.dist-info/METADATA", f"Name: {name}\nVersion: {release}\n")


def test_of_a_folder_of_wheels_only_what_is_missing_is_installed(check, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(Mistake, match="--wheels: no wheels in"):
        check.install_wheels(tmp_path / "wheels", tmp_path / "site-packages")
    write_wheel(tmp_path / "wheels", "a_package_of_no_one")
    write_wheel(tmp_path / "wheels", "torch", release="99.0")
    write_wheel(tmp_path / "wheels", "pyyaml", "cp27-cp27m-win32")
    check.install_wheels(tmp_path / "wheels", tmp_path / "site-packages")
    assert version("a-package-of-no-one") == "1.0" and version("torch") != "99.0"
    assert {path.name.partition("-")[0] for path in (tmp_path / "site-packages").iterdir()} == {"a_package_of_no_one"}
    write_wheel(tmp_path / "wheels", "another_of_no_one", "cp27-cp27m-win32")
    with pytest.raises(Mistake, match=r"another_of_no_one-1.0-cp27-cp27m-win32.whl is for another Python or machine"):
        check.install_wheels(tmp_path / "wheels", tmp_path / "site-packages")


def test_what_is_missing_is_named_with_the_way_to_get_it(check, monkeypatch):
    check.check_given()
    check.check_pins()  # this environment lacks nothing
    monkeypatch.setattr(check, "is_installed", lambda name: name not in ("trl", "dill", "torchvision"))
    with pytest.raises(Mistake, match=r"lacks 2 packages: .* -d FOLDER trl==1.16.0 dill==0.4.1` where there is one"):
        check.check_pins()
    with pytest.raises(Mistake, match=r"has no torchvision: run `bash setup.sh`, or install builds that fit"):
        check.check_given()


def test_wheels_have_the_versions_that_the_project_is_tested_with(check):
    texts = [(REPO_ROOT / name).read_text() for name in ("requirements.txt", "requirements-test.txt")]
    tested = dict(re.findall(r"^([\w-]+)==(\S+)", "\n".join(texts), re.MULTILINE))
    pins = dict(pin.split("==") for pin in check.PINS.split())
    shared = pins.keys() & tested.keys()
    assert {"trl", "datasets", "math-verify", "pytest"} <= shared
    assert {name: pins[name] for name in shared} == {name: tested[name] for name in shared}


# --- how it goes on -------------------------------------------------------------------------------

MEASURING = """
import json, os, pathlib, signal, subprocess, sys, time

def main():
    name, folder, size, path = sys.argv[1:]
    if name == "leaves at once":
        sys.exit(3)
    pathlib.Path(path).write_text(json.dumps({"about": size, "figures": {"s": 1.0}}))
    if name.startswith("dies"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hangs":
        child = subprocess.Popen(["sleep", "600"])
        pathlib.Path(folder, "child").write_text(str(child.pid))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
"""


@pytest.fixture
def measure(check, tmp_path):
    """`gpu_check.measure` with measurements that do what their name says."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/__init__.py").touch()
    (tmp_path / "benchmarks/gpu.py").write_text(MEASURING)
    check.show_children(tmp_path)  # the environment is the test's own
    return lambda name, limit=60: check.measure(name, tmp_path, True, limit)


def test_a_process_that_ends_or_dies_leaves_what_it_knew(measure):
    outcome = measure("works")
    assert (outcome.figures, outcome.about, outcome.reason, outcome.failed) == ({"s": 1.0}, "toy", "", False)
    outcome = measure("dies later")
    assert outcome.reason == "failed: its process was ended by SIGSEGV" and outcome.failed
    assert outcome.figures == {"s": 1.0}
    outcome = measure("leaves at once")
    assert outcome.reason == "failed: its process ended with exit code 3" and outcome.figures == {}


def test_one_that_hangs_is_killed_with_all_that_it_started(measure, tmp_path):
    begin = time.monotonic()
    outcome = measure("hangs", 3)
    assert time.monotonic() - begin < 60
    assert outcome.reason == "cut off after 3 s" and outcome.figures == {"s": 1.0} and not outcome.failed
    child, deadline = Path("/proc", (tmp_path / "child").read_text(), "stat"), time.monotonic() + 20
    while child.exists() and child.read_text().split()[2] != "Z":  # the kernel ends it when it gets to it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert measure("works", 0).reason == "not run: the time was over"


def test_a_measurement_that_cannot_be_made_says_why(gpu, capsys):
    def raising(error):
        def measure(bench):
            yield {"s": 1.0}
            raise error

        told = []
        gpu.attempt(measure, None, told.append)
        assert told[0] == {"figures": {"s": 1.0}} and told[-1]["figures"] == {"s": 1.0}
        return told[-1]["reason"], told[-1]["failed"]

    assert raising(gpu.Impossible("no such card")) == ("not run: no such card", False)
    out_of_memory = raising(torch.OutOfMemoryError("CUDA out of memory.\nmore"))
    assert out_of_memory == ("out of memory: CUDA out of memory.", False)
    assert "Traceback" not in capsys.readouterr().err
    assert raising(Mistake("differs by 3 %")) == ("failed: Mistake: differs by 3 %", True)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "said, reason",
    [
        ("torch.OutOfMemoryError: CUDA out of memory.", "not run: out of memory, under "),
        ("ValueError: no", "failed: Mistake: run_grpo_SAT.sh under "),
    ],
)
def test_the_papers_recipe_fails_but_for_want_of_memory(gpu, monkeypatch, tmp_path, said, reason):
    """It takes 48 GB; on a smaller card the check itself is well."""
    write_script(tmp_path / "src/open-r1-multimodal/run_grpo_SAT.sh", f"echo {said} >&2\necho the end >&2\nexit 1")
    monkeypatch.setattr(gpu, "REPO_ROOT", tmp_path)
    (tmp_path / "model").mkdir()
    told = []
    gpu.attempt(gpu.paper_command, gpu.Bench(tmp_path, is_toy=True), told.append)
    assert told[-1]["reason"].startswith(reason) and told[-1]["failed"] == reason.startswith("failed")


@pytest.mark.parametrize("visible, taken", [(None, "0"), ("2,3", "2"), ("GPU-8c,GPU-9d", "GPU-8c")])
def test_of_several_gpus_one_is_measured(check, monkeypatch, tmp_path, visible, taken):
    """What is started for it sees no other either: a launch would take them all."""
    seen = []

    def measure(name: str, *_: object):
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return check.Outcome(name)

    monkeypatch.setattr(check, "check_gpu", lambda: None)
    monkeypatch.setattr(check, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["gpu_check.sh", "--output", str(tmp_path)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check.main()
    assert seen == [taken] * len(check.LIMITS)


def test_measurements_are_expected_within_their_limits_and_in_seven_minutes(check, gpu):
    """docs/gpus.md has a row a measurement, in their order: an expression and what it makes."""
    assert list(check.LIMITS) == list(gpu.MEASUREMENTS)
    page = (REPO_ROOT / "docs/gpus.md").read_text()
    rows = re.findall(r"^\|.*\| ([\d .+x()]+?)(?: = (\d+))? \|$", page[page.index("What an H200 is expected") :], re.M)
    expected = [int(made or expression) for expression, made in rows]
    for (expression, _), seconds, limit in zip(rows, expected, check.LIMITS.values(), strict=True):
        assert seconds == pytest.approx(eval(expression.replace("x", "*")), abs=0.51) and 1.5 * seconds <= limit
    assert sum(expected) < 7 * 60 and f"| all | {sum(expected)}, {sum(expected) / 60:.1f} minutes |" in page


def test_the_table_has_a_row_a_figure_and_what_stock_takes_more(check, tmp_path):
    outcomes = [
        check.Outcome("step, this trainer", {"rollout, s": 2.0, "peak memory, GB": 10.0, "MFU of whole step, %": 30.0}),
        check.Outcome("step, stock TRL", {"rollout, s": 5.0, "peak memory, GB": 40.0}, about="here"),
        check.Outcome("decoding", {"ms": 7.0}, reason="cut off after 60 s"),
    ]
    lines = check.report(outcomes, tmp_path).splitlines()
    assert lines[0] == "here" and lines[4] == "| step, this trainer | rollout, s | 2 |"
    assert lines[-4:] == [
        "| decoding | ms | 7 |",
        "| decoding | - | cut off after 60 s |",
        "| stock TRL / this trainer | rollout | 2.50x |",
        "| stock TRL / this trainer | peak memory | 4.00x |",
    ]
    assert "\n".join(lines) in (tmp_path / "gpu_check.md").read_text()
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert result["ratios"] == {"rollout, s": 2.5, "peak memory, GB": 4.0} and len(result["outcomes"]) == 3
    assert check.ratios(outcomes[1:]) == {}  # without one of the two


# --- rehearsals -----------------------------------------------------------------------------------

# What a CPU has no figures of, or none above 0, and why
WITHOUT = {"attention tests": "", "evaluation and rollout, vLLM": "not run: vLLM is not installed"}


@pytest.mark.slow
def test_every_measurement_runs_on_a_toy(gpu, tmp_path):
    """In this process; the nightly rehearsal runs them as the command does, with tests and launch."""
    bench = gpu.Bench(tmp_path / "shared", is_toy=True)
    bench.folder.mkdir()
    for name, measure in gpu.MEASUREMENTS.items():
        if name not in (*WITHOUT, "two steps of run_grpo_SAT.sh"):
            told = []
            gpu.attempt(measure, bench, told.append)
            assert told[-1]["reason"] == "" and len(told) > 1, (name, told)
            figures = told[-1]["figures"]
            assert all(value > 0 for value in figures.values() if not name.startswith("rollout of")), (name, figures)
    assert "aten::" in (tmp_path / "gpu_check_profile.txt").read_text()


@pytest.fixture(scope="module")
def cluster_python() -> Path:
    """Python 3.12, or else this one, with torch 2.11 and what belongs to it, and no package of this project (6 GB)."""
    pins = ["torch==2.11.0", "torchvision==0.26.0", "transformers==5.17.0", "accelerate==1.15.0", "peft==0.21.2", "pip"]
    digest = sha256(f"{pins} {sys.version}".encode()).hexdigest()[:12]

    def make(uv: str, folder: Path) -> None:
        command = [uv, "venv", "--quiet", "--clear", folder, "--python"]
        env = {**os.environ, "PYENV_VERSION": "3.12"}  # pyenv's `python3.12` starts only when it is asked for
        if subprocess.run([*command, "3.12"], env=env).returncode:
            subprocess.run([*command, sys.executable], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", folder / "bin/python", *pins], check=True)

    return kept_environment(f"cluster-{digest}", make)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_machine_with_an_older_torch_and_a_folder_of_wheels_is_checked(check, cluster_python, tmp_path):
    """What the command asks for is downloaded as it says, and is all that it needs beside the machine's own."""
    bare = start(tmp_path, "--rehearsal", python=cluster_python, PYTHONPATH="")
    assert bare.returncode == 1 and len(bare.stderr.splitlines()) == 1
    (download,) = re.findall(r"run `(python3 -m pip download .*?)` where there is one", bare.stderr)
    python, *command = shlex.split(download.replace("FOLDER", str(tmp_path / "wheels")))
    assert python == "python3"
    subprocess.run([cluster_python, *command], check=True, capture_output=True)

    arguments = ["--rehearsal", "--minutes", "45", "--output", "here", "--wheels", "wheels"]
    done = start(tmp_path, *arguments, python=cluster_python, PYTHONPATH="")
    assert done.returncode == 0, done.stderr[-5000:]
    result = json.loads((tmp_path / "here/gpu_check.json").read_text())
    assert result["packages"]["torch"].startswith("2.11.0")
    outcomes = {outcome["name"]: outcome for outcome in result["outcomes"]}
    assert list(outcomes) == list(check.LIMITS)
    for name, outcome in outcomes.items():
        reason = WITHOUT.get(name, "")
        assert outcome["reason"].startswith(reason) and bool(outcome["reason"]) == bool(reason), outcome
        assert outcome["figures"] or reason, outcome
    assert result["ratios"]["whole step, s"] > 0
    made = {"gpu_check.json", "gpu_check.md", "gpu_check_profile.txt"}
    assert {path.name for path in (tmp_path / "here").iterdir()} == made
    assert done.stdout.startswith("A rehearsal of the check itself")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_gpu_is_checked_in_nine_minutes(tmp_path):
    begin = time.monotonic()
    done = start(tmp_path, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begin < 600
    outcomes = json.loads((tmp_path / "gpu_check.json").read_text())["outcomes"]
    (step,) = (outcome for outcome in outcomes if outcome["name"] == "step, this trainer")
    assert step["figures"], step["reason"]


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("card, shares", [(80, [15.4 / 80, 1.0, 23.4 / 80, 1.0]), (16, [15.4 / 16, 1.0, 1.0, 1.0])])
def test_an_adapter_is_tried_in_the_room_of_a_small_card_and_then_of_a_larger(gpu, monkeypatch, card, shares):
    """3 GB are taken: 2.4 by torch's allocator, so 0.6 outside of it."""
    limits, tried = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((card - 3) * 1e9, card * 1e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2.4e9)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.setattr(gpu.gc, "collect", lambda: None)  # in a process of all tests it takes a second

    def first_step(bench, overlay):
        tried.append(overlay)
        if len(tried) < fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"s": 1.0}

    monkeypatch.setattr(gpu, "first_step", first_step)
    fits = 2
    assert list(gpu.adapter_step(None, "lora")) == [{"runs within, GB": 24, "s": 1.0}]
    assert limits == pytest.approx(shares) and tried == ["lora"] * 2
    tried.clear()
    fits = 3
    with pytest.raises(gpu.Impossible, match="out of memory within 24 GB"):
        list(gpu.adapter_step(None, "lora"))


def test_a_profile_counts_launches_waits_and_the_time_of_kernels_once(gpu):
    """An operator has its kernels' time as its own, beside the kernels themselves."""
    seen = [
        ("aten::mm", 2, 30.0, DeviceType.CPU),
        ("cudaLaunchKernelExC", 7, 0.0, DeviceType.CPU),
        ("cudaStreamSynchronize", 3, 0.0, DeviceType.CPU),
        ("cudaMemcpyAsync", 4, 0.0, DeviceType.CPU),
        ("sm90_gemm", 2, 30.0, DeviceType.CUDA),
        ("Memcpy DtoH", 4, 2.0, DeviceType.CUDA),
    ]
    names = ("key", "count", "self_device_time_total", "device_type")
    events = [SimpleNamespace(**dict(zip(names, event, strict=True))) for event in seen]
    assert gpu.count_events(events) == {"kernel launches": 7, "host waits": 3, "ms of kernels": 0.032}


@pytest.mark.parametrize(
    "name, flops", [("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("NVIDIA GeForce GTX 1080", None)]
)
def test_the_peak_of_a_card(gpu, name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert gpu.peak_flops() == flops


def test_work_of_a_step_counts_each_prompt_once(gpu, tmp_path):
    """By hand: a multiply-add a weight of a linear layer and token, and two a head's dimension and pair of tokens."""
    bench = gpu.Bench(tmp_path, is_toy=True)
    assert list(gpu.prepare(bench))
    preset = bench.preset
    trainer = gpu.make_trainer("ours", preset, bench.model, bench.data, checkpointing=False)
    completions = gpu.given_completions(preset)
    work = gpu.count_work(trainer, preset, completions)
    text, vision = preset.text, preset.vision
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    keys = hidden // text["num_attention_heads"] * text["num_key_value_heads"]
    body = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * text["intermediate_size"])
    head, width, patches = hidden * text["vocab_size"], vision["embed_dim"], (112 // 14) ** 2
    tower = 3 * 2 * 14 * 14 * width + vision["depth"] * (4 * width * width + 2 * width * 4 * width)
    merger = (4 * width) ** 2 + 4 * width * hidden
    image = patches * tower + patches // 4 * merger + 2 * vision["depth"] * width * patches**2
    prompt = work["sizes"]["prompt"]
    assert prompt > 16  # image tokens among them
    pairs = preset.prompts_per_step * prompt * (prompt + 1) / 2
    pairs += sum(len(ids) * prompt + len(ids) * (len(ids) + 1) / 2 for ids in completions)
    tokens = sum(map(len, completions))
    forward = preset.prompts_per_step * (image + prompt * body) + tokens * (body + head) + 2 * layers * hidden * pairs
    assert work["reference scoring"]["ours"] == pytest.approx(forward)
    assert work["policy update"]["ours"] == pytest.approx(3 * forward)
