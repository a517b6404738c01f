"""Downloads a video or picture from an http or https address to a temporary file.

Users may give any address on the command line and in Python. For addresses that somebody else chose, such as the client of a
server, a download can be limited to the public internet: every connection, including those after redirects, is then checked.
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from time import monotonic
from typing import Any

import httpcore2
import httpx2

import evoprune
from evoprune.errors import UsageError, VideoError
from evoprune.util import DOWNLOAD_HINT, size, without_password
from evoprune.video.temporary import temporary

LIMIT_BYTES = 8 * 2**30  # largest download
TIMEOUT_S = 20.0  # for a connection, and for each read
LONGEST_S = 3600.0  # longest download
MOST_REDIRECTS = 10
HEADERS = {"User-Agent": f"evoprune/{evoprune.__version__}", "Accept": "*/*", "Accept-Encoding": "identity"}
FILE_HINT = "download it first, and give the path of the file"
LATER_HINT = "check the address, or try again later"
HINTS = {  # by HTTP status
    401: "it wants a login: download the file yourself, and give its path",
    403: f"the server refuses it; {DOWNLOAD_HINT}",
    404: "check the address",
    410: "check the address",
}
Check = Callable[[], None]


@contextmanager
def downloaded(
    url: str,
    *,
    offline: bool = False,
    progress: Callable[[int, int], None] | None = None,
    public: bool = False,
    limit_bytes: int | None = None,
) -> Iterator[str]:
    """Download a file, and yield the path of the temporary copy, which is deleted at the end.

    Proxies come from the environment (`https_proxy`, `no_proxy`).

    Args:
        progress: called with the bytes so far and the total (0 if unknown) before and after each read from the network. An
            exception that it raises aborts the download.
        public: connect only to addresses of the public internet. No proxy is used, because a proxy resolves names itself.
        limit_bytes: largest download; `LIMIT_BYTES` by default.

    Raises:
        UsageError: `offline` is set.
        VideoError: the server cannot be reached, refuses, stalls for `TIMEOUT_S`, disconnects, or is not `public`; the file is
            empty, a web page or too large; the download takes longer than `LONGEST_S`; or the copy cannot be stored.
    """
    name = without_password(url)
    if offline:
        hint = "leave out --offline (offline=True), or download it first and give the path of the file"
        raise UsageError(f"the network may not be used (offline), and {name} is on the web", hint)
    with (
        closing(_chunks(url, name, progress, public, limit_bytes or LIMIT_BYTES)) as chunks,
        temporary(chunks, name) as path,
    ):
        yield path


def _chunks(
    url: str, name: str, progress: Callable[[int, int], None] | None, public: bool, limit_bytes: int
) -> Generator[bytes, None, None]:
    """Yield the content. Network errors become VideoError, so that an OSError always concerns the temporary file."""
    done = 0
    total = 0
    end = monotonic() + LONGEST_S

    def check() -> None:
        if monotonic() > end:
            raise VideoError(f"downloading {name} takes more than {LONGEST_S / 60:.0f} min", "download it first")
        if max(done, total) > limit_bytes:
            raise VideoError(f"{name} has more than {size(limit_bytes)}", FILE_HINT)
        if progress:
            progress(done, max(done, total) if total else 0)  # more than the total arrives if the server compresses

    try:
        with _opened(url, name, public, check) as response:
            total = int(response.headers.get("Content-Length", 0))
            check()
            for chunk in response.iter_bytes():
                if not done:
                    _check_beginning(chunk, response.headers.get("Content-Type", ""), name)
                done += len(chunk)
                check()
                yield chunk
    except httpx2.TimeoutException as error:
        problem = f"cannot download {name}: no answer for {TIMEOUT_S:g} s"
        if done:
            problem = f"the download of {name} stalled after {done:,} bytes: nothing arrived for {TIMEOUT_S:g} s"
        raise VideoError(problem, "try again later") from error
    except httpx2.DecodingError as error:
        raise VideoError(f"{name} does not have the encoding that the server announces", DOWNLOAD_HINT) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, ImportError) as error:
        if done:
            raise VideoError(f"the download of {name} broke off after {done:,} bytes", "try again") from error
        reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)).partition("\n")[0] or type(error).__name__
        hint = LATER_HINT
        if isinstance(error, ImportError):
            reason = "a SOCKS proxy needs the package socksio"
            hint = "pip install socksio, or unset the variable that names the proxy, such as ALL_PROXY"
        raise VideoError(f"cannot download {name}: {reason}", hint) from error
    if not done:
        raise VideoError(f"{name} is empty", "check the address")


def _check_beginning(beginning: bytes, content_type: str, name: str) -> None:
    """Raise VideoError for playlists and web pages. The type is only a hint: servers also send videos as text/html."""
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"#extm3u") or (text.startswith(b"<") and b"<mpd" in text):
        hint = 'evoprune watch follows playlists: evoprune watch URL -Q "What happens?"'
        raise VideoError(f"{name} is a playlist, not a video or a picture", hint)
    if text.startswith(b"<") and ("html" in content_type.lower() or b"html" in text):
        raise VideoError(f"{name} is a web page, not a video or a picture", DOWNLOAD_HINT)


@contextmanager
def _opened(url: str, name: str, public: bool, check: Check) -> Iterator[httpx2.Response]:
    """Send the request, follow redirects, and yield the successful response, whose body has not been read.

    The client's own redirects are not used, because they read the body of each redirect, which may be endless.
    """
    address = httpx2.URL(url)
    if not address.host:
        raise httpx2.InvalidURL("it names no server")
    auth = (address.username, address.password) if address.userinfo else None  # kept out of the log of httpx2
    transport = _PublicTransport() if public else None
    with httpx2.Client(transport=transport, headers=HEADERS, timeout=TIMEOUT_S) as client:
        trace = {"trace": _trace_with(check)}
        request = client.build_request("GET", address.copy_with(userinfo=b""), extensions=trace)
        for _ in range(MOST_REDIRECTS + 1):
            with closing(client.send(request, auth=auth, stream=True)) as response:
                if response.is_success:
                    yield response
                    return
                if not response.has_redirect_location:
                    code = response.status_code
                    usual = "try again later" if code >= 500 or code == 429 else DOWNLOAD_HINT
                    raise VideoError(f"cannot download {name}: {code} {response.reason_phrase}", HINTS.get(code, usual))
            if response.next_request is None or response.next_request.url.scheme not in ("http", "https"):
                there = without_password(response.headers["Location"])
                hint = "redirects may lead to http and https addresses only"
                raise VideoError(f"{name} leads to {there}, which is not read", hint)
            auth = None  # a redirect to the same server repeats the header
            request = response.next_request
    raise VideoError(f"{name} redirects more than {MOST_REDIRECTS} times", "check the address")


def _trace_with(check: Check) -> Callable[[str, dict[str, Any]], None]:
    """Return a trace function of httpx2 that has `check` called before each connection and each read.

    A timeout alone does not stop a server that sends its headers byte by byte.
    """

    def trace(event: str, info: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.started":
            check()
        stream = info.get("return_value")
        if isinstance(stream, httpcore2.NetworkStream):
            read = stream.read

            def checked_read(max_bytes: int, timeout: float | None = None) -> bytes:
                check()
                return read(max_bytes, timeout)

            stream.read = checked_read  # type: ignore[method-assign]

    return trace


class _PublicTransport(httpx2.HTTPTransport):
    """Connects to the public internet only: to the very addresses it checked, so a name cannot change its meaning meanwhile."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        host = request.url.raw_host.decode()
        port = request.url.port or {"http": 80, "https": 443}[request.url.scheme]
        problem: Exception = httpx2.ConnectError("no address")
        for address in _public_addresses(host, port):
            pinned = httpx2.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions=request.extensions | {"sni_hostname": host},
            )
            try:
                return super().handle_request(pinned)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                problem = error
        raise problem


def _public_addresses(host: str, port: int) -> list[str]:
    """Resolve a host. Raises OSError, UnicodeError; VideoError if an address is not public, or belongs to this machine."""
    refused = VideoError(f"{host} is not on the public internet, so it is not read", "send the video itself")
    found = list(dict.fromkeys(str(place[0]) for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    if not found or not all(map(is_public, found)):
        raise refused
    for address in found:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, port))  # sends nothing, but finds the local address
            except OSError:  # no route
                continue
            if probe.getsockname()[0] == probe.getpeername()[0]:
                raise refused
    return found


# IPv6 addresses that lead to an IPv4 address, which may be in any network: NAT64, 6to4, Teredo.
TRANSLATED = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))


def is_public(address: str) -> bool:
    """Return True if an IP address is on the public internet: not private, loopback, link-local, multicast or reserved."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if any(ip in net for net in TRANSLATED):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)
