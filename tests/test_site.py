"""The documentation site builds without a warning and without the network, and its search finds everything that is public."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import public

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "notebooks" / "mkdocs.yml"
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'blockprune[docs]'"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site. Proxies that lead nowhere make every access to the network an error."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(CONFIG), "-d", str(folder)]
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_public_name_is_found_by_the_search(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    titles = {re.sub(r"<[^>]+>|\s", "", entry["title"]) for entry in entries}
    assert {f"bp.{name}" for name in public()} <= titles


def test_every_guide_notebook_and_document_has_a_page_in_the_navigation(site: Path) -> None:
    index = (site / "index.html").read_text()
    sources = [*CONFIG.parent.glob("guides/*.md"), *CONFIG.parent.glob("*.ipynb")]
    pages = [f"{path.stem}.html" for path in sources] + ["FROM_NNI.html", "RESULTS.html", "ARCHITECTURE.html", "reference/index.html"]
    assert [page for page in pages if not (site / page).exists() or f'href="{page}"' not in index] == []


def test_examples_and_notebooks_show_their_outputs(site: Path) -> None:
    assert "&gt;&gt;&gt;" in (site / "reference" / "metric.html").read_text()
    notebooks = [(site / f"{path.stem}.html").read_text() for path in CONFIG.parent.glob("*.ipynb")]
    assert all("data:image/png;base64," in page or "<table" in page for page in notebooks)


def test_pages_fetch_nothing_from_the_network(site: Path) -> None:
    fetched = re.compile(r"""<(?:script|link|img)\b[^>]*\b(?:src|href)=["']?(https?://[^"'\s>]+)""")
    assert {url for page in site.rglob("*.html") for url in fetched.findall(page.read_text())} == set()


def test_the_reference_lists_what_the_package_offers() -> None:
    pages = runpy.run_path(str(CONFIG.parent / "site_pages.py"))["reference"]()
    names = {name.removeprefix("bp.") for entries in pages.values() for name in entries}
    assert public().keys() <= names
    assert {"hf.GradualPruning", "statistics.input_sq"} <= {name.removeprefix("blockprune.") for name in names}
