"""The report of a run: right numbers from whatever a run left, hostile texts made harmless, errors in one line."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fake_run import PROMPT, STARTED, fake_events, fake_rows, row, write_images, write_lines, write_run
from open_r1.answers.statistics import wilson
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.reporting import browser
from open_r1.reporting.browser import segments, spread_evenly
from open_r1.reporting.curves import collect
from open_r1.reporting.overlay import overlay, read_curves, write_overlay
from open_r1.reporting.page import utc, write_report
from open_r1.reporting.runs import Trajectories, read_run, scan_trajectories
from open_r1.reporting.statistics import (
    by_step,
    first_and_last_tenth,
    group_accuracy,
    moving_average,
    pass_rates,
    quartiles,
    reflection_statistics,
)

SCRIPT = REPO_ROOT / "scripts/report.py"
RIGHT, WRONG = {"accuracy_reward": 1.0, "format_reward": 1.0}, {"accuracy_reward": 0.0, "format_reward": 1.0}


class Page(HTMLParser):
    """What a browser would see: elements, attributes and the text outside of scripts and styles."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self.scripts = "", []
        self._inside = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def completions(self, source: str = "train") -> list[dict]:
        steps = self.data["sources"][source]["steps"]
        return [completion for step in steps for group in step["groups"] for completion in group["completions"]]

    def titles(self) -> list[str]:
        """The headings of the charts."""
        return re.findall(r"<figcaption>\s*<h3>([^<]*)</h3>", self.source)


def make(run: Path) -> Page:
    return Page(write_report(run))


def plain(completion: dict) -> str:
    return "".join(text for _, text in completion["text"])


# --- numbers ------------------------------------------------------------------------------------------------

TINY = [
    row(step=1, group=0, rewards=RIGHT, length=10),
    row(step=1, group=0, rewards=WRONG, length=20, ended=False),
    row(step=1, group=1, rewards=RIGHT, length=30, reflections=[[0, 2]], considered="left", self_corrected=False),
    row(step=1, group=1, rewards=WRONG, length=40, reflections=[[0, 2]], considered="left", self_corrected=True),
    row(step=3, group=0, rewards=RIGHT, length=100, reflections=[[3, 5]], considered="right", self_corrected=True),
    row(step=3, group=0, rewards={"accuracy_reward": None, "format_reward": 0.0}, length=200),
]


def scan(tmp_path: Path, rows: Iterable[dict]) -> Trajectories:
    return scan_trajectories(write_lines(tmp_path / "rows.jsonl", rows))


@pytest.fixture
def tiny(tmp_path):
    return scan(tmp_path, TINY)


def test_statistics_of_a_tiny_run(tiny):
    steps = tiny.rows["step"]
    accuracy = by_step(steps, tiny.rewards["accuracy_reward"])
    assert accuracy.steps.tolist() == [1, 3] and accuracy.values.tolist() == [0.5, 1.0]  # null does not count
    assert by_step(steps, tiny.rewards["format_reward"]).values.tolist() == [1.0, 0.5]
    assert by_step(steps, tiny.rows["length"].astype(float)).values.tolist() == [25, 150]
    assert by_step(steps, tiny.rows["length"].astype(float), quartiles).values.tolist() == [[17.5, 32.5], [125, 175]]
    assert by_step(steps, (~tiny.rows["ended"]).astype(float)).values.tolist() == [0.25, 0]


def test_a_third_and_two_thirds_are_the_middle(tmp_path):
    """Groups of twelve, of which so many succeed, in every step but the last, where two thirds do."""
    successes = (0, 1, 3, 4, 6, 8, 9, 11, 12)
    rows = [
        row(step=step, group=group, rewards={"my_reward": reward, "format_reward": 1.0})
        for step in range(1, 31)
        for group, right in enumerate(successes)
        for member in range(12)
        for reward in [1.0 if member < (8 if step == 30 else right) else 0.5]
    ]
    rows += [row(step=step, group=9, rewards={"my_reward": None, "format_reward": 1.0}) for step in (1, 30)]
    early, late = pass_rates(scan(tmp_path, rows)).items()
    assert early[0] == "to step 3" and early[1].tolist() == pytest.approx([1 / 9, 2 / 9, 3 / 9, 2 / 9, 1 / 9])
    assert late[0] == "from step 28" and late[1].tolist() == pytest.approx([2 / 27, 4 / 27, 15 / 27, 4 / 27, 2 / 27])


