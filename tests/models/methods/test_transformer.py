"""Attention methods against transformers whose attention is written out in the open, float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from models.compat import define_missing_operators
from models.errors import MethodNotApplicable
from models.extractor import Extractor
from models.layers import TokenLayout
from models.methods import METHODS, implementation
from models.methods._attention import Seen, attention_hook, find_transformer
from models.probe import trace
from models.targets import ResolvedTarget
from models.types import Intervention
from tests.models.conftest import find_layouts

define_missing_operators()
import torchvision  # noqa: E402  (its operators come first)
from timm.models.deit import VisionTransformerDistilled as Distilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

OWN = [name for name, row in METHODS.items() if row.family == "transformer"]
SIDE, PATCH, DEPTH = 24, 8, 3
GRID = (SIDE // PATCH, SIDE // PATCH)
TARGETS = [ResolvedTarget(2), ResolvedTarget(0, (1, 4))]

TIMM = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 16, "depth": DEPTH, "num_heads": 2}
NETS = {
    "class token": {},
    "registers, normalised queries": {"reg_tokens": 2, "qk_norm": True, "init_values": 0.5},
    "mean of patches": {"global_pool": "avg", "class_token": False, "reg_tokens": 1},
    "mean beside a class token": {"global_pool": "avg", "scale_attn_norm": True},
    "distilled": {},
    "torchvision": {},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(6)
    if name == "torchvision":
        net = torchvision.models.VisionTransformer(
            image_size=SIDE,
            patch_size=PATCH,
            num_layers=DEPTH,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
            num_classes=5,
        )
    else:
        kind = Distilled if name == "distilled" else VisionTransformer
        net = kind(**TIMM, num_classes=5, **NETS[name])
    for parameter in net.parameters():
        if parameter.ndim > 1:  # attention that is far from uniform, heads that are not zero
            nn.init.normal_(parameter, std=0.4)
    return net.eval().requires_grad_(False)


@pytest.fixture(params=NETS)
def vit(request) -> nn.Module:
    return build(request.param)


@pytest.fixture
def picture() -> torch.Tensor:
    return torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def run(drive, subject_of):
    def run(name, net, x, targets=TARGETS, **options):
        subject = subject_of(net, x, targets, layouts=layouts_of(net), **options)
        return drive(implementation(name)(subject), subject)

    return run


def layouts_of(net: nn.Module):
    probe = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return find_layouts(trace(net, "single_label", probe))


# ---------------------------------------------------------------- transformers in the open


class Open:
    """A transformer run in float64, its attention weights plain tensors of the graph."""

    def __init__(self, net: nn.Module) -> None:
        self.net = copy.deepcopy(net).double()
        self.torchvision = not hasattr(net, "patch_embed")
        self.blocks = list(self.net.encoder.layers if self.torchvision else self.net.blocks)
        self.prefix = 1 if self.torchvision else self.net.num_prefix_tokens

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        if self.torchvision:
            x = self.net._process_input(x)
            x = torch.cat([self.net.class_token.expand(len(x), -1, -1), x], 1)
            return x + self.net.encoder.pos_embedding
        return self.net.norm_pre(self.net._pos_embed(self.net.patch_embed(x)))

    def block(self, i: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens after block i, and its attention weights (N, heads, T, T)."""
        block = self.blocks[i]
        if self.torchvision:
            y = block.ln_1(x)
            mha = block.self_attention
            w, b = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
            mixed, weights = self.attend([y @ w[j].T + b[j] for j in range(3)], lambda q: q)
            x = x + mha.out_proj(mixed)
            return x + block.mlp(block.ln_2(x)), weights
        attn, y = block.attn, block.norm1(x)
        mixed, weights = self.attend(attn.qkv(y).chunk(3, -1), attn.q_norm, attn.k_norm)
        x = x + block.ls1(attn.proj(attn.norm(mixed)))
        return x + block.ls2(block.mlp(block.norm2(x))), weights

    @staticmethod
    def attend(qkv, q_norm, k_norm=lambda k: k) -> tuple[torch.Tensor, torch.Tensor]:
        heads = [[part[..., 8 * h : 8 * h + 8] for part in qkv] for h in range(2)]
        weights = [
            (q_norm(q) @ k_norm(k).transpose(1, 2) / 8**0.5).softmax(-1) for q, k, _ in heads
        ]
        weights = torch.stack(weights, 1)
        if not weights.requires_grad:
            weights.requires_grad_()
        return torch.cat([weights[:, h] @ heads[h][2] for h in range(2)], -1), weights

    def scores(self, tokens: torch.Tensor, target: ResolvedTarget) -> torch.Tensor:
        if self.torchvision:
            logits = self.net.heads(self.net.encoder.ln(tokens)[:, 0])
        else:
            logits = self.net.forward_head(self.net.norm(tokens))
        score = logits[0, target.cls]
        return score - logits[0, list(target.against)].mean() if target.against else score

    def run(self, x: torch.Tensor, target: ResolvedTarget):
        """Score, attention and gradients of each layer (heads, T, T)."""
        tokens, weights = self.embed(x[None].double()), []
        for i in range(DEPTH):
            tokens, attention = self.block(i, tokens)
            weights.append(attention)
        score = self.scores(tokens, target)
        return score, [w[0] for w in weights], [g[0] for g in torch.autograd.grad(score, weights)]

    def to_map(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[self.prefix :].reshape(GRID)

    def read(self) -> list[int]:
        """Tokens that the head looks at."""
        if not self.torchvision and self.net.global_pool == "avg":
            return list(range(self.prefix, self.prefix + GRID[0] * GRID[1]))
        return [0, 1] if isinstance(self.net, Distilled) else [0]


def by_definition(name: str, net: nn.Module, x: torch.Tensor, target: ResolvedTarget):
    """The papers' formulas with whole matrices."""
    vit = Open(net)
    if name == "legrad":
        tokens, total = vit.embed(x[None].double()), 0
        for i in range(DEPTH):
            tokens, weights = vit.block(i, tokens.detach())
            (gradient,) = torch.autograd.grad(vit.scores(tokens, target), weights)
            total = total + gradient[0].clamp_min(0).mean((0, 1)) / DEPTH
        return vit.to_map(total)
    _, weights, gradients = vit.run(x, target)
    eye = torch.eye(weights[0].shape[-1], dtype=torch.float64)
    product = eye
    for a, g in zip(weights, gradients, strict=True):
        if name == "attention_rollout":
            layer = 0.5 * a.mean(0) + 0.5 * eye
        elif name == "gradient_rollout":
            layer = (a * g).mean(0).clamp_min(0) + eye
            layer = layer / layer.sum(1)[:, None]
        else:
            layer = (a * g).clamp_min(0).mean(0) + eye
        product = layer @ product
    return vit.to_map(product[vit.read()].mean(0).detach())


@pytest.mark.parametrize("name", OWN)
def test_by_definition(name, vit, run, picture, untouched):
    with untouched(vit):
        maps = run(name, vit, picture)
    assert maps.shape == (2, *GRID)
    assert maps.dtype == torch.float32
    for t, target in enumerate(TARGETS):
        expected = by_definition(name, vit, picture, target).detach()
        assert expected.max() > expected.min()
        torch.testing.assert_close(
            maps[t].double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max())
        )


