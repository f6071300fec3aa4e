"""Cables that can be pulled: each service behind a link of its own, a network namespace or else a silent relay.

With the right to make namespaces a link is a veth pair on a bridge, and `cut` takes it down: packets vanish, nothing is
closed. Without it (a laptop, most CI) the services stay where they are and reach NATS and Redis through `Proxy`s.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from urllib.parse import urlsplit

from tests.builders.proxy import Proxy
from tests.builders.warden import Warden


class Link(ABC):
    """One service's way to NATS and Redis. `command` goes before the service's own; `host` is where it can listen."""

    command: tuple[str, ...] = ()
    host: str = "127.0.0.1"

    @abstractmethod
    def env(self, nats_url: str, redis_url: str) -> dict[str, str]:
        """The urls as this service has to write them."""

    @abstractmethod
    def cut(self) -> None:
        """Pull the cable."""

    @abstractmethod
    def heal(self) -> None:
        """Put it back."""


class Network(ABC):
    """Makes links. `host` is where nats-server and redis-server have to listen."""

    host: str = "127.0.0.1"

    @abstractmethod
    def link(self, *, front: bool = False) -> Link:
        """A new link; with `front` the service listens on an address that stays reachable while the link is cut."""

    @abstractmethod
    def close(self) -> None:
        """Remove everything."""


class ProxyLink(Link):
    """Two relays."""

    def __init__(self) -> None:
        self._proxies: dict[tuple[str, int], Proxy] = {}
        self._cut = False

    def _through(self, url: str, default: int) -> str:
        parts = urlsplit(url)
        target = (parts.hostname or "127.0.0.1", parts.port or default)
        if target not in self._proxies:
            self._proxies[target] = Proxy(target)
            if self._cut:
                self._proxies[target].silence()
        return parts._replace(netloc=f"127.0.0.1:{self._proxies[target].port}").geturl()

    def env(self, nats_url: str, redis_url: str) -> dict[str, str]:
        return {
            "HEARTH_NATS_URL": self._through(nats_url, 4222),
            "HEARTH_REDIS_URL": self._through(redis_url, 6379),
        }

    def cut(self) -> None:
        self._cut = True
        for proxy in self._proxies.values():
            proxy.silence()

    def heal(self) -> None:
        self._cut = False
        for proxy in self._proxies.values():
            proxy.resume()

    def close(self) -> None:
        for proxy in self._proxies.values():
            proxy.close()


class ProxyNetwork(Network):
    """Links that are relays."""

    def __init__(self) -> None:
        self._links: list[ProxyLink] = []

    def link(self, *, front: bool = False) -> Link:
        self._links.append(ProxyLink())
        return self._links[-1]

    def close(self) -> None:
        for link in self._links:
            link.close()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class NamespaceLink(Link):
    """A namespace on a bridge. A second, never cut veth pair on the front bridge is where clients come from."""

    def __init__(self, namespace: str, device: str, host: str) -> None:
        self.command = ("ip", "netns", "exec", namespace)
        self.host = host
        self._device = device

    def env(self, nats_url: str, redis_url: str) -> dict[str, str]:
        return {}

    def cut(self) -> None:
        _ip("link", "set", self._device, "down")

    def heal(self) -> None:
        _ip("link", "set", self._device, "up")


class NamespaceNetwork(Network):
    """Two bridges in a private /24: the bus, with nats-server and redis-server at .1, and the clients' side at .129."""

    def __init__(self, warden: Warden) -> None:
        """Raises OSError without the right to do this, or without `ip`."""
        self._name = secrets.token_hex(3)
        self._warden = warden
        self._count = 0
        self._undo: list[tuple[str, ...]] = []
        octets = secrets.token_bytes(2)
        self._net = f"10.{200 + octets[0] % 50}.{octets[1]}"
        self.host = f"{self._net}.1"
        try:
            for bridge, address in ((f"hb{self._name}", 1), (f"hf{self._name}", 129)):
                self._do(("ip", "link", "del", bridge), "link", "add", bridge, "type", "bridge")
                _ip("addr", "add", f"{self._net}.{address}/25", "dev", bridge)
                _ip("link", "set", bridge, "up")
            self._probe()
        except OSError:
            self.close()
            raise

    def _do(self, undo: tuple[str, ...], *words: str) -> None:
        _ip(*words)
        self._undo.append(undo)
        self._warden.remove(*undo)

    def _probe(self) -> None:
        link = self.link()
        done = subprocess.run([*link.command, "true"], capture_output=True, text=True, timeout=20, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip())

    def _plug(self, namespace: str, bridge: str, device: str, inner: str, address: int) -> None:
        _ip("link", "add", device, "type", "veth", "peer", "name", inner, "netns", namespace)
        _ip("link", "set", device, "master", bridge, "up")
        _ip("-n", namespace, "addr", "add", f"{self._net}.{address}/25", "dev", inner)
        _ip("-n", namespace, "link", "set", inner, "up")

    def link(self, *, front: bool = False) -> Link:
        self._count += 1
        number = self._count
        namespace, device = f"hearth-{self._name}-{number}", f"hv{self._name}-{number}"
        self._do(("ip", "netns", "del", namespace), "netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        self._plug(namespace, f"hb{self._name}", device, "eth0", 1 + number)
        host = f"{self._net}.{1 + number}"
        if front:
            self._plug(namespace, f"hf{self._name}", f"hw{self._name}-{number}", "eth1", 129 + number)
            host = f"{self._net}.{129 + number}"
        return NamespaceLink(namespace, device, host)

    def close(self) -> None:
        for command in reversed(self._undo):
            subprocess.run(command, capture_output=True, timeout=20, check=False)
        self._undo.clear()


@contextlib.contextmanager
def open_network(warden: Warden) -> Iterator[Network]:
    """Namespaces where they are permitted, relays elsewhere."""
    network: Network
    try:
        if os.geteuid() != 0:
            raise OSError("only root makes namespaces")
        network = NamespaceNetwork(warden)
    except OSError:
        network = ProxyNetwork()
    try:
        yield network
    finally:
        network.close()
