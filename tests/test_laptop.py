"""The evening on a laptop: what its model is taught, the checks that end it, the script from its start to its table."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fresh import clone
from laptop import lessons, sight
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.evaluation.run import make_result
from open_r1.rewards import accuracy_reward, consistency_reward, format_reward
from open_r1.world.parquet import row_rng
from open_r1.world.words import LIST_ALL, TURNS, Thing
from support import hear_signals, load_script

SCRIPT = REPO_ROOT / "scripts/laptop.sh"


def test_right_answers_are_balanced():
    """Of each kind of question, each option is right equally often, whatever its place among them."""
    right = defaultdict(Counter)
    for row in range(len(TURNS) * 4):
        asked, _ = lessons.balanced(row_rng(1, row), row)
        right[row % len(TURNS)][sorted(asked.options).index(asked.answer)] += 1
    for kind, counts in right.items():
        expected = [2, 2] if len(counts) == 2 else [2, 1, 1] if len(counts) == 3 else [1, 1, 1, 1]
        assert sorted(counts.values(), reverse=True) == expected, TURNS[kind]


def test_answers_earn_the_format_reward_and_say_what_they_conclude():
    forms = Counter()
    for row in range(len(TURNS) * 4):
        _, question, answer = lessons.answer(row_rng(2, row), row)
        assert format_reward([answer]) == [1.0]
        thought, _, said = answer.removesuffix("</answer>").partition("</think> <answer>")
        assert thought.endswith(f"So it is {said}.") and said in question
        forms["Select from the following choices." in question] += 1
    assert min(forms.values()) > sum(forms.values()) / 4, "SAT's form and CV-Bench's"


def test_half_of_the_right_answers_contradict_their_thoughts():
    """As the consistency reward reads them; the others, glances too, are meant."""
    texts, golds, options = [], [], []
    for row in range(400):
        asked, _ = lessons.balanced(row_rng(4, row), row)
        _, _, answer = lessons.contradiction(row_rng(4, row), row)
        assert format_reward([answer]) == [1.0]
        texts.append(answer), golds.append(asked.answer), options.append(asked.options)
    right = accuracy_reward(texts, golds, options)
    meant = [value for value in consistency_reward(texts, golds, options, among_right=True) if value is not None]
    assert 0.75 < sum(right) / 400 < 0.95 and len(meant) == sum(right)
    assert 0.4 < 1 - sum(meant) / len(meant) < 0.65
    wrong = [
        value for value, is_right in zip(consistency_reward(texts, None, options), right, strict=True) if not is_right
    ]
    assert wrong and set(wrong) == {1.0}


@pytest.mark.slow
def test_a_base_that_contradicts_itself_is_made_as_documented(quick_python, tmp_path):
    """The first commands of docs/recipes.md's section, with a few rows and one step."""
    section = (REPO_ROOT / "docs/recipes.md").read_text().partition("## Thoughts that are meant")[2]
    lesson, train, _ = re.findall(r"^(?:python|MODEL=)(?:.*\\\n)*.*", section, re.MULTILINE)
    for command in (lesson.replace("--rows 1920", "--rows 32"), f"{train} --max_steps 1"):
        command = command.replace("python ", f"{quick_python} ", 1).replace("outputs/", f"{tmp_path}/")
        env = {**os.environ, "PYTHON": str(quick_python), "NUM_PROCESSES": "1", "ACCELERATE_CONFIG": "ddp"}
        done = subprocess.run(["sh", "-c", command], env=env, cwd=REPO_ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "contradicting/model.safetensors").is_file()


def test_captions_list_all_from_left_to_right():
    for row in range(60):
        _, question, said = lessons.caption(row_rng(3, row), row)
        places = re.findall(r"(?:\w+ \w+|X) at (\d) (\d)(?:, |\.$)", said)
        assert question == LIST_ALL and len(places) == said.count(" at ") > 0
        assert [across for across, _ in places] == sorted(across for across, _ in places)


def test_what_is_named_and_what_is_placed():
    things = [Thing("red circle", 35, 50, 2.0), Thing("red square", 35, 50, 2.0), Thing("X", 90, 50, 2.0)]
    across, deep = map(int, things[0].place.split())
    for shift, placed in ((0, 1.0), (1, 1.0), (2, 0.0)):
        said = f"blue circle at 0 0, red circle at {across + shift} {deep}, red triangle at 9 9."
        assert sight.measure([said], [things]) == {"named": 0.5, "placed": placed, "objects": 2}
    assert sight.measure(["yellow circle at 3 3."], [things]) == {"named": 0.0, "placed": 0.0, "objects": 2}


