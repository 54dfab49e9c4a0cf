"""Pictures behind links: https alone, from public addresses alone, looked at before and at each redirect."""

import http.server
import json
import socket
import ssl
import subprocess
import threading
import time
from urllib.parse import unquote

import pytest
from helpers import picture

from mantis_lite.data import download
from mantis_lite.data.download import MAX_BYTES, DownloadError, fetch, is_public, kept
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.schema import parse
from mantis_lite.data.source import open_source
from mantis_lite.errors import SampleError
from mantis_lite.recipe import SourceRecipe

PNG = picture(1)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path; `server.asked` has the paths that were asked for."""

    def do_GET(self):
        self.server.asked.append(self.path)
        name, _, rest = self.path.strip("/").partition("/")
        getattr(self, name, self.missing)(rest)

    def log_message(self, *_):
        pass

    def answer(self, status=200, content=b"", **headers):
        self.send_response(status)
        for key, value in {"Content_Length": str(len(content)), **headers}.items():
            if value is not None:
                self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def missing(self, _):
        self.answer(404)

    def png(self, _):
        self.answer(content=PNG)

    def html(self, _):
        self.answer(content=b"<html>", Content_Type="image/png")

    def svg(self, _):
        self.answer(content=b"<svg xmlns='http://www.w3.org/2000/svg'/>")

    def hop(self, left):
        self.answer(302, Location=f"/hop/{int(left) - 1}" if int(left) else "/png")

    def to(self, link):
        self.answer(307, Location=unquote(link))

    def around(self, _):
        self.answer(302, Location="/around")

    def nowhere(self, _):
        self.answer(302)

    def busy(self, _):
        self.answer(*((503, b"") if len(self.server.asked) < 3 else (200, PNG)))

    def down(self, _):
        self.answer(500)

    def large(self, _):
        self.answer(content=PNG + bytes(MAX_BYTES))

    def boast(self, _):
        self.answer(content=PNG, Content_Length=str(MAX_BYTES + 1))

    def unstated(self, _):
        self.answer(content=PNG + bytes(MAX_BYTES), Content_Length=None)

    def endless(self, _):
        self.answer(Content_Length=None, Transfer_Encoding="chunked")
        for _ in range(MAX_BYTES // 65536 + 2):
            self.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")

    def short(self, _):
        self.answer(content=PNG[:-10], Content_Length=str(len(PNG)))

    def drip(self, _):
        self.answer(Content_Length="1000")
        for _ in range(100):
            time.sleep(0.02)
            self.wfile.write(b"x")
            self.wfile.flush()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The file of a key and a certificate for localhost and 127.0.0.1, which vouches for itself."""
    folder = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=DNS:localhost,DNS:pictures.test,IP:127.0.0.1"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", names, "-keyout", folder / "key", "-out", folder / "certificate"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"openssl makes no certificate: {done.stderr[-200:]}")
    return folder


