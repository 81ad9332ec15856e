"""Proves on a model's own tensors what each of its layers may be used for.

A layer may be read and changed if its first dimension is the image at every size of batch, and its
values do not depend on the other images. It is a map if its positions respond to the image where
they claim to lie (`models.locality`). A module that a pass calls several times is as many layers,
named `act#1`, `act#2` and so on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.hooks import HookStack
from models.layers import TokenLayout, candidate_layouts
from models.locality import Locality, Response, Verdict, judge, patched
from models.probe import Call, Trace, largest_batch, row_checksum
from models.types import LayerInfo

_COMPANY_TOLERANCE = 1e-3

NOT_THE_IMAGE = "its first dimension is not the image"
SEVERAL_CALLS = "it is called {0} times in a pass; name one of them: {1}#1 to {1}#{0}"
NO_TENSOR = "its output is not one tensor, or quantised"
NOT_A_MAP = "its output is not a map of the image"
VARYING = "it is not called as often in every pass"
ELSEWHERE = "its positions do not respond to the image where they would lie in it"


@dataclass(frozen=True, kw_only=True)
class LayerProof:
    """What was proved of a layer.

    Attributes:
        usable: whether it can be read, described and changed.
        input_usable: whether the first dimension of its input is the image, too.
        spatial: whether its output is a map of the image, so that it can be explained.
        layout: of the map; None = plain (N, C, h, w).
        reason: why it is not usable, or not spatial; empty if it is both.
    """

    usable: bool
    input_usable: bool = False
    spatial: bool = False
    layout: TokenLayout | None = None
    reason: str = ""


Proofs = Mapping[str, LayerProof]


def layouts_of(proofs: Proofs) -> dict[str, TokenLayout | None]:
    """The layout of each layer that was proved to be a map; None = plain (N, C, h, w)."""
    return {name: proof.layout for name, proof in proofs.items() if proof.spatial}


def input_layouts(
    trace: Trace, layouts: Mapping[str, TokenLayout | None]
) -> dict[str, TokenLayout | None]:
    """The layouts of the layers' inputs, by the name of the layer they enter.

    That is the layout of the layer whose output they are, or for channels that come last, that of
    the layer's own output at the same positions.
    """
    produced: dict[tuple[tuple[int, ...], tuple[int, ...]], TokenLayout | None] = {}
    for name, call in trace.calls.items():
        if name in layouts and call.output is not None:
            produced[call.values, tuple(call.output.shape)] = layouts[name]
    found: dict[str, TokenLayout | None] = {}
    for name, call in trace.calls.items():
        own, given = layouts.get(name), (call.input_values, call.input_shape)
        if given in produced:
            found[name] = produced[given]
        elif own is not None and call.output is not None and len(call.input_shape) > 2:
            same_places = call.input_shape[:-1] == tuple(call.output.shape[:-1])
            found |= {name: own} if same_places else {}
    return found


def layer_infos(trace: Trace, proofs: Proofs, *, target_layer: str | None) -> tuple[LayerInfo, ...]:
    """Describe every layer, in the order in which the model defines them."""
    return tuple(
        _layer_info(name, trace, proofs[name], recommended=name == target_layer) for name in proofs
    )


def _layer_info(name: str, trace: Trace, proof: LayerProof, *, recommended: bool) -> LayerInfo:
    call = trace.calls.get(name)
    module = trace.module.get_submodule(name) if call is None else call.module
    return LayerInfo(
        name=name,
        type=type(module).__name__,
        output_shape=() if call is None or call.output is None else tuple(call.output.shape[1:]),
        spatial=proof.spatial,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        recommended=recommended,
        calls=trace.times.get(name, 1),
        usable=proof.usable,
        reason=proof.reason,
    )


def prove_layers(trace: Trace) -> dict[str, LayerProof]:
    """Prove all layers of a traced model on the CPU, in a pass of ten images, or three of them.

    Returns:
        A proof for each call by its name, and one for the bare name of modules with several, in the
        order in which the model defines them.
    """
    measured, places = _measure(trace)
    verdicts: dict[str, bool] = {}
    made: dict[str, LayerProof] = {}
    for name, call in trace.calls.items():
        if call.output is None:
            made[name] = LayerProof(usable=False, reason=NO_TENSOR)
        elif name not in measured:
            made[name] = LayerProof(usable=False, reason=VARYING)
        elif not measured[name].agrees_with(call, images=len(trace.probe)):
            made[name] = LayerProof(usable=False, reason=NOT_THE_IMAGE)
        else:
            localities = [one.locality(places) for one in measured[name].responses]
            proof = _spatial_proof(localities, verdicts)
            given = measured[name].input_is_images and call.input_shape[:1] == (len(trace.probe),)
            made[name] = replace(proof, input_usable=given)
    proofs: dict[str, LayerProof] = {}
    for path, times in trace.times.items():
        if times > 1:
            reason = SEVERAL_CALLS.format(times, path)
            proofs[path] = LayerProof(usable=False, reason=reason)
        names = [path] if times == 1 else [f"{path}#{i}" for i in range(1, times + 1)]
        proofs |= {name: made[name] for name in names}
    return proofs


@dataclass(frozen=True)
class _Measured:
    """A layer's output for the patched images.

    Attributes:
        rows_are_images: whether it has as many rows as there were images.
        input_is_images: the same of the layer's input.
        checksum: of its first row, which belongs to the first image of the trace, too.
        responses: in each layout that it may have.
    """

    rows_are_images: bool
    input_is_images: bool
    checksum: tuple[float, float] | None
    responses: Sequence[Response]

    def agrees_with(self, call: Call, *, images: int) -> bool:
        """Whether dimension 0 is the image in both passes, with the same values for the same."""
        if call.output is None or call.output.ndim == 0 or len(call.output) != images:
            return False
        if not self.rows_are_images or self.checksum is None or call.checksum is None:
            return False
        scale = max(map(abs, call.checksum))
        pairs = zip(self.checksum, call.checksum, strict=True)
        return all(abs(a - b) <= _COMPANY_TOLERANCE * scale for a, b in pairs)


def _measure(trace: Trace) -> tuple[dict[str, _Measured], Tensor]:
    """What each layer returns for the patched images, and the places of the patches.

    Patches of one image prove most layers; those that they leave in doubt are shown all images.
    """
    candidates = candidate_layouts(trace)
    first, *others = trace.probe
    images, places = patched(first, seed=1)
    measured = _pass(trace, images, candidates)
    doubtful = {
        name: candidates[name]
        for name, found in measured.items()
        if any(one.locality(places).doubtful for one in found.responses)
    }
    for seed, image in enumerate(others if doubtful else (), 2):
        images, _ = patched(image, seed=seed)
        for name, found in _pass(trace, images, doubtful).items():
            if name in doubtful and name in measured:
                pairs = zip(measured[name].responses, found.responses, strict=False)
                responses = [one.and_to(other) for one, other in pairs]
                measured[name] = replace(measured[name], responses=responses)
    return measured, places


def _pass(
    trace: Trace, images: Tensor, candidates: Mapping[str, Sequence[TokenLayout | None]]
) -> dict[str, _Measured]:
    batches = images.split(largest_batch(trace.module) or len(images))
    waiting: dict[str, list[tuple[Tensor, bool]]] = {}
    measured: dict[str, _Measured] = {}
    passed: Counter[str] = Counter()

    def record(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            passed[path] += 1
            if not isinstance(output, Tensor):
                return
            times = trace.times[path]
            name = path if times == 1 else f"{path}#{(passed[path] - 1) % times + 1}"
            seen = waiting.setdefault(name, [])
            given = bool(args) and _by_image(args[0], batches[0])
            # A copy where others follow: what comes after may work in place.
            seen.append((output.clone() if len(batches) > 1 else output, given))
            # At once, so that no tensor is kept for longer than it must be.
            if len(seen) == len(batches):
                measured[name] = measure(name, waiting.pop(name))

        return hook

    def measure(name: str, seen: Sequence[tuple[Tensor, bool]]) -> _Measured:
        outputs = [output for output, _ in seen]
        fits = all(_by_image(output, batches[0]) for output in outputs)
        output = torch.cat(outputs) if fits and len(outputs) > 1 else outputs[0]
        found = [Response.of(output, layout) for layout in candidates.get(name, ()) if fits]
        return _Measured(fits, all(given for _, given in seen), row_checksum(output), found)

    with torch.inference_mode(), HookStack() as hooks:
        for path in trace.times:
            hooks.forward(trace.module.get_submodule(path), record(path))
        for batch in batches:
            trace.module(batch.contiguous(memory_format=torch.channels_last))
    same = {path for path, times in trace.times.items() if passed[path] == times * len(batches)}
    return {name: found for name, found in measured.items() if name.partition("#")[0] in same}


def _by_image(value: Any, images: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(images)


def _spatial_proof(found: Sequence[Locality], verdicts: dict[str, bool]) -> LayerProof:
    """The proof of a usable layer.

    Where nothing can be told, because the layer is constant, the likeliest layout counts as proved
    if layers before it were proved in the same kind of layout, and for tokens, whose order may
    change on the way, if the last of them was. `verdicts` keeps that.
    """
    verdict, best = judge(found)
    if best is not None and verdict is Verdict.PROVED:
        verdicts[_kind(best.layout)] = True
        return LayerProof(usable=True, spatial=True, layout=best.layout)
    if verdict is Verdict.CONSTANT:
        for one in found:
            if verdicts.get(_kind(one.layout), not verdicts):
                return LayerProof(usable=True, spatial=True, layout=one.layout)
    if verdict is Verdict.REFUTED and any(_kind(one.layout) == "tokens" for one in found):
        verdicts["tokens"] = False
    return LayerProof(usable=True, reason=ELSEWHERE if found else NOT_A_MAP)


def _kind(layout: TokenLayout | None) -> str:
    if layout is None:
        return "channels first"
    return "channels last" if layout.channels_last else "tokens"
