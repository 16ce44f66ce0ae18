"""SAT's, BLINK's and VSR's questions in their published schemas: what is asked, how it is scored, all in one table."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_r1.answers.statistics import ALL_ROTATIONS
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.evaluation.run import make_result, write_result
from open_r1.tasks.benchmarks import BENCHMARKS, VSR_CATEGORY, Item, read
from open_r1.world.parquet import sat_row, write_cvbench, write_sat
from open_r1.world.scene import LEVELS
from support import load_script

EASY = LEVELS["easy"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
BLINK_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("idx", "question", "sub_task", "answer", "prompt")),
        *((f"image_{number}", IMAGE) for number in (1, 2, 3, 4)),
        ("choices", pa.list_(pa.string())),
    ]
)


def picture(row: int) -> bytes:
    return sat_row(row, 0, EASY)["image_bytes"][0]


def blink_row(task: str, row: int) -> dict:
    question = "Two points are circled on the image. Which point is closer to the camera?"
    options = ["A is closer", "B is closer"] if task == "Relative_Depth" else ["yes", "no"]
    return {
        "idx": f"val_{task}_{row}",
        "question": question,
        "sub_task": task,
        "image_1": {"bytes": picture(row), "path": None},
        "choices": options,
        "answer": f"({'AB'[row % 2]})",
        "prompt": f"{question} Picture {row}.\n(A) {options[0]}\n(B) {options[1]}",
    }


def write_blink(folder: Path, count: int) -> Path:
    for task in ("Relative_Depth", "Spatial_Relation"):
        (folder / task).mkdir(parents=True)
        table = pa.Table.from_pylist([blink_row(task, row) for row in range(count)], BLINK_SCHEMA)
        pq.write_table(table, folder / task / "val-00000-of-00001.parquet")
    return folder


def write_vsr(folder: Path, relations: list[str]) -> Path:
    (folder / "images").mkdir(parents=True)
    with (folder / "test.jsonl").open("w") as lines:
        for row, relation in enumerate(relations):
            name = f"{row:012}.jpg"
            (folder / "images" / name).write_bytes(picture(row))
            line = {"image": name, "caption": f"The cat is {relation} mat {row}.", "label": row % 2}
            lines.write(json.dumps(line | {"relation": relation, "annotator_id": 1}) + "\n")
    return folder


def write_sat_test(folder: Path) -> Path:
    """Four questions about one image and four about two."""
    folder.mkdir()
    write_sat(folder / "SAT_test.parquet", 8, 0, EASY, ["left", "rotation"])
    return folder


def answered(benchmark: str, folder: Path, respond: Callable[[Item], str]) -> dict:
    """The result of a model that responds so."""
    rows = [item.to_row() | {"response": respond(item)} for item in read(BENCHMARKS[benchmark], str(folder))]
    return make_result(rows, {"benchmark": benchmark, "prompt": {"name": "base", "style": "reasoning"}}, "lenient")


def right(item: Item) -> str:
    return f"It is so. </think> <answer> {item.answer} </answer>"


def wrong(item: Item) -> str:
    others = [f"({letter})" for letter in "AB"] if item.answer.startswith("(") else item.options
    return f"It is so. </think> <answer> {next(o for o in others if o != item.answer)} </answer>"


def test_blink(tmp_path):
    folder = write_blink(tmp_path / "blink", 4)
    result = answered("BLINK", folder, lambda item: right(item) if item.task == "Relative_Depth" else "(A)")
    assert result["accuracy"] == {"Total": 0.75, "Relative_Depth": 1, "Spatial_Relation": 0.5}
    first = read(BENCHMARKS["BLINK"], str(folder))[0]
    assert first.prompt == blink_row("Relative_Depth", 0)["prompt"] and first.images == (picture(0),)


def test_vsr(tmp_path):
    folder = write_vsr(tmp_path / "vsr", ["on", "in", "left of", "behind", "facing", "next to"])
    result = answered("VSR", folder, lambda i: right(i) if i.task in ("Projective", "Orientation") else "True")
    # A caption is true in every other row; `True` is right there.
    expected = {"Topological": 0.5, "Projective": 1, "Orientation": 1, "Unallocated": 1, "Total": 5 / 6}
    assert result["accuracy"] == pytest.approx(expected)
    assert [VSR_CATEGORY[name] for name in ("in the middle of", "at the edge of", "far away from", "down from")] == [
        *("Projective", "Adjacency", "Proximity", "Directional")
    ]
    # as in the evaluation of the R1-Zero paper
    assert read(BENCHMARKS["VSR"], str(folder))[0].prompt == (
        'Please analyze the provided image. Does the statement "The cat is on mat 0." accurately describes what you '
        "see? Choose from (A) True or (B) False."
    )
    images = sorted((folder / "images").iterdir())
    images[0].unlink()
    assert [item.images[0] for item in read(BENCHMARKS["VSR"], str(folder))][:2] == [None, picture(1)]
    for image in images[1:]:
        image.unlink()
    with pytest.raises(FileNotFoundError, match=r"none of the images is there; its files name images of COCO 2017"):
        read(BENCHMARKS["VSR"], str(folder))


def test_sat_in_every_rotation(tmp_path):
    folder = write_sat_test(tmp_path / "sat")
    result = answered("SAT-test", folder, lambda item: item.options[0] if item.task == "other" else right(item))
    expected = {"other": 0.5, "action_sequence": 1, "Total": 0.75, ALL_ROTATIONS: 0.5}
    assert result["accuracy"] == pytest.approx(expected)


def test_the_command_asks_about_one_and_two_images(tiny_model, tmp_path, monkeypatch):
    folder = write_sat_test(tmp_path / "sat")
    options = ["--model_path", tiny_model, "--benchmark", "SAT-test", "--dataset_path", folder, "--max_pixels", 12544]
    options += ["--output_dir", tmp_path / "results", "--max_new_tokens", 2]
    monkeypatch.setattr(sys, "argv", ["", *map(str, options)])
    load_script(REPO_ROOT / "src/eval/test_qwen2vl_CVBench.py").main()
    (path,) = (tmp_path / "results").iterdir()
    result = json.loads(path.read_text())
    assert path.name.startswith("SAT-test_result_") and result["shares"]["image_errors"] == 0
    assert len(result["results"]) == 16 and result["scores"]["Total"]["n"] == 8


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[list[str], str]]:
    """compare.py's lines and what it warns of; drawn beside the results."""

    def compare(*arguments: object) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "argv", ["", *map(str, arguments), "--chart", str(tmp_path / "chart.svg")])
        load_script(REPO_ROOT / "scripts/compare.py").main()
        told = capsys.readouterr()
        return told.out.splitlines(), told.err

    return compare


