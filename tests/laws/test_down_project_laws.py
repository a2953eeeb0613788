"""Laws of reading a layer's input once for experts and router: what autograd would say, of every order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from conftest import attach_to_layer, max_error, normal, scales
from timestep_experts.mixture import MixtureSpec
from timestep_experts.mixture.fast import FastKernels
from timestep_experts.mixture.fast.down_project import DownProjectAndPool
from timestep_experts.mixture.geometry import LayerGeometry
from timestep_experts.mixture.kernels import Experts

SHAPES = {"rows": ((3, 5, 6), False), "more axes": ((3, 2, 4, 6), False), "planes": ((3, 6, 2, 4), True)}


def read(x: Tensor, down: Tensor, channels_first: bool, wants_average: bool) -> tuple[Tensor, ...]:
    value = average_of(x, channels_first).detach() if wants_average else None
    hidden, average = DownProjectAndPool.apply(x, down, value, channels_first)
    return (hidden, average) if wants_average else (hidden,)


def read_by_autograd(x: Tensor, down: Tensor, channels_first: bool, wants_average: bool) -> tuple[Tensor, ...]:
    if channels_first:
        hidden = torch.einsum("bkn,brk->brn", x.flatten(2), down)
    else:
        hidden = torch.einsum("bnk,brk->bnr", x.flatten(1, -2), down)
    return (hidden, average_of(x, channels_first)) if wants_average else (hidden,)


def average_of(x: Tensor, channels_first: bool) -> Tensor:
    return x.flatten(2).mean(2) if channels_first else x.flatten(1, -2).mean(1)


@pytest.fixture(params=[True, False], ids=["with average", "without"])
def wants_average(request):
    return request.param


@pytest.fixture(params=SHAPES)
def case(request):
    shape, channels_first = SHAPES[request.param]
    x, down = normal(*shape, dtype=torch.double), normal(3, 2, 6, seed=1, dtype=torch.double)
    return x.requires_grad_(), down.requires_grad_(), channels_first


def test_it_says_and_pulls_what_autograd_does(case, wants_average):
    x, down, channels_first = case
    found = []
    for function in (read, read_by_autograd):
        outputs = function(x, down, channels_first, wants_average)
        pull = sum((output * normal(*output.shape, dtype=torch.double)).sum() for output in outputs)
        found.append([*outputs, *torch.autograd.grad(pull, (x, down))])
    assert all(max_error(a, b) <= 1e-13 for a, b in zip(*found, strict=True))  # fp64


def test_gradients_of_gradients(case, wants_average):
    x, down, channels_first = case

    def outputs(x, down):
        return read(x, down, channels_first, wants_average)

    # the value of the average is given, so differences of it are not seen numerically: it is checked above and below
    if not wants_average:
        assert torch.autograd.gradcheck(outputs, (x, down))
        assert torch.autograd.gradgradcheck(outputs, (x, down))
    found = []
    for function in (read, read_by_autograd):
        first = torch.autograd.grad(
            sum(output.square().sum() for output in function(x, down, channels_first, wants_average)),
            (x, down),
            create_graph=True,
        )
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, down)))
    assert all(max_error(a, b) <= 1e-10 for a, b in zip(*found, strict=True))  # fp64, values near 100


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch loads its rules so
def test_forward_mode(case, wants_average):
    x, down, channels_first = case
    tangents = normal(*x.shape, seed=2, dtype=torch.double), normal(*down.shape, seed=3, dtype=torch.double)
    joint, plain = (
        torch.func.jvp(lambda x, down, f=f: f(x, down, channels_first, wants_average), (x, down), tangents)
        for f in (read, read_by_autograd)
    )
    for said, expected in zip(joint, plain, strict=True):
        # the average is fp32 wherever the mixture takes it
        assert all(max_error(a, b) <= 1e-6 for a, b in zip(said, expected, strict=True))


@pytest.mark.parametrize("frozen", ["x", "down"])
def test_only_what_learns_gets_a_gradient(case, frozen, wants_average):
    x, down, channels_first = case
    {"x": x, "down": down}[frozen].requires_grad_(requires_grad=False)
    sum(output.sum() for output in read(x, down, channels_first, wants_average)).backward()
    assert (x.grad is None) == (frozen == "x")
    assert (down.grad is None) == (frozen == "down")


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_both_forms_agree_inside_a_layer(kernel, monkeypatch):
    layer = nn.Conv2d(6, 5, kernel, padding=kernel // 2) if kernel else nn.Linear(6, 5)
    net, _ = attach_to_layer(layer, MixtureSpec(scales(8, 4, 1)), "route")
    x = normal(3, *((6, 4, 4) if kernel else (7, 6)))
    calls = []
    joint = DownProjectAndPool.apply
    found = []
    for is_joint in (True, False):
        monkeypatch.setattr(DownProjectAndPool, "apply", lambda *args: calls.append(1) or joint(*args))
        if not is_joint:
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        net.zero_grad()
        own = x.clone().requires_grad_()
        y = net(own, torch.tensor([3.0, 510.5, 999.0]))
        y.square().mean().backward()
        found.append([y.detach(), own.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
        assert len(calls) == (kernel < 3)  # a convolution over several positions is another product
    assert all(max_error(a, b) <= 2e-6 for a, b in zip(*found, strict=True))  # fp32, values near 1


def test_autocast_reads_in_half_precision_and_averages_in_full():
    x, down = normal(3, 5, 6).requires_grad_(), normal(3, 2, 6, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (hidden,), average = FastKernels().read(x, x, Experts([down], []), LayerGeometry(6, 5))
    assert hidden.dtype == torch.bfloat16
    assert average.dtype == torch.float32
    assert torch.equal(average, x.mean(1))
    (hidden.sum() + average.sum()).backward()
    assert x.grad.dtype == down.grad.dtype == torch.float32
    # rounded to 8 bits: A to relative 2^-9, sums of 2 of them, and shares of 1 / 5
    assert max_error(x.grad, (down.sum(1, keepdim=True) + 1 / 5).expand_as(x)) <= 0.03
