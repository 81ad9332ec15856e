"""OpenVINO as the runtime of a model's backbone, on the CPU."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.preparation.precision import alike
from models.preparation.race import processor
from models.preparation.replay import LayerOutputs, Reference, Refused
from models.preparation.variant import Variant, close
from models.proof_cache import ProofCache
from models.types import Precision

logger = logging.getLogger("heatlens.preparation")

_HINTS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}

FIXED_BATCHES = (1, 4, 2)
"""Batches with a graph of their own, most worth first: the graph of any size takes a tenth longer."""

FIXED_BYTES = 120_000_000
"""Each graph holds weights of its own: those of fixed size that would hold more are not made."""


def installed() -> bool:
    """Whether OpenVINO can be imported; it is not imported for that."""
    return importlib.util.find_spec("openvino") is not None


def openvino_variants(
    module: nn.Module,
    reference: Reference,
    *,
    precision: Precision,
    cache: ProofCache,
) -> tuple[list[Variant], Precision]:
    """Convert a model's backbone, and make variants of it.

    The module is float32, on the CPU, and left as it is; `reference` is what it gives. OpenVINO
    computes in float32 where the CPU has no instructions for `precision`. The converted model is
    kept beside the proofs, since converting takes much longer than reading it.

    Returns:
        A variant of the target layer alone, then one that gives the other layers too (each further
        output costs fusions and a copy), and the precision they compute in.

    Raises:
        Refused: OpenVINO is not installed, does not know an operation of the model, or gives other
            tensors.
    """
    openvino = _library()
    layers = reference.outputs
    place = f"{precision}, OpenVINO {openvino.__version__}, {processor(torch.device('cpu'))}"
    try:
        converted = _converted(openvino, module, reference, cache)
        weights = sum(parameter.nbytes for parameter in module.parameters())
        fixed = FIXED_BATCHES[: FIXED_BYTES // max(1, weights)]
        threads = torch.get_num_threads()
        compile_ = partial(_Graph, openvino, converted, hint=_HINTS[precision], threads=threads)
        # Where nothing is proved or timed any more, requests are served meanwhile.
        compiler = Compiler(compile_, waits=not reference.is_proved(place))
        backbones = [CompiledBackbone(compiler, outputs=1, fixed=fixed)]
        if len(layers) > 1:
            backbones.append(CompiledBackbone(compiler, outputs=len(layers), fixed=fixed[:1]))
        served = backbones[0].precision
    except Exception as error:
        logger.warning("OpenVINO does not take the model", exc_info=True)
        raise Refused("the conversion failed; the log says more") from error
    step = f"OpenVINO trunk in {served}"
    steps = [step, f"{step} with {len(layers) - 1} inner layers"]
    variants = [
        replace(
            reference.variant(b, b.outputs, exact=served == "fp32", step=step, place=place),
            works=b.works,
        )
        for b, step in zip(backbones, steps, strict=False)
    ]
    return variants, served


class Compiler:
    """Compiles graphs one after the other in a thread of its own."""

    def __init__(self, compile_: Callable[..., _Graph], *, waits: bool) -> None:
        """Args: what makes a graph of a size and number of outputs; whether callers wait for it."""
        self._compile = compile_
        self._waits = waits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="openvino")

    def begin(self, *, outputs: int, batch: int) -> Future[_Graph]:
        """Begin to compile the first outputs for a batch of one size, or of any (-1)."""
        graph = self._thread.submit(self._compile, outputs=outputs, batch=batch)
        graph.add_done_callback(_tell_failure)
        if self._waits:
            wait([graph])
        return graph


class CompiledBackbone:
    """A backbone compiled for any batch size. One thread at a time may call it.

    Attributes:
        outputs: how many tensors it gives.
    """

    def __init__(self, compiler: Compiler, *, outputs: int, fixed: Sequence[int] = ()) -> None:
        """Compile the first `outputs` tensors.

        Batches of a `fixed` size have a graph of their own, which is begun when it is first wanted.
        Other batches are run in parts of these sizes, if all sizes have one and each thread gets an
        image of the largest: in parts of one image, large networks would read their weights too often.
        """
        self.outputs = outputs
        self._compiler = compiler
        self._of_any_size = compiler.begin(outputs=outputs, batch=-1)
        self._fixed: dict[int, Future[_Graph] | _Graph | None] = dict.fromkeys(fixed)
        enough = set(fixed) == set(FIXED_BATCHES) and torch.get_num_threads() <= max(FIXED_BATCHES)
        self._part_sizes = sorted(fixed, reverse=True) if enough else []

    def works(self) -> bool:
        """Whether it could be compiled; waits until that is known."""
        return self._of_any_size.exception() is None

    @property
    def precision(self) -> Precision:
        """What it computes in."""
        hint = self._of_any_size.result().hint
        return next(p for p, name in _HINTS.items() if name == hint)

    def __call__(self, inputs: Tensor) -> Sequence[Tensor]:
        """(N, 3, H, W) → float32 tensors, (N, …) each, that the next call leaves alone."""
        images = inputs.float().contiguous(memory_format=torch.channels_last)
        outputs = self._of_any_size.result().empty(len(images))
        start = 0
        for size in self._parts(len(images)):
            part = slice(start, start + size)
            graph = self._graph_for(images[part])
            graph.run(images[part], [output[part] for output in outputs])
            start += size
        return outputs

    def _parts(self, count: int) -> Sequence[int]:
        """The sizes in which a batch is run."""
        if count in self._fixed or not self._part_sizes:
            return [count]
        parts: list[int] = []
        for size in self._part_sizes:
            parts += [size] * ((count - sum(parts)) // size)
        return parts

    def _graph_for(self, images: Tensor) -> _Graph:
        size = len(images)
        if size not in self._fixed:
            return self._of_any_size.result()
        graph = self._fixed[size] or self._compiler.begin(outputs=self.outputs, batch=size)
        if isinstance(graph, Future) and graph.done():
            graph = self._checked(graph, images)
        self._fixed[size] = graph
        return self._of_any_size.result() if isinstance(graph, Future) else graph

    def _checked(self, compiled: Future[_Graph], images: Tensor) -> _Graph:
        """A graph of a fixed size; that of any size, unless both give the same."""
        of_any_size = self._of_any_size.result()
        equal = close if self.precision == "fp32" else alike
        try:
            graph = compiled.result()
            if all(map(equal, graph(images), of_any_size(images))):
                return graph
        except Exception:
            logger.info("a graph for batches of %d fails", len(images), exc_info=True)
        return of_any_size


def _tell_failure(compiled: Future[_Graph]) -> None:
    if error := compiled.exception():
        logger.warning("OpenVINO does not compile a graph; others serve instead", exc_info=error)


class _Graph:
    """A converted model, compiled for batches of one size, or of any (-1)."""

    def __init__(
        self,
        openvino: Any,
        converted: Any,
        *,
        outputs: int,
        hint: str,
        batch: int,
        threads: int,
    ) -> None:
        whole = converted.clone()
        results = [whole.output(_name(index)).get_node() for index in range(outputs)]
        model = openvino.Model(results, whole.get_parameters())
        model.reshape([batch, *list(model.input().get_partial_shape())[1:]])
        # Images come channels_last, and are taken as they lie.
        steps = openvino.preprocess.PrePostProcessor(model)
        steps.input().tensor().set_layout(openvino.Layout("NHWC"))
        steps.input().model().set_layout(openvino.Layout("NCHW"))
        compiled = openvino.Core().compile_model(
            steps.build(),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": hint,
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                # Several workers would all be pinned to the same first cores.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self.hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self._shapes = [
            tuple(size.get_length() for size in list(output.get_partial_shape())[1:])
            for output in compiled.outputs
        ]
        self._tensor = openvino.Tensor
        self._request = compiled.create_infer_request()

    def empty(self, count: int) -> Sequence[Tensor]:
        """Memory for what it gives for so many images, float32."""
        return [torch.empty(count, *shape) for shape in self._shapes]

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """(N, 3, H, W), channels_last → float32 tensors, (N, …) each."""
        outputs = self.empty(len(images))
        self.run(images, outputs)
        return outputs

    def run(self, images: Tensor, outputs: Sequence[Tensor]) -> None:
        """Fill `outputs`, contiguous, from images (N, 3, H, W), channels_last."""
        self._request.set_input_tensor(self._shared(images.permute(0, 2, 3, 1)))
        for index, output in enumerate(outputs):
            self._request.set_output_tensor(index, self._shared(output))
        self._request.infer()

    def _shared(self, tensor: Tensor) -> Any:
        return self._tensor(tensor.numpy(), shared_memory=True)


def _library() -> Any:
    # Importing OpenVINO reports to its makers, unless the package that does so is marked absent.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError:
        raise Refused("the package is not installed (extra: openvino)") from None
    return openvino


def _converted(openvino: Any, module: nn.Module, reference: Reference, cache: ProofCache) -> Any:
    """The module as a model of OpenVINO's, read from beside the proofs if it is there."""
    layers = hashlib.blake2b(" ".join(reference.outputs).encode(), digest_size=4).hexdigest()
    file = cache.beside(f"{openvino.__version__.partition('-')[0]}-{layers}.bin")
    if file is not None and file.exists():
        try:
            return openvino.Core().read_model(file.with_suffix(".xml"), file)
        except RuntimeError:
            logger.info("a kept model cannot be read and is converted again", exc_info=True)
    # A copy: converting it runs it in ways of its own.
    copied = LayerOutputs(copy.deepcopy(module), reference.outputs)
    model = _convert(openvino, copied, reference.images)
    if file is not None:
        _keep(openvino, model, file)
    return model


def _keep(openvino: Any, model: Any, file: Path) -> None:
    """Save a model for the next start; other workers may save the same at the same time."""
    try:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            whole = Path(folder) / "model.xml"
            openvino.save_model(model, whole, compress_to_fp16=False)
            whole.replace(file.with_suffix(".xml"))
            whole.with_suffix(".bin").replace(file)
    except (OSError, RuntimeError):
        logger.info("the converted model is not kept", exc_info=True)


def _convert(openvino: Any, module: LayerOutputs, images: Tensor) -> Any:
    """The module as a model of OpenVINO's, for batches of any size."""
    with warnings.catch_warnings(), torch.no_grad(), _root_logger_kept():
        # Tracing warns of itself, and of every shape that it takes as fixed.
        warnings.simplefilter("ignore")
        model = openvino.convert_model(module.eval(), example_input=images[:2])
    model.reshape([-1, *images.shape[1:]])
    for index, output in enumerate(model.outputs):
        output.get_tensor().set_names({_name(index)})
    return model


def _name(index: int) -> str:
    """What an output is called, in whatever order a file lists them."""
    return f"output {index}"


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undo what conversion does to the root logger: it hides everything below an error, and adds filters."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers
