"""The notebooks run from the first cell to the last, in a kernel of their own, and say what their text promises."""

import re
import resource
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def budget_search(tmp_path_factory):
    """The notebook with its outputs, and the seconds of CPU they took."""
    notebook = nbformat.read(NOTEBOOKS / "budget_search.ipynb", as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    began = cpu_seconds()
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook, cpu_seconds() - began


def cpu_seconds():
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.heavy
def test_it_takes_a_minute_of_two_cores(budget_search):
    """Seconds of CPU, which do not depend on what else the machine does."""
    assert 5 < budget_search[1] < 120


def outputs(notebook, mime):
    return [
        output.data[mime]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if mime in output.get("data", {})
    ]


@pytest.mark.heavy
def test_no_cell_writes_to_stderr(budget_search):
    notebook, _ = budget_search
    streams = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "name" in output]
    assert [output.text for output in streams if output.name == "stderr"] == []


@pytest.mark.heavy
def test_the_result_and_its_figures_show_themselves(budget_search):
    notebook, _ = budget_search
    assert "over uniform" in outputs(notebook, "text/html")[0]
    assert len(outputs(notebook, "image/png")) == 5


@pytest.mark.heavy
def test_the_profile_answers_better_than_uniform(budget_search):
    """Of five questions at most two wrong: uniform budgets answer one of 48."""
    notebook, _ = budget_search
    # a busy machine delivers what a cell prints in several outputs
    text = "".join(output.text for output in notebook.cells[-1].outputs)
    asked = re.findall(r"(\d{4}), and the model says\D*(\d{4})", text)
    assert len(asked) == 5
    assert sum(right == said for right, said in asked) >= 3, text


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
