"""The aha at a glance, and why there is none: signs in hand-made runs, and what the page has of them."""

import re
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from fake_run import PROMPT, fake_events, fake_rows, row, write_images, write_run
from open_r1.reporting.curves import collect
from open_r1.reporting.diagnosis import Diagnosis, diagnose
from open_r1.reporting.page import write_report
from open_r1.reporting.runs import read_run, scan_trajectories

STEPS = 20
SIGNALS, FORMAT = "Groups without signal", "Format alone"
ENTROPY, THOUGHT, BLIND = "Entropy collapse", "Thought against answer", "Blind accuracy"
COLLAPSE = "Answer collapse"
HOSTILE = "</script><img src=x onerror='window.hit = 1'>{{ 7 * 7 }}"


def found(run: Path) -> dict[str, Diagnosis]:
    folder = run / "trajectories"
    with scan_trajectories(folder / "train.jsonl") as train, scan_trajectories(folder / "eval.jsonl") as held_out:
        return {finding.name: finding for finding in diagnose(read_run(run), train, held_out)}


def rewards(right: float, kept: float) -> dict[str, float]:
    return {"accuracy_reward": right, "format_reward": kept}


def section(page: str, name: str) -> str:
    """The words of one section of the page, each tag a blank."""
    html = re.search(rf'<section id="{name}".*?</section>', page, re.DOTALL)
    return " ".join(unescape(re.sub("<[^>]*>", " ", html[0])).split()) if html else ""


# --- the signs ------------------------------------------------------------------------------------------------


def logged(first: dict, last: dict) -> list[dict]:
    """Events of a log, the last half of them unlike the first."""
    return [{"step": step, **(first if step <= STEPS / 2 else last)} for step in range(1, STEPS + 1)]


SEEING, WITHOUT = "eval_rewards/accuracy_reward/mean", "blind_rewards/accuracy_reward/mean"
LOGS = [
    (SIGNALS, {"frac_reward_zero_std": 0.7}, {"frac_reward_zero_std": 0.5}, True, "60% of the groups; first 70%"),
    (SIGNALS, {"frac_reward_zero_std": 0.3}, {"frac_reward_zero_std": float("nan")}, False, "30% of the groups;"),
    (ENTROPY, {"entropy": 1.0}, {"entropy": 0.2}, True, "1.00 → 0.20 nats a token"),
    (ENTROPY, {"entropy": 1.0}, {"entropy": 0.0}, True, "1.00 → 0.00 nats a token"),
    (ENTROPY, {"entropy": 1.0}, {"entropy": 3.0}, False, "1.00 → 3.00 nats a token"),
    (BLIND, {SEEING: 0.4}, {SEEING: 0.8, WITHOUT: 0.4}, False, "40% of the held-out questions without their images"),
    (BLIND, {SEEING: 0.4}, {SEEING: 0.8, WITHOUT: 0.75}, True, "75% of the held-out questions without their images"),
    (BLIND, {SEEING: 0.4}, {SEEING: 0.8, WITHOUT: 0.9}, True, "90% of the held-out questions without their images"),
]


@pytest.mark.parametrize("name, first, last, seen, numbers", LOGS, ids=[numbers for *_, numbers in LOGS])
def test_signs_in_the_log(tmp_path, name, first, last, seen, numbers):
    finding = found(write_run(tmp_path / "run", events=logged(first, last)))[name]
    assert finding.seen is seen and finding.numbers.startswith(numbers)


@pytest.mark.parametrize(
    "before, after, seen, numbers",
    [
        # one of two right all along: accuracy over all completions doubles by format alone
        ((0.5, 0.5), (0.5, 1.0), True, "format 50% → 100%; accuracy of completions with it 50% → 50%"),
        ((0.5, 0.5), (1.0, 1.0), False, "format 50% → 100%; accuracy of completions with it 50% → 100%"),
        ((0.5, 1.0), (0.5, 1.0), False, "format 100% → 100%; accuracy of completions with it 50% → 50%"),
    ],
)
def test_format_alone(tmp_path, before, after, seen, numbers):
    rows = []
    for step in range(1, STEPS + 1):
        right, kept = before if step <= STEPS / 2 else after
        for place in range(8):
            keeps = place < 8 * kept
            rows.append(row(step=step, rewards=rewards(float(keeps and place % 8 < 8 * kept * right), float(keeps))))
    finding = found(write_run(tmp_path / "run", rows))[FORMAT]
    assert (finding.seen, finding.numbers) == (seen, numbers)


