"""A stand-in for the Hugging Face hub: the calls that huggingface_hub makes, on repositories in memory."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

OWNER, STRANGER = "hf_owner", "hf_stranger"
USERS = {OWNER: "me", STRANGER: "somebody"}


@dataclass
class Repository:
    """Commits by their hash, and what points at them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, bytes], message: str = "") -> str:
        """Put files on top of a branch, which is made if there is none."""
        whole = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        name = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[name], self.refs[ref] = whole, name
        self.messages.append(message)
        return name

    def at(self, revision: str) -> dict[str, bytes] | None:
        """Files at a branch or commit."""
        return self.commits.get(self.refs.get(revision, revision))


class Hub(ThreadingHTTPServer):
    """Listens on a free port of this machine; `endpoint` is its address."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[repo_id].at(revision)
        assert found is not None
        return found


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class Answer(BaseHTTPRequestHandler):
    """One call. Names of methods and headers are the hub's."""

    server: Hub

    def route(self) -> None:
        self.body = b"".join(self.chunks())
        self.address = urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, answer in ROUTES:
                if verb == method and (found := re.fullmatch(pattern, self.address.path)):
                    content, headers = answer(self, *map(unquote, found.groups()))
                    return self.send(200, content, headers)
            raise Refused(404)
        except Refused as refused:
            self.send(refused.status, str(refused).encode(), refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = route  # noqa: N815 - names of http.server

    def chunks(self) -> Iterator[bytes]:
        """The body, which large uploads send in chunks: the size of each in hexadecimal on a line before it."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def user(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme and token not in USERS:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return USERS.get(token)

    def repository(self, repo_id: str) -> Repository:
        """One that the user may read; of others the hub says that they are not there."""
        user, found = self.user(), self.server.repositories.get(repo_id)
        if found is None or (found.private and user != repo_id.partition("/")[0]):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if found.gated and user != repo_id.partition("/")[0]:
            raise Refused(403, "GatedRepo", "Access to it is restricted")
        return found

    def writable(self, repo_id: str) -> Repository:
        found = self.repository(repo_id)
        if self.user() != repo_id.partition("/")[0]:
            raise Refused(403, message=f"no write access to {repo_id}")
        return found

    def at(self, repo_id: str, revision: str) -> dict[str, bytes]:
        files = self.repository(repo_id).at(revision)
        if files is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files


Answered = tuple[bytes, dict[str, str]]


def plain(value: Any) -> Answered:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}


def create_repo(call: Answer) -> Answered:
    asked, user = json.loads(call.body), call.user()
    if user is None:
        raise Refused(401, message="Invalid username or password.")
    if (owner := asked.get("organization") or user) != user:
        raise Refused(403, message=f"You don't have the rights to create a model under the namespace {owner}")
    repo_id = f"{owner}/{asked['name']}"
    if repo_id not in call.server.repositories:
        made = Repository(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        made.commit("main", {".gitattributes": b""}, "initial commit")
        call.server.repositories[repo_id] = made
    return plain({"url": f"{call.server.endpoint}/{repo_id}"})


def repo_info(call: Answer, repo_id: str) -> Answered:
    found = call.repository(repo_id)
    return plain({"id": repo_id, "private": found.private, "sha": found.refs["main"], "tags": [], "siblings": []})


def revision_info(call: Answer, repo_id: str, revision: str) -> Answered:
    call.at(repo_id, revision)
    found = call.repository(repo_id)
    return plain({"id": repo_id, "private": found.private, "sha": found.refs.get(revision, revision), "tags": []})


def tree(call: Answer, repo_id: str, revision: str) -> Answered:
    files = call.at(repo_id, revision)
    return plain([
        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for path, content in files.items()
    ])  # fmt: skip


def create_branch(call: Answer, repo_id: str, branch: str) -> Answered:
    found = call.writable(repo_id)
    if branch in found.refs:
        raise Refused(409, message="Reference already exists")
    found.refs[branch] = found.refs["main"]
    return plain({})


def validate_yaml(call: Answer) -> Answered:
    front = json.loads(call.body)["content"].split("---\n")[1]
    return plain({"errors": [], "warnings": [] if isinstance(yaml.safe_load(front), dict) else [{"message": "none"}]})


def preupload(call: Answer, repo_id: str, revision: str) -> Answered:
    call.at(repo_id, revision)
    modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular"
             for file in json.loads(call.body)["files"]}  # fmt: skip
    return plain({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]})


def lfs_batch(call: Answer, repo_id: str) -> Answered:
    call.writable(repo_id)
    objects = [
        {**asked, "actions": {"upload": {"href": f"{call.server.endpoint}/lfs/{asked['oid']}"}}}
        for asked in json.loads(call.body)["objects"]
    ]
    return plain({"transfer": "basic", "objects": objects})


def lfs_upload(call: Answer, oid: str) -> Answered:
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise Refused(400)
    call.server.blobs[oid] = call.body
    return b"", {}


def commit(call: Answer, repo_id: str, revision: str) -> Answered:
    found, files, message = call.writable(repo_id), {}, ""
    call.at(repo_id, revision)
    for line in call.body.decode().splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            message = value["summary"]
        elif item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            files[value["path"]] = call.server.blobs[value["oid"]]
    asks = "create_pr=1" in call.address.query
    if asks:
        found.refs["refs/pr/1"] = found.refs[revision]
    name = found.commit("refs/pr/1" if asks else revision, files, message)
    home = f"{call.server.endpoint}/{repo_id}"
    request = f"{home}/discussions/1" if asks else None
    return plain({"commitUrl": f"{home}/commit/{name}", "commitOid": name, "pullRequestUrl": request})


def resolve(call: Answer, repo_id: str, revision: str, path: str) -> Answered:
    files, found = call.at(repo_id, revision), call.repository(repo_id)
    if path not in files:
        raise Refused(404, "EntryNotFound", "Entry not found")
    etag = hashlib.sha256(files[path]).hexdigest()
    return files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": found.refs.get(revision, revision)}


ID = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answered]]] = [
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", f"/api/models/{ID}", repo_info),
    ("GET", f"/api/models/{ID}/revision/([^/]+)", revision_info),
    ("GET", f"/api/models/{ID}/tree/([^/]+)", tree),
    ("POST", f"/api/models/{ID}/branch/([^/]+)", create_branch),
    ("POST", f"/api/models/{ID}/preupload/([^/]+)", preupload),
    ("POST", f"/api/models/{ID}/commit/([^/]+)", commit),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", "/lfs/([0-9a-f]+)", lfs_upload),
    ("GET", f"/{ID}/resolve/([^/]+)/(.+)", resolve),
]
