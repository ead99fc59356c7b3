"""Derivatives of networks: forward mode, central differences and double backward agree, with attention too."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from consilience.diffusion import Denoiser, RectifiedFlow
from consilience.diffusion.consistency import FlowMap, derivative
from consilience.diffusion.consistency.maps import forward_mode
from consilience.diffusion.consistency.objectives.meanflow import Guidance

from .exact import generator

Network = Callable[[Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """One head over 6 tokens of 4 values, the time added; by torch's function, torch's layer, or diffusers'."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from diffusers.models.attention_processor import Attention as Diffusers

        self.kind = kind
        self.maps = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)
        self.block = Diffusers(query_dim=4, heads=2, dim_head=2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.reshape(len(x), 6, 4) + t[:, None, None]
        if self.kind == "function":
            found: Tensor = scaled_dot_product_attention(*(part(x) for part in self.maps))
        elif self.kind == "layer":
            found = self.layer(x, x, x, need_weights=False)[0]
        else:
            found = self.block(x)
        return found.flatten(1)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.layers(x.reshape(len(x), 1, 4, 6) * (1 + t[:, None, None, None]))
        return found.flatten(1)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(25, 16), nn.SiLU(), nn.Linear(16, 24))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.layers(torch.cat([x, t[:, None]], 1))
        return found


def network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kinds = {"perceptron": Perceptron, "convolution": Convolution}
        made: nn.Module = kinds[name]() if name in kinds else Attention(name)
    return made.double()


