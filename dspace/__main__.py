"""``python -m dspace``, and the command ``dspace``: the command line, with Ctrl-C heeded while it still loads."""

from __future__ import annotations

import sys

from dspace.interrupt import INTERRUPTED, forget, heed


def main() -> int:
    """Run the command line and return its exit code; see :func:`dspace.cli.main`."""
    try:
        from dspace.cli import main as run

        heed()
        code = run()
    except KeyboardInterrupt:
        code = INTERRUPTED
    forget()
    return code


if __name__ == "__main__":
    sys.exit(main())
