"""SAT parquet in, ShareGPT JSON and untouched images out; bad input gives a stated skip or one clear line."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.base.prompts import sat_question
from open_r1.tasks import sat
from open_r1.tasks.examples import read_examples
from open_r1.world.parquet import SAT_SCHEMA
from support import load_script

SCRIPT = REPO_ROOT / "src" / "data" / "SAT" / "process_dataset.py"
SHELL_SCRIPT = SCRIPT.with_name("prepare_dataset.sh")


def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(seed: int = 0, size: tuple[int, int] = (48, 32), mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, np.uint8)).convert(mode)


def jpeg_with_thumbnail() -> bytes:
    """A JPEG whose EXIF block holds another whole JPEG, end marker included."""
    thumbnail = encode(photo(1, (16, 16)))
    header = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08"
    ifd0 = struct.pack(">HI", 0, 14)  # no entries; the next directory is at 14
    entries = [(0x0103, 3, 1, 6 << 16), (0x0201, 4, 1, 14 + 2 + 3 * 12 + 4), (0x0202, 4, 1, len(thumbnail))]
    ifd1 = struct.pack(">H", 3) + b"".join(struct.pack(">HHII", *entry) for entry in entries) + struct.pack(">I", 0)
    payload = header + ifd0 + ifd1 + thumbnail
    picture = encode(photo(2))
    data = picture[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + picture[2:]
    assert data.count(b"\xff\xd8\xff") == 2
    return data


JPEG = encode(photo())
PNG16 = encode(Image.fromarray(np.arange(0, 65536, 64, np.uint16).reshape(32, 32)), "PNG")


def row(**changes) -> dict:
    base = {
        "image_bytes": [JPEG],
        "question": "Is the lamp to the left of the sofa?",
        "answers": ["yes", "no"],
        "question_type": "other",
        "correct_answer": "no",
    }
    return base | changes


def as_structs(images: list[bytes] | None) -> list[dict] | None:
    return images and [{"bytes": data, "path": "a.png"} for data in images]


def write_parquet(path: Path, rows: list[dict], structs: bool = False, **options) -> Path:
    schema = SAT_SCHEMA
    if structs:
        image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = schema.set(0, pa.field("image_bytes", pa.list_(image_type)))
        rows = [{**row, "image_bytes": as_structs(row["image_bytes"])} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **options)
    return path


def command(parquet: Path, output: Path, *options: object) -> list[str]:
    base = [sys.executable, SCRIPT, "--parquet", parquet, "--output_dir", output, *options]
    return [str(part) for part in base]


def prepare(parquet: Path, output: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(parquet, output, *options), capture_output=True, text=True)


@pytest.fixture
def prepare_here(monkeypatch) -> Callable[..., None]:
    """The command in this process: what it raises comes here."""
    script = load_script(SCRIPT)

    def run(parquet: Path, output: Path, *options: object) -> None:
        monkeypatch.setattr(sys, "argv", command(parquet, output, *options)[1:])
        script.main()

    return run


def counts(output: Path, name: str) -> dict:
    return json.loads((output / f"{name}.info.json").read_text())["counts"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- one row ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (jpeg_with_thumbnail(), "jpg"),
        (encode(photo(mode="CMYK")), "jpg"),
        (encode(photo(mode="P"), "PNG"), "png"),
        (PNG16, "png"),
        (encode(photo(), "WEBP"), "webp"),
        (encode(photo(), "TIFF"), "tif"),
        (encode(photo(size=(200, 1)), "PNG"), "png"),
        (encode(photo(size=(201, 1)), "PNG"), sat.Skip.TOO_LONG),
        (encode(Image.new("1", (8193, 8193)), "PNG"), sat.Skip.TOO_LARGE),
        (JPEG[: len(JPEG) // 2], sat.Skip.CORRUPT),
        (encode(photo(), "PNG")[:-40], sat.Skip.CORRUPT),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", sat.Skip.CORRUPT),
    ],
)
def test_images_get_their_true_extension_or_a_reason(data, expected):
    converted = sat.convert_row(row(image_bytes=[data]), 0, seed=0)
    found = converted if isinstance(converted, sat.Skip) else converted.images
    assert found == (expected if isinstance(expected, sat.Skip) else ((data, expected),))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": " "}, sat.Skip.NULL),
        ({"correct_answer": None}, sat.Skip.NULL),
        ({"answers": None}, sat.Skip.NULL),
        ({"answers": ["yes", None]}, sat.Skip.NULL),
        ({"question_type": "goal_aim"}, sat.Skip.TYPE),
        ({"image_bytes": None}, sat.Skip.NO_IMAGE),
        ({"image_bytes": [b""]}, sat.Skip.NO_IMAGE),
        ({"image_bytes": [{"bytes": None, "path": "elsewhere.jpg"}]}, sat.Skip.NO_IMAGE),
        ({"image_bytes": [JPEG, JPEG]}, sat.Skip.SEVERAL_IMAGES),
        ({"answers": ["no", "no"]}, sat.Skip.FEW_OPTIONS),
        ({"answers": ["no", "No ", "yes"]}, sat.Skip.ALIKE_OPTIONS),
        ({"correct_answer": "maybe"}, sat.Skip.NOT_AN_OPTION),
        ({"question": "What is in <image>?"}, sat.Skip.MARK),
        ({"answers": ["no", "<|image_pad|>"]}, sat.Skip.MARK),
    ],
)
def test_rows_are_skipped_for_a_stated_reason(changes, reason):
    assert sat.convert_row(row(**changes), 0, seed=0, question_types=["other"]) is reason


def test_options_with_commas_and_other_scripts_stay_whole_and_repeated_ones_are_merged():
    options = ["left, then right", "à gauche", "左边", "“quoted” \u2028 line"]
    example = sat.convert_row(row(answers=[*options, "左边"], correct_answer="左边"), 3, seed=0)
    assert sorted(example.options) == sorted(options) and example.answer == "左边"


def test_the_order_of_options_follows_seed_and_row_alone():
    options = [str(i) for i in range(6)]
    orders = [sat.shuffled(options, 42, i) for i in range(50)]
    assert len(set(orders)) > 40
    assert orders[7] == sat.shuffled(options, 42, 7) != sat.shuffled(options, 43, 7)
    assert sat.shuffled(options, 42, 0) == ("4", "2", "1", "5", "3", "0")  # the same in every Python and run


# --- whole files ------------------------------------------------------------------------------------

HOSTILE = [  # (row, why it is skipped or None, extension)
    (row(), None, "jpg"),
    (row(image_bytes=[jpeg_with_thumbnail()]), None, "jpg"),
    (row(image_bytes=[PNG16]), None, "png"),
    (row(answers=["up, then left", "nach außen", "內"], correct_answer="up, then left"), None, "jpg"),
    (row(image_bytes=[JPEG[:-300]]), "corrupt image", None),
    (row(image_bytes=[JPEG, JPEG]), "several images", None),
    (row(image_bytes=None), "no image", None),
    (row(question=None), "null or empty field", None),
    (row(answers=None), "null or empty field", None),
    (row(correct_answer="nowhere"), "correct answer not among the options", None),
]


@pytest.mark.parametrize("structs", [False, True], ids=["binary", "struct"])
def test_hostile_file(tmp_path, structs):
    rows = [r for r, _, _ in HOSTILE]
    parquet = write_parquet(tmp_path / "sat.parquet", rows, structs, row_group_size=10**6)
    done = prepare(parquet, tmp_path / "out", "--total_num", "all")
    assert done.returncode == 0, done.stderr

    records = json.loads((tmp_path / "out" / "SAT_train_all.json").read_text(encoding="utf-8"))
    kept = [(i, r, extension) for i, (r, reason, extension) in enumerate(HOSTILE) if reason is None]
    assert len(records) == len(kept)
    for record, (i, source, extension) in zip(records, kept, strict=True):
        assert record["images"] == [f"images/SAT_train_all/{i:06d}_0.{extension}"]
        assert (tmp_path / "out" / record["images"][0]).read_bytes() == source["image_bytes"][0]  # untouched
        assert record["messages"] == [
            {"role": "user", "content": "<image>" + sat_question(source["question"], record["options"])},
            {"role": "assistant", "content": source["correct_answer"]},
        ]
        assert sorted(record["options"]) == sorted(set(source["answers"]))
        assert record["question_type"] == "other"

    skipped = [reason for _, reason, _ in HOSTILE if reason]
    expected = {reason: skipped.count(reason) for reason in skipped}
    assert counts(tmp_path / "out", "SAT_train_all") == {"next_row": 10, "kept": len(kept), "skipped": expected}
    for reason, n in expected.items():
        assert any(line.split() == f"skipped: {reason} {n}".split() for line in done.stdout.splitlines())

    again = prepare(parquet, tmp_path / "out", "--total_num", "all")
    assert again.returncode == 0 and "nothing to do" in again.stdout and again.stderr == ""


def test_total_num_counts_kept_rows(tmp_path, prepare_here):
    rows = [row(image_bytes=[JPEG, JPEG]) if i % 2 else row() for i in range(40)]
    parquet = write_parquet(tmp_path / "sat.parquet", rows)
    prepare_here(parquet, tmp_path, "--total_num", 15)
    assert len(json.loads((tmp_path / "SAT_train_15.json").read_text())) == 15
    assert len(list((tmp_path / "images" / "SAT_train_15").iterdir())) == 15
    assert counts(tmp_path, "SAT_train_15") == {"next_row": 29, "kept": 15, "skipped": {"several images": 14}}


def test_several_images_and_question_types_are_kept_on_request(tmp_path, prepare_here):
    rows = [row(), row(image_bytes=[JPEG, PNG16], question_type="goal_aim"), row(question_type="perspective")]
    parquet = write_parquet(tmp_path / "sat.parquet", rows)
    prepare_here(parquet, tmp_path, "--fold", "test", "--multi_image", "keep", "--question_types", "goal_aim", "other")
    records = json.loads((tmp_path / "SAT_test_all.json").read_text())
    assert [len(record["images"]) for record in records] == [1, 2]
    assert records[1]["messages"][0]["content"].startswith("<image><image>Answer in")
    assert counts(tmp_path, "SAT_test_all")["skipped"] == {"question type not asked for": 1}
    images = read_examples(tmp_path / "SAT_test_all.json")[1]["images"]
    assert [Path(image).read_bytes() for image in images] == [JPEG, PNG16]


def test_one_clear_line_for_what_is_no_sat_file(tmp_path, prepare_here):
    good = write_parquet(tmp_path / "good.parquet", [row()] * 50, compression="snappy")
    table = pq.read_table(good)
    renamed = table.rename_columns(["image_bytes", "question", "options", "question_type", "correct_answer"])
    pq.write_table(renamed, tmp_path / "renamed.parquet")
    text_answers = table.set_column(2, "answers", pa.array(["yes, no"] * 50))
    pq.write_table(text_answers, tmp_path / "text.parquet")
    (tmp_path / "half.parquet").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "page.parquet").write_bytes(b"PAR1" + bytes(396) + good.read_bytes()[400:])
    (tmp_path / "folder.parquet").mkdir()
    write_parquet(tmp_path / "useless.parquet", [row(answers=[])] * 3)
    expected = {
        "missing.parquet": "no such file",
        "folder.parquet": "no such file, but a folder; name the parquet file in it",
        "half.parquet": "not a complete parquet file",
        "renamed.parquet": "no column answers; the file has image_bytes, question, options, question_type",
        "text.parquet": "column answers is string, expected a list of strings",
        "page.parquet": "damaged after row 0",
        "useless.parquet": "no row was kept; the table says why",
    }
    for name, message in expected.items():
        with pytest.raises(Mistake, match=f"{name}: {message}"):
            prepare_here(tmp_path / name, tmp_path / "out")
    assert files(tmp_path / "out") == {}
    done = prepare(tmp_path / "missing.parquet", tmp_path / "out")
    line = f"process_dataset: error: {tmp_path / 'missing.parquet'}: no such file\n"
    assert (done.returncode, done.stderr) == (1, line)


# --- interruption -----------------------------------------------------------------------------------


def write_many_rows(path: Path, count: int) -> Path:
    """Rows that take a while, so that there is something to interrupt; every seventh is skipped."""
    pictures = [encode(photo(i, (800, 600)), quality=95) for i in range(8)]
    rows = [row(image_bytes=[pictures[i % 8] + bytes([i % 251])] * (1 + (i % 7 == 0))) for i in range(count)]
    return write_parquet(path, rows, row_group_size=count // 2)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.nightly)])
def test_an_interrupted_run_leaves_nothing_finished_and_the_next_makes_the_same_bytes(tmp_path, stop):
    parquet = write_many_rows(tmp_path / "sat.parquet", 140)
    options, output = ("--total_num", 100), tmp_path / "out"
    assert prepare(parquet, tmp_path / "whole", *options).returncode == 0
    process = subprocess.Popen(
        command(parquet, output, *options),
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts background jobs, this test run perhaps among them, with Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 20
    while len(list(output.glob("images/.*/*"))) < 20:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=20)
    if stop == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in stderr
        assert "nothing was written" in stderr and files(output) == {}
    assert not list(output.glob("*.json")) and not list(output.glob("images/[!.]*"))
    assert prepare(parquet, output, *options).returncode == 0
    assert files(output) == files(tmp_path / "whole")


def test_other_settings_do_not_overwrite(tmp_path, prepare_here):
    parquet = write_parquet(tmp_path / "sat.parquet", [row()] * 40)
    prepare_here(parquet, tmp_path / "new", "--seed", 2)
    prepare_here(parquet, tmp_path / "out", "--seed", 1)
    with pytest.raises(Mistake, match=r"SAT_train_15000\.json: is there already, made with another seed"):
        prepare_here(parquet, tmp_path / "out", "--seed", 2)
    (tmp_path / "out" / "SAT_train_15000.json").unlink()
    prepare_here(parquet, tmp_path / "out", "--seed", 2)
    assert files(tmp_path / "out") == files(tmp_path / "new")


JSON, IMAGE, INFO = "SAT_train_3.json", "images/SAT_train_3/000001_0.jpg", "SAT_train_3.info.json"


@pytest.mark.parametrize(
    "name, content, message",
    [
        (JSON, b"[]\n", f"{JSON}: was changed since it was made; delete it to make it anew"),
        (IMAGE, None, f"{IMAGE}: the image is lost; delete "),
        (IMAGE, b"", f"{IMAGE}: the image is lost; delete "),
        (INFO, b"{", f"{INFO}: not JSON"),
        (INFO, b"[]", f"{INFO}: expected an object; delete "),
        (INFO, {"settings": 1}, f"{INFO}: settings: expected an object; delete "),
        (INFO, {"counts": {"zebra": 1}}, f"{INFO}: counts: missing next_row, kept, skipped; delete "),
        (INFO, {"counts": {"next_row": 4, "kept": "3", "skipped": {}}}, f"{INFO}: counts: kept: expected a whole "),
        (INFO, None, f"{JSON}: is there already, made with another"),
    ],
)
def test_a_finished_dataset_that_was_damaged_is_told_and_made_anew(tmp_path, prepare_here, name, content, message):
    parquet, output = write_parquet(tmp_path / "sat.parquet", [row()] * 4), tmp_path / "out"
    prepare_here(parquet, output, "--total_num", 3)
    whole = files(output)
    prepare_here(parquet, output, "--total_num", 3)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(whole[name]), **content}).encode()
    (output / name).unlink() if content is None else (output / name).write_bytes(content)
    with pytest.raises(Mistake) as caught:
        prepare_here(parquet, output, "--total_num", 3)
    assert message in str(caught.value)
    (output / JSON).unlink()
    prepare_here(parquet, output, "--total_num", 3)
    assert files(output) == whole


# --- the shell script ---------------------------------------------------------------------------------


def test_prepare_dataset_takes_a_local_file_from_any_directory(tmp_path):
    write_parquet(tmp_path / "my sat.parquet", [row()] * 3)
    environment = os.environ | {"PYTHON": sys.executable, "SAT_PARQUET": "my sat.parquet", "FOLD": "static"}
    done = subprocess.run(
        ["sh", SHELL_SCRIPT, "--total_num", "9", "--output_dir", "out dir"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no more than these; SAT_static_9" in done.stdout
    assert len(read_examples(tmp_path / "out dir" / "SAT_static_9.json")) == 3


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"FOLD": "dev"}, [], "FOLD=dev: expected train, static, val or test"),
        ({}, ["--fold", "val"], "--fold: set FOLD or SAT_PARQUET in the environment instead"),
        ({"PYTHON": "/bin/false"}, [], "run `bash setup.sh`"),
    ],
)
def test_prepare_dataset_refuses_in_one_line(environment, arguments, message):
    environment = os.environ | {"PYTHON": sys.executable} | environment
    done = subprocess.run(["sh", SHELL_SCRIPT, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


# --- memory and time ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_stays_bounded_on_one_giant_row_group():
    """640 MB in one row group, which parquet's defaults would hold whole."""
    with tempfile.TemporaryDirectory() as folder:  # that goes at once: pytest keeps its own for three runs
        check_memory(Path(folder), 4_000)


