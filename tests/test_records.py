"""A data set in any form that people have becomes the same rows; a mistake in it is one line with file and row."""

import base64
import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_r1.base.images import TOO_LARGE, open_image
from open_r1.base.prompts import sat_question
from open_r1.models.families.qwen import QWEN_TOKENS
from open_r1.models.loading import load_processor
from open_r1.rewards import check_gold
from open_r1.running.data import DataArguments, load_dataset, load_datasets_from_args
from open_r1.sft import check_answer
from open_r1.tasks.examples import Columns, read_examples

sys.path.insert(0, str(Path(__file__).parent))

COLOURS = ["red", "lime", "blue"]
OPTIONS = ["red", "lime", "blue"]


def picture(colour: str, size: tuple[int, int] = (56, 84)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of many pixels, one bit each, in a few kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


def question(colour: str) -> str:
    return f"Is {colour} the colour?"


def dialogues(form: str) -> list[dict]:
    """Three records in ShareGPT's or LLaMA-Factory's form, with paths."""
    records = []
    for colour in COLOURS:
        user, answer = f"<image>\n{question(colour)}", colour
        if form == "conversations":
            dialogue = [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]
        else:
            dialogue = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        records.append({form: dialogue, "images": [f"pictures/{colour}.png"], "options": OPTIONS, "box": [1, 2]})
    return records


def table() -> datasets.Dataset:
    """Three rows as the Hub has them: an Image column, and columns of the data set's own names."""
    rows = {
        "query": [question(colour) for colour in COLOURS],
        "label": COLOURS,
        "picture": [{"bytes": picture(colour), "path": None} for colour in COLOURS],
        "choices": [OPTIONS] * 3,
        "box": [[1, 2]] * 3,
    }
    return datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())


TABLE_COLUMNS = Columns("query", "label", "picture", None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for colour in COLOURS:
        (tmp_path / f"pictures/{colour}.png").write_bytes(picture(colour))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def make_lines(folder: Path, name: str = "a.jsonl") -> Path:
    (folder / name).write_text("\n".join(json.dumps(record) for record in dialogues("messages")) + "\n\n")
    return folder / name


def make_json(folder: Path, form: str = "messages", name: str = "a.json") -> Path:
    (folder / name).write_text(json.dumps(dialogues(form)))
    return folder / name


def make_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(dialogues("messages")), folder / "a.parquet")
    return folder / "a.parquet"


def make_parquet_with_images(folder: Path) -> Path:
    (folder / "plain").mkdir()
    table().to_parquet(folder / "plain/train-00000-of-00001.parquet")
    return folder / "plain/train-00000-of-00001.parquet"


def make_saved(folder: Path) -> Path:
    table().save_to_disk(folder / "saved")
    return folder / "saved"


def make_saved_splits(folder: Path) -> Path:
    datasets.DatasetDict(train=table(), test=table().select([0])).save_to_disk(folder / "splits")
    return folder / "splits"


def make_table(folder: Path, delimiter: str, name: str) -> Path:
    with (folder / name).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["question", "answer", "image", "box"])
        writer.writerows([question(colour), colour, f"pictures/{colour}.png", "[1, 2]"] for colour in COLOURS)
    return folder / name


def make_table_of_images(folder: Path) -> Path:
    """A TSV as benchmarks have it, with the images themselves in base64."""
    path = folder / "images.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["question", "answer", "images", "box"])
        encoded = [base64.b64encode(picture(colour)).decode() for colour in COLOURS]
        rows = zip(COLOURS, encoded, strict=True)
        writer.writerows([question(colour), colour, image, "[1, 2]"] for colour, image in rows)
    return path


def make_arrow(folder: Path) -> Path:
    """A file of another suffix that `datasets` reads."""
    with pa.OSFile(str(folder / "rows [1].arrow"), "wb") as file:
        rows = pa.Table.from_pylist(dialogues("messages"))
        with pa.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows)
    return folder / "rows [1].arrow"


def make_compressed(folder: Path) -> Path:
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in dialogues("messages"))
    return folder / "a.jsonl.gz"


