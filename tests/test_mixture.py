"""Several data sets as one, and SAT's dynamic questions with two images in it: which rows, in which order, trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from open_r1.base.errors import REPO_ROOT
from open_r1.models.loading import load_processor
from open_r1.reporting.runs import KnownImages, read_run
from open_r1.running.data import DataArguments, load_dataset, load_datasets_from_args
from open_r1.tasks.examples import Columns
from open_r1.tasks.mixture import iter_mixture, parts_of, rows_of_each
from open_r1.world.parquet import write_sat
from open_r1.world.scene import LEVELS
from support import make_trainer, read_jsonl, run_grpo, write_examples


def write_mixture(path: Path, *entries: str) -> Path:
    """A mixture of entries like `path: a.json, fraction: 1`."""
    path.write_text("datasets:\n" + "".join(f"- {{{entry}}}\n" for entry in entries))
    return path


def write_questions(path: Path, count: int, **fields: object) -> Path:
    """Rows without images, with columns of their own."""
    rows = [{"ask": f"How many is {row}?", "say": str(row), **fields} for row in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


SPLITS = ("train", "test", "val")
COLUMNS = "question_column: ask, answer_column: say"


# --- which rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, fractions, expected",
    [
        ([100, 50], [3, 1], [100, 33]),
        ([10, 1000, 1000], [1, 1, 2], [10, 10, 20]),
        ([7], [0.3], [7]),
    ],
)
def test_shares_are_as_asked_and_no_row_is_taken_twice(sizes, fractions, expected):
    assert rows_of_each(sizes, fractions) == expected


def test_a_mixture_is_the_first_rows_of_its_sets(tmp_path, tiny_model):
    write_examples(tmp_path / "pictures", 8)
    write_questions(tmp_path / "text.jsonl", 6, level=3)
    mixture = write_mixture(
        tmp_path / "mixture.yaml",
        "path: pictures/examples.json, fraction: 2",
        f"path: text.jsonl, fraction: 1, {COLUMNS}",
    )
    processor = load_processor(tiny_model, chat_template="base", max_pixels=12544)
    data = load_dataset(mixture, processor)
    assert [row["solution"] for row in data] == [
        *(row["solution"] for row in load_dataset(tmp_path / "pictures/examples.json", processor)),
        *("0", "1", "2", "3"),
    ]
    assert [len(row["images"]) for row in data] == [1] * 8 + [0] * 4
    assert [row["level"] for row in data] == [None] * 8 + [3] * 4
    assert data.to_list() == load_dataset(mixture, processor, has_begun=True).to_list()


def test_without_fractions_all_rows_are_taken(tmp_path):
    write_examples(tmp_path / "pictures", 3)
    write_questions(tmp_path / "text.jsonl", 5)
    parts = parts_of(write_mixture(tmp_path / "m.yml", "path: pictures/examples.json", f"path: text.jsonl, {COLUMNS}"))
    found = [(Path(origin).name, row) for origin, row, *_ in iter_mixture(parts)]
    assert found == [("examples.json", row) for row in range(3)] + [("text.jsonl", row) for row in range(5)]


def test_a_set_takes_from_the_recipe_what_it_does_not_say_itself(tmp_path):
    file = write_mixture(tmp_path / "m.yaml", "path: array/SAT", "path: a/b, name: x, split: val, answer_column: say")
    first, second = parts_of(file, Columns(question="ask"), "default", "train")
    assert (first.path, first.name, first.split, first.columns) == ("array/SAT", "default", "train", Columns("ask"))
    assert (second.path, second.name, second.split, second.columns) == ("a/b", "x", "val", Columns("ask", "say"))


def test_a_held_out_mixture_reads_the_held_out_split(tmp_path, tiny_model):
    """The recipe's splits are those of each set that names none."""
    for name in ("a", "b"):
        splits = {split: Dataset.from_list([{"ask": "Which?", "say": f"{name} {split}"}]) for split in SPLITS}
        DatasetDict(splits).save_to_disk(tmp_path / name)
    mixture = write_mixture(tmp_path / "m.yaml", f"path: a, {COLUMNS}", f"path: b, {COLUMNS}, split: val")
    arguments = DataArguments(str(mixture), eval_dataset_name=str(mixture))
    processor = load_processor(tiny_model, chat_template="base")
    train, held_out = load_datasets_from_args(arguments, processor, {})
    assert (train["solution"], held_out["solution"]) == (["a train", "b val"], ["a test", "b val"])


MIXED = "datasets: [{path: a.jsonl, fraction: 1}, {path: a.jsonl}]"
NONE_TAKEN = "datasets: [{path: a.jsonl, fraction: 1}, {path: long.jsonl, fraction: 1.0e-3}]"
MISTAKES = {
    "datasets: [{path: a.jsonl, fraction: .nan}]": "{file}: datasets 1: fraction nan: expected a number above 0",
    "datasets: [{path: a.jsonl, fraction: true}]": "{file}: datasets 1: fraction True: expected a number above",
    MIXED: "{file}: fraction: give it for each of the datasets or for none",
    "datasets: [{path: a.jsonl}, {path: no.json}]": "{file}: datasets 2: path: no file or folder {folder}/no.json",
    "datasets: [{path: a.josnl}]": (
        "{file}: datasets 1: path: no file or folder {folder}/a.josnl; did you mean {folder}/a.jsonl?"
    ),
    "datasets: [{path: 5}]": "{file}: datasets 1: path: expected a text, not 5",
    "datasets: [{fraction: 1}]": "{file}: datasets 1: expected path and fraction of a data set",
    "datasets: [{path: a.jsonl, weight: 1}]": "{file}: datasets 1: unknown 'weight'; known are path, name, split",
    "datasets: [{path: a.jsonl}]\nstreaming: true": "{file}: expected datasets, a list with path and fraction of each",
    "datasets: [": "{file}: not YAML (while parsing a flow",
    "datasets: [{path: a.jsonl, path: b.jsonl}]": "{file}: not YAML (path is there twice in ",
    NONE_TAKEN: "{folder}/long.jsonl: fraction 0.001 takes none of its 40 rows",
    "datasets: [{path: a.jsonl}]": "{folder}/a.jsonl: row 0: no messages, conversations, prompt or question",
}


