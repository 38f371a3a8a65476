"""Progress bars show on a terminal, in a notebook, and wherever they are asked for; the items are the same."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import blockprune as bp
from blockprune.core.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None, show: bool | None) -> bool:
    monkeypatch.setattr(sys, "stderr", stream)
    options = {"file": stream} if stream else {}
    assert list(progress_bar([1, 2, 3], "work", show, **options)) == [1, 2, 3]
    return bool(stream) and "work" in stream.getvalue()


def test_a_bar_shows_on_a_terminal_and_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    for show, on_a_terminal, elsewhere in ((None, True, False), (True, True, True), (False, False, False)):
        assert shown(monkeypatch, Terminal(), show) == on_a_terminal
        assert shown(monkeypatch, io.StringIO(), show) == elsewhere
    assert not shown(monkeypatch, None, None)  # such as under pythonw, which has no stderr


def test_a_bar_shows_in_a_notebook_and_not_in_a_script_that_ipython_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for config, expected in (({"IPKernelApp": {}}, True), ({"TerminalIPythonApp": {}}, False)):
        module = SimpleNamespace(get_ipython=lambda config=config: SimpleNamespace(config=config))
        monkeypatch.setitem(sys.modules, "IPython", module)
        assert shown(monkeypatch, io.StringIO(), None) == expected
        assert not shown(monkeypatch, io.StringIO(), False)


def test_what_runs_long_shows_a_bar_if_it_is_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    model, where = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), bp.linears((2, 2))
    options = {"where": where, "statistics": [bp.statistics.input_gram], "batches": [torch.randn(16, 8)]}
    for progress in (None, False, True):
        data = bp.collect.with_statistics(model, **options, progress=progress)
        bp.metric.obs(data, progress=progress)
        text = capsys.readouterr().err
        assert ("collect" in text) == ("obs" in text) == (progress is True)
