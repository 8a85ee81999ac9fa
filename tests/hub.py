"""A stand-in of the Hugging Face hub's HTTP interface, as far as stepmask needs it; repositories lie in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"

Files = dict[str, bytes]


@dataclass
class Hub:
    """Repositories: files by name, by branch, by repository."""

    url: str
    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        repository = self.hub.repositories["/".join(parts[2:4])]
        if parts[4] == "branch":
            repository.setdefault(parts[5], dict(repository["main"]))
            return self.answer(200, {})
        if parts[4] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        return self.commit(repository[parts[5]], "/".join(parts[2:4]), body)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repositories:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = {"main": {}}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(name)
        return self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def commit(self, files: Files, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = _commit(files)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def do_HEAD(self) -> None:
        self.resolve()

    def do_GET(self) -> None:
        self.resolve()

    def resolve(self) -> None:
        if self.path.startswith("/api/"):  # what is asked after a refusal
            return self.answer(401, {"error": "Invalid credentials"})
        owner, name, _, revision, file = self.path.strip("/").split("/", 4)
        repository = self.hub.repositories.get(f"{owner}/{name}", {})
        hidden = f"{owner}/{name}" in self.hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if not repository or hidden:
            return self.answer(401, {"error": "Repository not found"}, "RepoNotFound")
        branch = next((files for at, files in repository.items() if revision in (at, _commit(files))), None)
        if branch is None:
            return self.answer(404, {"error": "Revision not found"}, "RevisionNotFound")
        if file not in branch:
            return self.answer(404, {"error": "Entry not found"}, "EntryNotFound")
        etag, content = hashlib.sha256(branch[file]).hexdigest(), branch[file]
        return self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": _commit(branch)})

    def answer(self, status: int, data: dict[str, Any], code: str = "") -> None:
        self.send(status, json.dumps(data).encode(), {"X-Error-Code": code} if code else {})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _commit(files: Files) -> str:
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + files[name])
    return digest.hexdigest()
