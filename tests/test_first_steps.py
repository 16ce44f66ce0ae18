"""What a newcomer copies from docs/first_steps.md and runs in docs/change_one_thing.ipynb, as it stands there."""

import json
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fresh import new_shell
from open_r1.base.errors import REPO_ROOT

NOTEBOOK = "docs/change_one_thing.ipynb"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh clone with the environment of this one."""
    root = tmp_path_factory.mktemp("first") / "clone"
    subprocess.run(["git", "clone", "--quiet", REPO_ROOT, root], check=True)
    (root / ".venv").symlink_to(REPO_ROOT / ".venv")
    return root


def test_the_notebook_is_stored_without_outputs_in_ten_cells():
    cells = json.loads((REPO_ROOT / NOTEBOOK).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) <= 10 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert all("".join(cell["source"]).startswith("#") for cell in code[1:]), "each begins with a sentence of why"


@pytest.mark.slow
def test_the_first_steps_as_they_stand(clone):
    """Block by block, each from the top of the clone, with the environment active as the page says."""
    blocks = re.findall(r"```sh\n(.*?)```", (clone / "docs/first_steps.md").read_text(), re.DOTALL)
    setup, activate, *blocks = blocks
    assert (setup.strip(), activate.strip()) == ("bash setup.sh", ". .venv/bin/activate")
    said = ""
    for block in blocks:
        command = f"{activate}\nset -e\n{block}"
        env = new_shell(PYTHONPATH=str(clone / "src/open-r1-multimodal"))
        done = subprocess.run(["bash", "-c", command], cwd=clone, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        said += done.stdout
    mine = clone / "mine"
    assert "step 3/3" in said and "completion: " in said and "McNemar p" in said and "\n{1: " in said
    result = json.loads((mine / "results/Pairs_result_run_reasoning.json").read_text())
    assert result["scores"]["Pairs"]["n"] == 20 and len(result["scores"]["Pairs"]["interval"]) == 2
    log = [json.loads(line) for line in (mine / "run/log.jsonl").read_text().splitlines()]
    assert 0 < log[0]["rewards/short/mean"] < 1 and (mine / "both.html").is_file()


@pytest.mark.slow
def test_the_notebook_tells_its_story(clone):
    """All cells: the paper's rewards teach it to check, and one for short answers beside them does not."""
    notebook = nbformat.read(clone / NOTEBOOK, as_version=4)
    env = {"PYTHONPATH": str(clone / "src/open-r1-multimodal"), "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": clone / "docs"}})
    client.execute(env=new_shell(**env))
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    texts = ["".join(output.get("text", "") for output in of_cell) for of_cell in outputs]
    kinds = [{kind for output in of_cell for kind in output.get("data", {})} for of_cell in outputs]
    assert "image/png" in kinds[2] and texts[2].count("base: ") == 3
    for trained in (4, 5):
        assert "text/html" in kinds[trained] and not re.search(r"^step ", texts[trained], re.MULTILINE)
    _, (paper, paper_low, _), (mine, _, mine_high) = [
        tuple(float(number) / 100 for number in numbers)
        for numbers in re.findall(r"([\d.]+)%  \(([\d.]+)% - ([\d.]+)%\)", texts[6])
    ]
    assert paper > mine and paper_low > mine_high
    assert texts[7].count(":  ") >= 3 and texts[8].count(".html") == 2
    for name in ("paper/report.html", "both.html"):
        assert (clone / "outputs/notebook" / name).stat().st_size > 20_000
