"""A stand-in for the Hugging Face hub on loopback, so that tests download through the real client without a network."""

import hashlib
import json
import os
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".model")
"""Files that end so lie in large file storage: the hub answers for them with a redirect to another host."""

ROUTES = {
    "info": re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?"),
    "tree": re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)"),
    "file": re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"),
    "blob": re.compile(r"/lfs/([0-9a-f]{64})/(.+)"),
}


def settings_for(endpoint: str, home: Path) -> dict[str, str]:
    """The environment of a process whose hub is at `endpoint`, its cache in `home`, whatever the tests' own is."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_") and "PROXY" not in k.upper()}
    return kept | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}


class Request(NamedTuple):
    """One request that came; `range` is its Range header, such as bytes=100-, or None."""

    method: str
    path: str
    range: str | None


class Refusal(Exception):
    """What the hub says instead of an answer: a status, its X-Error-Code and its X-Error-Message."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Cut(NamedTuple):
    """The next download of `file` ends after that many bytes: closed early, or (`reset`) broken off."""

    file: str
    after: int
    reset: bool


class Hub:
    """Repositories behind an address, as a context: push folders to it, point HF_ENDPOINT at `endpoint`.

    `requests` lists what came, oldest first. A commit keeps the bytes that its folder had when it was pushed.
    """

    def __init__(self):
        self.requests: list[Request] = []
        self._commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self._main: dict[str, str] = {}
        self._readers: dict[str, set[str]] = {}
        self._cut: Cut | None = None

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}"  # another host, as far as the client can tell
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def push(self, repo: str, folder: Path, commit: str | None = None) -> str:
        """Commit what `folder` holds now and move `main` to it; the commit's 40 hex digits, by default made of both."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        commit = commit or hashlib.sha1(repr((repo, self._main.get(repo), files)).encode()).hexdigest()
        self._commits.setdefault(repo, {})[commit] = files
        self._main[repo] = commit
        return commit

    def gate(self, repo: str, *tokens: str) -> None:
        """Give the files of `repo` only to those who send one of `tokens`; what it lists stays open to all."""
        self._readers[repo] = set(tokens)

    def cut(self, file: str, after: int, *, reset: bool = False) -> None:
        """End the next download of `file` early, once: the client goes on by itself, unless the line is `reset`."""
        self._cut = Cut(file, after, reset)

    def downloads(self, file: str) -> list[Request]:
        """The requests for the bytes of `file`."""
        return [request for request in self.requests if request.method == "GET" and request.path.endswith("/" + file)]

    def answer(self, handler: "_Handler") -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(Request(handler.command, path, handler.headers["Range"]))
        route, match = next(((name, m) for name, regex in ROUTES.items() if (m := regex.fullmatch(path))), (None, None))
        try:
            if match is None:
                raise Refusal(404, "EntryNotFound", f"No route {path}")
            getattr(self, f"_answer_{route}")(handler, *match.groups())
        except Refusal as refusal:
            error = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            handler.reply(json.dumps({"error": str(refusal)}).encode(), error, status=refusal.status)

    def _answer_info(self, handler, repo: str, revision: str | None) -> None:
        commit, files = self._find(handler, repo, revision or "main")
        info = {"id": repo, "sha": commit, "private": False, "gated": "manual" if repo in self._readers else False}
        siblings = [{"rfilename": name} for name in files]
        handler.reply(json.dumps({**info, "tags": [], "siblings": siblings}).encode())

    def _answer_tree(self, handler, repo: str, revision: str) -> None:
        _, files = self._find(handler, repo, revision)
        entries = [{"type": "directory", "path": name, "oid": _git_id(name.encode())} for name in _folders(files)]
        for name, data in files.items():
            entry = {"type": "file", "path": name, "oid": _git_id(data), "size": len(data)}
            if name.endswith(LFS):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        handler.reply(json.dumps(entries).encode())

    def _answer_file(self, handler, repo: str, revision: str, name: str) -> None:
        commit, files = self._find(handler, repo, revision)
        if repo in self._readers and handler.token not in self._readers[repo]:
            status, way = (403, "Ask for it on its page.") if handler.token else (401, "Please log in.")
            raise Refusal(status, "GatedRepo", f"Access to model {repo} is restricted. {way}")
        if name not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        data, headers = files[name], {"X-Repo-Commit": commit}
        if not name.endswith(LFS):
            self._send(handler, name, data, headers | {"ETag": f'"{_git_id(data)}"'})
            return
        digest = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": len(data)}
        handler.reply(b"", headers | linked | {"Location": f"{self.storage}/lfs/{digest}/{name}"}, status=302)

    def _answer_blob(self, handler, digest: str, name: str) -> None:
        commits = (files for repo in self._commits.values() for files in repo.values())
        held = (files[name] for files in commits if name in files)
        data = next((data for data in held if hashlib.sha256(data).hexdigest() == digest), None)
        if data is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        self._send(handler, name, data, {"ETag": f'"{digest}"'})

    def _find(self, handler, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """The commit that `revision` (main or 40 hex digits) means and its files."""
        if repo not in self._commits:  # to those without a token, the hub does not say whether it exists
            raise Refusal(404 if handler.token else 401, "RepoNotFound", "Repository not found")
        commit = self._main[repo] if revision == "main" else revision
        if commit not in self._commits[repo]:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, self._commits[repo][commit]

    def _send(self, handler, name: str, data: bytes, headers: dict) -> None:
        """A file's bytes, or those that the request's Range asks for; fewer where a cut is due."""
        headers, status, size = headers | {"Accept-Ranges": "bytes"}, 200, len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers["Range"] or ""):
            first, last = int(match[1]), min(int(match[2] or size), size - 1)
            if first >= size:
                handler.reply(b"", headers | {"Content-Range": f"bytes */{size}"}, status=416)
                return
            data, status = data[first : last + 1], 206
            headers |= {"Content-Range": f"bytes {first}-{last}/{size}"}
        cut = self._cut if self._cut and self._cut.file == name and handler.command == "GET" else None
        if cut:
            self._cut = None
        handler.reply(data, headers | {"Content-Type": "application/octet-stream"}, status=status, cut=cut)


class _Handler(BaseHTTPRequestHandler):
    """Speaks HTTP/1.1 for a hub, with connections that stay open as the client likes them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    @property
    def token(self) -> str:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ")

    def do_GET(self):
        self.hub.answer(self)

    do_HEAD = do_GET

    def reply(self, data: bytes, headers: dict | None = None, *, status: int = 200, cut: Cut | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: cut.after] if cut else data)
        if cut:
            self.close_connection = True
            if cut.reset:  # closed with a reset in place of the goodbye that a broken line does not say
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())

    def log_message(self, *_):
        pass


def _git_id(data: bytes) -> str:
    """The name under which git stores a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _folders(files: dict[str, bytes]) -> list[str]:
    return sorted({folder.as_posix() for name in files for folder in Path(name).parents} - {"."})
