"""Networks of images and texts (CLIP, SigLIP) as classifiers, whose classes are texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.errors import ModelLoadFailed
from models.texts import TextEncoder
from models.types import TextInput

KINDS = ("clip", "siglip")
"""Values of `model_type`."""
_TOKENIZER = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


class ImageVectors(nn.Module):
    """The image's side of the network: vectors of length 1."""

    def __init__(self, model: Any) -> None:
        """Args: the whole network."""
        super().__init__()
        self.vision_model = model.vision_model
        self.visual_projection = getattr(model, "visual_projection", nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, values)."""
        vectors = self.visual_projection(self.vision_model(images).pooler_output)
        return nn.functional.normalize(vectors, dim=1)


class TextWeights(nn.Module):
    """The text's side: a text's product with the image's vector is the scaled cosine of both."""

    scale: Tensor

    def __init__(self, model: Any) -> None:
        """Args: the whole network."""
        super().__init__()
        self.text_model = model.text_model
        self.text_projection = getattr(model, "text_projection", nn.Identity())
        self.register_buffer("scale", model.logit_scale.detach().exp())

    def forward(self, **tokens: Tensor) -> Tensor:
        """Tokens (texts, length) → (texts, values)."""
        vectors = self.text_projection(self.text_model(**tokens).pooler_output)
        weights: Tensor = nn.functional.normalize(vectors, dim=1) * self.scale
        return weights


def encoder_of(model: Any, folder: Path, library: Any) -> TextEncoder:
    """The text's side of a network in eval mode, with the folder's tokenizer.

    Raises:
        ModelLoadFailed: there is no tokenizer.
    """
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
    network = TextWeights(model).eval().requires_grad_(requires_grad=False)
    most = model.config.text_config.max_position_embeddings
    bias = getattr(model, "logit_bias", None)

    def tokenize(texts: Sequence[str], full: bool) -> Mapping[str, Tensor]:
        padding = {"padding": "max_length", "max_length": most} if full else {"padding": True}
        tokens: Mapping[str, Tensor] = tokenizer(list(texts), return_tensors="pt", **padding)
        return tokens

    def count(texts: Sequence[str]) -> list[int]:
        return [len(tokens) for tokens in tokenizer(list(texts))["input_ids"]]

    return TextEncoder(
        network,
        tokenize,
        count,
        takes=TextInput(
            most_tokens=most,
            # SigLIP was trained on texts of full length, each for itself; one of CLIP's excludes the others.
            full_length=model.config.model_type == "siglip",
            exclusive=model.config.model_type == "clip",
            memory_bytes=sum(p.numel() * p.element_size() for p in network.parameters()),
        ),
        bias=None if bias is None else bias.detach(),
    )
