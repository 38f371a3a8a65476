"""Pages of the documentation site that are made from other files: the API reference, notebooks, results and design."""

import inspect
import re
import types
from pathlib import Path
from typing import Any

import griffe
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

import blockprune as bp
import blockprune.hf

ROOT = Path(__file__).parents[1]
PAGES = {  # page -> file
    "FROM_NNI.md": ROOT / "notebooks" / "FROM_NNI.md",
    "RESULTS.md": ROOT / "benchmarks" / "RESULTS.md",
    "ARCHITECTURE.md": ROOT / "ARCHITECTURE.md",
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FLAT = "blockprune"  # the page of what is directly in the package


class ExampleSections(griffe.Extension):
    """Docstrings head their examples "Example:", which Griffe knows as "Examples:"."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)


def reference() -> dict[str, dict[str, str]]:
    """What ``import blockprune as bp`` offers: module -> name as users write it -> where it is defined."""
    pages: dict[str, dict[str, str]] = {FLAT: {}}
    for name in bp.__all__:
        value = getattr(bp, name)
        if isinstance(value, types.ModuleType):
            pages |= module_pages(f"bp.{name}", value)
        elif inspect.isfunction(value) or inspect.isclass(value):
            pages[FLAT][f"bp.{name}"] = f"{value.__module__}.{value.__qualname__}"
    return pages | module_pages("blockprune.hf", blockprune.hf)  # not a part of bp, because it imports transformers


def module_pages(name: str, module: types.ModuleType) -> dict[str, dict[str, str]]:
    """The page of a module, and those of the modules that it lists."""
    entries: dict[str, str] = {}
    pages = {name.removeprefix("bp."): entries}
    listed = getattr(module, "__all__", [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__])
    for key in listed:
        value = getattr(module, key)
        if isinstance(value, types.ModuleType):
            pages |= module_pages(f"{name}.{key}", value)
        elif inspect.isfunction(value) or inspect.isclass(value):
            entries[f"{name}.{key}"] = f"{value.__module__}.{value.__qualname__}"
        elif not key.startswith("_"):
            entries[f"{name}.{key}"] = f"{module.__name__}.{key}"
    return pages


def title_of(module: str) -> str:
    return module if module.startswith(FLAT) else f"bp.{module}"


def page_of(module: str, entries: dict[str, str]) -> str:
    title = title_of(module)
    directives = [
        f'::: {path}\n    options:\n      heading: "{name}"\n      toc_label: "{name}"\n' for name, path in sorted(entries.items())
    ]
    return "\n".join([f"# {title}\n", *directives])


def contents(pages: dict[str, dict[str, str]]) -> str:
    """Every public name, by module, with the first sentence of its docstring."""
    lines = ["# API reference\n", "Everything that `import blockprune as bp` offers.\n"]
    for module, entries in pages.items():
        if entries:
            title = title_of(module)
            rows = [f"| [`{name}`]({module}.md#{path}) | {summary(path)} |" for name, path in sorted(entries.items())]
            lines += [f"## {title}\n", "| name | |\n|---|---|", *rows, ""]
    return "\n".join(lines)


def summary(path: str) -> str:
    """The first sentence of a docstring, on one line of a table."""
    module, _, name = path.rpartition(".")
    first = (inspect.getdoc(getattr(__import__(module, fromlist=[name]), name)) or "").split("\n\n")[0].replace("\n", " ")
    return first.replace("|", "&#124;").replace("``", "`")


def on_config(config: Any) -> Any:
    pages = reference()
    for section in config.nav:
        if "Notebooks" in section:
            section["Notebooks"] = [path.name for path in NOTEBOOKS]
        if "API reference" in section:
            listed = [{title_of(m): f"reference/{m}.md"} for m, entries in pages.items() if entries]
            section["API reference"] = [{"All names": "reference/index.md"}, *listed]
    return config


@event_priority(100)  # before the plugins that render the pages
def on_files(files: Files, config: Any) -> Files:
    for name, path in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in NOTEBOOKS:
        files.append(File(path.name, str(path.parent), config.site_dir, config.use_directory_urls))
    pages = reference()
    files.append(File.generated(config, "reference/index.md", content=contents(pages)))
    for module, entries in pages.items():
        if entries:
            files.append(File.generated(config, f"reference/{module}.md", content=page_of(module, entries)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links to files of the repository lead to their pages; where there is no page, the text stays without a link."""
    if page.file.src_uri not in PAGES:
        return markdown
    pages = {*PAGES, *(path.name for path in NOTEBOOKS)}

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        name = Path(target.partition("#")[0]).name
        return f"[{text}]({name})" if name in pages else text

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, markdown)
