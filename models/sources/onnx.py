"""`onnx:FILE.onnx`: a network as a graph of ONNX, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.catalog import PreprocessSpec
from models.errors import ModelLoadFailed
from models.sources import USUAL_PREPROCESS, BuildRequest, Built
from models.sources.onnx_tail import constants_of, translate_tail

_MOST_PARTS = 16
_TOLERANCE = 1e-4
_WAY_OUT = (
    "Export it for batches of any size: torch.onnx.export(network, images, file, "
    'input_names=["images"], dynamic_axes={"images": {0: "batch"}}).'
)
_NOTE = (
    "ONNX Runtime computes the network up to {layer}, and gives no gradients: methods that need "
    "them explain that layer alone."
)


class NotImplementedPart(torch.autograd.Function):
    """Lets a graph begin behind a part, whose own gradient is not implemented.

    Operations of torch that are recorded but not differentiated have such names, too.
    """

    @staticmethod
    def forward(_: Any, run: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Run the part."""
        return run(inputs)

    @staticmethod
    def backward(_: Any, *__: Tensor) -> tuple[None, None]:
        """Give nothing."""
        return None, None


class Part(nn.Module):
    """A part of a graph, with one tensor in and one out. It gives no gradients."""

    def __init__(self, serialised: bytes) -> None:
        super().__init__()
        self._serialised = serialised
        self._session = self._start()

    def forward(self, inputs: Tensor) -> Tensor:
        """Run it on the CPU, in float32."""
        found: Tensor = NotImplementedPart.apply(self._run, inputs)  # type: ignore[no-untyped-call]
        return found

    def _run(self, inputs: Tensor) -> Tensor:
        array = inputs.detach().cpu().float().contiguous().numpy()
        (found,) = self._session.run(None, {self._session.get_inputs()[0].name: array})
        return torch.from_numpy(found).to(inputs.device, inputs.dtype)

    def _start(self) -> Any:
        runtime = _library("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # What matters of its warnings is checked here.
        options.log_severity_level = 3
        return runtime.InferenceSession(
            self._serialised, options, providers=["CPUExecutionProvider"]
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the session, of which each copy has its own."""
        return {key: value for key, value in vars(self).items() if key != "_session"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start a session."""
        vars(self).update(state)
        self._session = self._start()


def build(request: BuildRequest) -> Built:
    """Cut a graph wherever one map alone goes on, into parts that are layers here.

    What follows the last of these maps becomes layers of torch, if it is pooling, linear layers and
    functions of single values: they have gradients.

    Raises:
        ModelLoadFailed: onnx or onnxruntime is not installed, or the file is not a graph of images.
    """
    onnx = _library("onnx")
    stored = _read(onnx, request.file(), request.name)
    model = _for_any_batch(onnx, stored)
    images, channels, (height, width) = _input(model, request.name)
    output = model.graph.output[0].name
    maps = list(_maps(model, images))
    tail = translate_tail(onnx, model, maps[-1]) if maps else None
    ends = _thinned(maps) if tail is not None else [*_thinned(maps), output]
    module = nn.Sequential()
    extractor = onnx.utils.Extractor(model)
    for start, end in zip([images, *ends], ends, strict=False):
        part = extractor.extract_model([start], [end]).SerializeToString()
        module.add_module(_layer_name(model, end, module), Part(part))
    notes = (_NOTE.format(layer=list(dict(module.named_children()))[-1]),) if tail else ()
    for name, layer in tail or ():
        module.add_module(name, layer)
    _compare(module, stored, (channels, height, width), request.name)
    spec = PreprocessSpec(crop=(height, width), channels=channels)
    return Built(
        module=module,
        preprocess=spec.over(USUAL_PREPROCESS),
        notes=notes,
        assumed_preprocess=True,
    )


def _compare(module: nn.Module, stored: Any, shape: tuple[int, int, int], name: str) -> None:
    """Check that the parts give two images the scores that the whole gives them one by one."""
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    batch = stored.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    whole = Part(stored.SerializeToString())
    try:
        with torch.no_grad():
            expected = torch.stack([whole(image.expand(batch, *shape))[0] for image in images])
            found = module.eval()(images)
    except Exception as error:
        raise ModelLoadFailed(
            f"ONNX Runtime cannot run {name} on two images of {shape[2]} x {shape[1]} pixels. "
            f"{_WAY_OUT}"
        ) from error
    limit = _TOLERANCE * float(expected.abs().max())
    if found.shape != expected.shape or not bool((found - expected).abs().max() <= limit):
        raise ModelLoadFailed(f"{name} gives different scores in parts than as a whole.")


def _library(name: str) -> Any:
    try:
        found = importlib.import_module(name)
        if name == "onnx":
            importlib.import_module("onnx.utils")
    except ImportError as error:
        raise ModelLoadFailed(f"{name} is not installed: pip install 'heatlens[onnx]'.") from error
    return found


def _read(onnx: Any, path: Path, name: str) -> Any:
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:
        raise ModelLoadFailed(f"{name} cannot be read as an ONNX graph.") from error
    return model


def _for_any_batch(onnx: Any, stored: Any) -> Any:
    """The graph for batches of any size, with the shapes of its tensors."""
    model = copy.deepcopy(stored)
    graph = model.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    if size := batch.dim_value:
        batch.dim_param = "batch"
        # Shapes that were inferred from the fixed size.
        del graph.value_info[:]
        for output in graph.output:
            output.type.tensor_type.shape.dim[0].dim_param = "batch"
        constants = constants_of(graph)
        for node in graph.node:
            tensor = constants.get(node.input[1]) if node.op_type == "Reshape" else None
            if (
                tensor is not None
                and (shape := onnx.numpy_helper.to_array(tensor).copy())[0] == size
            ):
                # The size that the tensor has.
                shape[0] = 0
                tensor.CopyFrom(onnx.numpy_helper.from_array(shape, tensor.name))
    return onnx.shape_inference.infer_shapes(model)


def _input(model: Any, name: str) -> tuple[str, int, tuple[int, int]]:
    """Name, channels and size of the images that a graph takes."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    sizes = inputs[0].type.tensor_type.shape.dim
    if len(inputs) != 1 or len(sizes) != 4:
        raise ModelLoadFailed(
            f"{name} takes {len(inputs)} inputs ({', '.join(value.name for value in inputs)}), not "
            "one batch of images (N, channels, height, width)."
        )
    channels, height, width = (int(size.dim_value) for size in sizes[1:])
    return inputs[0].name, channels or 3, (height or 224, width or 224)


def _maps(model: Any, images: str) -> Iterator[str]:
    """Tensors of four dimensions through which everything passes, in the order of the graph."""
    graph = model.graph
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    last_use = {name: i for i, node in enumerate(graph.node) for name in node.input}
    constant = {tensor.name for tensor in graph.initializer}
    live = {images}
    for i, node in enumerate(graph.node):
        if not (set(node.input) - constant - {""}):
            constant.update(node.output)
            continue
        live |= set(node.output)
        live = {name for name in live if last_use.get(name, -1) > i}
        only = next(iter(live)) if len(live) == 1 else ""
        shape = shapes.get(only, [])
        if only in node.output and len(shape) == 4 and shape[2:] != [1, 1]:
            yield only


def _thinned(maps: Sequence[str]) -> list[str]:
    """At most `_MOST_PARTS` of the maps, evenly spread, with the last one."""
    step = -(-len(maps) // _MOST_PARTS) or 1
    return list(maps[::-1][::step][::-1])


def _layer_name(model: Any, tensor: str, module: nn.Module) -> str:
    """The name of the node that makes a tensor, as the name of a layer."""
    node = next(node for node in model.graph.node if tensor in node.output)
    name = re.sub(r"[^0-9A-Za-z]+", "_", node.name or f"{node.op_type}_{tensor}").strip("_")
    return f"{name}_{len(list(module.children()))}" if hasattr(module, name) else name
