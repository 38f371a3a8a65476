"""Runs device_laws.py in a process of its own, and checks that the fake device notices mixed devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

FOLDER = Path(__file__).parent
# From torch 2.13 on the fake device has to work: if a later torch removes the function, the tests fail instead of being skipped.
HAS_FAKE_DEVICE = torch.__version__ >= "2.13" or hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
MIXED_DEVICES = """
import torch
from fake_device import FAKE_DEVICE, fake_device
with fake_device():
    x, on_cpu = torch.ones(3, device=FAKE_DEVICE), torch.ones(3)
    assert (x + x).tolist() == [2, 2, 2] and (x * torch.tensor(2)).device.type == FAKE_DEVICE
    assert x[torch.tensor([0])].device.type == FAKE_DEVICE and x.masked_fill(x > 0, torch.tensor(2.0)).tolist() == [2, 2, 2]

    def put():
        x[torch.tensor([0, 1, 2])] = on_cpu

    mixed = [lambda: x + on_cpu, lambda: on_cpu.add_(x), put, lambda: torch.stack([x, on_cpu]), lambda: torch.tensor(1.0).add_(x.sum())]
    mixed += [lambda: torch.rand(3, device=FAKE_DEVICE, generator=torch.Generator())]
    for call in mixed:
        try:
            call()
        except RuntimeError as error:
            print("error:", error)
"""


def run(*command: str) -> str:
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *command], cwd=FOLDER.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not (HAS_FAKE_DEVICE or torch.cuda.is_available()), reason="needs a GPU, or a torch that takes a device written in Python"
)
def test_every_stage_stays_on_the_models_device() -> None:
    assert " passed" in run("-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", str(FOLDER / "device_laws.py"))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_FAKE_DEVICE, reason="needs a torch that takes a device written in Python")
def test_mixed_devices_are_an_error() -> None:
    output = run("-c", MIXED_DEVICES)
    assert output.count("error:") == 6, output
    assert "all tensors must be on one device, but [(3,)] are on the CPU" in output
