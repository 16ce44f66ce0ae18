"""Guards: each warns once, when its sign begins, and of nothing else; what is no number stops a run, and is kept."""

import json
import math
import re
from contextlib import nullcontext

import pytest
from transformers import Trainer, TrainerCallback
from trl import ModelConfig

import test_sft
from fake_run import write_run
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.models.loading import load_processor
from open_r1.reporting.page import write_report
from open_r1.running.callbacks import add_run_callbacks
from open_r1.running.checkpoints import CompleteCheckpoints, find_defect, last_complete_checkpoint
from open_r1.running.data import DataArguments, load_dataset
from open_r1.running.guards import GUARDS, new_warnings
from support import make_trainer, read_jsonl, run_grpo, write_examples


def answers(first: str, second: str, gold: str = "left", other: str = "right", questions: int = 6) -> list[dict]:
    """Rows of a step: questions about the sides, in either order, half of which are answered by each."""
    return [
        {
            "id": object(),
            "options": ["left", "right"] if number % 4 < 2 else ["right", "left"],
            "ground_truth": gold if number % 2 else other,
            "model_answer": first if number % 2 else second,
        }
        for number in range(questions)
    ]


HEALTHY = {
    "loss": 0.0,
    "frac_reward_zero_std": 0.3,
    "reward_std": 0.4,
    "rewards/format_reward/mean": 0.5,
    "rewards/accuracy_reward/mean": 0.5,
    "completions/mean_length": 100.0,
    "completions/clipped_ratio": 0.1,
    "completions/identical_groups": 0.0,
    "kl": 0.01,
    "grad_norm": 0.5,
    "answers": answers("left", "right"),
}
# What is logged of each step from 50 on -> the step at which the guard warns.
TROUBLES = {
    "no signal": (lambda step: {"frac_reward_zero_std": 0.9}, 69),
    "no spread": (lambda step: {"reward_std": 1e-9}, 54),
    "format without accuracy": (
        lambda step: {
            "rewards/format_reward/mean": min(0.5 + 0.02 * (step - 50), 1),
            "rewards/accuracy_reward/mean": max(0.5 - 0.02 * (step - 50), 0),
        },
        64,
    ),
    "length collapse": (lambda step: {"completions/mean_length": 20.0}, 59),
    "length runaway": (lambda step: {"completions/clipped_ratio": 0.9}, 54),
    "KL explosion": (lambda step: {"kl": 2.0}, 54),
    "gradient explosion": (lambda step: {"grad_norm": 0.5 if step == 50 else 50.0}, 51),
    "identical completions": (lambda step: {"completions/identical_groups": 0.5}, 54),
    # nine in ten of the answers from the eighth step on
    "answer collapse": (lambda step: {"answers": answers("left", "left")}, 57),
}


def told(events: list[dict]) -> list[tuple[int, str]]:
    """Step and name of every warning of a run."""
    return [(step, name) for step in range(1, len(events) + 1) for name in new_warnings(events[:step])]


@pytest.mark.parametrize("name", [guard.name for guard in GUARDS])
def test_a_guard_warns_once_when_its_sign_begins(name):
    trouble, at = TROUBLES[name]
    healthy = [{**HEALTHY, "step": step} for step in range(1, 50)]
    events = healthy + [{**HEALTHY, "step": step, **trouble(step)} for step in range(50, 110)]
    assert told(healthy) == []
    assert told(events) == [(at, name)]
    again = [{**event, "step": event["step"] + 109} for event in events]
    assert [warning for warning in told(events + again) if warning[1] == name] == [(at, name), (at + 109, name)]