def test_completions_in_which_nobody_looked_for_reflections_count_nowhere(tmp_path):
    """As of a run that was begun by an older version."""
    reflection = ("reflections", "considered", "self_corrected")
    old = [row(step=1, rewards=rewards) for rewards in (RIGHT, RIGHT, WRONG)]
    old = [{name: value for name, value in record.items() if name not in reflection} for record in old]
    new = [
        row(step=1, rewards=RIGHT),
        row(step=2, rewards=RIGHT, reflections=[[0, 2]], considered="right", self_corrected=True),
        row(step=2, rewards=WRONG, reflections=[[0, 2]], considered="left", self_corrected=False),
        row(step=3, rewards=WRONG, reflections=[[4, 6]], considered="right", self_corrected=True),
        row(step=3, rewards=WRONG),
    ]
    counts = reflection_statistics(scan(tmp_path, old + new))
    assert (counts.measured, counts.reflective, counts.first_step) == (5, 3, 2)
    assert counts.accuracy_with == (1, 3) and counts.accuracy_without == (1, 2) and counts.format_with == (3, 3)
    assert counts.corrections == 2 and counts.corrected_right == (1, 2)


def test_held_out_interval_counts_questions(tiny):
    """Two completions of a question are half an observation each."""
    series = group_accuracy(tiny)
    assert series.steps.tolist() == [1, 3]
    np.testing.assert_allclose(series.values[0], [0.5, *wilson(1.0, 2)])
    np.testing.assert_allclose(series.values[1], [1.0, *wilson(1.0, 1)])


def test_evaluation_in_several_batches(tmp_path):
    """Groups are numbered anew in each batch of an evaluation: the same number may mean two questions."""
    rows = [row(step=5, group=g, prompt=PROMPT.format(f"{b}{g}?"), rewards=RIGHT) for b in (0, 1) for g in (0, 1)]
    np.testing.assert_allclose(group_accuracy(scan(tmp_path, rows)).values[0], [1.0, *wilson(4, 4)])
    [step] = make(write_run(tmp_path / "run", eval_rows=rows)).data["sources"]["eval"]["steps"]
    assert [group["number"] for group in step["groups"]] == [1, 2, 3, 4] and step["asked"] == 4


def test_each_evaluation_set_has_its_own_curve(tmp_path):
    """Both sets ask one question alike, in one step and under one number."""
    rows = [
        *(row(step=5, group=0, dataset="easy", rewards=RIGHT) for _ in range(2)),
        *(row(step=5, group=0, dataset="far_away", rewards=WRONG) for _ in range(2)),
        row(step=5, group=1, dataset="far_away", prompt=PROMPT.format("other?"), rewards=RIGHT),
    ]
    accuracy = "rewards/accuracy_reward/mean"
    events = [{"step": 4, f"eval_easy_{accuracy}": 0.75}, {"step": 4, f"eval_far_away_{accuracy}": 0.25}]
    run = read_run(write_run(tmp_path / "run", events=events))
    for held_out, expected in ((rows, ([1.0], [0.5])), ([], ([0.75], [0.25]))):  # of completions, or of the log alone
        curves = collect(run, scan(tmp_path, []), scan(tmp_path, held_out))
        (chart,) = (chart for chart in curves.charts if chart.name == "held-out")
        lines = {line.label: line.points.values.tolist() for line in chart.panels[0].lines}
        assert lines == dict(zip(("held-out accuracy, easy", "held-out accuracy, far_away"), expected, strict=True))
        assert {line.label: line.points.values.tolist() for line in curves.paper[0][0].lines} == lines


def test_the_first_and_the_last_tenth_are_rounded_up():
    assert first_and_last_tenth(np.arange(20.0)) == (0.5, 18.5) and first_and_last_tenth(np.array([3.0])) == (3, 3)
    assert first_and_last_tenth(np.arange(25.0)) == (1.0, 23.0)
    assert first_and_last_tenth(np.array([])) is None


def test_a_moving_average_is_over_fewer_values_at_the_ends():
    np.testing.assert_allclose(moving_average(np.array([1.0, 2, 3, 10]), 3), [1.5, 2, 5, 6.5])
    np.testing.assert_allclose(moving_average(np.array([1.0, 3]), 9), [2, 2])


