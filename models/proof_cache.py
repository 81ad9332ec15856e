"""Keeps proofs from one start to the next, by the content of the network that they are about."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Self, TypeVar

import msgspec
import torch
from torch import Tensor, nn

T = TypeVar("T")

logger = logging.getLogger("heatlens.proofs")

_KEPT = 64
_KEPT_LARGE = 8
_LARGE = ("bin", "xml")
_TURN_S = 60.0
"""How long a process waits for what another one proves of the same network."""
_LOOK_S = 0.05
_LIBRARIES = ("heatlens", "torch", "torchvision", "timm")


class ProofCache:
    """Keeps what was proved of one network in a file.

    A file that cannot be read or written is as good as none: everything is proved again. Of several
    processes that miss something, one proves it while the others wait, until it leaves the context
    or ends; then they read what it has found.
    """

    def __init__(self, file: Path | None) -> None:
        """Open the proofs in a file; None keeps nothing."""
        self._file = file
        self._turn: int | None = None
        self._known: dict[str, msgspec.Raw] = {}
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self._turn is not None:
            # Those who wait have it open; who comes later finds the proofs.
            with contextlib.suppress(OSError):
                self._file.with_suffix(".lock").unlink(missing_ok=True)
            os.close(self._turn)
            self._turn = None

    @classmethod
    def of(cls, module: nn.Module, scores: Tensor, folder: Path | None) -> ProofCache:
        """The proofs of a network on the CPU, which answered a probe with these scores.

        A folder of None keeps nothing.
        """
        if folder is None or next(module.parameters(), None) is None:
            return cls(None)
        try:
            return cls(folder / f"{_digest(module, scores)}.json")
        # A network that cannot be digested, such as a quantised one, is proved at each start.
        except (AttributeError, RuntimeError, TypeError):
            return cls(None)

    def beside(self, name: str) -> Path | None:
        """Where something large that was made of the network is kept; only the latest stay."""
        if self._file is None:
            return None
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            _drop_oldest(self._file.parent, _LARGE, kept=_KEPT_LARGE)
        return self._file.with_suffix(f".{name}")

    def remember(self, what: str, kind: type[T], prove: Callable[[], T]) -> T:
        """What was proved before, or what `prove` returns now."""
        proof = self.recall(what, kind)
        if proof is None:
            proof = prove()
            self.keep(what, proof)
        return proof

    def recall(self, what: str, kind: type[T]) -> T | None:
        """What was kept before, if anything; the caller is expected to find out what was not."""
        if what not in self._known:
            self._take_turn()
        if what in self._known:
            with contextlib.suppress(msgspec.MsgspecError):
                return msgspec.json.decode(self._known[what], type=kind)
        return None

    def keep(self, what: str, proof: object) -> None:
        """Keep something for the next start."""
        self._known[what] = msgspec.Raw(msgspec.json.encode(proof))
        self._write()

    def _take_turn(self) -> None:
        """Wait, for a while, until no other process proves anything of this network."""
        if self._file is None or self._turn is not None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._turn = os.open(self._file.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
            # The kernel gives the lock back when its holder dies.
            _lock(self._turn, until=time.monotonic() + _TURN_S)
        except OSError as error:
            logger.info("proofs of other processes are not waited for: %s", error.strerror)
        self._read()

    def _read(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                found = msgspec.json.decode(self._file.read_bytes(), type=dict[str, msgspec.Raw])
                self._known = {**self._known, **found}

    def _write(self) -> None:
        if self._file is None:
            return
        unfinished = self._file.with_suffix(f".{id(self):x}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(msgspec.json.encode(self._known))
            unfinished.replace(self._file)
            _drop_oldest(self._file.parent, ("json", "lock"), kept=_KEPT)
        except OSError as error:
            logger.info("proofs are not kept: %s", error.strerror)


def _lock(descriptor: int, *, until: float) -> None:
    """Lock a file for this process; once it is late, go on without."""
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                logger.info("another process takes long to prove the network; this one does, too")
                return None
            time.sleep(_LOOK_S)


def _drop_oldest(folder: Path, suffixes: Sequence[str], *, kept: int) -> None:
    for suffix in suffixes:
        files = sorted(folder.glob(f"*.{suffix}"), key=lambda file: file.stat().st_mtime)
        for file in files[:-kept]:
            file.unlink(missing_ok=True)


def _digest(module: nn.Module, scores: Tensor) -> str:
    """Digest of all that a proof depends on: tensors, structure, code, versions, size of the probe."""
    digest = hashlib.blake2b(digest_size=20)
    for part in _parts(module):
        digest.update(part.encode())
    for name, tensor in (*module.state_dict(keep_vars=True).items(), ("scores", scores)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().contiguous().view(-1)
        digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()


def _parts(module: nn.Module) -> Iterator[str]:
    for library in _LIBRARIES:
        yield version(library)
    yield repr(module)
    files: set[str] = set()
    for part in module.modules():
        # Graphs carry their code with them.
        yield str(getattr(part, "code", ""))
        source = sys.modules.get(type(part).__module__)
        if file := getattr(source, "__file__", None):
            files.add(file)
    for file in sorted(files):
        with contextlib.suppress(OSError):
            yield hashlib.blake2b(Path(file).read_bytes()).hexdigest()
