"""The README's code runs as printed, block after block, on a small model."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

README = (Path(__file__).parent.parent / "README.md").read_text()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_the_readmes_code_runs_as_printed() -> None:
    x = torch.randn(4, 32)
    names: dict[str, Any] = {"model": Small(), "x": x, "batches": [x], "loader": [x] * 3}
    names["loss"], names["evaluate"] = lambda output, batch: output.square().mean(), lambda model: model(x).square().mean()
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) >= 5
    assert names["masks"].keys() == {0.25, 0.5, 0.75}
    assert set(names["wanda"](Small(), 0.5)) == set(names["fisher"](Small(), 0.5)) == {"a.weight", "b.weight"}
