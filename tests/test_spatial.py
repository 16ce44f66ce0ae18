"""The eight benchmarks of easi-8, in their published schemas: what is asked, every scoring rule counted by hand, runs.

`spatial.py` renders them. The right letters are A, B, C, D in turn, so that a constant answer is right in a quarter.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from open_r1.answers.statistics import relative_accuracy
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.base.images import BrokenImage
from open_r1.base.videos import Video, picture_sizes, pictures
from open_r1.engines.backends import Completions
from open_r1.evaluation import answering
from open_r1.evaluation import run as evaluation
from open_r1.evaluation.lmms_eval import THEIRS, read_samples, write_samples
from open_r1.evaluation.results import read_scored
from open_r1.evaluation.run import make_result, write_result
from open_r1.tasks.benchmarks import BENCHMARKS, SUITES, Item, digest, read
from open_r1.tasks.benchmarks.base import lettered
from spatial import GREY, VSI, WRITERS, picture, write_all, write_video
from support import load_script

EIGHT = SUITES["easi-8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All eight, each in a folder of its name."""
    return write_all(tmp_path_factory.mktemp("easi"))


def asked(name: str, folder: Path) -> list[Item]:
    return read(BENCHMARKS[name], str(folder / name))


def answered(name: str, items: list[Item], respond: Callable[[Item], str]) -> dict:
    """The result of a model that responds so."""
    rows = [item.to_row() | {"response": respond(item)} for item in items]
    return make_result(rows, {"benchmark": name, "prompt": {"name": "base", "style": "reasoning"}}, "lenient")


def accuracies(result: dict) -> dict[str, float]:
    return {name: score["accuracy"] for name, score in result["scores"].items()}


def close(**expected: float) -> object:
    return pytest.approx(expected, abs=1e-9)


# --- every benchmark, counted by hand -----------------------------------------------------------------------


def test_mmsi_bench(folder):
    """Always B: right in rows 1, 5, 9, 13 and 17 of 20. Each type has five rows: 1, 2 (rows 5 and 9), 1 and 1."""
    items = asked("MMSI-Bench", folder)
    assert len(items) == 20 and items[1].images == (picture(1), picture(2), picture(3))
    assert items[1].prompt == (
        "Where is box 1?\nOptions: A: left, B: right, C: front, D: back\n"
        "Answer with the option's letter from the given choices directly. Enclose the option's letter within ``."
    )
    result = answered("MMSI-Bench", items, lambda item: "``B``")
    scores = accuracies(result)
    assert scores["Total"] == 5 / 20
    assert result["scores"]["MSR"]["n"] == 5  # a type and its only task in one
    of_types = ["Positional Relationship (Cam.-Obj.)", "Positional Relationship (Obj.-Obj.)", "Motion (Cam.)", "MSR"]
    assert [scores[name] for name in of_types] == [1 / 5, 2 / 5, 1 / 5, 1 / 5]
    assert scores["Positional Relationship"] == 3 / 10 and scores["Motion"] == 1 / 5


def test_mindcube(folder):
    """Answers in the authors' form: right in rows 0 to 11 of 20, C in the others, which is right in rows 14 and 18.

    Rows 0 to 4 are `among`, 5; 5 to 9 `around` and 15 to 19 `aroundnew`, 5 + 1 of 10; 10 to 14 `rotation`, 2 + 1 of 5.
    """
    items = asked("MindCube", folder)
    assert len(items) == 20 and len(items[0].images) == 3 and "<image>" not in items[0].prompt
    assert items[0].options == ("Sofa", "Wooden table", "TV", "Door")

    def respond(item: Item) -> str:
        row = int(item.id.rpartition("_q")[2])
        letter = item.answer[1] if row < 12 else "C"
        return f"<answer>{letter}. {item.options['ABCD'.index(letter)]}</answer>"

    scores = accuracies(answered("MindCube", items, respond))
    assert scores == close(Total=14 / 20, among=5 / 5, around=6 / 10, rotation=3 / 5)