@pytest.fixture
def server(certificate, monkeypatch):
    """A server with TLS on 127.0.0.1, and the context that trusts it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "certificate", certificate / "key")
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.socket = context.wrap_socket(found.socket, server_side=True)
    found.asked, found.handle_error = [], lambda *_: None
    threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
    found.url = f"https://127.0.0.1:{found.server_port}"
    found.trusting = ssl.create_default_context(cafile=certificate / "certificate")
    yield found
    found.shutdown()
    found.server_close()


def got(server, path: str, allowed=lambda address: address == "127.0.0.1"):
    return fetch(server.url + path, allowed, server.trusting, pause=0)


def refused(server, path: str, **settings) -> str:
    with pytest.raises(DownloadError) as caught:
        got(server, path, **settings)
    assert not kept(server.url + path).exists()
    return str(caught.value)


def test_a_picture_is_fetched_once_and_kept(server):
    file = got(server, "/png")
    assert file.read_bytes() == PNG and file == kept(server.url + "/png")
    assert got(server, "/png") == file and fetch(server.url + "/png") == file
    assert server.asked == ["/png"]


def test_redirects_are_followed_five_times(server):
    assert got(server, "/hop/4").read_bytes() == PNG
    assert server.asked == ["/hop/4", "/hop/3", "/hop/2", "/hop/1", "/hop/0", "/png"]
    for path in ("/hop/5", "/around", "/nowhere"):
        assert refused(server, path) == "more than 5 redirects"


@pytest.mark.parametrize(
    ("link", "found"),
    [
        ("http://127.0.0.1/png", "the link is http, and only https is fetched"),
        ("file:///etc/passwd", "the link is file, and only https is fetched"),
        ("https://127.0.0.2/png", "127.0.0.2 is at 127.0.0.2, which is no public address"),
        ("https://169.254.169.254/latest/meta-data", "169.254.169.254 is at 169.254.169.254, which is no public"),
        ("//[::1]/png", "::1 is at ::1, which is no public address"),
        ("https://u:p@127.0.0.1/png", "the link has a user or password in it"),
    ],
)
def test_each_redirect_is_looked_at(server, link, found):
    assert refused(server, f"/to/{link}").startswith(found)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("path", "found", "times"),
    [
        ("/missing", "127.0.0.1 answers 404 Not Found", 1),
        ("/down", "127.0.0.1 answers 500 Internal Server Error", 3),
        ("/html", "what is there is no picture in JPEG, PNG", 1),
        ("/svg", "what is there is no picture in JPEG, PNG", 1),
        ("/large", "it has more than 10 MiB", 1),
        ("/boast", "it has more than 10 MiB", 1),
        ("/unstated", "it has more than 10 MiB", 1),
        ("/endless", "it has more than 10 MiB", 1),
        ("/short", f"only {len(PNG) - 10:,} of {len(PNG):,} bytes came", 3),
    ],
)
def test_answers_that_are_no_picture(server, path, found, times):
    assert refused(server, path).startswith(found)
    assert server.asked == [path] * times


def test_what_passes_is_tried_again(server):
    assert got(server, "/busy").read_bytes() == PNG
    assert server.asked == ["/busy"] * 3


def test_one_answer_takes_no_longer_than_it_may(server, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    assert refused(server, "/drip") == "127.0.0.1 took more than 0.2 s"


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DownloadError, match=r"127.0.0.1"):
        fetch(f"https://127.0.0.1:{silent.getsockname()[1]}/x", lambda _: True, pause=0)


def test_certificates_are_of_a_known_authority_and_of_the_name(server, monkeypatch):
    with pytest.raises(DownloadError, match=r"the certificate of 127.0.0.1: self-signed certificate"):
        fetch(server.url + "/png", lambda _: True, pause=0)
    real = socket.getaddrinfo
    monkeypatch.setattr("socket.getaddrinfo", lambda _, *more, **named: real("127.0.0.1", *more, **named))
    with pytest.raises(DownloadError, match=r"the certificate of other.test: .*other.test"):
        fetch(f"https://other.test:{server.server_port}/png", lambda _: True, server.trusting, pause=0)
    assert server.asked == []


def test_the_address_that_was_looked_at_is_the_one(server, monkeypatch):
    """A name server that answers otherwise the second time is not asked a second time."""
    asked, real = [], socket.getaddrinfo

    def answers(host, *more, **named):
        asked.append(host)
        return real("127.0.0.1" if asked.count("pictures.test") < 2 else "127.0.0.2", *more, **named)

    monkeypatch.setattr("socket.getaddrinfo", answers)
    link = f"https://pictures.test:{server.server_port}/png"
    assert fetch(link, lambda address: address == "127.0.0.1", server.trusting).read_bytes() == PNG
    assert asked.count("pictures.test") == 1


def test_every_address_of_a_host_is_looked_at(monkeypatch):
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: answers)
    with pytest.raises(DownloadError, match=r"pictures.test is at 10.0.0.1, which is no public address"):
        fetch("https://pictures.test/a.png", pause=0)


NEARBY = [
    "127.0.0.1",
    "localhost",
    "LOCALHOST",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "017700000001",
    "0",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "100.64.0.1",
    "198.18.0.1",
    "192.0.2.1",
    "224.0.0.1",
    "255.255.255.255",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:a9fe:a9fe]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::]",
    "[fe80::1]",
    "[fec0::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[ff02::1]",
    "[2001:db8::1]",
    "127.0.0.1:8443",
    "\uff11\uff12\uff17.0.0.1",
    "127\u30020\u30020\u30021",
]


@pytest.mark.parametrize("host", NEARBY)
def test_nothing_nearby_is_reached(host, monkeypatch):
    monkeypatch.setattr("socket.create_connection", None)
    with pytest.raises(DownloadError, match=r"is at .*, which is no public address"):
        fetch(f"https://{host}/a.png", pause=0)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "2a00:1450::1"])
def test_the_internet_is_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    ("link", "found"),
    [
        ("http://example.org/a.png", "the link is http, and only https is fetched"),
        ("ftp://example.org/a.png", "the link is ftp"),
        ("https://user@example.org/a.png", "the link has a user or password in it"),
        ("https://user:word@example.org/a.png", "the link has a user or password in it"),
        ("https://example.org\\@127.0.0.1/a.png", "the link has a user or password in it"),
        ("https:///a.png", "the link names no host"),
        ("https://", "the link names no host"),
        ("https://example.org/a b.png", "the link has blanks or control characters in it"),
        ("https://example.org/a\r\nHost: x", "the link has blanks or control characters in it"),
        ("https://exa\tmple.org/", "the link has blanks or control characters in it"),
        ("https://example.org:99999/", "the link cannot be read: Port out of range"),
        ("https://example.org:x/", "the link cannot be read: Port could not be cast"),
        ("https://[::1/", "the link cannot be read: Invalid IPv6 URL"),
        (f"https://{'x' * 70}.org/", "the link cannot be read: .*label"),
        ("https://nowhere.invalid/a.png", "nowhere.invalid has no address"),
    ],
)
def test_links_that_are_not_followed(link, found, monkeypatch):
    monkeypatch.setattr("socket.create_connection", None)
    with pytest.raises(DownloadError, match=found):
        fetch(link, pause=0)


def row(link: str) -> dict:
    return {"image": link, "messages": TURNS}


def test_rows_are_read_with_links_where_the_recipe_says_so(server, tmp_path):
    link = server.url + "/png"
    (tmp_path / "train.json").write_text(json.dumps([row(link)]))
    source = SourceRecipe(path=str(tmp_path / "train.json"))
    off = r'train.json:1: "image" is a link \(.*\)\n  Download the picture and .* With data.urls=true pictures are'
    with pytest.raises(SampleError, match=off):
        open_source(source).sample(0)
    at_home = r'train.json:1: "image" cannot be fetched: 127.0.0.1 is at 127.0.0.1, which is no public address \(.*\)\n'
    with pytest.raises(SampleError, match=at_home + "  Download the picture and give"):
        open_source(source, urls=True).sample(0)
    assert server.asked == []
    got(server, "/png")
    sample = open_source(source, urls=True).sample(0)  # it is kept now
    assert sample.images[0].source.read_bytes() == PNG
    assert sample.notices == ("pictures are behind links: they were fetched, and are kept",)
    assert server.asked == ["/png"]


def test_rows_of_the_hub_need_no_folder_for_links(server):
    got(server, "/png")
    assert parse(row(server.url + "/png"), "rows:1", MediaFolder(urls=True)).images[0].source.read_bytes() == PNG
