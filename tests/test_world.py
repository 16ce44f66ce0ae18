"""The rendered world: its answers are true, judged from the pixels; its files are in the real schemas."""

import io
import math
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_r1.tasks import sat
from open_r1.tasks.benchmarks.choice import CVBENCH_FILES
from open_r1.world.parquet import (
    CVBENCH_SOURCES,
    CVBENCH_TASKS,
    LETTERS,
    cvbench_row,
    row_rng,
    sat_row,
    write_cvbench,
    write_sat,
)
from open_r1.world.questions import CV_QUESTIONS, QUESTIONS, Asked, ask, closer, is_left
from open_r1.world.render import BOX_COLOURS, INK, background, render
from open_r1.world.scene import COLOURS, LEVELS, Level, Solid, Unclear, is_clear, overlap, place, see

EASY, FULL = LEVELS["easy"], LEVELS["full"]


def pixels(data: bytes) -> np.ndarray:
    """(height, width, 3) integers."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def figures(picture: np.ndarray) -> dict[str, tuple[str, float, float]]:
    """What a reader of an easy image sees: colour -> (kind, centre column, lowest row)."""
    found = {}
    for colour, rgb in COLOURS.items():
        rows, columns = np.nonzero((picture == rgb).all(-1))
        if len(rows):
            filled = len(rows) / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))  # square 1, circle 0.8, triangle 0.5
            kind = "square" if filled > 0.95 else "circle" if filled > 0.65 else "triangle"
            found[colour] = (kind, (columns.min() + columns.max()) / 2, rows.max())
    return found


def named(text: str) -> list[str]:
    """The colours that a question names, in its order."""
    return [word for word in text.replace("?", " ").split() if word in COLOURS]


def easy_rows(question: str, count: int = 60) -> list[tuple[dict, dict]]:
    rows = [sat_row(i, 7, EASY, (question,)) for i in range(count)]
    return [(row, figures(pixels(row["image_bytes"][0]))) for row in rows]


def test_easy_count_is_what_the_image_shows():
    answers = Counter()
    for row, seen in easy_rows("count"):
        kind = row["question"].split()[2].removesuffix("s")
        assert row["correct_answer"] == str(sum(found == kind for found, _, _ in seen.values()))
        answers[row["correct_answer"]] += 1
    assert len(answers) == EASY.most and max(answers.values()) < 30


def test_easy_closer_is_lower_in_the_image():
    for row, seen in easy_rows("closer"):
        asked = named(row["question"])
        nearest = max(asked, key=lambda colour: seen[colour][2])
        assert row["correct_answer"] == f"{nearest} {seen[nearest][0]}"
        assert row["answers"] == [f"{colour} {seen[colour][0]}" for colour in asked]


def test_easy_where_agrees_with_the_image():
    answers = Counter()
    for row, seen in easy_rows("where"):
        (_, ua, va), (_, ub, vb) = (seen[colour] for colour in named(row["question"]))
        assert {"left": ua < ub, "right": ua > ub, "in front": va > vb, "behind": va < vb}[row["correct_answer"]]
        answers[row["correct_answer"]] += 1
    assert set(answers) == set(row["answers"]) and min(answers.values()) > 5, answers


def test_easy_perspective_is_what_the_marked_person_sees():
    answers = Counter()
    for i in range(60):
        row = sat_row(i, 7, EASY, ("perspective",))
        picture = pixels(row["image_bytes"][0])
        mark = np.nonzero((picture == INK).all(-1))[0].mean()
        [colour] = named(row["question"])
        nearer = figures(picture)[colour][2] > mark
        # What is nearer to the camera is on the left of who faces left, and on the right of who faces right.
        facing = "left" if "degrees to the left" in row["question"] else "right"
        assert row["correct_answer"] == (facing if nearer else {"left": "right", "right": "left"}[facing])
        answers[facing, row["correct_answer"]] += 1
    assert len(answers) == 4 and min(answers.values()) > 5, answers  # either way, whichever way one faces


def test_rotation_moves_the_image_the_other_way():
    for i in range(20):
        row = sat_row(i, 7, EASY, ("rotation",))
        before, after = (figures(pixels(data)) for data in row["image_bytes"])
        shift = np.mean([after[colour][1] - before[colour][1] for colour in before])
        assert row["correct_answer"] == ("rotated right" if shift < 0 else "rotated left")
        assert row["question_type"] == "action_sequence"


@pytest.mark.parametrize("name", [*QUESTIONS, *CV_QUESTIONS])
def test_answers_to_a_question_differ_and_no_place_among_its_options_is_theirs(name):
    """Whoever always says the same, or names the same option, is often wrong."""
    asked = [ask({**QUESTIONS, **CV_QUESTIONS}[name], row_rng(9, i), EASY) for i in range(200)]
    answers = Counter(each.answer for each in asked)
    places = Counter(each.options.index(each.answer) for each in asked)
    if name == "Relation":  # two questions: left or right, above or below
        assert set(answers) == {"left", "right", "above", "below"}
    assert len(answers) > 1 and max(answers.values()) < 150 and max(places.values()) < 150
    if name in CV_QUESTIONS:  # every place about as often
        expected = 200 / len(asked[0].options)
        assert len(places) == len(asked[0].options)
        assert all(abs(count - expected) < 4 * math.sqrt(expected) for count in places.values())


def test_boxes_of_a_relation_lie_apart_in_what_is_asked():
    """Left or right of a box that reaches over the other's side would be a matter of opinion."""
    for i in range(80):
        asked = ask(CV_QUESTIONS["Relation"], row_rng(10, i), FULL)
        (_, a), (_, b) = asked.boxes
        axis = 0 if asked.answer in ("left", "right") else 1
        lower, upper = (a.box, b.box) if asked.answer in ("left", "above") else (b.box, a.box)
        assert lower[axis + 2] <= upper[axis]


