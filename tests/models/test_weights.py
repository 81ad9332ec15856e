"""Checkpoints are read without running code, and fit exactly or are refused in clear words."""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import textwrap
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.checkpoints import check_digest
from models.errors import ModelLoadFailed, cause_of
from models.weights import fill_zero_heads, load_weights, seeded


def network(classes: int = 3) -> nn.Module:
    return nn.Sequential(
        collections.OrderedDict(
            conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), head=nn.Linear(4, classes)
        )
    )


class _Config:
    def __init__(self) -> None:
        self.width = 3


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


def prefixed(module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in module.state_dict().items()}


def test_what_lies_beside_the_prefix_is_passed_over_and_said(tmp_path):
    source, target = network(), network()
    beside = {"criterion.weight": torch.ones(4), "train_acc.tp": torch.zeros(4)}
    torch.save({"state_dict": prefixed(source, "net._orig_mod.") | beside}, tmp_path / "w.ckpt")
    notes = load_weights(target, "w.ckpt", base_dir=tmp_path)
    assert equal(source, target)
    assert notes == (
        "The weights are those under state_dict.net in the file.",
        "Taken out of the names in the file: _orig_mod.",
        "Passed over in the file: criterion, train_acc.",
    )


def test_metrics_beside_the_layers_are_passed_over(tmp_path):
    source, target = network(), network()
    beside = {"val_acc.tp": torch.zeros(4), "loss_fn.weight": torch.ones(3)}
    torch.save({"state_dict": source.state_dict() | beside}, tmp_path / "w.ckpt")
    notes = load_weights(target, "w.ckpt", base_dir=tmp_path)
    assert equal(source, target)
    assert "Passed over in the file: loss_fn, val_acc." in notes


def test_arguments_and_objects_beside_the_weights_are_not_read(tmp_path):
    source, target = network(), network()
    content = {
        "model": source.state_dict(),
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x")),
        "config": _Config(),
        "metric": np.float64(71.5),
    }
    torch.save(content, tmp_path / "w.pth.tar")
    load_weights(target, "w.pth.tar", base_dir=tmp_path)
    assert equal(source, target)


def test_plain_weights_are_taken_before_averaged_ones_and_that_is_said(tmp_path):
    plain, averaged, target = network(), network(), network()
    ema = prefixed(averaged, "module.") | {"n_averaged": torch.tensor(7)}
    torch.save({"model_ema": ema, "model": plain.state_dict()}, tmp_path / "w.pth")
    notes = load_weights(target, "w.pth", base_dir=tmp_path)
    assert equal(plain, target)
    assert any("averaged weights" in n and 'weights_key = "model_ema.module"' in n for n in notes)
    load_weights(target, "w.pth", base_dir=tmp_path, key="model_ema")
    assert equal(averaged, target)
    with pytest.raises(ModelLoadFailed, match=r"nothing under weights_key ema\. It has model_ema"):
        load_weights(target, "w.pth", base_dir=tmp_path, key="ema")


def test_the_part_that_fits_is_found_among_several(tmp_path):
    source, target = network(), network()
    torch.save(
        {
            "critic": network(9).state_dict(),
            "student": source.state_dict(),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": []},
        },
        tmp_path / "w.pth",
    )
    load_weights(target, "w.pth", base_dir=tmp_path)
    assert equal(source, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32_and_that_is_said(tmp_path, dtype):
    source, target = network().to(dtype), network()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    notes = load_weights(target, "w.pth", base_dir=tmp_path)
    assert target.conv.weight.dtype == torch.float32
    assert torch.equal(target.conv.weight, source.conv.weight.float())
    assert f"stored as {str(dtype).removeprefix('torch.')}" in notes[0]


def test_the_digest_of_a_file_is_checked(tmp_path):
    save(network().state_dict(), tmp_path / "a.pt")
    digest = hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()
    check_digest("a.pt", digest, base_dir=tmp_path)
    with pytest.raises(ModelLoadFailed, match="does not have the given weights_sha256"):
        check_digest("a.pt", "0" * 64, base_dir=tmp_path)
    with pytest.raises(ModelLoadFailed, match="cannot be read"):
        check_digest("b.pt", digest, base_dir=tmp_path)


def test_shards_of_safetensors(tmp_path):
    source, target = network(), network()
    state = source.state_dict()
    shards = {"a.safetensors": list(state)[:4], "b.safetensors": list(state)[4:]}
    for name, keys in shards.items():
        save_file({key: state[key] for key in keys}, tmp_path / name)
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_weights(target, "model.safetensors.index.json", base_dir=tmp_path)
    assert equal(source, target)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelLoadFailed, match=r"names b\.safetensors, which is not there"):
        load_weights(target, "model.safetensors.index.json", base_dir=tmp_path)