def test_viewspatial(folder):
    """`D. back` in every row: right in rows 3, 7, 11, 15 and 19, three of them (3, 11, 19) of the camera's 12."""
    items = asked("ViewSpatial", folder)
    assert len(items) == 20
    assert items[3].prompt == (
        "Question: Where is the counter 3?\nChoices: A. left\nB. right\nC. front\nD. back\n"
        "Reply only to the corresponding option.\nAnswer:"
    )
    scores = accuracies(answered("ViewSpatial", items, lambda item: "D. back"))
    assert scores["Total"] == 5 / 20
    assert scores["Camera perspective"] == scores["Camera perspective - Relative Direction"] == 3 / 12
    assert scores["Person perspective"] == 2 / 8


def test_embspatial(folder):
    """The text of option A, `tv`: rows 0, 4, 8, 12 and 16; `close` has rows 0-3, 8-11, 16-19, so three of 12."""
    items = asked("EmbSpatial", folder)
    assert len(items) == 20 and items[2].prompt == "Which object is closest, 2?\nA) tv\nB) sofa\nC) lamp\nD) box"
    scores = accuracies(answered("EmbSpatial", items, lambda item: "It is the tv."))
    assert scores == close(Total=5 / 20, close=3 / 12, above=2 / 8, mp3d=2 / 7, ai2thor=2 / 7, scannet=1 / 6)


def test_blink_is_the_mean_over_its_tasks(folder):
    """`(A)` is right in one of each task's two rows. Three more right ones of task 0 and 1: the mean over 14 tasks.

    Task means are 1, 1 and twelve times 1/2: (2 + 6) / 14 = 8/14; the same here as 16 of 28.
    """
    items = asked("BLINK-full", folder)
    assert len(items) == 28 and len(items[1].images) == 2
    right = {"Art_Style", "Counting"}
    result = answered("BLINK-full", items, lambda item: item.answer if item.task in right else "(A)")
    scores = accuracies(result)
    assert scores["BLINK"] == pytest.approx(8 / 14) and scores["Total"] == pytest.approx(16 / 28)
    assert scores["Counting"] == 1 and scores["Multi-view_Reasoning"] == 1 / 2
    # Without a row of one task the two differ, and without one task there is no mean.
    fewer = accuracies(answered("BLINK-full", items[1:], lambda item: item.answer if item.task in right else "(A)"))
    assert fewer["BLINK"] == pytest.approx(8 / 14) and fewer["Total"] == pytest.approx(15 / 27)
    assert answered("BLINK-full", items[2:], lambda item: "(A)")["accuracy"]["BLINK"] is None


def test_3dsrbench_counts_a_question_that_is_right_in_every_rotation(folder):
    """12 questions in two rotations each. "yes" is right in both of the 6 that are not mirrored: 6/12.

    (A) is right in one rotation of each, 12 of 24 rows, which is a Total of 1/2, and of no question in both.
    """
    items = asked("3DSRBench", folder)
    assert len(items) == 24 and len({item.id for item in items}) == 12
    assert items[0].prompt == (
        "Question: Is box 0 higher?\nOptions:\nA. yes\nB. no\n"
        "Please select the correct answer from the options above. \n"
    )
    every = ", right in every rotation"
    scores = accuracies(answered("3DSRBench", items, lambda item: f"({'AB'[item.options.index('yes')]})"))
    assert scores["Total"] == scores[f"Total{every}"] == 6 / 12
    assert scores[f"height{every}"] == scores[f"height_higher{every}"] == 2 / 4
    constant = answered("3DSRBench", items, lambda item: "A")
    scores = accuracies(constant)
    assert scores["Total"] == 1 / 2 and scores[f"Total{every}"] == scores[f"orientation{every}"] == 0
    assert (
        constant["scores"][f"Total{every}"]["chance"] == 1 / 4 and BENCHMARKS["3DSRBench"].headline == f"Total{every}"
    )


