"""What a crash may do to a file: nothing to the old one, and no more than a torn last line to JSON Lines."""

import importlib
import os
import re
import resource
import sys
from pathlib import Path

import pytest

from fake_run import fake_events, row, write_run
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.base.files import (
    MADE_BY,
    append_rows,
    check_replaceable,
    keep_rows,
    read_rows,
    replace_file,
    replacing,
)
from open_r1.evaluation.run import write_result
from support import load_script
from test_results import make_scored

ROWS = [{"step": 1, "text": "两 \n"}, {"step": 2, "text": "b"}, {"step": 3, "text": "c"}]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_or_folder_is_replaced_at_once(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    with replacing(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "config.json").touch()
        assert not (tmp_path / "model").exists()
    assert path.read_text() == "new" and names(tmp_path) == ["a.json", "model"]
    assert names(tmp_path / "model") == ["config.json"]


def test_a_folder_that_is_not_there_is_told_by_its_name(tmp_path):
    path = tmp_path / "no/page.html"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(f'{path}: there is no folder {path.parent}')}$"):
        replace_file(path, b"")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_no_temporary_one(tmp_path, error):
    replace_file(tmp_path / "a", b"old")
    with pytest.raises(error), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(error), replacing(tmp_path / "b") as temporary:
        (temporary / "c").mkdir(parents=True)
        raise error
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_crash_before_the_rename_leaves_the_old_file_and_the_next_write_clears_up(tmp_path):
    path = tmp_path / "a"
    replace_file(path, b"old")
    killed = replacing(path)  # whose end never comes
    killed.__enter__().write_text("half")
    assert path.read_bytes() == b"old" and len(names(tmp_path)) == 2
    with replacing(path) as temporary:
        assert not temporary.exists()
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a"]


def test_rows_are_appended_and_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "new/folder/rows.jsonl"
    append_rows(path, ROWS[:1])
    append_rows(path, iter(ROWS[1:]))
    append_rows(path, [])
    assert path.read_text().splitlines()[0] == '{"step": 1, "text": "两 \\n"}'
    whole = path.read_bytes()
    for torn in ("", '{"step": 4, "te', '{"step": 4}'):
        path.write_bytes(whole + torn.encode())
        assert read_rows(path) == ROWS and path.read_bytes() == whole
    append_rows(path, [{"step": 4}])
    assert read_rows(path) == [*ROWS, {"step": 4}]
    path.write_text("{")
    assert read_rows(path) == [] and path.read_bytes() == b""


def test_kept_rows_stay_as_they_were_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert keep_rows(path, bool) == 0 and not path.exists()
    path.write_text('{"step":  1.50}\n{"step": 2}\n{"step": 3}\n{"st')
    assert keep_rows(path, lambda row: row["step"] <= 2) == 2
    assert path.read_text() == '{"step":  1.50}\n{"step": 2}\n'
    written = path.stat().st_mtime_ns
    assert keep_rows(path, lambda row: True) == 0 and path.stat().st_mtime_ns == written


def test_a_full_disk_takes_all_rows_or_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, ROWS)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, limits[1]))  # a row and a half
    try:
        with pytest.raises(OSError, match=re.escape(f"File too large: '{path}'")):
            append_rows(path, ROWS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    append_rows(path, ROWS)
    assert read_rows(path) == ROWS * 2


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"garbage", "Expecting value"),
        (b"[1, 2]", "list indices"),
        (b'{"text": "no step"}', "KeyError: 'step'"),
        (b'{"step": 1, "text": "\xff"}', "can't decode byte 0xff"),
        (b"[" * 99_999, "recursion"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line, reason):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    before = path.read_bytes()
    with pytest.raises(Mistake, match=rf"^{re.escape(str(path))}: line 2: damaged \(.*{re.escape(reason)}") as raised:
        keep_rows(path, lambda row: row["step"] <= 1)
    assert str(raised.value).endswith("; delete the line, or the file") and path.read_bytes() == before


# --- what was not made by a command is not written over -----------------------------------------------------------

LIVE = "trajectories/train.jsonl"  # of a run


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs a script or module in a folder with a run, RUN, and a result, r.json; returns how it ends, None if well."""
    rows = [row(step=step) for step in (1, 1, 2, 2)]
    write_run(tmp_path / "run/seed0", rows, events=fake_events(2), max_steps=2)
    write_result(tmp_path / "r.json", make_scored())
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str | None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        main = importlib.import_module(name).main if "." in name else load_script(REPO_ROOT / f"scripts/{name}.py").main
        try:
            main()
        except (OSError, Mistake) as error:
            return str(error)

    return run


WRITERS = [
    ("report", "run/seed0 --output {}", f"run/seed0/{LIVE}"),
    ("report", "run/seed0 --output page.html", "accuracy_length.png"),  # beside the page
    ("report", "run/seed0", "run/seed0/report.html"),
    ("compare", "r.json --chart {}", "photo.png"),
    ("compare", "r.json", "comparison.png"),
    ("open_r1.world.__main__", "--rows 2 --level easy --output {}", "train.parquet"),
    ("open_r1.world.__main__", "--rows 2 --level easy --schema cvbench --output cv", "cv/test_3d.parquet"),
    ("sweep", "run/seed0 --output there", "there/sweep.svg"),
    ("benchmark", "--json {} data", "r.json"),
    ("gpu_check", "--rehearsal --output there", "there/gpu_check.md"),
    ("dev/rehearse", "--output there", "there/rehearsal.json"),
    ("open_r1.tiny", "--output there", "there/model.safetensors"),
    ("dev/pretrain_tiny", "--output there", "there/thesis.tex"),
    ("export", "--adapter run --output there", "there/config.json"),
]


@pytest.mark.parametrize("name, arguments, path", WRITERS)
def test_a_command_leaves_files_that_none_of_ours_made(command, tmp_path, name, arguments, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not Path(path).exists():
        Path(path).write_bytes(b"years of work")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    error = command(name, *arguments.format(path).split())
    assert error and re.search(rf"(?:{re.escape(path)}|there) (?:is there, and was not made by|exists; name)", error)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "name, arguments, path",
    [
        ("report", "run/seed0 --output {}", "page.html"),
        ("compare", "r.json --chart {}", "chart.png"),
        ("compare", "r.json --chart {}", "chart.pdf"),
        ("open_r1.world.__main__", "--rows 2 --level easy --schema cvbench --output cv", "cv/test_2d.parquet"),
    ],
)
def test_a_command_replaces_what_it_made(command, name, arguments, path):
    arguments = arguments.format(path).split()
    assert command(name, *arguments) is None
    made = Path(path).stat().st_ino
    assert command(name, *arguments) is None and Path(path).stat().st_ino != made


def test_a_folder_a_pipe_and_a_file_without_our_mark_are_not_replaceable(tmp_path):
    check_replaceable(tmp_path / "new", tmp_path / "no/folder")
    (tmp_path / "ours").write_bytes(b"x" * 10**6 + MADE_BY.encode())
    check_replaceable(tmp_path / "ours")
    (tmp_path / "theirs").write_bytes(b"x" * 10**6 + MADE_BY.encode() + b"x" * 10**6)  # a text about us
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("theirs", "was not made"), ("pipe", "was not made"), ("", "is a folder; name a file")):
        with pytest.raises(OSError, match=reason):
            check_replaceable(tmp_path / "new", tmp_path / name)
