"""The commands as Python functions: the same files, settings and errors as in the shell."""

import doctest
import json
import subprocess
import sys

import pytest
from PIL import Image

import open_r1
from open_r1 import api
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.world.parquet import write_cvbench
from open_r1.world.scene import LEVELS

RECIPE = "tests/data/grpo.yaml"


def brief(completions, limit=10, **kwargs):
    """A reward, as in a notebook's cell."""
    return [float(len(completion[-1]["content"]) < limit) for completion in completions]


@pytest.fixture(scope="module")
def run(tiny_model, examples_json, tmp_path_factory):
    settings = {"model_name_or_path": tiny_model, "dataset_name": examples_json, "max_steps": 2}
    settings |= {"reward_funcs": ["accuracy", brief], "output_dir": tmp_path_factory.mktemp("run") / "mine"}
    return open_r1.train(RECIPE, **settings)


def test_a_run_is_what_its_files_hold(run):
    assert list(run.curve("reward")) == [1, 2] == list(run.curve("rewards/brief/mean"))
    rows = run.completions()
    assert {row["step"] for row in rows} == {1, 2} and set(rows[0]["rewards"]) == {"accuracy_reward", "brief"}
    info = json.loads((run.folder / "run.json").read_text())
    assert info["recipes"] == [RECIPE] and info["changed"]["max_steps"] == 2
    assert info["arguments"]["reward_funcs"] == ["accuracy", "test_api:brief"]
    file = run.folder / "trajectories/train.jsonl"
    written = file.read_bytes()
    file.write_bytes(written[:-9])  # as while training goes on: half a line more
    assert run.completions() == rows[:-1] and file.read_bytes() == written[:-9]
    file.write_bytes(written)
    assert "accuracy: " in str(run) and "<td>accuracy</td>" in run._repr_html_()
    assert (run.folder / "README.md").is_file() and run.log[0]["step"] == 1


def test_evaluate_ask_and_report(run, tmp_path):
    write_cvbench(tmp_path / "cvbench", 8, 3, LEVELS["easy"])
    options = {"dataset_path": tmp_path / "cvbench", "output_dir": tmp_path / "results", "max_new_tokens": 4}
    options |= {"max_pixels": None}  # the default
    result = open_r1.evaluate(run, use_reasoning_prompt=False, **options)
    assert result.path.name == "CVBench_result_mine_no_reasoning.json" and len(result.rows) == 8
    assert result.scores["Total"]["n"] == 8 and "95 % interval" in str(result) == result._repr_markdown_()
    picture = Image.new("RGB", (56, 56), "red")
    assert isinstance(open_r1.ask(run, picture, "Which colour?", max_new_tokens=4), str)
    with pytest.raises(Mistake, match=r"^the question: the text holds <\|im_end\|>, a control token"):
        open_r1.ask(run, picture, "Which colour?<|im_end|>")
    assert open_r1.report(run) == run.folder / "report.html"
    assert open_r1.report(run, run.folder, output=tmp_path / "two.html").read_text().count("<svg") > 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: open_r1.train("configs/none.yaml"), "configs/none.yaml"),
        (lambda: open_r1.train(RECIPE, beta="x"), "beta: invalid float value: 'x'"),
        (lambda: open_r1.train(RECIPE, reward_funcs=[lambda **_: []]), "takes functions that have a name"),
        (lambda: open_r1.evaluate("no/model", limt=3), "unrecognized arguments: --limt 3"),
        (lambda: open_r1.evaluate("outputs/none", dataset_path="x"), "--model_path: "),
        (lambda: open_r1.evaluate("no/model", "easi-8"), "easi-8: name one of VSI-Bench, "),
        (lambda: open_r1.ask("no/model", None, "?", max_new_tokens=0), "max_new_tokens: expected a number above 0"),
        (lambda: open_r1.report("outputs/none"), "outputs/none: no such folder"),
    ],
)
def test_errors_are_those_of_the_commands(call, message):
    with pytest.raises(Mistake) as raised:
        call()
    assert message in str(raised.value)


def test_the_package_itself_needs_no_torch():
    code = "import sys, open_r1; assert 'torch' not in sys.modules; from open_r1 import train, evaluate, ask, report"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO_ROOT)
    with pytest.raises(AttributeError):
        open_r1.no_such_thing  # noqa: B018


def test_the_examples_hold():
    assert doctest.testmod(api) == (0, 1)
