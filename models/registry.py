"""Models by name and version, loaded, verified and warm on one device."""

from __future__ import annotations

from pathlib import Path

import torch

from models.catalog import ModelSpec
from models.errors import ModelLoadFailed, UnknownModel
from models.heap import leave_imports_alone
from models.sources import load
from models.types import ModelCard, ModelInfo, ModelKey
from models.warm_model import WarmModel
from models.warmup import WARMUP_S, warm_up


class ModelRegistry:
    """Holds one warm instance of each model version on one device.

    One thread loads and unloads; any thread may call `get` and `infos` meanwhile, and sees a
    version either warm or not at all.
    """

    def __init__(
        self,
        device: str,
        base_dir: Path,
        *,
        warmup_s: float = WARMUP_S,
        proofs_dir: Path | None = None,
    ) -> None:
        """Make an empty registry.

        Args:
            device: where models run.
            base_dir: folder that relative paths of entries start from.
            warmup_s: seconds for timing a model by batch size.
            proofs_dir: where proofs are kept from one start to the next; None keeps none.
        """
        self.device = torch.device(device)
        self._base_dir = base_dir
        self._warmup_s = warmup_s
        self._proofs_dir = proofs_dir
        self._warm: dict[ModelKey, WarmModel] = {}
        self._unavailable: dict[ModelKey, ModelInfo] = {}

    def load(self, spec: ModelSpec) -> ModelInfo:
        """Load, verify, probe and warm up a model, then replace its name and version by it.

        Raises:
            ModelLoadFailed: the entry is broken, or the device cannot run the model; what was
                loaded before stays.
        """
        loaded = load(spec, self._base_dir)
        leave_imports_alone()
        try:
            warm = warm_up(
                loaded, self.device, warmup_s=self._warmup_s, proofs_dir=self._proofs_dir
            )
        except ModelLoadFailed:
            raise
        except torch.OutOfMemoryError as error:
            raise ModelLoadFailed("The model does not fit into the device's memory.") from error
        except Exception as error:
            raise ModelLoadFailed(f"The model fails on the device {self.device}.") from error
        self._warm[spec.key] = warm
        self._unavailable.pop(spec.key, None)
        return warm.info

    def unload(self, name: str, version: str | None = None) -> None:
        """Drop a version, or all versions; passes that still use it keep it until they end.

        Raises:
            UnknownModel: it is not listed.
        """
        keys = [
            key
            for key in (*self._warm, *self._unavailable)
            if key[0] == name and version in (None, key[1])
        ]
        if not keys:
            raise _unknown(name, version)
        for key in keys:
            self._warm.pop(key, None)
            self._unavailable.pop(key, None)

    def mark_unavailable(
        self, spec: ModelSpec, reason: str, *, cause: str | None = None
    ) -> ModelInfo:
        """List a model that failed to load, with the reason; a warm version stays as it is.

        `cause` is for the operator: what was raised.
        """
        if spec.key in self._warm:
            return self._warm[spec.key].info
        card = ModelCard(
            name=spec.name,
            version=spec.version,
            state="unavailable",
            ready=False,
            source=spec.source,
            devices=(str(self.device),),
            reason=reason,
            cause=cause,
            task=spec.task or "single_label",
        )
        self._unavailable[spec.key] = info = ModelInfo(card=card)
        return info

    def get(self, name: str, version: str) -> WarmModel:
        """Return a warm model.

        Raises:
            UnknownModel: no such version is warm.
        """
        warm = self._warm.get((name, version))
        if warm is None:
            raise _unknown(name, version)
        return warm

    def infos(self) -> list[ModelInfo]:
        """Return every listed model version, the unavailable ones with their reason."""
        warm = [warm.info for warm in self._warm.copy().values()]
        return [*warm, *self._unavailable.copy().values()]


def _unknown(name: str, version: str | None) -> UnknownModel:
    wanted = name if version is None else f"{name}@{version}"
    return UnknownModel(f"The model {wanted} is not loaded.")
