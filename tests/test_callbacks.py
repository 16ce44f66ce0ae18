"""What a run shows and leaves behind: reflections in rows and log, run.json, log.jsonl, lines of progress, rollouts."""

import contextlib
import io
import json
import logging
import re
import sqlite3
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, TrainerControl, TrainerState
from trl import ModelConfig

import open_r1
from open_r1.answers.reflection import find_reflections
from open_r1.base.errors import Mistake
from open_r1.reporting import page
from open_r1.rewards import accuracy_reward, format_reward
from open_r1.running import callbacks, entry, live
from open_r1.running.callbacks import ProgressLines, RunLog, add_run_callbacks, describe
from open_r1.running.data import DataArguments
from open_r1.running.provenance import without_secrets
from open_r1.trainer import trackers
from open_r1.trainer.trackers import LogRollouts, code_block, rollout_markdown
from support import make_config, make_trainer, read_jsonl, run_grpo, write_mixed

LINE = re.compile(r"step +(\d+)/3  (held-out +)?(.+?)(?:  +([\d.]+) s  ETA [\d:]+)?")
CELL = re.compile(r"([a-z_]+) +(-?\d+(?:\.\d+)?)(?:  |$)")
REFLECTION = ("reflection/share", "reflection/self_correction", "reflection/correction_success")


def train_planted(model: Path, data: Path, output: Path, **changes: object) -> str:
    """A run on written completions, half of whose prompts get reflective ones; what it printed."""
    import planted

    settings = {"per_device_eval_batch_size": 4, "max_completion_length": 128, "disable_tqdm": True, **changes}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        rewards = [accuracy_reward, format_reward]
        trainer = make_trainer(model, data, output, rewards, eval_data=data, hub_token="hf_secret", **settings)
        trainer.backend = planted.Written(trainer.backend)
        script_args = DataArguments(dataset_name=str(data), eval_dataset_name=str(data))
        add_run_callbacks(trainer, "grpo", script_args, ModelConfig(model_name_or_path=str(model)))
        trainer.train()
    return printed.getvalue()


@pytest.fixture(scope="module")
def run(tiny_model, examples_json, tmp_path_factory):
    """A folder after three planted steps with an evaluation after the second, and what was printed."""
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(output / "runs"))
        printed = train_planted(
            tiny_model,
            examples_json,
            output,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=2,
            report_to=["tensorboard"],
        )
    return output, printed


# --- reflections in rows and log ------------------------------------------------------------------------------


def test_rows_name_reflections_and_corrections(run):
    output, _ = run
    for name in ("train", "eval"):
        rows = read_jsonl(output / f"trajectories/{name}.jsonl")
        for row in rows:
            right, wrong = row["options"]
            assert row["solution"] == right and f"{right} or {wrong}" in row["prompt"]
            assert row["reflections"] == [list(span) for span in find_reflections(row["completion"])]
            marks = {"Wait": (wrong, True, 1), "Hmm": (right, True, 0), "double-check": (right, False, 1)}
            mark = next((mark for mark in marks if mark in row["completion"]), None)
            considered, corrects, accuracy = marks.get(mark, (None, False, row["rewards"]["accuracy_reward"]))
            assert (row["considered"], row["self_corrected"]) == (considered, corrects)
            assert row["rewards"]["accuracy_reward"] == accuracy and bool(row["reflections"]) == bool(mark)
        assert len({"Wait" in row["completion"] for row in rows}) == 2


def test_the_log_holds_the_shares_of_its_rows(run):
    output, _ = run
    logs = read_jsonl(output / "log.jsonl")
    for step in (1, 2, 3):
        (log,) = (log for log in logs if log["step"] == step and "loss" in log)
        rows = [row for row in read_jsonl(output / "trajectories/train.jsonl") if row["step"] == step]
        # per prompt: 3 of 4 reflect, 2 correct themselves, 1 of these ends right; or none of all that
        prompts = sum("Wait" in row["completion"] for row in rows)
        assert len(rows) == 8 and log["reflection/share"] == pytest.approx(prompts * 3 / 8)
        assert log["reflection/self_correction"] == pytest.approx(prompts * 2 / 8)
        assert log.get("reflection/correction_success") == (0.5 if prompts else None)
    (log,) = (log for log in logs if "eval_loss" in log and log["step"] == 2)
    # 4 of the 8 prompts, one prompt an evaluation batch; a batch without a correction has no success to average
    assert [log[f"eval_{name}"] for name in REFLECTION] == [3 / 8, 2 / 8, 1 / 2]


