"""Models from a hub that runs on this machine: what it gives is trained, what it refuses is one line within seconds."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from preftune import embedded

pytestmark = pytest.mark.slow
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """One repository, tiny/model, and others that are refused in the ways in which the hub refuses."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    cut = False  # whether a download breaks off in the middle

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.partition("?")[0].strip("/")
        repo = path.removeprefix("api/models/").removeprefix("datasets/")
        if repo.startswith("slow/"):
            time.sleep(60)
        elif repo.startswith("private/"):
            self.answer(401, body, {"X-Error-Message": "Invalid username or password."})
        elif repo.startswith("gated/") and "/resolve/" in repo:
            self.answer(403, body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif not repo.startswith(("tiny/model", "gated/model")):
            self.answer(404, body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif "/resolve/" in repo:
            revision, _, name = repo.partition("/resolve/")[2].partition("/")
            self.file(revision, name, body)
        else:
            self.about(repo.partition("/revision/")[2] or "main", body)

    def about(self, revision, body):
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self.answer(404, body, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev"})
        known = {"id": "tiny/model", "sha": commit, "siblings": [{"rfilename": name} for name in self.files]}
        if "/tree/" in self.path:
            known = [{"type": "file", "path": n, "size": len(t), "oid": commit} for n, t in self.files.items()]
        self.answer(200, body, {"Content-Type": "application/json"}, json.dumps(known).encode())

    def file(self, revision, name, body):
        commit = COMMITS.get(revision, revision)
        if name not in self.files:
            return self.answer(404, body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = self.files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{len(content)}-{name}"'}
        if type(self).cut and body and name.endswith(".safetensors"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        self.answer(200, body, headers, content)

    def answer(self, code, body, headers, content=b""):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    folder = embedded.folder("embedded://tiny")
    Hub.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def run(typed, small, pairs_file, hub, tmp_path):
    """run(*overrides, offline=…): recipes.dpo with a model of that hub and a cache that starts empty."""

    def start(*overrides, offline="0"):
        given = ["data=file", f"data.path={pairs_file}", "output_dir=run", "train.max_steps=1", "samples=0"]
        environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": offline}
        began = time.monotonic()
        done = typed("recipes.dpo", *small, *given, "model=path", *overrides, **environment)
        assert "Traceback" not in done.stderr, done.stderr
        return done, time.monotonic() - began

    return start


def test_a_model_of_the_hub_is_trained_and_then_without_it(run, tmp_path):
    done, _ = run("model.path=tiny/model", "model.revision=v1")
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "hf").rglob(f"{COMMITS['v1']}/config.json"))
    done, _ = run("model.path=tiny/model", "model.revision=v1", "output_dir=again", offline="1")
    assert done.returncode == 0, done.stderr


REFUSED = {
    "private/model": "no such repository, or a private one",
    "gated/model": "a gated repository",
    "nobody/model": "no such repository, or a private one",
    "slow/model": "not in the local hub cache",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_refuses_is_one_line_in_seconds(run, name):
    done, seconds = run(f"model.path={name}")
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if f"model.path={name}" in line]
    assert REFUSED[name] in line and seconds < 25  # some 8 of them for the imports of two processes


def test_a_revision_that_is_not_there_and_a_cold_cache_are_one_line(run):
    done, _ = run("model.path=tiny/model", "model.revision=nowhere")
    assert done.returncode == 1 and "no such branch, tag or commit" in done.stderr
    done, _ = run("model.path=tiny/model", offline="1")
    assert done.returncode == 1 and "not in the local hub cache" in done.stderr


def test_a_download_that_is_cut_is_one_line_and_goes_on_later(run):
    Hub.cut = True
    try:
        done, _ = run("model.path=tiny/model")
    finally:
        Hub.cut = False
    assert done.returncode == 1 and "did not give all of it" in done.stderr
    done, _ = run("model.path=tiny/model")
    assert done.returncode == 0, done.stderr
