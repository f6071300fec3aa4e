"""A TCP relay that can fall silent: it then forwards nothing and closes nothing, like a cable that was pulled."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

_PIECE_BYTES = 1 << 16


class Proxy:
    """Relays a loopback port to `target` (host, port). What was held back while it was silent is delivered after.

    Every piece on its way to the target is kept for `lag_s` seconds before it is forwarded, the next one behind it.
    """

    def __init__(self, target: tuple[str, int], *, lag_s: float = 0.0) -> None:
        self._target = target
        self._lag_s = lag_s
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._open = threading.Event()
        self._open.set()
        self._closed = False
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def silence(self) -> None:
        """Forward nothing; new connections are taken by the kernel and hear nothing."""
        self._open.clear()

    def resume(self) -> None:
        """Forward again."""
        self._open.set()

    def sever(self) -> None:
        """Close the connections that there are; what was held back on them is lost."""
        with self._lock:
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close everything."""
        self._closed = True
        self._open.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.sever()
        self._acceptor.join(5)

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        self._open.wait()
        try:
            far = socket.create_connection(self._target, timeout=5)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        with self._lock:
            self._sockets |= {near, far}
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=self._pump, args=(far, near, 0.0), daemon=True)
        back.start()
        self._pump(near, far, self._lag_s)
        back.join()
        with self._lock:
            self._sockets -= {near, far}
        near.close()
        far.close()

    def _pump(self, source: socket.socket, sink: socket.socket, lag_s: float) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE_BYTES):
                self._open.wait()
                if lag_s:
                    time.sleep(lag_s)
                sink.sendall(piece)
        self._open.wait()  # an end is not heard through a pulled cable either
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