def test_the_results_of_all_benchmarks_are_one_table(compare, tmp_path, capsys):
    write_cvbench(tmp_path / "cvbench", 8, 3, EASY)
    folders = {"CV-Bench": tmp_path / "cvbench", "BLINK": write_blink(tmp_path / "blink", 2)}
    folders |= {"VSR": write_vsr(tmp_path / "vsr", ["on", "near"]), "SAT-test": write_sat_test(tmp_path / "sat")}
    paths = []
    for benchmark, folder in folders.items():
        for name, respond in (("base", wrong), ("grpo", right)):
            paths.append(tmp_path / f"{BENCHMARKS[benchmark].name}_result_{name}_reasoning.json")
            write_result(paths[-1], answered(benchmark, folder, respond))
    paths.pop()  # of the last benchmark the first model alone
    capsys.readouterr()  # progress bars
    out, err = compare(*paths)
    assert out[0] == "| | chance | base | grpo |" and not err
    rows = [line[2:-2].split(" | ") for line in out[2:] if line.startswith("| ") and ": " in line]
    table = {name: cells for name, *cells in rows}
    for benchmark in ("CV-Bench", "BLINK", "VSR"):
        chance, first, second = table[f"{benchmark}: Total"]
        assert first.startswith("0.00 (") and second.startswith("100.00 (") and float(chance) > 0
    assert table["VSR: Proximity"][2].startswith("100.00 (") and table["BLINK: Relative_Depth"][1].startswith("0.00 (")
    assert table["CV-Bench: CV-Bench"][2].startswith("100.00 (")  # the official score
    assert table["SAT-test: Total"][1].startswith("0.00 (") and table["SAT-test: Total"][2] == "-"
    assert sum("| grpo | +100.00 (" in line for line in out) == 3
    assert next(line for line in out if "against" in line).startswith("| CV-Bench, against base | Total in points")
    assert all(name in (tmp_path / "chart.svg").read_text() for name in folders)

    out, _ = compare(*paths, "--names", "Base", "R1-Zero")
    assert out[0] == "| | chance | Base | R1-Zero |"
    with pytest.raises(Mistake, match=r"--names: 1 names for 2 models \(base, grpo\)"):
        compare(*paths, "--names", "Base")
    with pytest.raises(Mistake, match=r"--names: Base twice; each result or model needs a name of its own"):
        compare(*paths, "--names", "Base", "Base")

    other = json.loads(paths[1].read_text()) | {"parser": "strict"}
    (tmp_path / "CVBench_result_other_reasoning.json").write_text(json.dumps(other))
    _, err = compare(*paths, tmp_path / "CVBench_result_other_reasoning.json")
    assert err == "warning: the parsers differ; the results are not like for like\n"