@pytest.mark.parametrize(
    ("name", "signs", "expected"),
    [
        # The mean of ten is now below the limit, now above it.
        ("length runaway", [{"completions/clipped_ratio": 0.9 if step % 4 < 2 else 0.1} for step in range(60)], 1),
        # A gradient that jumps every few steps: twice more than twenty steps apart.
        ("gradient explosion", [{"grad_norm": 50.0 if step in (30, 50, 71, 75) else 0.5} for step in range(99)], 2),
        # Four steps in five without spread are none of five in a row.
        ("no spread", [{"reward_std": 0.4 if step % 5 == 0 else 0.0} for step in range(60)], 0),
        # Accuracy falls, and format stays.
        ("format without accuracy", [{"rewards/accuracy_reward/mean": 1 - step / 60} for step in range(60)], 0),
    ],
)
def test_a_sign_that_comes_and_goes_is_told_once(name, signs, expected):
    """Until it has been away for as long as the guard looks back."""
    events = [{**HEALTHY, "step": step, **sign} for step, sign in enumerate(signs, start=1)]
    assert [warning for _, warning in told(events)].count(name) == expected


@pytest.mark.parametrize(
    "of_a_step",
    [
        answers("left", "left", other="left"),  # what is right is as one-sided
        answers("left", "left", questions=1),  # ten questions
        [{**row, "id": 0} for row in answers("left", "left")],  # sixty answers to one question
        [{**row, "model_answer": None} for row in answers("left", "left")],  # nothing could be read
        [{**row, "model_answer": row["options"][0]} for row in answers("left", "right", questions=40)],  # a base's way
        [],  # numbers and free answers: questions without options
    ],
)
def test_constant_answers_that_are_no_collapse(of_a_step):
    assert told([{**HEALTHY, "step": step, "answers": of_a_step} for step in range(60)]) == []


def test_a_collapse_is_told_in_words():
    [warning] = new_warnings([{"answers": answers("left", "left")} for _ in range(10)]).values()
    assert warning == (
        'over 10 steps 100% of the answers to "left", "right" are "left", and 50% of the right answers: '
        "whatever is asked, the answer is the same; lower learning_rate, or raise beta"
    )


def test_what_is_not_logged_warns_of_nothing():
    assert told([{"loss": 1.0, "mean_token_accuracy": 0.5} for _ in range(50)]) == []  # of SFT, whose norm was lost
    assert told([dict.fromkeys(HEALTHY, float("nan")) | {"answers": []} for _ in range(50)]) == []


def test_thresholds_are_documented():
    text = (REPO_ROOT / "docs/trouble.md").read_text()
    for guard in GUARDS:
        limit = f"{guard.limit:.0%}" if guard.limit < 1 else f"{guard.limit:g}"
        assert re.search(rf"^\| {guard.name} \| .*{limit.replace('%', ' ?%')}.* \| {guard.window} \|$", text, re.M), (
            guard.name
        )


def all_equal(completions, **kwargs):
    """A reward without any signal."""
    return [1.0] * len(completions)


def test_a_warning_reaches_terminal_log_and_report(tiny_model, examples_json, tmp_path, capsys):
    trainer = make_trainer(
        tiny_model, examples_json, tmp_path, all_equal, max_steps=7, max_completion_length=2, disable_tqdm=True
    )
    add_run_callbacks(trainer, "grpo", DataArguments(str(examples_json)), ModelConfig(str(tiny_model)))
    trainer.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: step 5: no spread: ")]
    events = [event for event in read_jsonl(tmp_path / "log.jsonl") if event.get("guard") == "no spread"]
    assert len(lines) == len(events) == 1 and events[0]["step"] == 5
    assert lines[0].endswith(events[0]["warning"])
    assert f"<li>Step 5, no spread: {events[0]['warning']}</li>" in write_report(tmp_path).read_text()


def test_a_warning_in_a_log_is_untrusted(tmp_path):
    events = [{"step": 1, "loss": 0.1}, {"step": 1, "guard": "<b>", "warning": "\x1b[2J<script>"}]
    page = write_report(write_run(tmp_path / "run", events=events)).read_text()
    assert "<li>Step 1, &lt;b&gt;: " in page and "\x1b" not in page and "[2J<script>" not in page


# --- no numbers -------------------------------------------------------------------------------------------------


