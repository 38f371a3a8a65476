"""Scikit-learn's digits (1,797 images of 8x8 pixels) and a small network that learns them in about a second; every seed is fixed."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, wraps
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from blockprune.core.arguments import check_counts, check_seed
from blockprune.examples.packages import load_module
from blockprune.model.running import preserve_state

__all__ = ["accuracy", "batches", "split", "trained"]


Split = tuple[Tensor, Tensor, Tensor, Tensor]


def _copied(function: Callable[[], Split]) -> Callable[[], Split]:
    """The function computed once; its callers may change what it returns."""
    stored = cache(function)

    @wraps(function)
    def copies() -> Split:
        return cast(Split, tuple(values.clone() for values in stored()))

    return copies


@_copied
def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``[1347, 64]``, test images ``[450, 64]``, training labels, test labels.

    Example:
        >>> [values.shape[0] for values in bp.examples.digits.split()]
        [1347, 450, 1347, 450]
    """
    digits = load_module("sklearn.datasets").load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32, device="cpu"), torch.tensor(digits.target, device="cpu")
    train, test = load_module("sklearn.model_selection").train_test_split(
        torch.arange(len(images), device="cpu").numpy(), test_size=450, random_state=42, stratify=digits.target
    )
    return images[train], images[test], labels[train], labels[test]


def batches(*, epochs: int, seed: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled training batches, as pairs of images and labels.

    Args:
        epochs: how often each image occurs.
        seed: of the order.
        size: images in a batch.

    Raises:
        ValueError, TypeError: epochs below 0, a size below 1, or a number that is no integer.

    Example:
        >>> images, labels = next(bp.examples.digits.batches(epochs=1, seed=0))
        >>> images.shape, labels.shape
        (torch.Size([32, 64]), torch.Size([32]))
    """
    check_counts(0, epochs=epochs)
    check_counts(1, size=size)
    return _batches(epochs, check_seed("seed", seed), size)


def _batches(epochs: int, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, _, labels, _ = split()
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=shuffle, device="cpu").split(size):
            yield images[rows], labels[rows]


def trained(*, seed: int = 0, epochs: int = 30) -> nn.Sequential:
    """A trained network of three Linears, 64-128-128-10; the global random state does not change.

    Args:
        seed: of the first weights and of the order of the batches.
        epochs: of training.

    Example:
        >>> model = bp.examples.digits.trained(epochs=2)
        >>> bp.examples.digits.accuracy(model) > 0.8
        True
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(check_seed("seed", seed))
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for images, labels in batches(epochs=epochs, seed=seed):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> float:
    """The fraction of the test images that a model classifies correctly, in evaluation mode; its own mode and buffers stay as they are.

    Args:
        model: images ``[n, 64]`` -> logits ``[n, 10]``.
        parameters: replace those of the model, as `masked_parameters` returns them.

    Example:
        >>> model = bp.examples.digits.trained(epochs=2)
        >>> masks = bp.recipes.magnitude(bp.linears((4, 4)))(model, 0.9).masks
        >>> dense, pruned = bp.examples.digits.accuracy(model), bp.examples.digits.accuracy(model, bp.masked_parameters(model, masks))
        >>> dense > pruned
        True
    """
    _, images, _, labels = split()
    with preserve_state(model):
        return float((functional_call(model, dict(parameters or {}), images).argmax(1) == labels).double().mean())
