"""The conformance class, used as a user would, and shown to catch a variant that breaks its promise."""

from __future__ import annotations

import pytest

from dspace import spec as specs
from dspace.runtime.certify import certify_module
from dspace.runtime.compiler import compile
from dspace.testing import VariantConformance

SPEC = """
name = "conforming"
[inputs]
q = "k"
k = "k"
v = "v"
w = { axes = "", domain = "unit" }
[state.S]
axes = "kv"
update = "S + w * k * (v - sum_k(S * k))"
[readout]
output = "scale * sum_k(S * q)"
"""


class TestDeltaRule(VariantConformance):
    source = specs.loads(SPEC)
    seed = 11


def test_conformance_catches_another_recurrence():
    other = specs.loads(SPEC.replace("w * k * (v", "w * k * (1.001 * v"))
    certificate = certify_module(other, compile(TestDeltaRule.source, certify=False), quick=True, seed=1)
    with pytest.raises(AssertionError, match="d v"):
        TestDeltaRule().test_every_form_agrees_with_the_oracle(certificate)
