"""The stand-in hub against the real client: what it gives and how it fails are what the client takes for the hub."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from hub import BREAK_OFF, COMMIT, Hub, serve

CHUNK = 10 * 2**20  # what the client writes at a time
BYTES = bytes(range(256)) * (3 * CHUNK // 256)
FETCH = """
import sys
from huggingface_hub import hf_hub_download, snapshot_download
try:
    print(hf_hub_download("owner/data", sys.argv[1], repo_type="dataset"))
except Exception as error:
    sys.exit(type(error).__name__)
"""


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "repository"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/file.bin").write_bytes(BYTES)
    with serve({"datasets/owner/data": folder}) as hub:
        yield hub


def fetch(hub: Hub, home: Path, name: str = "sub/file.bin") -> subprocess.CompletedProcess:
    """Download in a new process: the client reads its settings at import."""
    env = {**hub.environment(home), "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, "-c", FETCH, name], env=env, capture_output=True, text=True)


def test_a_file_comes_whole_and_once(hub, tmp_path):
    path = Path(fetch(hub, tmp_path / "home").stdout.strip())
    assert path.read_bytes() == BYTES and path.parts[-3] == COMMIT
    assert path.resolve().name == hashlib.sha256(BYTES).hexdigest()  # the ETag
    assert fetch(hub, tmp_path / "home").returncode == 0
    assert [method for method, _, _ in hub.requests] == ["HEAD", "GET", "HEAD"]


def test_a_broken_download_goes_on_where_it_broke_off(hub, tmp_path):
    hub.fail("file.bin", BREAK_OFF, times=1)
    assert Path(fetch(hub, tmp_path / "home").stdout.strip()).read_bytes() == BYTES
    assert [asked for method, _, asked in hub.requests if method == "GET"] == [None, f"bytes={CHUNK}-"]


@pytest.mark.parametrize("how", [429, 503])
def test_a_status_is_the_hubs_until_it_is_over(hub, tmp_path, how):
    hub.fail("file.bin", how, times=1)
    result = fetch(hub, tmp_path / "home")
    assert result.returncode == 0 or result.stderr.strip().endswith("LocalEntryNotFoundError")
    assert fetch(hub, tmp_path / "home").returncode == 0


def test_what_is_not_there_is_told_apart(hub, tmp_path):
    assert fetch(hub, tmp_path / "home", "other.bin").stderr.strip().endswith("EntryNotFoundError")
    hub.repositories.clear()
    assert fetch(hub, tmp_path / "home").stderr.strip().endswith("RepositoryNotFoundError")
