"""Questions made of pictures without labels: each answer is true of the images, none is unfair, none is favoured."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from open_r1.base.edits import split_edit
from open_r1.base.errors import Mistake
from open_r1.base.images import image_file, open_image
from open_r1.doctor.survey import look_at
from open_r1.reporting.runs import KnownImages, read_run
from open_r1.tasks.mixture import iter_mixture, parts_of
from open_r1.tasks.pretext import LARGEST, TASKS, held_out_file, read_pretext, write_pretext
from open_r1.world.parquet import sat_row
from open_r1.world.scene import LEVELS
from support import read_jsonl, run_grpo

PHOTO = Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rendered scenes, and of soft colours in a folder of it: the scenes have too much floor for strips."""
    folder, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    (folder / "more").mkdir()
    for row in range(20):
        (folder / f"a scene {row}.png").write_bytes(sat_row(row, 0, LEVELS["easy"])["image_bytes"][0])
        spots = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        spots.resize((126, 112), Image.Resampling.BICUBIC).save(folder / f"more/{row}.PNG")
    return folder


@pytest.fixture(scope="module")
def prepared(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes about them, and beside it what is held out."""
    output = tmp_path_factory.mktemp("json") / "pretext.json"
    command = [sys.executable, "-m", "open_r1.tasks.pretext", "--images", scenes, "--output", output]
    done = subprocess.run([*command, "--held_out", "0.25"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def rows_of(path: Path) -> list[dict]:
    """The rows of both files."""
    return [row for file in (path, held_out_file(path)) for row in json.loads(file.read_text())]


def answer_of(row: dict) -> str:
    return row["messages"][1]["content"]


def pictures_of(path: Path) -> set[bytes]:
    """The pixels of the files that are asked about."""
    files = {split_edit(str(path.parent / name))[0] for row in rows_of(path) for name in row["images"]}
    return {open_image(file).tobytes() for file in files}


def questions(path: Path, task: str) -> list[tuple[str, list[np.ndarray]]]:
    """The answer of each question of a task, and its images' pixels."""
    asked = [row for row in rows_of(path) if row["question_type"] == task]
    assert len(asked) > 8
    return [
        (answer_of(row), [np.asarray(open_image(str(path.parent / name))) for name in row["images"]]) for row in asked
    ]


def places(part: np.ndarray, whole: np.ndarray) -> list[tuple[int, int]]:
    """Where a part is in a picture, pixel for pixel: (y, x)."""
    h, w, _ = part.shape
    starts = np.ndindex(whole.shape[0] - h + 1, whole.shape[1] - w + 1)
    return [(y, x) for y, x in starts if (whole[y : y + h, x : x + w] == part).all()]


# --- answers are true ---------------------------------------------------------------------------------------------


def test_a_crop_is_in_the_quarter_that_is_named(prepared):
    for answer, (whole, part) in questions(prepared, "crop"):
        [(y, x)] = places(part, whole)
        h, (height, width, _) = len(part), whole.shape
        down, across = "bottom" if y >= height // 2 else "top", "right" if x >= width // 2 else "left"
        assert answer == f"{down} {across}" and (y + h <= height // 2) == (down == "top")


def test_the_right_piece_closes_the_gap(prepared):
    originals = pictures_of(prepared)
    for answer, (torn, *pieces) in questions(prepared, "gap"):
        [(y, x)] = places(np.full_like(pieces[0], 128), torn)
        right = int(answer.removeprefix("image ")) - 2
        for k, piece in enumerate(pieces):
            filled = torn.copy()
            filled[y : y + len(piece), x : x + piece.shape[1]] = piece
            assert (filled.tobytes() in originals) == (k == right)


def test_the_right_order_makes_the_picture(prepared):
    originals = pictures_of(prepared)
    for answer, (shown,) in questions(prepared, "strips"):
        columns = np.split(shown, 3, axis=1)
        assert np.hstack([columns[int(number) - 1] for number in answer.split("-")]).tobytes() in originals


def test_a_turn_and_a_mirror_are_as_said(prepared):
    quarters = ["not at all", "a quarter turn counterclockwise", "half a turn", "a quarter turn clockwise"]
    for answer, (first, second) in questions(prepared, "turn"):
        assert [(np.rot90(first, k) == second).all() for k in range(4)] == [name == answer for name in quarters]
    for answer, (first, second) in questions(prepared, "mirror"):
        assert (first == second).all() == (answer == "no") and (first[:, ::-1] == second).all() == (answer == "yes")


# --- rows ---------------------------------------------------------------------------------------------------------


def test_no_answer_and_no_place_is_favoured(prepared):
    train = json.loads(prepared.read_text())
    for name, task in TASKS.items():
        rows = [row for row in train if row["question_type"] == name]
        answers, at = (Counter(map(key, rows)) for key in (answer_of, lambda row: row["options"].index(answer_of(row))))
        assert set(answers) == set(task.answers) and max(answers.values()) - min(answers.values()) <= 2
        assert len(at) == min(4, len(task.answers)) and max(at.values()) - min(at.values()) <= 3
        assert all(len(row["options"]) == len(set(row["options"])) == len(at) for row in rows)


def test_a_picture_is_trained_on_or_held_out(prepared, scenes):
    files = [
        {split_edit(name)[0] for row in json.loads(file.read_text()) for name in row["images"]}
        for file in (prepared, held_out_file(prepared))
    ]
    assert not files[0] & files[1] and len(files[1]) == 10
    asked = Counter((row["question_type"], split_edit(row["images"][0])[0]) for row in rows_of(prepared))
    assert set(asked.values()) == {1}
    assert sorted(path.name for path in prepared.parent.iterdir()) == ["pretext.json", "pretext_held_out.json"]
    # the doctor sees that two crops are of one file, and are two questions
    one, other = (look_at(f"{scenes}/a scene 0.png#xywh=0,0,{side},50", decode=True) for side in (50, 60))
    assert one[0] == other[0] and one != other


def test_rows_follow_from_the_seed_and_are_as_many_as_asked(prepared, scenes, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_pretext(scenes, tmp_path / f"{name}.json", rows=30, tasks=["crop", "turn"], seed=seed, held_out=0.2)
    a, b, c = (rows_of(tmp_path / f"{name}.json") for name in "abc")
    assert a == b != c and len(json.loads((tmp_path / "a.json").read_text())) == 24 and len(a) == 30
    assert Counter(row["question_type"] for row in a).keys() == {"crop", "turn"}


def test_a_folder_is_a_data_set_and_a_part_of_a_mixture(scenes, tmp_path):
    mixture = tmp_path / "m.yaml"
    mixture.write_text(f"datasets: [{{path: {scenes}, task: pretext}}]")
    one = [row for *_, row, _ in iter_mixture(parts_of(scenes, split="test", task="pretext"))]
    assert one == [row for *_, row, _ in iter_mixture(parts_of(mixture, split="test"))]
    assert {name for row in one for name in map(image_file, row["images"])} <= {str(p) for p in scenes.rglob("*.*")}
    assert {(row["question_type"], row["solution"] in row["options"]) for row in one} <= {
        (name, True) for name in TASKS
    }
    with pytest.raises(Mistake, match="split val: pictures are split into train and test"):
        list(iter_mixture(parts_of(scenes, split="val", task="pretext")))
    mixture.write_text(f"datasets: [{{path: {scenes}, task: jigsaw}}]")
    with pytest.raises(Mistake, match=r"m\.yaml: datasets 1: task 'jigsaw' is none of pretext"):
        parts_of(mixture)


# --- what is left out ---------------------------------------------------------------------------------------------


def test_unfair_questions_are_left_out_and_counted(tmp_path, capsys):
    """Each picture has a symmetry that makes some of its questions have two right answers, or says nothing."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    texture = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((126, 126)))
    mirrored = np.hstack([texture, texture[:, ::-1]])
    pictures = {
        "plain": np.full((120, 120), 90, dtype=np.uint8),
        "small": texture[:60, :60],
        "mirrored": mirrored,
        "turned": np.vstack([mirrored, mirrored[::-1]]),  # the same after half a turn
        "repeated": np.hstack([texture] * 3),
        "chessboard": np.kron(np.indices((8, 8)).sum(axis=0) % 2 * 255, np.ones((25, 25))).astype(np.uint8),
        "fair": texture,
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "copy.png").write_bytes((folder / "fair.png").read_bytes())
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    write_pretext(folder, tmp_path / "a.json", held_out=0.5)
    asked = {name: set() for name in pictures}
    for row in rows_of(tmp_path / "a.json"):
        asked.setdefault(Path(split_edit(row["images"][0])[0]).stem, set()).add(row["question_type"])
    assert not asked["plain"] | asked["small"] and (asked["fair"] or asked["copy"]) == set(TASKS)
    assert "mirror" not in asked["mirrored"] | asked["turned"] and "turn" not in asked["turned"]
    assert "turn" in asked["mirrored"] and "mirror" in asked["repeated"]
    assert "strips" not in asked["repeated"] and "crop" not in asked["chessboard"]
    printed = capsys.readouterr().out
    for line in (
        *("1 x picture: nearly one colour", "1 x picture: a side under 84 pixels", "1 x picture: a copy of another"),
        *("1 x picture: corrupt image", "2 x mirror: the same when mirrored", "2 x turn: the same when turned"),
    ):
        assert f"left out: {line}\n" in printed


def test_a_photo_is_asked_about_whole_and_small_enough(tmp_path):
    (tmp_path / "photos").mkdir()
    for number, box in enumerate([(0, 0, 512, 600), (0, 100, 512, 600)]):
        Image.open(PHOTO).crop(box).save(tmp_path / f"photos/{number}.jpg")
    write_pretext(tmp_path / "photos", tmp_path / "a.json")
    rows = rows_of(tmp_path / "a.json")
    assert {row["question_type"] for row in rows} >= {"crop", "gap", "turn"}
    for row in rows:
        images = [open_image(str(tmp_path / name)) for name in row["images"]]
        assert all(min(image.size) >= 28 and max(image.size) <= LARGEST for image in images)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--images photos --output a.json", "photos: 0 pictures (.jpg, .jpeg, .png, .webp"),
        ("--images plain --output a.json", "plain: no fair question about its pictures; see what was left out"),
        ("--images plain --output there.json", "there.json is there; name another file or delete it"),
        ("--images plain --output a.json --held_out 1", "argument --held_out: expected a number between 0 and 1"),
        ("--images plain --output a.json --tasks jigsaw", "argument --tasks: invalid choice: 'jigsaw'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    (tmp_path / "plain").mkdir()
    (tmp_path / "there.json").touch()
    for name in "ab":
        Image.new("RGB", (100, 100), "red").save(tmp_path / f"plain/{name}.png")
    command = [sys.executable, "-m", "open_r1.tasks.pretext", *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (1, 2) and message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "a.json").exists()


# --- trained ------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("is_prepared", [True, False], ids=["JSON", "folder"])
def test_a_run_trains_on_photos_and_is_evaluated_on_others(is_prepared, scenes, tmp_path, tiny_model, quick_python):
    """Two steps through run_grpo_SAT.sh; the accuracy of held-out questions is in the log."""
    data, held_out = tmp_path / "pretext.json", tmp_path / "pretext_held_out.json"
    arguments = ["--max_steps", "2", "--save_steps", "2", "--max_prompt_length", "1024", "--max_completion_length", "8"]
    if is_prepared:
        write_pretext(scenes, data, rows=30, held_out=0.2)
        asked = {str(tmp_path / image) for row in json.loads(held_out.read_text()) for image in row["images"]}
    else:
        data = held_out = scenes
        arguments += ["--task", "pretext"]
        asked = {f"{scenes}/{image}" for row in read_pretext(scenes, "test") for image in row["images"]}
    arguments += ["--eval_dataset_name", str(held_out), "--eval_strategy", "steps", "--eval_steps", "2"]
    env = {"ACCELERATE_CONFIG": "cpu", "OMP_NUM_THREADS": "1", "PYTHON": str(quick_python)}
    result = run_grpo(tiny_model, data, tmp_path / "out", *arguments, **env)
    assert result.returncode == 0, result.stderr[-3000:]
    accuracies = [event.get("eval_rewards/accuracy_reward/mean") for event in read_jsonl(tmp_path / "out/log.jsonl")]
    assert any(accuracy is not None and 0 <= accuracy <= 1 for accuracy in accuracies)
    trained, evaluated = (read_jsonl(tmp_path / f"out/trajectories/{name}.jsonl") for name in ("train", "eval"))
    assert {row["step"] for row in trained} == {1, 2}
    assert {image for row in evaluated for image in row["images"]} == asked
    known = KnownImages(read_run(tmp_path / "out"))
    assert all(image in known for row in (*trained, *evaluated) for image in row["images"])
