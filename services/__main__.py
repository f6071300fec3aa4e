"""`hearth`: the command line. Imports only what the verb needs: `hearth --help` and every service start fast."""

from __future__ import annotations

import sys


def main() -> int:
    """Run one verb; its exit code (2: wrong usage, 130: interrupted)."""
    try:
        from services.cli.parser import parse  # here, so that Ctrl-C ends this, too, without a traceback

        code = parse(sys.argv[1:]).run()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `hearth ps | head`
        sys.stderr.close()
        return 141


if __name__ == "__main__":
    sys.exit(main())
