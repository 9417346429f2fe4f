"""A model hub on loopback: the two kinds of requests that a download makes, and faults on demand."""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

PIECE_BYTES = 1 << 20
SLOW_SECONDS = 0.05


@dataclass
class FakeHub:
    """A hub with `files`: by repository ('owner/name'), path -> content.

    `promised` overrides the digest that is stated for a path. `stop_after` cuts each file response after that
    many bytes, and `stall` then waits until it is set; `ignore_ranges` always sends whole files; `status`
    answers everything with an error, explained by `error_code` and `error_message`; `says` answers everything
    with a page of a stranger; a list comes in parts of `page_files` files; the next `corrupt` file responses
    have a wrong byte in the middle; `slow` sends 20 MB/s. `ranges` collects the Range header of each file
    request, `sent` counts the bytes of files that were sent, `strange` collects requests that no download
    should make.
    """

    files: dict[str, dict[str, bytes]]
    promised: dict[str, str] = field(default_factory=dict)
    stop_after: int | None = None
    ignore_ranges: bool = False
    status: int | None = None
    error_code: str = ""
    error_message: str = ""
    says: bytes | None = None
    page_files: int = 1000
    ranges: list[str | None] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    strange: list[str] = field(default_factory=list)
    stall: threading.Event | None = None
    corrupt: int = 0
    slow: bool = False
    sent: int = 0

    def __post_init__(self) -> None:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def use(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Make this the only hub of this process, for a test."""
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1500)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(time, "sleep", lambda _: None)  # the library waits between tries

    def close(self) -> None:
        """Stop; closing twice is harmless."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.tokens.add(request.headers["Authorization"])
        path = [*unquote(urlsplit(request.path).path).strip("/").split("/"), "", "", ""]
        if self.status:
            explained = {"X-Error-Code": self.error_code, "X-Error-Message": self.error_message}
            self._send(request, self.status, b"", explained)
        elif self.says is not None:
            self._send(request, 200, self.says, {"Content-Type": "text/html"})
        elif path[:2] == ["api", "models"] and path[4] == "tree":
            self._send_tree(request, self.files.get("/".join(path[2:4])))
        elif path[2] == "resolve":
            self._send_file(request, self.files["/".join(path[:2])]["/".join(path[4:-3])])
        else:
            self.strange.append(request.path)
            self._send(request, 404, b"", {})

    def _send_tree(self, request: BaseHTTPRequestHandler, files: dict[str, bytes] | None) -> None:
        if files is None:
            self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        entries = [
            {"type": "file", "path": path, "size": len(content)} | self._promise(path, content)
            for path, content in files.items()
        ]
        entries.append({"type": "file", "path": "README.md", "size": 5, "oid": "0" * 40})
        entries.append({"type": "directory", "path": "docs", "oid": "0" * 40})
        url = urlsplit(request.path)
        start = int(parse_qs(url.query).get("cursor", ["0"])[0])
        end = start + self.page_files
        headers = {"Content-Type": "application/json"}
        if end < len(entries):
            headers["Link"] = f'<{self.endpoint}{url.path}?recursive=true&cursor={end}>; rel="next"'
        self._send(request, 200, json.dumps(entries[start:end]).encode(), headers)

    def _promise(self, path: str, content: bytes) -> dict:
        """The digests of a file: git's own for JSON files, which are in git, SHA-256 for all others."""
        promised = self.promised.get(path)
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if path.endswith(".json"):
            return {"oid": promised or blob}
        lfs = {
            "oid": promised or hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 130,
        }
        return {"oid": blob, "lfs": lfs}

    def _send_file(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        asked = request.headers["Range"]
        self.ranges.append(asked)
        if asked and not self.ignore_ranges:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            last = min(int(end or len(content)), len(content) - 1)
            where = {"Content-Range": f"bytes {start}-{last}/{len(content)}"}
            self._send(request, 206, content[int(start) : last + 1], where)
        else:
            self._send(request, 200, content, {})

    def _send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        is_file = "/resolve/" in request.path
        if is_file and self.corrupt:
            self.corrupt -= 1
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        body = body[: self.stop_after] if is_file else body
        for start in range(0, len(body), PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            request.wfile.write(piece)
            self.sent += len(piece) if is_file else 0
            if self.slow:
                threading.Event().wait(SLOW_SECONDS)
        if is_file and self.stall:
            self.stall.wait(60)
