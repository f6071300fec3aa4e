"""How fast bytes come from each tier, as measured from real transfers. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WEIGHT_OF_NEWEST: Final = 0.3  # of the exponentially weighted bandwidth
MEASURED_BYTES: Final = 2**20  # transfers smaller than this measure latency, not bandwidth
# What eviction believes before the first transfer, in bytes per second: an ordinary NVMe disk, a gigabit or two.
PRIOR_SSD: Final = 1e9
PRIOR_REMOTE: Final = 2e8


@dataclass(slots=True)
class Bandwidths:
    """Bytes per second: SSD → DRAM, source → SSD, peer → SSD; None before the first transfer.

    `imported` is what all imports together reached, counted in bytes of the image: conversions too, whose limit is
    seldom the network.
    """

    ssd: float | None = None
    remote: float | None = None
    peer: float | None = None
    imported: float | None = None

    def read(self, image_bytes: int, seconds: float) -> None:
        """An image came from the SSD in this many seconds of its own (without those it stood behind others)."""
        self.ssd = _measured(self.ssd, image_bytes, seconds)

    def fetched(self, remote_bytes: int, peer_bytes: int, image_bytes: int, seconds: float) -> None:
        """An import took this long. What came mostly from one side measures that side."""
        if peer_bytes > remote_bytes:
            self.peer = _measured(self.peer, peer_bytes, seconds)
        else:
            self.remote = _measured(self.remote, remote_bytes, seconds)
        self.imported = _measured(self.imported, image_bytes, seconds)

    def read_s(self, image_bytes: int) -> float:
        """Seconds that an image of this size takes from the SSD."""
        return image_bytes / (self.ssd or PRIOR_SSD)

    def import_s(self, image_bytes: int, own: float | None = None) -> float:
        """Seconds that an import takes; `own` is the bandwidth of this checkpoint's own last import, if known."""
        return image_bytes / (own or self.imported or PRIOR_REMOTE)


def rate(moved_bytes: int, seconds: float) -> float | None:
    """Bytes per second; None of too few bytes to tell."""
    return moved_bytes / seconds if moved_bytes >= MEASURED_BYTES and seconds > 0 else None


def _measured(old: float | None, moved_bytes: int, seconds: float) -> float | None:
    newest = rate(moved_bytes, seconds)
    if newest is None or old is None:
        return newest if newest is not None else old
    return old + WEIGHT_OF_NEWEST * (newest - old)
