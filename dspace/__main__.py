"""``python -m dspace``."""

import sys

from dspace.cli import main

sys.exit(main())