# --- run.json and log.jsonl -----------------------------------------------------------------------------------


def test_run_json_describes_the_run_without_secrets(run, tiny_model, examples_json):
    output, _ = run
    text = (output / "run.json").read_text()
    record = json.loads(text)
    assert (record["command"], record["world_size"], record["max_steps"]) == ("grpo", 1, 3)
    assert (record["model"], record["dataset"]) == (str(tiny_model), str(examples_json))
    assert record["eval_dataset"] == str(examples_json)
    assert record["reward_funcs"] == ["accuracy_reward", "format_reward"]
    assert record["arguments"]["learning_rate"] == 1e-3 and record["arguments"]["max_completion_length"] == 128
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["started"])
    assert "hf_secret" not in text and "hub_token" not in text


def test_secrets_are_left_out_at_any_depth():
    arguments = {
        "hub_token": "a",
        "max_completion_length": 3,
        "model_init_kwargs": {"token": "b", "revision": "main", "list": [{"api_key": "c", "x": Path("p")}]},
        "rate": float("nan"),
    }
    assert without_secrets(arguments) == {
        "max_completion_length": 3,
        "model_init_kwargs": {"revision": "main", "list": [{"x": "p"}]},
        "rate": None,
    }


def test_the_log_is_what_the_trainer_logged(run):
    output, _ = run
    logs = read_jsonl(output / "log.jsonl")
    kinds = ["loss", "loss", "eval_loss", "loss", "eval_loss", "train_runtime"]
    assert [log["step"] for log in logs] == [1, 2, 2, 3, 3, 3]
    assert all(kind in log for log, kind in zip(logs, kinds, strict=True))
    assert all(first["time"] <= second["time"] for first, second in pairwise(logs))
    for name in ("reward", "kl", "grad_norm", "step_time", "rewards/accuracy_reward/mean"):
        assert all(name in log for log in logs if "loss" in log)
    assert "eval_rewards/accuracy_reward/mean" in logs[2]


