"""The eight spatial benchmarks of `easi-8`, rendered in their published schemas: parquet, JSON Lines, a small mp4.

Every writer takes the folder of its benchmark and a number of rows.
"""

import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from open_r1.tasks.benchmarks.choice import BLINK_TASKS
from open_r1.tasks.benchmarks.video import DIRECTION
from open_r1.world.parquet import sat_row
from open_r1.world.scene import LEVELS

TEXT, IMAGE = pa.string(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PLACES = ["left", "right", "front", "back"]
GREY = 20  # by which a frame is brighter than the one before it


def gold(row: int, options: int = 4) -> str:
    """A, B, C, D, A, ...: every letter is right as often as the others."""
    return "ABCD"[row % options]


def picture(row: int) -> bytes:
    return sat_row(row, 0, LEVELS["easy"])["image_bytes"][0]


def write_video(path: Path, frames: int = 10) -> None:
    """An mp4 of 32 x 32; frame k is a grey of 20 k."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            grey = np.full((32, 32, 3), GREY * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())


def write(path: Path, rows: list[dict], columns: dict[str, pa.DataType]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(columns.items()))), path)


# question type -> the right answers of its rows: numbers, or letters of four options
VSI = {
    "object_counting": ["4", "4", "2"],
    "object_abs_distance": ["5.0", "2.5", "10"],
    "object_size_estimation": ["100", "50"],
    "room_size_estimation": ["20", "40"],
    "object_rel_distance": ["A", "B", "C"],
    DIRECTION[0]: ["A", "B"],
    DIRECTION[1]: ["A", "B"],
    DIRECTION[2]: ["A", "B"],
    "route_planning": ["C", "D"],
    "obj_appearance_order": ["D", "A"],
}


def write_vsi(folder: Path, count: int = 23) -> None:
    """23 questions of ten types about one video, in two files."""
    write_video(folder / "scannet/scene0011_00.mp4")
    rows = []
    for kind, golds in VSI.items():
        for number, answer in enumerate(golds):
            options = [f"{letter}. {place}" for letter, place in zip("ABCD", PLACES, strict=True)]
            rows.append({"id": len(rows), "dataset": "scannet", "scene_name": "scene0011_00", "question_type": kind})
            rows[-1] |= {"question": f"Question {number} of {kind}?", "ground_truth": answer}
            rows[-1] |= {"options": options if answer in "ABCD" else None, "pruned": number % 2 == 0}
    names = ("dataset", "scene_name", "question_type", "question", "ground_truth")
    columns = {"id": pa.int64(), **dict.fromkeys(names, TEXT), "options": pa.list_(TEXT), "pruned": pa.bool_()}
    for name, pruned in (("test_pruned", True), ("test_debiased", False)):
        write(folder / f"{name}.parquet", [row for row in rows[:count] if row["pruned"] == pruned], columns)


def write_mmsi(folder: Path, count: int = 20) -> None:
    """Of two and three images each, five rows of each type."""
    kinds = ["Positional Relationship (Cam.-Obj.)", "Positional Relationship (Obj.-Obj.)", "Motion (Cam.)", "MSR"]
    rows = [
        {
            "id": row,
            "images": [picture(row + k) for k in range(2 + row % 2)],
            "question_type": kinds[row // 5 % 4],
            "question": f"Where is box {row}?\nOptions: A: left, B: right, C: front, D: back",
            "answer": gold(row),
            "thought": "It is so.",
            "difficulty": "easy",
            "mean_normed_duration_seconds": 0.1 * row,
        }
        for row in range(count)
    ]
    texts = dict.fromkeys(("question_type", "question", "answer", "thought", "difficulty"), TEXT)
    columns = {"id": pa.int64(), "images": pa.list_(pa.binary()), **texts, "mean_normed_duration_seconds": pa.float64()}
    write(folder / "MMSI_Bench.parquet", rows, columns)


def write_mindcube(folder: Path, count: int = 20) -> None:
    """Of three views each, five rows of each movement."""
    movements = ["among_group1", "around_group2", "rotation_group3", "aroundnew_group4"]
    rows = []
    for row in range(count):
        question = f"From view {row}, what is behind me? A. Sofa B. Wooden table C. TV D. Door"
        prompt = f"[Task]\nYour task is to analyze the scene.\n\n<image><image><image>\n[Question]\n{question}"
        rows.append({"id": f"{movements[row // 5 % 4]}_q{row}", "question": question, "gt_answer": gold(row)})
        rows[-1] |= {"images": [{"bytes": picture(row + k), "path": f"{k}.png"} for k in range(3)]}
        rows[-1] |= {"input_prompt": prompt, "grounded_output": f"<answer>{gold(row)}. So</answer>"}
    texts = dict.fromkeys(("id", "question", "gt_answer", "input_prompt", "grounded_output"), TEXT)
    write(folder / "tiny/combined-00000-of-00001.parquet", rows, {**texts, "images": pa.list_(IMAGE)})


def write_viewspatial(folder: Path, count: int = 20) -> None:
    kinds = ["Camera perspective - Relative Direction", "Person perspective - Object View Orientation"]
    lines = [f"{letter}. {place}" for letter, place in zip("ABCD", PLACES, strict=True)]
    rows = [
        {
            "question_type": kinds[row // 4 % 2],
            "images": [{"bytes": picture(row), "path": "0.png"}],
            "question": f"Where is the counter {row}?",
            "choices": "\n".join(lines),
            "answer": lines["ABCD".index(gold(row))],
        }
        for row in range(count)
    ]
    texts = dict.fromkeys(("question_type", "question", "choices", "answer"), TEXT)
    write(folder / "data/test-00000-of-00001.parquet", rows, {**texts, "images": pa.list_(IMAGE)})


def write_site(folder: Path, count: int = 20) -> None:
    """Every other row has two options and not four; the first half about images, the others about a video."""
    write_video(folder / "videos/0.mp4")
    categories = ["counting & existence", "multi-view & cross-image reasoning"]
    rows = []
    for row in range(count):
        is_video, options = row >= count // 2, PLACES if row % 2 else PLACES[:2]
        names = ["videos/0.mp4"] if is_video else [f"images/{row}.png"]
        if not is_video:
            (folder / "images").mkdir(exist_ok=True)
            (folder / names[0]).write_bytes(picture(row))
        rows.append({"visual": names, "category": categories[is_video], "dataset": "MVBench" if is_video else "BLINK"})
        question = f"How is box {row}?" if is_video else f"<image> How is box {row}?"
        rows[-1] |= {"question": question, "options": options, "answer": gold(row // 2, len(options))}
    texts = dict.fromkeys(("category", "dataset", "question", "answer"), TEXT)
    columns = {**texts, "visual": pa.list_(TEXT), "options": pa.list_(TEXT)}
    write(folder / "image_test/test-00000-of-00001.parquet", rows[: count // 2], columns)
    with (folder / "video_test.jsonl").open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows[count // 2 :])


def write_blink(folder: Path, count: int = 28) -> None:
    """Two rows of each task, of one and two images."""
    images = {f"image_{number}": IMAGE for number in (1, 2, 3, 4)}
    texts = dict.fromkeys(("idx", "question", "sub_task", "answer", "prompt"), TEXT)
    for number, task in enumerate(BLINK_TASKS[: count // 2]):
        rows = []
        for row in (2 * number, 2 * number + 1):
            question = f"Which point is closer, {row}?"
            rows.append({"idx": f"val_{task}_{row}", "question": question, "sub_task": task})
            rows[-1] |= {"choices": ["A is closer", "B is closer"], "answer": f"({gold(row, 2)})"}
            rows[-1] |= {"prompt": f"{question}\n(A) A is closer\n(B) B is closer"}
            rows[-1] |= {f"image_{k}": {"bytes": picture(row + k), "path": None} for k in range(1, 2 + row % 2)}
        write(folder / f"{task}/val-00000-of-00001.parquet", rows, {**texts, **images, "choices": pa.list_(TEXT)})


def write_3dsr(folder: Path, count: int = 24) -> None:
    """Six questions and the same of mirrored images, each in two rotations."""
    kinds = ["height_higher", "location_above", "orientation_viewpoint", "multi_object_facing"]
    rows = []
    for question in range(count // 4):
        for flip in ("", "-flip"):
            for turn in (0, 1):
                options = ["yes", "no"] if turn == 0 else ["no", "yes"]
                answer = "AB"[options.index("no" if flip else "yes")]
                rows.append({"qid": f"Q{question:07}{flip}" + (f"-{turn}" if turn else ""), "answer": answer})
                rows[-1] |= {"A": options[0], "B": options[1], "C": None, "D": "nan", "index": len(rows)}
                rows[-1] |= {"question": f"Is box {question} higher?{flip}", "category": kinds[question % 4]}
                rows[-1] |= {"image": {"bytes": picture(question), "path": None}}
    texts = dict.fromkeys(("qid", "question", "A", "B", "C", "D", "answer", "category"), TEXT)
    columns = {"index": pa.int64(), **texts, "image": IMAGE}
    write(folder / "3dsr_circular/test-00000-of-00001.parquet", rows, columns)


def write_embspatial(folder: Path, count: int = 20) -> None:
    sources = ["mp3d", "ai2thor", "scannet"]
    rows = [
        {
            "question_id": f"{sources[row % 3]}_{row}",
            "data_source": sources[row % 3],
            "relation": ["close", "above"][row // 4 % 2],
            "question": f"Which object is closest, {row}?",
            "answer_options": ["tv", "sofa", "lamp", "box"],
            "answer": "ABCD".index(gold(row)),
            "image": {"bytes": picture(row), "path": None},
        }
        for row in range(count)
    ]
    texts = dict.fromkeys(("question_id", "data_source", "relation", "question"), TEXT)
    columns = {**texts, "answer_options": pa.list_(TEXT), "answer": pa.int64(), "image": IMAGE}
    write(folder / "data/test-00000-of-00001.parquet", rows, columns)


WRITERS = {
    "VSI-Bench": write_vsi,
    "MMSI-Bench": write_mmsi,
    "MindCube": write_mindcube,
    "ViewSpatial": write_viewspatial,
    "SITE": write_site,
    "BLINK-full": write_blink,
    "3DSRBench": write_3dsr,
    "EmbSpatial": write_embspatial,
}


def write_all(folder: Path, *without: str) -> Path:
    """A folder that has each in a folder of its name."""
    for name, writer in WRITERS.items():
        if name not in without:
            writer(folder / name)
    return folder
