"""Server of one repository with the Hub's protocol, which can break off downloads and send wrong contents."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", COMMIT)
LARGE_FILES = (".safetensors", ".model")
"""Ends of the names of files that the Hub keeps in its storage."""


@dataclass(frozen=True)
class Request:
    """One HTTP request. ``start`` is the first byte of the requested range."""

    method: str
    path: str
    start: int = 0


@dataclass
class Hub:
    """State of the server: the repository's files, the requests received so far, and the faults to produce."""

    repo: str
    files: dict[str, bytes]
    requests: list[Request] = field(default_factory=list)
    break_offsets: dict[str, list[int]] = field(default_factory=dict)
    """Numbers of bytes after which the next responses with a file break off, one per response, by file name."""
    wrong_contents: dict[str, bytes] = field(default_factory=dict)
    """Contents that are sent with the checksum of the right contents, by file name."""
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """URL to which requests for large files are redirected. Its host name is another one, as on the Hub."""
        return f"http://localhost:{self.port}"

    @property
    def fetched(self) -> set[str]:
        """Names of the files whose contents were requested."""
        return {request.path.split("/")[-1] for request in self.requests if request.method == "GET"} & set(self.files)

    def ranges(self, name: str) -> list[int]:
        """Return the first byte of the range of each request for the file's contents."""
        requests = (request for request in self.requests if request.method == "GET")
        return [request.start for request in requests if request.path.endswith(f"/{name}")]


@contextmanager
def serve_hub(repo: str, folder: Path) -> Iterator[Hub]:
    """Serve the files of ``folder`` as ``repo`` until the context ends."""
    hub = Hub(repo, {path.name: path.read_bytes() for path in folder.iterdir()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        """Answer /api/models/OWNER/NAME[/revision/REVISION], /OWNER/NAME/resolve/REVISION/FILE and /storage/FILE."""
        path = unquote(urlsplit(self.path).path)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.hub.requests.append(Request(self.command, path, start))
        match path.strip("/").split("/"):
            case ["storage", *_, file]:
                self._send_file(file, start)
            case ["api", "models", owner, name, *_] | [owner, name, *_] if f"{owner}/{name}" != self.hub.repo:
                if "gated" in path:
                    self._refuse(403, "GatedRepo")
                else:
                    self._refuse(401, "RepoNotFound")
            case ["api", "models", _, _, "revision", revision] | [_, _, "resolve", revision, _] if (
                revision not in REVISIONS
            ):
                self._refuse(404, "RevisionNotFound")
            case ["api", *_]:
                self._send_listing()
            case [*_, file] if file not in self.hub.files:
                self._refuse(404, "EntryNotFound")
            case [*_, file] if file.endswith(LARGE_FILES):
                self._redirect_to_storage(file)
            case [*_, file]:
                self._send_file(file, start)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": COMMIT})

    def _send_listing(self) -> None:
        siblings = []
        for name, data in self.hub.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if name.endswith(LARGE_FILES):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        listing = {"id": self.hub.repo, "modelId": self.hub.repo, "sha": COMMIT, "siblings": siblings, "tags": []}
        self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _redirect_to_storage(self, name: str) -> None:
        data = self.hub.files[name]
        headers = {
            "Location": f"{self.hub.storage}/storage/{name}",
            "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
            "X-Repo-Commit": COMMIT,
            "ETag": '"pointer"',
        }
        self._send(302, b"", headers)

    def _send_file(self, name: str, start: int) -> None:
        data = self.hub.wrong_contents.get(name, self.hub.files[name])
        headers = {"ETag": f'"{hashlib.sha1(self.hub.files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
        status = 200
        if start:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        break_offsets = self.hub.break_offsets.get(name, [])
        body = data[start:]
        break_offset = break_offsets.pop(0) if break_offsets and self.command == "GET" else len(body)
        self._send(status, body, headers, break_offset)

    def _send(self, status: int, body: bytes, headers: dict[str, str], break_offset: int | None = None) -> None:
        """Send an answer with the length of ``body``, but only the bytes before ``break_offset``."""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:break_offset])