def test_old_names_of_weight_norm(tmp_path):
    target = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    state = {
        f"0.{key}": torch.randn(shape)
        for key, shape in {"weight_g": (3, 1), "weight_v": (3, 2), "bias": (3,)}.items()
    }
    torch.save(state, tmp_path / "w.pth")
    load_weights(target, "w.pth", base_dir=tmp_path)
    v = state["0.weight_v"]
    assert torch.allclose(target[0].weight, state["0.weight_g"] * v / v.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"conv.lora_A.weight": torch.ones(1)}, "merge_and_unload"),
        ({"conv.weight": torch.ones(4, 3, 1, 1, dtype=torch.int8)}, "quantised weights"),
    ],
)
def test_what_is_no_plain_weight_is_refused_with_the_way_out(tmp_path, state, message):
    torch.save(network().state_dict() | state, tmp_path / "w.pth")
    with pytest.raises(ModelLoadFailed, match=message):
        load_weights(network(), "w.pth", base_dir=tmp_path)


@pytest.mark.parametrize(
    "parametrise", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm]
)
@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm_is_folded_for_a_network_without_it(tmp_path, parametrise, dim):
    source, target = network(), network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in (source.conv, source.head):
            parametrise(layer, dim=dim)
            size = next(p for name, p in layer.named_parameters() if name.endswith(("_g", "l0")))
            size.data.mul_(3)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    notes = load_weights(target, "w.pth", base_dir=tmp_path)
    for name in ("conv", "head"):
        # As the last pass of the old kind made it.
        source.get_submodule(name)(torch.ones(1, *target.get_submodule(name).weight.shape[1:]))
        torch.testing.assert_close(
            target.get_submodule(name).weight, source.get_submodule(name).weight
        )
    assert any("folded" in note for note in notes)


def test_lists_and_sparse_tensors_are_read(tmp_path):
    source, target = network(), network()
    state = source.state_dict()
    state["head.weight"] = state["head.weight"].to_sparse()
    torch.save([7, {"lr": 0.1}, state], tmp_path / "w.pth")
    assert load_weights(target, "w.pth", base_dir=tmp_path) == (
        "The weights are those under 2 in the file.",
    )
    assert equal(source, target)


def test_the_script_for_arrays_of_numpy_works(tmp_path, monkeypatch):
    source, target = network(), network()
    monkeypatch.chdir(tmp_path)
    torch.save({k: v.numpy() for k, v in source.state_dict().items()}, "w.pth")
    with pytest.raises(ModelLoadFailed, match="NumPy") as refused:
        load_weights(target, "w.pth", base_dir=tmp_path)
    exec(textwrap.dedent(refused.value.message.partition("\n")[2]))
    load_weights(target, "tensors.pth", base_dir=tmp_path)
    assert equal(source, target)


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
        load_weights(network(), "w.pth", base_dir=tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"model": net, "epoch": 3}])
def test_a_whole_pickled_network_is_refused_with_a_script_that_works(tmp_path, wrap):
    source, target = network(), network()
    torch.save(wrap(source), tmp_path / "w.pth")
    with pytest.raises(ModelLoadFailed, match="a whole pickled network") as caught:
        load_weights(target, "w.pth", base_dir=tmp_path)
    script = textwrap.dedent(caught.value.message.partition("\n")[2])
    with contextlib.chdir(tmp_path):
        exec(script, {})
    load_weights(target, "state_dict.pth", base_dir=tmp_path)
    assert equal(source, target)


def test_a_torchscript_archive_is_told_from_a_damaged_file(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "w.pt")
        with pytest.raises(ModelLoadFailed, match="is a TorchScript archive: save the state_dict"):
            load_weights(network(), "w.pt", base_dir=tmp_path)


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
        load_weights(network(), name, base_dir=tmp_path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.ones(1)], torch.ones(2)])
def test_a_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelLoadFailed, match="no state dict"):
        load_weights(network(), "w.pth", base_dir=tmp_path)


def test_a_missing_file_is_named_as_configured(tmp_path):
    with pytest.raises(ModelLoadFailed, match=r"file sub/w\.pth does not exist") as caught:
        load_weights(network(), "sub/w.pth", base_dir=tmp_path)
    assert str(tmp_path) not in caught.value.message
    assert cause_of(caught.value) == f"FileNotFoundError: {tmp_path / 'sub/w.pth'}"


def test_a_folder_names_what_is_in_it(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "model.safetensors").touch()
    with pytest.raises(ModelLoadFailed, match=r"Name a file in it: model\.safetensors"):
        load_weights(network(), "saved", base_dir=tmp_path)
    (tmp_path / "saved" / "__0_0.distcp").touch()
    with pytest.raises(ModelLoadFailed, match="dcp_to_torch saved"):
        load_weights(network(), "saved", base_dir=tmp_path)


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
