"""The laws of laws_elsewhere.py, in a process of its own; and what they would find."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

HERE = Path(__file__).parent
DISGUISED = torch.__version__ >= "2.13" or hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # not to vanish later
FORGOTTEN = """
import torch
from elsewhere import AWAY, elsewhere
with elsewhere():
    x, here = torch.ones(3, device=AWAY), torch.ones(3)
    assert (x + x).tolist() == [2, 2, 2] and (x * torch.tensor(2)).device.type == AWAY
    assert x[torch.tensor([0])].device.type == AWAY and x.masked_fill(x > 0, torch.tensor(2.0)).tolist() == [2, 2, 2]

    def put():
        x[torch.tensor([0, 1, 2])] = here

    mixed = [lambda: x + here, lambda: here.add_(x), put, lambda: torch.stack([x, here]), lambda: torch.tensor(1.0).add_(x.sum())]
    mixed += [lambda: torch.rand(3, device=AWAY, generator=torch.Generator())]
    for mix in mixed:
        try:
            mix()
        except RuntimeError as error:
            print("found:", error)
"""


def run(*command: str) -> str:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not (DISGUISED or torch.cuda.is_available()), reason="needs a GPU, or a torch that takes a device written in Python")
def test_every_stage_stays_on_the_models_device() -> None:
    assert " passed" in run("-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", str(HERE / "laws_elsewhere.py"))


@pytest.mark.skipif(not DISGUISED, reason="needs a torch that takes a device written in Python")
def test_a_forgotten_device_is_found() -> None:
    said = run("-c", FORGOTTEN)
    assert said.count("found:") == 6, said
    assert "all tensors must be on one device, but [(3,)] are on the CPU" in said
