"""A stand-in for the hub's HTTP API, as far as its client asks it for an upload: repositories,
branches, trees, the check of a card, and a commit with files in it or in large-file storage.

What it knows of each answer is what the client's own code reads of it. It has no Xet storage: the
client is told not to use that.
"""

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

TOKEN = "hf_good"


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    """Branch -> file -> content."""
    commits: list[str] = field(default_factory=list)
    """Their messages."""

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Hub:
    """`fails`: what of a path has the hub hang up. `owners`: whose repositories the token may
    write to."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.owners = {"someone"}
        self.fails = ""
        self.asked: list[str] = []
        self.address = ""

    # One method for each request that is answered: the path's parts, the body.

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.owners:
            raise Refused(403, "You don't have the rights to create a model there")
        url = {"url": f"{self.address}/{name}"}
        if name in self.repositories:
            raise Refused(409, json.dumps(url))
        self.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return url

    def validate(self, body: bytes) -> Any:
        head = json.loads(body)["content"].split("---\n")[1]
        assert "base_model: null" not in head
        return {"errors": [], "warnings": []}

    def info(self, body: bytes, name: str) -> Any:
        return {"id": name, "private": self.repository(name).private, "sha": "0" * 40}

    def branch(self, body: bytes, name: str, branch: str) -> Any:
        branches = self.repository(name).branches
        if branch in branches:
            raise Refused(409, "there already")
        branches[branch] = dict(branches["main"])
        return {}

    def tree(self, body: bytes, name: str, branch: str) -> Any:
        files = self.repository(name).branches[branch]
        return [
            {"type": "file", "path": path, "size": len(content), "oid": oid(path, content)}
            for path, content in files.items()
        ]

    def preupload(self, body: bytes, name: str, branch: str) -> Any:
        files = self.repository(name).branches[branch]
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if is_large(path) else "regular",
                    "shouldIgnore": False,
                    "oid": oid(path, files[path]) if path in files else None,
                }
                for path in (file["path"] for file in json.loads(body)["files"])
            ]
        }

    def batch(self, body: bytes, name: str) -> Any:
        self.repository(name)
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.stored:
                one["actions"] = {"upload": {"href": f"{self.address}/storage/{one['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def store(self, body: bytes, digest: str) -> Any:
        assert hashlib.sha256(body).hexdigest() == digest
        self.stored[digest] = body
        return {}

    def commit(self, body: bytes, name: str, branch: str) -> Any:
        repository = self.repository(name)
        files = dict(repository.branches[branch])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            else:
                files[value["path"]] = self.stored[value["oid"]]
        repository.branches[branch] = files
        number = f"{len(repository.commits):040d}"
        return {"commitUrl": f"{self.address}/{name}/commit/{number}", "commitOid": number}

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Refused(404, "no such repository")
        return self.repositories[name]

    def answer(self, method: str, path: str, body: bytes) -> Any:
        routes: dict[str, Callable[..., Any]] = {
            r"POST /api/repos/create": self.create,
            r"POST /api/validate-yaml": self.validate,
            r"GET /api/models/([^/]+/[^/]+)": self.info,
            r"GET /api/models/([^/]+/[^/]+)/revision/[^/]+": self.info,
            r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)": self.tree,
            r"POST /api/models/([^/]+/[^/]+)/branch/([^/]+)": self.branch,
            r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)": self.preupload,
            r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)": self.commit,
            r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.batch,
            r"PUT /storage/(\w+)": self.store,
        }
        for pattern, method_of in routes.items():
            if found := re.fullmatch(pattern, f"{method} {path}"):
                return method_of(body, *map(unquote, found.groups()))
        raise Refused(404, f"no such path: {path}")


def is_large(path: str) -> bool:
    """Whether a file is kept in large-file storage."""
    return path.endswith(".safetensors")


def oid(path: str, content: bytes) -> str:
    """The name of a file's content: by git, or by the large-file storage."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _respond(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        hub.asked.append(f"{self.command} {path}")
        body = self._body()
        if hub.fails and hub.fails in path:
            self.close_connection = True
            self.connection.close()
            return
        status, content = 200, b""
        if "/storage/" not in path and self.headers.get("authorization") != f"Bearer {TOKEN}":
            status, content = 401, b'{"error": "Invalid username or password."}'
        else:
            try:
                content = json.dumps(hub.answer(self.command, path, body)).encode()
            except Refused as error:
                status, content = error.status, str(error).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_POST = do_PUT = _respond

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, which the client in this process talks to, without waiting between its
    tries."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        server.server_close()
        thread.join()
