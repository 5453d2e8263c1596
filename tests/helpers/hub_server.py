"""A stand-in of the Hugging Face hub on loopback: the endpoints that huggingface_hub calls to publish and to load."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from helpers.http_server import answering

WRITE, READ = "hf_writes", "hf_reads"


class Repo:
    """Commits and branches of one repository; a commit is {path: content}."""

    def __init__(self, private=False):
        self.private, self.commits, self.branches = private, {}, {}
        self.commit("main", {})

    def commit(self, branch, files):
        sha = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision="main"):
        return self.commits[self.resolve(revision)]


class Hub:
    """``repos`` by name, ``requests`` as (method, path), ``blobs`` uploaded by LFS; ``fail`` maps paths to codes."""

    def __init__(self):
        self.repos, self.requests, self.blobs, self.fail, self.url = {}, [], {}, {}, ""

    def put(self, name, files, branch="main", private=False):
        """Make a repository without the client."""
        repo = self.repos.setdefault(name, Repo(private))
        return repo.commit(branch, dict(files))

    def answer(self, method, path, query, headers, body):
        """Status, headers and content of one request."""
        self.requests.append((method, path))
        token = headers.get("authorization", "").removeprefix("Bearer ")
        for part, status in self.fail.items():
            if part in path:
                return status, {}, {"error": "as told"}
        if method in ("POST", "PUT") and "/lfs-store/" not in path and token != WRITE:
            return (403, {}, {"error": "read-only"}) if token == READ else (401, {}, {"error": "Invalid credentials"})
        for pattern, serve in self.routes(method):
            if found := re.fullmatch(pattern, path):
                return serve(*map(unquote, found.groups()), query=query, token=token, body=body)
        return 404, {}, {"error": f"no route {method} {path}"}

    def routes(self, method):
        name = r"([\w.-]+/[\w.-]+)"
        if method in ("GET", "HEAD"):
            return [
                (rf"/api/models/{name}", self.info),
                (rf"/api/models/{name}/revision/(.+)", self.info),
                (rf"/api/models/{name}/tree/([^/]+)", self.tree),
                (rf"/{name}/resolve/([^/]+)/(.+)", self.file),
            ]
        return [
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", lambda **_: (200, {}, {"errors": [], "warnings": []})),
            (rf"/api/models/{name}/branch/(.+)", self.branch),
            (rf"/api/models/{name}/preupload/(.+)", self.preupload),
            (rf"/{name}\.git/info/lfs/objects/batch", self.lfs),
            (r"/lfs-store/(\w+)", self.store),
            (rf"/api/models/{name}/commit/(.+)", self.commit),
        ]

    def _repo(self, name, token):
        repo = self.repos.get(name)
        return repo if repo and not (repo.private and token not in (WRITE, READ)) else None

    def info(self, name, revision="main", *, token, **_):
        repo = self._repo(name, token)
        if repo is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        sha = repo.resolve(revision)
        if sha is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"}
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        return 200, {}, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}

    def tree(self, name, revision, *, token, **_):
        repo = self._repo(name, token)
        sha = repo and repo.resolve(revision)
        if not sha:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"}
        return (
            200,
            {},
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in repo.commits[sha].items()
            ],
        )

    def file(self, name, revision, path, *, token, **_):
        repo = self._repo(name, token)
        if repo is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        data = repo.commits.get(repo.resolve(revision), {}).get(path)
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": repo.resolve(revision)}, data

    def create(self, *, body, **_):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.repos:
            return 409, {}, {"error": "You already created this model repo"}
        self.repos[name] = Repo(asked.get("private") or asked.get("visibility") == "private")
        return 200, {}, {"url": f"{self.url}/{name}", "name": name}

    def branch(self, name, branch, **_):
        repo = self.repos[name]
        if branch in repo.branches:
            return 409, {}, {"error": "exists"}
        repo.branches[branch] = repo.branches["main"]
        return 201, {}, {}

    def preupload(self, name, revision, *, body, **_):
        files = json.loads(body)["files"]
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
             "shouldIgnore": False, "oid": None}
            for f in files
        ]  # fmt: skip
        return 200, {}, {"files": modes}

    def lfs(self, name, *, body, **_):
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.url}/lfs-store/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        return 200, {}, {"transfer": "basic", "objects": objects}

    def store(self, oid, *, body, **_):
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        return 200, {}, {}

    def commit(self, name, revision, *, body, **_):
        repo = self.repos[name]
        if revision not in repo.branches:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"}
        files = dict(repo.files(revision))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(revision, files)
        return 200, {}, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"}


def read_body(stream, headers):
    """A request's body, of a known length or in chunks."""
    if headers.get("Transfer-Encoding") != "chunked":
        return stream.read(int(headers.get("Content-Length") or 0))
    parts = []
    while size := int(stream.readline(), 16):
        parts.append(stream.read(size))
        stream.readline()
    stream.readline()
    return b"".join(parts)


@contextmanager
def serve():
    """A running ``Hub`` with its ``url``."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            parts = urlsplit(self.path)
            body = read_body(self.rfile, self.headers)
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, extra, content = hub.answer(self.command, parts.path, parse_qs(parts.query), headers, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **extra}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def log_message(self, *_):
            pass

    with answering(Handler) as hub.url:
        yield hub
