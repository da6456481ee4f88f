"""A notebook that nbclient runs keeps a picture of each figure, for readers without scripts."""

import json
from typing import Any

import pytest
from view.test_notebooks import FIGURES, faults

pytestmark = pytest.mark.slow
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

CELLS = (
    'import imaginelens as il\n\nlens = il.load("latent-content")\ntask = lens.task(n=4, seed=0)',
    'il.sweep(lens, task, context="fixed").plot()',
    "il.view.token_strip(lens.run(task.base[0]))",
    "explorer = il.explore(lens, task)\nexplorer.run(row=1, column=0)\nexplorer",
)


@pytest.fixture(scope="module")
def executed() -> Any:
    """The notebook as it is stored after its cells have run."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")  # as in the notebooks that are stored
        nbclient.NotebookClient(made, timeout=600, kernel_name="python3").execute()
    return json.loads(nbformat.writes(made))


def test_every_figure_leaves_a_picture_and_few_bytes(executed: Any) -> None:
    assert faults(executed) == []
    outputs = [output for cell in executed["cells"] for output in cell["outputs"]]
    drawn = [one["data"] for one in outputs if any(kind in one.get("data", {}) for kind in FIGURES)]
    assert len(drawn) == 3
    assert [len(json.dumps(data)) < 300_000 for data in drawn] == [True] * 3


def test_a_figure_of_plotly_alone_would_be_found(executed: Any) -> None:
    bare = json.loads(json.dumps(executed))
    del bare["cells"][1]["outputs"][0]["data"]["image/png"]
    assert faults(bare) == ["cell 1: a figure without a PNG"]
