"""Everything that the store's core knows about its server, for the parts of the core. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.store.bandwidth import Bandwidths
from services.store.eviction import Uses
from services.store.holdings import DramHoldings, SsdHoldings
from services.store.leases import Leases
from services.store.outbox import Outbox
from shared.contracts.residency import Extent
from shared.errors import Code, Failure
from shared.sizes import size


@dataclass(slots=True)
class Tiers:
    """What lies where, who has been promised what, what is used how often, and how fast bytes come.

    `pins` maps checkpoint id → the tier that it is never evicted from ("dram" implies SSD). `numbers` orders events.
    """

    server_id: str
    segment: str
    segment_bytes: int
    board_offset: int
    out: Outbox
    ssd: SsdHoldings
    dram: DramHoldings
    leases: Leases
    uses: Uses[str]
    speeds: Bandwidths
    pins: dict[str, str]
    numbers: Iterator[int]
    draining: bool = False

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk of the pool."""
        return self.dram.allocator.chunk_bytes

    @property
    def pool_bytes(self) -> int:
        """What the DRAM pool holds."""
        return self.dram.allocator.capacity_bytes

    def use(self, checkpoint_id: str) -> None:
        """A checkpoint is used now, or somebody has said that it will be."""
        self.uses.record(checkpoint_id, self.out.now)
        number = next(self.numbers)
        for used in (self.dram.copies.get(checkpoint_id), self.ssd.whole.get(checkpoint_id)):
            if used is not None:
                used.used = number

    def shows_arrival(self, chunk_bytes: int) -> bool:
        """Whether the board can show how an image of this chunk size arrives."""
        return self.board_offset > 0 and chunk_bytes == self.chunk_bytes

    def too_large_for_pool(self, image_bytes: int) -> Failure:
        """Why an image that does not fit cannot be leased as a whole."""
        return Failure(
            code=Code.TOO_LARGE,
            message=f"The model takes {size(image_bytes)} and the DRAM pool of {self.server_id} has "
            f"{size(self.pool_bytes)}: it can only stream through it when it is loaded.",
        )

    def draining_failure(self) -> Failure:
        """Why nothing new is taken."""
        return Failure(code=Code.DRAINING, message=f"The store of server {self.server_id} is shutting down.")

    def free(self, extents: tuple[Extent, ...]) -> None:
        """Give chunks of the pool back."""
        self.dram.allocator.free(extents)
