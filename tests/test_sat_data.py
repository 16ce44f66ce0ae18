"""SAT parquet in, ShareGPT JSON and untouched images out; bad input gives a stated skip or one clear line."""

import importlib.util
import io
import json
import os
import random
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

from open_r1.base.errors import Mistake
from open_r1.base.prompts import REPO_ROOT, sat_question
from open_r1.tasks import sat
from open_r1.tasks.examples import read_examples

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


def as_struct(data: bytes | None) -> dict | None:
    return None if data is None else {"bytes": data, "path": "a.png"}


def write_parquet(path: Path, rows: list[dict], structs: bool = False, **options) -> Path:
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if structs else pa.binary()
    if structs:
        rows = [r | {"image_bytes": r["image_bytes"] and [as_struct(d) for d in r["image_bytes"]]} for r in rows]
    text = pa.string()
    schema = pa.schema(
        [
            ("image_bytes", pa.list_(image_type)),
            ("question", text),
            ("answers", pa.list_(text)),
            ("question_type", text),
            ("correct_answer", text),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **options)
    return path


def command(parquet: Path, output: Path, *options: object) -> list[str]:
    base = [sys.executable, SCRIPT, "--parquet", parquet, "--output_dir", output, *options]
    return [str(part) for part in base]


def prepare(parquet: Path, output: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(parquet, output, *options), capture_output=True, text=True)


def counts(output: Path, name: str) -> dict:
    return json.loads((output / f"{name}.info.json").read_text())["counts"]


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused command prints, after the progress bar if there was one."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    *bar, line = done.stderr.strip().splitlines()
    assert all("examples" in progress for progress in bar)
    assert line.startswith("process_dataset: error: ")
    return line


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- one row ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (JPEG, "jpg"),
        (encode(photo(), progressive=True), "jpg"),
        (jpeg_with_thumbnail(), "jpg"),
        (encode(photo(mode="CMYK")), "jpg"),
        (encode(photo(mode="L")), "jpg"),
        (encode(photo(), "PNG"), "png"),
        (encode(photo(mode="RGBA"), "PNG"), "png"),
        (encode(photo(mode="P"), "PNG"), "png"),
        (PNG16, "png"),
        (encode(photo(), "WEBP"), "webp"),
        (encode(photo(), "GIF"), "gif"),
        (encode(photo(), "BMP"), "bmp"),
        (encode(photo(), "TIFF"), "tif"),
        (encode(photo(size=(1, 1))), "jpg"),
        (encode(photo(size=(200, 1)), "PNG"), "png"),
        (encode(photo(size=(201, 1)), "PNG"), sat.Skip.TOO_LONG),
        (encode(Image.new("1", (8193, 8193)), "PNG"), sat.Skip.TOO_LARGE),
        (encode(Image.new("1", (20000, 20000)), "PNG"), sat.Skip.TOO_LARGE),
        (JPEG[: len(JPEG) // 2], sat.Skip.CORRUPT),
        (JPEG[:20], sat.Skip.CORRUPT),
        (encode(photo(), "PNG")[:-40], sat.Skip.CORRUPT),
        (b"not an image", sat.Skip.CORRUPT),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", sat.Skip.CORRUPT),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_get_their_true_extension_or_a_reason(data, expected):
    assert sat.sniff_image(data) == expected


@pytest.mark.parametrize(("format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif")])
def test_a_damaged_image_is_taken_if_and_only_if_it_can_be_decoded(format, extension):
    def decodes(data: bytes) -> bool:
        try:
            Image.open(io.BytesIO(data), formats=[format]).load()
        except Exception:  # Pillow raises of all kinds
            return False
        return True

    rng, whole, verdicts = random.Random(0), encode(photo(), format), set()
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randrange(20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = bytes(data[: rng.choice([len(data), rng.randrange(1, len(data) + 1)])])
        verdict = sat.sniff_image(data)
        if verdict not in (sat.Skip.TOO_LARGE, sat.Skip.TOO_LONG):  # what its header claims now
            assert verdict == (extension if decodes(data) else sat.Skip.CORRUPT)
        verdicts.add(verdict)
    assert {extension, sat.Skip.CORRUPT} <= verdicts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": None}, sat.Skip.NULL),
        ({"question": " "}, sat.Skip.NULL),
        ({"question_type": None}, sat.Skip.NULL),
        ({"correct_answer": None}, sat.Skip.NULL),
        ({"answers": None}, sat.Skip.NULL),
        ({"answers": ["yes", None]}, sat.Skip.NULL),
        ({"question_type": "goal_aim"}, sat.Skip.TYPE),
        ({"image_bytes": None}, sat.Skip.NO_IMAGE),
        ({"image_bytes": []}, sat.Skip.NO_IMAGE),
        ({"image_bytes": [None]}, sat.Skip.NO_IMAGE),
        ({"image_bytes": [b""]}, sat.Skip.NO_IMAGE),
        ({"image_bytes": [{"bytes": None, "path": "elsewhere.jpg"}]}, sat.Skip.NO_IMAGE),
        ({"image_bytes": [JPEG, JPEG]}, sat.Skip.SEVERAL_IMAGES),
        ({"image_bytes": [JPEG[:200]]}, sat.Skip.CORRUPT),
        ({"answers": []}, sat.Skip.FEW_OPTIONS),
        ({"answers": ["no"]}, sat.Skip.FEW_OPTIONS),
        ({"answers": ["no", "no"]}, sat.Skip.FEW_OPTIONS),
        ({"answers": ["no", "No ", "yes"]}, sat.Skip.ALIKE_OPTIONS),
        ({"correct_answer": "maybe"}, sat.Skip.NOT_AN_OPTION),
        ({"question": "What is in <image>?"}, sat.Skip.MARK),
        ({"answers": ["no", "<|image_pad|>"]}, sat.Skip.MARK),
    ],
)
def test_rows_are_skipped_for_a_stated_reason(changes, reason):
    assert sat.convert_row(row(**changes), 0, seed=0, question_types=["other"]) is reason


def test_repeated_options_are_merged():
    example = sat.convert_row(row(answers=["no", "yes", "no"]), 0, seed=0)
    assert sorted(example.options) == ["no", "yes"]


def test_options_with_commas_and_other_scripts_stay_whole():
    options = ["left, then right", "à gauche", "左边", "“quoted” \u2028 line"]
    example = sat.convert_row(row(answers=options, correct_answer="左边"), 3, seed=0)
    assert sorted(example.options) == sorted(options) and example.answer == "左边"


def test_the_order_of_options_follows_seed_and_row_alone():
    options = [str(i) for i in range(6)]
    orders = [sat.shuffled(options, 42, i) for i in range(50)]
    assert len(set(orders)) > 40
    assert orders[7] == sat.shuffled(options, 42, 7) != sat.shuffled(options, 43, 7)
    assert sat.shuffled(options, 42, 0) == ("4", "2", "1", "5", "3", "0")  # the same in every Python and run


def test_several_images_are_kept_on_request():
    example = sat.convert_row(row(image_bytes=[JPEG, PNG16]), 0, seed=0, keep_multi_image=True)
    assert example.images == ((JPEG, "jpg"), (PNG16, "png"))
    assert sat.to_record(example, ["a.jpg", "b.png"])["messages"][0]["content"].startswith("<image><image>Answer in")


# --- whole files ------------------------------------------------------------------------------------

HOSTILE = [  # (row, why it is skipped or None, extension)
    (row(), None, "jpg"),
    (row(image_bytes=[jpeg_with_thumbnail()]), None, "jpg"),
    (row(image_bytes=[encode(photo(3), "PNG")]), None, "png"),
    (row(image_bytes=[encode(photo(4, mode="CMYK"))]), None, "jpg"),
    (row(image_bytes=[PNG16]), None, "png"),
    (row(image_bytes=[encode(photo(5, (1, 1)))]), None, "jpg"),
    (row(answers=["up, then left", "nach außen", "內"], correct_answer="up, then left"), None, "jpg"),
    (row(answers=["yes", "no", "yes"]), None, "jpg"),
    (row(image_bytes=[JPEG[:-300]]), "corrupt image", None),
    (row(image_bytes=[JPEG, JPEG]), "several images", None),
    (row(image_bytes=None), "no image", None),
    (row(question=None), "null or empty field", None),
    (row(answers=None), "null or empty field", None),
    (row(answers=[]), "fewer than two options", None),
    (row(answers=["no", "no"]), "fewer than two options", None),
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
    assert counts(tmp_path / "out", "SAT_train_all") == {
        "next_row": 16,
        "kept": len(kept),
        "skipped": expected,
    }
    for reason, n in expected.items():
        assert any(line.split() == f"skipped: {reason} {n}".split() for line in done.stdout.splitlines())

    again = prepare(parquet, tmp_path / "out", "--total_num", "all")
    assert again.returncode == 0 and "nothing to do" in again.stdout and again.stderr == ""


def test_text_that_is_not_utf8_is_skipped(tmp_path):
    text = pa.array([b"ok?", b"\xff\xfe", b"fine?"], pa.binary()).view(pa.string())
    table = pa.table(
        {
            "image_bytes": pa.array([[JPEG]] * 3, pa.list_(pa.binary())),
            "question": text,
            "answers": pa.array([["a", "b"]] * 3),
            "question_type": ["other"] * 3,
            "correct_answer": ["a"] * 3,
        }
    )
    pq.write_table(table, tmp_path / "sat.parquet")
    assert prepare(tmp_path / "sat.parquet", tmp_path, "--total_num", 0).returncode == 0
    assert counts(tmp_path, "SAT_train_all")["skipped"] == {"text is not UTF-8": 1}


def test_total_num_counts_kept_rows(tmp_path):
    rows = [row(image_bytes=[JPEG, JPEG]) if i % 2 else row() for i in range(40)]
    parquet = write_parquet(tmp_path / "sat.parquet", rows)
    assert prepare(parquet, tmp_path, "--total_num", 15).returncode == 0
    assert len(json.loads((tmp_path / "SAT_train_15.json").read_text())) == 15
    assert len(list((tmp_path / "images" / "SAT_train_15").iterdir())) == 15
    assert counts(tmp_path, "SAT_train_15") == {"next_row": 29, "kept": 15, "skipped": {"several images": 14}}


def test_fewer_rows_than_asked_for_is_said(tmp_path):
    parquet = write_parquet(tmp_path / "sat.parquet", [row()] * 5)
    done = prepare(parquet, tmp_path, "--fold", "val", "--total_num", 9)
    assert "no more than these; SAT_val_9" in done.stdout
    assert len(json.loads((tmp_path / "SAT_val_9.json").read_text())) == 5


def test_multi_image_and_question_types_options(tmp_path):
    rows = [row(), row(image_bytes=[JPEG, PNG16], question_type="goal_aim"), row(question_type="perspective")]
    parquet = write_parquet(tmp_path / "sat.parquet", rows)
    options = ("--fold", "test", "--multi_image", "keep", "--question_types", "goal_aim", "other")
    assert prepare(parquet, tmp_path, *options).returncode == 0
    records = json.loads((tmp_path / "SAT_test_all.json").read_text())
    assert [len(record["images"]) for record in records] == [1, 2]
    assert counts(tmp_path, "SAT_test_all")["skipped"] == {"question type not asked for": 1}


def test_order_of_options_does_not_depend_on_the_rows_kept(tmp_path):
    names = [str(i) for i in range(5)]
    rows = [row(answers=names, correct_answer="1", question_type=t) for t in ["a", "b"] * 10]
    parquet = write_parquet(tmp_path / "sat.parquet", rows)
    orders = []
    for name, types in (("all", ("a", "b")), ("some", ("b",))):
        assert prepare(parquet, tmp_path / name, "--question_types", *types).returncode == 0
        records = json.loads((tmp_path / name / "SAT_train_15000.json").read_text())
        orders.append([r["options"] for r in records if r["question_type"] == "b"])
    assert orders[0] == orders[1]


def test_one_clear_line_for_what_is_no_sat_file(tmp_path):
    good = write_parquet(tmp_path / "good.parquet", [row()] * 50)
    table = pq.read_table(good)
    renamed = table.rename_columns(["image_bytes", "question", "options", "question_type", "correct_answer"])
    pq.write_table(renamed, tmp_path / "renamed.parquet")
    text_answers = table.set_column(2, "answers", pa.array(["yes, no"] * 50))
    pq.write_table(text_answers, tmp_path / "text.parquet")
    (tmp_path / "half.parquet").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "folder.parquet").mkdir()
    expected = {
        "missing.parquet": "no such file",
        "folder.parquet": "no such file, but a folder; name the parquet file in it",
        "half.parquet": "not a complete parquet file",
        "empty.parquet": "not a complete parquet file",
        "renamed.parquet": "no column answers; the file has image_bytes, question, options, question_type",
        "text.parquet": "column answers is string, expected a list of strings",
    }
    for name, message in expected.items():
        line = error_line(prepare(tmp_path / name, tmp_path / "out"))
        assert name in line and message in line
    assert not (tmp_path / "out").exists()


def test_a_damaged_page_is_one_clear_line(tmp_path):
    parquet = write_parquet(tmp_path / "sat.parquet", [row()] * 50, compression="snappy")
    data = bytearray(parquet.read_bytes())
    data[4:400] = bytes(396)
    parquet.write_bytes(data)
    assert "damaged after row 0" in error_line(prepare(parquet, tmp_path / "out"))


def test_nothing_kept_is_an_error(tmp_path):
    parquet = write_parquet(tmp_path / "sat.parquet", [row(answers=[])] * 3)
    done = prepare(parquet, tmp_path)
    assert done.returncode == 1 and "no row was kept" in done.stderr
    assert not (tmp_path / "SAT_train_15000.json").exists()


# --- interruption -----------------------------------------------------------------------------------


def write_many_rows(path: Path, count: int) -> Path:
    """Rows that take a while, so that there is something to interrupt; every seventh is skipped."""
    pictures = [encode(photo(i, (800, 600)), quality=95) for i in range(8)]
    rows = [row(image_bytes=[pictures[i % 8] + bytes([i % 251])] * (1 + (i % 7 == 0))) for i in range(count)]
    return write_parquet(path, rows, row_group_size=count // 2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A parquet file, and what a run that nobody interrupts makes of it with `--total_num 300`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    parquet = write_many_rows(folder / "sat.parquet", 420)
    assert prepare(parquet, folder / "out", "--total_num", 300).returncode == 0
    return parquet, files(folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_an_interrupted_run_leaves_nothing_finished_and_the_next_makes_the_same_bytes(tmp_path, undisturbed, stop):
    parquet, whole = undisturbed
    options, output = ("--total_num", 300), tmp_path / "out"
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
    assert files(output) == whole


def test_other_settings_do_not_overwrite(tmp_path):
    parquet = write_many_rows(tmp_path / "sat.parquet", 40)
    assert prepare(parquet, tmp_path / "new", "--seed", 2).returncode == 0
    assert prepare(parquet, tmp_path / "out", "--seed", 1).returncode == 0
    line = error_line(prepare(parquet, tmp_path / "out", "--seed", 2))
    assert "SAT_train_15000.json" in line and "made with another seed" in line
    (tmp_path / "out" / "SAT_train_15000.json").unlink()
    assert prepare(parquet, tmp_path / "out", "--seed", 2).returncode == 0
    assert files(tmp_path / "out") == files(tmp_path / "new")


# --- work that was damaged since ----------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path, monkeypatch) -> Callable[[], Path]:
    """Prepare three examples, in this process: a command that ends with the folder of the output."""
    spec = importlib.util.spec_from_file_location("process_dataset", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "process_dataset", script)  # its dataclasses look there
    spec.loader.exec_module(script)
    parquet = write_parquet(tmp_path / "sat.parquet", [row()] * 4)
    monkeypatch.setattr(sys, "argv", command(parquet, tmp_path / "out", "--total_num", 3)[1:])

    def run() -> Path:
        script.main()
        return tmp_path / "out"

    return run


def rewrite(name: str, content: bytes | str | dict | None) -> Callable[[Path], None]:
    def damage(output: Path) -> None:
        if content is None:
            (output / name).unlink()
        elif isinstance(content, dict):
            (output / name).write_text(json.dumps({**json.loads((output / name).read_text()), **content}))
        else:
            (output / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


IMAGE, INFO = "images/SAT_train_3/000001_0.jpg", "SAT_train_3.info.json"


@pytest.mark.parametrize(
    "damage, message",
    [
        (rewrite("SAT_train_3.json", ""), "SAT_train_3.json: was changed since it was made; delete it to make it anew"),
        (rewrite("SAT_train_3.json", "[]\n"), "SAT_train_3.json: was changed since it was made"),
        (rewrite(IMAGE, None), f"{IMAGE}: the image is lost; delete "),
        (rewrite(IMAGE, ""), f"{IMAGE}: the image is lost; delete "),
        (rewrite(INFO, "{"), f"{INFO}: not JSON"),
        (rewrite(INFO, b"\xff"), f"{INFO}: not JSON"),
        (rewrite(INFO, "[" * 99_999), f"{INFO}: not JSON (nested too deep)"),
        (rewrite(INFO, "[]"), f"{INFO}: expected an object"),
        (rewrite(INFO, {"settings": 1}), f"{INFO}: settings: expected an object"),
        (rewrite(INFO, {"counts": {"zebra": 1}}), f"{INFO}: counts: missing next_row, kept, skipped"),
        (
            rewrite(INFO, {"counts": {"next_row": 3, "kept": "3", "skipped": {}}}),
            f"{INFO}: counts: kept: expected a whole number",
        ),
        (
            rewrite(INFO, {"counts": {"next_row": 3, "kept": 3, "skipped": {"a": -1}}}),
            f"{INFO}: counts: skipped: expected numbers",
        ),
        (rewrite(INFO, None), "SAT_train_3.json: is there already, made with another"),
    ],
)
def test_a_finished_dataset_that_was_damaged_is_told_and_made_anew(prepared, damage, message):
    whole = files(prepared())
    prepared()
    damage(prepared())
    with pytest.raises((Mistake, ValueError)) as caught:
        prepared()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    rewrite("SAT_train_3.json", None)(Path(sys.argv[4]))
    assert files(prepared()) == whole


# --- the shell script ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_prepare_dataset_takes_a_local_file_from_any_directory(tmp_path, shell):
    write_parquet(tmp_path / "my sat.parquet", [row()] * 3)
    environment = os.environ | {"PYTHON": sys.executable, "SAT_PARQUET": "my sat.parquet", "FOLD": "static"}
    done = subprocess.run(
        [shell, SHELL_SCRIPT, "--total_num", "2", "--output_dir", "out dir"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(read_examples(tmp_path / "out dir" / "SAT_static_2.json")) == 2


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


@pytest.fixture
def scratch():
    """A folder that goes at once: pytest keeps its own for three runs, and these files are large."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow
def test_memory_stays_bounded_on_one_giant_row_group(scratch):
    """640 MB in one row group, which parquet's defaults would hold whole."""
    size, count = 160_000, 4_000
    parquet = scratch / "sat.parquet"
    # Bytes after a JPEG's end are legal, and quick to decode.
    pictures = pa.array([JPEG + np.random.default_rng(0).bytes(size)], pa.binary()).take(np.zeros(count, int))
    table = pa.table(
        {
            "image_bytes": pa.ListArray.from_arrays(np.arange(count + 1), pictures),
            "question": ["Is a to the left of b?"] * count,
            "answers": pa.array([["yes", "no"]] * count),
            "question_type": ["other"] * count,
            "correct_answer": ["yes"] * count,
        }
    )
    pq.write_table(table, parquet, row_group_size=count, compression="none", use_dictionary=False)
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


def test_read_examples(tmp_path):
    rows = [row(), row(image_bytes=[JPEG, PNG16], correct_answer="yes")]
    assert prepare(write_parquet(tmp_path / "sat.parquet", rows), tmp_path, "--multi_image", "keep").returncode == 0
    first, second = read_examples(tmp_path / "SAT_train_15000.json")
    assert first["prompt"] == [{"role": "user", "content": sat_question(rows[0]["question"], first["options"])}]
    assert first["solution"] == "no" and second["solution"] == "yes" and first["question_type"] == "other"
    assert [Path(image).read_bytes() for image in second["images"]] == [JPEG, PNG16]
    assert all(Path(image).is_absolute() for image in second["images"])


def record(**changes) -> dict:
    base = {
        "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "left"}],
        "images": ["a.jpg"],
        "question_type": "other",
        "options": ["left", "right"],
    }
    return base | changes


def messages(user: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": "left"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "at least one record"),
        ({"a": 1}, "at least one record"),
        ([record(), 7], "row 1: expected an object"),
        ([record(), {"messages": []}], "row 1: messages: expected one user and one assistant message"),
        ([record(images="a.jpg")], "row 0: images: expected a list of strings"),
        ([record(messages=[])], "row 0: messages: expected one user and one assistant"),
        ([record(messages=messages("Where?"))], "row 0: 0 <image> marks for 1 images"),
        ([record(messages=messages("<image><image>Where?"))], "row 0: 2 <image> marks for 1 images"),
        ([record(messages=messages("Where <image>?"))], "row 0: 1 <image> marks for 1 images"),
        ([record(images=["b.jpg"])], "row 0: no image "),
    ],
)
def test_read_examples_names_file_and_row(tmp_path, content, message):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    path = tmp_path / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_examples(path)
    text = str(caught.value)
    assert str(path) in text and message in text and "\n" not in text


def test_read_examples_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file; make it with src/data/SAT/prepare_dataset\.sh"):
        read_examples(tmp_path / "SAT_train_15000.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file$"):
        read_examples(tmp_path / "none.json")
