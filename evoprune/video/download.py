"""Downloads what is at an address on the web to a temporary file.

An address that a user gives is his own choice, as in `evoprune watch`. Redirects lead to http and https alone. For addresses that
others give, a download may be `public`: then every connection, behind redirects too, is to the public internet.
"""

import base64
import errno
import io
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import evoprune
from evoprune.errors import UsageError, VideoError
from evoprune.util import DOWNLOAD_HINT, size, without_password
from evoprune.video.temporary import temporary

LIMIT_BYTES = 8 * 2**30  # of a download
TIMEOUT_S = 20.0  # how long a server may be silent
LONGEST_S = 3600.0  # of a download
CHUNK_BYTES = 2**18
PLAIN = "identity"  # the encoding of what is sent as it is
PAGE = ("text/html", "application/xhtml+xml")  # types of web pages
PAGE_BEGINS = (b"<!doctype html", b"<html")
UNRESERVED = "/%:@!$&'()*+,;=~-._?"  # characters of a path or a query that stay as they are
HINTS = {  # by the status that a server answers with
    401: "it wants a login: download the file yourself, and give its path",
    403: f"the server refuses it; {DOWNLOAD_HINT}",
    404: "check the address",
    410: "check the address",
}
Progress = Callable[[int, int], None]  # bytes so far, and in all; 0 where that is unknown
Check = Callable[[], None]


@contextmanager
def downloaded(
    url: str,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    public: bool = False,
    limit_bytes: int | None = None,
) -> Iterator[str]:
    """Yields the path of a temporary file with what is at an address of http or https.

    Proxies are those of the environment (`https_proxy`, `no_proxy`). `progress`: called while it is downloaded, and before
    that while a server is waited for; what it raises ends the download. `public`: connects to nothing but addresses of the public
    internet, and to no proxy, which would look names up itself.

    Raises UsageError: `offline`. VideoError: the server cannot be reached, refuses, is silent for `TIMEOUT_S`, breaks off, or sends
    a web page, nothing, more than `limit_bytes` (default: `LIMIT_BYTES`), or for more than `LONGEST_S`; or it is not `public`; or
    the file cannot be stored.
    """
    name = without_password(url)
    if offline:
        hint = "leave out --offline (offline=True), or download it first and give the path of the file"
        raise UsageError(f"the network may not be used (offline), and {name} is on the web", hint)
    with ExitStack() as stack:
        chunks = stack.enter_context(closing(_chunks(url, name, progress, public, limit_bytes or LIMIT_BYTES)))
        path = stack.enter_context(temporary(chunks, name))
        if not os.path.getsize(path):
            raise VideoError(f"{name} is empty", "check the address")
        yield path


