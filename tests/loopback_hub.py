"""A Hub on the loopback address, for tests: it speaks the protocol of the Hugging Face Hub that huggingface_hub speaks.

Repositories are made from plain folders. Large files (`LARGE`) are served as the Hub serves those in LFS: by a redirect
to another host, whose responses know nothing of repositories, and which must not see a token. All others are redirected
to an address below ``/api/resolve-cache``, as on the Hub.

One thing differs: the Hub says 401 without an error code where a repository is missing or not to be seen, and
huggingface_hub takes that for a missing one at https:// addresses only; so the code ``RepoNotFound`` comes along here.

A method of `Handler` that is marked by `route` answers requests; its arguments are the named groups of the pattern.
"""

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

LARGE = (".safetensors", ".gguf", ".bin")  # endings of the names of files that are in LFS
ID = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
DATE = "2026-01-02T03:04:05.000Z"
CHUNK = 1 << 16


@dataclass(frozen=True)
class Blob:
    """One file: its content is read from `path`, which must not change."""

    path: Path

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
        requests: all that came, in order.
        broken: by the end of an address, after how many bytes each of the next answers breaks off.
        failing: by the end of an address, the status of each of the next answers.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.moved: dict[str, str] = {}
        self.tokens: dict[str, set[str]] = {}
        self.requests: list[Request] = []
        self.broken: dict[str, list[int]] = {}
        self.failing: dict[str, list[int]] = {}
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
            if status := self._planned(self.hub.failing, url.path):
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

    def _planned(self, plan: dict[str, list[int]], path: str) -> int | None:
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
                "siblings": [{"rfilename": name} for name in sorted(commit.files)],
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


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A Hub of one's own, without repositories."""
    with LoopbackHub().serving() as hub:
        yield hub
