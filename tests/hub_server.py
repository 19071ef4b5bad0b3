"""A hub on this machine that knows as much of the real one's interface as moving small files up and down needs."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_planted_token_of_this_test"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """What was uploaded, and what is to go wrong."""

    def __init__(self) -> None:
        """Listen on a free port."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        """Content by path, by ``kind/user/name`` of the repository."""
        self.created: list[dict] = []
        self.commits: list[list[str]] = []
        self.refuse: dict[str, int] = {}
        """Status to answer with, by a pattern of the request's path or of the uploaded one's."""

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self._refused(self.path):
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created.append(asked)
            name = f"{asked.get('type') or 'model'}s/{asked['organization']}/{asked['name']}"
            self.server.files.setdefault(name, {})
            self._answer({"url": f"{self.server.endpoint}/{asked['organization']}/{asked['name']}"})
            return
        _, repository, action, _ = re.fullmatch(r"/(api)/(.*)/(preupload|commit)/(.*)", self.path).groups()
        if action == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": files})
            return
        lines = [json.loads(line) for line in body.splitlines()]
        added = {
            one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"
        }
        if not any(self._refused(path) for path in added):
            self.server.files[repository] |= added
            self.server.commits.append(sorted(added))
            self._answer(
                {
                    "commitUrl": f"{self.server.endpoint}/{repository}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )

    def do_GET(self) -> None:
        if self._refused(self.path):
            return
        if about := re.fullmatch(r"/api/(.*?)/(revision|tree)/.*", self.path):
            files = self.server.files[about[1]]
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in files.items()
            ]
            siblings = [{"rfilename": name} for name in files]
            self._answer(tree if about[2] == "tree" else {"id": about[1], "sha": COMMIT, "siblings": siblings})
            return
        repository, name = re.fullmatch(r"/(.*)/resolve/[^/]*/(.*)", self.path).groups()
        content = self.server.files[f"models/{repository}"][name]
        self._answer(content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _refused(self, path: str) -> bool:
        status = next((status for pattern, status in self.server.refuse.items() if re.search(pattern, path)), None)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            # as careless a proxy might
            self._answer({"error": f"not now, {self.headers['Authorization']}"}, status=status)
        return status is not None

    def _answer(
        self, content: dict | list | bytes, headers: dict[str, str] | None = None, *, status: int = 200
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
