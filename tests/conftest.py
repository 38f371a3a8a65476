"""How hard hypothesis tries: `laws` at every change, ``HYPOTHESIS_PROFILE=thorough pytest`` now and then, `quick` in ``make test-fast``."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other

settings.register_profile("laws", max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("laws"), max_examples=20)
settings.register_profile("thorough", settings.get_profile("laws"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "laws"))


@pytest.fixture
def without_blockprune_hf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers as it is before ``import blockprune.hf``, which other tests import."""
    auto = pytest.importorskip("transformers.quantizers.auto")
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "blockprune", raising=False)
