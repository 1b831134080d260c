"""A hub on loopback: as much of the Hugging Face hub's HTTP interface as its clients need, with faults on demand."""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit))?(?:/(.*))?")
RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repo:
    """A repository: files by commit, the branches that point to commits, and who may read it."""

    kind: str
    name: str
    access: str = "public"  # or private (not there without the token), or gated (its files ask for the token)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Point a branch at these files; the commit."""
        listing = {name: hashlib.sha1(content).hexdigest() for name, content in sorted(files.items())}
        sha = hashlib.sha1(json.dumps([self.name, len(self.commits), listing]).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path matches: a status as "503", "429" (Retry-After: 1),
    "cut" in the middle, or "stall" for as long as the hub lives, which HEAD meets as well."""

    pattern: str
    kind: str
    times: int


def etag_of(content: bytes) -> str:
    """How the hub names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """The server; `stop` ends it, and `hub.env` points a process at it."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.port = 0
        self.start()
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        self.closing.clear()
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Be a hub that is down for a while: connections are refused."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def stop(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, kind: str, name: str, files: Path | dict[str, bytes], branch: str = "main") -> str:
        """Put the files of a folder, or these, on a branch of a repository (`models` or `datasets`); the commit."""
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        return self.repos.setdefault((kind, name), Repo(kind, name)).commit(files, branch)

    def fail(self, pattern: str, kind: str, times: int = 1) -> None:
        self.faults.append(Fault(pattern, kind, times))

    def fault(self, method: str, path: str) -> str | None:
        """The kind of the fault that this request meets."""
        with self.lock:
            for fault in self.faults:
                meets = fault.times > 0 and (method != "HEAD" or fault.kind == "stall")
                if meets and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault.kind
        return None

    def fetched(self, pattern: str) -> list[str]:
        """Paths that were downloaded whole."""
        return [p for method, p, status in self.log if method == "GET" and status < 300 and re.search(pattern, p)]

    def env(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables of a process that knows this hub alone and keeps everything in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_DATASETS_CACHE": str(home / "hf" / "datasets"),
            "MA_SFT_CACHE": str(home / "ma_sft"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": token or "",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the other side has gone, as after a cut
            self.close_connection = True

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.hub.fault(self.command, path)
        if fault == "stall":
            self.hub.closing.wait()
            self.close_connection = True
        elif fault and fault.isdecimal():
            waits = {"Retry-After": "1"} if fault == "429" else {}
            self._send(int(fault), b"", {**waits, "X-Error-Message": f"fault {fault}"})
        elif match := RESOLVE.fullmatch(path):
            self._resolve(match, cut=fault == "cut")
        elif match := API.fullmatch(path):
            self._api(match, body, query)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            self._error(404, "", "not on this hub")

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _allowed(self, kind: str, name: str, *, file: bool) -> Repo | None:
        """The repository, or None after the hub's own way of saying no."""
        repo = self.hub.repos.get((kind, name))
        if self._token() not in ("", TOKEN):
            self._error(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.access == "private" and self._token() != TOKEN):
            self._error(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        elif file and repo.access == "gated" and self._token() != TOKEN:
            self._error(401, "GatedRepo", f"Access to {name} is restricted: you must be authenticated.")
        else:
            return repo
        return None

    def _commit_of(self, repo: Repo, revision: str) -> str | None:
        commit = repo.branches.get(revision, revision)
        if commit in repo.commits:
            return commit
        self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _resolve(self, match: re.Match[str], *, cut: bool) -> None:
        repo = self._allowed(match[1] or "models", match[2], file=True)
        commit = repo and self._commit_of(repo, unquote(match[3]))
        if not repo or not commit:
            return
        content = repo.commits[commit].get(match[4])
        if content is None:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        head = {"X-Repo-Commit": commit, "ETag": f'"{etag_of(content)}"', "Accept-Ranges": "bytes"}
        status = 200
        if ranges := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(ranges[1]), int(ranges[2] or len(content) - 1)
            head["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, head, cut=cut)

    def _api(self, match: re.Match[str], body: bytes, query: dict[str, list[str]]) -> None:
        kind, name, what, rest = match[1], match[2], match[3] or "revision", match[4] or "main"
        repo = self._allowed(kind, name, file=what in ("preupload", "commit"))
        if repo is None:
            return
        if what == "preupload":
            files = json.loads(body)["files"]
            answer = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._json({"files": answer})
        elif what == "commit":
            self._commit(repo, rest, body)
        elif commit := self._commit_of(repo, rest if what == "revision" else rest.split("/")[0]):
            files = repo.commits[commit]
            if what == "revision":
                siblings = [{"rfilename": path} for path in files]
                self._json({"id": name, "sha": commit, "siblings": siblings})
            else:
                folder, recursive = "/".join(rest.split("/")[1:]), query["recursive"][0].lower() == "true"
                self._json(_listing(files, folder, recursive))

    def _create(self, asked: dict[str, Any]) -> None:
        if self._token() != TOKEN:
            self._error(401, "", "Invalid username or password.")
            return
        owner = asked.get("organization") or "me"
        kind = asked.get("type", "model") + "s"
        name = f"{owner}/{asked['name']}"
        self.hub.add(kind, name, {".gitattributes": b""})
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.repos[kind, name].access = "private"
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name})

    def _commit(self, repo: Repo, branch: str, body: bytes) -> None:
        files = dict(repo.commits[repo.branches[branch]])
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
        commit = repo.commit(files, branch)
        url = f"{self.hub.endpoint}/{repo.name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "hookOutput": "", "success": True})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, more: dict[str, str] | None = None) -> None:
        head = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(more or {})}
        self._send(status, json.dumps({"error": message}).encode(), head)

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.hub.log.append((self.command, unquote(urlsplit(self.path).path), 599 if cut else status))
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            time.sleep(0.05)
            self.close_connection = True


def _listing(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The files below a folder, or what lies directly in it."""
    prefix, found = f"{folder}/" if folder else "", {}
    for path, content in files.items():
        name, deeper, _ = path.removeprefix(prefix).partition("/")
        if path.startswith(prefix) and deeper and not recursive:
            found[name] = {"type": "directory", "path": prefix + name, "size": 0, "oid": "0" * 40}
        elif path.startswith(prefix):
            found[path] = {"type": "file", "path": path, "size": len(content), "oid": etag_of(content)}
    return list(found.values())
