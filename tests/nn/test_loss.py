"""Losses by the way of a compiled GPU, on a CPU: its kernel interpreted, its formulas traced as for a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from dspace.nn.loss import tied_rows
from dspace.runtime import offline

pytest.importorskip("triton")
from dspace.nn import loss_kernel  # noqa: E402

PROGRAM = """
import json, sys, torch
import dspace
from dspace.nn import Model, TrainConfig, flat, loss_kernel, model as models, stack
from dspace.nn.flat import FlatAdamW
from dspace.nn.loss import logit_losses
from dspace.nn.step import Step

def relative(a, b):
    return float((a.detach().double() - b.double()).norm() / b.double().norm().clamp(min=1e-9))

torch.manual_seed(SEED)
found = {}
for most, trials, rows, size, classes in ((16384, 2, 5, 3, 7), (16384, 1, 4, 8, 64), (32, 3, 6, 4, 100), (32, 1, 1, 2, 96)):
    loss_kernel._MOST = most
    torch._dynamo.reset()
    x = torch.randn(trials, rows, size, requires_grad=True)
    weight = (3 * torch.randn(trials, classes, size)).requires_grad_()
    targets, cotangent = torch.randint(0, classes, (trials, rows)), torch.randn(trials, rows)
    call = torch.compile(lambda x, w, t: logit_losses(x, w, t), backend="aot_eager", fullgraph=True)
    results = []
    plain = torch.nn.functional.cross_entropy(
        (x.double() @ weight.double().mT).flatten(0, 1), targets.flatten(), reduction="none"
    ).view(targets.shape)
    for losses in (call(x, weight, targets), plain):
        results.append([losses, *torch.autograd.grad(losses, (x, weight), cotangent.to(losses.dtype))])
    found[f"losses {most} {trials} {classes}"] = [relative(a, b.detach()) for a, b in zip(*results)]
loss_kernel._MOST = 16384

# training steps, by the plain way and by that of a GPU, with the copy that the optimizer keeps and without
flat.LARGE = 1 << 10
for trials, precision in ((1, None), (2, None), (2, torch.bfloat16)):
    trained = []
    for fused, narrow in ((False, False), (True, False), (True, True)):
        torch._dynamo.reset()
        models.fused = lambda weight: fused and torch.compiler.is_compiling()
        made = stack([Model("simple_gla", vocab_size=256, hidden_size=16, num_heads=2, seed=s) for s in range(trials)])
        made.train()
        optimizer = FlatAdamW(made, trials, [0.1] * trials, 1.0)
        if not narrow:
            optimizer.narrow = lambda *a: None
        draw = torch.Generator().manual_seed(5)
        batch = [torch.randint(0, n, (2 * trials, w), generator=draw) for n, w in ((256, 20), (20, 5), (256, 5))]
        step = Step(made, optimizer, tuple(batch), precision, "eager")
        step._loss = torch.compile(step.loss, backend="aot_eager", fullgraph=True)
        step._update = torch.compile(optimizer.update, backend="aot_eager", fullgraph=True)
        controls = optimizer.controls(torch.full((4, trials), 1e-3))
        for control in controls:
            step(*batch, control)
        copy = made.embedding.narrow
        assert (copy is not None) == (narrow and precision is not None)
        saved = optimizer.snapshot()
        step(*batch, controls[0])
        assert copy is None or torch.equal(copy, made.embedding.weight.to(precision))
        optimizer.restore(saved)
        assert copy is None or torch.equal(copy, made.embedding.weight.to(precision))
        trained.append([step.take_losses(), *(p.detach().clone() for p in made.parameters())])
    plain, fused, copied = trained
    found[f"trained {precision} {trials}"] = [relative(a, b) for a, b in zip(fused, plain)]
    assert all(torch.equal(a, b) for a, b in zip(copied, fused))
print(json.dumps(found))
"""


def test_losses_and_training_are_those_of_the_plain_way() -> None:
    """In float32 to the last digits; with matmuls of bfloat16 to theirs, of which AdamW takes little but the sign."""
    code = PROGRAM.replace("SEED", str(int.from_bytes(os.urandom(3), "big")))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 7
    for case, (losses, *rest) in found.items():
        narrow = "bfloat16" in case
        assert losses < (2e-3 if narrow else 1e-5), (case, losses)
        assert narrow or max(rest) < (1e-3 if case.startswith("trained") else 1e-5), (case, rest)


def test_the_two_gradients_of_an_embedding_meet_in_one() -> None:
    """Of what was looked up, some of it often, and of what was multiplied with."""
    weight, rows = torch.randn(2, 11, 5, requires_grad=True), torch.tensor([[3, 3, 0, 3], [11, 21, 11, 4]])
    looked_up, multiplied = torch.randn(2, 4, 5), torch.randn(2, 11, 5)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        x, same = tied_rows(weight, rows)
        return (x * looked_up).sum() + (same * multiplied).sum()

    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(weight), weight)
    expected = torch.zeros(22, 5).index_add_(0, rows.flatten(), looked_up.flatten(0, 1)).view(2, 11, 5)
    torch.testing.assert_close(found, expected + multiplied)


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("classes", [8192, 50257])
def test_the_kernel_compiles_without_a_gpu_and_spills_nothing(target: str, classes: int) -> None:
    logits = torch.zeros(2, classes, dtype=torch.bfloat16)
    with offline.recording(loss_kernel) as launches:
        loss_kernel.cross_entropy(logits, torch.zeros(2, dtype=torch.int64))
    (launch,) = launches
    built = offline.build(launch, target)
    assert built.name == "_cross_entropy_kernel" and built.spilled == 0 and not built.faults
