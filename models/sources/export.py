"""`export:FILE.pt2`: a network that torch.export saved, with no Python of its own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.catalog import PreprocessSpec
from models.errors import ModelLoadFailed
from models.sources import USUAL_PREPROCESS, BuildRequest, Built
from models.sources.leaves import restore_layers

_TOLERANCE = 1e-4
_RESHAPES = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("view", "reshape", "_unsafe_view", "expand", "view_copy", "expand_copy")
)
_WAY_OUT = (
    "Export it for batches of any size: torch.export.export(network, (images,), "
    'dynamic_shapes=({0: torch.export.Dim("batch")},)), with at least two images.'
)


class Exported(nn.Module):
    """The layers of an exported network, under the names that they had, and the graph over them."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # Of torch's own structures.
            warnings.simplefilter("ignore")
            layers = torch.export.unflatten(program)
        for name, child in layers.named_children():
            self.add_module(name, child)
        for name, parameter in layers.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in layers.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for node in layers.graph.nodes:
            if node.op == "get_attr" and not hasattr(self, node.target):
                setattr(self, node.target, getattr(layers, node.target))
        self.graph = layers.graph

    def forward(self, images: Tensor) -> Any:
        """Run the graph; of several outputs it returns a tuple."""
        found = fx.Interpreter(self, graph=self.graph).run(images, enable_io_processing=False)
        return found[0] if len(found) == 1 else found


def build(request: BuildRequest) -> Built:
    """Load an exported network, whose layers have the names that they had before.

    A network that was exported for one size of batch is made to take others, if only reshapes hold
    it to that size, and must then give each image the scores that the file gives it.

    Raises:
        ModelLoadFailed: no such file, not an exported network of images, or held to its batch.
    """
    program = _load(request.file(), request.name)
    size = _input_size(program)
    module = Exported(program)
    notes: tuple[str, ...] = ()
    if isinstance(size[0], int):
        _free_batch(module, size[0])
        if not _agree(module, Exported(program), size):
            raise ModelLoadFailed(
                f"{request.name} holds a network for batches of {size[0]} alone. {_WAY_OUT}"
            )
        notes = (f"The network was exported for batches of {size[0]}, and made to take others.",)
    _forget_traces(module)
    restore_layers(module)
    spec = PreprocessSpec(crop=(int(size[2]), int(size[3])), channels=int(size[1]))
    return Built(
        module=module, preprocess=spec.over(USUAL_PREPROCESS), notes=notes, assumed_preprocess=True
    )


def _load(path: Path, name: str) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings():
            # Of torch's own formats.
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except Exception as error:
        raise ModelLoadFailed(
            f"{name} was not written by torch.export.save, or was written by a newer torch than "
            f"{torch.__version__}."
        ) from error


def _input_size(program: torch.export.ExportedProgram) -> tuple[int | torch.SymInt, ...]:
    """Shape of the one input: batch (a symbol where it is free), channels, height, width."""
    names = program.graph_signature.user_inputs
    shapes = [
        tuple(node.meta["val"].shape)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    ]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise ModelLoadFailed(
            f"The exported network takes {len(names)} inputs, not one batch of images. Export it "
            "with images as its only input."
        )
    return shapes[0]


def _free_batch(module: nn.Module, batch: int) -> None:
    """Replace the size of the batch in reshapes by that of what enters the graph."""
    for child in module.modules():
        graph = getattr(child, "graph", None)
        if not isinstance(graph, fx.Graph):
            continue
        entered = next((node for node in graph.nodes if node.op == "placeholder"), None)
        for node in list(graph.nodes):
            if entered is None or node.target not in _RESHAPES or node.args[1][0] != batch:
                continue
            given = node.args[0]
            value = given.meta.get("val")
            source = given if value is not None and value.shape[:1] == (batch,) else entered
            # What is expanded over the batch does not know its size.
            source = entered if "expand" in str(node.target) else source
            with graph.inserting_before(node):
                count = graph.call_function(torch.ops.aten.sym_size.int, (source, 0))
            node.args = (given, [count, *node.args[1][1:]], *node.args[2:])


def _agree(module: nn.Module, reference: nn.Module, size: tuple[int | torch.SymInt, ...]) -> bool:
    """Whether a network gives three images the scores that the reference gives them."""
    batch, *shape = (int(side) for side in size)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            found: Tensor = module(images)
            expected = [reference(image[None].expand(batch, *shape))[0] for image in images]
            error = (found - torch.stack(expected)).abs().max()
            return bool(error <= _TOLERANCE * found.abs().max())
    # A graph that still has the batch in it fails in many ways.
    except Exception:  # noqa: BLE001
        return False


def _forget_traces(module: nn.Module) -> None:
    """Drop what the export knew of each value: tensors of unknown size, which cannot be copied."""
    for child in module.modules():
        graph = getattr(child, "graph", None)
        for node in graph.nodes if isinstance(graph, fx.Graph) else ():
            node.meta.clear()