def test_site_is_adjusted_for_chance(folder):
    """`A` in 20 rows: of the ten with two options right in five, of those with four in three (rows 1, 9, 17).

    8/20 = 0.4 at a chance of (1/2 + 1/4) / 2 = 3/8: (0.4 - 0.375) / 0.625 = 0.04. About images five of ten: 2 of the
    four options' five (rows 1, 9) and 3 of the two options' five (rows 0, 4, 8): (0.5 - 0.375) / 0.625 = 0.2. About
    the video 1 and 2 of ten: (0.3 - 0.375) / 0.625 = -0.12, worse than chance.
    """
    items = asked("SITE", folder)
    assert len(items) == 20 and items[0].images == (picture(0),) and "<image>" not in items[0].prompt
    assert items[10].images == (Video(str(folder / "SITE/videos/0.mp4")),)
    assert items[10].prompt.startswith("Select the best answer") and items[0].prompt.startswith("Question: ")
    result = answered("SITE", items, lambda item: "A")
    scores, adjusted = accuracies(result), ", chance-adjusted"
    assert scores["Total"] == 0.4 and scores[f"Total{adjusted}"] == pytest.approx(0.04)
    assert scores[f"counting & existence{adjusted}"] == pytest.approx(0.2)
    assert scores[f"multi-view & cross-image reasoning{adjusted}"] == pytest.approx(-0.12)
    total = result["scores"][f"Total{adjusted}"]
    assert total["chance"] == 0 and total["interval"][0] < 0.04 < total["interval"][1]


def test_vsi_bench_scores_numbers_by_how_close_they_are(folder):
    """10 numbers, 13 letters. Every number is said as 5 metres, every letter as A.

    Off by |5 - 4| / 4 = 0.25 (six of ten thresholds: 1 - 0.75 is 0.25), twice; |5 - 2| / 2: none; 5: all; |5 - 2.5| /
    2.5 = 1: none; |5 - 10| / 10 = 0.5: one (0.5); sizes and rooms: none. So 1.2/3, 1.1/3, 0 and 0. Letters: A is right
    in 1 of 3, 1 of 2 at each level of direction, 0 of 2, 1 of 2. The mean of eight: (0.4 + 1.1/3 + 0 + 0 + 1/3 + 1/2 +
    0 + 1/2) / 8.
    """
    items = asked("VSI-Bench", folder)
    assert len(items) == 23 == sum(map(len, VSI.values()))
    by_id = {item.id: item for item in items}
    assert by_id[0].prompt == (
        "These are frames of a video.\nQuestion 0 of object_counting?\n"
        "Please answer the question using a single word or phrase."
    )
    assert by_id[12].options == ("left", "right", "front", "back")
    assert by_id[12].prompt.endswith("D. back\nAnswer with the option's letter from the given choices directly.")
    result = answered("VSI-Bench", items, lambda item: "A" if item.options else "It is about 5 meters.")
    scores = accuracies(result)
    assert scores["object_counting"] == pytest.approx(1.2 / 3)
    assert scores["object_abs_distance"] == pytest.approx(1.1 / 3)
    assert scores["object_size_estimation"] == scores["room_size_estimation"] == 0
    assert scores["object_rel_direction"] == 1 / 2
    eight = (0.4 + 1.1 / 3 + 0 + 0 + 1 / 3 + 1 / 2 + 0 + 1 / 2) / 8
    assert scores["VSI-Bench"] == pytest.approx(eight)
    assert scores["Numerical Answer"] == pytest.approx(2.3 / 10) and scores["Multiple-Choice Answer"] == 5 / 13
    low, high = result["scores"]["VSI-Bench"]["interval"]
    assert low < eight < high and result["scores"]["Numerical Answer"]["chance"] == 0
    # Always the most frequent number of a task, 4 of 4, 4 and 2, would get 2 of 3; of those that are once, the least.
    assert result["scores"]["object_counting"]["majority"] == pytest.approx(2 / 3)
    assert result["scores"]["object_size_estimation"]["majority"] == pytest.approx((1 + relative_accuracy(50, 100)) / 2)


# --- how rows are read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Which? A. left B. the right, of two C. up", ("left", "the right, of two", "up")),
        ("Options: A: 3, B: 2.5, C: 0\nAnswer with the letter.", ("3", "2.5", "0")),
        ("Say 'A. Above' of 'A. Above B. Under'.\nIs it so? A. yes B. no", ("yes", "no")),
        ("Which one?\n(A) a cat\n(B) a dog\n", ("a cat", "a dog")),
        ("A) tv\nB) C. Smith's sofa\nC) lamp", ("tv", "C. Smith's sofa", "lamp")),
        ("How many?", ()),
    ],
)
def test_options_behind_letters(text, options):
    assert lettered(text) == options


def change(path: Path, column: str, values: list | None) -> None:
    """Replace a column, or drop it; the others keep their types."""
    table = pq.read_table(path)
    at = table.column_names.index(column)
    pq.write_table(
        table.remove_column(at) if values is None else table.set_column(at, column, [values * len(table)]), path
    )


FIRST = {  # a file of each, one of its columns, a value that is none, and what is said of it
    "VSI-Bench": ("test_pruned.parquet", "ground_truth", "-1", "the right answer '-1' is no number above 0"),
    "MMSI-Bench": ("MMSI_Bench.parquet", "answer", "E", "the right answer '(E)' is none of its 4 options"),
    "MindCube": ("tiny/combined-00000-of-00001.parquet", "gt_answer", "AB", "gt_answer: expected a letter from A to Z"),
    "ViewSpatial": (
        "data/test-00000-of-00001.parquet",
        "choices",
        "left, right",
        "the right answer '(A)' is no number",
    ),
    "SITE": (
        "image_test/test-00000-of-00001.parquet",
        "options",
        ["left"],
        "options: expected a list of 2 to 26 texts",
    ),
    "BLINK-full": (
        "Art_Style/val-00000-of-00001.parquet",
        "answer",
        "hidden",
        "the right answer 'hidden' is none of its",
    ),
    "3DSRBench": ("3dsr_circular/test-00000-of-00001.parquet", "qid", "one", "has the idx 'one' of "),
    "EmbSpatial": ("data/test-00000-of-00001.parquet", "answer", 4, "the right answer '(E)' is none of its 4 options"),
}


@pytest.mark.parametrize("name", EIGHT)
def test_a_damaged_row_a_missing_column_and_another_schema_are_one_line(name, tmp_path):
    file, column, value, message = FIRST[name]
    WRITERS[name](tmp_path / name)
    path = tmp_path / name / file
    whole = path.read_bytes()

    def refused() -> str:
        with pytest.raises(Mistake) as caught:
            asked(name, tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    change(path, column, [value])
    row = 1 if name == "3DSRBench" else 0
    assert refused().startswith(f"{path}: row {row}: {message}")
    path.write_bytes(whole)
    change(path, column, None)
    assert refused() == f"{path}: no column {column}; is this {BENCHMARKS[name].name}?"
    path.write_bytes(whole)
    change(path, column, [{"text": "A"}])  # an object, in some later version
    assert refused().startswith(f"{path}: row 0: {column}: expected ")
    path.write_bytes(whole[: len(whole) // 2])
    assert refused().startswith(f"{path}: not a parquet file that can be read")
    path.unlink()
    assert f"no {BENCHMARKS[name].files[0]} in it" in refused() or name == "MindCube"


def test_questions_that_name_no_options_are_left_out_and_counted(tmp_path, capsys):
    WRITERS["MMSI-Bench"](tmp_path / "MMSI-Bench", 3)
    path = tmp_path / "MMSI-Bench/MMSI_Bench.parquet"
    table = pq.read_table(path).to_pylist()
    change(path, "question", ["Where is it?"])
    with pytest.raises(Mistake, match="no question in it"):
        asked("MMSI-Bench", tmp_path)
    assert "MMSI-Bench: left out 3 of 3 rows without a right option" in capsys.readouterr().err
    assert len(table) == 3


def test_a_limit_takes_questions_with_all_their_rotations(folder):
    items = read(BENCHMARKS["3DSRBench"], str(folder / "3DSRBench"), limit=4)
    assert len(items) == 8 and [item.rotation for item in items] == [0, 1] * 4


# --- videos -------------------------------------------------------------------------------------------------


def greys(video: Video) -> list[int]:
    return [round(float(np.asarray(frame).mean()) / GREY) for frame in pictures(video)]


@pytest.mark.parametrize(
    ("most", "frames"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10))), (99, list(range(10)))]
)
def test_frames_are_evenly_spaced_from_the_first_to_the_last(tmp_path, most, frames):
    write_video(tmp_path / "x.mp4")
    video = Video(str(tmp_path / "x.mp4"), most)
    assert greys(video) == frames and picture_sizes(video) == [(32, 32)] * len(frames)


