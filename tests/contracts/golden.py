"""Add the bytes of new messages to golden.json: `python -m tests.contracts.golden`. Old bytes are never changed."""

from __future__ import annotations

import json
from pathlib import Path

from shared import codec
from tests.contracts.examples import EXAMPLES

PATH = Path(__file__).parent / "golden.json"


def main() -> None:
    """Write the file."""
    golden: dict[str, str] = json.loads(PATH.read_text()) if PATH.exists() else {}
    for example in EXAMPLES:
        golden.setdefault(type(example).__name__, codec.encode(example).hex())
    PATH.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