def test_a_resumed_run_goes_on_and_a_new_one_begins_anew(tmp_path):
    args = make_config(tmp_path)
    log = RunLog({"command": "sft", "arguments": {}})

    def start(step: int) -> dict:
        state = TrainerState(global_step=step, max_steps=9, is_world_process_zero=True)
        log.on_train_begin(args, state, TrainerControl())
        return json.loads((tmp_path / "run.json").read_text())

    start(0)
    (tmp_path / "run.json").write_text('{"started": "earlier"}')
    for step in range(1, 6):
        state = TrainerState(global_step=step, is_world_process_zero=True)
        log.on_log(args, state, TrainerControl(), logs={"loss": float("nan") if step == 2 else 1.0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    resumed = start(3)
    [resume] = resumed.pop("resumes")
    assert resumed == {"command": "sft", "arguments": {}, "started": "earlier", "world_size": 1, "max_steps": 9}
    assert (resume["step"], resume["changed"], resume["kept"]) == (3, [], {})
    assert [resume["step"] for resume in start(4)["resumes"]] == [3, 4]
    rows = read_jsonl(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[1]["loss"] is None
    assert start(0)["started"] != "earlier" and read_jsonl(tmp_path / "log.jsonl") == []
    log.on_log(args, TrainerState(global_step=1, is_world_process_zero=False), TrainerControl(), logs={"loss": 1.0})
    assert read_jsonl(tmp_path / "log.jsonl") == []


# --- progress ---------------------------------------------------------------------------------------------------


def test_every_event_is_one_line_and_nothing_else_is_printed(run):
    output, printed = run
    logs = [log for log in read_jsonl(output / "log.jsonl") if "train_runtime" not in log]
    lines = [line for line in printed.splitlines() if not line.startswith("measuring")]
    assert len(lines) == len(logs) == 5 and "{" not in printed
    for line, log in zip(lines, logs, strict=True):
        step, held_out, cells, seconds = LINE.fullmatch(line).groups()
        prefix = "eval_" if "eval_loss" in log else ""
        assert int(step) == log["step"] and bool(held_out) == bool(prefix) == (seconds is None)
        assert not CELL.sub("", cells).strip(), cells
        cells = dict(CELL.findall(cells))
        assert float(cells["accuracy"]) == pytest.approx(log[f"{prefix}rewards/accuracy_reward/mean"], abs=1e-3)
        assert float(cells["length"]) == pytest.approx(log[f"{prefix}completions/mean_length"], abs=0.51)
        if not prefix:
            assert float(cells["reward"]) == pytest.approx(log["reward"], abs=1e-3)
            assert float(seconds) == pytest.approx(log["step_time"], abs=0.2)
    # columns stand under each other
    assert len({line.index("accuracy") for line in lines}) == len({line.index("length") for line in lines}) == 1


def test_other_rewards_keep_their_name_and_what_is_missing_is_left_out():
    logs = {"loss": 1.0, "reward": -0.5, "rewards/length_reward/mean": None, "completions/mean_length": 12.4}
    assert describe(logs) == ["reward -0.500", "length_reward -", "length   12"]
    sft = {"loss": 1.5, "mean_token_accuracy": 0.25, "entropy": 3.0}
    assert describe(sft) == ["loss  1.5000", "token accuracy 0.250"]
    assert describe({f"eval_{key}": value for key, value in sft.items()}, "eval_") == describe(sft)


def test_the_time_left_comes_from_this_session(tmp_path, monkeypatch, capsys):
    """Resumed at step 100 of 200: two seconds a step, one second between steps; a line every second step."""
    now = [1000.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    args, control, lines = make_config(tmp_path), TrainerControl(), ProgressLines()
    state = TrainerState(global_step=100, max_steps=200, is_world_process_zero=True)
    lines.on_train_begin(args, state, control)
    for step in range(101, 105):
        lines.on_step_begin()
        now[0] += 2
        lines.on_step_end()
        state.global_step = step
        if step % 2 == 0:
            lines.on_log(args, state, control, logs={"loss": 1.0, "mean_token_accuracy": 0.5})
        now[0] += 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 102/200  loss  1.0000  token accuracy 0.500    2.0 s  ETA 04:05"  # 98 steps of 5 s / 2
    assert second.endswith("  2.0 s  ETA 04:24")  # 96 steps of 11 s / 4


# --- rollouts ---------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_scalars_of_the_log_and_rollouts(run):
    output, _ = run
    events = EventAccumulator(str(output / "runs"))
    events.Reload()
    logs = read_jsonl(output / "log.jsonl")
    for prefix, folder in (("", "train"), ("eval_", "eval")):
        for name in ("reward", "rewards/accuracy_reward/mean", *REFLECTION[:2]):
            logged = [(log["step"], log[prefix + name]) for log in logs if prefix + name in log]
            read = [(event.step, event.value) for event in events.Scalars(f"{folder}/{name}")]
            assert logged and read == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
    text = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("rollout/text_summary")]
    rows = [row for row in read_jsonl(output / "trajectories/train.jsonl") if row["step"] == 1 and row["group"] == 0]
    assert len(text) == 3 and all(row["completion"] in text[0] for row in rows)  # max_steps 3: at every step
    assert [event.step for event in events.Images("rollout/image_1")] == [1, 2, 3]
    assert events.Images("rollout/image_1")[0].width == Image.open(rows[0]["images"][0]).width


@pytest.fixture
def offline_wandb(tmp_path, monkeypatch):
    """Trains with W&B offline; the tables that it left."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    wandb.teardown()  # what an earlier run of this process set up, its folder among it, would stay

    def tables(train) -> list[dict]:
        try:
            train()
        finally:
            wandb.finish()  # comes back before the run's file is written
            wandb.teardown()  # waits for it
        return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("wandb/offline-run-*/**/*.table.json"))]

    return tables


def test_wandb_gets_a_table_of_rollouts_and_no_secret(tiny_model, examples_json, tmp_path, offline_wandb):
    changes = {"max_steps": 2, "report_to": ["wandb"]}
    tables = offline_wandb(lambda: train_planted(tiny_model, examples_json, tmp_path / "out", **changes))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"hf_secret" not in file.read_bytes()
    rows = read_jsonl(tmp_path / "out/trajectories/train.jsonl")
    assert len(tables) == 2
    for table in tables:
        step = table["data"][0][0]
        column = table["columns"].index("completion")
        group = [row["completion"] for row in rows if row["step"] == step and row["group"] == 0]
        assert [line[column] for line in table["data"]] == group
        assert {"image_1", "prompt", "accuracy_reward", "advantage"} <= set(table["columns"])


def test_wandb_takes_trls_table_of_completions(tiny_model, tmp_path, offline_wandb):
    """Prompts with images, a text alone, and an evaluation: W&B's own types refuse messages in parts."""
    changes = {"log_completions": True, "report_to": ["wandb"], "max_steps": 1, "eval_strategy": "steps"}
    data = write_mixed(tmp_path / "mixed", count=2)
    tables = offline_wandb(make_trainer(tiny_model, data, tmp_path / "out", eval_data=data, **changes).train)
    table = next(table for table in tables if "completion" in table["columns"] and "step" in table["columns"])
    prompts = [json.dumps(line[table["columns"].index("prompt")]) for line in table["data"]]
    assert len(table["data"]) >= 4 and all("What colour is picture" in prompt for prompt in prompts)
    assert len(list((tmp_path / "out/completions").glob("*.parquet"))) == 1


@pytest.mark.slow
def test_trackio_gets_scalars_and_rollouts(tiny_model, examples_json, tmp_path):
    """As a user launches it, with TRL's table of completions."""
    options = ("--report_to", "trackio", "--log_completions", "true", "--max_steps", "2", "--hub_token", "hf_secret")
    env = {"NUM_PROCESSES": "1", "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = run_grpo(tiny_model, examples_json, tmp_path / "out", *options, **env)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("trackio/*.db")
    assert b"hf_secret" not in file.read_bytes()
    with contextlib.closing(sqlite3.connect(file)) as database:
        events = [json.loads(event) for (event,) in database.execute("select metrics from metrics order by step")]
    logged = [row["reward"] for row in read_jsonl(tmp_path / "out/log.jsonl") if "reward" in row]
    assert [event["train/reward"] for event in events if "train/reward" in event] == pytest.approx(logged)
    groups = {event["train/global_step"]: event["rollout"]["_value"] for event in events if "rollout" in event}
    for step in (1, 2):
        rows = [row for row in read_jsonl(tmp_path / "out/trajectories/train.jsonl") if row["step"] == step]
        assert [line["completion"] for line in groups[step]] == [row["completion"] for row in rows if not row["group"]]
        assert all((tmp_path / "trackio/media" / line["image_1"]["file_path"]).is_file() for line in groups[step])
    tables = [event["completions"]["_value"] for event in events if "completions" in event]
    assert tables and all(len(table) == 16 for table in tables)


def test_a_rollout_in_wandb_has_every_image_and_its_step(tmp_path, monkeypatch):
    import wandb

    logged = []
    monkeypatch.setattr(wandb, "log", logged.append)
    images = [str(tmp_path / name) for name in ("wide.png", "gone.png", "tall.png")]
    Image.new("RGB", (2048, 56)).save(images[0])
    Image.new("RGB", (56, 84)).save(images[2])
    row = {"images": images, "prompt": "?", "solution": "left", "completion": "left", "rewards": {"accuracy": 1.0}}
    trackers.show_as_table("wandb", [{**row, "advantage": 0.5, "length": 3}] * 2, 7)
    (entry,) = logged
    table = entry["rollout"]
    names = ["step", "image_1", "image_2", "prompt", "solution", "completion", "accuracy", "advantage", "length"]
    assert entry["train/global_step"] == 7 and table.columns == names
    assert [line[:1] + line[3:] for line in table.data] == [[7, "?", "left", "left", 1.0, 0.5, 3]] * 2
    assert [image.size for image in trackers.shown_images(images)] == [(512, 14), (56, 84)]


@pytest.mark.parametrize(
    "text",
    [
        "````\n``````````\n<b>bold</b>\n~~~\n[link](javascript:alert(1))\n<img src=x onerror=alert(1)>",
        "\r\n```\r<h1>\u2028```\x0b<iframe>",
        "</code></pre><h2>out</h2><script>alert(1)</script>",
        "    \n\n***\n\n| a | b |\n|---|---|\n| <i> | 2 |",
    ],
)
def test_markup_in_model_text_means_nothing(text):
    row = {"prompt": text, "solution": text, "completion": text, "rewards": {"r": None}, "advantage": 0.0}
    rendered = plugin_util.markdown_to_safe_html(rollout_markdown([row]))
    assert set(re.findall(r"<(\w+)", rendered)) == {"p", "pre", "code"}
    assert len(re.findall("<pre><code>", rendered)) == 3


def test_long_texts_are_cut():
    assert len(code_block("`" * 1_000_000)) < 50_000


@pytest.mark.parametrize(
    "resumed_at, logging_steps, shown", [(0, 1, [1, *range(10, 101, 10)]), (54, 7, [56, 63, 70, 84, 91])]
)
def test_rollouts_are_shown_first_and_after_every_tenth(tmp_path, monkeypatch, resumed_at, logging_steps, shown):
    seen = []

    class Trainer:
        class recorder:
            newest = ()

        class callback_handler:
            callbacks = (trackers.WandbCallback.__new__(trackers.WandbCallback),)

    monkeypatch.setattr(trackers, "show_as_table", lambda tracker, rows, step: seen.append(step))
    rollouts, args, control = LogRollouts(Trainer()), make_config(tmp_path), TrainerControl()
    state = TrainerState(global_step=resumed_at, max_steps=100, is_world_process_zero=True)
    rollouts.on_train_begin(args, state, control)
    for step in range(resumed_at + 1, 101):
        state.global_step = step
        if step % logging_steps == 0:
            rollouts.on_log(args, state, control, logs={"loss": 0.0})
            rollouts.on_log(args, state, control, logs={"eval_loss": 0.0})
    assert seen == shown


def test_a_notebooks_plot_leaves_out_what_a_reward_did_not_give(tmp_path, monkeypatch):
    shown = []
    page = SimpleNamespace(HTML=str, display=lambda *_, display_id: SimpleNamespace(update=shown.append))
    monkeypatch.setitem(sys.modules, "IPython.display", page)
    plot, control = live.LivePlot(), TrainerControl()
    state = TrainerState(global_step=1, max_steps=2)
    plot.on_train_begin(make_config(tmp_path), state, control)
    for state.global_step, reward in ((1, None), (2, 0.5)):
        logs = {"rewards/mine/mean": reward, "reward": 0.5}
        plot.on_log(make_config(tmp_path), state, control, logs=logs)
    assert plot.points == {"mine": {2: 0.5}} and len(shown) == 1 and "step 2 of 2" in shown[0]


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    """Makes a list of what a library's logger says."""

    def listen(name: str) -> list[str]:
        messages, handler = [], logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
        return messages

    return listen


@pytest.mark.parametrize("name, part", open_r1.NOISE.items())
def test_only_the_noise_is_silenced(said, name, part):
    messages = said(name)
    logging.getLogger(name).warning("[RANK 0] %s, says a library", part)
    logging.getLogger(name).warning("something else")
    assert messages == ["something else"]


def test_nothing_is_said_of_a_configuration_that_is_nobodys(said):
    """Transformers builds SmolVLM's default one at every start; what is wrong with a user's is still told."""
    messages = said("transformers.configuration_utils")
    logging.Logger.warning_once.cache_clear()
    AutoConfig.for_model("smolvlm")
    assert messages == []
    AutoConfig.for_model("smolvlm", text_config={"vocab_size": 300, "pad_token_id": 301})
    assert len(messages) == 1 and messages[0].endswith(
        "between 0 and 299), got 301. This may result in unexpected behavior."
    )


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, capsys):
    errors = [KeyError("of ours"), Mistake(f"{tmp_path}: log.jsonl: line 3: not JSON")]

    def fail(run):
        raise errors.pop()

    monkeypatch.setattr(page, "write_report", fail)
    entry.report(str(tmp_path))
    assert capsys.readouterr().err == f"no report: error: {tmp_path}: log.jsonl: line 3: not JSON\n"
    entry.report(str(tmp_path))  # a bug of ours, which keeps its traceback
    printed = capsys.readouterr().err
    assert printed.startswith("no report: Traceback") and printed.endswith("KeyError: 'of ours'\n")
