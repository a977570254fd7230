"""A hub on this machine for tests: one model, one data set, repositories that are refused, and what is pushed to it."""

import base64
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
KNOWN = (
    "models/tiny/model",
    "models/gated/model",
    "datasets/tiny/pairs",
    "datasets/gated/pairs",
    "datasets/late/pairs",
)
LARGE = ("model.safetensors",)


class Hub(BaseHTTPRequestHandler):
    """`files` by repository and commit; what is refused is refused by its owner's name, in the hub's own way."""

    protocol_version = "HTTP/1.1"
    files: dict[str, dict[str, bytes]] = {}  # "models/NAME" or "datasets/NAME@COMMIT"
    cut = False  # whether a download breaks off in the middle
    made: dict[str, dict] = {}  # repositories that were created, as they were asked for
    pushed: dict[str, bytes] = {}

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = unquote(urlsplit(self.path).path).strip("/").removeprefix("api/")
        kind, rest = (
            ("datasets", path[9:]) if path.startswith("datasets/") else ("models", path.removeprefix("models/"))
        )
        owner, name, place, revision, file = [*rest.split("/", 4), "", "", "", "", ""][:5]
        repo = f"{kind}/{owner}/{name}"
        if owner == "slow" or owner == "late" and place == "resolve":
            time.sleep(60)
        elif owner == "private":
            self.answer(401, body, {"X-Error-Message": "Invalid username or password."})
        elif owner == "gated" and place == "resolve":
            self.answer(403, body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif repo not in KNOWN and repo not in self.made:
            self.answer(404, body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif (commit := COMMITS.get(revision or "main", revision)) not in COMMITS.values():
            self.answer(404, body, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev"})
        elif place == "resolve":
            self.file(self.of(repo, commit), commit, file, body)
        else:
            self.about(self.of(repo, commit), f"{owner}/{name}", commit, file if place == "tree" else None, body)

    def of(self, repo, commit):
        """The files of a repository: by commit, or the same in all."""
        return self.files.get(f"{repo}@{commit}", self.files.get(repo, {}))

    def about(self, files, name, commit, folder, body):
        known = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        if folder is not None:
            known = [
                {"type": "file", "path": n, "size": len(t), "oid": commit}
                for n, t in files.items()
                if n.startswith(folder)
            ]
        self.json(known, body)

    def file(self, files, commit, name, body):
        if name not in files:
            return self.answer(404, body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{commit[0]}{len(content)}-{name}"'}
        if self.cut and body and name.endswith((".safetensors", ".jsonl")):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        self.answer(200, body, headers, content)

    def do_POST(self):
        path, given = urlsplit(self.path).path.strip("/").removeprefix("api/"), self.body()
        if self.headers.get("Authorization") != "Bearer writer":
            self.answer(
                403 if self.headers.get("Authorization") else 401, True, {"X-Error-Message": "No write access."}
            )
        elif path == "repos/create":
            asked = json.loads(given)
            self.made["models/" + "/".join(filter(None, (asked.get("organization"), asked["name"])))] = asked
            self.json({"url": f"http://{self.headers['Host']}/{asked['organization']}/{asked['name']}"})
        elif "/preupload/" in path:
            files = json.loads(given)["files"]
            for file in files:
                file |= {"uploadMode": "lfs" if file["path"] in LARGE else "regular", "shouldIgnore": False}
            self.json({"files": files})
        elif path.endswith("/objects/batch"):
            objects = json.loads(given)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"http://{self.headers['Host']}/lfs/{each['oid']}"}}
            self.json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            for line in map(json.loads, given.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.pushed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.pushed[value["path"]] = self.pushed.pop(value["oid"])
            page = f"http://{self.headers['Host']}/{'/'.join(path.split('/')[1:3])}/commit/{COMMITS['main']}"
            self.json({"success": True, "commitOid": COMMITS["main"], "commitUrl": page})
        else:
            self.json({})

    def do_PUT(self):
        self.pushed[self.path.rpartition("/")[2]] = self.body()
        self.answer(200, True, {})

    def body(self):
        """What was sent, whether its length was or not."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def json(self, content, body=True):
        self.answer(200, body, {"Content-Type": "application/json"}, json.dumps(content).encode())

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


@contextmanager
def served():
    """The address of a hub that runs as long as this block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
