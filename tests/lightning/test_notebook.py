"""lightning/from_loop_to_trainer.ipynb: executes from top to bottom, is right, and is stored clean."""

import copy
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent.parent / "lightning" / "from_loop_to_trainer.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.mark.slow
def test_executes_and_every_way_ends_with_the_same_weights(stored, tmp_path):
    notebook = copy.deepcopy(stored)
    for cell in code_cells(notebook):
        cell.outputs = []
    notebook.cells.append(nbformat.v4.new_code_cell("import json\nprint(json.dumps(results))"))
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources=place).execute()
    assert list(tmp_path.iterdir()) == []  # it works in a folder of its own, and removes that
    results = json.loads(printed(notebook.cells[-1]))
    names = ["Fabric", "Trainer, first attempt", "Trainer", "Fabric, two processes", "Trainer, two processes"]
    assert list(results) == names
    for name, found in results.items():
        if name == "Trainer, first attempt":
            assert found["off by"] > 0.01
        else:
            assert found["off by"] < 1e-12, name  # fp64: only the order of the additions differs
        if "two" in name:
            assert found["ranks differ by"] == 0, name
    # What is stored is what comes out: the same cells print the same words, up to digits that are rounding.
    words = re.compile(r"[A-Za-z_]{3,}")
    for before, now in zip(code_cells(stored), code_cells(notebook), strict=False):
        assert words.findall(printed(before)) == words.findall(printed(now)), before.source


def test_is_stored_executed_and_clean(stored):
    nbformat.validate(stored)
    assert [cell.execution_count for cell in code_cells(stored)] == list(range(1, len(code_cells(stored)) + 1))
    assert all(cell.metadata == {} for cell in stored.cells)
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert stored.metadata.kernelspec.name == "python3"
    assert set(stored.metadata.language_info) == {"name"}  # no version: it would change with every machine
    outputs = [output for cell in code_cells(stored) for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_holds_no_paths_of_a_machine(stored):
    texts = [cell.source for cell in stored.cells]
    for cell in code_cells(stored):
        texts += [printed(cell), *(output.data.get("text/plain", "") for output in cell.outputs if "data" in output)]
    for text in texts:
        assert not re.search(r"(?<![\w.])/(?:\w[\w.-]*/)+|[A-Z]:\\|~/", text), text
