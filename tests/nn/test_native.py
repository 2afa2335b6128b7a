"""Native loops against their PyTorch forms, for any number of threads."""

from __future__ import annotations

import pytest
import torch

from dspace.nn import native
from dspace.nn.functions import HeadNorm, causal_conv, l2norm


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def both(monkeypatch, function, *inputs):
    """Results and gradients with the native loops and without."""
    found = []
    for allowed in (True, False):
        with monkeypatch.context() as patch:
            if not allowed:
                patch.setattr(native, "usable", lambda x: False)
            leaves = [x.clone().requires_grad_() for x in inputs]
            y = function(*leaves)
            grads = torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
            found.append((y, *grads))
    return found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape, size", [((3, 17, 5), 4), ((40, 2, 64), 4), ((1, 1, 1), 3), ((2, 5, 3), 1)])
def test_convolution(monkeypatch, dtype, tolerance, shape, size):
    b, t, c = shape
    x, cache = torch.randn(b, t, c, dtype=dtype), torch.randn(b, size - 1, c, dtype=dtype)
    taps = torch.randn(size, c, dtype=dtype)
    fast, slow = both(monkeypatch, lambda x, h, w: causal_conv(x, w, h)[0], x, cache, taps)
    for a, e in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(2, 9, 3, 8), (1, 5), (700, 16)])
def test_norms(monkeypatch, dtype, tolerance, shape):
    x = torch.randn(shape, dtype=dtype)
    for fast, slow in zip(*both(monkeypatch, l2norm, x), strict=True):
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=10 * tolerance)
    norm = HeadNorm(shape[-1], 1e-5).to(dtype)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, shape[-1:], eps=1e-5))
    weight = torch.randn(shape[-1], dtype=dtype)

    def weighted(x, w):
        return torch.func.functional_call(norm, {"weight": w}, (x,))

    for fast, slow in zip(*both(monkeypatch, weighted, x, weight), strict=True):
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=10 * tolerance)
    assert torch.autograd.gradcheck(l2norm, x.double().flatten()[:4].reshape(2, 2).requires_grad_())


def test_results_do_not_depend_on_the_number_of_threads(threads):
    x, taps = torch.randn(90, 500, 6), torch.randn(4, 6)
    assert x.numel() > native.WORTH_THREADS
    found = []
    for count in (1, 2, 3):
        threads(count)
        a, w = x.clone().requires_grad_(), taps.clone().requires_grad_()
        y = l2norm(causal_conv(a, w)[0])
        found.append((y, *torch.autograd.grad(y.square().sum() + y.sum(), (a, w))))
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))


def test_zero_rows_and_nothing_at_all():
    x = torch.zeros(2, 4, requires_grad=True)
    l2norm(x).sum().backward()
    assert x.grad.isfinite().all()
    assert (
        l2norm(torch.zeros(0, 4)).shape == (0, 4)
        and causal_conv(torch.zeros(2, 0, 3), torch.ones(4, 3))[0].numel() == 0
    )
