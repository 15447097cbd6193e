"""Notebooks: both forms say the same, what they show is one clean run, links are ours."""

import re
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
URL = re.search(r'url="(.+?)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
NAMES = sorted(
    {path.stem for path in ROOT.glob("notebooks/*.*") if path.suffix != ".md"} - {"execute"}
)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def notebook(name):
    return nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_both_forms_hold_the_same_cells(name, notebook):
    text = jupytext.read(ROOT / f"notebooks/{name}.py")
    for old, new in zip(notebook.cells, text.cells, strict=True):
        assert old.cell_type == new.cell_type
        assert old.source == new.source


def test_the_outputs_are_of_one_complete_run_without_errors_or_warnings(notebook):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert {output.name for output in outputs if "name" in output} == {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_committed_notebook_is_small_and_names_no_machine(name, notebook):
    assert (ROOT / f"notebooks/{name}.ipynb").stat().st_size < 200 * 1024
    assert not any(cell.metadata for cell in notebook.cells)  # such as times of execution
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    text = "\n".join(output.get("text", "") for output in outputs)
    assert not re.search(r"/(home|root|tmp|usr|work)/", text)


def test_the_badge_and_the_installation_use_the_public_address(name, notebook):
    owner = URL.removeprefix("https://github.com/")
    colab = re.escape("https://colab.research.google.com/github/")
    links = re.findall(rf"{colab}[^)\s]+", notebook.cells[0].source)
    page = f"{owner}/blob/main/notebooks/{name}.ipynb"
    assert links == [f"https://colab.research.google.com/github/{page}"]
    sources = re.findall(r'git\+([^"\s]+)', code_cells(notebook)[0].source)
    assert sources == [URL]


def test_every_numbered_section_asserts_what_it_claims(notebook):
    text = "\n".join(cell.source for cell in notebook.cells)
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    numbered = [section for section in sections if section[0].isdigit()]
    assert numbered
    for section in numbered:
        assert re.search(r"^ *(assert |np\.testing\.assert_)", section, re.M), section[:40]