@pytest.mark.parametrize("kind", FULL.kinds)
def test_a_ray_cast_solid_fills_its_box_and_nothing_else(kind):
    rng = random.Random(kind)
    for _ in range(4):
        [seen] = place(rng, FULL, [kind])
        changed = (np.asarray(render(FULL, [seen])) != background(FULL)).any(-1)
        rows, columns = np.nonzero(changed)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(box, seen.box)).max() < 2.5


def test_the_nearer_solid_hides_the_farther_one():
    near = see(FULL, Solid("cube", "red", 0.1, 3.5, 0.4, 0.3))
    far = see(FULL, Solid("sphere", "blue", 0.0, 5.0, 0.4, 0.0))
    alone = (np.asarray(render(FULL, [near])) != background(FULL)).any(-1)
    for scene in ([near, far], [far, near]):  # whatever the order
        both = np.asarray(render(FULL, scene))
        assert (both[alone] == np.asarray(render(FULL, [near]))[alone]).all()
    assert overlap(near.box, far.box) > 0


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_scenes_have_margins_and_unique_names(level):
    for i, name in enumerate(QUESTIONS):
        for j in range(5):
            asked = ask(QUESTIONS[name], random.Random(f"{i}{j}"), level)
            assert asked.answer in asked.options and len(set(asked.options)) == len(asked.options) > 1
            for scene in asked.scenes:
                names = [seen.solid.colour for seen in scene]
                assert len(set(names)) == len(names)
                assert is_clear(level, scene)


def camera_distance(level: Level, solid: Solid) -> float:
    """Metres from the camera to a solid's centre."""
    return float(np.linalg.norm(np.subtract((solid.x, solid.radius, solid.z), (0, level.elevation, 0))))


def asked_about(asked: Asked) -> list[Solid]:
    """The objects that a question names, in its order."""
    solids = [seen.solid for seen in asked.scenes[0] if seen.solid.name in asked.question]
    return sorted(solids, key=lambda solid: asked.question.index(solid.name))


def clear_ratio(asked: Asked, measure: Callable[[Solid], float], one: Solid, other: Solid) -> None:
    """Hold that the answer is the object of the smaller measure of two, and smaller beyond doubt."""
    near, far = sorted((one, other), key=measure)
    assert asked.answer == near.name and set(asked.options) == {near.name, far.name}
    assert measure(far) > 1.25 * measure(near)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_the_nearer_object_is_the_nearer_one_in_the_scene(level):
    for question in (QUESTIONS["closer"], CV_QUESTIONS["Depth"]):
        for i in range(40):
            asked = ask(question, row_rng(3, i), level)
            clear_ratio(asked, lambda solid: camera_distance(level, solid), *asked_about(asked))


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_a_distance_is_measured_from_the_object_that_is_named_first(level):
    otherwise = Counter()  # how often another object would be the answer if measured from the camera, or in the image
    for i in range(60):
        asked = ask(CV_QUESTIONS["Distance"], row_rng(4, i), level)
        anchor, one, other = asked_about(asked)
        clear_ratio(asked, lambda solid, to=anchor: math.dist((solid.x, solid.z), (to.x, to.z)), one, other)
        otherwise["camera"] += asked.answer != min((one, other), key=lambda s: camera_distance(level, s)).name
        centres = {seen.solid: seen.centre for seen in asked.scenes[0]}
        in_image = min((one, other), key=lambda solid, to=anchor: math.dist(centres[solid], centres[to]))
        otherwise["image"] += asked.answer != in_image.name
    assert otherwise["camera"] > 10 and otherwise["image"] > 0


@pytest.mark.parametrize("task", CV_QUESTIONS)
def test_the_boxes_of_a_question_are_around_what_it_names(task):
    for i in range(10):
        asked = ask(CV_QUESTIONS[task], row_rng(5, i), EASY)
        told = re.findall(r"the (\w+ \w+) \((?:highlighted|annotated) by (?:a|the) (\w+) box\)", asked.question)
        assert list(dict.fromkeys(told)) == [(seen.solid.name, colour) for colour, seen in asked.boxes]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((0.0, 4.0), (0.8, 7.0)),  # close in the image
        ((1.3, 3.0), (1.9, 7.0)),  # close on the floor
        ((2.0, 2.7), (2.8, 7.4)),  # farther to the right on the floor, to the left in the image
    ],
)
def test_a_side_in_doubt_is_unclear(a, b):
    one, other = (see(EASY, Solid("circle", c, *at, 0.7, 0.0)) for c, at in (("red", a), ("blue", b)))
    for pair in ((one, other), (other, one)):
        with pytest.raises(Unclear):
            is_left(EASY, *pair)


