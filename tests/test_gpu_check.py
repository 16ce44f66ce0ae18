"""The check of a GPU: what it says without one, a rehearsal of all of it, how it goes on, and its arithmetic."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from open_r1.front_door import Mistake
from open_r1.prompts import REPO_ROOT

SCRIPT = REPO_ROOT / "scripts/gpu_check.sh"


@pytest.fixture(scope="module")
def check():
    """The command as a module; importing it chooses one GPU for this process."""
    before = dict(os.environ)
    sys.path.insert(0, str(REPO_ROOT / "scripts"))
    import gpu_check

    os.environ.clear()
    os.environ.update(before)
    return gpu_check


@pytest.fixture(scope="module")
def gpu(check):
    from benchmarks import gpu

    return gpu


def start(folder, *arguments, python=sys.executable, **env):
    """`sh scripts/gpu_check.sh` from an unrelated folder."""
    env = {**os.environ, "PYTHON": str(python), **env}
    return subprocess.run(["sh", SCRIPT, *arguments], env=env, cwd=folder, capture_output=True, text=True)


def test_without_a_gpu_it_says_so(quick_python, tmp_path):
    done = start(tmp_path, python=quick_python, CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("gpu_check: error: no GPU: nothing to check; `--rehearsal` runs the check itself")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "soon"])
def test_a_time_that_is_none_is_refused(minutes, quick_python, tmp_path):
    done = start(tmp_path, "--minutes", minutes, python=quick_python)
    assert done.returncode == 2 and f"--minutes: expected minutes above 0, not '{minutes}'" in done.stderr


@pytest.mark.slow
def test_a_rehearsal_runs_every_measurement(gpu, tmp_path):
    """On a toy model and the CPU; what needs a GPU or vLLM says so."""
    done = start(tmp_path, "--rehearsal", "--minutes", "14", "--output", "here")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "here/gpu_check.json").read_text())
    outcomes = {outcome["name"]: outcome for outcome in result["outcomes"]}
    assert list(outcomes) == list(gpu.MEASUREMENTS)
    needs = {"attention of packed groups, flash along paths": "compute capability 8.0", "vLLM": "vLLM"}
    for name, outcome in outcomes.items():
        missing = [reason for part, reason in needs.items() if part in name]
        if missing and outcome["figures"] is None:
            assert outcome["reason"].startswith("not run: ") and missing[0] in outcome["reason"]
        else:
            assert outcome["figures"] and all(value > 0 for value in outcome["figures"].values()), name
    assert result["ratios"]["whole step, s"] > 0
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["gpu_check.json", "gpu_check.md"]
    text = (tmp_path / "here/gpu_check.md").read_text().partition("<!--")[0]  # who made it
    assert text.startswith("A rehearsal of the check itself") and text.strip() in done.stdout
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 4 for line in rows) and {line.split(" | ")[0][2:] for line in rows[2:]} == {
        *outcomes,
        "stock TRL / this trainer",
    }


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_gpu_is_checked_in_nine_minutes(tmp_path):
    begin = time.monotonic()
    done = start(tmp_path, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begin < 600
    outcomes = {each["name"]: each for each in json.loads((tmp_path / "gpu_check.json").read_text())["outcomes"]}
    assert outcomes["step, this trainer"]["figures"], outcomes["step, this trainer"]["reason"]


# --- how it goes on -----------------------------------------------------------------------------------------------


def in_a_minute():
    return time.monotonic() + 60


def test_a_measurement_that_cannot_be_made_says_why(check, gpu, capsys):
    def raising(error):
        def measure():
            raise error

        return check.attempt("it", measure, in_a_minute())

    assert raising(gpu.Impossible("no such card")).reason == "not run: no such card"
    out_of_memory = raising(torch.OutOfMemoryError("CUDA out of memory.\nmore"))
    assert out_of_memory.reason == "out of memory: CUDA out of memory." and not out_of_memory.failed
    assert "Traceback" not in capsys.readouterr().err
    differs = raising(Mistake("differs by 3 %"))
    assert differs.reason == "failed: Mistake: differs by 3 %" and differs.failed
    assert "Traceback" in capsys.readouterr().err


def test_time_cuts_off_and_leaves_out(check):
    begin = time.monotonic()

    def swallows_errors():
        while True:
            with suppress(Exception):
                time.sleep(600)

    cut = check.attempt("long", swallows_errors, time.monotonic() + 0.2)
    assert time.monotonic() - begin < 300
    assert cut.reason == "cut off: the time was over" and cut.figures is None and not cut.failed
    assert check.attempt("next", dict, time.monotonic()).reason == "not run: the time was over"
    assert check.attempt("after", lambda: {"s": 1.0}, in_a_minute()).figures == {"s": 1.0}


def test_the_table_has_a_row_a_figure_and_what_stock_takes_more(check):
    outcomes = [
        check.Outcome("step, this trainer", {"rollout, s": 2.0, "peak memory, GB": 10.0, "MFU of whole step, %": 30.0}),
        check.Outcome("step, stock TRL", {"rollout, s": 5.0, "peak memory, GB": 40.0, "MFU of whole step, %": 10.0}),
        check.Outcome("evaluation and rollout, vLLM", reason="not run: vLLM is not installed"),
    ]
    lines = check.table(outcomes).splitlines()
    assert lines[2] == "| step, this trainer | rollout, s | 2 |"
    assert lines[-3:] == [
        "| evaluation and rollout, vLLM | - | not run: vLLM is not installed |",
        "| stock TRL / this trainer | rollout | 2.50x |",
        "| stock TRL / this trainer | peak memory | 4.00x |",
    ]
    assert check.ratios(outcomes[1:]) == {}  # without one of the two


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_utilisation_of_a_cards_flops(gpu):
    # a model of 1e9 weights, forward and backward over 1000 tokens: 3e12 multiply-adds, 6e12 FLOP; in 0.1 s on a card
    # of 1e15 FLOP/s, which could have done 1e14
    assert gpu.utilisation(3 * 1e9 * 1000, seconds=0.1, peak=1e15) == pytest.approx(0.06)


def test_an_adapter_is_tried_in_the_room_of_a_small_card_and_then_of_a_larger(gpu, monkeypatch):
    """80 GB, of which 3 are taken: 2.4 by torch's allocator, so 0.6 outside of it."""
    limits, tried = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (77e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2.4e9)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)

    def first_step(bench, overlay):
        tried.append(overlay)
        if len(tried) < fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"s": 1.0}

    monkeypatch.setattr(gpu, "first_step", first_step)
    fits = 2
    assert gpu.adapter_step(None, "lora") == {"runs within, GB": 24, "s": 1.0}
    assert limits == [pytest.approx(15.4 / 80), 1.0, pytest.approx(23.4 / 80), 1.0] and tried == ["lora"] * 2
    tried.clear()
    fits = 3
    with pytest.raises(gpu.Impossible, match="out of memory within 24 GB"):
        gpu.adapter_step(None, "lora")


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_card(gpu, name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert gpu.peak_flops() == flops


def test_work_of_a_step_counts_each_prompt_once(gpu, tmp_path):
    """By hand: a multiply-add a weight of a linear layer and token, and two a head's dimension and pair of tokens."""
    bench = gpu.prepare(tmp_path, is_toy=True)
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
    assert re.fullmatch("[0-9]+", str(prompt)) and prompt > 16  # image tokens among them
    pairs = preset.prompts_per_step * prompt * (prompt + 1) / 2
    pairs += sum(len(ids) * prompt + len(ids) * (len(ids) + 1) / 2 for ids in completions)
    tokens = sum(map(len, completions))
    forward = preset.prompts_per_step * (image + prompt * body) + tokens * (body + head) + 2 * layers * hidden * pairs
    assert work["reference scoring"]["ours"] == pytest.approx(forward)
    assert work["policy update"]["ours"] == pytest.approx(3 * forward)