def test_the_open_transformer_scores_like_the_model(vit, picture):
    """Guards the oracle."""
    for target in TARGETS:
        score, *_ = Open(vit).run(picture, target)
        logits = vit(picture[None])[0]
        expected = logits[target.cls]
        if target.against:
            expected = expected - logits[list(target.against)].mean()
        torch.testing.assert_close(score.float(), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- attention made visible


def test_replaced_attention_gives_the_same_scores_and_rows_of_one(vit, picture):
    x = torch.stack([picture, picture.flip(-1)])
    transformer = find_transformer(vit, layouts_of(vit))
    seen = Seen()
    hooks = [(a.name, attention_hook(a, seen)) for a in transformer.attentions]
    with Extractor(vit, [], changes=hooks) as extractor:
        logits = extractor.forward(x, graph=True)
    torch.testing.assert_close(logits, vit(x), rtol=1e-5, atol=1e-5)
    tokens = transformer.layout.prefix + GRID[0] * GRID[1]
    seen.check(transformer)
    expected = Open(vit).run(picture, TARGETS[0])[1]
    for weights, open_weights in zip(seen.weights, expected, strict=True):
        assert weights.shape == (2, 2, tokens, tokens)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, tokens))
        torch.testing.assert_close(weights[0].double(), open_weights, rtol=1e-4, atol=1e-6)


