"""The house rules, read from the source: who imports whom, what is public, that each public thing shows its use, and sizes."""

import ast
import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import blockprune as bp

ROOT = Path(bp.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
INIT = ROOT / "__init__.py"
ARCHITECTURE = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text()

# Which folder (or file in the root) may import which; the same table as in ARCHITECTURE.md.
MAY_IMPORT: dict[str, set[str]] = {
    "native": {"core"},  # core/_compat.py alone
    "core": {"native"},
    "model": {"core"},
    "statistics": {"core", "model", "native"},
    "collect": {"core", "model", "statistics"},
    "metric": {"core", "native", "statistics"},
    "allocate": {"core"},
    "repair": {"core", "model", "statistics"},
    "reorder": {"allocate", "core", "model"},
    "analysis": {"allocate", "core", "model"},
    "export": {"core", "model", "native"},
    "hf": {"collect", "core", "export", "model", "recipes", "repair"},
    "examples": {"core", "model"},
    "recipes": {"allocate", "collect", "core", "metric", "model", "reorder", "repair", "statistics"},
}
STAGES = {"collect", "metric", "allocate", "repair", "export"}


def folder_of(path: Path) -> str:
    """The folder, or the file directly below the root, that a source belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules of blockprune that a source imports, wherever in it, absolutely or relatively."""
    here = ("blockprune", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")] if node.level else (node.module or "").split(".")
            dotted = [[part for part in [*base, alias.name] if part] for alias in node.names]
        else:
            continue
        yield from (tuple(parts[1:]) for parts in dotted if parts[0] == "blockprune")


def folders_imported(path: Path) -> set[str]:
    return {parts[0] if parts else "__init__" for parts in imported(path)}


@pytest.mark.parametrize("path", [p for p in SOURCES if p != INIT], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_its_folder_may(path: Path) -> None:
    folder = folder_of(path)
    assert folder in MAY_IMPORT, f"{path.name} has no place yet: add its folder to MAY_IMPORT and to ARCHITECTURE.md"
    extra = folders_imported(path) - MAY_IMPORT[folder] - {folder}
    assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}; values meet in core/types.py, geometry in core/grid.py"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_every_permission_is_used(folder: str) -> None:
    used = set().union(*(folders_imported(path) for path in SOURCES if path != INIT and folder_of(path) == folder))
    assert not MAY_IMPORT[folder] - used, f"{folder} never imports {sorted(MAY_IMPORT[folder] - used)}; take it out of the table"


def test_no_stage_imports_another() -> None:
    assert not {stage: MAY_IMPORT[stage] & STAGES for stage in STAGES if MAY_IMPORT[stage] & STAGES}


def test_no_file_imports_itself_through_others() -> None:
    """By file, so that core and native may use each other without a cycle."""
    names = {module_name(path): path for path in SOURCES if path != INIT}
    imports = {
        name: {found for parts in imported(path) if (found := closest(parts, names)) not in (name, None)} for name, path in names.items()
    }
    placed: set[str] = set()
    while ready := {name for name, below in imports.items() if below <= placed and name not in placed}:
        placed |= ready
    assert placed == set(imports), f"a cycle among {sorted(set(imports) - placed)}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def closest(parts: tuple[str, ...], names: dict[str, Path]) -> str | None:
    """The module that ``from a.b import c`` reads: a.b.c if that is a module, else a.b."""
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in names), None)


def test_every_line_of_the_table_is_a_folder_and_every_folder_has_one() -> None:
    assert {folder_of(path) for path in SOURCES} - {"__init__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_the_table_is_that_of_architecture_md(folder: str) -> None:
    row = next((line for line in ARCHITECTURE.splitlines() if line.startswith((f"| `{folder}/` ", f"| `{folder}.py` "))), "")
    listed = {part.strip(" `,") for part in row.split("|")[3].split("`") if part.strip(" `,")} if row else None
    assert listed == MAY_IMPORT[folder], f"ARCHITECTURE.md has {listed} for {folder}, this test {MAY_IMPORT[folder]}"


def test_opening_the_package_shows_few_entries() -> None:
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith("_") and path.name != "py.typed"}
    assert len(shown) <= 14, sorted(shown)  # eleven folders, recipes, hf and examples


MODULES = sorted(
    module.name for module in pkgutil.walk_packages(bp.__path__, "blockprune.") if not module.name.endswith(("kernels", "__main__"))
)


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_hidden_behind_what_it_exports(name: str) -> None:
    """``import blockprune.x.y as m`` gives the module y, not a function of that name."""
    module = importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    assert getattr(importlib.import_module(parent), last) is module


def test_the_contents_page_is_sorted_and_complete() -> None:
    names = [
        alias.asname or alias.name for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert bp.__all__ == sorted(set(names))
    assert not [name for name in bp.__all__ if not hasattr(bp, name)]


@pytest.mark.parametrize("name", MODULES)
def test_a_modules_all_lists_what_it_defines(name: str) -> None:
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        return
    assert len(module.__all__) == len(set(module.__all__))
    own = {name for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__}
    assert {name for name in own if not name.startswith("_")} <= set(module.__all__)
    assert not [name for name in module.__all__ if not hasattr(module, name)]


def public() -> dict[str, object]:
    """The functions and classes that ``import blockprune as bp`` offers: ``bp.x``, and ``bp.stage.x`` of the modules it lists."""
    found: dict[str, object] = {}
    for name in bp.__all__:
        value = getattr(bp, name)
        if isinstance(value, types.ModuleType):
            offered = getattr(value, "__all__", [n for n, v in vars(value).items() if getattr(v, "__module__", "") == value.__name__])
            found |= {f"{name}.{n}": getattr(value, n) for n in offered if not n.startswith("_")}
        else:
            found[name] = value
    return {name: value for name, value in found.items() if inspect.isfunction(value) or inspect.isclass(value)}


@pytest.mark.parametrize("name", public())
def test_everything_public_shows_its_use(name: str) -> None:
    text = inspect.getdoc(public()[name]) or ""
    assert ">>> " in text, f"bp.{name} has no example in its docstring"


def test_names_that_outside_checks_use_are_public() -> None:
    stages = {
        "collect": ["weights", "batchnorm_scales", "with_statistics"],
        "metric": ["batchnorm_scale", "fisher", "fpgm", "l1", "l2", "lamp", "lp", "obs", "random", "wanda"],
        "allocate": ["n_of_m", "per_bank", "per_columns", "per_layer", "per_model", "per_row"],
        "budgets": ["erk", "lagrangian", "loss_weighted", "owl", "uniform"],
        "reconstruct": ["bias", "least_squares", "none", "sparsegpt"],
        "schedule": ["constant", "cubic", "exponential", "linear", "steps"],
        "export": ["backends", "benchmark", "block_sparse", "choose", "load_state_dict", "shrink"],
        "recipes": ["cluster_units", "magnitude", "obs", "sparsegpt", "wanda"],
    }
    top = (
        "BlockGrid BlockMask BlockScore Calibration Param Pipeline agreement apply_masks block_elements cluster convs difference excluding"
    )
    more = "expand finalize find_axes first_of intersect linears load_masks masked_parameters named permute pool read_masks restrict"
    last = "save_masks sensitivity sequential sparsity summary union"
    wanted = [*top.split(), *more.split(), *last.split(), *(f"{s}.{n}" for s, names in stages.items() for n in names)]
    assert not [name for name in wanted if name not in public()]
    statistics = ["input_sq", "input_gram", "output_sq", "gate_grad", "gate_fisher"]
    assert all(isinstance(getattr(bp.statistics, name), bp.statistics.Statistic) for name in statistics)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))