def test_thought_against_answer(tmp_path):
    same = row(completion="It is left.</think><answer>left</answer>")
    other = row(completion="It is right.</think><answer>left</answer>")
    silent = row(completion="Hm.</think><answer>left</answer>")
    unknown = row(completion="It is right.</think><answer>left</answer>", options=None)
    finding = found(write_run(tmp_path / "seen", [same, other, other, silent, unknown]))[THOUGHT]
    assert (finding.seen, finding.numbers) == (True, "2 of 3 (67%), of 4 completions read; first 67%, last 67%")
    assert found(write_run(tmp_path / "not", [same] * 9 + [other]))[THOUGHT].seen is False


def test_thoughts_against_answers_have_a_curve(tmp_path):
    """A point a tenth of the steps, over the completions that name an option in both; none without such."""
    said = {1: "right", 2: "left"}
    rows = [
        row(
            step=step,
            completion=f"It is {said.get(step % 3, 'so')}.</think><answer>left</answer>" if step < 31 else "Hm.",
        )
        for step in range(1, 41)
    ]
    run = write_run(tmp_path / "run", rows)
    assert found(run)[THOUGHT].numbers == "10 of 20 (50%), of 40 completions read; first 50%, last 50%"
    assert "Answers against their thoughts" in section(write_report(run).read_text(), "curves")
    with scan_trajectories(run / "trajectories/train.jsonl") as train:
        [chart] = [chart for chart in collect(read_run(run), train, train).charts if chart.name == "contradictions"]
        late = train.last_tenth()
        assert len(late) == 4 and late.thoughts.asked == 4 and not len(late.thoughts.against)
    points = chart.panels[0].lines[0].points
    assert points.steps.tolist() == [2, 5, 8, 11, 14, 17, 20, 23, 26, 29] and set(points.values) == {0.5}


