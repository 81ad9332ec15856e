"""Fingerprints of networks and their scores, to prove that checks left them as they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.errors import ModelLoadFailed

_PLAIN = (bool, int, float, str, tuple, list, torch.Size, torch.dtype, type(None))


@dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprint:
    """A network's tensors, attributes and scores, to prove that checks left it as it was.

    Attributes:
        state: checksums of its tensors, and its plain attributes, by name.
        scores: of a probe, bit for bit.
    """

    state: Mapping[str, object]
    scores: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, probe: Tensor) -> Fingerprint:
        """Take the fingerprint of a network on the CPU; one pass fills what it may keep."""
        scores = module(probe)
        return cls(state=_state(module), scores=scores)

    def check(self, module: nn.Module, probe: Tensor) -> Tensor:
        """Check that the network is still the same; counters of passes may go on.

        Returns:
            The scores of the probe.

        Raises:
            ModelLoadFailed: it is not.
        """
        now = Fingerprint.of(module, probe)
        changed = _differences(self.state, now.state)
        if not changed and torch.equal(now.scores, self.scores):
            return now.scores
        again = Fingerprint.of(module, probe)
        # What another plain pass changes as well is the network's own.
        changed -= _differences(now.state, again.state)
        steady = torch.equal(now.scores, again.scores)
        if changed or (steady and not torch.equal(now.scores, self.scores)):
            names = f" ({', '.join(sorted(changed)[:3])})" if changed else ""
            raise ModelLoadFailed(
                f"The network keeps something of the images that it was checked with{names}, so "
                "that its later scores would depend on earlier images."
            )
        return now.scores


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> set[str]:
    """Names of what is not the same."""
    names = before.keys() | now.keys()
    return {name for name in names if before.get(name) != now.get(name)}


def _state(module: nn.Module) -> dict[str, object]:
    """Checksums of all tensors of a network, and its attributes of plain types, by name."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    state: dict[str, object] = {name: _checksum(tensor) for name, tensor in tensors}
    for name, child in module.named_modules():
        for attribute, value in vars(child).items():
            if isinstance(value, Tensor):
                state[f"{name}.{attribute}"] = _checksum(value)
            elif isinstance(value, _PLAIN) and attribute != "_is_full_backward_hook":
                state[f"{name}.{attribute}"] = str(value)
    return state


def _checksum(tensor: Tensor) -> object:
    """The shape of a tensor, and the sum of its bits."""
    plain = tensor.detach()
    plain = (plain.int_repr() if plain.is_quantized else plain).flatten().contiguous()
    bits = plain.view(torch.int32) if plain.element_size() == 4 else plain.view(torch.uint8)
    return tuple(tensor.shape), int(bits.sum(dtype=torch.int64))
