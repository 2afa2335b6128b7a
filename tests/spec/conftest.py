from __future__ import annotations

import pytest

BASE = """\
name = "mine"

[inputs]
q = "k"
k = "k"
v = "v"
b = { axes = "v", domain = "nonnegative" }
g = { axes = "", domain = "nonpositive" }

[parameters]
I_p = { axes = "", domain = "positive", init = 1.0 }

[prior]
precision = "I_p"

[forgetting]
retain = "exp(g)"

[precision]
structure = "key_value"
evidence = "b * k**2"

[mean]
evidence = "v * k"

[readout]
output = "scale * sum_k(mean * q)"

[layer]
q = "l2norm(linear)"
k = "l2norm(linear)"
v = "write_gate * linear"
b = "softplus(linear)"
g = "-softplus(linear + dt_bias) * exp(A_log)"
"""


@pytest.fixture
def base() -> str:
    """A valid posterior spec to break in one place."""
    return BASE
