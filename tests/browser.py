"""Pages, read by a parser and shown by a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
NASTY = "</mark></p><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">{{ 7*7 }}"
VOID = ("meta", "link", "img", "br")


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text in each of its elements of some kinds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def having(self, tag, key):
        return [attrs[key] for name, attrs in self.tags if name == tag and key in attrs]


def browsed(url: str, folder: Path) -> tuple[str, str, set[str]]:
    """What a browser makes of a page: its document, its log, and the addresses that the page itself asked for."""
    net = folder / "net.json"
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--log-net-log={net}"]
    words += [f"--user-data-dir={folder / 'profile'}", "--disable-background-networking", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *words, url], capture_output=True, text=True, timeout=60, check=True)
    asked = re.findall(r'"initiator":"([^"]*)".*?"url":"([^"]*)"', net.read_text())
    return done.stdout, done.stderr, {url for initiator, url in asked if initiator != "not an origin"}
