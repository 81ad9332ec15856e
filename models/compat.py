"""Makes `import torchvision` work where its compiled operators do not load, and makes it quick.

The first happens to a CUDA build with a CPU torch. Architectures, weight metadata and transforms need
none of those operators, but importing torchvision registers shape functions for two of them and
fails when their schemas are unknown.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_COMPILER = "torch._dynamo.utils"

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def define_missing_operators() -> None:
    """Define the operator schemas that `import torchvision` needs, if its own library cannot.

    Call it before the first import of torchvision or timm. It does nothing on a matching
    installation, and nothing the second time.
    """
    if not _load_own_operators():
        for name, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", schema)


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Within it, libraries of architectures are imported without torch's compiler.

    Importing the compiler takes as long as torch itself. torchvision needs it for one question that
    only operators for detection ask, timm to except functions from compilation, and nothing is
    compiled here. What else is asked of it loads it after all.
    """
    if _COMPILER in sys.modules:
        yield
        return
    placeholder, disable = _Compiler(_COMPILER), torch.compiler.disable
    sys.modules[_COMPILER] = placeholder
    torch.compiler.disable = _unchanged  # type: ignore[assignment] # for every use of it
    try:
        yield
    finally:
        torch.compiler.disable = disable
        placeholder.leave()


class _Compiler(ModuleType):
    """Stands in for a module of the compiler until something of it is needed."""

    def leave(self) -> None:
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]

    def is_compile_supported(self, device_type: str) -> Any:
        return self.__getattr__("is_compile_supported")(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(_COMPILER), name)


def _unchanged(
    function: Callable[..., Any] | None = None, *_: object, **__: object
) -> Callable[..., Any]:
    """In place of the decorator `torch.compiler.disable`, with or without options."""
    return _unchanged if function is None else function


def _load_own_operators() -> bool:
    """Load torchvision's operators as its import would, which must come before any definition."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    for library in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
    return hasattr(torch.ops.torchvision, "nms")
