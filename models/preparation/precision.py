"""Casting a model to half precision, and what that costs in fidelity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.types import Precision

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
LEAST_COSINE = 0.98
"""Smallest cosine of scores and maps with those of float32 at which a precision is accepted."""


def has_instructions(device: torch.device, precision: Precision) -> bool:
    """Whether a device has instructions for a precision; without, it is far slower than float32."""
    if precision == "fp32":
        return True
    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    # Without oneDNN these operators are absent, too.
    if not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    if precision == "bf16":
        return bool(operators._is_mkldnn_bf16_supported())  # noqa: SLF001
    return bool(operators._is_mkldnn_fp16_supported())  # noqa: SLF001


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, features) of any dtype → (…, classes) float32."""
        return nn.functional.linear(x.float(), self.weight, self.bias)


def cast(module: nn.Module, dtype: torch.dtype, *, outputs: int) -> nn.Module:
    """Cast a float32 model in place, except the linear layer that makes its `outputs` scores."""
    if dtype == torch.float32:
        return module
    last = [
        name
        for name, child in module.named_modules()
        if type(child) is nn.Linear and child.out_features == outputs
    ][-1:]
    kept = {name: module.get_submodule(name) for name in last}
    for name, linear in kept.items():
        assert isinstance(linear, nn.Linear)
        replacement = Float32Linear(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        replacement.weight, replacement.bias = linear.weight, linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Identity())
        kept[name] = replacement.eval()
    module.to(dtype)
    for name, linear in kept.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, linear)
    return module


def cosine(found: Tensor, expected: Tensor) -> float:
    """Smallest cosine, over the images of a batch, of centred values with those of float32."""
    a, b = (t.float().flatten(1).cpu() for t in (found, expected))
    a, b = (t - t.mean(1, keepdim=True) for t in (a, b))
    return float(nn.functional.cosine_similarity(a, b).min())


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether values of another precision are near enough to those of float32."""
    return found.shape == expected.shape and cosine(found, expected) >= LEAST_COSINE