def write_result(path: Path, answers: list[str]) -> Path:
    """An evaluation of as many questions, whose right answers are `(A)` and `(B)` in turn."""
    rows = [
        {
            "id": number,
            "rotation": 0,
            "question": f"question {number}",
            "options": ["left", "right"],
            "task": "Relation",
            "ground_truth": "(A)" if number % 2 == 0 else "(B)",
            "response": f"<think></think> <answer>{answer}</answer>",
        }
        for number, answer in enumerate(answers)
    ]
    path.write_text(json.dumps(make_result(rows, {"benchmark": "CV-Bench"}, "lenient")))
    return path


@pytest.mark.parametrize(
    "answers, said",
    [
        (["left", "right"] * 30, None),
        ((["left", "right"] * 3 + ["right", "left"] * 2) * 6, "10.0 points above chance, 15 are asked for"),
        (["left"] * 60, "100% of the answers"),
    ],
)
def test_a_cold_start_is_tried_before_grpo(answers, said, tmp_path, monkeypatch):
    start = load_script(REPO_ROOT / "scripts/laptop/start.py")
    monkeypatch.setattr(sys, "argv", ["start.py", str(write_result(tmp_path / "result.json", answers))])
    if said is None:
        start.main()
    else:
        with pytest.raises(Mistake, match=said):
            start.main()


def test_seeds_of_one_model_count_as_one(tmp_path, monkeypatch, capsys):
    table = load_script(REPO_ROOT / "scripts/laptop/table.py")
    start = write_result(tmp_path / "start.json", ["left"] * 60)
    seeds = [write_result(tmp_path / f"{n}.json", ["left", "right"] * n + ["left"] * (60 - 2 * n)) for n in (30, 15)]
    arguments = ["--model", "start", start, "--model", "grpo", *seeds]
    monkeypatch.setattr(sys, "argv", ["table.py", *map(str, arguments)])
    table.main()
    header, _, first, second = capsys.readouterr().out.splitlines()
    assert header == "| model | seeds | CV-Bench | lowest - highest seed | against start |"
    assert first == "| start | 1 | 50.0 (37.7 - 62.3) | 50.0 - 50.0 | - |"
    assert second.startswith("| grpo | 2 | 87.5 (") and "| 75.0 - 100.0 | +37.5 (" in second

    other = write_result(tmp_path / "other.json", ["left"] * 40)
    monkeypatch.setattr(sys, "argv", ["table.py", *map(str, [*arguments, other])])
    with pytest.raises(Mistake, match="CV-Bench: results about other questions than the first model's"):
        table.main()


def test_an_unknown_argument_is_one_line():
    for arguments in (["--seed", "1"], ["--seeds"]):
        done = subprocess.run(["sh", SCRIPT, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("laptop: error: ") and done.stderr.count("\n") == 1


def test_the_quick_start_takes_a_seed_and_no_more():
    script = REPO_ROOT / "scripts/quickstart.sh"
    done = subprocess.run(["sh", script, "--seed", "1", "--steps", "5"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("quickstart: error: unknown argument --steps\n")


def test_a_run_that_fails_names_its_log(tmp_path):
    """Also where training went well, and the second evaluation does not."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$*"\ncase "$*" in *SAT-test*) exit 3 ;; esac\n')
    (tmp_path / "python").chmod(0o755)
    env = {**os.environ, "PYTHON": str(tmp_path / "python"), "RUN": str(tmp_path), "SHORT": "", "FEW": ""}
    command = ["sh", SCRIPT, "--run", "grpo", "0"]
    done = subprocess.run(command, env=env | {"HELD_OUT": "8"}, capture_output=True, text=True)
    log = tmp_path / "grpo/seed0.log"
    assert done.stderr == f"laptop: error: grpo, seed 0 failed; {log} says why\n" and "SAT-test" in log.read_text()


@pytest.mark.real
@pytest.mark.nightly
def test_a_rehearsal_goes_on_where_it_was_interrupted(tmp_path):
    """All of the script, with two steps of each part; it is set up already."""
    clone(tmp_path)
    (tmp_path / "setup.sh").write_text("")
    run, said = tmp_path / "outputs/laptop-rehearsal", tmp_path / "said.txt"
    command = ["sh", str(tmp_path / "scripts/laptop.sh"), "--rehearsal"]
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "src/open-r1-multimodal")}
    with said.open("w") as file:
        process = subprocess.Popen(
            command, env=env, stdout=file, stderr=file, start_new_session=True, preexec_fn=hear_signals
        )
        while not list(run.glob("*grpo/seed0/log.jsonl")) and process.poll() is None:
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() != 0, said.read_text()
    made = {name: (run / name).stat().st_mtime for name in ("blind", "sight", "start", "captions/rows.json")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert made == {name: (run / name).stat().st_mtime for name in made}
    table = done.stdout.partition("8/8 compare")[2]
    for row in ("start", "blind", "sight", "grpo", "dr_grpo"):
        assert f"| {row} |" in table
    assert "sees too little" in done.stderr and "above chance" in done.stderr, "a rehearsal goes on nevertheless"
    assert len(list(run.glob("*grpo/seed0/report.html"))) == 2
    assert (run / "sweep.md").is_file()
