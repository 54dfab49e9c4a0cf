"""A picture behind an https link -> a file in the user's cache, fetched once."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from ipaddress import IPv6Network, ip_address
from pathlib import Path
from threading import Timer
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import PIL.Image

from ..errors import one_line
from ..files import write_whole
from .lengths import cache_dir
from .media import BROKEN, FORMATS

MAX_BYTES = 10 << 20
"""Of a picture: a photograph of 50 million pixels has as many."""
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
PATIENCE = 30.0
"""s, for all of one answer."""
ATTEMPTS = 3
PAUSE = 1.0
"""s, before the second attempt, and twice as many before the third."""
UNICAST = IPv6Network("2000::/3")
"""All that is given out for the internet; what leads to addresses of IPv4 lies without, but for 6to4."""


class DownloadError(Exception):
    """Why a link cannot be fetched; `passing` where it may work the next time."""

    def __init__(self, why: str, passing: bool = False) -> None:
        super().__init__(why)
        self.passing = passing


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, and no machine's nearby.

    >>> is_public("8.8.8.8"), is_public("169.254.169.254"), is_public("::ffff:127.0.0.1"), is_public("2002:7f00:1::")
    (True, False, False, False)
    """
    found = ip_address(address)
    if found.version == 6:
        return found in UNICAST and found.is_global and found.sixtofour is None
    return found.is_global and not found.is_multicast


def kept(link: str) -> Path:
    """Where a link's picture is kept once it was fetched."""
    return cache_dir() / "links" / sha256(link.encode(errors="surrogatepass")).hexdigest()


def fetch(
    link: str,
    allowed: Callable[[str], bool] = is_public,
    context: ssl.SSLContext | None = None,
    pause: float = PAUSE,
) -> Path:
    """The file of a link's picture, from the cache where it was fetched before. Raises DownloadError.

    Only https; to a host all of whose addresses are `allowed`, at the address that was looked at, so that no second
    answer of a name server counts, with the certificate of the name; the same for each redirect. `context` has the
    authorities that are trusted, by default this machine's. Proxies are not used.
    """
    file = kept(link)
    if file.is_file():
        return file
    context = context or ssl.create_default_context()
    for attempt in range(ATTEMPTS):
        try:
            content = _follow(link, allowed, context)
            break
        except DownloadError as error:
            if not error.passing or attempt == ATTEMPTS - 1:
                raise
            time.sleep(pause * 2**attempt)
    try:
        PIL.Image.open(io.BytesIO(content), formats=FORMATS).close()
    except (*BROKEN, PIL.Image.DecompressionBombError):
        raise DownloadError(f"what is there is no picture in {', '.join(FORMATS)}") from None
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, content)
    return file


def _follow(link: str, allowed: Callable[[str], bool], context: ssl.SSLContext) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        parts = _split(link)
        connection = _Pinned(parts, allowed, context)
        try:
            found = connection.get(parts)
        except ssl.SSLCertVerificationError as error:
            raise DownloadError(f"the certificate of {parts.hostname}: {error.verify_message}") from None
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(f"no answer from {parts.hostname}: {one_line(error)}", passing=True) from None
        finally:
            connection.close()
        if isinstance(found, bytes):
            return found
        link = urljoin(link, found)
    raise DownloadError(f"more than {MAX_REDIRECTS} redirects")


def _split(link: str) -> SplitResult:
    if any(ord(letter) <= 0x20 or ord(letter) == 0x7F for letter in link):
        raise DownloadError("the link has blanks or control characters in it")
    try:
        parts = urlsplit(link)
        host = (parts.hostname or "").encode("idna").decode()
        port = parts.port or 443
    except ValueError as error:  # of a port or an address; UnicodeError is one too
        raise DownloadError(f"the link cannot be read: {error}") from None
    if parts.scheme != "https":
        raise DownloadError(f"the link is {parts.scheme}, and only https is fetched")
    if "@" in parts.netloc:
        raise DownloadError("the link has a user or password in it")
    if not host:
        raise DownloadError("the link names no host")
    return parts._replace(netloc=f"[{host}]:{port}" if ":" in host else f"{host}:{port}", fragment="")


class _Pinned(http.client.HTTPSConnection):
    """A connection to the address that was looked at."""

    def __init__(self, parts: SplitResult, allowed: Callable[[str], bool], context: ssl.SSLContext) -> None:
        assert parts.hostname and parts.port
        super().__init__(parts.hostname, parts.port, timeout=PATIENCE, context=context)
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise DownloadError(f"{self.host} has no address", passing=True) from None
        addresses = [str(entry[4][0]) for entry in found]
        if refused := [address for address in addresses if not allowed(address)]:
            raise DownloadError(f"{self.host} is at {refused[0]}, which is no public address")
        self.address, self.tls = addresses[0], context
        self.line: ssl.SSLSocket | None = None

    def connect(self) -> None:
        plain = socket.create_connection((self.address, self.port), self.timeout)
        self.line = self.tls.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock = self.line
        self.line.do_handshake()

    def get(self, parts: SplitResult) -> bytes | str:
        """The content of a link, or where it redirects to. Raises DownloadError, OSError and HTTPException."""
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        late = Timer(PATIENCE, self._hang_up)
        late.start()
        begun = time.monotonic()
        try:
            self.request("GET", quote(path, safe="/%:@!$&'()*+,;=~?"), headers={"User-Agent": "mantis-lite"})
            answer = self.getresponse()
            if answer.status in REDIRECTS:
                return answer.getheader("Location") or ""
            if answer.status != 200:
                passing = answer.status == 429 or answer.status >= 500
                raise DownloadError(f"{self.host} answers {answer.status} {answer.reason}"[:200], passing)
            return _content(answer)
        finally:
            late.cancel()
            if time.monotonic() - begun >= PATIENCE:
                raise DownloadError(f"{self.host} took more than {PATIENCE:g} s", passing=True)

    def _hang_up(self) -> None:
        """Whoever reads from it gets an end, or an error."""
        if self.line is not None:  # `sock` is let go of where an answer is the last
            with suppress(OSError):  # it has ended by itself
                socket.socket.shutdown(self.line, socket.SHUT_RDWR)  # its own would take TLS from under the reader


def _content(answer: http.client.HTTPResponse) -> bytes:
    """All that comes, and no more than a picture may have, whatever the headers say."""
    stated = answer.length or 0
    content = answer.read(MAX_BYTES + 1) if stated <= MAX_BYTES else b""
    if max(stated, len(content)) > MAX_BYTES:
        raise DownloadError(f"it has more than {MAX_BYTES >> 20} MiB")
    if len(content) < stated:
        raise DownloadError(f"only {len(content):,} of {stated:,} bytes came", passing=True)
    return content
