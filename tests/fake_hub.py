"""A Hugging Face Hub on 127.0.0.1 that serves a folder and takes pushes: datasets/user/name/..., models/user/name/...

Set HF_ENDPOINT to `.url` before huggingface_hub is imported, so in a subprocess. The one revision is main.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `folder` while the context lasts; `requests` lists "METHOD path" in order."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"folder": folder, "seen": self.requests})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    seen: list[str]

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes = b"") -> None:
        self.seen.append(f"{self.command} {self.path}")
        if self.path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "user", asked["name"])))
            (self.folder / "models" / name).mkdir(parents=True, exist_ok=True)
            return self.send_json({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        api, kind, repo, verb, revision, path = self.parse(unquote(urlsplit(self.path).path))
        root = self.folder / kind / repo
        if not root.is_dir():
            return self.send(404, error="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.send(404, error="RevisionNotFound")
        if not api and verb == "resolve":
            return self.send_file(root / path)
        if verb == "revision":
            files = [{"rfilename": file["path"]} for file in _entries(root, root) if file["type"] == "file"]
            return self.send_json({"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": files})
        if verb == "tree" and (root / path).is_dir():
            recursive = "true" in [v.lower() for v in parse_qs(urlsplit(self.path).query).get("recursive", [])]
            return self.send_json(_entries(root, root / path, recursive))
        if verb == "preupload":  # small files come with the commit itself
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.send_json({"files": files})
        if verb == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    (root / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
            address = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
            return self.send_json({"success": True, "commitOid": COMMIT, "commitUrl": address})
        if verb == "paths-info":
            asked = self.asked_paths(body)
            return self.send_json([entry for entry in _entries(root, root) if entry["path"] in asked])
        return self.send(404, error="EntryNotFound")

    @staticmethod
    def parse(path: str) -> tuple[bool, str, str, str, str, str]:
        """/[api/][datasets/|models/]user/name[/verb[/revision[/path]]]"""
        words = path.strip("/").split("/")
        api = words[0] == "api"
        words = words[api:]
        kind = words.pop(0) if words[0] in ("datasets", "models", "spaces") else "models"
        verb, revision, *rest = [*words[2:], *["revision", "main"][len(words[2:]) :]]
        return api, kind, "/".join(words[:2]), verb, revision, "/".join(rest)

    def asked_paths(self, body: bytes) -> list[str]:
        if "json" in self.headers.get("Content-Type", ""):
            return json.loads(body)["paths"]
        return parse_qs(body.decode()).get("paths", [])

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, path: Path) -> None:
        if not path.is_file():
            return self.send(404, error="EntryNotFound")
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        start, _, end = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not start:
            return self.send(200, data, headers)
        last = min(int(end or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        return self.send(206, data[int(start) : last + 1], headers)

    def send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None, error: str = "") -> None:
        self.send_response(status)
        for key, value in {
            **(headers or {}),
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(data)),
        }.items():
            self.send_header(key, value)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entries(root: Path, under: Path, recursive: bool = True) -> list[dict]:
    found = sorted(under.rglob("*") if recursive else under.iterdir())
    return [
        {
            "type": "file" if path.is_file() else "directory",
            "path": path.relative_to(root).as_posix(),
            "oid": hashlib.sha1(path.read_bytes() if path.is_file() else b"").hexdigest(),
            "size": path.stat().st_size if path.is_file() else 0,
        }
        for path in found
    ]
