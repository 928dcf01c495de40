"""A small hub on loopback: repositories from a folder, as `huggingface_hub` and `datasets` ask for them.

    root/models/owner/name/…     root/datasets/owner/name/…

One commit a repository. A repository whose name starts with `gated` answers as one whose terms
nobody has accepted; `reachable = False` cuts every connection, as a network that is gone does.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", COMMIT, "v1")


class Hub(ThreadingHTTPServer):
    """`asked`: (method, path) of every request."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.reachable, self.asked = root, True, list[tuple[str, str]]()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def environment(self, caches: Path) -> dict[str, str]:
        """For a process that asks this hub and keeps what it gets in `caches`."""
        environment = os.environ | {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(caches / "hf"),
            "XDG_CACHE_HOME": str(caches / "cache"),
            "NO_PROXY": "127.0.0.1",
        }
        environment.pop("HF_HUB_OFFLINE", None)  # what every other test has
        return environment


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serves `root` until the block ends."""
    hub = Hub(root)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def _gated(name: str) -> bool:
    return name.split("/")[1].startswith("gated")


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        if self.server.reachable:
            super().handle_one_request()
        else:
            self.close_connection = True

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        if path == "/":
            return self._json({})
        if parts[0] == "api" and len(parts) >= 4:
            return self._api(parts[1], "/".join(parts[2:4]), parts[4:], body)
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._error(404, "RepoNotFound")

    def _repository(self, kind: str, name: str, revision: str) -> Path | None:
        folder = self.server.root / kind / name
        if not folder.is_dir():
            self._error(401, "RepoNotFound")
        elif revision not in REVISIONS:
            self._error(404, "RevisionNotFound")
        else:
            return folder
        return None

    def _api(self, kind: str, name: str, rest: list[str], body: bytes) -> None:
        what, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        folder = self._repository(kind, name, revision)
        if folder is None:
            return
        files = [self._entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
        if rest == ["auth-check"]:
            self._error(403, "GatedRepo") if _gated(name) else self._json({})
        elif what == "revision":
            self._json({"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                        "downloads": 0, "likes": 0, "tags": [],
                        "siblings": [{"rfilename": file["path"]} for file in files]})  # fmt: skip
        elif what == "tree":
            under = "/".join(rest[2:])
            self._json([file for file in files if file["path"].startswith(f"{under}/" if under else "")])
        elif what == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            if self.headers.get("Content-Type", "").startswith("application/json"):
                wanted = json.loads(body)["paths"]
            self._json([file for file in files if file["path"] in wanted])
        else:
            self._error(404, "EntryNotFound")

    def _entry(self, folder: Path, path: Path) -> dict[str, Any]:
        oid = hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
        return {
            "type": "file",
            "oid": oid,
            "size": path.stat().st_size,
            "path": str(path.relative_to(folder)),
        }

    def _file(self, kind: str, name: str, revision: str, filename: str) -> None:
        folder = self._repository(kind, name, revision)
        if folder is None:
            return
        if _gated(name):
            return self._error(403, "GatedRepo")
        path = folder / filename
        if not path.is_file():
            return self._error(404, "EntryNotFound")
        content = path.read_bytes()
        headers = {"ETag": f'"{self._entry(folder, path)["oid"]}"', "X-Repo-Commit": COMMIT}
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            return self._send(206, content[int(first) : end], headers)
        self._send(200, content, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
