"""Recipes side by side: the numbers of hand-made runs, their table and figure, and the script that makes real ones."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fake_run import row, write_run
from open_r1.answers.statistics import paired_bootstrap, wilson
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.base.files import to_json
from open_r1.evaluation.run import make_result
from open_r1.reporting.comparison import compare_recipes, first_reached, paired_table, read_trial
from open_r1.settings.recipes import merge_recipes
from open_r1.world.parquet import write_cvbench, write_sat
from open_r1.world.scene import LEVELS
from support import load_script, read_jsonl

SWEEP = REPO_ROOT / "scripts/sweep.sh"
OVERLAYS = sorted(path.stem for path in (REPO_ROOT / "configs/overlays").glob("*.yaml"))
QUESTIONS = 20
SIZE = set(merge_recipes(["configs/overlays/tiny.yaml"]))


# --- the mathematics --------------------------------------------------------------------------------------------


def test_a_paired_difference_of_one_seed_has_walds_interval():
    rng = np.random.default_rng(0)
    first, second = ((rng.random((1, 400)) < share).astype(float) for share in (0.5, 0.6))
    difference = second - first
    half = 1.96 * difference.std() / 20
    expected = (difference.mean(), difference.mean() - half, difference.mean() + half)
    assert paired_bootstrap(first, second) == pytest.approx(expected, abs=0.006)


def rotated(right: Sequence[Sequence[bool]]) -> list[dict]:
    """Judged rows of questions, each right or not in each of its rotations."""
    return [
        {"id": number, "rotation": rotation, "question": f"question {number}?", "correct": is_right}
        for number, rotations in enumerate(right)
        for rotation, is_right in enumerate(rotations)
    ]


def test_the_difference_of_rotated_questions_is_that_of_their_means():
    """Half right everywhere is no worse than right everywhere on half of the questions."""
    always_left = rotated([[True, False]] * 10)
    half = rotated([[True, True]] * 5 + [[False, False]] * 5)
    better = rotated([[True, True]] * 5 + [[True, False]] * 5)
    header, _, *lines = paired_table("SAT", ["left", "half", "better"], [always_left, half, better]).splitlines()
    assert header.startswith("| SAT | Total in points | right in more rotations | right in fewer rotations |")
    assert lines[0].startswith("| half | +0.00 (-") and lines[0].endswith("| 5 | 5 | 10 | - |")
    assert lines[1].startswith("| better | +25.00 (+") and lines[1].endswith("| 5 | 0 | 10 | - |")


def test_questions_asked_once_have_mcnemars_p():
    first, second = (rotated([[number < right] for number in range(10)]) for right in (2, 7))
    header, _, line = paired_table("VSR", ["a", "b"], [first, second]).splitlines()
    assert "| right where the first is wrong | wrong where the first is right |" in header
    assert line.startswith("| b | +50.00 (+") and line.endswith("| 5 | 0 | 10 | 0.062 |")


def test_seeds_that_differ_widen_the_interval():
    """Every seed of one recipe answers all right or all wrong; questions alone would make us sure."""
    steady = np.full((4, 200), 0.5)
    wild = np.array([[1.0], [1.0], [0.0], [0.0]]).repeat(200, axis=1)
    difference, low, high = paired_bootstrap(steady, wild)
    assert difference == 0 and (low, high) == pytest.approx((-0.5, 0.5))
    assert paired_bootstrap(steady, steady) == pytest.approx((0, 0, 0))


@pytest.mark.parametrize(
    "accuracy, completions",
    [
        ([0.2, 0.4, 0.6], 75.0),  # half way from the second point to the third
        ([0.2, 0.5, 0.3], 50.0),  # what comes after does not matter
        ([0.7, 0.4, 0.9], 0.0),
        ([0.1, 0.2, 0.49], None),
    ],
)
def test_where_a_curve_reaches_a_target(accuracy, completions):
    assert first_reached(np.array([0, 50, 100]), np.array(accuracy), 0.5) == completions


# --- hand-made runs ---------------------------------------------------------------------------------------------


def held_out(step: int, right: Sequence[bool], first_image: int = 0) -> list[dict]:
    """The rows of an evaluation: question number q is about picture q."""
    return [
        row(
            step=step,
            group=number,
            prompt=f"question {number}",
            images=[f"{first_image + number:02}.png"],
            rewards={"accuracy_reward": float(is_right), "format_reward": 1.0},
        )
        for number, is_right in enumerate(right)
    ]


def write_trial(path: Path, finals: int, sampled: int = 8, steps: int = 10, benchmark: int | None = None, **changes):
    """A run that is right on 4 questions at the start and on `finals` at the end, half way between in the middle."""
    counts = {0: 4, steps // 2: (4 + finals) // 2, steps: finals}
    answers = [
        held
        for step, right in counts.items()
        for held in held_out(step, [number < right for number in range(QUESTIONS)], **changes)
    ]
    thoughts = ["It is right.", "It is left."]
    train = [
        row(
            step=step,
            group=number,
            length=step,
            reflections=[[0, 1]] if number == 0 else [],
            completion=f"{(thoughts + ['Hm.'] * sampled)[number]}</think><answer>left</answer>",
        )
        for step in range(1, steps + 1)
        for number in range(sampled)
    ]
    events = [{"step": step, "time": 1.0, "step_time": 2.5} for step in range(1, steps + 1)]
    write_run(path, train, answers, events, max_steps=steps)
    if benchmark is not None:
        rows = [
            {
                **{"id": number, "question": f"question {number}?", "options": ["left", "right"], "task": "Where"},
                **{"ground_truth": "left", "response": f"<answer>{'left' if number < benchmark else 'right'}</answer>"},
            }
            for number in range(10)
        ]
        about = {"benchmark": "CV-Bench", "prompt": {"name": "base", "style": "reasoning"}}
        (path / "CVBench_result_seed_reasoning.json").write_bytes(to_json(make_result(rows, about, "lenient")))
    return path


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """A reference of two seeds, one that samples twice as much and ends higher, and one that ends lower."""
    return [
        write_trial(tmp_path / "none/seed0", 12, benchmark=5),
        write_trial(tmp_path / "none/seed1", 14, benchmark=7),
        write_trial(tmp_path / "dapo+refill/seed0", 18, sampled=16, benchmark=9),
        write_trial(tmp_path / "papo/seed0", 8, benchmark=2),
    ]


def test_what_recipes_reached_and_took(runs):
    reference, refilled, worse = compare_recipes(
        {
            "none": [read_trial(path) for path in runs[:2]],
            "dapo+refill": [read_trial(runs[2])],
            "papo": [read_trial(runs[3])],
        }
    )
    own = reference["held_out"]
    assert own["accuracy"] == 0.65 and own["of_seeds"] == [0.6, 0.7] and own["difference"] is None
    assert own["interval"] == list(wilson(13, QUESTIONS))  # 20 questions, not 40: both seeds were asked the same
    assert reference["benchmark"]["accuracy"] == 0.6 and reference["benchmark"]["interval"] == list(wilson(6, 10))
    assert (reference["completions"], refilled["completions"]) == (80, 160)
    assert reference["seconds"] == 25 and reference["length"] == 10 and reference["reflective"] == 1 / 8
    assert reference["against"] == 1 / 2
    difference = refilled["held_out"]["difference"]
    assert difference["accuracy"] == pytest.approx(0.25)
    assert 0 < difference["interval"][0] < 0.25 < difference["interval"][1]
    assert worse["held_out"]["difference"]["accuracy"] == pytest.approx(-0.25)
    assert worse["benchmark"]["difference"]["accuracy"] == pytest.approx(-0.4)

    assert reference["curve"]["completions"] == [0, 40, 80]
    assert reference["curve"]["low"] == [0.2, 0.4, 0.6] and reference["curve"]["high"] == [0.2, 0.45, 0.7]
    assert reference["reached"] == {
        "accuracy": pytest.approx(0.65),
        "completions": 80,
        "of_seeds": [None, pytest.approx(72)],
    }
    assert refilled["reached"]["completions"] == pytest.approx(80 + 80 * (0.65 - 0.55) / 0.35)
    assert worse["reached"]["completions"] is None


def test_what_a_resumed_run_asked_again_counts_once(tmp_path):
    path = write_trial(tmp_path / "none/seed0", 10)
    with (path / "trajectories/eval.jsonl").open("a") as file:
        for record in held_out(10, [number < 12 for number in range(QUESTIONS)]):
            file.write(json.dumps(record) + "\n")
    trial = read_trial(path)
    assert trial.held_out.shape == (3, QUESTIONS) and trial.held_out[-1].mean() == 0.55
    assert trial.held_out[-1, 9:13].tolist() == [1, 0.5, 0.5, 0]


def test_seeds_that_ask_in_another_order_ask_the_same(tmp_path):
    path = write_trial(tmp_path / "none/seed0", 10)
    held = path / "trajectories/eval.jsonl"
    rows = [json.loads(line) for line in held.read_text().splitlines()]
    other = write_trial(tmp_path / "none/seed1", 10) / "trajectories/eval.jsonl"
    mirrored = [
        {**rows[i // QUESTIONS * QUESTIONS + QUESTIONS - 1 - i % QUESTIONS], "group": i % QUESTIONS}
        for i in range(len(rows))
    ]
    other.write_text("".join(json.dumps(record) + "\n" for record in mirrored))
    one, two = read_trial(path), read_trial(other.parent.parent)
    assert one.questions == two.questions and np.array_equal(one.held_out, two.held_out)


def test_two_questions_with_one_picture_and_one_answer_are_told_apart(tmp_path):
    """In whatever order they are asked, and whatever template a recipe puts around them."""
    for number, template in enumerate(("{}", "User: {}\nAssistant:")):
        asked = [
            row(group=group, prompt=template.format(text), images=["0.png"], rewards={"accuracy_reward": right})
            for group, (text, right) in enumerate([("What is left?", 1.0), ("Who is left?", 0.0)][:: 1 - 2 * number])
        ]
        trial = read_trial(write_run(tmp_path / f"none/seed{number}", [row()], asked))
        assert trial.held_out.tolist() == [[1, 0]]


def compared(monkeypatch, capsys, *arguments: object) -> str:
    """What the command prints."""
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    load_script(REPO_ROOT / "scripts/sweep.py").main()
    return capsys.readouterr().out


def test_tables_figure_and_numbers(tmp_path, runs, monkeypatch, capsys):
    out = compared(monkeypatch, capsys, *runs)
    text = (tmp_path / "sweep.md").read_text().partition("<!--")[0]  # who made it
    assert text.strip() in out
    rows = json.loads((tmp_path / "sweep.json").read_text())["recipes"]
    assert [each["recipe"] for each in rows] == ["none", "dapo+refill", "papo"]
    low, high = (f"{100 * bound:.1f}" for bound in wilson(13, QUESTIONS))
    assert f"| none | 2 | 65.0 ({low} - {high}) | 60.0 - 70.0 | - | 60.0 (" in text
    assert re.search(r"^\| dapo\+refill \| 1 \| 90\.0 \(.*\| \+25\.0 \(\+\d", text, re.MULTILINE)
    assert "| none | 80 | 80 | -, 72 | 25 | 10.0 | 12.5 | 50.0 |" in text
    assert "| papo | 80 | - | - | 25 | 10.0 | 12.5 | 50.0 |" in text
    assert "20 held-out questions and 10 of CV-Bench's form" in text
    svg = (tmp_path / "sweep.svg").read_text()
    assert all(f">{name}<" in svg for name in ("none", "dapo+refill", "papo"))
    assert (tmp_path / "sweep.png").stat().st_size > 10_000

    alone = write_trial(tmp_path / "lora/seed0", 12)
    out = compared(monkeypatch, capsys, write_trial(tmp_path / "none/seed2", 12), alone)  # without result files
    assert re.search(r"^\| lora \| 1 \| 60.* \| \+0\.0 \(\+0\.0 - \+0\.0\) \| - \| - \| - \|$", out, re.MULTILINE)
    assert "of CV-Bench's form" not in out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"first_image": 1}, "lora/seed0: other held-out questions than"),
        ({"steps": 20}, "lora/seed0: evaluated after other steps than"),
        ({"benchmark": 3}, "lora/seed0: its result file is about other questions than"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, changes, message):
    runs = [write_trial(tmp_path / "none/seed0", 12), write_trial(tmp_path / "lora/seed0", 12, **changes)]
    reference, other = map(read_trial, runs)
    with pytest.raises(ValueError, match=message):
        compare_recipes({"none": [reference], "lora": [other]})


def test_what_is_no_run_of_a_sweep(tmp_path):
    path = write_trial(tmp_path / "none/seed0", 12)
    (path / "A_result_1.json").write_text("{}")
    (path / "B_result_1.json").write_text("{}")
    with pytest.raises(Mistake, match=rf"^{path}: 2 results in it \(A_result_1.json, B_result_1.json\); keep one$"):
        read_trial(path)
    for rows, message in (
        ([], "no held-out answers"),
        (held_out(0, [True]) + held_out(10, [True, False]), "asked 1 to 2 held-out questions"),
        ([held | {"rewards": {"other": 1.0}} for held in held_out(0, [True])], "no accuracy_reward in"),
    ):
        path = write_run(tmp_path / f"{message[:5]}/seed0", [row()], rows)
        with pytest.raises(Mistake, match=f"^{path}: .*{message}"):
            read_trial(path)


# --- the script -------------------------------------------------------------------------------------------------

# Stands for the Python of a sweep: it writes down what it is asked, behind what a training finds in its environment,
# and a training leaves the settings of its recipes.
STUB = r"""#!/bin/sh
[ "$1" != -c ] || exit 0
echo "NUM_PROCESSES=$NUM_PROCESSES MODEL=$MODEL CONFIG=$CONFIG $*" >>"$CALLS"
case "$* $OUTPUT $CONFIG" in
    *launch.py*"$BAD"*) exit 3 ;;
    *launch.py*no_think*) echo '{"chat_template_kwargs": {"style": "direct"}}' >"$OUTPUT/run.json" ;;
    *launch.py*) echo '{"chat_template_kwargs": null}' >"$OUTPUT/run.json" ;;
