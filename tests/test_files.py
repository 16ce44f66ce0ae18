"""What a crash may do to a file: nothing to the old one, and no more than a torn last line to JSON Lines."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from open_r1.files import append_rows, keep_rows, read_rows, replace_file, replacing

ROWS = [{"step": 1, "text": "两 \n"}, {"step": 2, "text": "b"}, {"step": 3, "text": "c"}]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def crash_before_the_rename(path: Path, shared: bool = False) -> None:
    """What a kill leaves that comes when the temporary name is written."""
    code = f"""if True:
        import os, pathlib
        from open_r1.files import replacing
        with replacing(pathlib.Path({str(path)!r}), shared={shared}) as temporary:
            temporary.write_text("half")
            os._exit(9)
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_at_once(tmp_path, shared):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path, shared) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new" and names(tmp_path) == ["a.json"]


def test_a_folder_is_replaced_at_once(tmp_path):
    with replacing(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "config.json").touch()
        assert not (tmp_path / "model").exists()
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["config.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_no_temporary_one(tmp_path, error, monkeypatch):
    replace_file(tmp_path / "a", b"old")
    with pytest.raises(error), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(error), replacing(tmp_path / "b") as temporary:
        (temporary / "c").mkdir(parents=True)
        raise error

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(error):
        replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_crash_before_the_rename_leaves_the_old_file_and_the_next_write_clears_up(tmp_path):
    path = tmp_path / "a"
    replace_file(path, b"old")
    crash_before_the_rename(path)
    assert path.read_bytes() == b"old" and len(names(tmp_path)) == 2
    with replacing(path) as temporary:
        assert not temporary.exists()
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a"]


def test_processes_that_share_a_file_have_their_own_temporary_names(tmp_path):
    crash_before_the_rename(tmp_path / "a", shared=True)
    (half,) = tmp_path.iterdir()
    with replacing(tmp_path / "a", shared=True) as temporary:
        temporary.write_bytes(b"new")
        assert temporary != half
    assert half.read_text() == "half" and (tmp_path / "a").read_bytes() == b"new"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/\.a\.tmp"):
        replace_file(tmp_path / "no/a", b"")


def test_rows_are_appended_and_read(tmp_path):
    path = tmp_path / "new/folder/rows.jsonl"
    append_rows(path, ROWS[:1])
    append_rows(path, iter(ROWS[1:]))
    append_rows(path, [])
    assert path.read_text().splitlines()[0] == '{"step": 1, "text": "两 \\n"}'
    before = path.stat()
    assert read_rows(path) == ROWS
    assert path.stat().st_mtime_ns == before.st_mtime_ns  # nothing to mend, nothing written


@pytest.mark.parametrize("torn", ['{"step": 4, "te', '{"step": 4}', "{"])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    append_rows(path, ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    assert read_rows(path) == ROWS and path.read_bytes() == whole
    append_rows(path, [{"step": 4}])
    assert read_rows(path) == [*ROWS, {"step": 4}]
    path.write_text(torn)
    assert read_rows(path) == [] and path.read_bytes() == b""


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 2: damaged \(.*\); delete it, or all to start over"):
        read_rows(path)


def test_kept_rows_stay_as_they_were_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert keep_rows(path, bool) == 0 and not path.exists()
    path.write_text('{"step":  1.50}\n{"step": 2}\n{"step": 3}\n{"st')
    assert keep_rows(path, lambda row: row["step"] <= 2) == 2
    assert path.read_text() == '{"step":  1.50}\n{"step": 2}\n'
    written = path.stat().st_mtime_ns
    assert keep_rows(path, lambda row: True) == 0 and path.stat().st_mtime_ns == written
    assert names(tmp_path) == ["rows.jsonl"]


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
