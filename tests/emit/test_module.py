"""The assembled module: signature, front door, names, header."""

from __future__ import annotations

import ast
import inspect
import keyword
from dataclasses import replace

import pytest
import torch
from cases import RECURRENCES, Identity, analysis_of, build, inputs, load, parameter
from draw import arguments, error, gradients

from dspace.emit import emit
from dspace.emit.cpu.section import section


def test_module_stands_alone_and_says_what_it_is(native):
    source = inspect.getsource(native("ratio"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    allowed = {"__future__", "functools", "itertools", "math", "os", "queue", "sys", "threading", "types", "weakref"}
    allowed |= {"ctypes", "numba", "numpy", "torch"}
    assert imported <= allowed
    assert "Ibar" in native("ratio").__doc__ and "hash" in native("ratio").__doc__
    table = native("ratio").SPEC
    assert [v["name"] for v in table["inputs"]] == ["q", "k", "v", "b", "g"]
    assert [(s["name"], s["axes"]) for s in table["states"]] == [("M", "kv"), ("Ibar", "kv")]
    for form in ("chunk", "recurrent", "reference"):
        signature = inspect.signature(getattr(native("ratio"), f"{form}_ratio"))
        assert list(signature.parameters) == [
            *("q", "k", "v", "b", "g", "I_p"),
            *("scale", "initial_state", "output_final_state", "output_variance", "cu_seqlens"),
        ]


def test_emission_is_deterministic():
    analysis = analysis_of(RECURRENCES["coupled"])
    assert emit(Identity("coupled"), analysis) == emit(Identity("coupled"), analysis)


def test_words_of_the_spec_are_quoted(tmp_path):
    """Quotes, backslashes and line breaks in docs end no docstring of the module."""
    said = 'three """ quotes,\na \\N{name}, an end "'
    r = RECURRENCES["ratio"]
    r = r.replace(
        title=said,
        inputs=tuple(replace(v, doc=said) for v in r.inputs),
        parameters=tuple(replace(p, doc=said) for p in r.parameters),
        states=tuple(replace(s, doc=said) for s in r.states),
    )
    made = load(emit(Identity("ratio"), analysis_of(r), targets=[section]), tmp_path / "quoted_words.py")
    assert made.SPEC["inputs"][0]["doc"] == said
    assert "three ''' quotes, a \\N{name}" in made.chunk_ratio.__doc__


def test_awkward_names(tmp_path):
    """Inputs called like keywords, modules, internals and arguments of the generated functions."""
    r = build(
        "awkward",
        inputs(torch="k", math="k", real="v", token="", x0="v", lam="", numpy="v"),
        (parameter("heads", ""), parameter("i", "k")),
        {
            "one": ("kv", "0", "exp(-token**2)*one + real*math*heads + x0*lam"),
            "sum0": ("v", "0", "sum0 + sum_k(one*i)"),
        },
        "scale*sum_k(one*torch*i) + sum0*numpy",
    )
    module = load(emit(Identity("awkward"), analysis_of(r), targets=[section]), tmp_path / "awkward_names.py")
    a, b, s = arguments(r)
    expected, _ = module.reference_awkward(*a, *b)
    result, _ = module.recurrent_awkward(*a, *b)
    assert error(result, expected) < 1e-12
    pairs = zip(gradients([result], [*a, *b]), gradients([expected], [*a, *b]), strict=True)
    assert max(error(x, y) for x, y in pairs) < 1e-12
    assert not any(keyword.iskeyword(v["name"]) for v in module.SPEC["inputs"])


@pytest.mark.parametrize("form", ["recurrent", "reference"])
def test_grouped_heads_share_inputs(native, form):
    r, module = RECURRENCES["ratio"], native("ratio")
    (q, k, v, b, g), (I_p,), _ = arguments(r, heads=4)
    q2, k2, I_1 = q[:, :, ::2].detach().requires_grad_(), k[:, :, ::2].detach().requires_grad_(), I_p[:1]
    run = getattr(module, f"{form}_ratio")
    result, _ = run(q2, k2, v, b, g, I_1)
    expected, _ = run(q2.repeat_interleave(2, 2), k2.repeat_interleave(2, 2), v, b, g, I_1.expand(4))
    assert error(result, expected) < 1e-12
    pairs = zip(gradients([result], [q2, k2, v]), gradients([expected], [q2, k2, v]), strict=True)
    assert max(error(x, y) for x, y in pairs) < 1e-12


@pytest.mark.parametrize("form", ["recurrent", "reference"])
def test_initial_state_from_parameters_is_differentiable(native, form):
    r, module = RECURRENCES["coupled"], native("coupled")
    a, b, _ = arguments(r)
    A, lam, c = b
    states = (A.expand(2, 2, 3, 4), torch.zeros_like(A).expand(2, 2, 3, 4), lam.expand(2, 2, 4))
    states += (torch.ones(2, 2, 3, dtype=torch.float64), c.expand(2, 2))
    run = getattr(module, f"{form}_coupled")
    result, expected = run(*a, *b)[0], run(*a, *b, initial_state=states)[0]
    assert error(result, expected) < 1e-12
    for x, y in zip(gradients([result], b), gradients([expected], b), strict=True):
        assert error(x, y) < 1e-12


def test_defaults_and_results(native):
    r, module = RECURRENCES["ratio"], native("ratio")
    a, b, _ = arguments(r, keys=9, dtype=torch.float32)
    o, state = module.chunk_ratio(*a, *b)
    assert state is None and o.shape == (2, 7, 2, 4)
    assert torch.equal(o, module.chunk_ratio(*a, *b, scale=1 / 3)[0])
    o, variance, (M, Ibar) = module.chunk_ratio(*a, *b, output_variance=True, output_final_state=True)
    assert variance.shape == o.shape and M.shape == Ibar.shape == (2, 2, 9, 4) and M.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, _ = module.chunk_ratio(*a, *b)
    assert error(under, o) < 1e-6
    single, final = native("scalar_decay").chunk_scalar_decay(*a[:3], a[4], output_final_state=True)
    assert isinstance(final, torch.Tensor) and final.shape == (2, 2, 9, 4)


def test_zero_tokens(native):
    r, module = RECURRENCES["ratio"], native("ratio")
    a, b, s = arguments(r, steps=0)
    for form in ("chunk", "recurrent", "reference"):
        o, (M, _) = getattr(module, f"{form}_ratio")(*a, *b, initial_state=tuple(s), output_final_state=True)
        assert o.shape == (2, 0, 2, 4) and torch.equal(M, s[0])
        leaves = [x.clone().requires_grad_() for x in (*a, *b)]
        o, _ = getattr(module, f"{form}_ratio")(*leaves)
        found = torch.autograd.grad(o.sum(), leaves)
        assert all(d.shape == x.shape and not d.any() for d, x in zip(found, leaves, strict=True))


def test_second_derivatives_are_referred_to_the_reference(native):
    a, b, _ = arguments(RECURRENCES["ratio"], steps=3)
    leaves = [x.requires_grad_() for x in (*a, *b)]
    o, _ = native("ratio").chunk_ratio(*leaves)
    (first,) = torch.autograd.grad(o.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="reference_ratio"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda a, o: a.__setitem__(0, a[0].int()), TypeError, "floating point"),
        (lambda a, o: a.__setitem__(0, a[0].tolist()), TypeError, "'q' must be a tensor"),
        (lambda a, o: a.__setitem__(1, a[1][..., :2]), ValueError, "'k' has K = 2, but 'q' has 3"),
        (lambda a, o: a.__setitem__(4, a[4][..., None]), ValueError, r"'g' must have shape \[B, T, H\]"),
        (lambda a, o: a.__setitem__(2, a[2][:, :3]), ValueError, "batch and time"),
        (lambda a, o: a.__setitem__(5, torch.ones(3)), ValueError, "heads"),
        (lambda a, o: o.update(cu_seqlens=torch.tensor([0, 7])), ValueError, "batch size 1"),
        (lambda a, o: o.update(cu_seqlens=torch.tensor([0.0, 7.0])), TypeError, "int32 or int64"),
        (lambda a, o: o.update(initial_state=torch.zeros(2, 2, 3, 4)), ValueError, "must hold 2 tensor"),
        (lambda a, o: o.update(initial_state=(torch.zeros(3, 2, 3, 4),) * 2), ValueError, "3 sequence"),
        (lambda a, o: a.__setitem__(0, a[0].to("meta")), ValueError, "is on"),
    ],
)
def test_mistakes_are_named(native, change, kind, message):
    a, b, _ = arguments(RECURRENCES["ratio"])
    given, options = [*a, *b], {}
    change(given, options)
    with pytest.raises(kind, match=message):
        native("ratio").recurrent_ratio(*given, **options)


