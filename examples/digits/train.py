"""Train a network of your own, and write everything that Heatlens needs to serve it.

    python examples/digits/train.py out/digits
    heatlens serve --config out/digits/heatlens.toml

The images are scikit-learn's digits (UCI, Alpaydin and Kaynak 1998).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from digits_net import build
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

TEST_SHARE = 4
BATCH = 64
MEAN = STD = (0.5, 0.5, 0.5)

CONFIG = """\
[[models]]
name = "digits"
source = "python:digits_net:build"
weights = "digits.safetensors"
num_classes = 10
labels = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

[models.preprocess]
resize = 32
crop = 32
interpolation = "nearest"
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
"""


def main() -> None:
    """Train, and write network, weights, configuration and test images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()

    images, digits = load_images()
    test = np.arange(len(images)) % TEST_SHARE == 0
    network = train(images[~test], digits[~test], epochs=arguments.epochs)
    accuracy = (predict(network, images[test]) == digits[test]).mean()
    print(f"accuracy on {test.sum()} test images: {accuracy:.1%}")
    write(arguments.folder, network, images[test], digits[test])
    print(
        f"written to {arguments.folder}; now: heatlens serve --config {arguments.folder}/heatlens.toml"
    )


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """The digits as uint8 images (N, 32, 32, 3), and their classes."""
    data = load_digits()
    grey = (data.images * 15).clip(0, 255).astype(np.uint8)
    large = grey.repeat(4, axis=1).repeat(4, axis=2)
    return np.stack([large] * 3, axis=-1), data.target


def train(images: np.ndarray, digits: np.ndarray, *, epochs: int) -> nn.Module:
    """Train from scratch on the CPU; takes seconds."""
    torch.manual_seed(0)
    network = build()
    inputs, targets = as_input(images), torch.from_numpy(digits)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    steps = epochs * -(-len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-2, total_steps=steps)
    for epoch in range(epochs):
        losses = []
        for chosen in torch.randperm(len(inputs)).split(BATCH):
            loss = cross_entropy(network(inputs[chosen]), targets[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.3f}")
    return network.eval()


@torch.no_grad()
def predict(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """The most probable class of each image."""
    return network(as_input(images)).argmax(1).numpy()


def as_input(images: np.ndarray) -> torch.Tensor:
    """The same scaling that the configuration asks Heatlens for."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def write(folder: Path, network: nn.Module, images: np.ndarray, digits: np.ndarray) -> None:
    """Write the weights, the code of the network, the configuration and labelled images."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "digits.safetensors")
    shutil.copy(Path(__file__).parent / "digits_net.py", folder)
    (folder / "heatlens.toml").write_text(CONFIG)
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for index, (image, digit) in enumerate(zip(images, digits, strict=True)):
        target = folder / "images" / names[digit]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{index:04}.png")


if __name__ == "__main__":
    main()
