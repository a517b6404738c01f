"""Downloads a video or image from an http or https URL to a temporary file.

URLs are assumed to be trusted, because they come from the user. To download untrusted URLs, pass a transport that restricts which
hosts may be contacted, and a `progress` callback that raises an exception if the download becomes too large or takes too long.
"""

import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager

import httpx2

import evoprune
from evoprune.errors import UsageError, VideoError, callback_errors
from evoprune.util import DOWNLOAD_HINT, size, without_password
from evoprune.video.temporary import temporary_file

TIMEOUT_S = 20.0  # timeout for connecting and for each read
MAX_BYTES = 8 * 2**30
MAX_REDIRECTS = 10
MAX_S = 3_600.0  # time limit for the entire download
HEADERS = {"User-Agent": f"evoprune/{evoprune.__version__}", "Accept": "*/*", "Accept-Encoding": "identity"}
LATER_HINT = "check the address, or try again later"
HINTS = {  # hints for error messages, by HTTP status
    401: "it requires a login: download the file yourself and give its path",
    403: f"the server denies access; {DOWNLOAD_HINT}",
    404: "check the address",
    410: "check the address",
}


@contextmanager
def downloaded(
    url: str,
    *,
    offline: bool = False,
    progress: Callable[[int, int], None] | None = None,
    transport: httpx2.BaseTransport | None = None,
) -> Iterator[str]:
    """Download a file and yield the path of a temporary copy, which is deleted on exit.

    Args:
        offline: If True, raise UsageError instead of using the network.
        progress: Callback that receives the number of bytes downloaded so far and the total number of bytes (0 if unknown). It is
            called before and after each read of the response body and can abort the download by raising an exception.
        transport: The httpx2 transport for sending requests. The default transport uses the proxies configured in the environment
            (`https_proxy`, `no_proxy`).

    Raises:
        UsageError: `offline` is True.
        VideoError: The server cannot be reached, rejects the request, sends nothing for `TIMEOUT_S`, or disconnects; the file is
            empty, a web page, a playlist, or larger than `MAX_BYTES`; the download takes longer than `MAX_S`; or the copy cannot be
            stored.
    """
    name = without_password(url)
    if offline:
        hint = "leave out --offline (offline=True), or download it first and give the path of the file"
        raise UsageError(f"cannot download {name}: the network may not be used (offline)", hint)
    with (
        callback_errors() as passing,
        closing(_chunks(url, name, passing(progress), transport)) as chunks,
        temporary_file(chunks, name) as path,
    ):
        yield path


def _chunks(
    url: str, name: str, progress: Callable[[int, int], None] | None, transport: httpx2.BaseTransport | None
) -> Generator[bytes, None, None]:
    """Yield the response body in chunks. Network errors are raised as VideoError, so any OSError is a disk error."""
    done = 0
    start = time.monotonic()
    try:
        address = httpx2.URL(url)
        if not address.host:
            raise httpx2.InvalidURL("it has no host name")
        # Pass the password separately to keep it out of httpx2's log.
        auth = (address.username, address.password) if address.userinfo else None
        address = address.copy_with(userinfo=b"")
        hooks = {"response": [lambda response: _check_redirect(response, name)]}
        with (
            httpx2.Client(transport=transport, headers=HEADERS, timeout=TIMEOUT_S, event_hooks=hooks) as client,
            closing(_response(client, address, auth, name)) as response,
        ):
            if not response.is_success:
                code = response.status_code
                usual = "try again later" if code >= 500 or code == 429 else DOWNLOAD_HINT
                raise VideoError(f"cannot download {name}: {code} {response.reason_phrase}", HINTS.get(code, usual))
            total = int(response.headers.get("Content-Length", 0))
            if total > MAX_BYTES:
                raise VideoError(f"{name} is larger than {size(MAX_BYTES)}", DOWNLOAD_HINT)
            if progress:
                progress(0, total)
            for chunk in response.iter_bytes():
                if not done:
                    _check_beginning(chunk, response.headers.get("Content-Type", ""), name)
                done += len(chunk)
                if done > MAX_BYTES:
                    raise VideoError(f"{name} is larger than {size(MAX_BYTES)}", DOWNLOAD_HINT)
                if time.monotonic() - start > MAX_S:
                    raise VideoError(f"the download of {name} took longer than an hour", DOWNLOAD_HINT)
                if progress:
                    # If the server compresses the body, `done` may exceed the total.
                    progress(done, max(done, total) if total else 0)
                yield chunk
    except httpx2.TimeoutException as error:
        problem = f"cannot download {name}: no answer for {TIMEOUT_S:g} s"
        if done:
            problem = f"the download of {name} stalled after {done:,} bytes: nothing arrived for {TIMEOUT_S:g} s"
        raise VideoError(problem, "try again later") from error
    except httpx2.DecodingError as error:
        raise VideoError(f"{name} is not encoded as the server states", DOWNLOAD_HINT) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, ImportError) as error:
        if done:
            raise VideoError(f"the download of {name} was interrupted after {done:,} bytes", "try again") from error
        reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)).partition("\n")[0] or type(error).__name__
        hint = LATER_HINT
        if isinstance(error, ImportError):
            reason = "a SOCKS proxy needs the package socksio"
            hint = "pip install socksio, or unset the proxy variable, such as ALL_PROXY"
        raise VideoError(f"cannot download {name}: {reason}", hint) from error
    if not done:
        raise VideoError(f"{name} is empty", "check the address")


def _response(client: httpx2.Client, address: httpx2.URL, auth: tuple[str, str] | None, name: str) -> httpx2.Response:
    """Send a GET request and follow redirects. Redirect bodies are not read, because they could be endless."""
    request = client.build_request("GET", address)
    for _ in range(1 + MAX_REDIRECTS):
        response = client.send(request, auth=auth, stream=True)
        if response.next_request is None:
            return response
        response.close()
        request = response.next_request
        auth = None  # httpx2 keeps the header if the redirect stays on the same host
    raise VideoError(f"{name} redirects more than {MAX_REDIRECTS} times", HINTS[404])


def _check_redirect(response: httpx2.Response, name: str) -> None:
    """Raise VideoError if a response redirects to an invalid address, or to one that is neither http nor https.

    This check runs before httpx2 follows the redirect, because what httpx2 says about such addresses depends on its version.
    """
    if not response.has_redirect_location:
        return
    try:
        target = httpx2.URL(response.headers["Location"])
    except httpx2.InvalidURL:
        target = None
    if target is not None and target.scheme not in ("", "http", "https"):
        problem = f"{name} redirects to an address of {target.scheme}:, and only http and https are read"
        raise VideoError(problem, HINTS[404])
    if target is None or (target.scheme and not target.host and not target.path.startswith("/")):
        raise VideoError(f"{name} redirects to an invalid address", HINTS[404])


def _check_beginning(beginning: bytes, content_type: str, name: str) -> None:
    """Raise VideoError if a response body begins like a playlist or a web page.

    The content type alone is not reliable, because some servers send videos as text/html.
    """
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"#extm3u") or (text.startswith(b"<") and b"<mpd" in text):
        hint = 'evoprune watch reads playlists: evoprune watch URL -Q "What happens?"'
        raise VideoError(f"{name} is a playlist, not a video or an image", hint)
    if text.startswith(b"<") and ("html" in content_type.lower() or b"html" in text):
        raise VideoError(f"{name} is a web page, not a video or an image", DOWNLOAD_HINT)