@pytest.mark.parametrize("bounds", [[0, 5], [1, 7], [0, 5, 3, 7]])
def test_bad_packing_is_named(native, bounds):
    a, b, _ = arguments(RECURRENCES["ratio"], batch=1)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        native("ratio").recurrent_ratio(*a, *b, cu_seqlens=torch.tensor(bounds))


def test_no_variance_is_named(native):
    a, b, _ = arguments(RECURRENCES["erase"])
    with pytest.raises(ValueError, match="no predictive variance"):
        native("erase").recurrent_erase(*a, *b, output_variance=True)


def test_cpu_takes_the_faster_form():
    """The choice between two CPU forms follows the size of the state and whether the decay is one number."""
    from dspace.emit.module import cpu_choice
    from dspace.math.ir import AffineState, Classification

    recurrence = RECURRENCES["scalar_decay"]
    analysis = analysis_of(recurrence)
    for axes, large in (("", "_chunk"), ("k", "_loop")):
        state = AffineState("S", "kv", recurrence.states[0].update, None, axes, ())
        letter = Classification("a", "affine", "", affine=(state,))
        source = "import importlib.util\n" + cpu_choice(replace(analysis, classification=letter), "_chunk", "_loop")
        for sizes, expected in (((8, 8), "_loop"), ((128, 128), large)):
            scope = {
                "_sizes": lambda *a, sizes=sizes: sizes,
                "_chunk": lambda *a: "_chunk",
                "_loop": lambda *a: "_loop",
            }
            exec(source, scope)
            assert scope["_cpu_chunk_core"](None, None, None, None) == expected


@pytest.mark.parametrize(
    ("given", "kept"),
    [([0, 4, 9], [0, 4, 9]), ([3, 12, 5, 7], [0, 9, 9, 9]), ([0, -5, 2, 20], [0, 0, 2, 9]), ([1, 1], [0, 9])],
)
def test_offsets_that_cannot_be_read_are_brought_into_order(native, given, kept):
    """Under torch.compile reading them would break the graph: then no kernel may leave its tensors."""
    module = native("ratio")
    compiled = torch.compile(lambda x: module._offsets(x, 1, 9, x.device), fullgraph=True, backend="eager")
    assert compiled(torch.tensor(given, dtype=torch.int32)).tolist() == kept
