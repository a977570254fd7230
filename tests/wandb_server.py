"""A server on loopback that speaks as much of W&B's protocol as a run, `wandb sync` and a workspace need.

It keeps what the client sends: every GraphQL operation's variables, the lines of each run's file stream, its files.
Use: `with serving() as server:`, then point the real client at it with WANDB_BASE_URL=server.url and KEY.
"""

import contextlib
import gzip
import itertools
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

KEY = "f" * 40
ENTITY = "tester"
PERSON = {"id": "VQ==", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "t@example.org", "flags": "{}"}


class Server(ThreadingHTTPServer):
    """What arrived: `operations` by GraphQL name, `streams` by run id and file, `files` by name, `unknown` names."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.operations: dict[str, list[dict]] = defaultdict(list)
        self.streams: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
        self.ends: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.views: dict[str, dict] = {}
        self.unknown: list[str] = []
        self.keys: set[str | None] = set()
        self.ids = itertools.count(1)

    def lines(self, run: str, file: str = "wandb-history.jsonl") -> list[dict]:
        """The JSON lines of one file of a run's stream, in their order."""
        return [json.loads(line) for _, line in sorted(self.streams[run][file].items())]

    def answer(self, operation: str, given: dict) -> dict | None:
        """The `data` of one GraphQL operation; None for one that is not known here."""
        self.operations[operation].append(given)
        known = getattr(self, f"on_{operation}", None)
        return known and known(given)

    def on_Viewer(self, given):
        return {"viewer": PERSON | {"teams": {"edges": [{"node": {"name": ENTITY}}]}, "apiKeys": {"edges": []}}}

    def on_GetDefaultEntity(self, given):
        return {"viewer": PERSON}

    def on_ServerFeaturesQuery(self, given):
        return {"serverInfo": {"features": []}}

    def on_OrganizationCoreWeaveOrganizationID(self, given):
        return {"entity": {"organization": None}}

    def on_ArtifactType(self, given):
        return {"project": {"artifact": None}}  # none of that name yet, so any type will do

    def on_RunResumeStatus(self, given):
        return {"model": {"id": "p", "name": given["project"], "entity": {"id": "e", "name": ENTITY}, "bucket": None}}

    def on_UpsertBucket(self, given):
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": ENTITY}}
        bucket = {"id": f"id-{given['name']}", "name": given["name"], "displayName": given.get("displayName")}
        bucket |= {"project": project, "sweepName": None, "historyLineCount": 0, "config": given.get("config")}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def on_CreateRunFiles(self, given):
        files = [{"name": name, "uploadUrl": self.storage(name)} for name in given["files"]]
        return {"createRunFiles": {"runID": f"id-{given['run']}", "uploadHeaders": [], "files": files}}

    def on_MarkRunFilesUploaded(self, given):
        return {"markRunFilesUploaded": {"success": True}}

    def on_NotifyScriptableRunAlert(self, given):
        return {"notifyScriptableRunAlert": {"success": True}}

    def on_XXHashDigestsEnabled(self, given):
        return {"entity": {"xxhashDigestsEnabled": False}}

    def on_CreateArtifact(self, given):
        sequence = {"id": "s", "name": given["input"].get("artifactCollectionName", ""), "latestArtifact": None}
        artifact = {"id": f"artifact-{next(self.ids)}", "state": "PENDING", "digest": given["input"]["digest"]}
        return {"createArtifact": {"artifact": artifact | {"artifactSequence": sequence, "versionIndex": 0}}}

    def on_CreateArtifactManifest(self, given):
        file = {"id": "f", "name": given["name"], "displayName": given["name"], "uploadHeaders": []}
        file |= {"uploadUrl": self.storage(f"manifests/{next(self.ids)}/{given['name']}")}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"manifest-{next(self.ids)}", "file": file}}}

    def on_UpdateArtifactManifest(self, given):
        file = {"id": "f", "name": "m", "displayName": "m", "uploadHeaders": []}
        file |= {"uploadUrl": self.storage(f"manifests/{given['artifactManifestID']}")}
        return {"updateArtifactManifest": {"artifactManifest": {"id": given["artifactManifestID"], "file": file}}}

    def on_CreateArtifactFiles(self, given):
        nodes = []
        for spec in given["input"]["artifactFiles"]:
            node = {"id": f"file-{next(self.ids)}", "name": spec["name"], "displayName": spec["name"]}
            node |= {"uploadUrl": self.storage(f"artifacts/{spec['artifactID']}/{spec['name']}"), "uploadHeaders": []}
            node |= {"storagePath": spec["name"], "uploadMultipartUrls": None}
            nodes.append({"node": node | {"artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def on_CommitArtifact(self, given):
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}

    def on_UpsertView2(self, given):
        view = {"id": given.get("id") or f"view-{next(self.ids)}", "name": given["name"]}
        new = view["id"] not in self.views
        self.views[view["id"]] = given | view
        return {"upsertView": {"view": view, "inserted": new}}

    def on_View(self, given):
        found = [view for view in self.views.values() if view["name"] == given["viewName"]]
        return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}

    def storage(self, name: str) -> str:
        return f"{self.url}/storage/{name}"


class Handler(BaseHTTPRequestHandler):
    """/graphql, /files/<entity>/<project>/<run>/file_stream, and uploads under /storage."""

    server: Server

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.server.keys.add(self.headers.get("Authorization"))
        if self.path.endswith("/graphql"):
            self.graphql(json.loads(self.body()))
        elif self.path.endswith("/file_stream"):
            self.stream(unquote(self.path).split("/")[-2], json.loads(self.body()))
        else:
            self.send({})

    def do_PUT(self):
        self.server.files[unquote(self.path).removeprefix("/storage/")] = self.body()
        self.send({})

    def do_GET(self):
        self.send({})

    def graphql(self, asked: dict) -> None:
        name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
        data = self.server.answer(name, asked.get("variables") or {})
        if data is None:
            self.server.unknown.append(name)
            self.send({"errors": [{"message": f"no such operation here: {name}"}]}, 400)
        else:
            self.send({"data": data})

    def stream(self, run: str, sent: dict) -> None:
        for file, part in (sent.get("files") or {}).items():
            for i, line in enumerate(part["content"]):
                self.server.streams[run][file][part["offset"] + i] = line
        if sent.get("complete"):
            self.server.ends[run] = sent
        self.send({})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            content = b"".join(parts)
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        return content

    def send(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server that answers from a thread until the block ends."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