MAKERS = {
    "JSON": make_json,
    "JSON Lines": make_lines,
    "JSON Lines named JSON": lambda folder: make_lines(folder, "lines.json"),
    "LLaMA-Factory": lambda folder: make_json(folder, "conversations"),
    "parquet": make_parquet,
    "Arrow": make_arrow,
    "JSON under another name": lambda folder: make_json(folder, name="a.json.bak"),
    "compressed JSON Lines": make_compressed,
    "CSV": lambda folder: make_table(folder, ",", "a.csv"),
    "TSV": lambda folder: make_table(folder, "\t", "a.tsv"),
    "TSV of base64": make_table_of_images,
    "parquet with images": make_parquet_with_images,
    "folder of parquet": lambda folder: make_parquet_with_images(folder).parent,
    "saved by datasets": make_saved,
    "saved by datasets, with splits": make_saved_splits,
}


def check_rows(rows: datasets.Dataset, box: object = (1, 2)) -> None:
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": question(c)}] for c in COLOURS]
    assert [row["solution"] for row in rows] == COLOURS
    assert [row["box"] for row in rows] == [list(box) if isinstance(box, tuple) else box] * 3
    for row, colour in zip(rows, COLOURS, strict=True):
        (image,) = row["images"]
        assert open_image(image).tobytes() == Image.new("RGB", (56, 84), colour).tobytes()


@pytest.mark.parametrize("name", MAKERS)
def test_every_form_gives_the_same_rows(name, folder, tiny_model):
    source = MAKERS[name](folder)
    columns = TABLE_COLUMNS if "images" in name or "saved" in name or "folder" in name else None
    box = "[1, 2]" if name.startswith(("CSV", "TSV")) else [1, 2]
    check_rows(load_dataset(source, load_processor(tiny_model), columns=columns), box)


