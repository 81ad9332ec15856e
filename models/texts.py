"""Texts as classes: encoded by the text side of a network, and kept for the requests that follow."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from msgspec import structs
from torch import Tensor, nn

from models.readout import TextScores
from models.types import STEP_MS, Task, TextInput

TEXTS_KEPT = 8192
SETS_KEPT = 16

K = TypeVar("K")
V = TypeVar("V")

Tokenize = Callable[[Sequence[str], bool], Mapping[str, Tensor]]
"""Tokens of texts, (texts, tokens) each: filled up to the longest one, or to the full length."""


class TextEncoder:
    """Turns texts into the weights of classes. One thread uses it.

    What was encoded last is kept: `TEXTS_KEPT` texts, and the `SETS_KEPT` sets that they were asked
    for in.

    Attributes:
        takes: what is known of the texts that it takes.
        reads: how the scores of texts are read.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenize: Tokenize,
        count: Callable[[Sequence[str]], list[int]],
        *,
        takes: TextInput,
        bias: Tensor | None,
    ) -> None:
        """Make an encoder.

        Args:
            network: from tokens to weights (texts, values) for an image's vector of length 1.
            tokenize: makes the tokens.
            count: tells how many tokens texts have.
            takes: what texts may be.
            bias: of every score, if there is one.
        """
        self.takes = takes
        self.reads: Task = "single_label" if takes.exclusive else "multi_label"
        self._network, self._tokenize, self._count, self._bias = network, tokenize, count, bias
        self._device = torch.device("cpu")
        self._weights: OrderedDict[str, Tensor] = OrderedDict()
        self._sets: OrderedDict[tuple[str, ...], TextScores] = OrderedDict()
        self._own: tuple[tuple[str, ...], TextScores] | None = None

    def too_long(self, labels: Sequence[str]) -> tuple[int, str] | None:
        """The place of a label that the network does not take, and what is wrong with it."""
        texts = {label: place for place, label in enumerate(labels) if label not in self._weights}
        most = self.takes.most_tokens
        for label, tokens in zip(texts, self._count(list(texts)) if texts else [], strict=True):
            if tokens > most:
                short = label if len(label) <= 40 else f"{label[:40]}…"
                return texts[label], (
                    f'The label "{short}" has {tokens} tokens; the network takes {most}.'
                )
        return None

    def knows(self, labels: tuple[str, ...]) -> bool:
        """Whether the weights of all labels are there."""
        own = self._own is not None and self._own[0] == labels
        return own or labels in self._sets or all(label in self._weights for label in labels)

    def parts(self, labels: Sequence[str]) -> Iterator[list[str]]:
        """The labels that are not known, in parts that are encoded in one step each."""
        missing = [label for label in labels if label not in self._weights]
        # The others must not be forgotten for them.
        for label in set(labels).difference(missing):
            self._weights.move_to_end(label)
        size = max(1, int(STEP_MS / self.takes.text_ms)) if self.takes.text_ms else 1
        for start in range(0, len(missing), size):
            yield missing[start : start + size]

    @torch.no_grad()
    def encode(self, labels: Sequence[str]) -> None:
        """Encode those of the labels that no other job has encoded meanwhile."""
        missing = [label for label in labels if label not in self._weights]
        if missing:
            for label, weights in zip(missing, self._encoded(missing), strict=True):
                _keep(self._weights, label, weights, most=TEXTS_KEPT)

    def scores(self, labels: tuple[str, ...]) -> TextScores:
        """How the vectors of images are read as scores of labels that are known."""
        if self._own is not None and self._own[0] == labels:
            return self._own[1]
        found = self._sets.get(labels)
        if found is None:
            found = self._made(labels)
        return _keep(self._sets, labels, found, most=SETS_KEPT)

    def prepare(self, labels: tuple[str, ...], device: torch.device) -> None:
        """Move to a device, time the network there, and encode the labels that stay known."""
        self._network, self._device = self._network.to(device), device
        self._bias = None if self._bias is None else self._bias.to(device)
        text_ms = min(self._time_ms() for _ in range(2))
        self.takes = structs.replace(self.takes, text_ms=text_ms)
        for part in self.parts(labels):
            self.encode(part)
        if labels:
            self._own = labels, self._made(labels)

    def _made(self, labels: tuple[str, ...]) -> TextScores:
        for label in labels:
            self._weights.move_to_end(label)
        weights = torch.stack([self._weights[label] for label in labels])
        return TextScores(weights, self._bias, self.reads)

    def _encoded(self, texts: Sequence[str], *, full: bool = False) -> Tensor:
        tokens = self._tokenize(texts, full or self.takes.full_length)
        weights: Tensor = self._network(**{k: v.to(self._device) for k, v in tokens.items()})
        return weights

    @torch.no_grad()
    def _time_ms(self) -> float:
        """Time for one text of full length."""
        began = time.perf_counter()
        self._encoded(["a"], full=True).cpu()
        return 1000 * (time.perf_counter() - began)


def _keep(kept: OrderedDict[K, V], key: K, value: V, *, most: int) -> V:
    """Keep a value as the newest, and forget the oldest ones beyond `most`."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
    return value