esac
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    """The scripts, with three overlays, and a Python that trains nothing."""
    root = tmp_path / "a clone"
    for name in ("scripts", "src"):
        (root / name).mkdir(parents=True)
    for path in (SWEEP, SWEEP.with_name("tiny_world.sh"), SWEEP.with_name("env.sh")):
        (root / "scripts" / path.name).symlink_to(path)
    for part in ("data", "eval", "open-r1-multimodal"):
        (root / "src" / part).symlink_to(REPO_ROOT / "src" / part)
    (root / "configs/overlays").mkdir(parents=True)
    (root / "configs/tiny").mkdir()
    for name in ("overlays/tiny", "overlays/dapo", "overlays/distill", "overlays/no_think", "tiny/grpo"):
        (root / f"configs/{name}.yaml").write_text("beta: 0\n")
    (root / "python").write_text(STUB)
    (root / "python").chmod(0o755)
    return root


def sweep(
    root: Path, *arguments: str, bad: str = "nothing", **environment: str
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """What the script says, and what it asked of Python."""
    calls = root / "calls"
    calls.write_text("")
    env = {**os.environ, "PYTHON": str(root / "python"), "CALLS": str(calls), "BAD": bad, "MODEL": "", **environment}
    for name in {"OUTPUT", "TEACHER"} - set(environment):
        env.pop(name, None)
    command = ["sh", str(root / "scripts/sweep.sh"), *arguments]
    done = subprocess.run(command, env=env, cwd=root.parent, capture_output=True, text=True)
    return done, calls.read_text().splitlines()


def test_a_sweep_runs_every_recipe_with_every_seed_and_compares(clone):
    done, calls = sweep(clone, "--overlays", "none dapo+no_think", "--seeds", "0 3", "--steps", "2", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    trained = sorted(call for call in calls if "launch.py" in call)
    assert len(trained) == 4 and all("NUM_PROCESSES=1 " in call and "--max_steps 2" in call for call in trained)
    recipes = "CONFIG=configs/tiny/grpo.yaml {}configs/overlays/tiny.yaml "
    overlays = "configs/overlays/dapo.yaml configs/overlays/no_think.yaml "
    assert sum(recipes.format("") in call for call in trained) == 2
    assert sum(recipes.format(overlays) in call for call in trained) == 2
    assert sum("--seed 3 " in call for call in trained) == 2
    assert all(f"MODEL={clone}/configs/tiny/base " in call for call in trained)
    asked = {call for call in calls if "test_qwen2vl_CVBench.py" in call}
    assert len(asked) == 4
    assert all(("no_think" in call) == ("--no-use_reasoning_prompt" in call) for call in asked)  # as it was trained
    runs = [clone / f"outputs/sweep/{name}/seed{seed}" for name in ("none", "dapo+no_think") for seed in (0, 3)]
    assert calls[-1].endswith(f"sweep.py {' '.join(map(str, runs))} --output {clone}/outputs/sweep")

    done, calls = sweep(clone, "--overlays", "none dapo+no_think", "--seeds", "0 3", "--steps", "2")
    assert done.returncode == 0 and not any("launch.py" in call for call in calls)  # finished runs are not repeated
    (clone.parent / "other").mkdir()
    done, calls = sweep(clone, "--overlays", "none", "--seeds", "0 3", "--steps", "4", MODEL="other")
    trained = [call for call in calls if "launch.py" in call]
    assert len(trained) == 2 and all(f"MODEL={clone.parent}/other " in call for call in trained)  # to more steps


def test_distillation_learns_from_the_model_that_the_environment_names(clone):
    (clone.parent / "a teacher").mkdir()
    done, calls = sweep(clone, "--overlays", "none dapo+distill", "--seeds", "0", TEACHER="a teacher")
    assert done.returncode == 0, done.stderr
    for call in calls:
        learns = "launch.py" in call and "distill.yaml" in call
        assert (f"--teacher_model_name_or_path {clone.parent}/a teacher" in call) == learns


def test_a_run_that_fails_stops_no_other_and_is_named(clone):
    arguments = ("--overlays", "none dapo", "--seeds", "0 1", "--jobs", "1")
    done, calls = sweep(clone, *arguments, bad="dapo/seed0")
    assert done.returncode == 1
    assert done.stderr == f"sweep: not finished: {clone}/outputs/sweep/dapo/seed0.log\n"
    assert "dapo, seed 0: failed" in done.stdout and "dapo, seed 1: done" in done.stdout
    assert "dapo/seed1" in calls[-1] and "dapo/seed0" not in calls[-1]  # the others are compared
    done, calls = sweep(clone, *arguments)
    assert done.returncode == 0 and sum("launch.py" in call for call in calls) == 1

    done, calls = sweep(clone, "--overlays", "no_think dapo", "--seeds", "0", bad="no_think/seed0")
    assert done.returncode == 1 and "no run of no_think is finished" in done.stderr
    assert not any("sweep.py" in call for call in calls)  # without the reference there is nothing to compare with


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--overlays: names none"),
        (["--overlays", "none dapo+gone"], "--overlays: there is no configs/overlays/gone.yaml"),
        (["--overlays", "none distill"], "distill needs TEACHER, the folder of a model to learn from"),
        (["--overlays", "none dapo none"], "none is there twice"),
        (["--overlays", "none", "--seeds", "0 one"], "expected whole numbers, not 'one'"),
        (["--overlays", "none", "--jobs", "0"], "leave nothing to run"),
        (["--overlays", "none", "--step", "2"], "unknown argument --step"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_starts(clone, arguments, message):
    done, calls = sweep(clone, *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not calls and not (clone / "outputs").exists()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_overlay_changes_the_size_of_the_tiny_recipe(overlay):
    plain = merge_recipes(["configs/tiny/grpo.yaml"])
    files = ["configs/tiny/grpo.yaml", f"configs/overlays/{overlay}.yaml", "configs/overlays/tiny.yaml"]
    swept = merge_recipes(files)
    assert {name for name in SIZE if swept[name] != plain[name]} == set()


@pytest.mark.slow
def test_a_sweep_that_was_interrupted_goes_on(tmp_path, quick_python):
    """Two recipes, a seed, a step; stopped as by Ctrl-C in the second run. The world is smaller than its own."""
    world = tmp_path / "sweep/world"
    for fold, rows, seed in (("train", 100, 1), ("val", 32, 2)):
        write_sat(world / f"SAT_{fold}.parquet", rows, seed, LEVELS["easy"])
    write_cvbench(world / "cvbench", 40, 3, LEVELS["easy"])
    command = ["sh", str(SWEEP), "--overlays", "none lora", "--seeds", "3", "--steps", "1", "--jobs", "1"]
    env = {**os.environ, "PYTHON": sys.executable, "OUTPUT": str(tmp_path / "sweep")}
    first, second = runs = [tmp_path / f"sweep/{name}/seed3" for name in ("none", "lora")]
    process = subprocess.Popen(
        command,
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background ignores it
    )
    try:
        while not (second / "log.jsonl").exists():
            assert process.poll() is None, Path(f"{first}.log").read_text()[-3000:]
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) != 0
        with contextlib.suppress(ProcessLookupError):  # the shell is gone; the launcher ends its process first
            while True:
                os.killpg(process.pid, 0)
                time.sleep(0.5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    assert [(run / "sweep_done").exists() for run in runs] == [True, False]
    before = (first / "log.jsonl").stat().st_mtime_ns

    done = subprocess.run(command, env={**env, "PYTHON": str(quick_python)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + Path(f"{second}.log").read_text()[-3000:]
    assert (first / "log.jsonl").stat().st_mtime_ns == before
    rows = json.loads((tmp_path / "sweep/sweep.json").read_text())["recipes"]
    assert [(each["recipe"], each["completions"]) for each in rows] == [("none", 256), ("lora", 256)]
    for each in rows:
        assert each["curve"]["steps"] == [0, 1] and len(each["runs"]) == 1
        assert (each["held_out"]["questions"], each["benchmark"]["questions"]) == (32, 40)
        assert 0 < each["held_out"]["accuracy"] < 1 and each["seconds"] > 0 and each["length"] > 1
    asked = [sorted(row["prompt"] for row in read_jsonl(run / "trajectories/train.jsonl")) for run in runs]
    assert asked[0] == asked[1]  # a seed asks the same of every recipe
    assert (tmp_path / "sweep/sweep.png").stat().st_size > 10_000
