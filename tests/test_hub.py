"""Fetching from the Hub with the real client, and what users read when the Hub has a bad day."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fresh import new_shell
from hub import BREAK_OFF, COMMIT, Hub, serve

CHUNK = 10 * 2**20  # what the client writes at a time
BYTES = bytes(range(256)) * (3 * CHUNK // 256)
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


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "repository"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/file.bin").write_bytes(BYTES)
    with serve({"datasets/owner/data": folder}) as hub:
        yield hub


def fetch(hub: Hub, home: Path, name: str = "owner/data", **more: str) -> subprocess.CompletedProcess:
    """In a new process: the client reads its settings at import."""
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
    assert [asked for method, _, asked in hub.requests if method == "GET" and asked] == [f"bytes={CHUNK}-"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trouble", "message"),
    [
        ("owner/data", [("/api/", 503)], "503 Service Unavailable"),
        ("owner/other", [], "has no such repository, or only for a login: `hf auth login`"),
        ("owner/data", [("sub/file.bin", BREAK_OFF)], "peer closed connection"),
        ("owner/data", [("file.bin", 429)], "429 Too Many Requests"),
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
