"""What `make demo` prints and draws, in its quick form."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The demo's output and the folder it ran in."""
    folder, output = tmp_path_factory.mktemp("demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.syspath_prepend(FOLDER)
        patch.setattr(sys, "argv", ["demo.py", "--quick", "--out", "picture.png"])
        patch.chdir(folder)
        runpy.run_path(str(FOLDER / "demo.py"), run_name="__main__")
    return output.getvalue(), folder


@pytest.fixture(scope="module")
def accuracies(shown: tuple[str, Path]) -> dict[tuple[str, str], list[float]]:
    """The table: (block, pipeline) -> accuracy at 25, 50, 75 and 90 %."""
    rows = re.findall(r"^(\d+x\d+) +(\w+ \w+) +(.*)$", shown[0], flags=re.MULTILINE)
    return {(block, name): [float(cell.rstrip("*")) for cell in cells.split()] for block, name, cells in rows}


def test_the_dense_network_is_good(shown: tuple[str, Path]) -> None:
    match = re.search(r"dense ([\d.]+)", shown[0])
    assert match
    assert 0.95 < float(match[1]) <= 1


def test_the_table_is_complete_and_holds_accuracies(accuracies: dict[tuple[str, str], list[float]]) -> None:
    pipelines = {"l1 per_layer", "l1 per_model", "l2 per_row", "lamp per_model", "random per_layer"}
    assert accuracies.keys() == {(block, name) for block in ("2x2", "4x4") for name in pipelines}
    assert all(len(row) == 4 and all(0 <= a <= 1 for a in row) for row in accuracies.values())


@pytest.mark.parametrize("block", ["2x2", "4x4"])
def test_magnitude_beats_random_at_half(accuracies: dict[tuple[str, str], list[float]], block: str) -> None:
    for name in ("l1 per_layer", "l1 per_model", "lamp per_model"):
        assert accuracies[block, name][1] > accuracies[block, "random per_layer"][1] + 0.03


def test_the_masks_of_the_tutorial_are_2x2_blocks_at_half(shown: tuple[str, Path]) -> None:
    drawn = [line.split() for line in shown[0].splitlines() if re.fullmatch(r" +[.#]{8}( +[.#]{16})?", line)]
    first, second = [line[0] for line in drawn], [line[1] for line in drawn if len(line) == 2]
    assert (len(first), len(second)) == (8, 4)
    for rows in (first, second):
        assert rows[0::2] == rows[1::2], "blocks have two rows"
        assert all(set(tile) in ({"#"}, {"."}) for row in rows for tile in re.findall("....", row)), "and two columns"
        assert "".join(rows).count("#") == "".join(rows).count(".")


def test_training_recovers_accuracy_and_keeps_zeros(shown: tuple[str, Path]) -> None:
    match = re.search(r"([\d.]+) pruned gradually, ([\d.]+) pruned at once\n\(without training ([\d.]+)\); ([\d.]+)% of", shown[0])
    assert match
    gradually, at_once, untrained, zeros = map(float, match.groups())
    assert min(gradually, at_once) > untrained + 0.3
    assert zeros == pytest.approx(90, abs=0.1)


def test_the_picture_is_drawn(shown: tuple[str, Path]) -> None:
    assert [path.name for path in shown[1].iterdir()] == ["picture.png"], "the demo writes no other file into the current folder"
    image = imread(shown[1] / "picture.png")
    assert min(image.shape[:2]) > 400
    assert image[..., :3].std() > 0.05, "a blank picture"
