"""The stand-in hub against the real client, and what users read when the hub has a bad day."""

import hashlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fresh import new_shell
from hub import BREAK_OFF, COMMIT, Hub, serve

CHUNK = 10 * 2**20  # what the client writes at a time
BYTES = bytes(range(256)) * (3 * CHUNK // 256)
BY_HAND = """
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


def fetch_by_hand(hub: Hub, home: Path, name: str = "sub/file.bin") -> subprocess.CompletedProcess:
    """Download in a new process: the client reads its settings at import."""
    env = {**hub.environment(home), "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, "-c", BY_HAND, name], env=env, capture_output=True, text=True)


def test_a_file_comes_whole_and_once(hub, tmp_path):
    path = Path(fetch_by_hand(hub, tmp_path / "home").stdout.strip())
    assert path.read_bytes() == BYTES and path.parts[-3] == COMMIT
    assert path.resolve().name == hashlib.sha256(BYTES).hexdigest()  # the ETag
    assert fetch_by_hand(hub, tmp_path / "home").returncode == 0
    assert [method for method, _, _ in hub.requests] == ["HEAD", "GET", "HEAD"]


def test_a_broken_download_goes_on_where_it_broke_off(hub, tmp_path):
    hub.fail("file.bin", BREAK_OFF, times=1)
    assert Path(fetch_by_hand(hub, tmp_path / "home").stdout.strip()).read_bytes() == BYTES
    assert [asked for method, _, asked in hub.requests if method == "GET"] == [None, f"bytes={CHUNK}-"]


@pytest.mark.parametrize("how", [429, 503])
def test_a_status_is_the_hubs_until_it_is_over(hub, tmp_path, how):
    hub.fail("file.bin", how, times=1)
    result = fetch_by_hand(hub, tmp_path / "home")
    assert result.returncode == 0 or result.stderr.strip().endswith("LocalEntryNotFoundError")
    assert fetch_by_hand(hub, tmp_path / "home").returncode == 0


def test_what_is_not_there_is_told_apart(hub, tmp_path):
    assert fetch_by_hand(hub, tmp_path / "home", "other.bin").stderr.strip().endswith("EntryNotFoundError")
    hub.repositories.clear()
    assert fetch_by_hand(hub, tmp_path / "home").stderr.strip().endswith("RepositoryNotFoundError")


# --- open_r1.base.hub ----------------------------------------------------------------------------------------------

FETCH = """
import sys, time
from open_r1.base.hub import fetch
start = time.monotonic()
try:
    print(fetch(sys.argv[1], ["sub/*"], "dataset"))
except OSError as error:
    print(f"{time.monotonic() - start:.1f}")
    sys.exit(f"error: {error}")
"""


def fetch(hub: Hub, home: Path, name: str = "owner/data", **more: str) -> subprocess.CompletedProcess:
    env = new_shell(**{**hub.environment(home), **more})
    return subprocess.run([sys.executable, "-c", FETCH, name], env=env, capture_output=True, text=True)


def test_fetch_gives_a_folder_named_by_its_commit_and_asks_once(hub, tmp_path):
    for _ in range(2):
        folder = Path(fetch(hub, tmp_path / "home").stdout.strip())
        assert folder.name == COMMIT and (folder / "sub/file.bin").read_bytes() == BYTES
    assert [method for method, path, _ in hub.requests if "resolve" in path].count("GET") == 1
    hub.fail("/", 503)  # what is cached is good enough
    assert fetch(hub, tmp_path / "home").stdout.strip() == str(folder)
    assert fetch(hub, tmp_path / "home", HF_HUB_OFFLINE="1").stdout.strip() == str(folder)


def test_fetch_goes_on_where_it_broke_off(hub, tmp_path):
    hub.fail("file.bin", BREAK_OFF, times=1)
    assert (Path(fetch(hub, tmp_path / "home").stdout.strip()) / "sub/file.bin").read_bytes() == BYTES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trouble", "message"),
    [
        ("owner/data", [("/api/", 503)], "503 Service Unavailable"),
        ("owner/data", [("/api/", 429)], "429 Too Many Requests"),
        ("owner/other", [], "has no such repository, or only for a login: `hf auth login`"),
        ("owner/data", [("sub/file.bin", BREAK_OFF)], "peer closed connection"),
        pytest.param("owner/data", [("file.bin", 503)], "503 Service Unavailable", marks=pytest.mark.slow),
        pytest.param("owner/data", [("file.bin", 429)], "429 Too Many Requests", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_fetched_is_named_in_one_line(hub, tmp_path, name, trouble, message):
    for part, how in trouble:
        hub.fail(part, how)
    result = fetch(hub, tmp_path / "home", name)
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and line.startswith(f"error: {name}: neither here nor to be had from the Hub (")
    assert message in line
    assert float(result.stdout) < 40  # the client itself tries a file for 23 s
    hub.recover()
    hub.repositories["datasets/owner/other"] = hub.repositories["datasets/owner/data"]
    assert fetch(hub, tmp_path / "home", name).returncode == 0  # nothing half-fetched is in the way


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_out_of_reach_is_one_line(tmp_path, offline):
    nobody = Hub({})
    nobody.url = "http://127.0.0.1:9"
    result = fetch(nobody, tmp_path / "home", HF_HUB_OFFLINE=offline)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: owner/data: neither here nor to be had from the Hub (")
    assert ("Connection refused" in line) == (offline == "0") and float(result.stdout) < 10


def test_a_hub_that_says_nothing_is_one_line(tmp_path):
    """A network can swallow what is sent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = Hub({})
        nobody.url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = fetch(nobody, tmp_path / "home", HF_HUB_ETAG_TIMEOUT="1")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: owner/data: neither here nor to be had from the Hub (timed out")
    assert float(result.stdout) < 10


def test_a_path_is_not_taken_for_a_name(tmp_path):
    for path in (str(tmp_path / "nothing"), "outputs/run/checkpoint-100", "../run"):
        result = fetch(Hub({}), tmp_path / "home", path)
        assert result.stderr == f"error: {path}: no such file or folder\n"
