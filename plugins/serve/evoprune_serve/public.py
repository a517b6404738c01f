"""HTTP connections restricted to the public internet, for downloading URLs sent by clients."""

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import httpcore2
import httpx2

from evoprune.errors import VideoError

PORTS = {"http": 80, "https": 443}


class PublicTransport(httpx2.HTTPTransport):
    """A transport that connects only to hosts on the public internet.

    The transport resolves and checks each host, then connects to the checked IP address, so DNS changes in the meantime have no
    effect. Redirects are checked in the same way.

    Args:
        check: A function called before each connection and read, which can abort the request by raising an exception. A timeout
            alone wouldn't stop a server that sends its headers one byte at a time.
    """

    def __init__(self, check: Callable[[], None]):
        super().__init__()
        self._check = check

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        scheme = request.url.scheme
        if scheme not in PORTS:
            raise httpx2.UnsupportedProtocol(f"it leads to an address of {scheme}:, and only http and https are read")
        host = request.url.raw_host.decode()
        problem: Exception = httpx2.ConnectError("no address")
        for address in _public_addresses(host, request.url.port or PORTS[scheme]):
            pinned = httpx2.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions=request.extensions | {"sni_hostname": host, "trace": self._trace},
            )
            try:
                response = super().handle_request(pinned)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                problem = error
                continue
            return response
        raise problem

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Call the check before each connection and read. httpcore2 calls this method for every event during a request."""
        if event == "connection.connect_tcp.started":
            self._check()
        stream = info.get("return_value")
        if isinstance(stream, httpcore2.NetworkStream):
            read = stream.read

            def checked_read(max_bytes: int, timeout: float | None = None) -> bytes:
                self._check()
                return read(max_bytes, timeout)

            stream.read = checked_read  # type: ignore[method-assign]


def _public_addresses(host: str, port: int) -> list[str]:
    """Resolve a host name and return its IP addresses, provided that all are public.

    Raises:
        OSError, UnicodeError: If the host can't be resolved.
        VideoError: If an address isn't public or belongs to this machine.
    """
    refused = VideoError(f"{host} is not on the public internet, so it is not read", "send the video itself")
    found = list(dict.fromkeys(str(place[0]) for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    if not found or not all(map(is_public, found)):
        raise refused
    for address in found:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, port))  # sends nothing but determines the local address that would be used
            except OSError:  # no route to the address
                continue
            if probe.getsockname()[0] == probe.getpeername()[0]:
                raise refused
    return found


# IPv6 networks with addresses translated to IPv4 addresses in any network, including private ones: NAT64, 6to4, and Teredo.
TRANSLATED = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))


def is_public(address: str) -> bool:
    """Return True if an IP address is on the public internet: not private, loopback, link-local, multicast, or reserved."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.is_site_local or any(ip in net for net in TRANSLATED):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)
