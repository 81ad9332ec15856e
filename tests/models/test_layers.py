"""Token layouts, target layers and feature layers, on networks whose answer is plain to see."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from models.layer_choice import choose_target_layer, feature_layers, has_gradient
from models.layers import TokenLayout, to_map
from models.probe import probe_batch, trace
from models.proof import layer_infos, prove_layers
from models.types import Preprocess
from tests.models.conftest import find_layouts


def traced(module: nn.Module, *, side: int | tuple[int, int] = 16, task: str = "single_label"):
    crop = (side, side) if isinstance(side, int) else side
    probe = probe_batch(Preprocess(resize=32, crop=crop))
    return trace(module.eval().requires_grad_(False), task, probe)


def chosen(module: nn.Module, **options) -> str | None:
    found = traced(module, **options)
    return choose_target_layer(found, find_layouts(found))


# ---------------------------------------------------------------- layouts


def test_tokens_are_laid_out_row_by_row_without_their_prefix():
    tokens = torch.arange(2 * 8 * 5).view(2, 8, 5)  # 2 prefix tokens, a grid of 2 x 3
    laid_out = TokenLayout(grid=(2, 3), prefix=2).to_map(tokens)
    assert laid_out.shape == (2, 5, 2, 3)
    for n in range(2):
        for channel in range(5):
            for row in range(2):
                for column in range(3):
                    expected = tokens[n, 2 + row * 3 + column, channel]
                    assert laid_out[n, channel, row, column] == expected


def test_channels_last_maps_and_plain_ones():
    values = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    layout = TokenLayout(grid=(3, 4), channels_last=True)
    assert torch.equal(to_map(values, layout), values.permute(0, 3, 1, 2))
    assert to_map(values, None) is values


class Tokens(nn.Module):
    """Patches, prefix tokens, and attention read at the first token."""

    def __init__(
        self, *, prefix: int = 1, pooled: bool = False, embed: str = "conv", patch: int = 4
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, patch, patch) if embed == "conv" else nn.Linear(48, 8)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 8))
        self.norm1 = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.q_norm = nn.Identity()
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(8, 8)
        self.norm2 = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.pooled = pooled

    def forward(self, x):
        if isinstance(self.embed, nn.Conv2d):
            x = self.embed(x).flatten(2).transpose(1, 2)
        else:
            x = self.embed(nn.functional.unfold(x, 4, stride=4).transpose(1, 2))
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.attn_drop((self.q_norm(q) @ k.transpose(2, 3)).softmax(-1))
        x = self.norm2(x + self.proj((weights @ v).transpose(1, 2).reshape(n, t, 8)))
        skipped = self.prefix.shape[1]
        return self.head(x[:, skipped:].mean(1) if self.pooled else x[:, 0])


@pytest.mark.parametrize("embed", ["conv", "linear"])
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_prefix_tokens_and_grid_are_found_by_counting(prefix, embed):
    layouts = find_layouts(traced(Tokens(prefix=prefix, embed=embed)))
    expected = TokenLayout(grid=(4, 4), prefix=prefix)
    assert layouts["norm1"] == layouts["norm2"] == layouts["proj"] == expected
    assert "head" not in layouts


def test_heads_and_attention_weights_are_no_maps():
    layouts = find_layouts(traced(Tokens(patch=8)))
    assert layouts["norm1"] == TokenLayout(grid=(2, 2), prefix=1)
    assert "q_norm" not in layouts  # (N, heads, tokens, width)
    assert "attn_drop" not in layouts  # (N, heads, tokens, tokens): as square as a map


def test_a_grid_need_not_be_square():
    module = Tokens()
    layouts = find_layouts(traced(module, side=(16, 24)))
    assert layouts["norm1"] == TokenLayout(grid=(4, 6), prefix=1)
    assert layouts["embed"] is None
    layouts = find_layouts(traced(Tokens(embed="linear"), side=(16, 24)))
    assert layouts["norm1"] == TokenLayout(grid=(4, 6), prefix=1)


def test_maps_of_one_position_are_none():
    module = nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten(), nn.Linear(4, 3))
    assert find_layouts(traced(module)) == {}


def test_windows_of_one_picture_are_no_batch():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            windows = (
                x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 8, 8)
            )
            return self.inner(windows).reshape(len(x), -1)[:, :5]

    assert find_layouts(traced(Windows())) == {}


# ---------------------------------------------------------------- target layer


def test_the_class_token_makes_layers_after_the_last_attention_useless():
    module = Tokens()
    found = traced(module)
    layouts = find_layouts(found)
    assert choose_target_layer(found, layouts) == "norm1"
    assert has_gradient(found, layouts, "norm1")
    assert not has_gradient(found, layouts, "norm2")


def test_averaged_tokens_are_explained_at_the_end():
    assert chosen(Tokens(pooled=True)) == "norm2"


def conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class Head(nn.Module):
    """A trunk, then what the test puts after it."""

    def __init__(self, *after: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv_block(3, 4), nn.MaxPool2d(2), conv_block(4, 6))
        self.after = nn.Sequential(*after)

    def forward(self, x):
        return self.after(self.trunk(x))


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        # A block is named rather than its last activation.
        ((nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)), "trunk"),
        ((nn.Flatten(), nn.Linear(384, 5)), "trunk"),
        # Dropout, identity and pooling hand on or thin out, they are not explained.
        ((nn.Dropout(), nn.Identity(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 5)), "trunk"),
        # An activation after the trunk is the last one.
        ((nn.ReLU6(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 5)), "after.0"),
        # One map per class is part of the head, with or without an activation.
        ((nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "trunk"),
        ((nn.Conv2d(6, 5, 1), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "trunk"),
    ],
)
def test_the_last_map_before_the_head(after, expected):
    assert chosen(Head(*after)) == expected


def test_a_block_that_ends_with_pooling_is_explained_before_it():
    trunk = nn.Sequential(conv_block(3, 4), nn.MaxPool2d(2))
    assert chosen(nn.Sequential(trunk, nn.Flatten(), nn.Linear(256, 5))) == "0.0"


def test_of_a_module_called_twice_the_call_is_named():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
            self.act = nn.ReLU()
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.act(self.two(self.act(self.one(x)))).mean((2, 3)))

    assert chosen(Twice()) == "act#2"


def test_class_maps_are_better_than_nothing():
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert chosen(module) == "0"


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_few_classes_do_not_confuse_it(classes):
    after = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))
    task = "binary" if classes == 1 else "single_label"
    assert chosen(Head(*after), task=task) == "trunk"


@pytest.mark.parametrize(("outputs", "task"), [(1, "binary"), (2, "single_label")])
def test_class_maps_of_two_classes_are_part_of_the_head(outputs, task):
    after = (nn.Conv2d(6, outputs, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert chosen(Head(*after), task=task) == "trunk"


def test_opposite_scores_do_not_cancel():
    after = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1))
    found = traced(Head(*after), task="binary")
    assert has_gradient(found, find_layouts(found), "trunk")


def test_a_model_without_maps_has_no_target_layer():
    assert chosen(nn.Sequential(nn.Flatten(), nn.Linear(768, 5))) is None


def test_a_model_that_cannot_be_differentiated_has_none():
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x):
            with torch.no_grad():
                return self.conv(x).mean((2, 3))

    assert chosen(Cut()) is None


# ---------------------------------------------------------------- listings


def test_layer_infos_list_what_was_called_in_the_order_of_definition():
    module = Head(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    found = traced(module)
    infos = layer_infos(found, prove_layers(found), target_layer="trunk")
    assert [info.name for info in infos] == [name for name, _ in module.named_modules() if name]
    by_name = {info.name: info for info in infos}
    assert by_name["trunk"].output_shape == (6, 8, 8)
    assert by_name["trunk"].spatial
    assert by_name["trunk"].recommended
    assert by_name["trunk.0.0"].type == "Conv2d"
    assert by_name["trunk.0.0"].parameters == 3 * 4 * 9 + 4
    assert by_name["after.2"].output_shape == (5,)
    assert not by_name["after.2"].spatial
    assert sum(info.recommended for info in infos) == 1


def test_feature_layers_are_blocks_spread_over_the_depth():
    stages = [nn.Sequential(*(conv_block(4, 4) for _ in range(blocks))) for blocks in (2, 3, 2, 3)]
    module = nn.Sequential(conv_block(3, 4), *stages, nn.Flatten(), nn.Linear(1024, 5))
    found = traced(module)
    # 12 maps of the second level fit; the operations within the blocks do not.
    assert feature_layers(found, find_layouts(found)) == (
        "0.0", "0.2", "1.0", "1.1", "2.0", "2.1", "2.2", "3.0", "3.1", "4.0", "4.1", "4.2",
    )  # fmt: skip


def test_an_activation_is_named_by_its_block_where_nothing_else_of_the_block_is_listed():
    class Norm(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(4)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(super().forward(x))

    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), Norm()),
        nn.Sequential(nn.Conv2d(4, 4, 3), Norm()),
        nn.Flatten(),
        nn.Linear(576, 5),
    )
    found = traced(module)
    assert feature_layers(found, find_layouts(found)) == ("0.0", "0.1", "1.0", "1.1")


def test_too_many_layers_are_thinned_evenly_from_first_to_last():
    module = nn.Sequential(
        nn.Sequential(*(conv_block(3, 3) for _ in range(30))), nn.Flatten(), nn.Linear(768, 5)
    )
    found = traced(module)
    layers = feature_layers(found, find_layouts(found))
    assert len(layers) == 12
    assert (layers[0], layers[-1]) == ("0.0", "0.29")
    gaps = [int(b[2:]) - int(a[2:]) for a, b in itertools.pairwise(layers)]
    assert set(gaps) <= {2, 3}


def test_no_branch_of_a_block_is_chosen_where_the_block_responds_elsewhere():
    """A mirrored branch makes the last block's map none; its other branch is only a part of it."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.straight = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 1)
            self.mirrored, self.out, self.fc = (
                nn.Conv2d(4, 8, 1),
                nn.Conv2d(12, 8, 1),
                nn.Linear(8, 5),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            both = torch.cat([self.straight(x), 9 * self.mirrored(x.flip(3))], 1)
            return self.fc(self.out(both).relu().mean((2, 3)))

    torch.manual_seed(0)
    net = Branches().eval().requires_grad_(False)
    found = trace(net, "single_label", torch.randn(3, 3, 32, 32))
    layouts = find_layouts(found)
    assert "straight" in layouts
    assert "out" not in layouts
    assert choose_target_layer(found, layouts) == "stem"