def test_the_question_without_its_template(tmp_path):
    questions = ["Where is a? Choose: b or c", "How many? Choose: 1 or 2"]
    page = make(write_run(tmp_path / "run", [row(group=n, prompt=PROMPT.format(q)) for n, q in enumerate(questions)]))
    for prompt, question in zip(page.data["prompts"], questions, strict=True):
        parts = [plain({"text": prompt[name]}) for name in ("head", "question", "tail")]
        assert parts[1] == question and prompt["opens_think"]
        assert parts[0].endswith("User: ") and parts[2] == "\nAssistant: Let me solve this step by step.\n<think>"


# --- runs of every kind -------------------------------------------------------------------------------------


def test_a_finished_run(tmp_path):
    questions = write_images(tmp_path / "images", 6)
    rows = fake_rows(questions, range(1, 5), 4, prompts=2, group=4)
    held_out = fake_rows(questions, (2, 4), 4, prompts=6, group=1)
    page = make(write_run(tmp_path / "my run", rows, held_out, fake_events(4, eval_every=2)))
    assert "my run" in page.text and "finished" in page.text and "4 of 4 steps" in page.text
    assert "32 completions, 12 held-out" in page.text
    assert {"Accuracy, completion length and reflection", "Held-out accuracy", "Seconds a step"} <= set(page.titles())
    assert len(page.titles()) == 14 and "Not drawn" not in page.text and "Pass rates" in page.text
    assert len(page.completions()) == 32 and len(page.completions("eval")) == 12
    assert all(image["source"].startswith("data:image/png;base64,") for image in page.data["images"])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_reasons_for_no_reward_are_areas_also_of_a_single_step(tmp_path, steps):
    """A third each wrong, without a tag and right, in every step."""
    kinds = ("wrong answer", "no answer tag", "right")
    run = write_run(tmp_path / "run", [row(step=s, judgement=kind) for s in range(1, steps + 1) for kind in kinds])
    page = make(run)
    assert "Why completions earned no accuracy reward" in page.titles()
    train = scan_trajectories(run / "trajectories/train.jsonl")
    [chart] = [chart for chart in collect(read_run(run), train, train).charts if chart.name == "why-zero"]
    lines = {line.label: line.points.values.tolist() for line in chart.panels[0].lines}
    assert lines == {kind: pytest.approx([1 / 3] * steps) for kind in kinds[:2]}


def test_curves_follow_every_completion(tmp_path):
    """The log's own mean may cover several steps; the completions are those of each."""
    run = write_run(tmp_path / "run", events=[{"step": 3, "rewards/accuracy_reward/mean": 0.123, "kl": 0.5}])
    curves = collect(read_run(run), scan(tmp_path, TINY), scan(tmp_path / "held_out", []))
    assert curves.paper[0][0].lines[0].points.values.tolist() == [0.5, 1.0]
    assert "Held-out accuracy" in curves.missing and "KL to the reference model" not in curves.missing


