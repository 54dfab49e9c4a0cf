"""A run's page on this machine, made from the run's files at each visit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import MantisError, RecipeError
from .training.page import REFRESH, facts_in, page

OWN = ("127.0.0.1", "localhost")
"""The names this machine has for itself: another site's may lead here (DNS rebinding)."""


def watch(run_dir: Path, port: int, show: Callable[[str], None]) -> None:
    """Serve the page on 127.0.0.1 until it is stopped; `show` is told where. Raises DataError, RecipeError."""
    with watched(run_dir, port) as server, suppress(KeyboardInterrupt):
        show(f"http://127.0.0.1:{server.server_port}")
        server.serve_forever()


def watched(run_dir: Path, port: int) -> ThreadingHTTPServer:
    """What serves the page of a run that has begun, on 127.0.0.1; 0 is any port that is free."""
    facts_in(run_dir)
    try:
        return ThreadingHTTPServer((OWN[0], port), type("Page", (_Page,), {"run_dir": run_dir}))
    except OSError as error:
        found = f"--port: {port} cannot be listened on: {error.strerror}"
        raise RecipeError(f"{found}\n  Choose another, or 0 for any that is free.") from None


class _Page(BaseHTTPRequestHandler):
    run_dir: Path

    def do_GET(self) -> None:
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in OWN:
            return self._say(403, "text/plain", b"by 127.0.0.1 or localhost alone\n")
        if urlsplit(self.path).path != "/":
            return self._say(404, "text/plain", b"the page is at /\n")
        try:
            found = page(self.run_dir)
        except (MantisError, OSError) as error:  # the run was moved meanwhile, or begins anew
            return self._say(503, "text/plain; charset=utf-8", f"{error}\n".encode())
        self._say(200, "text/html; charset=utf-8", found)

    def _say(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        if code == 503:
            self.send_header("Refresh", str(REFRESH))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: who looks at a page need not be told of."""
