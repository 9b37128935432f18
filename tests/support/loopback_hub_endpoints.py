"""The HTTP side of the loopback hub: endpoints of the Hub that its client calls, answered from memory."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin", ".arrow")  # what the Hub's default .gitattributes puts into LFS
STAMP = "2026-01-01T00:00:00.000Z"


@dataclass
class Repo:
    """Branches name commits, commits hold files: path -> (content, whether it is a large file)."""

    private: bool = False
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)

    def commit(self, branch: str, files: dict, message: str) -> str:
        described = [(path, hashlib.sha256(content).hexdigest()) for path, (content, _) in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([described, message, len(self.commits)]).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


def git_oid(content: bytes) -> str:
    """What git calls a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Any  # the LoopbackHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("HEAD")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.hub.requests.append((method, path))
        if method == "PUT":
            return self._take_large_file(path.rsplit("/", 1)[-1])
        body = self._body()
        for verbs, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if method in verbs and match:
                with self.hub.lock:
                    return getattr(self, action)(body, **match.groupdict())
        self._error(404, None, f"no such endpoint: {method} {path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # Answers

    def _send(self, content: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, answer, status: int = 200) -> None:
        self._send(json.dumps(answer).encode(), status)

    def _error(self, status: int, code: str | None, message: str) -> None:
        headers = {"X_Error_Message": message} | ({} if code is None else {"X_Error_Code": code})
        self._send(json.dumps({"error": message}).encode(), status, **headers)

    # Who asks, and for what

    def _user(self) -> str | None:
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _repo(self, kind: str | None, repo_id: str, write: bool = False) -> Repo | None:
        """The repository, or `None` after an answer that says why not: like the Hub, it does not tell strangers
        whether a repository is private or missing."""
        kind, user = (kind or "models").strip("/"), self._user()
        repo = self.hub.repos.get((kind, repo_id))
        mine = user is not None and user == repo_id.split("/")[0]
        if repo is None or (repo.private and not mine):
            self._error(404 if user else 401, "RepoNotFound", "Repository not found")
            return None
        if write and not mine:
            self._error(403 if user else 401, None, f"You have no write access to {repo_id}")
            return None
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str | None:
        oid = repo.resolve(revision)
        if oid is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    # Endpoints

    def whoami(self, body: bytes) -> None:
        user = self._user()
        if user is None:
            return self._error(401, None, "Invalid credentials in Authorization header")
        self._json({"type": "user", "name": user, "orgs": []})

    def create(self, body: bytes) -> None:
        asked, user = json.loads(body), self._user()
        if user is None or asked.get("organization") not in (None, user):
            return self._error(403 if user else 401, None, "You cannot create a repository in this namespace")
        kind, repo_id = asked.get("type", "model") + "s", f"{user}/{asked['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            return self._json({"error": "You already created this repository", "url": url}, 409)
        repo = self.hub.repos[kind, repo_id] = Repo(asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self._json({"url": url, "name": repo_id})

    def validate_yaml(self, body: bytes) -> None:
        import yaml

        asked = json.loads(body)
        header = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", asked["content"], re.S)
        try:
            data = yaml.safe_load(header[1]) if header else {}
        except yaml.YAMLError as error:
            return self._send(str(error).encode(), 400, "text/plain")
        kinds = {"license": str, "pipeline_tag": str, "library_name": str, "tags": list, "widget": list}
        errors = [f"{name} must be a {kind.__name__}" for name, kind in kinds.items()
                  if not isinstance(data.get(name, kind()), kind)]  # fmt: skip
        if errors:
            return self._send("\n".join(errors).encode(), 400, "text/plain")
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        repo = self._repo(kind, repo_id, write=True)
        if repo is None or (oid := self._commit_of(repo, revision)) is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > 10_000_000
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in repo.commits[oid]:
                content = repo.commits[oid][file["path"]][0]
                entry["oid"] = hashlib.sha256(content).hexdigest() if large else git_oid(content)
            files.append(entry)
        self._json({"files": files})

    def batch(self, body: bytes, kind: str | None, repo_id: str) -> None:
        if self._repo(kind, repo_id, write=True) is None:
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large_files:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify"},
                }
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _take_large_file(self, sha256: str) -> None:
        """Not under the lock: several come at once."""
        with self.hub.lock:
            self.hub.started += 1
            hold = self.hub.hold_after is not None and self.hub.started > self.hub.hold_after
        if hold:
            self.hub.enough.wait(60)
            self.hub.held.set()
            self.hub.release.wait(60)
        with self.hub.lock:
            lose, self.hub.lose_uploads = self.hub.lose_uploads > 0, max(0, self.hub.lose_uploads - 1)
        if lose:
            self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
            self.close_connection = True
            return self.connection.close()
        content = self._body()
        if hashlib.sha256(content).hexdigest() != sha256:
            return self._error(400, None, "the content does not have the hash that it was announced with")
        with self.hub.lock:
            self.hub.large_files[sha256] = content
            self.hub.uploads.append(sha256)
            if len(self.hub.uploads) == self.hub.hold_after:
                self.hub.enough.set()
        self._json({})

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        whole = len(self.hub.large_files.get(asked["oid"], b"")) == asked["size"]
        self._json({}) if whole else self._error(422, None, "this file is not whole")

    def commit(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        repo = self._repo(kind, repo_id, write=True)
        if repo is None or (parent := self._commit_of(repo, revision)) is None:
            return
        files, message = dict(repo.commits[parent]), ""
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    return self._error(412, None, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    return self._error(400, None, f"LFS pointer points to a file that does not exist: {value['path']}")
                files[value["path"]] = (self.hub.large_files[value["oid"]], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    return self._error(404, "EntryNotFound", "A file with this name doesn't exist")
        oid = repo.commit(revision, files, message)
        self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True})

    def branch(self, body: bytes, kind: str, repo_id: str, name: str) -> None:
        repo = self._repo(kind, repo_id, write=True)
        if repo is None:
            return
        if name in repo.branches:
            return self._error(409, None, "Reference already exists")
        repo.branches[name] = repo.branches["main"]
        self._json({})

    def info(self, body: bytes, kind: str, repo_id: str, revision: str = "main") -> None:
        repo = self._repo(kind, repo_id)
        if repo is None or (oid := self._commit_of(repo, revision)) is None:
            return
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        answer = {"_id": "0", "id": repo_id, "author": repo_id.split("/")[0], "sha": oid, "private": repo.private}
        answer |= {"lastModified": STAMP, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
        self._json(answer | {"modelId": repo_id} if kind == "models" else answer)

    def tree(self, body: bytes, kind: str, repo_id: str, revision: str, folder: str | None = None) -> None:
        repo = self._repo(kind, repo_id)
        if repo is None or (oid := self._commit_of(repo, revision)) is None:
            return
        prefix, recursive = (folder + "/" if folder else ""), self.query.get("recursive", [""])[0].lower() == "true"
        entries, folders = [], set()
        for path, (content, large) in sorted(repo.commits[oid].items()):
            below = path.removeprefix(prefix)
            if not path.startswith(prefix):
                continue
            if "/" in below:
                folders.add(prefix + below.split("/")[0])
            if "/" not in below or recursive:
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
                if large:
                    entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
                entries.append(entry)
        if folder and not entries and not folders:
            return self._error(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self._json([{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders] + entries)

    def resolve(self, body: bytes, kind: str | None, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(kind, repo_id)
        if repo is None or (oid := self._commit_of(repo, revision)) is None:
            return
        if path not in repo.commits[oid]:
            return self._error(404, "EntryNotFound", "Entry not found")
        content, large = repo.commits[oid][path]
        etag = hashlib.sha256(content).hexdigest() if large else git_oid(content)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": oid, "Accept_Ranges": "bytes"}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            begin, total = int(start[1]), len(content)
            headers["Content_Range"] = f"bytes {begin}-{total - 1}/{total}"
            return self._send(content[begin:], 206, "application/octet-stream", **headers)
        if self.command == "GET" and len(content) > 1_000_000 and self.hub.lose_downloads:
            self.hub.lose_downloads -= 1
            return self._send_half(content, headers)
        self._send(content, 200, "application/octet-stream", **headers)

    def _send_half(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def create_collection(self, body: bytes) -> None:
        asked, user = json.loads(body), self._user()
        if user is None or asked["namespace"] != user:
            return self._error(403 if user else 401, None, "You cannot create a collection in this namespace")
        slug = f"{user}/{re.sub(r'[^a-z0-9]+', '-', asked['title'].lower())}-0123456789"
        if slug in self.hub.collections:
            return self._json({"error": "You already have a collection with this title", "slug": slug}, 409)
        owner = {"name": user, "type": "user"}
        answer = {"slug": slug, "title": asked["title"], "owner": owner, "items": [], "lastUpdated": STAMP}
        answer |= {"position": 0, "private": asked["private"], "theme": "green", "upvotes": 0}
        self.hub.collections[slug] = answer
        self._json(answer)

    def collection(self, body: bytes, slug: str) -> None:
        found = self.hub.collections.get(slug)
        self._json(found) if found else self._error(404, None, "Collection not found")

    def add_to_collection(self, body: bytes, slug: str) -> None:
        found, item = self.hub.collections.get(slug), json.loads(body)["item"]
        if found is None or self._user() != slug.split("/")[0]:
            return self._error(404 if found is None else 403, None, "Collection not found")
        if any(item["id"] == other["id"] for other in found["items"]):
            return self._error(409, None, "The item is in the collection already")
        found["items"].append(item | {"_id": str(len(found["items"])), "position": len(found["items"])})
        self._json(found)


_API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
_WEB = r"/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = (
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), r"/api/validate-yaml", "validate_yaml"),
    (("POST",), r"/api/collections", "create_collection"),
    (("GET",), r"/api/collections/(?P<slug>[^/]+/[^/]+)", "collection"),
    (("POST",), r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", "add_to_collection"),
    (("POST",), _API + r"/preupload/(?P<revision>.+)", "preupload"),
    (("POST",), _API + r"/commit/(?P<revision>.+)", "commit"),
    (("POST",), _API + r"/branch/(?P<name>.+)", "branch"),
    (("GET",), _API + r"/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    (("GET",), _API + r"/revision/(?P<revision>.+)", "info"),
    (("GET",), _API, "info"),
    (("POST",), _WEB + r"\.git/info/lfs/objects/batch", "batch"),
    (("POST",), r"/verify", "verify"),
    (("GET", "HEAD"), _WEB + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)
