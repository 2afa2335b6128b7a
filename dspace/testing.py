"""Tests for variants of your own: a conformance class for pytest, and random valid specs.

In a test file::

    from dspace.testing import VariantConformance

    class TestMyVariant(VariantConformance):
        source = "my_variant.toml"

Every test compares with the float64 oracle, with fresh inputs on each run unless ``seed`` is set.
"""

from __future__ import annotations

import ast
import inspect
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from dspace.runtime.cases import Case, Shape, draw_arguments

if TYPE_CHECKING:
    from dspace.runtime.certificate import Certificate
    from dspace.spec import Spec

ALLOWED_IMPORTS = sys.stdlib_module_names | {"numba", "numpy", "torch", "triton"}
"""All that a generated module may import: nothing of dspace, nothing that a user of PyTorch lacks."""


class VariantConformance:
    """Subclass it with ``source`` set; pytest collects the tests below.

    Attributes:
        source: path of a spec file, name of a built-in spec, or a Spec.
        device: "cpu" or "cuda".
        quick: the short certificate, or the whole matrix.
        dtypes: names of dtypes; the certificate's own choice if None.
        seed: of the inputs; fresh ones on each run if None.
    """

    source: ClassVar[Any] = None
    device: ClassVar[str] = "cpu"
    quick: ClassVar[bool] = True
    dtypes: ClassVar[tuple[str, ...] | None] = None
    seed: ClassVar[int | None] = None

    @pytest.fixture(scope="class")
    def spec(self) -> Spec:
        """The variant's spec."""
        from dspace.runtime.sources import as_spec

        assert self.source is not None, "set `source` in your subclass of VariantConformance"
        return as_spec(self.source)

    @pytest.fixture(scope="class")
    def module(self, spec: Spec) -> ModuleType:
        """Its generated module, not certified yet."""
        from dspace.runtime import compile

        return compile(spec, certify=False)

    @pytest.fixture(scope="class")
    def certificate(self, spec: Spec, module: ModuleType) -> Certificate:
        """What verification says of it here."""
        from dspace.runtime.certify import certify_module

        return certify_module(spec, module, device=self.device, quick=self.quick, dtypes=self.dtypes, seed=self.seed)

    def test_every_form_agrees_with_the_oracle(self, certificate: Certificate) -> None:
        """Forward, every gradient, states, variance, packed, split: within the budgets."""
        failed = "\n".join(check.describe() for check in certificate.failures())
        assert certificate.passed, f"seed {certificate.seed}\n{failed}"

    def test_spec_survives_being_written(self, spec: Spec) -> None:
        """The resolved spec is a file that means the same."""
        from dspace import spec as specs

        assert specs.loads(spec.to_toml()).hash == spec.hash

    def test_text_is_deterministic_and_self_contained(self, spec: Spec, module: ModuleType) -> None:
        """The same spec gives the same text, which imports torch, triton and numba and nothing of dspace."""
        from dspace.emit import emit
        from dspace.math import analyse

        text = emit(spec, analyse(spec))
        assert text == Path(str(module.__file__)).read_text(encoding="utf-8")
        imported = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
        assert imported <= ALLOWED_IMPORTS

    def test_signatures_follow_the_spec(self, spec: Spec, module: ModuleType) -> None:
        """Inputs, then parameters, in the order of the spec; then the keywords of every variant."""
        names = [v["name"] for v in (*module.SPEC["inputs"], *module.SPEC["parameters"])]
        keywords = ["scale", "initial_state", "output_final_state", "output_variance", "cu_seqlens"]
        for form in ("chunk", "recurrent", "reference"):
            assert list(inspect.signature(getattr(module, f"{form}_{spec.name}")).parameters) == names + keywords

    def test_reference_has_second_derivatives(self, spec: Spec, module: ModuleType) -> None:
        """The gradient of the reference form is differentiable."""
        arguments = self.arguments(spec, T=2, K=2, V=2, dtype=torch.float64)
        o, _ = getattr(module, f"reference_{spec.name}")(*arguments)
        first = torch.autograd.grad(o.square().sum(), arguments, create_graph=True, allow_unused=True)
        total = sum(((g**2).sum() for g in first if g is not None and g.requires_grad), torch.zeros(()))
        second = torch.autograd.grad(total, arguments, allow_unused=True)
        assert any(g is not None for g in second)
        assert all(bool(g.isfinite().all()) for g in second if g is not None)

    def test_wrong_arguments_are_refused(self, spec: Spec, module: ModuleType) -> None:
        """A clear TypeError or ValueError, whatever is wrong."""
        function = getattr(module, f"chunk_{spec.name}")
        good = [a.detach() for a in self.arguments(spec, T=3)]
        with pytest.raises(ValueError, match=spec.name):
            function(good[0][:, :2], *good[1:])
        with pytest.raises(TypeError, match=spec.name):
            function(good[0].long(), *good[1:])
        with pytest.raises(ValueError, match="cu_seqlens"):
            function(
                *(g[:1] for g in good[: len(spec.inputs)]), *good[len(spec.inputs) :], cu_seqlens=torch.tensor([0, 9])
            )
        if not module.SPEC["variance"]:
            with pytest.raises(ValueError, match="variance"):
                function(*good, output_variance=True)

    def arguments(
        self, spec: Spec, T: int, K: int = 4, V: int = 3, dtype: torch.dtype = torch.float32
    ) -> list[torch.Tensor]:
        """Random inputs and parameters in signature order: leaves with ``B = 2``, two heads."""
        from dspace.math import lower

        case = Case("arguments", Shape(2, T, 2, 2, K, V))
        drawn = draw_arguments(lower(spec), (), case, dtype, self.device, 0 if self.seed is None else self.seed)
        return [*drawn.inputs.values(), *drawn.parameters.values()]