class SpoilWeights(TrainerCallback):
    """After the second step all weights are NaN."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            for weights in model.parameters():
                weights.data.fill_(float("nan"))


def make_run(model, data, output, what=None, **changes):
    """A run of four steps, of which the third has a loss or gradient that is no number, or weights that are none."""
    settings = {"max_steps": 4, "max_completion_length": 4, "disable_tqdm": True, **changes}
    trainer = make_trainer(model, data, output, **settings)
    trainer.add_callback(CompleteCheckpoints(trainer.args))
    compute_loss = trainer._compute_loss

    def spoil(value, is_spoilt):
        return value * float("nan") if is_spoilt and trainer.state.global_step == 2 else value

    trainer._compute_loss = lambda model, inputs: spoil(compute_loss(model, inputs), what == "loss")
    next(trainer.model.parameters()).register_hook(lambda gradient: spoil(gradient, what == "gradient"))
    if what == "weights":
        trainer.add_callback(SpoilWeights())
    return trainer


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_stops_a_run_before_the_update(what, tiny_model, examples_json, tmp_path):
    trainer = make_run(tiny_model, examples_json, tmp_path, what)
    with pytest.raises(Mistake) as stopped:
        trainer.train()
    batch = tmp_path / "stopped_at_step_3.json"
    assert re.fullmatch(
        rf"step 3: the {what} is not a number; its batch is in {batch}; the same command goes on from "
        rf"{tmp_path}/checkpoint-2; .*",
        str(stopped.value),
    )
    content = json.loads(batch.read_text())
    rows = [row for row in read_jsonl(tmp_path / "trajectories/train.jsonl") if row["step"] == 3]
    assert content["step"] == 3 and content["batch"] == rows and rows[0]["completion"] and rows[0]["rewards"]
    assert find_defect(tmp_path / "checkpoint-2") is None
    again = make_run(tiny_model, examples_json, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(weights.isfinite().all() for weights in again.model.parameters())
    steps = [row["step"] for row in read_jsonl(tmp_path / "trajectories/train.jsonl")]
    assert steps == sorted([1, 2, 3, 4] * 8)


@pytest.mark.parametrize(
    "saving, goes_on",
    [
        ({"save_strategy": "steps", "save_steps": 1}, "goes on from .*/checkpoint-"),
        ({}, "there is no checkpoint yet; "),
    ],
)
def test_spoilt_weights_stop_a_run_and_are_not_saved(saving, goes_on, tiny_model, examples_json, tmp_path):
    trainer = make_run(tiny_model, examples_json, tmp_path, "weights", **saving)
    with pytest.raises(Mistake, match=rf"^step 3: the model's scores .* no numbers: .*; .*{goes_on}"):
        trainer.train()
    content = json.loads((tmp_path / "stopped_at_step_3.json").read_text())
    assert {row["step"] for row in content["batch"]} == {2}  # whose update it was
    assert bool(last_complete_checkpoint(tmp_path)) == bool(saving)


@pytest.mark.parametrize("norm, stops", [(0.0, False), (math.inf, True), (math.nan, True), (-1.0, True)])
def test_a_gradient_without_a_norm_stops_a_run(tiny_model, examples_json, tmp_path, monkeypatch, norm, stops):
    """DeepSpeed says -1 where the norm is not a number."""
    trainer = make_run(tiny_model, examples_json, tmp_path)
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda *_, **__: norm)
    with pytest.raises(Mistake, match="the gradient is not a number") if stops else nullcontext():
        assert trainer._get_grad_norm(trainer.model) == norm


def test_sft_stops_too(tiny_model, examples_json, tmp_path):
    arguments = ["--max_steps", "3", "--save_strategy", "no", "--per_device_train_batch_size", "2"]
    trainer = test_sft.make_trainer(tiny_model, examples_json, tmp_path, *arguments)
    trainer.add_callback(CompleteCheckpoints(trainer.args))
    step = next(trainer.model.parameters())
    step.register_hook(lambda gradient: gradient * float("nan") if trainer.state.global_step == 1 else None)
    with pytest.raises(Mistake, match=r"^step 2: the gradient is not a number; .* goes on from .*checkpoint-1; "):
        trainer.train()
    content = json.loads((tmp_path / "stopped_at_step_2.json").read_text())
    assert ["What colour is picture" in row["text"] for row in content["batch"]] == [True, True]


@pytest.mark.distributed
def test_one_of_two_zero_processes_has_a_loss_that_is_no_number(tiny_model, examples_json, tmp_path, quick_python):
    """Both stop, in one line; the same command goes on from the checkpoint that they save."""
    (tmp_path / "spoilt.py").write_text(
        "import os, pathlib\n"
        "from open_r1.trainer.trainer import Qwen2VLGRPOTrainer as T\n"
        "from support import vowel_share\n"
        "compute, mark = T._compute_loss, pathlib.Path(__file__).with_name('spoilt')\n"
        "def spoil(self, *inputs):\n"
        "    loss = compute(self, *inputs)\n"
        "    if os.environ['RANK'] == '0' or self.state.global_step != 2 or mark.exists(): return loss\n"
        "    mark.touch()\n"
        "    return loss * float('nan')\n"
        "T._compute_loss = spoil\n"
    )
    arguments = ["--max_steps", "4", "--save_steps", "9", "--reward_funcs", "spoilt:vowel_share"]
    arguments += ["--max_completion_length", "4"]
    env = {"PYTHON": str(quick_python), "PYTHONPATH": f"{tmp_path}:{REPO_ROOT}/tests"}
    stopped, done = (run_grpo(tiny_model, examples_json, tmp_path / "out", *arguments, **env) for _ in range(2))
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr, stopped.stderr
    line = stopped.stderr.splitlines()[-1]  # behind the bar of reading examples
    assert re.match(r"error: step 3: the loss is not a number; .* goes on from .*/checkpoint-2; ", line), line
    assert done.returncode == 0 and "checkpoint-2" in done.stdout, done.stderr[-3000:]
    steps = [row["step"] for row in read_jsonl(tmp_path / "out/trajectories/train.jsonl")]
    assert steps == sorted([1, 2, 3, 4] * 16)


# --- images that break during a run -----------------------------------------------------------------------------


def test_a_run_ends_when_many_images_break(tiny_model, tmp_path, capsys):
    data = write_examples(tmp_path, count=12)
    trainer = make_trainer(tiny_model, data, tmp_path / "out", max_steps=9, max_completion_length=2, disable_tqdm=True)
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"gone")
    with pytest.raises(Mistake, match=r"^[78] images broke during training .allowed: 6.; restore the data"):
        trainer.train()
    assert capsys.readouterr().err.count("; completions about it earn nothing") in (7, 8)
    assert len(read_jsonl(tmp_path / "out/trajectories/train.jsonl")) == 3 * 8  # of six prompts


def test_a_run_that_goes_on_keeps_rows_whose_images_broke(tiny_model, tmp_path, capsys):
    data, processor = write_examples(tmp_path, count=12), load_processor(tiny_model, chat_template="base")
    images = sorted((tmp_path / "images").iterdir(), key=lambda path: int(path.stem.partition("_")[0]))
    whole = load_dataset(data, processor)
    images[3].unlink()
    images[7].write_bytes(images[7].read_bytes()[:60])
    with pytest.raises(FileNotFoundError, match="row 3: no image"):
        load_dataset(data, processor)
    capsys.readouterr()
    assert load_dataset(data, processor, has_begun=True).to_list() == whole.to_list()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert lines == [
        f"warning: {data}: row 3: image {images[3]}: no such file; completions about it earn nothing",
        f"warning: {data}: row 7: image {images[7]}: corrupt image; completions about it earn nothing",
    ]
    for path in images[:11]:
        path.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"row 0: .*; 10 more images broke since the run began; restore the data$"):
        load_dataset(data, processor, has_begun=True)


def test_sft_ends_when_many_images_break(tiny_model, tmp_path):
    data = write_examples(tmp_path, count=16)
    trainer = test_sft.make_trainer(tiny_model, data, tmp_path / "out", "--save_strategy", "no")
    collate = trainer.data_collator
    rows = list(trainer.train_dataset)
    for path in (tmp_path / "images").iterdir():
        path.unlink() if path.name != "0_0.png" else None
    collate(rows[:9])
    with pytest.raises(Mistake, match=r"^9 images broke during training; restore the data: image "):
        collate(rows[:10])
