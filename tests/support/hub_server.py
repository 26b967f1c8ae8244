"""A small Hugging Face Hub on the loopback interface, for the real client; and the Hub's cache, laid out by hand."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/([^/?]+))?")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


def commit_of(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill_cache(cache: Path, repo_id: str, revisions: dict[str, Path], kind: str = "models") -> dict[str, str]:
    """Lay a repository out as huggingface_hub does (blobs, snapshots of links to them, refs); return the commits."""
    storage = cache / f"{kind}--{repo_id.replace('/', '--')}"
    (storage / "blobs").mkdir(parents=True)
    (storage / "refs").mkdir()
    commits = {}
    for revision, folder in revisions.items():
        files = read_files(folder)
        commits[revision] = commit_of(files)
        (storage / "refs" / revision).write_text(commits[revision])
        for name, content in files.items():
            blob = storage / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            link = storage / "snapshots" / commits[revision] / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(Path("../" * (2 + name.count("/"))) / "blobs" / blob.name)
    return commits


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    status: int = 0
    sent: int = 0  # bytes of the body that were sent

    @property
    def is_download(self) -> bool:
        return self.method == "GET" and "/resolve/" in self.path


@dataclass
class Hub:
    """Repositories, the requests for them, and the failures to simulate."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)  # file -> bytes after which the connection breaks, once
    on_request: dict[str, Callable[[], None]] = field(default_factory=dict)  # path -> what happens then
    connections: set[socket.socket] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        self.request_log = Request(self.command, path, self.headers.get("Range"))
        self.hub.requests.append(self.request_log)
        self.hub.on_request.get(path, lambda: None)()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.hub.repos.setdefault(repo_id, {})
            return self.send_json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id})
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if match := _RESOLVE.fullmatch(path):
            repo_id, revision, name = match.groups()
            if self.may_see(repo_id, revision):
                self.send_file(repo_id, name)
        elif match := _API.match(path):
            repo_id, what, revision = match.groups()
            if self.may_see(repo_id, revision or "main"):
                self.answer_api(repo_id, what, body)
        else:
            self.send_error_code(404, "")

    def may_see(self, repo_id: str, revision: str) -> bool:
        if repo_id not in self.hub.repos:
            self.send_error_code(404, "RepoNotFound")
        elif repo_id in self.hub.gated:
            self.send_error_code(403, "GatedRepo")
        elif revision not in ("main", commit_of(self.hub.repos[repo_id])):
            self.send_error_code(404, "RevisionNotFound")
        else:
            return True
        return False

    def answer_api(self, repo_id: str, what: str | None, body: bytes) -> None:
        files = self.hub.repos[repo_id]
        if what == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            self.send_json(entries)
        elif what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self.send_json(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        elif what == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "header":
                    self.hub.commits.append(line["value"])
                else:
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = commit_of(files)
            url = f"{self.hub.url}/{repo_id}/commit/{commit}"
            self.send_json({"success": True, "commitOid": commit, "commitUrl": url})
        else:
            siblings = [{"rfilename": name} for name in files]
            self.send_json({"id": repo_id, "sha": commit_of(files), "siblings": siblings, "private": False})

    def send_file(self, repo_id: str, name: str) -> None:
        files = self.hub.repos[repo_id]
        if name not in files:
            return self.send_error_code(404, "EntryNotFound", commit_of(files))
        content, start, status = files[name], 0, 200
        if match := _RANGE.fullmatch(self.headers.get("Range") or ""):
            start, status = int(match[1]), 206
        part = content[start : int(match[2]) + 1 if match and match[2] else None]
        self.send_response(status)
        self.request_log.status = status
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit_of(files))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            if name in self.hub.cut:
                part, self.close_connection = part[: self.hub.cut.pop(name)], True
            self.request_log.sent = len(part)
            self.wfile.write(part)

    def send_json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.request_log.status = 200
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_error_code(self, status: int, code: str, commit: str | None = None) -> None:
        self.request_log.status = status
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serve(hub: Hub) -> Iterator[ThreadingHTTPServer]:
    """Answer on 127.0.0.1 until the block ends (or the server is shut down)."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        for connection in hub.connections:  # including those that clients keep open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join()