def _chunks(url: str, name: str, progress: Progress | None, public: bool, limit_bytes: int) -> Iterator[bytes]:
    """Yield what a server sends. Its errors never are an OSError, which is about the file that is written."""
    done = 0
    total = 0
    end = time.monotonic() + LONGEST_S

    def check() -> None:
        if time.monotonic() > end:
            raise VideoError(f"downloading {name} takes more than {LONGEST_S / 60:.0f} min", "download it first")
        if progress:
            progress(done, total)

    try:
        with _opened(url, public, check) as response:
            total = response.length or 0
            _check_size(total, name, limit_bytes)
            if response.headers.get_content_type() in PAGE:
                raise _page(name)
            if (packed := response.headers.get("Content-Encoding", PLAIN)) != PLAIN:
                raise VideoError(f"{name} comes packed as {packed}", "download it first, and give the path of the file")
            while True:
                chunk = response.read1(CHUNK_BYTES)
                if not done and chunk.lstrip()[:20].lower().startswith(PAGE_BEGINS):
                    raise _page(name)
                done += len(chunk)
                _check_size(done, name, limit_bytes)
                if not chunk:
                    break
                check()
                yield chunk
    except HTTPError as error:
        with closing(error):  # which may be closed already
            if error.code in range(300, 400):
                hint = f"redirects lead to http and https alone, at most {request.HTTPRedirectHandler.max_redirections}"
                there = without_password(error.headers.get("Location") or "nowhere")
                raise VideoError(f"{name} leads to {there}, which is not read", hint) from error
            usual = "try again later" if error.code >= 500 or error.code == 429 else DOWNLOAD_HINT
            raise VideoError(
                f"cannot download {name}: {error.code} {error.reason}", HINTS.get(error.code, usual)
            ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise _unreachable(name, error) from error
    if done < total:
        raise VideoError(f"the download of {name} broke off after {done:,} of {total:,} bytes", "try again")


def _opened(url: str, public: bool, check: Check) -> HTTPResponse:
    """Return a server's answer. `check`: called before each piece of it, and may raise.

    Raises OSError, HTTPException, ValueError. VideoError: it is not `public`.
    """
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    if not host.isascii():
        name, colon, port = host.partition(":")
        host = name.encode("idna").decode() + colon + port
    whole = (parts.scheme, host, quote(parts.path, UNRESERVED), quote(parts.query, UNRESERVED), "")
    asked = request.Request(urlunsplit(whole), headers={"User-Agent": f"evoprune/{evoprune.__version__}"})  # noqa: S310
    if login:
        secret = base64.b64encode(unquote(login).encode()).decode()
        asked.add_unredirected_header("Authorization", f"Basic {secret}")
    # No other protocol than these two can be opened, whatever a redirect says.
    opener = request.OpenerDirector()
    if not public:
        opener.add_handler(request.ProxyHandler())
    for handler in (
        _Connecting(public, check),
        request.UnknownHandler(),
        request.HTTPDefaultErrorHandler(),
        _Redirects(),
        request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener.open(asked, timeout=TIMEOUT_S)


class _Redirects(request.HTTPRedirectHandler):
    """Follows redirects, but does not read what is sent with them, which may have no end."""

    def redirect_request(self, asked: request.Request, response: HTTPResponse, *given) -> request.Request:
        response.close()
        return super().redirect_request(asked, response, *given)


# IPv6 addresses that lead to one of IPv4, which may be of any network: NAT64, 6to4, Teredo.
TRANSLATED = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet: none of a private network, a machine itself, or a group."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if any(ip in net for net in TRANSLATED):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _public_socket(check: Check, place: tuple[str, int], *how) -> socket.socket:
    """Return a connection as `socket.create_connection`, to the addresses that were checked, and not to what a name means later.

    `check`: called before each address is tried. Raises VideoError: one of them is not public, or it is an address of this
    machine. OSError.
    """
    host, port = place
    refused = VideoError(f"{host} is not on the public internet, so it is not read", "send the video itself")
    found = [address[0] for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not found or not all(map(is_public, found)):
        raise refused
    problem: OSError | None = None
    for address in dict.fromkeys(found):
        check()
        try:
            connected = socket.create_connection((address, port), *how)
        except OSError as error:
            problem = error
            continue
        if connected.getsockname()[0] == connected.getpeername()[0]:
            connected.close()
            raise refused
        return connected
    raise problem


class _Checked(io.RawIOBase):
    """What a server sends, with a check before each piece: one that sends byte by byte is never silent."""

    def __init__(self, raw: io.RawIOBase, check: Check):
        self._raw = raw
        self._check = check

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:
        self._check()
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _CheckedResponse(HTTPResponse):
    def __init__(self, check: Check, *given, **options):
        super().__init__(*given, **options)
        self.fp = io.BufferedReader(_Checked(self.fp.detach(), check))


class _Connecting(request.AbstractHTTPHandler):
    """Opens http and https. `public`: on the public internet alone. `check`: called before each piece that is read."""

    http_request = request.AbstractHTTPHandler.do_request_
    https_request = request.AbstractHTTPHandler.do_request_

    def __init__(self, public: bool, check: Check):
        super().__init__()
        self._public = public
        self._check = check

    def http_open(self, asked: request.Request) -> HTTPResponse:
        return self.do_open(self._connection, asked, kind=HTTPConnection)

    def https_open(self, asked: request.Request) -> HTTPResponse:
        return self.do_open(self._connection, asked, kind=HTTPSConnection, context=ssl.create_default_context())

    def _connection(self, *given, kind: type[HTTPConnection], **options) -> HTTPConnection:
        made = kind(*given, **options)
        made.response_class = partial(_CheckedResponse, self._check)
        if self._public:
            made._create_connection = partial(_public_socket, self._check)
        return made


def _check_size(count: int, name: str, limit_bytes: int) -> None:
    if count > limit_bytes:
        hint = "download it first, and give the path of the file"
        raise VideoError(f"{name} has more than {size(limit_bytes)}", hint)


def _page(name: str) -> VideoError:
    return VideoError(f"{name} is a web page, not a video or a picture", DOWNLOAD_HINT)


def _unreachable(name: str, error: Exception) -> VideoError:
    problem = error.reason if isinstance(error, URLError) else error
    if isinstance(problem, IncompleteRead):
        return VideoError(f"the download of {name} broke off", "try again")
    if isinstance(problem, TimeoutError):
        return VideoError(f"cannot download {name}: no answer for {TIMEOUT_S:g} s", "try again later")
    reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    hint = "check the address"
    if isinstance(problem, OSError) and problem.errno in (errno.ECONNREFUSED, errno.ECONNRESET):
        hint = "try again later"
    return VideoError(f"cannot download {name}: {reason}", hint)