def check_memory(scratch: Path, count: int) -> None:
    padded = row(image_bytes=[JPEG + np.random.default_rng(0).bytes(160_000)])  # legal behind a JPEG's end
    options = {"row_group_size": count, "compression": "none", "use_dictionary": False}
    parquet = write_parquet(scratch / "sat.parquet", [padded] * count, **options)
    assert pq.ParquetFile(parquet).num_row_groups == 1
    measure = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"  # peak of this process, KiB
    )
    arguments = command(parquet, scratch / "out", "--total_num", 0)[1:]
    done = subprocess.run([sys.executable, "-c", measure, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 600 * 1024
    assert counts(scratch / "out", "SAT_train_all")["kept"] == count


def test_help_starts_without_heavy_imports():
    done = subprocess.run([sys.executable, "-X", "importtime", SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--question_types" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "pyarrow" in imported and not imported & {"torch", "transformers", "pandas", "datasets"}


# --- reading back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "images", "message"),
    [
        ("Where?", ["a.jpg"], "row 0: 0 <image> marks for 1 images"),
        ("<image><image>Where?", ["a.jpg"], "row 0: 2 <image> marks for 1 images"),
        ("<image>Where?", ["b.jpg"], "row 0: no image "),
        ("<image>Where?", 5, "row 0: images: expected a list of strings"),
    ],
)
def test_marks_and_images_that_do_not_match_are_named_with_file_and_row(tmp_path, user, images, message):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    path = tmp_path / "data.json"
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "left"}]
    path.write_text(json.dumps([{"messages": messages, "images": images}]))
    with pytest.raises(Mistake, match=f"{path}: {message}"):
        read_examples(path)


def test_a_prepared_file_that_is_not_there_is_told_how_to_make(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file; make it with src/data/SAT/prepare_dataset\.sh"):
        read_examples(tmp_path / "SAT_train_15000.json")
