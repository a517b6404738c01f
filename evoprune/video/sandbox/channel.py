"""Messages between two processes: plain data as JSON, with at most one file descriptor, and signs of life in between.

No pickle: a malicious video may have taken over the process that reads it, and must not run code in the other one.
"""

import json
import socket
import struct
import time

LARGEST = 2**26  # bytes of a message
ALIVE_EVERY_S = 1.0  # signs of life come at most this often
_LENGTH = struct.Struct("<I")
_ALIVE = _LENGTH.pack(0)


class Channel:
    """One end of a connected Unix socket. Sending and receiving may raise OSError.

    Args:
        descriptors: how many file descriptors a received message may bring, 0 or 1; the caller closes them.
    """

    def __init__(self, end: socket.socket, descriptors: int = 0):
        self._socket, self._descriptors, self._reported = end, descriptors, 0.0

    def send(self, message: dict, descriptor: int | None = None) -> None:
        """Send a message. Raises ValueError if it is too large."""
        content = json.dumps(message).encode()
        if len(content) > LARGEST:
            raise ValueError(f"a message of {len(content):,} bytes")
        head = _LENGTH.pack(len(content))
        if descriptor is not None:
            socket.send_fds(self._socket, [head], [descriptor])
            head = b""
        self._socket.sendall(head + content)

    def report_alive(self) -> None:
        """Report progress before there is a message, unless that was done just now."""
        now = time.monotonic()
        if now - self._reported > ALIVE_EVERY_S:
            self._reported = now
            self._socket.sendall(_ALIVE)

    def receive(self, patience_s: float | None = None) -> tuple[dict, int | None]:
        """The next message, and the descriptor that came with it.

        Raises:
            EOFError: the other end is closed. TimeoutError: neither a message nor a sign of life for `patience_s`.
        """
        self._socket.settimeout(patience_s)
        while True:
            head, descriptors, _, _ = socket.recv_fds(self._socket, _LENGTH.size, self._descriptors)
            if not head:
                raise EOFError
            (length,) = _LENGTH.unpack(head + self._exactly(_LENGTH.size - len(head)))
            if length > LARGEST:
                raise OSError(f"a message of {length:,} bytes")
            if length:
                return json.loads(self._exactly(length)), descriptors[0] if descriptors else None

    def _exactly(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            piece = self._socket.recv(min(size - len(content), 2**20))
            if not piece:
                raise EOFError
            content += piece
        return bytes(content)

    def close(self) -> None:
        self._socket.close()