def double_backward(f: Network, at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
    """The derivative by reverse mode alone: the gradient, by a dummy w, of the gradient of w . f along the tangents."""
    points = tuple(part.clone().requires_grad_() for part in at)
    with forward_mode():  # the fused kernel has no second derivative either
        value = f(*points)
    w = torch.zeros_like(value, requires_grad=True)
    back = torch.autograd.grad(value, points, w, create_graph=True)
    total = sum((b * v).sum() for b, v in zip(back, along, strict=True))
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, w)[0]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["perceptron", "convolution", "function", "layer", "diffusers"])
def test_three_derivatives_agree(name: str, train: bool) -> None:
    f = network(name).train(train)
    x, v = torch.randn(2, 3, 24, dtype=torch.float64, generator=generator())
    t, dt = torch.rand(2, 3, dtype=torch.float64, generator=generator(1))
    value, exact = derivative(f, (x, t), (v, dt))
    same, finite = derivative(f, (x, t), (v, dt), "finite", step=1e-4)
    torch.testing.assert_close(value, f(x, t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same, f(x, t), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        _, still = derivative(f, (x, t), (v, dt))
    for other in (finite, double_backward(f, (x, t), (v, dt)), still):
        torch.testing.assert_close(exact, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["perceptron", "convolution", "function"])
def test_derivatives_without_a_graph_are_those_with_one(name: str) -> None:
    net = network(name)
    at = torch.randn(3, 24, generator=generator(1)).double(), torch.rand(3, generator=generator(2)).double()
    along = torch.randn(3, 24, generator=generator(3)).double(), torch.ones(3).double()
    with torch.no_grad():
        plain = derivative(net, at, along)
        constant = derivative(lambda x, t: torch.ones_like(x), at, along)
    with torch.inference_mode():
        inferred = derivative(net, at, along)
    kept = derivative(net, at, along)
    assert kept[1].requires_grad
    for a, b, c in zip(plain, inferred, kept, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-12)
    assert not constant[1].any()


@torch.no_grad()
def test_derivatives_nest_in_torchs_transforms() -> None:
    x, v = torch.randn(2, 5, dtype=torch.float64, generator=generator())

    def slope(x: Tensor) -> Tensor:
        return derivative(torch.sin, (x,), (v,))[1]

    torch.testing.assert_close(torch.func.jvp(slope, (x,), (v,))[1], -x.sin() * v**2)
    torch.testing.assert_close(torch.func.vmap(lambda x, v: derivative(torch.sin, (x,), (v,))[1])(x, v), x.cos() * v)


def test_the_tangent_can_be_differentiated_by_the_weights() -> None:
    f = network("function")
    weight = next(f.parameters())
    x, v = torch.randn(2, 3, 24, dtype=torch.float64, generator=generator())
    t, dt = torch.rand(2, 3, dtype=torch.float64, generator=generator(1))

    def slope() -> Tensor:
        return derivative(f, (x, t), (v, dt))[1].square().sum()

    (grad,) = torch.autograd.grad(slope(), weight)
    along = torch.randn(weight.shape, dtype=torch.float64, generator=generator(2))
    with torch.no_grad():
        weight.add_(along, alpha=1e-5)
        ahead = float(slope())
        weight.sub_(along, alpha=2e-5)
        behind = float(slope())
    assert (ahead - behind) / 2e-5 == pytest.approx(float((grad * along).sum()), rel=1e-6)


def test_an_operation_without_forward_mode_says_what_to_do() -> None:
    def fused(x: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]
        return found

    x, v = torch.randn(2, 1, 1, 4, 8, dtype=torch.float64, generator=generator())
    with pytest.raises(RuntimeError, match='jvp="finite"'):
        derivative(fused, (x,), (v,))
    _, finite = derivative(fused, (x,), (v,), "finite", step=1e-5)
    _, exact = derivative(lambda y: scaled_dot_product_attention(y, y, y), (x,), (v,))
    torch.testing.assert_close(finite, exact, rtol=1e-6, atol=1e-6)


def test_attention_is_left_as_it_was() -> None:
    def state() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        names = "flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled"
        return (*(getattr(cuda, name)() for name in names), torch.backends.mha.get_fastpath_enabled())

    before = state()
    x, t = torch.ones(1, 24, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    derivative(network("layer"), (x, t), (x, t))
    assert state() == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_differences_drop_the_same_units_at_all_points() -> None:
    """With masks of their own the two points differ by O(1), and their difference by 1 / step."""
    f = nn.Sequential(nn.Linear(24, 64), nn.SiLU(), nn.Dropout(0.5), nn.Linear(64, 24)).double()
    x, v = torch.randn(2, 3, 24, dtype=torch.float64, generator=generator())
    torch.manual_seed(5)
    value, finite = derivative(f, (x,), (v,), "finite", step=1e-4)
    torch.manual_seed(5)
    same, exact = derivative(f, (x,), (v,))
    torch.testing.assert_close(value, same, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(finite, exact, rtol=1e-5, atol=1e-6)


class Attending(nn.Module):
    """u of pictures [batch, 2, 4, 4] by attention over their 16 places, two times and a label beside, float32."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 8), nn.Linear(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.times, self.labels = nn.Linear(2, 8), nn.Embedding(3, 8)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
        known = self.times(torch.stack([t, s], 1)) + self.labels(label)
        hidden = self.layer(self.up(x.flatten(2).transpose(1, 2)) + known[:, None])
        found: Tensor = self.down(hidden).transpose(1, 2).reshape(x.shape)
        return found


OBJECTIVES: dict[str, dict[str, Any]] = {
    "meanflow": {"guidance": Guidance(2.0, {"label": 2}, mix=0.5)},
    "self_distillation": {},
    "ayf": {"taught": True},
    "rcm": {"taught": True},
    "consistency_fm": {},
    "traflow": {"taught": True, "steps": 2},
    "scflow": {"taught": True},
    "dcm": {"taught": True, "boundary": 0.5},
    "epg": {},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_pictures_attention_dropout_and_labels(name: str) -> None:
    module = importlib.import_module(f"consilience.diffusion.consistency.objectives.{name}")
    options = dict(OBJECTIVES[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Attending().train()
    batch = {"x": torch.randn(8, 2, 4, 4, generator=generator()), "label": torch.arange(8) % 2}
    process = RectifiedFlow()
    teacher = Denoiser(lambda x, t, label: 0.3 * x, process, "x0") if options.pop("taught", False) else None
    if name == "rcm":
        options["fake"] = Denoiser(lambda x, t, label: 0.2 * x, process, "x0")
    loss, log = getattr(module, name)(FlowMap(net, process), teacher, batch, generator(1), **options)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(isinstance(value, float) and math.isfinite(value) for value in log.values())
    grads = [part.grad for part in net.parameters() if part.grad is not None]
    assert grads
    assert all(bool(g.isfinite().all()) for g in grads)
    again = getattr(module, name)(FlowMap(net, process), teacher, batch, generator(1), **options)[0]
    assert float(again.detach()) == float(loss.detach())  # dropout too is of the generator
