"""What the client library gets by itself: a whole object in parallel ranges, thrown away.

python -m benchmarks.loading.remote_plain OPTIONS_JSON BUCKET KEY CONNECTIONS RANGE_BYTES
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import obstore
from obstore.store import S3Store


def main() -> None:
    """See the module."""
    options, bucket, key = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
    connections, range_bytes = int(sys.argv[4]), int(sys.argv[5])
    store = S3Store(bucket, **options)
    size = obstore.head(store, key)["size"]

    def fetch(start: int) -> int:
        return len(obstore.get_range(store, key, start=start, end=min(start + range_bytes, size)))

    with ThreadPoolExecutor(connections) as executor:
        list(executor.map(fetch, range(0, min(size, connections * range_bytes), range_bytes)))  # connections open
        start = time.perf_counter()
        total = sum(executor.map(fetch, range(0, size, range_bytes)))
        seconds = time.perf_counter() - start
    print(json.dumps({"bytes": total, "seconds": seconds}))


if __name__ == "__main__":
    main()
