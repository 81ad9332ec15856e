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
from contextlib import ExitStack, contextmanager
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

SINGLE_BYTES = 120_000_000
"""Each graph holds weights of its own: those for single images that would hold more are not made."""


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
    openvino = library()
    layers = reference.outputs
    place = f"{precision}, OpenVINO {openvino.__version__}, {processor(torch.device('cpu'))}"
    try:
        converted = _converted(openvino, module, reference, cache)
        weights = sum(parameter.nbytes for parameter in module.parameters())
        threads = torch.get_num_threads()
        singles = (1, threads)[: SINGLE_BYTES // max(1, weights)]
        compile_ = partial(_Graph, openvino, converted, hint=_HINTS[precision], threads=threads)
        # Where nothing is proved or timed any more, requests are served meanwhile.
        compiler = Compiler(compile_, waits=not reference.is_proved(place))
        numbers = (1, len(layers)) if len(layers) > 1 else (1,)
        backbones = [
            CompiledBackbone(compiler, outputs=number, threads=threads, singles=singles)
            for number in numbers
        ]
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

    def begin(self, *, outputs: int, batch: int, streams: int = 1) -> Future[_Graph]:
        """Begin to compile the first outputs, see `_Graph`."""
        graph = self._thread.submit(self._compile, outputs=outputs, batch=batch, streams=streams)
        graph.add_done_callback(_tell_failure)
        if self._waits:
            wait([graph])
        return graph


class CompiledBackbone:
    """A backbone compiled for any batch size. One thread at a time may call it.

    Attributes:
        outputs: how many tensors it gives.
    """

    def __init__(
        self, compiler: Compiler, *, outputs: int, threads: int, singles: Sequence[int]
    ) -> None:
        """Compile the first `outputs` tensors.

        Graphs for single images, begun when they are first wanted, run so many of them at a time: a
        lone one on all threads, then one on each thread, since threads that share an image wait for
        each other at every layer, and for long where another process has a core. Where only the first
        of the two has room, that of any size runs one on each thread.
        """
        self.outputs = outputs
        self._compiler = compiler
        streams = threads if len(singles) == 1 else 1
        self._of_any_size = compiler.begin(outputs=outputs, batch=-1, streams=streams)
        self._single: dict[int, Future[_Graph] | _Graph | None] = dict.fromkeys(singles)
        self._at_a_time = threads if len(singles) > 1 or streams > 1 else 0

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
        for part, streams in self._parts(len(images)):
            graph = self._graph_for(images[part], streams)
            graph.run(images[part], [output[part] for output in outputs])
        return outputs

    def _parts(self, count: int) -> Iterator[tuple[slice, int]]:
        """Images of a batch, and how many of them run at a time; 0 = by the graph of any size.

        What makes no whole round has all threads together.
        """
        rest = count % self._at_a_time if self._at_a_time else count
        if rest < count:
            yield slice(count - rest), self._at_a_time
        if rest:
            yield slice(count - rest, count), 1 if rest == 1 else 0

    def _graph_for(self, images: Tensor, streams: int) -> _Graph:
        if streams not in self._single:
            return self._of_any_size.result()
        graph = self._single[streams] or self._compiler.begin(
            outputs=self.outputs, batch=1, streams=streams
        )
        if isinstance(graph, Future) and graph.done():
            graph = self._checked(graph, images)
        self._single[streams] = graph
        return self._of_any_size.result() if isinstance(graph, Future) else graph

    def _checked(self, compiled: Future[_Graph], images: Tensor) -> _Graph:
        """A graph for single images; that of any size, unless both give the same."""
        of_any_size = self._of_any_size.result()
        equal = close if self.precision == "fp32" else alike
        try:
            graph = compiled.result()
            if all(map(equal, graph(images), of_any_size(images))):
                return graph
        except Exception:
            logger.info("a graph for single images fails", exc_info=True)
        return of_any_size


def _tell_failure(compiled: Future[_Graph]) -> None:
    if error := compiled.exception():
        logger.warning("OpenVINO does not compile a graph; others serve instead", exc_info=error)


class _Graph:
    """A converted model, compiled for batches of any size (-1), or for single images (1).

    It runs `streams` images at a time, on an equal share of the threads each; one of any size that has
    a single stream runs a batch as a whole.
    """

    def __init__(
        self,
        openvino: Any,
        converted: Any,
        *,
        outputs: int,
        hint: str,
        batch: int,
        streams: int,
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
                **({"NUM_STREAMS": streams} if streams > 1 else {"PERFORMANCE_HINT": "LATENCY"}),
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
        self._takes_one = batch == 1 or streams > 1
        self._compiled = compiled
        self._requests: list[Any] = []

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
        whole = (images.permute(0, 2, 3, 1), *outputs)
        size = 1 if self._takes_one else len(images)
        parts = zip(*(tensor.split(size) for tensor in whole), strict=True)
        with ExitStack() as running:
            for index, (part, *results) in enumerate(parts):
                if index == len(self._requests):
                    self._requests.append(self._compiled.create_infer_request())
                request = self._requests[index]
                request.set_input_tensor(self._shared(part))
                for number, result in enumerate(results):
                    request.set_output_tensor(number, self._shared(result))
                request.start_async()
                # Whatever happens to another: nothing may be freed that it writes to.
                running.callback(request.wait)

    def _shared(self, tensor: Tensor) -> Any:
        return self._tensor(tensor.numpy(), shared_memory=True)


def library() -> Any:
    """The package, imported.

    Raises:
        Refused: it is not installed.
    """
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
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.no_grad(), _root_logger_kept():
        # Tracing warns of itself, and of every shape that it takes as fixed.
        warnings.simplefilter("ignore")
        # Tracing compares the trace with the module, which takes longer than all the rest: whatever
        # comes of it is compared anyway.
        decoder = TorchScriptPythonDecoder(
            module.eval(), example_input=images[:2], trace_kwargs={"check_trace": False}
        )
        model = openvino.convert_model(decoder)
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
