"""A Hub on the loopback address, for tests: it speaks the protocol of the Hugging Face Hub that huggingface_hub speaks.

Repositories are made from plain folders. Large files (`LARGE`) are served as the Hub serves those in LFS: by a redirect
to another host, whose responses know nothing of repositories, and which must not see a token. All others are redirected
to an address below ``/api/resolve-cache``, as on the Hub.

One thing differs: the Hub says 401 without an error code where a repository is missing or not to be seen, and
huggingface_hub takes that for a missing one at https:// addresses only; so the code ``RepoNotFound`` comes along here.

A method of `Handler` that is marked by `route` answers requests; its arguments are the named groups of the pattern.
"""

import binascii
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import huggingface_hub.constants
import pytest
import yaml

LARGE = (".safetensors", ".gguf", ".bin")  # endings of the names of files that are in LFS
ID = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
DATE = "2026-01-02T03:04:05.000Z"
CHUNK = 1 << 16


@dataclass(frozen=True)
class Blob:
    """One file: its content is read from `path`, which must not change, unless it was uploaded."""

    path: Path

    @classmethod
    def of(cls, content: bytes) -> "Blob":
        """Of an uploaded file."""
        blob = cls(Path())
        blob.__dict__["content"] = content
        return blob

    @cached_property
    def content(self) -> bytes:
        return self.path.read_bytes()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def sha1(self) -> str:
        """As git names it."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    sha: str
    files: Mapping[str, Blob]
    title: str
    parent: str | None


@dataclass
class Repository:
    """A model; refs are branches, tags and the like by their full names, as ``refs/heads/main``."""

    id: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    def commit(self, files: Mapping[str, Blob], branch: str = "main", title: str = "Upload") -> str:
        """Make a commit of these files, which takes the place of the branch's last one; its sha."""
        parent = self.refs.get(f"refs/heads/{branch}")
        about = [self.id, title, parent, sorted((name, blob.sha256) for name, blob in files.items())]
        sha = hashlib.sha1(json.dumps(about).encode()).hexdigest()
        self.commits[sha] = Commit(sha, dict(files), title, parent)
        self.refs[f"refs/heads/{branch}"] = sha
        return sha

    def tag(self, name: str, sha: str) -> None:
        self.refs[f"refs/tags/{name}"] = sha

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag, another ref by its full name, or a sha, which may be cut short."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        sha = next((self.refs[name] for name in names if name in self.refs), None)
        if sha is None and re.fullmatch("[0-9a-f]{7,40}", revision):
            sha = next((sha for sha in self.commits if sha.startswith(revision)), None)
        return self.commits.get(sha or "")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]


class LoopbackHub:
    """The server, and what a test sets and sees of it.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: by their ids.
        moved: new ids by old ones.
        tokens: private and gated repositories that the owner of each token may read.
        writers: users and organisations in whose name the owner of each token may write.
        large: contents of uploaded large files by their sha256, also of those that no commit holds yet.
        room: how many more large files are taken in; the others are kept waiting until `room_made`.
        full: set when a large file is kept waiting.
        requests: all that came, in order.
        broken: by the end of an address, after how many bytes each of the next answers breaks off.
        failing: by the end of an address, the status of each of the next answers, or a page that comes instead.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.moved: dict[str, str] = {}
        self.tokens: dict[str, set[str]] = {}
        self.writers: dict[str, set[str]] = {}
        self.large: dict[str, bytes] = {}
        self.room = 1 << 30
        self.full, self.room_made = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self.requests: list[Request] = []
        self.broken: dict[str, list[int]] = {}
        self.failing: dict[str, list[int | str]] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.elsewhere = f"http://localhost:{self.server.server_port}"  # another host to a client

    def add(self, repo: str, folder: Path, branch: str = "main", without: Iterable[str] = (), **about: Any) -> str:
        """Commit a folder to a branch of a repository, which is made first if it is new; the sha of the commit."""
        repository = self.repositories.setdefault(repo, Repository(repo))
        for name, value in about.items():
            setattr(repository, name, value)
        files = {path.relative_to(folder).as_posix(): Blob(path) for path in folder.rglob("*") if path.is_file()}
        return repository.commit({name: blob for name, blob in files.items() if name not in without}, branch)

    def asked(self, end: str, method: str | None = None) -> list[Request]:
        """Requests for addresses with this end."""
        return [each for each in self.requests if each.path.endswith(end) and method in (None, each.method)]

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a process that shall meet this Hub, with its cache in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home)}

    def patch(self, patch: pytest.MonkeyPatch, home: Path) -> Path:
        """Make this the Hub of this process, with its cache in `home`; the folder of the cache."""
        constants, cache = huggingface_hub.constants, home / "hub"
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        return cache

    @contextmanager
    def serving(self) -> Iterator["LoopbackHub"]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.room_made.set()
            self.server.shutdown()
            self.server.server_close()
            thread.join()


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        codes = {"X-Error-Code": code} if code else {}
        self.status, self.headers = status, {"X-Error-Message": message, **codes, **headers}


def route(methods: str, pattern: str) -> Callable[[Any], Any]:
    """Mark a method of `Handler`: it answers these HTTP methods where the pattern is the whole path of an address."""

    def mark(answer: Any) -> Any:
        answer.route = (methods.split(), re.compile(pattern))
        return answer

    return mark


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(Request(self.command, url.path, {k.lower(): v for k, v in self.headers.items()}))
        try:
            if isinstance(status := self._planned(self.hub.failing, url.path), str):
                return self.send(status.encode(), headers={"Content-Type": "text/html"})
            if status:
                raise RefusalError(status, "Internal Error - We're working hard to fix this as soon as possible!")
            for answer in (getattr(type(self), name) for name in dir(type(self))):
                methods, pattern = getattr(answer, "route", ((), None))
                if self.command in methods and (found := pattern.fullmatch(url.path)):
                    return answer(self, **{name: unquote(part) for name, part in found.groupdict().items() if part})
            raise RefusalError(404, "Sorry, we can't find the page you are looking for.")
        except RefusalError as refusal:
            body = json.dumps({"error": str(refusal)}).encode()
            self.send(body, refusal.status, {"Content-Type": "application/json", **refusal.headers})
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _planned(self, plan: Mapping[str, list[Any]], path: str) -> Any:
        return next((numbers.pop(0) for end, numbers in plan.items() if path.endswith(end) and numbers), None)

    def send(self, body: bytes = b"", status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """An answer, of which a test may have planned that it breaks off."""
        most = self._planned(self.hub.broken, urlsplit(self.path).path) if body and self.command == "GET" else None
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):  # of a client that has enough
            if self.command != "HEAD":
                self.wfile.write(body if most is None else body[:most])
            if most is not None:
                self.wfile.flush()
                self.close_connection = True

    def send_json(self, content: Any, headers: Mapping[str, str] | None = None) -> None:
        self.send(json.dumps(content).encode(), headers={"Content-Type": "application/json", **(headers or {})})

    def redirect(self, status: int, location: str, headers: Mapping[str, str] | None = None) -> None:
        self.send(f"redirected to {location}".encode(), status, {"Location": location, **(headers or {})})

    def readable(self) -> set[str]:
        """Private and gated repositories that the sender may read."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token, set())

    def repository(self, repo: str) -> Repository | None:
        """A repository that the sender may see, or None after sending them to its new name."""
        if repo in self.hub.moved:
            self.redirect(307, self.path.replace(quote(repo), quote(self.hub.moved[repo]), 1))
            return None
        found, readable = self.hub.repositories.get(repo), self.readable()
        if found is None or (found.private and repo not in readable):
            if "Authorization" in self.headers:
                raise RefusalError(404, "Repository not found", "RepoNotFound")
            raise RefusalError(401, "Invalid username or password.", "RepoNotFound")
        return found

    def commit(self, repository: Repository, revision: str) -> Commit:
        if (commit := repository.find(revision)) is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    @route("GET", rf"/api/models/{ID}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, repo: str, revision: str = "main") -> None:
        if (found := self.repository(repo)) is None:
            return
        commit = self.commit(found, revision)
        blobs = self.query.get("blobs", "false").lower() == "true"
        self.send_json(
            {
                "_id": "621ffdc036468d709f17434d",
                "id": found.id,
                "modelId": found.id,
                "author": found.id.partition("/")[0],
                "sha": commit.sha,
                "lastModified": DATE,
                "createdAt": DATE,
                "private": found.private,
                "gated": "manual" if found.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": ["transformers", "safetensors"],
                "library_name": "transformers",
                "cardData": found.card,
                "siblings": [
                    {"rfilename": name} | ({"size": len(blob.content), "blobId": blob.sha1} if blobs else {})
                    for name, blob in sorted(commit.files.items())
                ],
            }
        )

    @route("GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)")
    def tree(self, repo: str, revision: str) -> None:
        if (found := self.repository(repo)) is None:
            return
        commit = self.commit(found, revision)
        entries, folders = [], set()
        for name, blob in sorted(commit.files.items()):
            folders |= {str(parent) for parent in Path(name).parents} - {"."}
            entry: dict[str, Any] = {"type": "file", "oid": blob.sha1, "size": len(blob.content), "path": name}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
            entries.append(entry)
        entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in sorted(folders)]
        if self.query.get("recursive", "false").lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"]]
        self.send_json(entries)

    @route("GET", rf"/api/models/{ID}/refs")
    def list_refs(self, repo: str) -> None:
        if (found := self.repository(repo)) is None:
            return
        kinds = {
            "branches": "refs/heads/",
            "tags": "refs/tags/",
            "converts": "refs/convert/",
            "pullRequests": "refs/pr/",
        }
        self.send_json(
            {
                kind: [
                    {"name": ref.removeprefix(begin), "ref": ref, "targetCommit": sha}
                    for ref, sha in found.refs.items()
                    if ref.startswith(begin)
                ]
                for kind, begin in kinds.items()
            }
        )

    def writable(self, repo: str) -> Repository:
        """A repository that the sender may write to."""
        self.readable()
        if (found := self.hub.repositories.get(repo)) is None:
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        self.check_writer(repo.partition("/")[0])
        return found

    def check_writer(self, owner: str) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if owner not in self.hub.writers.get(token, ()):
            raise RefusalError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        asked = json.loads(self.body)
        self.readable()
        owner, repo = asked["organization"], f"{asked['organization']}/{asked['name']}"
        self.check_writer(owner)
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repositories:
            body = json.dumps({"error": "You already created this model repo", "url": url}).encode()
            return self.send(body, 409, {"Content-Type": "application/json"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[repo] = Repository(repo, private=private)
        attributes = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LARGE)
        self.hub.repositories[repo].commit({".gitattributes": Blob.of(attributes.encode())}, title="initial commit")
        if private:
            self.hub.tokens[self.headers["Authorization"].removeprefix("Bearer ")].add(repo)
        return self.send_json({"url": url, "name": repo})

    @route("POST", "/api/validate-yaml")
    def validate(self) -> None:
        errors = [{"message": fault} for fault in faults_of_card(json.loads(self.body)["content"])]
        body = json.dumps({"errors": errors, "warnings": []}).encode()
        self.send(body, 400 if errors else 200, {"Content-Type": "application/json"})

    @route("POST", rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)")
    def preupload(self, repo: str, revision: str) -> None:
        there = self.commit(self.writable(repo), revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            name, blob = file["path"], there.get(file["path"])
            answer = {"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular", "shouldIgnore": False}
            if blob is not None:
                answer["oid"] = blob.sha256 if name.endswith(LARGE) else blob.sha1
            answers.append(answer)
        self.send_json({"files": answers})

    @route("POST", rf"/{ID}\.git/info/lfs/objects/batch")
    def batch(self, repo: str) -> None:
        self.writable(repo)
        asked = json.loads(self.body)
        assert asked["operation"] == "upload"
        objects = []
        for each in asked["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.large:
                answer["actions"] = {"upload": {"href": f"{self.hub.elsewhere}/lfs/{each['oid']}"}}
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    @route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
    def store(self, oid: str) -> None:
        assert "Authorization" not in self.headers  # the address alone is the permission
        with self.hub.lock:
            self.hub.room -= 1
            room = self.hub.room >= 0
        if not room:
            self.hub.full.set()
            self.hub.room_made.wait()
            raise RefusalError(400, "Too late")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, "The content has another sha256")
        self.hub.large[oid] = self.body
        self.send()

    @route("POST", rf"/api/models/{ID}/commit/(?P<revision>[^/]+)")
    def make_commit(self, repo: str, revision: str) -> None:
        repository = self.writable(repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        assert lines[0]["key"] == "header"
        files = dict(self.commit(repository, revision).files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = Blob.of(binascii.a2b_base64(value["content"]))
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.large:
                files[value["path"]] = Blob.of(self.hub.large[value["oid"]])
            else:
                raise RefusalError(400, f"{value['path']} was not uploaded")
        sha = repository.commit(files, revision, lines[0]["value"]["summary"])
        self.send_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})

    @route("GET HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
    def resolve(self, repo: str, revision: str, name: str) -> None:
        if (found := self.repository(repo)) is None:
            return
        if found.gated and repo not in self.readable():
            known = "Authorization" in self.headers
            message = f"Access to model {repo} is restricted" + (
                " and you are not in the authorized list." if known else ". You must have access to it and be "
                "authenticated to access it. Please log in."
            )  # fmt: skip
            raise RefusalError(403 if known else 401, message, "GatedRepo")
        commit = self.commit(found, revision)
        of_commit = {"X-Repo-Commit": commit.sha}
        if (blob := commit.files.get(name)) is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound", **of_commit)
        if name.endswith(LARGE):
            linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.sha256}"'}
            location = f"{self.hub.elsewhere}/files/{repo}/{commit.sha}/{quote(name)}"
            self.redirect(302, location, {**of_commit, **linked, "Accept-Ranges": "bytes"})
        else:
            location = f"/api/resolve-cache/models/{repo}/{commit.sha}/{quote(name)}"
            self.redirect(307, location, {**of_commit, "ETag": f'"{blob.sha1}"'})

    @route("GET HEAD", rf"/api/resolve-cache/models/{ID}/(?P<sha>[0-9a-f]{{40}})/(?P<name>.+)")
    def small_file(self, repo: str, sha: str, name: str) -> None:
        blob = self.hub.repositories[repo].commits[sha].files[name]
        self._send_file(blob, {"X-Repo-Commit": sha, "ETag": f'"{blob.sha1}"'})

    @route("GET HEAD", rf"/files/{ID}/(?P<sha>[0-9a-f]{{40}})/(?P<name>.+)")
    def large_file(self, repo: str, sha: str, name: str) -> None:
        blob = self.hub.repositories[repo].commits[sha].files[name]
        self._send_file(blob, {"ETag": f'"{blob.sha256}"'})

    def _send_file(self, blob: Blob, headers: Mapping[str, str]) -> None:
        """A file, or what is asked for of it."""
        content, size = blob.content, len(blob.content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.send(content, headers={**headers, "Accept-Ranges": "bytes"})
        first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        if first >= size:
            raise RefusalError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
        spread = {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}
        return self.send(content[first : last + 1], 206, spread)


def faults_of_card(content: str) -> list[str]:
    """What the Hub would find wrong with the metadata of a card."""
    block = re.match(r"---\n(.*?)\n---(\n|$)", content, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else {}
        for entry in metadata.get("model-index", []):
            assert isinstance(entry["name"], str)
            for result in entry["results"]:
                assert isinstance(result["task"]["type"], str)
                assert isinstance(result["dataset"]["type"], str)
                assert isinstance(result["dataset"]["name"], str)
                for metric in result["metrics"]:
                    assert isinstance(metric["type"], str)
                    assert isinstance(metric["value"], int | float | str)
    except (yaml.YAMLError, AttributeError, TypeError, KeyError, AssertionError) as fault:
        return [f"{type(fault).__name__} in the metadata"]
    return [] if isinstance(metadata.get("license", ""), str | list) else ["license must be a string"]


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A Hub of one's own, without repositories."""
    with LoopbackHub().serving() as hub:
        yield hub