OWN = """
from open_r1.base.fields import Prose, Record
from open_r1.base.prompts import sat_question
from open_r1.tasks.benchmarks import Benchmark, Item
from open_r1.tasks.benchmarks.base import ImageCells, Texts

class Row(Record):
    question: Prose
    choices: Texts
    answer: Prose
    pictures: ImageCells

def items(row, number):
    prompt = sat_question(row["question"], row["choices"])
    options, pictures = tuple(row["choices"]), tuple(row["pictures"])
    return [Item(number, "Pairs", row["question"], options, row["answer"], prompt, pictures)]

PAIRS = Benchmark("Pairs", "me/pairs", ("pairs.jsonl",), Row, items)
nothing = 1
"""


def test_a_benchmark_of_ones_own_by_name(tmp_path, tiny_model):
    """From the folder where the command is typed; two images a question."""
    (tmp_path / "own_benchmarks.py").write_text(OWN)
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    row = {"question": "Same?", "choices": ["yes", "no"], "answer": "yes", "pictures": ["a.png", "a.png"]}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    options = ["--dataset_path", ".", "--model_path", tiny_model, "--max_new_tokens", "4", "--output_dir", "results"]

    def evaluate(name: str) -> subprocess.CompletedProcess:
        command = [sys.executable, REPO_ROOT / "src/eval/test_qwen2vl_CVBench.py", "--benchmark", name, *options]
        return subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)

    done = evaluate("own_benchmarks:PAIRS")
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "results").glob("Pairs_result_*_reasoning.json")
    assert json.loads(path.read_text())["scores"]["Pairs"]["n"] == 4
    wrong = evaluate("own_benchmarks:nothing")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1
    assert "--benchmark: module 'own_benchmarks'" in wrong.stderr and "has no benchmark 'nothing'" in wrong.stderr
    assert "--benchmark: unknown benchmark 'CV-Bemch' (known: CV-Bench, " in evaluate("CV-Bemch").stderr


# --- scripts/benchmark.py ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["data --rows 40", "eval --rows 8 --bs 4 --max_new_tokens 8 --mean_tokens 4 --hidden_size 32"]
)
def test_a_comparison_with_the_usual_way_runs_and_keeps_its_rounds(tmp_path, command):
    kept = tmp_path / "rounds.json"
    script = [sys.executable, REPO_ROOT / "scripts/benchmark.py", "--json", kept]
    done = subprocess.run([*script, *command.split(), "--rounds", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(kept.read_text())["machine"]["cpus"] and "\nEqual: " in done.stdout
