"""How hard hypothesis tries: `laws` at every change, ``HYPOTHESIS_PROFILE=thorough pytest`` now and then, `quick` in ``make test-fast``."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other

settings.register_profile("laws", max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("laws"), max_examples=20)
settings.register_profile("thorough", settings.get_profile("laws"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "laws"))


# Files with tests of half a minute. They come first, so that no worker waits at the end while another one runs such a test.
LONGEST = ("test_sanitizers.py", "test_notebooks.py", "test_benchmarks.py", "test_devices.py", "test_guides.py", "test_checkpoints.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)  # otherwise the order stays


@pytest.fixture
def without_blockprune_hf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers as it is before ``import blockprune.hf``, which other tests import."""
    auto = pytest.importorskip("transformers.quantizers.auto")
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "blockprune", raising=False)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