def test_a_killed_run_with_half_a_line(tmp_path):
    run = write_run(tmp_path / "run", [row(step=1), row(step=2)], events=fake_events(2))
    for name in ("log.jsonl", "trajectories/train.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 3, "promp')
    page = make(run)
    assert "stopped at step 2 or still running" in page.text and len(page.completions()) == 2
    assert f"last logged {utc(datetime.fromtimestamp(STARTED + 40, UTC))}" in page.text


def test_a_run_before_its_first_step(tmp_path):
    page = make(write_run(tmp_path / "run"))
    assert "Nothing was logged yet" in page.text and "Qwen/Qwen2-VL-2B" in page.text and page.titles() == []
    (tmp_path / "old/trajectories").mkdir(parents=True)
    assert "Nothing was logged yet" in make(tmp_path / "old").text
    assert not list(tmp_path.rglob("accuracy_length*"))  # nothing to draw


def test_a_supervised_run(tmp_path):
    events = [{"step": s, "loss": 1 / s, "mean_token_accuracy": 0.5, "learning_rate": 1e-5} for s in range(1, 60)]
    page = make(write_run(tmp_path / "run", events=events, command="sft", max_steps=59))
    assert page.titles() == ["Loss", "Token accuracy", "Learning rate"] and "are no data: Entropy" in page.text
    assert "SFT run" in page.text and "Aha" not in page.text and "Rollouts" not in page.text


def test_another_reward_has_its_own_curve(tmp_path):
    rows = [row(step=step, rewards={"my_reward": step / 10}) for step in (1, 2, 3)]
    page = make(write_run(tmp_path / "run", rows))
    assert "Reward: my_reward" in page.titles() and "Accuracy and format reward" not in page.titles()
    assert {completion["correct"] for completion in page.completions()} == {None}


def test_numbers_that_are_none(tmp_path):
    """A loss that exploded is written as NaN; JSON in a page has no such number."""
    rows = [row(step=1, advantage=float("nan"), rewards={"accuracy_reward": float("inf")}), row(step=2)]
    page = make(write_run(tmp_path / "run", rows, events=[{"step": 1, "kl": float("nan")}, {"step": 2, "kl": 1e300}]))
    first, second = page.completions()
    assert (first["advantage"], first["rewards"], first["correct"]) == (None, [None, None], None)
    assert (second["advantage"], second["correct"]) == (0.5, True) and "KL to the reference model" not in page.titles()


def test_a_run_that_resumes_meanwhile(tmp_path):
    """Resuming replaces the file; the texts that the report then fetches are still those that it counted."""
    run = write_run(tmp_path / "run", [row(step=1, completion="first"), row(step=2, completion="second")])
    path = run / "trajectories/train.jsonl"
    with scan_trajectories(path) as trajectories:
        write_lines(run / "new", [row(step=1, completion="x" * 1000)]).replace(path)
        assert [trajectories.read(index).completion for index in (1, 0)] == ["second", "first"]


# --- images -------------------------------------------------------------------------------------------------


def test_missing_and_damaged_images(tmp_path):
    good, damaged, large, pipe = (tmp_path / name for name in ("good.png", "damaged.png", "large.png", "pipe.png"))
    Image.new("RGB", (900, 300), "red").save(good)
    damaged.write_bytes(good.read_bytes()[:60])
    Image.new("1", (8193, 8193)).save(large)
    os.mkfifo(pipe)
    paths = [str(path) for path in (good, tmp_path / "gone.png", damaged, large, pipe, tmp_path)]
    page = make(write_run(tmp_path / "run", [row(images=paths), row(images=paths), row(images=["a\0b"])]))
    first, *others = page.data["images"]
    assert [image["missing"] for image in others] == [
        *("no such file", "cannot be decoded", "cannot be decoded"),
        *("no such file", "no such file", "cannot be decoded"),
    ]
    small = base64.b64decode(first["source"].removeprefix("data:image/png;base64,"))
    (tmp_path / "small.png").write_bytes(small)
    assert Image.open(tmp_path / "small.png").size == (256, 85)


def test_photographs_become_jpeg_and_the_budget_holds(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    rows = []
    for number in range(4):
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(noise).save(path)
        rows.append(row(step=number, images=[str(path)]))
    size = len(browser.thumbnail(path)[0])
    monkeypatch.setattr(browser, "IMAGE_BUDGET", 2 * size)
    images = make(write_run(tmp_path / "run", rows)).data["images"]
    assert [image["name"] for image in images if "source" in image] == ["0.jpg", "3.jpg"]  # the first and last step
    assert all(image["source"].startswith("data:image/jpeg") for image in images if "source" in image)


# --- hostile texts ------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>window.hit = 1</script>",
    "</script><script>window.hit = 1</script>",
    "<!-- <script>",
    "<img src=x onerror='window.hit = 1'>",
    "{{ 7 * 7 }} {% raw %}",
    "\u2028\u2029\x00\x1b[31m\ud800",
    "\u202egnp.exe",
    "]]></svg>&lt;$\\frac{1}$",
]


def test_hostile_texts_are_inert(tmp_path):
    """In completions, prompts, solutions, image names, names of rewards, metrics and the run itself."""
    rows = [
        row(
            step=step,
            prompt=text,
            images=[f"/tmp/{text}.png"],
            solution=text,
            completion=text,
            rewards={text: 1.0, "accuracy_reward": 1.0},
            reflections=[[0, 5]],
            considered=text,
            self_corrected=True,
        )
        for step, text in enumerate(HOSTILE)
    ]
    events = [{"step": 1, f"rewards/{text}/mean": 1.0} for text in HOSTILE]
    bad_name = HOSTILE[0].replace("/", "|")
    run = write_run(tmp_path / bad_name, rows, events=events, model=HOSTILE[1], arguments={"beta": HOSTILE[0]})
    page = make(run)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    for text in HOSTILE[:5]:
        assert text in [plain(completion) for completion in page.completions()]
        assert text in page.text  # its reward's title, escaped
    assert [plain(page.completions()[5])] == ["\u2028\u2029␀␛[31m\ufffd"]
    assert "<" not in page.scripts[0]


def test_a_long_completion_is_cut(tmp_path):
    text = "a" * 3_000 + "b" * 5_000_000 + "c" * 1_000
    run = write_run(tmp_path / "run", [row(completion=text, prompt=text, reflections=[[2_000_000, 2_000_004]] * 99)])
    page = make(run)
    [completion] = page.completions()
    assert completion["text"] == [
        ["text", "a" * 3_000],
        ["cut", "5,000,000 characters left out"],
        ["text", "c" * 1_000],
    ]
    assert len(page.source) < 1_000_000


def test_segments():
    text = "hm. wait, no.</think><answer>left</answer>"
    assert segments(text, [[4, 8], [6, 12]]) == [
        ("text", "hm. "),
        ("reflection", "wait"),
        ("reflection", ", no"),
        ("text", "."),
        ("tag", "</think>"),
        ("tag", "<answer>"),
        ("text", "left"),
        ("tag", "</answer>"),
    ]
    assert segments("short", [[3, 99], [50, 60], [2, 1]]) == [("text", "sho"), ("reflection", "rt")]
    assert segments("") == []


def test_the_page_runs_its_own_script_alone(tmp_path):
    page = make(write_run(tmp_path / "run", [row()], events=fake_events(3)))
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    loaded = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert all(value.startswith(("#", "data:")) for value in loaded)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = {value for name, value in page.attributes if name in ("aria-labelledby", "for")}
    assert referred <= set(ids) and set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(ids)


# --- size ---------------------------------------------------------------------------------------------------


def test_some_of_all_steps_lie_evenly():
    steps = list(range(100, 200))
    order = spread_evenly(steps)
    assert sorted(order) == steps and spread_evenly([]) == []
    for count in (8, 16, 40):
        assert max(np.diff(sorted(order[:count]))) <= 2 * 100 / count + 4


def test_texts_that_swell_when_escaped_stay_within_the_budget(tmp_path):
    rows = [row(step=step, completion="<" * 4000) for step in range(1500)]
    page = make(write_run(tmp_path / "run", rows))
    assert len(page.source) < 7_000_000
    steps = [step["step"] for step in page.data["sources"]["train"]["steps"]]
    assert steps[0] == 0 and steps[-1] == 1499 and max(np.diff(steps)) < 2.5 * 1500 / len(steps)


def test_examples_are_among_the_embedded(tmp_path, monkeypatch):
    monkeypatch.setitem(browser.TEXT_BUDGETS, "train", 4_000)
    rows = [row(step=step, completion=f"It is {step}. Wait, no.") for step in range(200)]
    for step in (33, 77, 123):
        rows[step] |= {"reflections": [[9, 14]], "considered": "right", "self_corrected": True}
    page = make(write_run(tmp_path / "run", rows))
    steps = [step["step"] for step in page.data["sources"]["train"]["steps"]]
    assert {33, 77, 123} <= set(steps) and len(steps) < 40
    links = [value for name, value in page.attributes if name == "href" and value.startswith("#train/")]
    before_and_after, quoted = links[:2], links[2:]
    assert before_and_after == ["#train/0/1/1", "#train/199/1/1"]
    assert quoted == ["#train/33/1/1", "#train/77/1/1", "#train/123/1/1"]


def test_a_large_evaluation_is_thinned_to_the_same_prompts(tmp_path):
    rows = [row(step=s, group=g, prompt=PROMPT.format(f"{g}?")) for s in (1, 2) for g in range(100)]
    steps = make(write_run(tmp_path / "run", eval_rows=rows)).data["sources"]["eval"]["steps"]
    shown = [[group["prompt"] for group in step["groups"]] for step in steps]
    assert shown[0] == shown[1] and len(shown[0]) == browser.MAX_GROUPS and steps[0]["asked"] == 100


# --- the command --------------------------------------------------------------------------------------------


def test_command_writes_the_page_and_the_figure(tmp_path):
    run = write_run(tmp_path / "run", TINY)
    before = sorted(run.rglob("*"))
    (tmp_path / "elsewhere").mkdir()
    page = tmp_path / "elsewhere/page.html"
    command = [sys.executable, SCRIPT, run, "--output", page]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.stdout == f"{page}\n", done.stderr
    figures = ["accuracy_length.png", "accuracy_length.svg"]
    assert sorted(path.name for path in page.parent.iterdir()) == [*figures, "page.html"]
    assert (page.parent / figures[0]).read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (page.parent / figures[1]).read_text() and sorted(run.rglob("*")) == before
    write_report(run)
    assert (run / "report.html").is_file() and (run / figures[0]).is_file()


def test_the_curves_of_several_runs_are_drawn_over_one_another(tmp_path, monkeypatch):
    a = write_run(tmp_path / "one/run", TINY, changed={"beta": 0}, recipes=["grpo_sat.yaml", "no_kl.yaml"])
    b = write_run(tmp_path / "two/run", events=[{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}], command="sft")
    charts = overlay({name: read_curves(folder)[1] for name, folder in (("a", a), ("b", b), ("c", a))})
    lines = {chart.title: [line.label for line in chart.panels[0].lines] for chart in charts}
    assert lines["Accuracy"] == ["a", "c"] and lines["Loss"] == ["b"]
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([sys.executable, SCRIPT, "one/run", "two/run"], capture_output=True, text=True)
    assert done.stdout == "runs.html\n", done.stderr
    page = Path("runs.html").read_text()
    assert "one/run" in page and "two/run" in page and "beta 0" in page and "grpo_sat.yaml + no_kl.yaml" in page
    assert page.count("<svg") == len(overlay({"a": read_curves(a)[1], "b": read_curves(b)[1]}))
    with pytest.raises(Mistake, match=r"^7 runs: at most 6"):
        write_overlay([a] * 7, tmp_path / "seven.html")


HUGE = '{"step": ' + "9" * 9_999 + "}"  # more digits than Python reads
DAMAGE = [  # file, its content, what the line says; a row's changes stand for the row
    ("trajectories/train.jsonl", f"{{}}x\n{json.dumps(row())}\n", "train.jsonl, line 1: not JSON; delete"),
    ("trajectories/train.jsonl", "[" * 99_999 + "\n\n1\n", "train.jsonl, line 1: not JSON; delete"),
    ("trajectories/train.jsonl", f"{HUGE}\n\n1\n", "train.jsonl, line 1: not JSON; delete"),
    ("trajectories/train.jsonl", "\n7\n", "train.jsonl, line 2: expected an object"),
    ("trajectories/train.jsonl", "{}\n", "train.jsonl, line 1: missing step, prompt, images, completion, rewards, adv"),
    ("trajectories/eval.jsonl", {"step": -1}, "eval.jsonl, line 1: step: expected a whole number from 0"),
    ("trajectories/train.jsonl", {"step": True}, "line 1: step: expected a whole number"),
    ("trajectories/train.jsonl", {"length": 10**30}, "line 1: length: expected a whole number"),
    ("trajectories/train.jsonl", {"advantage": 10**400}, "line 1: advantage: expected a number"),
    ("trajectories/train.jsonl", {"completion": None}, "line 1: completion: expected text"),
    ("trajectories/train.jsonl", {"rewards": {"a": "1"}}, "line 1: rewards: expected numbers or null by name"),
    ("trajectories/train.jsonl", {"images": "a"}, "line 1: images: expected a list of paths"),
    ("trajectories/train.jsonl", {"reflections": [[1]]}, "line 1: reflections: expected pairs of offsets"),
    ("log.jsonl", '{"loss": 1}\n', "log.jsonl, line 1: missing step"),
    ("log.jsonl", '{"step": 1, "time": 1e300}\n', "log.jsonl, line 1: time: expected seconds since 1970"),
    ("run.json", "{", "run.json: not JSON"),
    ("run.json", "[]", "run.json: expected an object"),
    ("run.json", '{"model": 3}', "run.json: model: expected text"),
    ("run.json", '{"arguments": []}', "run.json: arguments: expected an object"),
]


@pytest.mark.parametrize("name, content, message", DAMAGE, ids=[message for _, _, message in DAMAGE])
def test_damage_is_one_line(tmp_path, name, content, message):
    run = write_run(tmp_path / "run", [row()])
    (run / name).write_text(content if isinstance(content, str) else json.dumps(row(**content)))
    with pytest.raises(Mistake) as caught:
        write_report(run)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(run.glob("*.html")) and not list(run.glob("*.tmp"))


def test_not_a_run(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "nothing of a run in it")):
        with pytest.raises(Mistake, match=f"^{path}: {message}"):
            write_report(path)


def test_report_imports_no_torch():
    heavy = {"torch", "transformers", "matplotlib.pyplot"}
    code = f"import sys, open_r1.reporting.page; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_training_starts_without_matplotlib():
    code = "import sys, open_r1.grpo, open_r1.sft; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
