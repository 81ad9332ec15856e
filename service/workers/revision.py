"""A name for what requests are resolved against, so that a job never runs on a model it was not meant for."""

from __future__ import annotations

import hashlib

import msgspec

from models.types import ModelInfo


def with_revision(info: ModelInfo) -> ModelInfo:
    """Put `revision` on the card: a digest of labels, classes, input and layers.

    Devices that hold the same model agree on it, and so does a worker after its restart. Weights
    are left out: two models that differ in nothing else answer the same requests, each as a whole.
    """
    card = info.card
    resolved = (
        info.labels,
        card.num_classes,
        card.task,
        card.input,
        [(layer.name, layer.output_shape, layer.spatial) for layer in info.layers],
    )
    digest = hashlib.blake2b(msgspec.msgpack.encode(resolved), digest_size=8).hexdigest()
    return msgspec.structs.replace(info, card=msgspec.structs.replace(card, revision=digest))
