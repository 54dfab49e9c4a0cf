"""A Hugging Face Hub on 127.0.0.1 that serves a folder and takes pushes: datasets/user/name/..., models/user/name/...

Set HF_ENDPOINT to `.url` before huggingface_hub is imported, so in a subprocess, and HF_HUB_DISABLE_XET=1: large files
come by LFS. Revisions are main, its commits, which all show what main has now, and refs/pr/N. Who writes needs a token;
a commit is taken whole or not at all, and only with objects that have come.
"""

import base64
import hashlib
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".pt", ".parquet", ".png", ".zip")
"""What goes by LFS however small it is, as .gitattributes of the real one say."""


class FakeHub:
    """Serves `folder` while the context lasts.

    `requests` lists "METHOD path" in order; `received` whole requests, headers and body, but for the token, which is
    put into `tokens`; `private` says of each repository that was created whether it is. Requests wait for `delay`
    seconds before they are done, and those with a part of `failing` in their path are answered its status.

    What a commit in `frozen` shows is that folder, not what main has now. Files go out in pieces of `piece` bytes, with
    `pause` seconds behind each; of those named in `wrong` the byte at that place is another, and those in `cut` break
    off there, once. `sent` counts the bytes of files that went out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.received: list[bytes] = []
        self.tokens: set[str] = set()
        self.private: dict[str, bool] = {}
        self.delay = 0.0
        self.failing: dict[str, int] = {}
        self.commits: dict[Path, list[str]] = {}
        self.frozen: dict[str, Path] = {}
        self.piece, self.pause, self.sent = 1 << 20, 0.0, 0
        self.wrong: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def history(self, root: Path) -> list[str]:
        return self.commits.setdefault(root, [COMMIT])

    def object(self, oid: str) -> Path:
        """Where an LFS object lies once it has come."""
        return self.folder / "lfs" / oid


class _Refused(Exception):
    """A status, X-Error-Code and words to answer with."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # whoever sent it was killed
            self.close_connection = True
            return
        headers = "".join(f"{k}: {v}\n" for k, v in self.headers.items() if k.lower() != "authorization")
        self.hub.requests.append(f"{self.command} {self.path}")
        self.hub.received.append(f"{self.requestline}\n{headers}\n".encode() + body)
        self.root: Path | None = None
        time.sleep(self.hub.delay)
        try:
            for part, status in self.hub.failing.items():
                if part in self.path:
                    raise _Refused(status, "", f"It fails with {status}")
            self.route(body)
        except _Refused as refused:
            status, code, words = refused.args
            self.send(status, json.dumps({"error": words}).encode(), {"X-Error-Code": code} if code else {})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def route(self, body: bytes) -> None:
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.startswith("/lfs/"):
            return self.take_object(path.removeprefix("/lfs/"), body)
        api, kind, repo, verb, revision, rest = self.parse(path)
        self.root = root = self.find(kind, repo, revision)
        if verb == "info":  # user/name.git/info/lfs/objects/batch
            return self.batch(json.loads(body))
        if not api and verb == "resolve":
            return self.send_file(root, rest)
        if verb == "revision":
            files = [{"rfilename": file["path"]} for file in _entries(root, root) if file["type"] == "file"]
            private, sha = self.hub.private.get(repo, False), self.hub.history(root)[-1]
            return self.send_json({"id": repo, "sha": sha, "private": private, "tags": [], "siblings": files})
        if verb == "tree" and (root / rest).is_dir():
            return self.send_json(_entries(root, root / rest, "true" in self.asked("recursive")))
        if verb == "preupload":
            return self.preupload(json.loads(body)["files"])
        if verb == "commit":
            return self.commit(kind, repo, [json.loads(line) for line in body.splitlines()])
        if verb == "paths-info":
            asked = self.asked_paths(body)
            return self.send_json([entry for entry in _entries(root, root) if entry["path"] in asked])
        raise _Refused(404, "EntryNotFound", "Entry not found")

    @staticmethod
    def parse(path: str) -> tuple[bool, str, str, str, str, str]:
        """/[api/][datasets/|models/]user/name[.git][/verb[/revision[/path]]]"""
        words = [unquote(word) for word in path.strip("/").split("/")]
        api = words[0] == "api"
        words = words[api:]
        kind = words.pop(0) if words[0] in ("datasets", "models", "spaces") else "models"
        verb, revision, *rest = [*words[2:], *["revision", "main"][len(words[2:]) :]]
        if verb == "info":
            revision = "main"
        return api, kind, "/".join(words[:2]).removesuffix(".git"), verb, revision, "/".join(rest)

    def find(self, kind: str, repo: str, revision: str) -> Path:
        """The folder of a repository as of a revision."""
        root = self.hub.folder / kind / repo
        if not root.is_dir():
            raise _Refused(404, "RepoNotFound", "Repository not found")
        if revision in self.hub.frozen:
            return self.hub.frozen[revision]
        if revision.startswith("refs/pr/"):
            pull = self.hub.folder / "pulls" / kind / repo / revision.rpartition("/")[2]
            if pull.is_dir():
                return pull
        elif revision == "main" or revision in self.hub.history(root):
            return root
        raise _Refused(404, "RevisionNotFound", "Invalid rev id")

    def require_token(self) -> None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        self.hub.tokens.add(token)
        if kind != "Bearer" or not token.startswith("hf_"):
            raise _Refused(401, "", "Invalid username or password.")

    def create(self, asked: dict) -> None:
        self.require_token()
        name = "/".join((asked.get("organization") or "user", asked["name"]))
        kind = f"{asked.get('type') or 'model'}s"
        address = f"http://{self.headers['Host']}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if (self.hub.folder / kind / name).is_dir():
            text = json.dumps({"error": "You already created this repo", "url": address}).encode()
            return self.send(409, text, {"Content-Type": "application/json"})
        (self.hub.folder / kind / name).mkdir(parents=True)
        self.hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.send_json({"url": address, "id": name})

    def preupload(self, files: list[dict]) -> None:
        self.require_token()
        assert self.root is not None
        there = {entry["path"]: entry.get("lfs", entry)["oid"] for entry in _entries(self.root, self.root)}
        modes = {True: "lfs", False: "regular"}
        answers = [
            {"path": path, "uploadMode": modes[_is_large(path, file["size"])], "shouldIgnore": False}
            | {"oid": there.get(path)}
            for file in files
            for path in [file["path"]]
        ]
        self.send_json({"files": answers})

    def batch(self, asked: dict) -> None:
        """Where to put the objects that are not here yet."""
        self.require_token()
        objects = []
        for wanted in asked["objects"]:
            upload = {"href": f"http://{self.headers['Host']}/lfs/{wanted['oid']}"}
            objects.append(
                wanted if self.hub.object(wanted["oid"]).is_file() else wanted | {"actions": {"upload": upload}}
            )
        self.send_json({"transfer": "basic", "objects": objects})

    def take_object(self, oid: str, body: bytes) -> None:
        """An object, whose address is the permission to put it: as on the real one, no token comes with it."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "", "The object is not what was announced")
        file = self.hub.object(oid)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(body)
        self.send(200)

    def commit(self, kind: str, repo: str, lines: list[dict]) -> None:
        self.require_token()
        assert self.root is not None
        changes, root = self.changes(lines), self.root
        with self.hub.lock:
            parent = lines[0]["value"].get("parentCommit")
            if parent and not self.hub.history(root)[-1].startswith(parent):
                raise _Refused(412, "", "A commit has happened since. Please refresh and try again.")
            pull = {}
            if "1" in self.asked("create_pr"):
                pulls = self.hub.folder / "pulls" / kind / repo
                number = len(list(pulls.glob("*"))) + 1
                root = Path(shutil.copytree(root, pulls / str(number)))
                pull = {"pullRequestUrl": f"http://{self.headers['Host']}/{repo}/discussions/{number}"}
            for path, data in changes.items():
                _write(root / path, data)
            sha = hashlib.sha1(json.dumps([self.hub.history(root)[-1], lines]).encode()).hexdigest()
            self.hub.history(root).append(sha)
        address = f"http://{self.headers['Host']}/{repo}/commit/{sha}"
        self.send_json({"success": True, "commitOid": sha, "commitUrl": address} | pull)

    def changes(self, lines: list[dict]) -> dict[str, bytes | None]:
        """What each path of a commit holds then; None where it goes."""
        assert lines[0]["key"] == "header"
        changes: dict[str, bytes | None] = {}
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if ".." in value["path"].split("/"):
                raise _Refused(400, "", f"Invalid path {value['path']}")
            if key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                found = self.hub.object(value["oid"])
                if not (found.is_file() and found.stat().st_size == value["size"]):
                    raise _Refused(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
                changes[value["path"]] = found.read_bytes()
            else:
                assert key in ("deletedFile", "deletedFolder"), key
                changes[value["path"]] = None
        return changes

    def asked(self, name: str) -> list[str]:
        return [value.lower() for value in parse_qs(urlsplit(self.path).query).get(name, [])]

    def asked_paths(self, body: bytes) -> list[str]:
        if "json" in self.headers.get("Content-Type", ""):
            return json.loads(body)["paths"]
        return parse_qs(body.decode()).get("paths", [])

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, root: Path, path: str) -> None:
        if not (root / path).is_file():
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data, entry = (root / path).read_bytes(), _entry(root, root / path)
        headers = {"ETag": f'"{entry.get("lfs", entry)["oid"]}"', "Accept-Ranges": "bytes"}
        if (at := self.hub.wrong.get(path)) is not None:
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        start, _, end = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if at := self.hub.cut.pop(path, None):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:at])
            self.close_connection = True
            return None
        if not start:
            return self.send(200, data, headers)
        last = min(int(end or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        return self.send(206, data[int(start) : last + 1], headers)

    def send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        commit = {"X-Repo-Commit": self.hub.history(self.root)[-1]} if self.root else {}
        for key, value in {**(headers or {}), **commit, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.write(data, "/resolve/" in self.path)

    def write(self, data: bytes, of_file: bool) -> None:
        piece = self.hub.piece if of_file else len(data) or 1
        try:
            for at in range(0, len(data), piece):
                self.wfile.write(data[at : at + piece])
                if of_file:
                    with self.hub.lock:
                        self.hub.sent += len(data[at : at + piece])
                    time.sleep(self.hub.pause)
        except (BrokenPipeError, ConnectionResetError):  # whoever asked for it was killed
            self.close_connection = True


def _is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > 10 << 20


def _write(path: Path, data: bytes | None) -> None:
    if data is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _entry(root: Path, path: Path) -> dict:
    """A file or folder as the hub lists it; a file's oid is git's, and beside it an LFS object's SHA-256."""
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    data = path.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": name, "oid": git, "size": len(data)}
    if _is_large(name, len(data)):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _entries(root: Path, under: Path, recursive: bool = True) -> list[dict]:
    return [_entry(root, path) for path in sorted(under.rglob("*") if recursive else under.iterdir())]