def answers_about_sides(step: int, answers: list[str]) -> list[dict]:
    """Questions of which every other one has the right answer left."""
    return [
        row(
            step=step,
            prompt=PROMPT.format(f"{number}?"),
            completion=f"Hm.</think><answer>{answer}</answer>",
            solution=gold,
            question_type="side",
            rewards=rewards(float(answer == gold), 1.0),
        )
        for number, (answer, gold) in enumerate(zip(answers, ["left", "right"] * (len(answers) // 2), strict=True))
    ]


def test_answer_collapse_in_the_last_evaluation_or_else_the_last_steps(tmp_path):
    varied, constant = answers_about_sides(1, ["left", "right"] * 20), answers_about_sides(2, ["left"] * 40)
    line = '100% of the answers to "left", "right" are "left", and 50% of the right answers; 40 questions'
    run = write_run(tmp_path / "held_out", rows=varied, eval_rows=varied + constant)
    assert (found(run)[COLLAPSE].seen, found(run)[COLLAPSE].numbers) == (True, line)
    assert found(write_run(tmp_path / "none", rows=varied + constant))[COLLAPSE].seen is True
    assert found(write_run(tmp_path / "healthy", rows=constant, eval_rows=varied))[COLLAPSE].seen is False
    curves = section(write_report(run).read_text(), "curves")
    assert 'side 40 50.0 % "left" 100.0 % 50.0 % 100.0 % 50.0 %' in curves


def test_blind_accuracy_of_several_sets_is_that_of_the_worst(tmp_path):
    accuracy = "rewards/accuracy_reward/mean"
    events = [
        {"step": STEPS, f"{kind}_{name}_{accuracy}": value}
        for name, seeing, blind in (("easy", 0.8, 0.2), ("far_away", 0.5, 0.5))
        for kind, value in (("eval", seeing), ("blind", blind))
    ]
    finding = found(write_run(tmp_path / "run", events=events))[BLIND]
    assert finding.seen is True
    assert "20% of the held-out questions of easy without their images, 80% with them; 50% of " in finding.numbers


def test_what_was_not_measured_says_why(tmp_path):
    reasons = {name: (finding.seen, finding.numbers) for name, finding in found(write_run(tmp_path / "run")).items()}
    assert reasons == {
        SIGNALS: (None, "the log has no frac_reward_zero_std"),
        FORMAT: (None, "needs completions with the accuracy and the format reward"),
        ENTROPY: (None, "the log has no entropy"),
        THOUGHT: (None, "no completions of questions with known options"),
        COLLAPSE: (None, "no readable answers to questions with known options"),
        BLIND: (None, "needs held-out questions (eval_strategy), which the end of a run asks without their images"),
    }
    bare = [row(completion="Hm.", rewards=rewards(0.0, 0.0))]
    findings = found(write_run(tmp_path / "bare", bare))
    assert findings[FORMAT].numbers == "no completion has the format"
    assert findings[THOUGHT].numbers.startswith("of 1 completions read, none names")


# --- the page -------------------------------------------------------------------------------------------------


def test_every_grpo_run_has_the_section(tmp_path):
    questions = write_images(tmp_path / "images", 6)
    rows = fake_rows(questions, range(1, 5), 4, prompts=2, group=4)
    why = section(write_report(write_run(tmp_path / "run", rows, events=fake_events(4))).read_text(), "why")
    assert "Why no aha?" in why and all(name in why for name in (SIGNALS, FORMAT, ENTROPY, THOUGHT, BLIND, COLLAPSE))
    assert why.count("not measured") == 1  # nothing was held out
    old = write_run(tmp_path / "old", events=[{"step": 1, "reward": 0.5}])
    assert section(write_report(old).read_text(), "why").count("not measured") == 6
    supervised = write_run(tmp_path / "sft", events=[{"step": 1, "loss": 0.5}], command="sft")
    assert section(write_report(supervised).read_text(), "why") == ""
    assert section(write_report(write_run(tmp_path / "new")).read_text(), "why") == ""  # nothing happened yet


def test_reflection_is_in_the_papers_figure(tmp_path):
    rows = [row(step=step, reflections=[[0, 2]], self_corrected=step > 1) for step in (1, 2, 3)]
    run = write_run(tmp_path / "run", rows)
    write_report(run)
    figure = (run / "accuracy_length.svg").read_text()
    labels = ("share of completions", "accuracy", "reflective", "tokens", "completion length")
    assert all(f">{label}<" in figure for label in labels)
    older = write_run(tmp_path / "older", [{key: value for key, value in row().items() if key != "reflections"}])
    write_report(older)
    assert ">reflective<" not in (older / "accuracy_length.svg").read_text()


def test_the_first_aha_has_its_picture(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    rows = [
        row(step=step, images=[str(path)], prompt=f"{step}?", reflections=[[0, 2]] * (step > 1)) for step in (1, 2, 3)
    ]
    page = write_report(write_run(tmp_path / "run", rows)).read_text()
    assert "The first aha: step 2" in section(page, "aha") and "before and after" not in section(page, "aha")
    assert len(re.findall(r'<img src="data:image/png;base64,', page)) == 1


def test_one_prompt_before_and_after(tmp_path):
    """The first aha's prompt, early and late, and not another that recurs as well."""

    def asked(step: int, question: str, text: str, right: float, reflections: list) -> dict:
        changes = {"completion": text, "rewards": rewards(right, 1.0), "reflections": reflections}
        return row(step=step, prompt=PROMPT.format(question), group=int(question == "Where?"), **changes)

    rows = [
        asked(1, "Which?", "another", 0.0, []),
        asked(2, "Where?", f"early {HOSTILE}", 0.0, []),
        asked(2, "Where?", "early too", 0.0, []),
        asked(4, "Where?", "wait", 0.0, [[0, 4]]),
        asked(5, "Where?", "late", 1.0, []),
        asked(5, "Where?", f"wait {HOSTILE}", 1.0, [[0, 4]]),
        asked(9, "Which?", "another", 1.0, []),
    ]
    page = write_report(write_run(tmp_path / "run", rows)).read_text()
    aha = section(page, "aha")
    assert f"Step 2 0 of 2 correct; the first: early {HOSTILE}" in aha
    assert f"Step 5 2 of 2 correct; the first that reflects: wait {HOSTILE}" in aha
    assert 'href="#train/2/1/1"' in page and 'href="#train/5/1/2"' in page
    assert "onerror='" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
