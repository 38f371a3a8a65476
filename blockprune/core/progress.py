"""Progress bars."""

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # in a notebook without ipywidgets the bar is text
    from tqdm.auto import tqdm

T = TypeVar("T")


def progress_bar(items: Iterable[T], description: str, show: bool | None, **options: Any) -> Iterable[T]:
    """Iterate over the items and show a progress bar, which disappears at the end.

    Args:
        items: what is iterated over.
        description: the text before the bar.
        show: True shows it, False does not; None shows it where somebody can see it, in a terminal and in a notebook.
        options: of tqdm.
    """
    is_shown = _is_interactive() if show is None else show
    bar: Iterable[T] = tqdm(items, desc=description, leave=False, **options) if is_shown else items
    return bar


def show_values(bar: Iterable[Any], values: Mapping[str, str]) -> None:
    """Show values behind a progress bar, if it is shown."""
    if isinstance(bar, tqdm):
        bar.set_postfix(values, refresh=False)


def _is_interactive() -> bool:
    """Whether this process writes to a terminal or runs a notebook."""
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return "IPKernelApp" in getattr(shell, "config", ())
