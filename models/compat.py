"""Makes `import torchvision` work where its compiled operators do not load.

That happens to a CUDA build with a CPU torch. Architectures, weight metadata and transforms need
none of those operators, but importing torchvision registers shape functions for two of them and
fails when their schemas are unknown.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

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
