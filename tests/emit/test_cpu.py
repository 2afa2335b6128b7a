"""Native loops: outputs and every gradient against an independent float64 evaluation."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import RECURRENCES
from draw import arguments, error, gradients
from oracle import evaluate
from torch.utils._python_dispatch import TorchDispatchMode


def call(module, form, name, args, **options):
    """``[o, (variance), *final states]`` of one public function."""
    inputs, parameters, states = args
    options.setdefault("output_final_state", True)
    out = getattr(module, f"{form}_{name}")(*inputs, *parameters, initial_state=tuple(states), **options)
    final = out[-1] if isinstance(out[-1], tuple) else (out[-1],)
    return [*out[:-1], *final]


def flat(args):
    return [x for group in args for x in group]


@pytest.mark.parametrize("form", ["recurrent", "reference"])
@pytest.mark.parametrize("name", sorted(RECURRENCES))
def test_outputs_and_gradients_match_plain_evaluation(native, name, form):
    r = RECURRENCES[name]
    for steps, variance in ((7, False), (35, r.variance is not None)):
        args = arguments(r, steps=steps)
        expected = evaluate(r, *args, scale=3**-0.5, variance=variance)
        result = call(native(name), form, name, args, output_variance=variance)
        assert max(error(a, b) for a, b in zip(result, expected, strict=True)) < 1e-12
        wanted, found = gradients(expected, flat(args)), gradients(result, flat(args))
        assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-11


@pytest.mark.parametrize("name", ["ratio", "erase"])
@pytest.mark.parametrize(
    ("dtype", "budget", "gradient_budget"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 5e-3, 8e-3), (torch.float16, 2e-3, 2e-3)],
)
@pytest.mark.parametrize(("keys", "values", "steps"), [(48, 40, 33), (3, 1, 16)])
def test_low_precision_inputs_accumulate_in_float32(native, name, dtype, budget, gradient_budget, keys, values, steps):
    r = RECURRENCES[name]
    args = arguments(r, steps=steps, keys=keys, values=values, dtype=dtype)
    expected = evaluate(r, *args, scale=keys**-0.5, variance=False)
    result = call(native(name), "recurrent", name, args)
    assert result[0].dtype == dtype and result[1].dtype == torch.float32
    assert max(error(a, b) for a, b in zip(result, expected, strict=True)) < budget
    wanted, found = gradients(expected, flat(args)), gradients(result, flat(args))
    assert all(g.dtype == x.dtype for g, x in zip(found, flat(args), strict=True))
    assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) < gradient_budget


@pytest.mark.parametrize("form", ["recurrent", "reference"])
@pytest.mark.parametrize("name", ["ratio", "coupled"])
def test_packed_sequences_match_separate_ones(native, name, form):
    r = RECURRENCES[name]
    bounds = [0, 5, 5, 22, 23]
    args = arguments(r, batch=1, steps=23, sequences=4)
    inputs, parameters, states = args
    for dtype in (torch.int32, torch.int64):
        result = call(native(name), form, name, args, cu_seqlens=torch.tensor(bounds, dtype=dtype))
    parts = []
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        alone = [x[:, begin:end] for x in inputs], parameters, [s[n : n + 1] for s in states]
        parts.append(call(native(name), "reference", name, alone))
    expected = [torch.cat([p[0] for p in parts], 1)]
    expected += [torch.cat([p[i] for p in parts]) for i in range(1, len(parts[0]))]
    assert max(error(a, b) for a, b in zip(result, expected, strict=True)) < 1e-12
    wanted, found = gradients(expected, flat(args)), gradients(result, flat(args))
    assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-11


@pytest.mark.parametrize("name", ["ratio", "erase", "coupled"])
def test_split_anywhere_with_carried_state(native, name):
    r, module = RECURRENCES[name], native(name)
    inputs, parameters, states = args = arguments(r, steps=9)
    whole = call(module, "recurrent", name, args)
    for cut in (0, 1, 4, 9):
        first = call(module, "recurrent", name, ([x[:, :cut] for x in inputs], parameters, states))
        second = call(module, "recurrent", name, ([x[:, cut:] for x in inputs], parameters, first[1:]))
        joined = [torch.cat([first[0], second[0]], 1), *second[1:]]
        assert max(error(a, b) for a, b in zip(joined, whole, strict=True)) < 1e-12


@pytest.mark.parametrize("steps", [0, 1, 32, 33])
def test_lengths_and_gradients_of_the_final_state_alone(native, steps):
    r = RECURRENCES["ratio"]
    args = arguments(r, steps=steps)
    for form in ("recurrent", "reference", "chunk"):
        result = call(native("ratio"), form, "ratio", args)
        assert result[0].shape == (2, steps, 2, 4)
        found = gradients(result[1:], flat(args))
        if form == "recurrent":
            first = found
        assert max(error(a, b) for a, b in zip(found, first, strict=True)) < 1e-12


def test_gradcheck_and_gradgradcheck(native):
    for name in ("ratio", "erase"):
        args = arguments(RECURRENCES[name], batch=1, steps=3, heads=1, keys=2, values=2)
        leaves = flat(args)
        counts = [len(group) for group in args]

        def run(form, *leaves, name=name, counts=counts):
            groups = list(leaves)
            a, b = counts[0], counts[0] + counts[1]
            return tuple(call(native(name), form, name, (groups[:a], groups[a:b], groups[b:])))

        assert torch.autograd.gradcheck(lambda *x, run=run: run("recurrent", *x), leaves)
        assert torch.autograd.gradgradcheck(lambda *x, run=run: run("reference", *x), leaves)


def test_strided_inputs(native):
    r = RECURRENCES["ratio"]
    inputs, parameters, states = arguments(r, batch=1)
    wide = [x.expand(3, *x.shape[1:]) for x in inputs]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in wide]
    states = [s.expand(3, *s.shape[1:]) for s in states]
    for given in (wide, turned):
        result = call(native("ratio"), "recurrent", "ratio", (given, parameters, states))
        expected = call(native("ratio"), "reference", "ratio", (given, parameters, states))
        assert max(error(a, b) for a, b in zip(result, expected, strict=True)) < 1e-12


def test_whoever_watches_a_call_sees_the_operator(native):
    """Without gradients the operator is left out, except where someone looks at it or transforms it."""
    module, r = native("ratio"), RECURRENCES["ratio"]
    args = tuple([x.detach() for x in group] for group in arguments(r, batch=1, steps=5))
    expected = call(module, "reference", "ratio", args)[0]
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    def run(scale=1.0):
        inputs = [x * scale if n == 2 else x for n, x in enumerate(args[0])]
        return call(module, "recurrent", "ratio", (inputs, *args[1:]))[0]

    with Watch():
        assert error(run(), expected) < 1e-12
    assert any("native_forward" in s for s in seen)
    with torch.profiler.profile() as profile:
        run()
    assert any("native_forward" in e.key for e in profile.key_averages())
    with torch.device("meta"):  # a default device that is not that of the arguments
        assert error(run(), expected) < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap runs an operator that has no batching rule once an element
        scales = torch.tensor([1.0, 2.0], dtype=torch.float64)
        batched = torch.func.vmap(run)(scales)
    assert max(error(b, run(s)) for b, s in zip(batched, scales, strict=True)) < 1e-12


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_transforms_that_only_plain_pytorch_has_get_it(native, form):
    module, r = native("ratio"), RECURRENCES["ratio"]
    inputs, parameters, states = (tuple(x.detach() for x in group) for group in arguments(r, batch=1, steps=5))

    def run(form, *inputs):
        return call(module, form, "ratio", (inputs, parameters, states))[0]

    def loss(form, x):
        return run(form, x, *inputs[1:]).square().sum()

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0], inputs[0])
        tangents = [
            torch.autograd.forward_ad.unpack_dual(run(f, dual, *inputs[1:])).tangent for f in (form, "reference")
        ]
    assert tangents[1].abs().max() > 0 and torch.equal(*tangents)
    stacked = torch.stack([inputs[0], 2 * inputs[0]])
    for transform in (
        lambda f: torch.func.jvp(lambda *x: run(f, *x), inputs, inputs)[1],
        lambda f: torch.func.grad(lambda x: loss(f, x))(inputs[0]),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: loss(f, x)))(stacked),
        lambda f: torch.func.hessian(lambda x: loss(f, x))(inputs[0]),
    ):
        assert transform("reference").abs().max() > 0
        assert error(transform(form), transform("reference")) < 1e-12


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_full_graph_compilation(native, backend):
    r, module = RECURRENCES["ratio"], native("ratio")
    for form in ("recurrent", "chunk", "reference"):
        function = getattr(module, f"{form}_ratio")

        @torch.compile(fullgraph=True, backend=backend)
        def run(inputs, parameters, states, function=function):
            o, variance, final = function(
                *inputs, *parameters, initial_state=tuple(states), output_final_state=True, output_variance=True
            )
            return [2 * o, variance, *final]

        for steps in (5, 6) if form != "reference" else (5,):
            args = arguments(r, steps=steps)
            result = run(*args)
            expected = call(module, "reference", "ratio", args, output_variance=True)
            expected[0] = 2 * expected[0]
            assert max(error(a, b) for a, b in zip(result, expected, strict=True)) < 1e-12
            wanted, found = gradients(expected, flat(args)), gradients(result, flat(args))
            assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-11


def test_compiled_packed_sequences(native):
    r, module = RECURRENCES["ratio"], native("ratio")
    inputs, parameters, _ = arguments(r, batch=1, steps=9)
    bounds = torch.tensor([0, 4, 9])
    run = torch.compile(
        lambda *x: module.recurrent_ratio(*x, cu_seqlens=bounds)[0], fullgraph=True, backend="aot_eager"
    )
    expected = module.reference_ratio(*inputs, *parameters, cu_seqlens=bounds)[0]
    assert error(run(*inputs, *parameters), expected) < 1e-12
    with pytest.raises(
        ValueError, match="cu_seqlens"
    ):  # unchecked by the front door under compilation, not by the loop
        module._native_offsets(torch.tensor([0, 10]), 1, 9)


def test_operator_conformance(native):
    """PyTorch's own checks of custom operators: schema, fake implementation, autograd registration."""
    r, module = RECURRENCES["ratio"], native("ratio")
    args = flat(arguments(r, batch=1, steps=3, heads=1, keys=2, values=2, dtype=torch.float32))
    torch.library.opcheck(
        module._native_forward_op,
        (*args, None, 0.5, 16, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
