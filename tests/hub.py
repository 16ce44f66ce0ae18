"""A stand-in for the model hub on loopback, for the real clients: what they ask of it, and its bad days.

    with serve({"datasets/array/SAT": folder, "Qwen/Qwen2-VL-2B": another}) as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(cache)})

A repository is a folder, read at every request. It speaks the part of the protocol that `huggingface_hub`, `datasets`
and `transformers` use to download: HEAD and GET with Range on `resolve`, and `revision`, `tree` and `paths-info` of the
API; and to upload a model, without Xet: `repos/create`, `preupload`, Git LFS for weights, `commit`. It serves one
revision, `main`, which is also a commit.
"""

import base64
import contextlib
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

NO_MORE = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}  # of what the clients can do
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BREAK_OFF: Literal["break off"] = "break off"  # in the middle of the body
_FILE = re.compile(r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>\w[\w-]*)/(?P<rest>.+))?")
_UPLOAD = re.compile(
    r"/(?:api/models/)?(?P<repo>[^/]+/[^/]+?)(?:\.git/info)?/(?P<verb>preupload|commit|lfs)/(?P<rest>.+)"
)


class Hub:
    """The server's state; `requests` are (method, path, range) as they came.

    Attributes:
        repositories: `owner/name` of a model or `datasets/owner/name` -> its folder.
    """

    def __init__(self, repositories: Mapping[str, Path]) -> None:
        self.repositories = dict(repositories)
        self.requests: list[tuple[str, str, str | None]] = []
        self.url = ""
        self.large_files: dict[str, bytes] = {}  # SHA-256 -> content, of files uploaded and not committed yet
        self._trouble: list[list[Any]] = []  # [part of a path, what happens, how often still]
        self._lock = threading.Lock()  # requests come in threads

    def fail(self, part: str, how: Literal["break off"] | int, times: int = 10**6) -> None:
        """The next `times` GETs whose path holds `part` break off, or are answered with this status alone.

        A status is given to HEAD too, as the real hub does.
        """
        self._trouble.append([part, how, times])

    def recover(self) -> None:
        """Nothing fails any more."""
        self._trouble.clear()

    def environment(self, home: Path) -> dict[str, str]:
        """What makes the clients ask this hub and nobody else, with their caches in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **NO_MORE}

    def trouble(self, method: str, path: str) -> Literal["break off"] | int | None:
        """What happens to this request, counted."""
        with self._lock:
            for trouble in self._trouble:
                part, how, times = trouble
                if part in path and times and (method == "GET" or how != BREAK_OFF):
                    trouble[2] -= 1
                    return how
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub  # of the subclass that `serve` makes

    def do_GET(self) -> None:
        """Also HEAD, POST and PUT: a body follows all but HEAD."""
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        form = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        trouble = self.hub.trouble(self.command, path)
        if isinstance(trouble, int):
            self.answer(trouble, {}, b"no\n")
        elif match := _FILE.fullmatch(path):
            self.send_file(match["repo"], match["path"], trouble == BREAK_OFF)
        elif path == "/api/repos/create":
            about = json.loads(form)
            self.send_json({"url": f"{self.hub.url}/{about['organization']}/{about['name']}"})
        elif path == "/api/validate-yaml":
            self.send_json({})
        elif match := _UPLOAD.fullmatch(path):
            self.take(match["repo"], match["verb"], match["rest"], form)
        elif match := _API.fullmatch(path):
            repo = match["repo"] if match["kind"] == "models" else f"datasets/{match['repo']}"
            wanted = {**query, **parse_qs(form.decode())}
            self.send_about(repo, match["verb"], match["rest"] or "", wanted)
        else:
            self.not_found("EntryNotFound")

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, status: int, headers: Mapping[str, str], body: bytes, sent: int | None = None) -> None:
        """Send it; `sent` bytes of the body alone when given, then hang up."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True

    def not_found(self, code: str) -> None:
        self.answer(404, {"X-Error-Code": code, "X-Error-Message": code}, b"")

    def send_file(self, repo: str, path: str, breaks_off: bool) -> None:
        folder = self.hub.repositories.get(repo)
        if folder is None:
            return self.not_found("RepoNotFound")
        if not (folder / path).is_file():
            return self.not_found("EntryNotFound")
        body = (folder / path).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        status = 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            status, body = 206, body[first : last + 1]
        self.answer(status, headers, body, len(body) // 2 if breaks_off else None)

    def send_about(self, repo: str, verb: str | None, rest: str, wanted: Mapping[str, list[str]]) -> None:
        folder = self.hub.repositories.get(repo)
        if folder is None:
            return self.not_found("RepoNotFound")
        files = [
            {
                "type": "file",
                "path": str(path.relative_to(folder)),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        if verb in (None, "revision"):
            about = {"id": repo.removeprefix("datasets/"), "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
            return self.send_json({**about, "siblings": [{"rfilename": file["path"]} for file in files]})
        if verb == "paths-info":
            return self.send_json([file for file in files if file["path"] in wanted.get("paths", [])])
        if verb == "tree":
            within = rest.partition("/")[2]
            found = [file for file in files if not within or file["path"].startswith(f"{within}/")]
            return self.send_json(found) if found else self.not_found("EntryNotFound")
        return self.not_found("EntryNotFound")

    def take(self, repo: str, verb: str, rest: str, body: bytes) -> None:
        """A step of an upload: how to send which file, a large file's place, the file itself, and the commit."""
        if verb == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
            files = [
                {"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in zip(paths, modes, strict=True)
            ]
            return self.send_json({"files": files})
        if rest == "objects/batch":
            objects = [
                {**file, "actions": {"upload": {"href": f"{self.hub.url}/{repo}/lfs/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            return self.send_json({"objects": objects})
        if verb == "lfs":
            self.hub.large_files[rest] = body
            return self.send_json({})
        for line in map(json.loads, body.splitlines()):
            file = line["value"]
            if line["key"] != "header":
                path = self.hub.repositories[repo] / file["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                is_large = line["key"] == "lfsFile"
                path.write_bytes(self.hub.large_files[file["oid"]] if is_large else base64.b64decode(file["content"]))
        return self.send_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def send_json(self, content: Any) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def log_message(self, *args: Any) -> None:
        """Say nothing: `Hub.requests` keeps what was asked."""


@contextlib.contextmanager
def serve(repositories: Mapping[str, Path]) -> Iterator[Hub]:
    """A hub on a free port of loopback, for the time of the block."""
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def render_repositories(folder: Path, rows: int = 48) -> dict[str, Path]:
    """What the paper's commands fetch, small: SAT and CV-Bench as `open_r1.world` draws them, and a tiny base model.

    The model is the quick start's base, with the chat template without roles and the image bounds that the published
    Qwen2-VL-2B comes with.
    """
    from open_r1.base.errors import REPO_ROOT
    from open_r1.world.parquet import write_cvbench, write_sat
    from open_r1.world.scene import LEVELS

    easy = LEVELS["easy"]
    sat, cvbench, model = folder / "SAT", folder / "CV-Bench", folder / "Qwen2-VL-2B"
    for seed, fold in enumerate(("train", "val", "test")):
        write_sat(sat / f"SAT_{fold}.parquet", rows, seed, easy)
    write_cvbench(cvbench, rows, 3, easy)
    shutil.copytree(REPO_ROOT / "configs/tiny/base", model)
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    settings = json.loads((model / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
    (model / "processor_config.json").write_text(json.dumps(settings))
    return {"datasets/array/SAT": sat, "datasets/nyu-visionx/CV-Bench": cvbench, "Qwen/Qwen2-VL-2B": model}
