"""A hub on loopback: enough of its HTTP interface for huggingface_hub to download from and to upload to."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants

COMMIT = "1" * 40


class Hub:
    """Serves a folder's files as every repository's, and keeps what is sent to it.

    The next download of the file called `cut` breaks off half-way. Uploads that begin with `stuck` never end, and those
    that begin with `spoilt` are refused. Whoever sends another token than `token` may not write.
    """

    token = "hf_of_the_test"

    def __init__(self, folder: Path):
        self.folder, self.cut = folder, ""
        self.stuck = self.spoilt = b"nothing begins like this"
        self.made: list[dict] = []
        self.branches: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.asked_to_put: list[str] = []
        self.commits: list[dict[str, bytes]] = []
        self.revisions: list[str] = []
        self.ranges: list[str] = []
        self.sent = 0


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Hub]]:
    """The address of a hub with one repository, and what was asked of it."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listed(file: Path) -> dict:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "2" * 40}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle(self):
        with suppress(ConnectionError):  # of whoever was killed while sending
            super().handle()

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def do_POST(self):
        data = self._body()
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._json({"error": "this token may not write"}, 403)
        if path == "/api/repos/create":
            exists = bool(self.hub.made)
            self.hub.made.append(json.loads(data))
            return self._json({"url": f"{self._address}/org/tiny"}, 409 if exists else 200)
        if "/branch/" in path:
            self.hub.branches.append(path.partition("/branch/")[2])
            return self._json({})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if "/preupload/" in path:
            kinds = [(file["path"], file["path"].endswith(".safetensors")) for file in json.loads(data)["files"]]
            files = [{"path": p, "uploadMode": "lfs" if big else "regular", "shouldIgnore": False} for p, big in kinds]
            return self._json({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            return self._json({"transfer": "basic", "objects": list(map(self._wanted, json.loads(data)["objects"]))})
        if "/commit/" in path:
            return self._commit([json.loads(line) for line in data.splitlines()])
        return self._json({"error": "not found"}, 404)

    def do_PUT(self):
        self.hub.asked_to_put.append(self.path)
        length = int(self.headers["Content-Length"])
        start = self.rfile.read(min(length, 64))
        if self.hub.stuck in start:
            self.close_connection = True
            self.rfile.read()  # until whoever sends is gone
            return
        data = start + self.rfile.read(length - len(start))
        if self.hub.spoilt in start:
            return self._json({"error": "the line was bad"}, 400)
        self.hub.blobs[hashlib.sha256(data).hexdigest()] = data
        self._json({})

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _wanted(self, told: dict) -> dict:
        upload = {"actions": {"upload": {"href": f"{self._address}/lfs/{told['oid']}"}}}
        return {"oid": told["oid"], "size": told["size"]} | ({} if told["oid"] in self.hub.blobs else upload)

    def _commit(self, lines: list[dict]) -> None:
        files = {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.blobs[line["value"]["oid"]]
        self.hub.commits.append(files)
        self._json({"commitUrl": f"{self._address}/org/tiny/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def _answer(self, body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        if "/resolve/" in path:
            name = path.split("/resolve/")[1].partition("/")[2]
            return self._file(self.hub.folder / name, body)
        if path.startswith("/api/") and "/revision/" in path:
            self.hub.revisions.append(path.partition("/revision/")[2])
            if self.hub.revisions[-1] == "unknown":
                return self._json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/") and "/tree/" in path:
            return self._json([_listed(file) for file in sorted(self.hub.folder.iterdir())])
        if path.startswith("/api/"):
            files = [{"rfilename": file.name} for file in sorted(self.hub.folder.iterdir())]
            return self._json({"id": "org/tiny", "sha": COMMIT, "siblings": files, "private": False, "tags": []})
        self._json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _json(self, data, status=200, headers=None) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(text), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text)

    def _file(self, file: Path, body: bool) -> None:
        if not file.is_file():
            return self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
        data, asked = file.read_bytes(), self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0] or 0) if asked and body else 0
        if asked and body:
            self.hub.ranges.append(asked)
        self.send_response(206 if start else 200)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers |= {"Content-Length": len(data) - start}
        headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if not body:
            return
        if file.name == self.hub.cut:
            self.hub.cut = ""
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.close()  # the line goes dead
            return
        self.hub.sent += len(data) - start
        self.wfile.write(data[start:])


@contextmanager
def spoken_to(folder, monkeypatch):
    """The hub that huggingface_hub speaks to, and what was sent to it."""
    folder.mkdir()
    with serving(folder) as (address, hub):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        hub.address = address
        yield hub