def test_layout_leaves_out_prefix_tokens():
    found = find_transformer(net := build("registers, normalised queries"), layouts_of(net))
    assert found.layout == TokenLayout(grid=GRID, prefix=3)
    assert [a.name for a in found.attentions] == [f"blocks.{i}.attn" for i in range(DEPTH)]


def refused(run, net, x, said):
    for name in OWN:
        with pytest.raises(MethodNotApplicable, match=said):
            run(name, net, x)


def test_refuses_convolutional_networks(run, pool_net, picture):
    refused(run, pool_net, picture, "vision transformer")


@pytest.mark.parametrize("name", ["swin_t", "maxvit_t"])
def test_refuses_attention_in_windows(name, subject_of):
    extra = {"input_size": (224, 224)} if name == "maxvit_t" else {}
    net = getattr(torchvision.models, name)(num_classes=5, **extra).eval().requires_grad_(False)
    with pytest.raises(MethodNotApplicable, match="spans all patches"):
        find_transformer(net, {})


def test_refuses_attention_that_it_cannot_reproduce(run, picture, untouched):
    """A gate on the attention's output, which timm's module may have and ours knows nothing of."""
    net = build("class token")
    attn = net.blocks[1].attn
    attn.gate = nn.Linear(16, 16).requires_grad_(False).eval()
    with untouched(net):
        refused(run, net, picture, "do not know")


def test_refuses_pooling_by_attention(run, picture):
    net = VisionTransformer(**TIMM, num_classes=5, global_pool="map", class_token=False)
    refused(run, net.eval().requires_grad_(False), picture, "Attention methods")


def test_refuses_attention_between_different_tokens(run, picture):
    net = build("torchvision")
    block = net.encoder.layers[0]

    def crossed(x):
        y = block.ln_1(x)
        return x + block.self_attention(y, y * 2, y, need_weights=False)[0]

    block.forward = crossed
    refused(run, net, picture, "do not know")


def test_refuses_attention_called_by_keywords(run, picture):
    net = build("torchvision")
    block = net.encoder.layers[0]

    def by_keywords(x):
        y = block.ln_1(x)
        x = x + block.self_attention(query=y, key=y, value=y, need_weights=False)[0]
        return x + block.mlp(block.ln_2(x))

    block.forward = by_keywords
    refused(run, net, picture, "do not know")


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 5), chunk=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_properties(name, run, count, chunk, seed):
    net = build("registers, normalised queries")
    x = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 3
    targets = list(range(count))
    maps = run(name, net, x, targets, chunk=chunk)
    assert maps.shape == (count, *GRID)
    assert maps.isfinite().all()
    assert maps.min() >= 0
    torch.testing.assert_close(run(name, net, x, targets, chunk=4), maps)
    torch.testing.assert_close(run(name, net, x, targets[-1:])[0], maps[-1])


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("layer", ["blocks.0", "blocks.1.attn", "norm", "blocks.2.attn.qkv"])
def test_interventions_hold(name, layer, run, picture):
    """As if the change were part of the model, before and after tokens become a batch."""
    net = build("class token")
    changes = [
        Intervention(layer=layer, channels=tuple(range(0, 16, 3)), op="scale", value=3.0),
        Intervention(layer=layer, channels=(1,), op="zero"),
    ]
    found = run(name, net, picture, interventions=changes)
    factors = torch.ones(48 if layer.endswith("qkv") else 16)
    factors[list(range(0, 16, 3))] = 3.0
    factors[1] = 0.0

    changed = build("class token")
    # Not the attention itself: what it does to its output besides its projection is refused, and
    # rightly so.
    module = changed.get_submodule("blocks.1.attn.proj" if layer == "blocks.1.attn" else layer)
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs) * factors
    torch.testing.assert_close(found, run(name, changed, picture), rtol=1e-4, atol=1e-6)
    if not (name == "attention_rollout" and layer in ("norm", "blocks.2.attn.qkv")):
        assert not torch.allclose(found, run(name, net, picture), rtol=1e-3)


def test_rollout_is_a_distribution_over_tokens(run, picture):
    """Rows of a product of stochastic matrices: what patches lack of 1, the prefix tokens hold."""
    for name in ("attention_rollout", "gradient_rollout"):
        maps = run(name, build("class token"), picture)
        assert 0 < float(maps[0].sum()) < 1
    maps = run("attention_rollout", build("class token"), picture)
    torch.testing.assert_close(maps[0], maps[1])