def test_videos_that_are_none_are_broken_images_and_are_not_followed(tmp_path):
    write_video(tmp_path / "whole.mp4")
    whole = (tmp_path / "whole.mp4").read_bytes()
    playlist = f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/whole.mp4\n".encode()
    for number, content in enumerate([b"", b"no video", whole[: len(whole) // 3], playlist]):
        (tmp_path / f"{number}.mp4").write_bytes(content)
        for read_it in (pictures, picture_sizes):
            with pytest.raises(BrokenImage, match=rf"{number}\.mp4: corrupt video"):
                read_it(Video(str(tmp_path / f"{number}.mp4")))


def test_the_number_of_frames_is_part_of_what_is_asked(folder):
    read_at = {most: read(BENCHMARKS["VSI-Bench"], str(folder / "VSI-Bench"), None, most) for most in (2, 3)}
    assert digest(read_at[2]) != digest(read_at[3])
    assert digest(read_at[2]) == digest(read(BENCHMARKS["VSI-Bench"], str(folder / "VSI-Bench"), None, 2))


def test_without_its_videos_vsi_bench_says_where_they_are(tmp_path):
    WRITERS["VSI-Bench"](tmp_path / "VSI-Bench")
    (tmp_path / "VSI-Bench/scannet/scene0011_00.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of the images is there; unpack arkitscenes.zip"):
        asked("VSI-Bench", tmp_path)


# --- runs over all eight ------------------------------------------------------------------------------------


SCRIPT = load_script(REPO_ROOT / "src/eval/test_qwen2vl_CVBench.py")


class Table:
    """A backend that answers from a table of texts, whatever it is asked, and counts its questions."""

    made = 0
    texts = ("B", "It is about 5 meters.", "<answer>(A)</answer>", "no idea")

    def __init__(self, folder, processor, device, dtype, style):
        type(self).made += 1
        self.processor = processor

    def encode(self, prompt):
        return prompt[0]["content"][-1]["text"]

    def generate(self, prompts, repeats, settings):
        texts = [self.texts[len(prompt) % len(self.texts)] for prompt in prompts]
        ends = settings.eos_token_id[:1]
        return Completions([self.processor.tokenizer(text)["input_ids"] + ends for text in texts], None, prompts)


@pytest.fixture
def arguments(tiny_model, folder, tmp_path, monkeypatch) -> list[str]:
    """Of a run over all eight that takes no model's time, 8 questions a batch."""
    monkeypatch.setitem(answering.BACKENDS, "hf", Table)
    monkeypatch.setattr(Table, "made", 0)
    options = ["--benchmark", "easi-8", "--dataset_path", folder, "--model_path", tiny_model, "--bs", 8]
    return list(map(str, [*options, "--max_frames", 2, "--output_dir", tmp_path / "results"]))


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_run_over_all_eight_that_was_interrupted_twice_leaves_the_same_files(
    arguments, tmp_path, monkeypatch, capsys
):
    """Once within the first benchmark and once within the fifth; one model answers all."""
    evaluation.run(SCRIPT.parse_args(arguments))
    whole = results(tmp_path / "results")
    assert len(whole) == 8 and Table.made == 1
    out = capsys.readouterr().out
    assert out.startswith("easi-8: 8 of 8 benchmarks are there\n")
    rows = [line.split("|")[1].strip() for line in out[out.rindex("|  ") :].splitlines() if line.startswith("| ")]
    last = out.rstrip().splitlines()[-8:]
    assert [line.split("|")[1].strip() for line in last] == [
        *("VSI-Bench", "MMSI-Bench", "MindCube", "ViewSpatial", "SITE, chance-adjusted", "BLINK"),
        *("3DSRBench, right in every rotation", "EmbSpatial"),
    ], rows
    shutil.rmtree(tmp_path / "results")

    for batches in (2, 13):  # VSI-Bench has 3, MMSI-Bench, MindCube and ViewSpatial as many: the second is in SITE
        saved, left = evaluation.append_rows, [batches]

        def save_or_die(partial: Path, rows: list[dict], saved=saved, left=left) -> None:
            if "id" in rows[0]:
                left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            saved(partial, rows)

        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "append_rows", save_or_die)
            with pytest.raises(KeyboardInterrupt):
                evaluation.run(SCRIPT.parse_args(arguments))
    (partial,) = (tmp_path / "results").glob("*.partial*")
    assert partial.name.startswith("SITE_") and len(partial.read_text().splitlines()) == 1 + 8
    evaluation.run(SCRIPT.parse_args(arguments))
    assert results(tmp_path / "results") == whole


def test_those_that_are_not_there_are_named_in_a_line(arguments, folder, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for name in ("MindCube", "EmbSpatial"):
        (few / name).symlink_to(folder / name)
    arguments[arguments.index("--dataset_path") + 1] = str(few)
    evaluation.run(SCRIPT.parse_args(arguments))
    out = capsys.readouterr().out
    names = ", ".join(name for name in EIGHT if name not in ("MindCube", "EmbSpatial"))
    assert out.splitlines()[0] == f"easi-8: 2 of 8 benchmarks are there; not in {few}: {names}"
    assert len(list((tmp_path / "results").iterdir())) == 2
    arguments[arguments.index("--dataset_path") + 1] = str(tmp_path / "results")
    with pytest.raises(Mistake, match=r"easi-8: 0 of 8 benchmarks are there; .* each belongs in a folder of its name"):
        evaluation.run(SCRIPT.parse_args(arguments))


def test_without_its_videos_a_benchmark_is_left_out(arguments, folder, tmp_path, capsys):
    WRITERS["VSI-Bench"](tmp_path / "few/VSI-Bench")
    (tmp_path / "few/VSI-Bench/scannet/scene0011_00.mp4").unlink()
    (tmp_path / "few/MindCube").symlink_to(folder / "MindCube")
    arguments[arguments.index("--dataset_path") + 1] = str(tmp_path / "few")
    evaluation.run(SCRIPT.parse_args(arguments))
    told = capsys.readouterr()
    assert "warning: VSI-Bench is left out: " in told.err and "none of the images is there; unpack" in told.err
    assert told.out.rstrip().splitlines()[-1].startswith("| MindCube ")


def test_a_model_sees_images_and_frames_of_all_eight(tiny_model, tmp_path, monkeypatch, capsys):
    """A real tiny model, by the command."""
    write_all(tmp_path / "data")
    options = ["--benchmark", "easi-8", "--dataset_path", tmp_path / "data", "--model_path", tiny_model, "--limit", 4]
    options += ["--max_frames", 3, "--max_new_tokens", 2, "--max_pixels", 12544, "--output_dir", tmp_path / "results"]
    monkeypatch.setattr(sys, "argv", ["", *map(str, options)])
    SCRIPT.main()
    found = [read_scored(path) for path in sorted((tmp_path / "results").iterdir())]
    assert len(found) == 8 and all(result["shares"]["image_errors"] == 0 for result in found)
    assert "| VSI-Bench, Total " in capsys.readouterr().out  # four questions are of too few tasks for the mean
    vsi = next(result for result in found if result["benchmark"] == "VSI-Bench")
    assert vsi["prompt_example"].count("<|image_pad|>") == 3 and vsi["args"]["max_frames"] == 3


# --- lmms-eval ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EIGHT)
def test_what_is_exported_is_read_back_as_it_was(name, folder, tmp_path):
    """From the prompts alone; each response counts as it did."""
    items = asked(name, folder)
    result = answered(name, items, lambda item: Table.texts[len(item.prompt) % 4])
    path = tmp_path / f"{name}_result_x_reasoning.json"
    exported = write_samples(path, result, {item.key: item.prompt for item in items})
    assert exported.name == f"{path.stem}_samples_{BENCHMARKS[name].lmms[0]}.jsonl"
    again = read_samples(exported)
    keys = ("options", "task", "ground_truth", "model_answer", "correct", "reading")
    assert [[row[key] for key in keys] for row in again["results"]] == [
        [row[key] for key in keys] for row in result["results"]
    ]
    rows = len(items)
    mean = sum(row.get("credit", row["correct"]) for row in result["results"]) / rows
    assert [again["scores"][key]["accuracy"] for key in ("Total", THEIRS)] == pytest.approx([mean, mean])
    line = json.loads(exported.read_text().splitlines()[0])
    assert line["doc_id"] == 0 and line["target"] == result["results"][0]["ground_truth"]
    assert line["resps"] == [line["filtered_resps"]] == [result["results"][0]["response"]]
    assert line["input"] == items[0].prompt and len(line["doc_hash"]) == 64


def log(path: Path, *samples: dict) -> Path:
    """A log of lmms-eval's, with what it writes beside the fields that differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = {"token_counts": [None], "doc_hash": "ab" * 32}
    lines = [json.dumps({"doc_id": number, **common, **sample}) + "\n" for number, sample in enumerate(samples)]
    path.write_text("".join(lines))
    return path


BLINK_LINE = {
    "target": "(B)",
    "filtered_resps": "The answer is (B)",  # whose first letter lmms-eval takes, T
    "input": "Note: You only need to respond with A, B without more.\nWhich is it?\n(A) yes\n(B) no",
    "blink_acc": {
        "id": "val_Counting_1",
        "gt_content": "B",
        "pred_parsed": "T",
        "sub_task": "Counting",
        "is_correct": False,
    },
}
# task -> a line of its log, what our checker reads there, and whether lmms-eval found it right
LOGS = {
    "blink": (BLINK_LINE, "(B)", 1, 0),
    "cv_bench": (
        BLINK_LINE | {"filtered_resps": ["B"], "resps": [["B"]], "blink_acc": {"task": "Count", "is_correct": True}},
        *("(B)", 1, 1),
    ),
    "embspatial": (
        {"target": "1", "filtered_resps": "B) sofa", "input": "Which?\nA) tv\nB) sofa"}
        | {"embspatial_acc": {"sub_task": "close", "is_correct": True}},
        *("(B)", 1, 1),
    ),
    "mindcube_tiny": (
        {"target": "<answer>C. TV</answer>", "filtered_resps": "<answer>C. TV</answer>"}
        | {"input": "Say 'A. Above' of 'A. Above B. Under'.\n[Question]\nWhat? A. Sofa B. Door C. TV"}
        | {"overall_accuracy": {"score": 1.0}, "among_accuracy": {"score": 1.0, "type": "among"}},
        *("(C)", 1, 1),
    ),
    "viewspatial": (
        {"target": "D. back", "filtered_resps": "A lamp is there.\nD. back"}
        | {"input": "Question: Where?\nChoices: A. left\nB. right\nC. front\nD. back\nReply only.\nAnswer:"}
        | {"overall_accuracy": {"score": 1.0}, "camera_accuracy": {"score": 1.0, "question_type": "Camera"}},
        *("(D)", 1, 1),
    ),
    "site_bench_image": (
        {
            "target": "B",
            "filtered_resps": "I cannot see it.",
            "input": "Question: How?\nOptions:\nA: on\nB: under\nSay:",
        }
        | {"accuracy": {"overall": 1.0, "counting & existence": 1.0, "total": 1}},  # by a random letter
        *(None, 0, 1),
    ),
    "vsibench_multiimage": (
        {"target": "4", "filtered_resps": "5", "input": "These are frames.\nHow many chairs?\nA single word."}
        | {"vsibench_overall": {"question_type": "object_counting", "MRA:.5:.95:.05": 0.6, "ground_truth": "4"}},
        *("5", 0.6, 0.6),
    ),
}


@pytest.mark.parametrize("task", LOGS)
def test_logs_of_lmms_eval_are_scored_anew(task, tmp_path):
    line, answer, ours, theirs = LOGS[task]
    result = read_samples(log(tmp_path / f"model/20260101_120000_samples_{task}.jsonl", line))
    assert result["results"][0]["model_answer"] == answer and result["benchmark"] == task
    assert result["scores"]["Total"]["accuracy"] == pytest.approx(ours)
    assert result["scores"][THEIRS]["accuracy"] == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "x_samples_blink",
            {"target": "(E)"},
            "row 0: the right answer '(E)' is none of",
        ),
        (
            "x_samples_blink",
            {"input": "Which?"},
            "row 0: the right answer '(B)' is no num",
        ),
        ("x_samples_blink", {"filtered_resps": 3}, "row 0: filtered_resps: expected "),
        (
            "x_samples_blink",
            {"blink_acc": {"sub_task": "\x1b[2J"}},
            "row 0: task: expected a name of printable letters",
        ),
        ("x_samples_blink", {"doc_id": -1}, "row 0: doc_id: expected a whole number from 0"),
        ("results", {}, "not a name that lmms-eval gives, ..._samples_TASK.jsonl"),
    ],
)
def test_a_log_that_cannot_be_read_is_one_line(name, changes, message, tmp_path):
    path = log(tmp_path / f"{name}.jsonl", BLINK_LINE | changes)
    with pytest.raises(Mistake) as caught:
        read_samples(path)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


def test_what_lmms_eval_gave_is_left_out_where_it_is_no_share(tmp_path):
    path = log(tmp_path / "x_samples_blink.jsonl", BLINK_LINE, BLINK_LINE | {"blink_acc": {"score": float("nan")}})
    assert THEIRS not in read_samples(path)["scores"]


def test_compare_shows_both_readings_side_by_side(tmp_path, monkeypatch, capsys, folder):
    """lmms-eval's log of one model, ours of the same benchmark, and two logs of one task, which pair by doc_id."""
    items = asked("BLINK-full", folder)
    path = tmp_path / "BLINK-full_result_mine_reasoning.json"
    write_result(path, answered("BLINK-full", items, lambda item: item.answer))
    right = BLINK_LINE | {"filtered_resps": "B", "blink_acc": BLINK_LINE["blink_acc"] | {"is_correct": True}}
    wrong = BLINK_LINE | {"filtered_resps": "A"}
    logs = [
        log(tmp_path / f"{model}/20260101_120000_samples_blink.jsonl", *lines)
        for model, lines in {"one": [BLINK_LINE, right, wrong], "two": [right, right, right]}.items()
    ]

    def compare(*paths: Path) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["", *map(str, paths), "--chart", str(tmp_path / "chart.svg")])
        load_script(REPO_ROOT / "scripts/compare.py").main()
        return capsys.readouterr().out.splitlines()

    out = compare(*logs)
    theirs = next(line for line in out if line.startswith(f"| {THEIRS}"))
    assert [cell.split()[0] for cell in theirs.split("|")[2:4]] == ["33.33", "100.00"]
    totals = [line.split("|")[-2].split()[0] for line in out if line.startswith(("| one |", "| two |"))][:2]
    assert totals == ["66.67", "100.00"]
    assert any(line.startswith("| two | +33.33 (") for line in out)
    out = compare(path, logs[0])
    cells = {line.split("|")[1].strip(): line for line in out if line.startswith("| ")}
    assert "100.00 (" in cells["BLINK-full: BLINK"] and "66.67 (" in cells["blink: Total"]
    assert "33.33 (" in cells[f"blink: {THEIRS}"]


def test_the_command_exports(arguments, folder, tmp_path):
    """Of a run, of a run that is there already, and of a saved result, which knows no prompts."""
    arguments[arguments.index("easi-8")] = "EmbSpatial"
    arguments[arguments.index("--dataset_path") + 1] = str(folder / "EmbSpatial")
    for _ in range(2):
        evaluation.run(SCRIPT.parse_args([*arguments, "--export", "lmms-eval"]))
        (exported,) = (tmp_path / "results").glob("*_samples_embspatial.jsonl")
        assert json.loads(exported.read_text().splitlines()[2])["input"] == asked("EmbSpatial", folder)[2].prompt
        exported.unlink()
    (path,) = (tmp_path / "results").glob("*.json")
    options = ["--precomputed_json", path, "--output_dir", tmp_path / "again", "--export", "lmms-eval"]
    evaluation.run(SCRIPT.parse_args(list(map(str, options))))
    (exported,) = (tmp_path / "again").glob("*.jsonl")
    assert read_samples(exported)["scores"]["Total"] == read_scored(path)["scores"]["Total"]
