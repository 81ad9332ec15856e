"""Kinds of model and checkpoint that people bring, each as small as it can be.

Each kind writes its files to a folder and returns the fields of its entry in the configuration.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from models.compat import define_missing_operators
from tests.models.sources.clip import LABELS, saved

define_missing_operators()
import timm  # noqa: E402 # its operators may have to be defined first

Fields = dict[str, Any]
Make = Callable[[Path], Fields]

NET = textwrap.dedent(
    '''
    from dataclasses import dataclass
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint
    import torch.ao.quantization as q

    class Net(nn.Module):
        def __init__(self, num_classes=4, channels=3):
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(8, num_classes)

        def forward(self, x):
            return self.fc(self.pool(self.features(x)).flatten(1))

    class Other(Net):
        """Ends otherwise: `how` makes the answer of scores and maps."""
        def __init__(self, how, outputs=4):
            super().__init__(outputs)
            self.how = how

        def forward(self, x):
            maps = self.features(x)
            return self.how(self.fc(self.pool(maps).flatten(1)), maps)

    class Two(Net):
        def forward(self, image, age):
            return super().forward(image) + age

    class Squeezing(Net):
        def forward(self, x):
            return self.fc(self.pool(self.features(x)).squeeze())

    class Detached(Net):
        def forward(self, x):
            with torch.no_grad():
                maps = self.features(x)
            return self.fc(self.pool(maps).flatten(1))

    class Checkpointed(Net):
        def forward(self, x):
            return self.fc(self.pool(checkpoint(self.features, x, use_reentrant=False)).flatten(1))

    class Reentrant(Net):
        def forward(self, x):
            return self.fc(self.pool(checkpoint(self.features, x, use_reentrant=True)).flatten(1))

    class Flattening(Net):
        def forward(self, x):
            return self.fc(torch.flatten(self.pool(self.features(x))))

    class Viewing(Net):
        def forward(self, x):
            return super().forward(x.view(len(x), 3, -1).view_as(x))

    class InPlace(Net):
        def forward(self, x):
            return super().forward(x.mul_(2))

    class Static(Net):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = q.QuantStub(), q.DeQuantStub()

        def forward(self, x):
            return self.dequant(super().forward(self.quant(x)))

    class Single(Net):
        def forward(self, x):
            assert len(x) == 1, "one image only"
            return super().forward(x)

    class FixedBatch(Net):
        def forward(self, x):
            return self.fc(self.features(x).view(8, -1))

    class Training(Net):
        def forward(self, x):
            return super(Training, self.train()).forward(x)

    class Halving(Net):
        def forward(self, x):
            return super().forward(x.half())

    class OnGpu(Net):
        def forward(self, x):
            if not torch.cuda.is_available():
                raise RuntimeError("Found no NVIDIA driver on your system.")
            return super().forward(x.cuda())

    class FromDictionary(Net):
        def forward(self, batch):
            return super().forward(batch["image"])

    @dataclass
    class ModelOutput:
        logits: torch.Tensor

    def flat(): return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 16), nn.ReLU(), nn.Linear(16, 4))
    def lazy():
        return nn.Sequential(
            nn.LazyConv2d(8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.LazyLinear(4))
    def statistics():
        net = Net()
        net.features[1] = nn.BatchNorm2d(8, track_running_stats=False)
        return net
    def weight_norm():
        net = Net()
        nn.utils.parametrizations.weight_norm(net.fc)
        return net
    def spectral_norm():
        net = Net()
        nn.utils.parametrizations.spectral_norm(net.fc)
        return net
    def dynamic(): return q.quantize_dynamic(Net().eval(), {nn.Linear}, dtype=torch.qint8)
    def static():
        net = Static().eval()
        net.qconfig = q.get_default_qconfig("fbgemm")
        q.prepare(net, inplace=True)
        net(torch.randn(4, 3, 32, 32))
        return q.convert(net, inplace=True)
    def raising(): raise FileNotFoundError("backbone.pth")
    '''
)
SIZE = {"crop": 32, "resize": 36}


class _Config:
    width = 3


def factory(code: str, **fields: Any) -> Make:
    """A network from an expression over the classes above."""

    def make(folder: Path) -> Fields:
        # What is no expression is a function above.
        body = f"\ndef made(): return {code}\n" if code.endswith(")") else f"\nmade = {code}\n"
        (folder / "net.py").write_text(NET + body)
        return {"source": "python:net.py:made", "preprocess": SIZE} | fields

    return make


def network() -> nn.Module:
    """The network whose checkpoints are tried."""
    torch.manual_seed(1)
    scope: dict[str, Any] = {"__name__": "kinds_net"}
    exec(NET, scope)
    made: nn.Module = scope["Net"]()
    return made


def state(prefix: str = "", dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    tensors = network().to(dtype).state_dict() if dtype else network().state_dict()
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def checkpoint(content: Callable[[], Any], name: str = "weights.pth", **fields: Any) -> Make:
    """A file beside the network that it belongs to."""

    def make(folder: Path) -> Fields:
        if name.endswith(".safetensors"):
            save_file(content(), folder / name)
        else:
            torch.save(content(), folder / name)
        return factory("Net()", weights=name, **fields)(folder)

    return make


def _pickled(folder: Path) -> Fields:
    torch.save(nn.Sequential(nn.Linear(2, 2)), folder / "network.pth")
    return factory("Net()", weights="network.pth")(folder)


def _pickled_inside(folder: Path) -> Fields:
    torch.save({"epoch": 3, "model": nn.Linear(2, 2)}, folder / "network.pt")
    return factory("Net()", weights="network.pt")(folder)


def _scripted(folder: Path) -> Fields:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), folder / "script.pt")
    return factory("Net()", weights="script.pt")(folder)


def _shards(folder: Path) -> Fields:
    tensors = state()
    halves = {"1.safetensors": list(tensors)[:4], "2.safetensors": list(tensors)[4:]}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return factory("Net()", weights="model.safetensors.index.json")(folder)


def _file(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Fields:
        (folder / name).write_bytes(content)
        return factory("Net()", weights=name)(folder)

    return make


def _normalised() -> dict[str, torch.Tensor]:
    """Weights of a network that was trained with weight norm at its end."""
    made = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(made.fc)
    return made.state_dict()


def _exported_weights(folder: Path) -> Fields:
    return factory("Net()")(folder) | {"weights": _export(folder)["source"].split(":")[1]}


def _folder(file: str) -> Make:
    def make(folder: Path) -> Fields:
        (folder / "saved").mkdir()
        (folder / "saved" / file).touch()
        return factory("Net()", weights="saved")(folder)

    return make


def _own_package(folder: Path) -> Fields:
    for name in ("models", "service"):
        (folder / name).mkdir()
    (folder / "models" / "net.py").write_text(NET)
    (folder / "service" / "made.py").write_text(
        "def build():\n    from models.net import Net\n    return Net()\n"
    )
    return {"source": "python:service.made:build", "preprocess": SIZE}


def _missing_import(folder: Path) -> Fields:
    (folder / "net.py").write_text("import a_package_that_is_not_here\n")
    return {"source": "python:net:build"}


def _export(folder: Path) -> Fields:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network().eval(), (torch.randn(1, 3, 32, 32),))
        torch.export.save(program, folder / "net.pt2")
    return {"source": "export:net.pt2", "preprocess": SIZE}


def _onnx(folder: Path) -> Fields:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network().eval(),
            (torch.randn(1, 3, 32, 32),),
            folder / "net.onnx",
            dynamo=False,
        )
    return {"source": "onnx:net.onnx", "preprocess": SIZE}


def _transformers(folder: Path) -> Fields:
    import transformers

    config = transformers.ResNetConfig(
        hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8, num_labels=3, layer_type="basic"
    )
    transformers.ResNetForImageClassification(config).save_pretrained(folder / "saved")
    size = {"shortest_edge": 32}
    processor = transformers.ConvNextImageProcessor(size=size, crop_pct=0.875)
    processor.save_pretrained(folder / "saved")
    return {"source": "transformers:saved"}


def _segformer(folder: Path) -> Fields:
    import transformers

    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 8],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=3,
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder / "saved")
    size = {"height": 32, "width": 32}
    transformers.SegformerImageProcessor(size=size).save_pretrained(folder / "saved")
    return {"source": "transformers:saved"}


def _adapter(folder: Path) -> Fields:
    fields = _transformers(folder)
    tensors = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(3, 2)}
    named = {f"base_model.model.classifier.1.{name}": value for name, value in tensors.items()}
    save_file(named, folder / "saved" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "saved" / "adapter_config.json").write_text(json.dumps(config))
    return fields


def _other_adapter(folder: Path) -> Fields:
    fields = _adapter(folder)
    (folder / "saved" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    return fields


def _clip(folder: Path) -> Fields:
    saved(folder / "saved")
    return {"source": "transformers:saved", "labels": LABELS}


def _timm(folder: Path) -> Fields:
    from timm.models import save_for_hf

    network = timm.create_model("resnet10t", num_classes=3)
    network.pretrained_cfg.update(input_size=(3, 64, 64))
    save_for_hf(network, folder / "saved", model_config={"label_names": ["cat", "dog", "fox"]})
    return {"source": "timm:saved"}


def _named(source: str, **fields: Any) -> Make:
    return lambda _: {"source": source, "weights": "none", **fields}


_LORA = {"features.0.lora_A.weight": torch.ones(1)}
_INT8 = {"fc.weight": torch.ones(4, 8, dtype=torch.int8)}
_METRICS = {"train_acc.tp": torch.zeros(4), "criterion.weight": torch.ones(4)}
_OPTIMISER = {"state": {0: {"exp_avg": torch.zeros(64)}}, "param_groups": []}
_AVERAGED = {"n_averaged": torch.tensor(7)}

KINDS: Mapping[str, Mapping[str, Make]] = {
    "Checkpoints": {
        "`state_dict()` in a .pth file": checkpoint(state),
        "the same in a .safetensors file": checkpoint(state, "weights.safetensors"),
        "the same in a file of another suffix": checkpoint(state, "pytorch_model.bin"),
        'under "state_dict"': checkpoint(lambda: {"state_dict": state()}),
        'under "model"': checkpoint(lambda: {"model": state(), "epoch": 3}),
        'under "model_state_dict"': checkpoint(lambda: {"model_state_dict": state()}),
        'under "net", beside an optimiser (MONAI)': checkpoint(
            lambda: {"net": state(), "optimizer": _OPTIMISER}
        ),
        'under "module" (DeepSpeed)': checkpoint(lambda: {"module": state(), "dp_world_size": 1}),
        "timm's training script": checkpoint(
            lambda: {"state_dict": state(), "args": argparse.Namespace(lr=0.1), "metric": 71.5},
            "model_best.pth.tar",
        ),
        "torchvision's training script": checkpoint(
            lambda: {
                "model": state(),
                "model_ema": state("module.") | _AVERAGED,
                "optimizer": _OPTIMISER,
                "args": argparse.Namespace(lr=0.1),
            }
        ),
        "an object of the project beside the weights": checkpoint(
            lambda: {"model": state(), "config": _Config()}
        ),
        "Lightning, the network as self.model": checkpoint(
            lambda: {"state_dict": state("model."), "pytorch-lightning_version": "2.5"}, "best.ckpt"
        ),
        "Lightning, with metrics and a loss": checkpoint(
            lambda: {"state_dict": state("net.") | _METRICS}, "best.ckpt"
        ),
        "Lightning, its layers beside metrics": checkpoint(
            lambda: {"state_dict": state() | _METRICS}, "best.ckpt"
        ),
        "Lightning and torch.compile": checkpoint(
            lambda: {"state_dict": state("model._orig_mod.")}, "best.ckpt"
        ),
        "DataParallel or DistributedDataParallel": checkpoint(lambda: state("module.")),
        "torch.compile": checkpoint(lambda: state("_orig_mod.")),
        "FSDP, gathered": checkpoint(lambda: state("_fsdp_wrapped_module.")),
        "AveragedModel": checkpoint(lambda: state("module.") | _AVERAGED),
        'only under "ema"': checkpoint(lambda: {"ema": state()}),
        "timm with model-ema, asked for by weights_key": checkpoint(
            lambda: {"state_dict": state(), "state_dict_ema": state()}, weights_key="state_dict_ema"
        ),
        "float16": checkpoint(lambda: state(dtype=torch.float16)),
        "bfloat16": checkpoint(lambda: state(dtype=torch.bfloat16)),
        "float64": checkpoint(lambda: state(dtype=torch.float64)),
        "safetensors in shards": _shards,
        "a whole pickled network": _pickled,
        "a whole pickled network in a dictionary": _pickled_inside,
        "TorchScript": _scripted,
        "FSDP, sharded": _folder("__0_0.distcp"),
        "a folder": _folder("model.safetensors"),
        "LoRA adapters": checkpoint(lambda: state() | _LORA),
        "int8 weights": checkpoint(lambda: state() | _INT8),
        "another number of classes": checkpoint(
            lambda: state() | {"fc.weight": torch.ones(7, 8), "fc.bias": torch.ones(7)}
        ),
        "another network": checkpoint(lambda: nn.Linear(2, 2).state_dict()),
        "a damaged file": _file("damaged.pth", bytes(100)),
        "in a list": checkpoint(lambda: [3, state()]),
        "two networks that fit, online and target": checkpoint(
            lambda: {"state_dict": state("online.") | state("target.")}
        ),
        "trained with weight norm": checkpoint(_normalised),
        "a sparse tensor": checkpoint(
            lambda: state() | {"fc.weight": state()["fc.weight"].to_sparse()}
        ),
        "arrays of NumPy": checkpoint(lambda: {k: v.numpy() for k, v in state().items()}),
        "a pointer of Git LFS": _file(
            "weights.pth", b"version https://git-lfs.github.com/spec/v1\n"
        ),
        "a web page": _file("weights.pth", b"<!DOCTYPE html><html>not found</html>"),
        "a file of Keras": _file("weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(90)),
        "a file of torch.export as weights": _exported_weights,
        "no such file": factory("Net()", weights="weights.pth"),
    },
    "Inputs": {
        "grey, not configured": factory("Net(channels=1)"),
        "grey": factory(
            "Net(channels=1)", preprocess=SIZE | {"channels": 1, "mean": [0.13], "std": [0.31]}
        ),
        "grey, without mean and std": factory("Net(channels=1)", preprocess=SIZE | {"channels": 1}),
        "28 x 28, flattened, not configured": factory("flat()"),
        "28 x 28, flattened": factory(
            "flat()",
            preprocess={"mode": "squash", "crop": 28, "channels": 1, "mean": [0.1], "std": [0.3]},
        ),
        "BGR in [0, 255] less a mean": factory(
            "Net()",
            preprocess=SIZE
            | {"order": "bgr", "range": [0, 255], "mean": [104, 117, 124], "std": [1]},
        ),
        "[-1, 1]": factory("Net()", preprocess=SIZE | {"range": [-1, 1]}),
        "rectangles": factory("Net()", preprocess={"crop": [48, 32]}),
        "squashed": factory("Net()", preprocess={"resize": [32, 32]}),
        "letterboxed": factory("Net()", preprocess={"mode": "letterbox", "crop": 32}),
        "not resized": factory("Net()", preprocess={"mode": "none", "crop": 32}),
        "5 bands of 16 bits": factory(
            "Net(channels=5)",
            preprocess=SIZE | {"channels": 5, "bits": 16, "range": [0, 65535], "std": [1000.0]},
        ),
        "a mean of another number of channels": factory(
            "Net()", preprocess=SIZE | {"mean": [1, 2]}
        ),
        "a crop beyond the resized image": factory("Net()", preprocess={"resize": 32, "crop": 64}),
        "no preprocessing said": factory("Net()", preprocess={}),
        "a second input": factory("Two()"),
        "a second input with a constant value": factory("Two()", inputs={"age": [0.5] * 4}),
    },
    "Outputs": {
        "a tuple of scores and maps": factory("Other(lambda y, m: (y, m))"),
        "the same with output = 0": factory("Other(lambda y, m: (y, m))", output=0),
        "a list of one": factory("Other(lambda y, m: [y])"),
        'a dictionary with "logits"': factory('Other(lambda y, m: {"logits": y, "maps": m})'),
        "a dictionary of other keys": factory('Other(lambda y, m: {"a": y, "b": m})'),
        "a dictionary in a dictionary": factory('Other(lambda y, m: {"head": {"cls": y}})'),
        'the same with output = "head.cls"': factory(
            'Other(lambda y, m: {"head": {"cls": y}})', output="head.cls"
        ),
        "an array of NumPy": factory("Other(lambda y, m: y.numpy())"),
        "classes instead of scores (argmax)": factory("Other(lambda y, m: y.argmax(1))"),
        "an object with `.logits`": factory("Other(lambda y, m: ModelOutput(y))"),
        "(N, C, 1, 1)": factory("Other(lambda y, m: y[:, :, None, None])"),
        "(C,) for one image": factory("Other(lambda y, m: y.squeeze())"),
        "`squeeze()` before the classifier": factory("Squeezing()"),
        "`flatten()` of the whole batch before the classifier": factory("Flattening()"),
        "a softmax layer at the end": factory("nn.Sequential(Net(), nn.Softmax(dim=1))"),
        "a softmax in forward": factory("Other(lambda y, m: y.softmax(1))"),
        "a log-softmax in forward": factory("Other(lambda y, m: y.log_softmax(1))"),
        "sigmoids, multi-label": factory("Other(lambda y, m: y.sigmoid())", task="multi_label"),
        "sigmoids, task not said": factory("nn.Sequential(Net(), nn.Sigmoid())"),
        "one score, task not said": factory("Net(1)"),
        "one score, binary": factory("Net(1)", task="binary"),
        "one score of shape (N,), binary": factory("Other(lambda y, m: y[:, 0])", task="binary"),
        "one sigmoid, binary": factory("nn.Sequential(Net(1), nn.Sigmoid())", task="binary"),
        "a sigmoid of shape (N,), binary": factory(
            "Other(lambda y, m: y.sigmoid()[:, 0])", task="binary"
        ),
        "one of two softmax probabilities, binary": factory(
            "Other(lambda y, m: y.softmax(1)[:, 1], outputs=2)", task="binary"
        ),
        "heads with a sigmoid each, multi-label": factory(
            "Other(lambda y, m: torch.cat([one.sigmoid() for one in y.split(1, 1)], 1))",
            task="multi_label",
        ),
        "a map of scores for each class, task not said": factory("Other(lambda y, m: m)"),
        "a map of scores for each class, segmentation": factory(
            "Other(lambda y, m: m)", task="segmentation"
        ),
        "one map, segmentation": factory("Other(lambda y, m: m[:, :1])", task="segmentation"),
        "one row of scores, segmentation": factory("Net()", task="segmentation"),
        "vectors, embedding": factory("Other(lambda y, m: m.mean((2, 3)))", task="embedding"),
        "maps, embedding": factory("Other(lambda y, m: m)", task="embedding"),
        "scores that are not finite": factory("Other(lambda y, m: y / 0)"),
        "labels of another number": factory("Net()", labels=["cat", "dog"]),
    },
    "Networks": {
        "dropout that never ends": factory("Other(lambda y, m: F.dropout(y))"),
        "batch normalisation without running statistics": factory("statistics()"),
        "weight norm": factory("weight_norm()"),
        "spectral norm": factory("spectral_norm()"),
        "gradient checkpointing": factory("Checkpointed()"),
        "gradient checkpointing, reentrant": factory("Reentrant()"),
        "one image at a time (`assert`)": factory("Single()"),
        "batches of a fixed size (`view(8, -1)`)": factory("FixedBatch()"),
        "train() in forward": factory("Training()"),
        "lazy layers": factory("lazy()"),
        "made in float16": factory("Net().half()"),
        "`.half()` of the images in forward": factory("Halving()"),
        "`.cuda()` in forward": factory("OnGpu()"),
        "a dictionary as input": factory("FromDictionary()"),
        "a backbone under no_grad": factory("Detached()"),
        "work on the input in place": factory("InPlace()"),
        "`view` of the input": factory("Viewing()"),
        "wrapped in DataParallel": factory("nn.DataParallel(Net())"),
        "wrapped in torch.compile": factory("torch.compile(Net())"),
        "int8, dynamic": factory("dynamic()"),
        "int8, static": factory("static()"),
    },
    "Sources": {
        "packages called models and service, lazy imports": _own_package,
        "a module that imports what is not installed": _missing_import,
        "a factory that raises": factory("raising()"),
        "a factory that is not there": _named("python:net.py:made"),
        "a factory that returns no network": factory("dict()"),
        "torch.export, for batches of one": _export,
        "ONNX, for batches of one": _onnx,
        "a folder of transformers": _transformers,
        "the same with an adapter of LoRA": _adapter,
        "the same with another adapter of PEFT": _other_adapter,
        "a folder of transformers that segments": _segformer,
        "a CLIP of transformers": _clip,
        "a CLIP of transformers, without labels": lambda folder: _clip(folder) | {"labels": None},
        "a CLIP of transformers, with one label": lambda f: _clip(f) | {"labels": ["a cat"]},
        "a CLIP of transformers, embedding": lambda folder: (
            _clip(folder) | {"labels": None, "task": "embedding"}
        ),
        "torchvision, segmentation": _named(
            "torchvision:lraspp_mobilenet_v3_large", preprocess={"resize": [64, 64]}
        ),
        "a folder of timm": _timm,
        "timm, embedding": _named("timm:resnet10t", preprocess=SIZE, task="embedding"),
        "timm, grey": _named(
            "timm:resnet10t", preprocess=SIZE | {"channels": 1, "mean": [0.5], "std": [0.5]}
        ),
        "timm, a name with a slip": _named("timm:resnet5O"),
        "torchvision, a name with a slip": _named("torchvision:resnet5"),
    },
}
