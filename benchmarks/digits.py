"""Scikit-learn's digits (1,797 images of 8x8 pixels) and a small network that learns them in about a second.

The demo, the notebooks and the tests use it. Nothing is downloaded, and every seed is fixed.
"""

from collections.abc import Iterator, Mapping
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy


@cache
def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1347, 64], test images [450, 64], training labels, test labels."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(images)).numpy(), test_size=450, random_state=42, stratify=digits.target)
    return images[train], images[test], labels[train], labels[test]


def batches(*, epochs: int, seed: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled training batches."""
    images, _, labels, _ = split()
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=shuffle).split(size):
            yield images[rows], labels[rows]


def trained(*, seed: int = 0, epochs: int = 30) -> nn.Sequential:
    """A trained MLP 64-128-128-10; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for images, labels in batches(epochs=epochs, seed=seed):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> float:
    """Fraction of the test images that are classified correctly; ``parameters`` replace those of the model (`bp.masked_parameters`)."""
    _, images, _, labels = split()
    return (functional_call(model, dict(parameters or {}), images).argmax(1) == labels).double().mean().item()
