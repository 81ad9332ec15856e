"""Checkpoints are read without running code, and fit exactly or are refused in clear words."""

from __future__ import annotations

import collections
import os
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.errors import ModelLoadFailed, cause_of
from models.weights import fill_zero_heads, load_weights, read_state_dict, seeded


def network(classes: int = 3) -> nn.Module:
    return nn.Sequential(
        collections.OrderedDict(
            conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), head=nn.Linear(4, classes)
        )
    )


def equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def save(content, path) -> None:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_state_dicts(tmp_path, suffix):
    source, target = network(), network()
    save(source.state_dict(), tmp_path / f"w{suffix}")
    assert not equal(source, target)
    load_weights(target, f"w{suffix}", base_dir=tmp_path)
    assert equal(source, target)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrappers_and_prefixes_are_taken_off(tmp_path, wrapper, prefix):
    source, target = network(), network()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3, "best": 0.5}, tmp_path / "w.pth")
    load_weights(target, "w.pth", base_dir=tmp_path)
    assert equal(source, target)


def test_a_prefix_that_some_keys_lack_is_part_of_the_names(tmp_path):
    state = {"module.weight": torch.ones(1), "other": torch.ones(1)}
    torch.save(state, tmp_path / "w.pth")
    assert read_state_dict("w.pth", base_dir=tmp_path).keys() == state.keys()


def test_batch_counters_may_be_missing_and_ignored_parts_may_be_there(tmp_path):
    source, target = network(), network()
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    torch.save(state | {"aux.weight": torch.ones(2)}, tmp_path / "w.pth")
    load_weights(target, "w.pth", base_dir=tmp_path, ignored=("aux.",))
    assert equal(source, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv.weight"), r"missing: conv\.weight\."),
        (lambda s: s.update(extra=torch.ones(1)), r"unexpected: extra\."),
        (
            lambda s: s.update({"head.weight": torch.ones(7, 4), "head.bias": torch.ones(7)}),
            r"another shape: head\.weight \(7x4 instead of 3x4\), head\.bias .*num_classes",
        ),
        (
            lambda s: [s.pop(k) for k in list(s)[:5]],
            r"missing: conv\.weight, conv\.bias, .* and 2 more",
        ),
    ],
)
def test_a_misfit_names_the_first_keys_and_changes_nothing(tmp_path, change, message):
    target, untouched = network(), network()
    target.load_state_dict(untouched.state_dict())
    state = network().state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ModelLoadFailed, match=message):
        load_weights(target, "w.pth", base_dir=tmp_path)
    assert equal(target, untouched)


class _Trap:
    """What a hostile checkpoint holds: unpickling it would run a command."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_never_runs_code(tmp_path):
    torch.save({"state_dict": _Trap(str(tmp_path / "owned"))}, tmp_path / "w.pth")
    with pytest.raises(ModelLoadFailed, match="holds more than tensors"):
        read_state_dict("w.pth", base_dir=tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_whole_pickled_network_is_told_from_a_damaged_file(tmp_path):
    torch.save(network(), tmp_path / "w.pth")
    with pytest.raises(ModelLoadFailed, match=r"a whole pickled network.*state_dict"):
        read_state_dict("w.pth", base_dir=tmp_path)


def test_a_torchscript_archive_is_told_from_a_damaged_file(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "w.pt")
        with pytest.raises(ModelLoadFailed, match="is a TorchScript archive: save the state_dict"):
            read_state_dict("w.pt", base_dir=tmp_path)


def test_positions_of_another_input_size_are_not_blamed_on_the_classes(tmp_path):
    target = nn.ParameterDict({"positions": torch.zeros(1, 5, 2)})
    torch.save({"positions": torch.zeros(1, 10, 2)}, tmp_path / "w.pth")
    with pytest.raises(
        ModelLoadFailed, match="another input size, or in another variant"
    ) as caught:
        load_weights(target, "w.pth", base_dir=tmp_path)
    assert "num_classes" not in caught.value.message


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_damaged_file_is_said_to_be_damaged(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00" * 100)
    with pytest.raises(ModelLoadFailed, match=f"{name} cannot be read: it is damaged"):
        read_state_dict(name, base_dir=tmp_path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.ones(1)], torch.ones(2)])
def test_a_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelLoadFailed, match="no state dict"):
        read_state_dict("w.pth", base_dir=tmp_path)


def test_a_missing_file_is_named_as_configured(tmp_path):
    with pytest.raises(ModelLoadFailed, match=r"file sub/w\.pth does not exist") as caught:
        read_state_dict("sub/w.pth", base_dir=tmp_path)
    assert str(tmp_path) not in caught.value.message
    assert cause_of(caught.value) == f"FileNotFoundError: {tmp_path / 'sub/w.pth'}"


def test_other_suffixes_are_refused(tmp_path):
    (tmp_path / "w.bin").touch()
    with pytest.raises(ModelLoadFailed, match="neither"):
        read_state_dict("w.bin", base_dir=tmp_path)


def test_random_weights_are_the_same_everywhere_and_leave_the_random_state():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with seeded():
        first = network()
    assert torch.equal(torch.rand(3), expected)
    with seeded():
        second = network()
    assert equal(first, second)


def test_heads_of_zeros_get_random_weights_and_others_stay():
    module = network()
    before = module.conv.weight.clone()
    nn.init.zeros_(module.head.weight)
    fill_zero_heads(module)
    assert module.head.weight.std() > 0
    filled = module.head.weight.clone()
    fill_zero_heads(module)
    assert torch.equal(module.head.weight, filled)
    assert torch.equal(module.conv.weight, before)
