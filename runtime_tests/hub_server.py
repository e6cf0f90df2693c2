"""A stand-in for the Hugging Face hub on 127.0.0.1: it takes commits and LFS uploads, and keeps the bytes.

The protocol is that of huggingface_hub 2.4: /api/repos/create, preupload, git-lfs batch with basic and multipart
transfers, and commits as JSON lines.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_standin"
REGULAR_LIMIT = 20_000
"""Bytes from which on a file goes the LFS way."""
PART = 300_000
"""Bytes of one part of a multipart upload."""
RESET = 0
"""In `Hub.faults`, in place of a status: drop the connection."""


@dataclass
class Hub:
    """What the server holds, and how it misbehaves."""

    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    """(repository, branch) -> path -> content."""
    visibility: dict[str, str | None] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS content by the sha256 its uploader states."""
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    """Part of a request's path -> the status it is answered with, or `RESET`."""
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def sha256(self, repo: str, branch: str = "main") -> dict[str, str]:
        """Of every file of a branch."""
        files = self.branches[repo, branch]
        return {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}


def create(hub: Hub, body: bytes, _: re.Match[str]) -> Any:
    """A new repository; 409 if it exists."""
    asked = json.loads(body)
    repo = f"{asked['organization']}/{asked['name']}"
    if repo in hub.visibility:
        return 409, {"url": f"{hub.url}/{repo}", "error": "exists"}
    hub.visibility[repo] = asked.get("visibility")
    hub.branches[repo, "main"] = {}
    return 200, {"url": f"{hub.url}/{repo}"}


def validate_card(_: Hub, body: bytes, __: re.Match[str]) -> Any:
    """What is wrong with a model card's metadata."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(json.loads(body)["content"])
    except Exception as error:  # whatever its parser raises
        return 400, {"errors": [{"message": str(error)}], "warnings": []}
    return 200, {"errors": [], "warnings": []}


def branch(hub: Hub, _: bytes, match: re.Match[str]) -> Any:
    """A new branch of a repository."""
    hub.branches[match[1], unquote(match[2])] = {}
    return 200, {}


def preupload(_: Hub, body: bytes, match: re.Match[str]) -> Any:
    """Which files go into the commit itself and which to LFS."""
    files = json.loads(body)["files"]
    mode = {True: "lfs", False: "regular"}
    return 200, {
        "files": [
            {"path": file["path"], "uploadMode": mode[file["size"] > REGULAR_LIMIT], "shouldIgnore": False}
            for file in files
        ]
    }


def batch(hub: Hub, body: bytes, _: re.Match[str]) -> Any:
    """Where the LFS objects are to be put: in parts if they are large."""
    return 200, {"objects": [_upload(hub, asked["oid"], asked["size"]) for asked in json.loads(body)["objects"]]}


def _upload(hub: Hub, oid: str, size: int) -> dict[str, Any]:
    verify = {"href": f"{hub.url}/verify"}
    if size <= PART:
        return {"oid": oid, "size": size, "actions": {"upload": {"href": f"{hub.url}/lfs/{oid}"}, "verify": verify}}
    numbers = range(1, -(-size // PART) + 1)
    header = {"chunk_size": str(PART), **{str(n): f"{hub.url}/lfs/{oid}/{n}" for n in numbers}}
    upload = {"href": f"{hub.url}/complete/{oid}", "header": header}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}


def put(hub: Hub, body: bytes, match: re.Match[str]) -> Any:
    """An LFS object, or a part of one."""
    if match[2] is None:
        hub.objects[match[1]] = body
    else:
        hub.parts.setdefault(match[1], {})[int(match[2])] = body
    return 200, {}


def complete(hub: Hub, body: bytes, match: re.Match[str]) -> Any:
    """Put the parts together in the order of the list that was sent."""
    numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
    hub.objects[match[1]] = b"".join(hub.parts[match[1]][number] for number in numbers)
    return 200, {}


def verify(hub: Hub, body: bytes, _: re.Match[str]) -> Any:
    """Whether an object has arrived as announced."""
    asked = json.loads(body)
    content = hub.objects.get(asked["oid"], b"")
    good = hashlib.sha256(content).hexdigest() == asked["oid"] and len(content) == asked["size"]
    return (200, {}) if good else (422, {"error": "content does not match its sha256"})


def commit(hub: Hub, body: bytes, match: re.Match[str]) -> Any:
    """Files, in the commit or by LFS, onto a branch."""
    files = hub.branches[match[1], unquote(match[2])]
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
    oid = hashlib.sha1(body, usedforsecurity=False).hexdigest()
    return 200, {"commitUrl": f"{hub.url}/{match[1]}/commit/{oid}", "commitOid": oid, "success": True}


# (method and path) -> what answers; answers are (status, JSON)
ROUTES: dict[str, Callable[[Hub, bytes, re.Match[str]], Any]] = {
    r"POST /api/repos/create": create,
    r"POST /api/validate-yaml": validate_card,
    r"POST /api/models/([^/]+/[^/]+)/branch/([^/]+)": branch,
    r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)": preupload,
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": batch,
    r"PUT /lfs/(\w+)(?:/(\d+))?": put,
    r"POST /complete/(\w+)": complete,
    r"POST /verify": verify,
    r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)": commit,
}


class Handler(BaseHTTPRequestHandler):
    """One request: authorized (but for presigned uploads), perhaps made to fail, and answered by its route."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """Read the request and answer it."""
        body = self.body()
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        fault = next((status for part, status in self.hub.faults.items() if part in path), None)
        if fault == RESET:
            # SO_LINGER with time 0 makes close() send a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        presigned = path.startswith(("/lfs/", "/complete/"))
        if fault is not None:
            self.reply(fault, {"error": "made to fail"})
        elif not presigned and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid credentials"})
        else:
            self.reply(*self.routed(path, body))

    def routed(self, path: str, body: bytes) -> tuple[int, Any]:
        """The answer of the route that matches."""
        for pattern, route in ROUTES.items():
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                status, content = route(self.hub, body, match)
                return status, content
        return 404, {"error": f"the stand-in does not know {self.command} {path}"}

    def body(self) -> bytes:
        """The request's content, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, status: int, content: Any) -> None:
        """JSON with a status and an ETag, which multipart uploads collect."""
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"etag"')
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr; `Hub.requests` has them."""


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that listens until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
