"""The networks and images of `train_masks.py`.

Digits are scikit-learn's. Fashion-MNIST is Debian's package ``dataset-fashion-mnist``: clothes in ten classes. Of its 60,000 training
images the first 12,000 are trained on, so that a run takes seconds, and the last 2,000 are for choices.
"""

import gzip
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import blockprune as bp
from blockprune.examples import digits

FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_TRAINING, FASHION_VALIDATION = 12_000, 2_000
Images = tuple[Tensor, Tensor, Tensor, Tensor]


@attrs.frozen
class Problem:
    """What is trained."""

    images: Callable[[str], Images]  # split -> images and labels to train on, images and labels to measure with
    network: Callable[[], nn.Module]
    prunable: Callable[[int], bp.Where]  # rows and columns of a block -> all layers but the first and the last
    epochs: int
    optimizer: Callable[..., torch.optim.Optimizer]


def digits_of(split: str) -> Images:
    train, test, train_labels, test_labels = digits.split()
    if split == "test":
        return train, train_labels, test, test_labels
    return train[:-300], train_labels[:-300], train[-300:], train_labels[-300:]


@cache
def fashion_file(name: str) -> Tensor:
    """The numbers in a gzipped IDX file."""
    if not FASHION.exists():
        raise SystemExit(f"{FASHION} is missing; install it: apt-get install dataset-fashion-mnist")
    data = gzip.decompress((FASHION / f"{name}-ubyte.gz").read_bytes())
    sizes = [int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(data[3])]
    return torch.frombuffer(bytearray(data[4 + 4 * len(sizes) :]), dtype=torch.uint8).view(sizes)


def fashion_of(split: str) -> Images:
    train, labels = fashion_file("train-images-idx3").flatten(1) / 255, fashion_file("train-labels-idx1").long()
    first, last = slice(FASHION_TRAINING), slice(-FASHION_VALIDATION, None)
    if split == "test":
        return train[first], labels[first], fashion_file("t10k-images-idx3").flatten(1) / 255, fashion_file("t10k-labels-idx1").long()
    return train[first], labels[first], train[last], labels[last]


def convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


class Network(nn.Module):
    """Images ``[n, side * side]`` -> logits ``[n, 10]``: three convolutions and two Linears."""

    def __init__(self, side: int = 8, widths: tuple[int, int, int] = (16, 32, 32), hidden: int = 64, pools: int = 2) -> None:
        super().__init__()
        self.side, (a, b, c) = side, widths
        pool = [nn.MaxPool2d(2)]
        layers = *convolution(1, a), *pool, *convolution(a, b), *pool * (pools - 2), *convolution(b, c), *pool, nn.Flatten()
        features = c * (side // 2**pools) ** 2
        self.body = nn.Sequential(*layers, nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.view(-1, 1, self.side, self.side)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A layer of a transformer that norms its inputs."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norms[1](x))))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Images ``[n, 64]`` -> logits ``[n, 10]``: patches of 2x2 pixels are tokens."""

    def __init__(self, width: int = 48, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, width), nn.Parameter(torch.randn(16, width) / 8)
        self.body = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.norm(self.body(self.embed(patches) + self.place)).mean(1))  # type: ignore[no-any-return]


def layers_of_network(side: int) -> bp.Where:
    """Small blocks have all taps of a kernel, large ones a single tap: otherwise a layer has too few of them."""
    taps = () if side <= 4 else (1, 1)
    return bp.first_of(bp.excluding(bp.convs((side, side, *taps)), "body.0.*"), bp.excluding(bp.linears((side, side)), "head.*"))


def layers_of_transformer(side: int) -> bp.Where:
    return bp.including(bp.linears((side, side)), "body.*")


sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)
adamw = partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2)
PROBLEMS = {
    "digits": Problem(digits_of, Network, layers_of_network, epochs=12, optimizer=sgd),
    "fashion-mnist": Problem(fashion_of, partial(Network, 28, (16, 32, 64), 128, pools=3), layers_of_network, epochs=4, optimizer=sgd),
    "vit": Problem(digits_of, VisionTransformer, layers_of_transformer, epochs=30, optimizer=adamw),
}
