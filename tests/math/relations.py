"""The built-in variants, analysed once for every test of their relations."""

from __future__ import annotations

from dspace.math import analyse
from dspace.spec import builtin_names, load

ANALYSES = {name: analyse(load(name)) for name in builtin_names()}
RECURRENCES = {name: a.recurrence for name, a in ANALYSES.items()}
