"""CV-Bench (`nyu-visionx/CV-Bench`): its files, tasks and sources, its prompt, its official score.

Source: the dataset card. Split `test`, in two files: `test_2d.parquet` (1438 rows), `test_3d.parquet` (1200).
"""

HUB_ID = "nyu-visionx/CV-Bench"
TASKS = {"2D": ("Count", "Relation"), "3D": ("Depth", "Distance")}  # type -> its tasks
SOURCES = {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)}  # type -> where its images are from
FILES = {"2D": "test_2d.parquet", "3D": "test_3d.parquet"}
# The authors' score, of accuracies by source: 1/2 * ((ADE20K + COCO) / 2 + Omni3D). The R1-Zero paper reports the micro
# average over all questions instead.
OFFICIAL_SCORE = (("ADE20K", "COCO"), "Omni3D")
LETTERS = "ABCDEF"


def render_prompt(question: str, choices: tuple[str, ...]) -> str:
    """The `prompt` column, verbatim: the question, then one lettered line for each choice."""
    lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([f"{question} Select from the following choices.", *lines])
