"""The laws of laws_elsewhere.py, in a process of its own; and what they would find."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

HERE = Path(__file__).parent
DISGUISED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
FORGOTTEN = """
import torch
from elsewhere import AWAY, elsewhere
with elsewhere():
    x = torch.ones(3, device=AWAY)
    assert (x + torch.ones(3, device=AWAY)).tolist() == [2, 2, 2] and (x * torch.tensor(2)).device.type == AWAY
    try:
        x + torch.ones(3)
    except RuntimeError as error:
        print(error)
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
    assert "all tensors must be on one device, but [(3,)] are on the CPU" in run("-c", FORGOTTEN)
