"""``python -m dspace``, and the command ``dspace``: the command line, with Ctrl-C heeded while it still loads."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line and return its exit code; see :func:`dspace.cli.main`."""
    try:
        from dspace.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