@pytest.mark.slow
def test_a_set_on_the_hub_by_its_columns(folder, tiny_model):
    """As typed: `--dataset_name ID --dataset_train_split ... --question_column ...`, in a process of its own."""
    import os
    import subprocess

    from hub import serve

    repository = folder / "repository"
    repository.mkdir()
    table().to_parquet(repository / "train.parquet")
    table().select([1]).to_parquet(repository / "test.parquet")
    command = f"""
from transformers import HfArgumentParser
from open_r1.running.data import DataArguments, load_datasets_from_args
from open_r1.models.loading import load_processor
(args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses()
train, test = load_datasets_from_args(args, load_processor({str(tiny_model)!r}), {{}})
print("ROWS", [*train["solution"]], [*test["solution"]], train[2]["prompt"][0]["content"], train[0]["choices"])
"""
    with serve({"datasets/someone/colours": repository}) as hub:
        arguments = "--dataset_name someone/colours --eval_dataset_name someone/colours --question_column query "
        arguments += "--answer_column label --image_column picture --options_column choices"
        done = subprocess.run(
            [sys.executable, "-c", command, *arguments.split()],
            env={**os.environ, **hub.environment(folder / "home")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        asked = sat_question(question("blue"), OPTIONS)
        assert f"ROWS {COLOURS} ['lime'] {asked} {OPTIONS}" in done.stdout
        missing = subprocess.run(
            [sys.executable, "-c", "from open_r1.tasks.examples import *; read_examples('someone/nothing')"],
            env={**os.environ, **hub.environment(folder / "home")},
            capture_output=True,
            text=True,
        )
    assert "someone/nothing: cannot be read as a data set: " in missing.stderr.splitlines()[-1]


def test_fields_reach_the_rows_as_they_are(folder, tiny_model):
    """Rewards take them as keyword lists; mixed kinds and absent ones too."""
    fields = [
        {"box": [1, 2], "info": {"a": 1}},
        {"box": None, "info": {"b": ["x", 2]}, "level": "hard"},
        {"info": None},
    ]
    records = [record | extra for record, extra in zip(dialogues("messages"), fields, strict=True)]
    del records[2]["box"]
    (folder / "a.json").write_text(json.dumps(records))
    # a field that the first record lacks, like `level`, is the file's too
    rows = load_dataset(folder / "a.json", load_processor(tiny_model))
    assert [row["info"] for row in rows] == [{"a": 1}, {"b": ["x", 2]}, None]
    assert [row["box"] for row in rows] == [[1, 2], None, None]
    assert [row["level"] for row in rows] == [None, "hard", None]


def test_null_is_absent(folder, tiny_model):
    record = {"messages": dialogues("messages")[0]["messages"][:1], "images": None, "options": None}
    record |= {"question_type": None, "solution": None}
    record["messages"] = [{"role": "user", "content": "What?"}]
    (folder / "a.json").write_text(json.dumps([record]))
    (row,) = load_dataset(folder / "a.json", load_processor(tiny_model))
    assert (row["images"], row["options"], row["solution"], row["question_type"]) == ([], [], None, "")


@pytest.mark.parametrize("in_place", [True, False])
def test_a_system_message_and_images_with_bytes(in_place, folder, tiny_model):
    """As parts, as `datasets` keeps them: with the image in its part, or beside the message as TRL has it."""
    url = "data:image/png;base64," + base64.b64encode(picture("red")).decode()
    content = [{"type": "image", "image": url, "text": None}, {"type": "text", "text": "What?", "image": None}]
    system = [{"type": "text", "text": "Be ", "image": None}, {"type": "text", "text": "brief."}]
    record = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": content}]}
    if not in_place:
        record["images"] = [url]
        content[0]["image"] = None
    (folder / "a.json").write_text(json.dumps([record]))
    (row,) = load_dataset(folder / "a.json", load_processor(tiny_model, chat_template="instruct"))
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    assert Path(row["images"][0]).read_bytes() == picture("red")  # unchanged: neither decoded nor resized


@pytest.mark.parametrize("place", ["question", "answer", "system"])
def test_a_text_never_becomes_a_control_token(place, folder, tiny_model):
    """What is kept has no other control tokens than those of the template."""
    records = []
    for token in QWEN_TOKENS:
        (record, *_) = dialogues("messages")
        roles = ["question", "answer"]
        if place == "system":
            roles.insert(0, "system")
            record["messages"].insert(0, {"role": "system", "content": "Be brief."})
        record["messages"][roles.index(place)]["content"] += f" a {token} b"
        records.append(record)
    (folder / "a.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=f"no example left; left out {len(QWEN_TOKENS)} with a control token of the"):
        load_dataset(folder / "a.json", load_processor(tiny_model))


def test_an_answer_that_is_too_long_is_left_out(folder, tiny_model, capsys):
    records = dialogues("messages")
    records[1]["messages"][1]["content"] = "x " * 500_000
    (folder / "a.json").write_text(json.dumps(records))
    processor = load_processor(tiny_model)
    assert len(load_dataset(folder / "a.json", processor)) == 3
    assert load_dataset(folder / "a.json", processor, max_answer_length=2048)["solution"] == ["red", "blue"]
    assert "left out 1 with an answer over 2048 tokens (max_answer_length)" in capsys.readouterr().out


def test_half_a_character_is_replaced(folder, tiny_model):
    """JSON can hold the half of a pair; a tokenizer, a table and a file cannot."""
    records = dialogues("messages")
    records[0]["messages"][0]["content"] = "<image>half \ud83d and whole \ud83d\ude00"
    records[0] |= {"note \udc00": [{"a": "\udfff"}]}
    (folder / "a.json").write_text(json.dumps(records))
    row = load_dataset(folder / "a.json", load_processor(tiny_model))[0]
    assert row["prompt"][0]["content"] == "half \ufffd and whole \U0001f600"
    assert row["note \ufffd"] == [{"a": "\ufffd"}]


def damaged(content: bytes):
    def make(folder: Path, records: list[dict]) -> None:
        (folder / "pictures/bad.png").write_bytes(content)
        records[1]["images"] = ["pictures/bad.png"]

    return make


def changed(**fields: object):
    def make(folder: Path, records: list[dict]) -> None:
        records[1] |= fields

    return make


MISTAKES = {
    "cut image": (damaged(picture("red")[:-60]), "pictures/bad.png: corrupt image"),
    "folder": (changed(images=["pictures"]), "no image .*pictures, that is a folder"),
    "bomb": (damaged(bomb(13_000)), f"pictures/bad.png: {TOO_LARGE}"),
    "device": (changed(images=["/dev/zero"]), "no image /dev/zero"),
    "base64 of nothing": (changed(images=["data:image"]), "corrupt image"),
    "base64 of letters": (changed(images=["data:image/png;base64,\u00e9"]), "not an image in base64"),
    "URL of no file": (changed(images=["file://[::1/x.png"]), "not a URL of a file"),
    "path of no text": (changed(images=[{"path": 5}]), "expected its encoded bytes or a path"),
    "bytes of a number": (changed(images=[{"bytes": 5}]), "expected its encoded bytes or a path"),
    "long name": (changed(images=["x" * 5000]), "no image .*x"),
    "NaN": (changed(messages=None, question="a?", answer=float("nan")), "answer: expected a text or a finite number"),
    "true": (changed(messages=None, question="a?", answer=True), "answer: expected a text or .*, not True"),
    "gold": (changed(options=["cyan", "pink"]), "lime"),
    "no answer": (changed(messages=[{"role": "user", "content": "<image>What?"}]), "no answer"),
    "name": (changed(completions=[1]), "the field completions has a name"),
    "form": (changed(messages=None), "no messages, conversations, prompt or question; it has .*--question_column"),
    "turns": (changed(messages=[{"role": "assistant", "content": "a"}]), "expected one user and one assistant"),
    "system": (changed(messages=[{"role": "system", "content": 5}]), "expected a system message with text"),
    "options": (changed(options="red, lime"), "options: expected a list of strings"),
    "no question": (changed(messages=[{"role": "user", "content": "<image> \n"}]), "the question is empty"),
    "empty answer": (
        changed(messages=[{"role": "user", "content": "<image>a?"}, {"role": "assistant", "content": " "}]),
        "the answer is empty",
    ),
    "places for images": (
        changed(messages=[{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]),
        r'messages: 2 parts {"type": "image"} for 1 images; expected one an image',
    ),
    "mark in the question": (changed(messages=[{"role": "user", "content": "<image>a <image>?"}]), "2 <image> marks"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_file_and_row(name, folder, tiny_model):
    records = dialogues("messages")
    MISTAKES[name][0](folder, records)
    path = folder / "a.json"
    path.write_text(json.dumps(records))
    with pytest.raises((OSError, ValueError), match=MISTAKES[name][1]) as caught:
        load_dataset(path, load_processor(tiny_model), checks=[check_gold])
    assert str(caught.value).startswith(f"{path}: row 1: ") and "\n" not in str(caught.value)


def test_sft_needs_an_answer(folder, tiny_model):
    (folder / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "What?"}]}))
    assert read_examples(folder / "a.jsonl")[0]["solution"] is None
    with pytest.raises(ValueError, match="row 0: no answer to train on"):
        load_dataset(folder / "a.jsonl", load_processor(tiny_model), checks=[check_answer])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"question": "a"}\n{"quest', "a.jsonl: line 2: not JSON"),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "a.json: not a JSON file"),
        ("a.json", b'[{"question": "a?", "deep": ' + b"[" * 800 + b"]" * 800 + b"}]", "row 0: nested too deeply"),
        ("a.jsonl", b"", "at least one record"),
        ("a.parquet", b"PAR1", "not a parquet file"),
        ("a.csv", b"question,answer\na?,b,c\n", r"a\.csv: line 2: not as many cells as names in the first line \(2\)"),
        ("a.csv", b'question,answer\na?,"b\n', r"a\.csv: not a table behind line 1: unexpected end of data"),
        ("a.csv", b"question,answer\n\xff\xfe,b\n", r"a\.csv: not in UTF-8 behind line 0 \(.*save it as UTF-8"),
        ("a.csv", "question,answer\na?,b\n".encode("utf-16"), r"a\.csv: not in UTF-8 behind line 0 \("),
        ("a.csv", b"question;answer\na?;b\n", r"a\.csv: line 1: ';' between the names; in a \.csv file it is ','"),
        ("a.tsv", b"question,answer\na?,b, c\n", r"a\.tsv: line 1: ',' between the names; in a \.tsv file it is "),
        ("a.csv", b"answer,question,answer\n1,a?,2\n", r"a\.csv: line 1: answer is there twice; every column needs"),
        ("a.xyz", b"question\tanswer\na?\n", r"a\.xyz: cannot be read as a data set: Unable to find .* \.\.\.$"),
    ],
)
def test_files_that_are_none(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((OSError, ValueError), match=message) as caught:
        read_examples(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_cells_of_a_table_are_texts_and_empty_ones_are_null(tmp_path):
    """Also those that pandas takes for numbers, dates or nothing, and those of the length of an image in base64."""
    answers = ["None", "NA", "007", "1e3", "", " left, right ", "two\nlines", "null", "x" * 200_000]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], *(["What?", answer] for answer in answers)])
    assert [row["solution"] for row in read_examples(tmp_path / "a.csv")] == [answer or None for answer in answers]


