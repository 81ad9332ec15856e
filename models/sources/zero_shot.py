"""Networks of images and texts (CLIP, SigLIP) as classifiers, whose classes are texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelLoadFailed
from models.types import Task

READS: dict[str, Task] = {"clip": "single_label", "siglip": "multi_label"}
"""How the scores of a `model_type` are read: a text of CLIP's excludes the others."""
_TOKENIZER = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


class TextScores(nn.Module):
    """The image's side of the network, and the texts as the rows of a linear layer at its end.

    A score is the scaled cosine of the image's vector and the text's, as the whole network gives it.
    """

    def __init__(self, model: Any, vectors: Tensor) -> None:
        """Args: the whole network, and a vector of length 1 for each text, (texts, values)."""
        super().__init__()
        self.vision_model = model.vision_model
        self.visual_projection = getattr(model, "visual_projection", nn.Identity())
        bias = getattr(model, "logit_bias", None)
        self.texts = nn.Linear(vectors.shape[1], len(vectors), bias=bias is not None)
        self.texts.weight = nn.Parameter(vectors * model.logit_scale.exp())
        if bias is not None:
            self.texts.bias = nn.Parameter(bias.expand(len(vectors)).clone())

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, texts) scores."""
        vectors = self.visual_projection(self.vision_model(images).pooler_output)
        scores: Tensor = self.texts(nn.functional.normalize(vectors, dim=1))
        return scores


@torch.no_grad()
def classifier_of(model: Any, folder: Path, library: Any, texts: Sequence[str] | None) -> nn.Module:
    """Make a classifier of a network of images and texts, and of the folder's tokenizer.

    Raises:
        ModelLoadFailed: the texts are missing or too long, or there is no tokenizer.
    """
    kind = model.config.model_type
    if texts is None or (len(texts) < 2 and READS[kind] == "single_label"):
        raise ModelLoadFailed(
            "The classes of a network of images and texts are texts: configure "
            'labels = ["a photo of a cat", "a photo of a dog"], at least two of them.'
        )
    # Without its files transformers would make an empty tokenizer, to which all texts are one.
    if not any((folder / name).is_file() for name in _TOKENIZER):
        raise ModelLoadFailed(f"{folder.name} has no tokenizer, which the labels need.")
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelLoadFailed(
            f"transformers cannot read the tokenizer in {folder.name}, which the labels need."
        ) from error
    most = model.config.text_config.max_position_embeddings
    lengths = [len(tokens) for tokens in tokenizer(list(texts))["input_ids"]]
    if max(lengths) > most:
        long = texts[lengths.index(max(lengths))]
        raise ModelLoadFailed(
            f'The label "{long[:40]}…" has {max(lengths)} tokens; the network takes {most}.'
        )
    # SigLIP was trained on texts of full length.
    whole = {"padding": "max_length", "max_length": most}
    padding = whole if kind == "siglip" else {"padding": True}
    tokens = tokenizer(list(texts), return_tensors="pt", **padding)
    found = model.eval().get_text_features(**tokens)
    vectors = found if isinstance(found, Tensor) else found.pooler_output
    return TextScores(model, nn.functional.normalize(vectors, dim=1))
