"""Tiny random networks of images and texts, as folders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.catalog import ModelSpec
from models.compat import define_missing_operators

LABELS = ["a photo of a cat", "a photo of a dog", "a cup of coffee"]
SIGLIP_TOKENS = 64
_WORDS = [
    "[PAD]",
    "[UNK]",
    "[BOS]",
    *sorted({w for label in LABELS for w in label.split()}),
    "[EOS]",
]


def spec_of(**fields: Any) -> ModelSpec:
    """The entry of the folder `saved`."""
    return ModelSpec(name="m", source="transformers:saved", **{"labels": LABELS, **fields})


def saved(folder: Path, kind: str = "clip") -> tuple[Any, Any, Any]:
    """Write a folder; returns its network, tokenizer and image processor."""
    define_missing_operators()
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {
        "vocab_size": len(_WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": len(_WORDS) - 1,
    }
    if kind == "clip":
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
        model = transformers.CLIPModel(config)
    else:
        # As the pipeline of transformers fills up every text.
        text["max_position_embeddings"] = SIGLIP_TOKENS
        config = transformers.SiglipConfig(vision_config=vision, text_config=text)
        model = transformers.SiglipModel(config)
        model.logit_bias.data.fill_(-1.5)
    # As initialised, all images have almost the same vector.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(_WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[BOS]", 2), ("[EOS]", len(_WORDS) - 1)]
    words.post_processor = processors.TemplateProcessing("[BOS] $A [EOS]", special_tokens=ends)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_input_names=["input_ids", "attention_mask"],
    )
    size = {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return model, tokenizer, processor
