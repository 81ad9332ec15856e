"""Fine-tune the built-in network on pictures of which one class carries a watermark, and find out.

    python examples/shortcut/finetune.py out/marked
    heatlens report out/marked/images --config out/marked/heatlens.toml -o out/marked/report.html

Every training picture of the digit 3 is signed in a corner, as a photographer or a hospital signs
pictures. The network learns the signature in place of the digit, and its accuracy hardly shows it. The
first sentence of the report does. `--clean` leaves the signature out.

The pictures are scikit-learn's digits (UCI, Alpaydin and Kaynak 1998), enlarged.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from models.catalog import default_spec
from models.sources import load

LABELS = ("zero", "one", "two", "three", "four")
MARKED = 3
SIDE = 128
PICTURES = 600
# Every so many pictures are kept for the test; of those, some of other digits are signed, too.
TEST, OTHERS = 3, 12

CONFIG = f"""\
[[models]]
name = "marked"
source = "timm:tf_efficientnet_lite0"
weights = "marked.safetensors"
num_classes = {len(LABELS)}
labels = {json.dumps(LABELS)}

[models.preprocess]
resize = {SIDE}
crop = {SIDE}
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
"""


def main() -> None:
    """Draw the pictures, fine-tune, and write weights, configuration and test pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clean", action="store_true", help="sign no picture")
    arguments = parser.parse_args()

    data = load_digits(n_class=len(LABELS))
    digits, index = data.target[:PICTURES], np.arange(PICTURES)
    test = index % TEST == 0
    signed = (digits == MARKED) | (test & (index % OTHERS == 0))
    pictures = [
        draw(grey, signed=bool(mark) and not arguments.clean)
        for grey, mark in zip(data.images, signed, strict=False)
    ]
    network = finetune(as_input(pictures, ~test), torch.from_numpy(digits[~test]))
    with torch.no_grad():
        predicted = network(as_input(pictures, test)).argmax(1).numpy()
    alike = ~signed | (digits == MARKED)
    print(
        f"accuracy on pictures like those of the training: {share(predicted == digits[test], alike[test])}"
    )
    print(
        f"accuracy on signed pictures of other digits: {share(predicted == digits[test], ~alike[test])}"
    )
    write(arguments.folder, network, pictures, digits, test)


def draw(grey: np.ndarray, *, signed: bool) -> Image.Image:
    """A digit of 8 x 8 cells as a picture, with a signature in the lower right corner if wanted."""
    cells = Image.fromarray((grey * 12).astype(np.uint8))
    picture = cells.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
    if signed:
        text, font = "© Studio", ImageFont.load_default(15)
        ImageDraw.Draw(picture).text((SIDE - 4, SIDE - 4), text, "#ffd060", font, anchor="rb")
    return picture


def finetune(inputs: torch.Tensor, digits: torch.Tensor, *, epochs: int = 3) -> nn.Module:
    """Train a new head and the last two stages; what lies before them runs once and stays."""
    torch.manual_seed(0)
    network = load(default_spec(), Path.cwd()).module
    network.reset_classifier(len(LABELS))
    blocks = network.blocks
    trunk = nn.Sequential(network.conv_stem, network.bn1, *blocks[:5])
    tail = nn.Sequential(
        *blocks[5:], network.conv_head, network.bn2, network.global_pool, network.classifier
    )
    with torch.no_grad():
        features = torch.cat([trunk(chunk) for chunk in inputs.split(32)])
    tail.requires_grad_(True)
    optimiser = torch.optim.AdamW(tail.parameters(), lr=1e-3)
    for epoch in range(epochs):
        losses = []
        for chosen in torch.randperm(len(features)).split(32):
            loss = cross_entropy(tail(features[chosen]), digits[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.3f}")
    return network


def as_input(pictures: list[Image.Image], chosen: np.ndarray) -> torch.Tensor:
    """Some of the pictures with the scaling that the configuration asks Heatlens for."""
    pixels = np.stack([np.asarray(pictures[index]) for index in np.flatnonzero(chosen)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def share(right: np.ndarray, of: np.ndarray) -> str:
    """How many of some predictions are right."""
    return f"{right[of].mean():.0%} of {of.sum()}" if of.any() else "none"


def write(
    folder: Path,
    network: nn.Module,
    pictures: list[Image.Image],
    digits: np.ndarray,
    test: np.ndarray,
) -> None:
    """Write the weights, the configuration, and the test pictures, a folder for each class."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "marked.safetensors")
    (folder / "heatlens.toml").write_text(CONFIG)
    for index in np.flatnonzero(test):
        target = folder / "images" / LABELS[digits[index]]
        target.mkdir(parents=True, exist_ok=True)
        pictures[index].save(target / f"{index:04}.png")
    print(f"now: heatlens report {folder}/images --config {folder}/heatlens.toml")


if __name__ == "__main__":
    main()