def random_spec(seed: int) -> Spec:
    """A random valid spec: posterior or recurrence form, any decay, contractions, one to three states, ratios.

    The variants are well conditioned by construction (bounded transitions, denominators away from zero) for inputs
    as :mod:`dspace.runtime.cases` draws them, so that float32 can be held to its budget. The same seed gives the same
    spec on every machine.
    """
    from dspace.spec import from_dict

    draw = random.Random(seed)
    tables = _random_posterior(draw) if draw.random() < 0.4 else _random_recurrence(draw)
    return from_dict(tables, name=f"random_{seed}", prune=True)


_INPUTS: dict[str, Any] = {
    "q": "k",
    "k": "k",
    "v": "v",
    "g": {"axes": "", "domain": "nonpositive"},
    "gk": {"axes": "k", "domain": "nonpositive"},
    "gv": {"axes": "v", "domain": "nonpositive"},
    "f": {"axes": "", "domain": "unit"},
    "fk": {"axes": "k", "domain": "unit"},
    "x": {"axes": "", "domain": "real"},
    "b": {"axes": "", "domain": "nonnegative"},
    "bv": {"axes": "v", "domain": "nonnegative"},
    "bk": {"axes": "k", "domain": "nonnegative"},
    "w": {"axes": "", "domain": "unit"},
}
_PARAMETERS: dict[str, Any] = {
    "p": {"axes": "", "domain": "positive", "init": 1.0},
    "pk": {"axes": "k", "domain": "positive", "init": 1.0},
    "pv": {"axes": "v", "domain": "positive", "init": 1.0},
    "u": {"axes": "k", "domain": "real", "init": 0.0},
    "m": {"axes": "v", "domain": "real", "init": 0.0},
    "a": {"axes": "", "domain": "positive", "init": 1.0},
}
_SCALAR_DECAYS = ("exp(g)", "f", "sigmoid(x)", "exp(-a * softplus(x))", "exp(-a)")
_KEY_DECAYS = ("exp(gk)", "fk", "exp(gk * a)", "exp(g + gk)")
_VALUE_DECAYS = ("exp(gv)", "exp(gk + gv)")