@pytest.mark.parametrize(
    "name, message",
    [
        ("./trian.csv", r"^trian\.csv: no such file; did you mean train\.csv\?$"),
        ("data/trian.jsonl", r"^data/trian\.jsonl: no such file; did you mean data/train\.jsonl\?$"),
        ("loop.csv", r"^loop\.csv: no such file$"),
        ("elsewhere/rows.json", r"^elsewhere/rows\.json: no such file$"),
        ("SAT_static.json", r"^SAT_static\.json: no such file; make it with src/data/SAT/prepare_dataset\.sh$"),
        ("/no/such/folder", r"^/no/such/folder: no such file$"),
        ("train.csv,data/train.jsonl", r"^train\.csv,data/train\.jsonl: no such file; several data sets .*YAML"),
        ("train.csv data/train.jsonl", r"^train\.csv data/train\.jsonl: no such file; several data sets .*YAML"),
        ("data/*.jsonl", r"^data/\*\.jsonl: no such file; several data sets are named in a YAML file \("),
    ],
)
def test_a_file_that_is_not_there_is_looked_for_in_its_folder(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    for there in ("train.csv", "data/train.jsonl"):
        (tmp_path / there).write_text("")
    with pytest.raises(FileNotFoundError, match=message):
        read_examples(name)


@pytest.mark.parametrize("name", ["array/SAT", "someone/my.set", "squad"])
def test_a_name_on_the_hub_is_asked_for_there(name, tmp_path, monkeypatch):
    class AskedError(Exception):
        """The Hub was asked."""

    def ask(name, *args, **kwargs):
        raise AskedError(name)

    monkeypatch.setattr("datasets.load_dataset", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "array").mkdir()
    with pytest.raises(AskedError, match=f"^{re.escape(name)}$"):
        read_examples(name)


def test_columns_that_are_not_there(folder):
    make_saved(folder)
    for columns, field in [(Columns("text"), "text"), (Columns("query", "gold"), "gold")]:
        with pytest.raises(ValueError, match=f"row 0: no field {field}; it has query, label, picture"):
            read_examples(folder / "saved", columns)
    with pytest.raises(ValueError, match=r"no messages, .*; it has query, label, picture, choices, box"):
        read_examples(folder / "saved")
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        read_examples(make_saved_splits(folder), split="dev")
    assert [row["images"][0]["bytes"] for row in read_examples(folder / "saved", TABLE_COLUMNS)] == [
        picture(colour) for colour in COLOURS
    ]


def test_the_columns_are_settings_of_a_recipe(folder, tiny_model):
    arguments = DataArguments(str(make_saved_splits(folder)), question_column="query", answer_column="label")
    arguments.image_column, arguments.eval_dataset_name = "picture", arguments.dataset_name
    train, held_out = load_datasets_from_args(arguments, load_processor(tiny_model), {})
    check_rows(train)
    assert held_out["solution"] == ["red"]