@pytest.mark.parametrize("name", ["count", "Count"])
def test_every_number_is_asked_for(name):
    numbers = Counter()
    for i in range(150):
        asked = ask({**QUESTIONS, **CV_QUESTIONS}[name], row_rng(2, i), EASY)
        kind = asked.question.split()[2].removesuffix("s")
        assert asked.answer == str(sum(seen.solid.kind == kind for seen in asked.scenes[0]))
        options = sorted(map(int, asked.options))
        assert options == list(range(options[0], options[0] + len(options))) and options[0] >= 0
        numbers[asked.answer] += 1
    assert sorted(numbers) == [str(n) for n in range(1, EASY.most + 1)] and min(numbers.values()) > 20


def test_about_equal_distances_are_unclear():
    a, b = (see(EASY, Solid("circle", c, x, 4.0, 0.7, 0.0)) for c, x in (("red", -1), ("blue", 1)))
    assert closer((a, 4.0), (b, 5.1)) is a
    with pytest.raises(Unclear):
        closer((a, 4.0), (b, 4.9))


def test_row_depends_on_seed_and_index_alone():
    rows = [sat_row(i, 3, EASY) for i in range(10)]
    assert sat_row(7, 3, EASY) == rows[7]
    assert sat_row(7, 4, EASY) != rows[7]


def test_sat_file_is_in_sats_schema_and_every_row_is_usable(tmp_path):
    write_sat(tmp_path / "a" / "sat.parquet", 30, 1, EASY)
    table = pq.read_table(tmp_path / "a" / "sat.parquet")
    assert table.column_names == ["image_bytes", "question", "answers", "question_type", "correct_answer"]
    rows = table.to_pylist()
    assert rows == [sat_row(i, 1, EASY) for i in range(30)]
    assert {row["question_type"] for row in rows} == {"other"}
    assert all(isinstance(sat.convert_row(row, i, seed=0), sat.Example) for i, row in enumerate(rows))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["sat.parquet"]  # no temporary file


def test_full_images_are_640x480_jpegs():
    image = Image.open(io.BytesIO(sat_row(1, 1, FULL)["image_bytes"][0]))
    assert (image.format, image.size) == ("JPEG", (640, 480))


def test_cvbench_files_are_in_its_schema(tmp_path):
    write_cvbench(tmp_path, 81, 1, EASY)
    tables = {kind: pq.read_table(tmp_path / name) for kind, name in CVBENCH_FILES.items()}
    rows = [row for table in tables.values() for row in table.to_pylist()]
    columns = "idx type task image question choices answer prompt filename source source_dataset source_filename"
    expected = [*columns.split(), "target_class", "target_size", "bbox"]
    assert all(table.column_names == expected for table in tables.values())
    assert [row["idx"] for row in rows] == list(range(81))
    for kind in CVBENCH_TASKS:
        assert {row["task"] for row in rows if row["type"] == kind} == set(CVBENCH_TASKS[kind])
        assert {row["source"] for row in rows if row["type"] == kind} == set(CVBENCH_SOURCES[kind])
    for row in rows:
        choices = row["choices"]
        assert row["prompt"].startswith(row["question"] + " Select from the following choices.\n(A) ")
        assert row["prompt"].endswith(f"({LETTERS[len(choices) - 1]}) {choices[-1]}")
        picture = pixels(row["image"]["bytes"])
        for colour, rgb in BOX_COLOURS.items():
            assert f"{colour} box" not in row["question"] or (picture == rgb).all(-1).sum() > 40


def test_cvbench_relation_is_what_the_image_shows():
    for i in range(1, 40, 2):
        row = cvbench_row(i, 5, EASY, "2D")
        seen = figures(pixels(row["image"]["bytes"]))
        gold = row["choices"][LETTERS.index(row["answer"].strip("()"))]
        a, b = (target.split()[0] for target in row["target_class"].split(", "))
        (_, ua, va), (_, ub, vb) = seen[a], seen[b]
        assert {"left": ua < ub, "right": ua > ub, "above": va < vb, "below": va > vb}[gold]


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "open_r1.world", "--rows", "6", "--level", "easy", "--seed", "2"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "sat.parquet"), "--questions", "left"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "sat.parquet").to_pylist()[5] == sat_row(5, 2, EASY, ("left",))
    (tmp_path / "file").touch()
    done = subprocess.run([*command, "--output", str(tmp_path / "file" / "x.parquet")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("world: error: ")
    assert "Traceback" not in done.stderr


def test_no_torch():
    code = "import sys, open_r1.tasks.sat, open_r1.world.parquet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