def _random_posterior(draw: random.Random) -> dict[str, Any]:
    structure = draw.choice(("constant", "scalar", "key", "value", "key_value", "key_value"))
    prior = {"scalar": ("p",), "key": ("p", "pk"), "value": ("p", "pv"), "key_value": ("p", "pk", "pv")}
    evidence = {
        "constant": ("0",),
        "scalar": ("b", "b * sum_k(k**2)", "w"),
        "key": ("b * k**2", "bk * k**2", "bk"),
        "value": ("bv", "bv * sum_k(k**2)"),
        "key_value": ("bv * k**2", "bv * bk", "b * k**2 + bv * w"),
    }
    retains = _SCALAR_DECAYS + (_KEY_DECAYS if structure in ("key", "key_value") else ("1",))
    tables: dict[str, Any] = {
        "inputs": _INPUTS,
        "parameters": _PARAMETERS,
        "prior": {"mean": draw.choice(("0", "0", "0", "m")), "precision": draw.choice(prior.get(structure, ("p",)))},
        "forgetting": {"retain": draw.choice(retains)},
        "precision": {"structure": structure, "evidence": draw.choice(evidence[structure])},
        "mean": {"evidence": draw.choice(("v * k", "v * k", "w * v * k", "bv * v * k"))},
        "readout": {"output": draw.choice(("scale * sum_k(mean * q)", "scale * sum_k(mean * q) + w * v"))},
    }
    if structure != "constant":
        tables["readout"]["variance"] = "scale**2 * sum_k(q**2 / precision)"
    return tables


def _random_recurrence(draw: random.Random) -> dict[str, Any]:
    decay = draw.choice(("1", *_SCALAR_DECAYS, *_KEY_DECAYS, *_VALUE_DECAYS))
    write = draw.choice(("v * k", "v * k", "b * v * k", "(1 - w) * v * k", "v * tanh(k)", "bv * k"))
    update = draw.choice(
        (
            f"{decay} * S + {write}",
            f"{decay} * S + {write}",
            f"{decay} * S + {write}",
            f"{decay} * S + w * k * (v - sum_k({decay} * S * k))",  # an error-correcting write
            f"{decay} * (S - w * k * sum_k(S * k)) + {write}",
            f"{decay} * S + v * k - w * v * sum_v(S * tanh(v)) / (1 + sum_v(v**2))",
            f"tanh({decay} * S + {write})",
            f"{decay} * S / (1 + abs(S)) + {write}",
        )
    )
    states: dict[str, Any] = {"S": {"axes": "kv", "init": draw.choice(("0", "0", "0", "p")), "update": update}}
    query = draw.choice(("q", "q", "q * w", "tanh(q)"))
    output = f"scale * sum_k(S * {query})"
    variance = None
    extra = draw.choice(("none", "none", "precision", "normaliser", "count", "second", "feedback", "key mean"))
    if extra == "precision":
        axes, evidence = draw.choice((("kv", "bv * k**2"), ("k", "b * k**2"), ("v", "bv"), ("", "b")))
        own = draw.choice(_SCALAR_DECAYS)
        states["P"] = {"axes": axes, "init": "0", "update": f"{own} * P + {evidence}"}
        output = f"scale * sum_k(S / (P + p) * {query})"
        variance = f"scale**2 * sum_k({query}**2 / (P + p))"
    elif extra == "normaliser":
        states["z"] = {"axes": "k", "init": "0", "update": f"{draw.choice(_SCALAR_DECAYS)} * z + exp(k)"}
        output = "sum_k(S * exp(q)) / (p + sum_k(z * exp(q)))"
    elif extra == "count":
        states["n"] = {"axes": "", "init": "0", "update": f"{draw.choice(_SCALAR_DECAYS)} * n + b"}
        output = f"scale * sum_k(S * {query}) / maximum(n, 1)"
    elif extra == "second":
        states["R"] = {"axes": "kv", "init": "0", "update": f"{draw.choice(_SCALAR_DECAYS)} * R + w * S"}
        output = f"scale * sum_k((S + R) * {query})"
    elif extra == "feedback":
        states["y"] = {"axes": "v", "init": "0", "update": "f * y + (1 - f) * tanh(sum_k(S * k))"}
        output = f"scale * sum_k(S * {query}) + y * sigmoid(x)"
    elif extra == "key mean":
        states["c"] = {"axes": "k", "init": "0", "update": "f * c + (1 - f) * k * sum_v(v)"}
        output = f"scale * sum_k(S * ({query} + c))"
    readout: dict[str, Any] = {"read": draw.choice(("after", "after", "before")), "output": output}
    if readout["read"] == "before":
        readout["output"] += " + v * sum_k(u * q * k)"
    if variance is not None:
        readout["variance"] = variance
    return {"inputs": _INPUTS, "parameters": _PARAMETERS, "state": states, "readout": readout}
