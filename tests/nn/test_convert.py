"""Surgery: every weight kept, the output the same to the last bit, the new path trainable."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch

import dspace
from dspace.errors import UserError
from dspace.nn import Mixer, Model, SoftmaxAttention, convert
from dspace.spec.transforms import TransformError

SIZES = {"hidden_size": 16, "num_heads": 2}


@pytest.fixture
def without_kernels(monkeypatch):
    """Every form is the plain PyTorch one: nothing is compiled natively."""
    real = dspace.compile

    def compile(source):
        module = real(source, certify=False)
        plain = ModuleType(module.__name__)
        plain.__dict__.update(module.__dict__)
        name = module.SPEC["name"]
        for form in ("chunk", "recurrent"):
            setattr(plain, f"{form}_{name}", getattr(module, f"reference_{name}"))
        return plain

    monkeypatch.setattr(dspace, "compile", compile)


def test_with_native_kernels_too(monkeypatch):
    real = dspace.compile
    monkeypatch.setattr(dspace, "compile", lambda source: real(source, certify=False))
    same_to_the_last_bit("simple_gla", {})


def trained(name: str, **options) -> Mixer:
    torch.manual_seed(3)
    mixer = Mixer(name, **SIZES, **options)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("simple_gla", {"skip": True}),
        ("rwkv6", {}),
        ("mamba2", {"expand_v": 2.0, "num_v_heads": 4, "output_gate": False}),
        ("gla", {"low_rank": 5, "frozen": ()}),
    ],
)
def test_the_output_is_the_same_to_the_last_bit(name, options, without_kernels):
    same_to_the_last_bit(name, options)


def same_to_the_last_bit(name, options):
    old = trained(name, **options)
    new = convert(old)
    x = torch.randn(2, 21, 16)
    assert torch.equal(new(x), old(x))
    assert torch.equal(new(x, recurrent=True), old(x, recurrent=True))
    y, state = new(x[:, :9], output_final_state=True)
    z, before = old(x[:, :9], output_final_state=True)
    assert torch.equal(y, z) and torch.equal(state.op[0], before.op) and not state.op[1].any()
    # Of two rows, a matrix product's last bit depends on some processors on where its operands lie in memory.
    torch.testing.assert_close(new.step(x[:, 9], state)[0], old.step(x[:, 9], before)[0], rtol=1e-6, atol=1e-7)


def test_every_weight_is_kept(without_kernels):
    old = trained("simple_gla", skip=True)
    new = convert(old)
    added = dict(new.named_parameters())
    for name, value in old.named_parameters():
        kept = added.pop(name)
        if kept.shape == value.shape:
            assert torch.equal(kept, value)
        else:  # the fused projection has rows of the gain besides
            rows = {tuple(r.tolist()) for r in kept}
            assert name == "project.weight" and all(tuple(r.tolist()) in rows for r in value)
    assert set(added) == {"atoms.head_gain", "atoms.head_scale", "constants.I_p.raw", "expand.0.weight"}
    assert not added["atoms.head_gain"].any()
    assert torch.equal(new.constants["I_p"](), torch.ones(2))


def test_the_new_path_has_gradients_and_the_old_ones_are_right(without_kernels):
    old = trained("simple_gla")
    new = convert(old)
    x = torch.randn(2, 12, 16)
    target = torch.randn(2, 12, 16)
    (old(x) * target).sum().backward()
    (new(x) * target).sum().backward()
    assert new.atoms["head_gain"].grad.abs().min() > 0
    assert new.constants["I_p"].raw.grad.abs().min() > 0
    torch.testing.assert_close(new.output.weight.grad, old.output.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new.atoms["A_log"].grad, old.atoms["A_log"].grad, rtol=1e-3, atol=1e-5)


def test_it_learns_and_wakes_up(without_kernels):
    new = convert(trained("simple_gla"))
    x, target = torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    step = torch.optim.Adam(new.parameters(), 0.03)
    losses = []
    for _ in range(12):
        step.zero_grad()
        loss = (new(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        step.step()
    assert losses[-1] < losses[0]
    assert not new.operator.recurrent.asleep
    woken = new.atoms["head_gain"].clamp_min(0)
    assert woken.any()
    expand = new.expand[-1].weight.grad
    assert expand is not None and expand.abs().max() > 0
    twin = Mixer(new.operator.spec, **SIZES, layer=new.options["layer"])
    twin.load_state_dict(new.state_dict())
    assert torch.equal(twin(x), new(x))


def test_a_whole_model_is_converted_and_the_old_one_left_alone(without_kernels):
    model = Model("simple_gla", vocab_size=11, num_layers=2, mlp_ratio=2.0, **SIZES)
    before = copy.deepcopy(model.state_dict())
    made = convert(model, "metaplastic")
    tokens = torch.randint(0, 11, (3, 14))
    assert torch.equal(made(tokens), model(tokens))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert made.num_parameters() > model.num_parameters()
    assert made.state_size() > model.state_size()
    assert torch.equal(copy.deepcopy(made)(tokens), model(tokens))


def test_weight_decay_leaves_the_same_parameters_alone(without_kernels):
    from dspace.nn.parameters import copy_of
    from dspace.nn.training import _groups

    model = Model("simple_gla", vocab_size=11, num_layers=2, mlp_ratio=2.0, skip=True, **SIZES)
    marked = [p for n, p in model.named_parameters() if n.endswith(("norm.weight", "project.weight"))]
    assert len(marked) >= 3
    for parameter in marked:  # as many training recipes do by hand
        parameter.no_weight_decay = True
    atom = next(p for n, p in model.named_parameters() if ".atoms." in n)
    atom.no_weight_decay = False
    made = convert(model)

    def groups(of):
        names = {id(p): n for n, p in of.named_parameters()}
        return [{names[id(p)] for p in group["params"]} for group in _groups(of, 0.1)]

    shared = {n for n, _ in model.named_parameters()}
    assert [g & shared for g in groups(made)] == groups(model)
    assert all(groups(model)) and set.union(*groups(model)) == shared == shared & {
        n for n, _ in made.named_parameters()
    }
    twin = copy_of(model)
    assert groups(twin) == groups(model) and groups(copy.deepcopy(model)) != groups(model), "what a plain copy forgets"


def test_what_cannot_be_converted_is_refused(without_kernels):
    with pytest.raises(UserError, match="does not know 'per_channel'"):
        convert(trained("simple_gla"), "per_channel")
    with pytest.raises(UserError, match="no dspace.nn.Mixer"):
        convert(SoftmaxAttention(16, 2))
    with pytest.raises(TransformError, match="not diagonal"):
        convert(trained("delta_net"))
    with pytest.raises(UserError, match="another spec"):
        convert(trained("simple_gla"), spec="gla")
