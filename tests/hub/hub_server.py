"""A Hugging Face Hub of a few hundred lines on loopback, for tests: repositories, commits, large files, tokens, and faults.

It speaks the routes that huggingface_hub, transformers and datasets use, so that a test goes through the real client. A commit
is applied whole or not at all, as on the Hub. `HubServer.fail` breaks a connection before, or after, a request is served.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repository import DATE, Refusal, Repo, StoredFile, card_errors, entry_of, small_file

PREFIXES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
LARGE = re.compile(r".*\.(safetensors|bin|pt|parquet|arrow|jpg|png)$")
REPO = r"(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"


@dataclass
class Fault:
    method: str
    path: re.Pattern
    moment: str
    times: int


class HubServer:
    """`with HubServer() as hub:`; hub.url, hub.repos, hub.requests, hub.fail(...)."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.variables: dict[str, dict[str, str]] = {}  # of Spaces
        self.tokens = {"hf_writer": ("ann", True), "hf_reader": ("ann", False), "hf_other": ("bob", True)}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.count_down: list = [0, 0, ""]
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method: str, path: str, moment: str, times: int = 1_000_000) -> None:
        """Drop the connection of requests that match: "before" half of the body is read, or "after" all was done; a number is
        an HTTP status to answer with."""
        self.faults.append(Fault(method, re.compile(path), moment, times))

    def fail_from(self, number: int, moment: str, times: int) -> None:
        """Like `fail`, for the request `number` (from 0, counted from now) and `times` - 1 more."""
        self.count_down = [number, times, moment]

    def head(self, name: str, kind: str = "models", revision: str = "main") -> str:
        repo = self.repos[kind, name]
        return repo.resolve(revision)

    def files(self, name: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[kind, name]
        return {path: file.content for path, file in repo.commits[repo.resolve(revision)].items()}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def _serve(self) -> None:
        self.url = urlsplit(self.path)
        self.query = parse_qs(self.url.query)
        fault = self._fault()
        self.hub.requests.append((self.command, self.url.path))
        if fault is not None and fault.moment == "before":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._drop()
        self.body = self._read_body()
        try:
            if fault is not None and fault.moment.isdigit():
                raise Refusal(int(fault.moment), "", "injected")
            answer = self._route()
        except Refusal as refusal:
            content = json.dumps(refusal.body or {"error": refusal.message}).encode()
            names = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            answer = (refusal.status, {name: value for name, value in names.items() if value}, content)
        if fault is not None and fault.moment == "after":
            return self._drop()
        self._send(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _fault(self) -> Fault | None:
        with self.hub.lock:
            self.hub.count_down[0] -= 1
            number, times, moment = self.hub.count_down
            if -times - 1 < number < 0:
                return Fault(self.command, re.compile(""), moment, 1)
        for fault in self.hub.faults:
            if fault.times > 0 and fault.method == self.command and fault.path.search(self.url.path):
                fault.times -= 1
                return fault
        return None

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self) -> tuple[int, dict, bytes]:
        path = self.url.path
        for method, pattern, function in ROUTES:
            if method in (self.command, "ANY") and (match := re.fullmatch(pattern, path)):
                with self.hub.lock:
                    answer = function(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                return answer if isinstance(answer, tuple) else (200, {"Content-Type": "application/json"}, _json(answer))
        raise Refusal(404, "", f"no route {self.command} {path}")

    # ---- who may do what ----

    def _user(self) -> tuple[str | None, bool]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token, (None, False))

    def _writer(self, owner: str) -> None:
        name, writes = self._user()
        if name is None:
            raise Refusal(401, "", "Invalid username or password.")
        if not writes or name != owner:
            raise Refusal(403, "", f"You don't have the rights to write under the namespace {owner}")

    def _repo(self, kind: str, name: str, *, write: bool = False) -> Repo:
        repo = self.hub.repos.get((kind, name))
        user, _ = self._user()
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write:
            self._writer(name.split("/")[0])
        return repo

    # ---- routes ----

    def whoami(self):
        name, writes = self._user()
        if name is None:
            raise Refusal(401, "", "Invalid username or password.")
        role = "write" if writes else "read"
        return {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"displayName": "test", "role": role}}}

    def create(self):
        wanted = json.loads(self.body)
        user, _ = self._user()
        owner = wanted.get("organization") or user
        kind = f"{wanted.get('type') or 'model'}s"
        name = f"{owner}/{wanted['name']}"
        if (kind, name) in self.hub.repos:
            raise Refusal(409, "", "You already created this repo", {"error": "exists", "url": self._web(kind, name)})
        self._writer(owner or "")
        repo = Repo(kind, name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repo.commit("main", {".gitattributes": small_file(b"*.parquet filter=lfs\n")}, "initial commit")
        self.hub.repos[kind, name] = repo
        return {"url": self._web(kind, name), "id": name, "name": name}

    def _web(self, kind: str, name: str) -> str:
        return f"{self.hub.url}/{PREFIXES[kind]}{name}"

    def delete(self):
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self._user()[0]
        self._writer(owner)
        del self.hub.repos[f"{wanted.get('type') or 'model'}s", f"{owner}/{wanted['name']}"]
        return {}

    def validate_yaml(self):
        request = json.loads(self.body)
        errors = card_errors(request["content"])
        if errors:
            raise Refusal(400, "", "", {"errors": [{"message": text} for text in errors], "warnings": []})
        return {"errors": [], "warnings": []}

    def info(self, kind: str, name: str, revision: str = ""):
        repo = self._repo(kind, name)
        sha = repo.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        common = {"id": name, "author": name.split("/")[0], "sha": sha, "private": repo.private, "siblings": siblings}
        return {**common, "tags": [], "gated": False, "disabled": False, "lastModified": DATE, "createdAt": DATE, "downloads": 0}

    def tree(self, kind: str, name: str, revision: str, folder: str = ""):
        repo = self._repo(kind, name)
        sha = repo.resolve(revision)
        files, folder = repo.commits[sha], folder.strip("/")
        inside = {path for path in files if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        start = len(folder) + 1 if folder else 0
        folders = {path[: start + i] for path in inside for i, letter in enumerate(path[start:]) if letter == "/"}
        shown = [path for path in sorted(inside | folders) if recursive or "/" not in path[start:]]
        return [entry_of(path, files.get(path), sha) for path in shown]

    def paths_info(self, kind: str, name: str, revision: str):
        repo = self._repo(kind, name)
        sha = repo.resolve(revision)
        text = self.body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        return [
            entry_of(path, repo.commits[sha].get(path), sha)
            for path in paths
            if path in repo.commits[sha] or any(other.startswith(f"{path}/") for other in repo.commits[sha])
        ]

    def preupload(self, kind: str, name: str, revision: str):
        repo = self._repo(kind, name, write=True)
        files = repo.commits[repo.resolve(revision)]
        return {"files": [self._upload_mode(entry["path"], files) for entry in json.loads(self.body)["files"]]}

    def _upload_mode(self, path: str, files: dict[str, StoredFile]) -> dict:
        mode = {"path": path, "uploadMode": "lfs" if LARGE.match(path) else "regular", "shouldIgnore": False}
        return {**mode, "oid": files[path].oid if path in files else None}

    def lfs_batch(self, name: str, prefix: str):
        self._repo(f"{prefix.strip('/') or 'models'}", name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.blobs else {"actions": upload})})
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "content does not have the announced sha256")
        self.hub.blobs[oid] = self.body
        return {}

    def commit(self, kind: str, name: str, revision: str):
        repo = self._repo(kind, name, write=True)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        head = repo.resolve(revision)
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head):
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = small_file(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, "", f"{path}: its content was never uploaded")
                files[path] = StoredFile(value["oid"], self.hub.blobs[value["oid"]], large=True)
            elif line["key"] == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
            elif line["key"] == "deletedFolder":
                files = {other: file for other, file in files.items() if not other.startswith(path.rstrip("/") + "/")}
        sha = repo.commit(revision, files, header["summary"])
        return {"success": True, "commitOid": sha, "commitUrl": f"{self._web(kind, name)}/commit/{sha}", "hookOutput": ""}

    def refs(self, kind: str, name: str):
        repo = self._repo(kind, name)
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": shas[-1]} for branch, shas in repo.branches.items()
        ]
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha} for tag, sha in repo.tags.items()]
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def commits(self, kind: str, name: str, revision: str):
        repo = self._repo(kind, name)
        common = {"authors": [{"user": "ann"}], "date": DATE, "message": ""}
        return [{"id": sha, "title": repo.titles[sha], **common} for sha in reversed(repo.branches[revision])]

    def branch(self, kind: str, name: str, branch: str):
        repo = self._repo(kind, name, write=True)
        if branch in repo.branches:
            raise Refusal(409, "", "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repo.branches[branch] = [repo.resolve(start)]
        return {}

    def tag(self, kind: str, name: str, revision: str):
        repo = self._repo(kind, name, write=True)
        repo.tags[json.loads(self.body)["tag"]] = repo.resolve(revision)
        return {}

    def variable(self, name: str):
        self._repo("spaces", name, write=True)
        wanted = json.loads(self.body)
        self.hub.variables.setdefault(name, {})[wanted["key"]] = wanted["value"]
        return {wanted["key"]: {"value": wanted["value"], "description": "", "updatedAt": DATE}}

    def resolve(self, prefix: str, name: str, revision: str, file: str):
        repo = self._repo(prefix.strip("/") or "models", name)
        sha = repo.resolve(revision)
        stored = repo.commits[sha].get(file)
        if stored is None:
            raise Refusal(404, "EntryNotFound", f"{file} does not exist on {revision}")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{stored.oid}"', "Accept-Ranges": "bytes"}
        if stored.large:
            headers |= {"X-Linked-Etag": f'"{stored.oid}"', "X-Linked-Size": str(len(stored.content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, headers, stored.content
        first, last = int(asked[1]), min(int(asked[2] or len(stored.content) - 1), len(stored.content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(stored.content)}"
        return 206, headers, stored.content[first : last + 1]


_WEB = r"/(?P<prefix>datasets/|spaces/|)(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("DELETE", r"/api/repos/delete", _Handler.delete),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/{REPO}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", rf"/api/{REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", _Handler.tree),
    ("POST", rf"/api/{REPO}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", rf"/api/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/{REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", rf"/api/{REPO}/refs", _Handler.refs),
    ("GET", rf"/api/{REPO}/commits/(?P<revision>[^/]+)", _Handler.commits),
    ("POST", rf"/api/{REPO}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", rf"/api/{REPO}/tag/(?P<revision>[^/]+)", _Handler.tag),
    ("POST", r"/api/spaces/(?P<name>[^/]+/[^/]+)/variables", _Handler.variable),
    ("POST", rf"{_WEB}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    ("GET", rf"{_WEB}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    ("HEAD", rf"{_WEB}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
]


def _json(value) -> bytes:
    return json.dumps(value).encode()
