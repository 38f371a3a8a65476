"""Progress bars."""

from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress_bar(items: Iterable[T], description: str, show: bool, **options: Any) -> Iterable[T]:
    """Iterate over the items and show a progress bar on a terminal, which disappears at the end."""
    bar: Iterable[T] = tqdm(items, desc=description, disable=None if show else True, leave=False, **options)
    return bar