@pytest.mark.parametrize(
    "text, message",
    MISTAKES.items(),
    ids=str,
)
def test_what_is_no_mixture_is_one_line(tmp_path, text, message):
    write_questions(tmp_path / "a.jsonl", 4)
    write_questions(tmp_path / "long.jsonl", 40)
    file = tmp_path / "mixture.yaml"
    file.write_text(text)
    with pytest.raises((OSError, ValueError)) as told:
        list(iter_mixture(parts_of(file)))
    assert str(told.value).startswith(message.format(file=file, folder=tmp_path)) and "\n" not in str(told.value)


def test_a_wrong_row_is_named_with_its_own_set(tmp_path, tiny_model):
    write_examples(tmp_path / "pictures", 4)
    write_questions(tmp_path / "text.jsonl", 2)
    (tmp_path / "pictures/images/3_0.png").write_bytes(b"no picture")
    entries = f"path: text.jsonl, {COLUMNS}", "path: pictures/examples.json"
    processor = load_processor(tiny_model, chat_template="base")
    with pytest.raises(ValueError, match=r"pictures/examples\.json: row 3: .*3_0\.png"):
        load_dataset(write_mixture(tmp_path / "m.yaml", *entries), processor)


def test_a_report_shows_the_images_of_all_sets(tmp_path):
    paths = [write_examples(tmp_path / name, 2).parent / "images/1_0.png" for name in ("a", "b", "private")]
    mixture = write_mixture(tmp_path / "m.yaml", "path: a/examples.json", "path: b/examples.json")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps({"dataset": str(mixture)}))
    known = KnownImages(read_run(tmp_path / "run"))
    assert [str(path) in known for path in paths] == [True, True, False]


# --- trained ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_goes_on_asks_what_it_would_have_asked(tmp_path, tiny_model):
    write_examples(tmp_path / "one", 6)
    write_examples(tmp_path / "two", 6, images_per_example=2)
    data = write_mixture(
        tmp_path / "m.yaml", "path: one/examples.json, fraction: 1", "path: two/examples.json, fraction: 2"
    )
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tiny_model, data, tmp_path / "whole", **settings).train()
    make_trainer(tiny_model, data, tmp_path / "broken", **settings | {"max_steps": 2}).train()
    resumed = make_trainer(tiny_model, data, tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken/checkpoint-2"))
    asked = [
        [(row["step"], row["prompt"], row["images"]) for row in read_jsonl(tmp_path / run / "trajectories/train.jsonl")]
        for run in ("whole", "broken")
    ]
    assert asked[0] == asked[1] and {len(images) for _, _, images in asked[0]} == {1, 2}


@pytest.mark.distributed
def test_dynamic_questions_are_prepared_and_trained_in_a_mixture(tmp_path, tiny_model, quick_python):
    """Two-image rows through prepare_dataset.sh, mixed with static ones, two steps through run_grpo_SAT.sh."""
    for name, questions in (("dynamic", ["rotation"]), ("static", ["count", "left"])):
        write_sat(tmp_path / f"{name}.parquet", 12, 0, LEVELS["easy"], questions)
        options = ["--total_num", "all", "--multi_image", "keep", "--output_dir", tmp_path / name]
        done = subprocess.run(
            ["sh", REPO_ROOT / "src/data/SAT/prepare_dataset.sh", *options],
            env={**os.environ, "PYTHON": sys.executable, "SAT_PARQUET": str(tmp_path / f"{name}.parquet")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "dynamic/SAT_train_all.json").read_text())
    assert all(len(record["images"]) == 2 and record["question_type"] == "action_sequence" for record in records)
    first, second = (tmp_path / "dynamic" / name for name in records[0]["images"])
    assert Image.open(first).tobytes() != Image.open(second).tobytes()
    data = write_mixture(
        tmp_path / "mixture.yaml",
        "path: dynamic/SAT_train_all.json, fraction: 0.6",
        "path: static/SAT_train_all.json, fraction: 0.4",
    )
    env = {"ACCELERATE_CONFIG": "cpu", "OMP_NUM_THREADS": "1", "PYTHON": str(quick_python)}
    arguments = ["--max_steps", "2", "--reward_funcs", "support:vowel_share", "--save_steps", "2"]
    arguments += ["--max_prompt_length", "1024"]  # the tiny tokenizer takes most words letter by letter
    result = run_grpo(tiny_model, data, tmp_path / "out", *arguments, **env)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_jsonl(tmp_path / "out/trajectories/train.jsonl")
    assert {row["step"] for row in rows} == {1, 2} and {len(row["images"]) for row in rows} == {1, 2}
    known = KnownImages(read_run(tmp_path / "out"))
    assert all(image in known for row in rows for image in row["images"])
