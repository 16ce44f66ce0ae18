"""Reflections in completions: against a hand-labelled table, on hostile texts, and the metrics that follow."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from open_r1.answers.reflection import Reflection, analyse, concluded, find_reflections, reflection_shares

LABELLED = [
    json.loads(line)
    for line in (Path(__file__).parent / "data/reflections.jsonl").read_text(encoding="utf-8").splitlines()
]
MIN_PRECISION, MIN_RECALL = 0.9, 0.85


@pytest.mark.parametrize("languages", [{"en", "zh", "de", "fr", "es"}, {"en"}])
def test_precision_and_recall_on_the_labelled_table(languages):
    rows = [row for row in LABELLED if row["language"] in languages]
    found = {row["text"]: bool(find_reflections(row["text"])) for row in rows}
    missed = [row["text"] for row in rows if row["reflective"] and not found[row["text"]]]
    wrong = [row["text"] for row in rows if found[row["text"]] and not row["reflective"]]
    true = sum(row["reflective"] for row in rows) - len(missed)
    precision, recall = true / (true + len(wrong)), true / (true + len(missed))
    assert precision >= MIN_PRECISION and recall >= MIN_RECALL, (wrong, missed)


def test_considered_and_final_options_on_the_labelled_table():
    rows = [row for row in LABELLED if "options" in row]
    wrong = []
    for row in rows:
        read = analyse(row["text"], row["options"])
        expected = (row["considered"], row["final"], row["self_corrected"])
        if (read.considered, read.final, read.self_corrected) != expected:
            wrong.append((row["text"], read))
    assert len(rows) >= 20 and len(wrong) <= 0.1 * len(rows), wrong
    assert not any(read.self_corrected for _, read in wrong)  # the misses do not invent a correction


def test_spans_are_offsets_of_the_original_text():
    # a full-width word, a curly apostrophe, characters beyond 16 bits and one that normalises to many
    text = "\U0001f600 \ufdfa. \uff37\uff21\uff29\uff34, the cup. Let\u2019s double-check. \u1e9e"
    assert [text[start:end] for start, end in find_reflections(text)] == [
        "\uff37\uff21\uff29\uff34",
        "Let\u2019s double-check",
    ]
    assert find_reflections("wait") == [(0, 4)]


def test_overlapping_phrases_are_one_span():
    text = "Let me look, wait, at it once more."
    assert [text[start:end] for start, end in find_reflections(text)] == ["Let me look, wait, at it once more"]
    text = "But wait! I can think of something else."
    assert [text[start:end] for start, end in find_reflections(text)] == ["wait", "I can think of something"]


@pytest.mark.parametrize("unit", ["i ", "wait, ", "let me look ", ". ", "\u7b49", "<answer>"])
def test_a_megabyte_of_hostile_text_takes_linear_time(unit):
    text = (unit * 1_000_000)[:1_000_000]
    start = time.process_time()
    analyse(text, ["left", "right"])
    assert time.process_time() - start < 30  # 5 s on a slow machine; quadratic time would be hours


def test_without_options_there_is_nothing_to_correct():
    text = "Left. Wait, right. <answer>right</answer>"
    for options in (None, [], [""]):
        assert analyse(text, options) == Reflection(((6, 10),), None, None)
        assert not analyse(text, options).self_corrected


@pytest.mark.parametrize(
    "text, considered, final",
    [
        ("It is left. It is not right. Wait, no. <answer>right</answer>", "left", "right"),
        ("It is right, not left. Hmm, no. <answer>left</answer>", "right", "left"),  # "not" sets the other aside
        ("It is right or left. Hmm, no. <answer>left</answer>", None, "left"),  # one sentence names both
        ("First right. Then left. Wait, hm. <answer>right</answer>", "left", "right"),  # the last one counts
        ("It is left. <answer>right</answer>", None, "right"),  # no reflection
        ("Left. Wait, left or right? <answer>left or right</answer>", "left", None),  # a hedge is no answer
        ("Left. Wait, I run out of", "left", None),  # cut off
        ("Wait, left. Wait, right. <answer>right</answer>", None, "right"),  # nothing before the first reflection
    ],
)
def test_the_option_before_the_first_reflection(text, considered, final):
    read = analyse(text, ["left", "right"])
    assert (read.considered, read.final) == (considered, final)
    assert read.self_corrected == (None not in (considered, final) and considered != final)


def test_a_long_text_is_searched_backwards_from_its_reflection():
    long = "The sky is blue. " * 200
    end = " Wait, no. <answer>left</answer>"
    assert analyse(f"It is left. {long}It is right.{end}", ["left", "right"]).considered == "right"
    assert analyse(f"It is right. {long}{end}", ["left", "right"]).considered is None  # too long ago


@pytest.mark.parametrize(
    "text, thought, answer",
    [
        ("First left. So it is right.</think><answer> Right. </answer>", "right", "right"),
        ("It is right. It is not left. <answer>left</answer>", "right", "left"),  # "not" sets it aside; no </think>
        ("It is right.</think> It is left.</think><answer>left</answer>", "right", "left"),  # the thought ends once
        ("No idea.</think> It is right. <answer>left</answer>", None, "left"),  # what follows is no thought
        ("It is right.</think><answer>left or right</answer>", None, None),  # a hedge is no answer
        ("It is right.", None, None),  # cut off
    ],
)
def test_what_a_thought_comes_to_and_what_is_answered(text, thought, answer):
    assert concluded(text, ["left", "right"]) == (thought, answer)
    assert concluded(text, []) == concluded(text, ["", " "]) == (None, None)


def row(reflections: list, self_corrected: bool, **rewards: float | None) -> dict:
    return {"reflections": reflections, "self_corrected": self_corrected, "rewards": rewards}


def test_shares():
    rows = [
        row([[0, 4]], True, accuracy_reward=1.0),
        row([[0, 4]], True, accuracy_reward=0.0),
        row([[0, 4], [9, 12]], False, accuracy_reward=1.0),
        row([], False, accuracy_reward=1.0),
    ]
    assert reflection_shares(rows) == {
        "reflection/share": 0.75,
        "reflection/self_correction": 0.5,
        "reflection/correction_success": 0.5,
    }
    others = [row([[0, 4]], True, accuracy_reward=None), row([], False, accuracy_reward=0.0)]  # one was not judged
    assert reflection_shares([rows[0], *others])["reflection/correction_success"] == 1.0
    assert "reflection/correction_success" not in reflection_shares(rows[2:])  # nothing was corrected
    unjudged = [row([[0, 4]], True, my_reward=1.0)]
    assert "reflection/correction_success" not in reflection_shares(unjudged)


def test_it_starts_without_torch():
    code = "import sys, open_r1.answers.reflection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
