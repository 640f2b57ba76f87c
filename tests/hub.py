"""A hub on this machine, with one repository, one that is gated and one that is out of order; and a filled cache."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, files: Mapping[str, bytes], *arguments: Any) -> None:
        self.files = files
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if self.path.endswith("/auth-check"):
            self._answer(403, error="GatedRepo")
        elif "down" in self.path:
            self._answer(503)
        elif self.path.startswith("/api/models/owner/name/tree/"):
            self._answer(
                200, json.dumps([{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in self.files]).encode()
            )
        elif self.path.startswith(("/api/models/owner/name", "/api/models/owner/gated")):
            info = {"id": "owner/name", "sha": COMMIT, "gated": "auto" if "gated" in self.path else False}
            self._answer(200, json.dumps({**info, "siblings": [{"rfilename": name} for name in self.files]}).encode())
        elif self.path.startswith("/owner/name/resolve/"):
            name = self.path.removeprefix("/owner/name/resolve/").partition("/")[2]
            self._answer(200, self.files[name]) if name in self.files else self._answer(404, error="EntryNotFound")
        else:
            self._answer(401, error="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", error: str | None = None) -> None:
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        for name, value in {"Content-Length": len(body), "ETag": f'"{hash(body):x}"', "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def serve_hub(files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a hub where owner/name holds those files."""
    with HTTPServer(("127.0.0.1", 0), partial(_Handler, files)) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def fill_cache(cache: Path, folder: Path, subfolder: str = "", name: str = "name") -> Path:
    """Leave a folder in a cache as the hub's library leaves owner/NAME."""
    repository = cache / f"models--owner--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT / subfolder
    shutil.copytree(folder, snapshot)
    return snapshot
