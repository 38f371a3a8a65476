"""The house rules, read from the source: who imports whom, what is public, that each public thing shows its use, and sizes."""

import ast
import importlib
import inspect
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import blockprune as bp

ROOT = Path(bp.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
INIT = ROOT / "__init__.py"

# Which module (file or package) may import which. A new one gets its line here and in ARCHITECTURE.md.
MAY_IMPORT: dict[str, set[str]] = {
    # geometry, values, names: what the stages meet in
    "native": set(),
    "tables": set(),
    "blocks": {"native"},
    "storage": {"blocks"},
    "types": {"blocks"},
    "parametrization": {"blocks"},
    "names": {"parametrization"},
    "experts": set(),
    "as_linears": {"experts"},
    "where": {"as_linears", "blocks", "names", "types"},
    # helpers of one stage
    "layers": {"as_linears", "names"},
    "statistics": {"as_linears", "layers", "names", "native", "types"},
    "gates": {"blocks", "names", "statistics"},
    "fold": {"experts", "gates", "layers", "names", "statistics", "types"},
    "quadratic": {"tables", "types"},
    "ranking": {"types"},
    "distribute": {"blocks", "names", "ranking", "types"},
    # stages
    "collect": {"blocks", "fold", "gates", "names", "statistics", "types", "where"},
    "metric": {"blocks", "native", "quadratic", "types"},
    "allocate": {"blocks", "distribute", "names", "ranking", "types"},
    "reconstruct": {"blocks", "quadratic", "types"},
    "apply": {"names", "parametrization", "types"},
    "masks": {"blocks", "tables", "types"},
    "maskfile": {"blocks", "types"},
    "schedule": set(),
    "pipeline": {"types"},
    # above the stages
    "distributed": {"fold"},
    "sensitivity": {"apply", "pipeline", "tables"},
    "blockwise": {"parametrization", "types"},
    "layerwise": {"gates", "names"},
    "beside": {"experts", "gates", "layers", "layerwise", "names", "statistics"},
    "sequential": {
        "apply",
        "beside",
        "blocks",
        "fold",
        "gates",
        "layers",
        "layerwise",
        "names",
        "parametrization",
        "pipeline",
        "statistics",
        "types",
        "where",
    },
    "pareto": {"distribute", "tables", "types"},
    "permute": {"blocks", "names", "types"},
    "watch": {"experts", "fold", "gates", "layerwise"},
    "axes": {"apply", "fold", "gates", "permute", "watch"},
    "cluster": {"blocks", "names", "permute", "ranking", "types"},
    "export": {"apply", "blocks", "fold", "masks", "names", "native", "storage", "tables", "types"},
}
STAGES = {"collect", "metric", "allocate", "reconstruct", "apply", "schedule", "pipeline", "masks", "maskfile"}


def module_of(path: Path) -> str:
    """The file, or the package directly below the root, that a source belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
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
        yield from (parts[1] if len(parts) > 1 else "__init__" for parts in dotted if parts[0] == "blockprune")


@pytest.mark.parametrize("path", [p for p in SOURCES if p != INIT], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_is_below_it(path: Path) -> None:
    name = module_of(path)
    assert name in MAY_IMPORT, f"{path.name} has no place yet: add it to MAY_IMPORT and to ARCHITECTURE.md"
    extra = set(imported(path)) - MAY_IMPORT[name] - {name}
    assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}; values meet in types.py, geometry in blocks.py"


def test_no_stage_may_import_a_stage_and_the_table_has_no_cycle() -> None:
    assert not {stage: MAY_IMPORT[stage] & STAGES for stage in STAGES if MAY_IMPORT[stage] & STAGES}
    placed: set[str] = set()
    while ready := {name for name, below in MAY_IMPORT.items() if below <= placed and name not in placed}:
        placed |= ready
    assert placed == set(MAY_IMPORT)


def test_every_line_of_the_table_is_a_module_and_every_module_has_one() -> None:
    assert {module_of(path) for path in SOURCES} - {"__init__"} == set(MAY_IMPORT)


def test_the_contents_page_is_sorted_and_complete() -> None:
    names = [
        alias.asname or alias.name for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert bp.__all__ == sorted(set(names))
    assert not [name for name in bp.__all__ if not hasattr(bp, name)]


MODULES = [importlib.import_module(f"blockprune.{name}") for name in sorted(MAY_IMPORT)]


@pytest.mark.parametrize("module", [m for m in MODULES if hasattr(m, "__all__")], ids=lambda m: m.__name__)
def test_a_modules_all_is_sorted_and_lists_what_it_defines(module: types.ModuleType) -> None:
    assert list(module.__all__) == sorted(set(module.__all__))
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


def test_what_is_public_is_what_the_issue_names() -> None:
    """Names that outside checks use."""
    stages = {
        "collect": ["weights", "batchnorm_scales"],
        "metric": ["batchnorm_scale", "fpgm", "l1", "l2", "lamp", "lp", "random"],
        "allocate": ["erk", "global_", "n_of_m", "per_bank", "per_layer", "per_row", "uniform"],
        "schedule": ["constant", "cubic", "exponential", "linear", "steps"],
    }
    top = "BlockGrid BlockMask BlockScore Param Pipeline agreement apply_masks block_elements convs difference excluding expand finalize"
    more = "first_of intersect linears load_masks masked_parameters named pool read_masks restrict save_masks sparsity summary union"
    assert not [
        name for name in [*top.split(), *more.split(), *(f"{s}.{n}" for s, names in stages.items() for n in names)] if name not in public()
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))
