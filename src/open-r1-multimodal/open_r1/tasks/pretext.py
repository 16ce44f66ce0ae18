"""Makes questions about pictures without labels: pretext tasks, whose answers follow from an edit of the picture.

    python -m open_r1.tasks.pretext --images photos/ --output pretext.json --rows 5000

writes pretext.json to train on and pretext_held_out.json, about other pictures, to evaluate on. A picture is asked once
by each of the tasks, which follow Spatial-SSRL (arXiv 2510.27606):

    crop     where in the picture a part of it is from: one of four quarters
    gap      which of four parts of the picture is behind the grey box in it
    strips   in which order three shuffled strips make the picture; four orders are offered
    turn     how the second picture is turned against the first: none, one, two or three quarters of a circle
    mirror   whether the second picture is the first one mirrored

No image is written: a row names a picture's file, and behind it what is done to it when it is opened (base/edits.py).
In each task every answer is right equally often, and at every place among the options, to within three rows. A
question that a picture makes unfair is left out, and so are pictures of nearly one colour, small ones and copies; they
are counted. What that measures, and what it does not: docs/data.md. The same seed and files give the same rows.
"""

import argparse
import hashlib
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from tqdm import tqdm

from open_r1.base.edits import Edit, Region
from open_r1.base.errors import FileMistake, Mistake, command_line, positive, run
from open_r1.base.files import replace_file, to_json
from open_r1.base.images import BrokenImage, opened, to_rgb, upright_size
from open_r1.base.locks import is_main_process
from open_r1.tasks.sat import Example, to_record

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SMALLEST = 84  # pixels of a picture's shorter side: a third of it is one token of Qwen2-VL
LARGEST = 560  # pixels of the longer side of what is shown: two such images and a question are under 1,024 tokens
LISTED = 4  # options of a question, at most
# Pictures are compared as greys of 0..255 in so many rows and columns, which halves, thirds and quarters divide.
SIDE = 96
PLAIN = 8  # grey levels: what spreads less is nearly one colour
VISIBLE, PART = 24, 0.04  # images are alike if less than PART of their pixels differ by more than VISIBLE grey levels
SEAM = 10  # grey levels: a wrong seam jumps by so much more than the right one, in the mean
HELD_OUT = 0.1  # of the pictures


class Unfair(ValueError):
    """A question that its picture does not answer; the text is what rows are counted by."""


@dataclass(frozen=True)
class Picture:
    """A picture to ask about.

    Attributes:
        width, height: of the upright picture, in pixels.
        grey: it as SIDE x SIDE greys, whatever its shape.
    """

    width: int
    height: int
    grey: Image.Image

    def look(self, box: Region, width: int, height: int) -> np.ndarray:
        """The greys (height, width) of a box of the picture."""
        x, y, w, h = box
        across, down = SIDE / self.width, SIDE / self.height
        corners = (x * across, y * down, (x + w) * across, (y + h) * down)
        return np.asarray(self.grey.resize((width, height), Image.Resampling.BOX, corners), dtype=np.float64)

    def show(self, box: Region, **edit: Any) -> Edit:
        """A box of the picture as a model sees it, at the scale at which it sees the whole."""
        return Edit(box, reduce=math.ceil(max(self.width, self.height) / LARGEST), **edit)

    @property
    def greys(self) -> np.ndarray:
        """(SIDE, SIDE) numbers."""
        return np.asarray(self.grey, dtype=np.float64)

    @property
    def whole(self) -> Region:
        """All of it."""
        return 0, 0, self.width, self.height


def read_picture(path: Path) -> Picture:
    """A picture, decoded only as finely as it is compared.

    Raises:
        BrokenImage: it cannot be shown to a model. Unfair: nor asked about.
    """
    with opened(path) as image:
        width, height = upright_size(image)
        image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a large JPEG is decoded at a fraction of its size
        grey = to_rgb(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    if min(width, height) < SMALLEST:
        raise Unfair(f"a side under {SMALLEST} pixels")
    need_content(np.asarray(grey))
    return Picture(width, height, grey)


def need_content(greys: np.ndarray) -> None:
    """Raise Unfair for what is nearly one colour."""
    if greys.std() < PLAIN:
        raise Unfair("nearly one colour")


def need_difference(one: np.ndarray, other: np.ndarray, reason: str) -> None:
    """Raise Unfair for greys of the same shape (..., H, W) that look alike, any pair of them."""
    if (np.abs(one - other) > VISIBLE).mean(axis=(-2, -1)).min() < PART:
        raise Unfair(reason)


# --- the tasks: a picture and the answer that is to be right -> the images of the question ------------------------

QUARTERS = ("top left", "top right", "bottom left", "bottom right")
PIECES = ("image 2", "image 3", "image 4", "image 5")
ORDERS = tuple("-".join(order) for order in permutations("123"))
TURNS = {
    "not at all": None,
    "a quarter turn clockwise": "rotate_270",  # Pillow counts counterclockwise
    "half a turn": "rotate_180",
    "a quarter turn counterclockwise": "rotate_90",
}


def crop(picture: Picture, answer: str, rng: random.Random) -> list[Edit]:
    """The picture, and three quarters of the width and height of one of its quarters, from anywhere in it."""
    place, width, height = QUARTERS.index(answer), picture.width // 2, picture.height // 2
    w, h, side = width * 3 // 4, height * 3 // 4, SIDE * 3 // 8
    x, y = rng.randint(0, width - w), rng.randint(0, height - h)
    box = (place % 2 * width + x, place // 2 * height + y, w, h)
    part = picture.look(box, side, side)
    need_content(part)
    quarters = picture.greys.reshape(2, SIDE // 2, 2, SIDE // 2).swapaxes(1, 2)
    others = np.delete(quarters.reshape(4, SIDE // 2, SIDE // 2), place, axis=0)
    need_difference(sliding_window_view(others, (side, side), (1, 2)), part, "like a part of another quarter")
    return [picture.show(picture.whole), picture.show(box)]


def gap(picture: Picture, answer: str, rng: random.Random) -> list[Edit]:
    """The picture with a ninth of it hidden, and four ninths: the hidden one and others."""
    width, height, side = picture.width // 3, picture.height // 3, SIDE // 3
    ninths = [(column * width, row * height, width, height) for row in range(3) for column in range(3)]
    hidden, *others = rng.sample(ninths, len(PIECES))
    top, left = hidden[1] // height * side, hidden[0] // width * side
    rim = np.pad(picture.greys, 1, constant_values=np.nan)  # nothing is around a picture
    rim = rim[top : top + side + 2, left : left + side + 2]
    rim = [rim[0, 1:-1], rim[-1, 1:-1], rim[1:-1, 0], rim[1:-1, -1]]
    pieces = [picture.look(box, side, side) for box in (hidden, *others)]
    edges = [(piece[0], piece[-1], piece[:, 0], piece[:, -1]) for piece in pieces]
    seams = np.nanmean(np.abs(np.array(edges) - rim), axis=(1, 2))  # of each piece in the gap
    if seams[1:].min() - seams[0] < SEAM:
        raise Unfair("another part fits as well")
    others.insert(PIECES.index(answer), hidden)
    return [picture.show(picture.whole, gap=hidden), *map(picture.show, others)]


def strips(picture: Picture, answer: str, rng: random.Random) -> list[Edit]:
    """The picture in three columns in another order, or in its own: that is an answer as any other."""
    columns = picture.greys.reshape(SIDE, 3, SIDE // 3)
    first, last = columns[:, :, 0], columns[:, :, -1]  # (SIDE, 3) each: the edges of the strips
    seams = np.abs(last[:, :, None] - first[:, None, :]).mean(axis=0)  # (3, 3): one strip, and which is to its right
    own, *others = (seams[a, b] + seams[b, c] for a, b, c in permutations(range(3)))
    if min(others) - own < SEAM:
        raise Unfair("another order fits as well")
    shown = [answer.split("-").index(number) for number in "123"]  # the strip of the picture at each place
    return [picture.show((0, 0, picture.width // 3 * 3, picture.height), strips=tuple(shown))]


def turn(picture: Picture, answer: str, rng: random.Random) -> list[Edit]:
    """The square in the middle of the picture, twice, since the shape of an oblong would give the turn away."""
    side = min(picture.width, picture.height)
    square = ((picture.width - side) // 2, (picture.height - side) // 2, side, side)
    greys = picture.look(square, SIDE, SIDE)
    need_difference(np.stack([np.rot90(greys), np.rot90(greys, 2)]), greys, "the same when turned")
    return [picture.show(square), picture.show(square, transpose=TURNS[answer])]


def mirror(picture: Picture, answer: str, rng: random.Random) -> list[Edit]:
    """The picture twice."""
    need_difference(picture.greys, picture.greys[:, ::-1], "the same when mirrored")
    flip = "flip_left_right" if answer == "yes" else None
    return [picture.show(picture.whole), picture.show(picture.whole, transpose=flip)]


class Task(NamedTuple):
    """A question, its possible answers, and what makes its images for a given answer, which may raise Unfair."""

    question: str
    answers: Sequence[str]
    make: Callable[[Picture, str, random.Random], list[Edit]]


TASKS = {
    "crop": Task("The second image is a part of the first one. Where in the first image is it?", QUARTERS, crop),
    "gap": Task("A grey box hides a part of the first image. Which of the other images is that part?", PIECES, gap),
    "strips": Task(
        "The image was cut into three strips from top to bottom, and these may have been shuffled. The strips are "
        "numbered 1, 2, 3 from left to right as they are now. In which order, from left to right, do they make the "
        "original image?",
        ORDERS,
        strips,
    ),
    "turn": Task(
        "Both images show the same picture. How was it turned from the first image to the second?", tuple(TURNS), turn
    ),
    "mirror": Task("Is the second image the first one mirrored, with left and right exchanged?", ("yes", "no"), mirror),
}


# --- rows ---------------------------------------------------------------------------------------------------------


def deal(task: Task, rng: random.Random) -> list[tuple[str, int]]:
    """Answers, and at which place among the options each is listed: every answer and every place equally often."""
    places = min(LISTED, len(task.answers))
    count = math.lcm(places, len(task.answers))
    all_answers = rng.sample(list(task.answers) * (count // len(task.answers)), count)
    return list(zip(all_answers, list(range(places)) * (count // places), strict=True))


def ask(picture: Picture, task: Task, answer: str, place: int, rng: random.Random) -> tuple[list[str], list[Edit]]:
    """The options of a question in their order, and its images. Raises Unfair."""
    edits = task.make(picture, answer, rng)
    options = rng.sample([other for other in task.answers if other != answer], min(LISTED, len(task.answers)) - 1)
    options.insert(place, answer)
    return options, edits


def iter_records(
    paths: Iterable[Path], folder: Path, tasks: Sequence[str], seed: int, seen: set[bytes], left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The questions about pictures, in the order of these, as records in SAT's form.

    Args:
        folder: of the file that they are written to: paths start there.
        tasks: names in TASKS.
        seen: digests of the pictures before; these are added.
        left_out: pictures and questions by the reason; these are added.
    """
    rng = random.Random(seed)
    cards: dict[str, list[tuple[str, int]]] = {name: [] for name in tasks}
    for path in paths:
        try:
            picture = read_picture(path)
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest in seen:
                raise Unfair("a copy of another")
        except (BrokenImage, Unfair) as error:
            left_out[f"picture: {getattr(error, 'reason', error)}"] += 1
            continue
        seen.add(digest)
        for name in tasks:
            cards[name] = cards[name] or deal(TASKS[name], rng)
            for card in cards[name]:
                try:
                    options, edits = ask(picture, TASKS[name], *card, rng)
                except Unfair as unfair:
                    reason = str(unfair)
                    continue
                cards[name].remove(card)
                images = [f"{os.path.relpath(path, folder)}{edit}" for edit in edits]
                yield to_record(Example(TASKS[name].question, tuple(options), card[0], name, ()), images)
                break
            else:
                left_out[f"{name}: {reason}"] += 1


def make_records(
    images: Path,
    folder: Path,
    rows: int | None = None,
    tasks: Sequence[str] = tuple(TASKS),
    seed: int = 0,
    held_out: float = HELD_OUT,
) -> dict[str, list[dict[str, Any]]]:
    """The questions about a folder of pictures, and in print how many were left out and why.

    Args:
        images: the folder, searched with all folders in it.
        folder: see `iter_records`.
        rows: of both splits together, at most; None: as many as the pictures give.
        tasks: names in TASKS.
        held_out: the share of pictures, and of rows, that only `test` asks about.

    Returns:
        The records of `train` and of `test`, at least one each.

    Raises:
        Mistake: no pictures, or no question can be asked about them.
    """
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(found) < 2:
        raise Mistake(f"{images}: {len(found)} pictures ({', '.join(SUFFIXES)}); expected a folder with two at least")
    random.Random(seed).shuffle(found)
    first = min(max(round(held_out * len(found)), 1), len(found) - 1)
    is_main = is_main_process()  # all processes of a launch read the same
    seen, left_out, records = set(), Counter(), {}
    for split, paths, part in (("train", found[first:], 1 - held_out), ("test", found[:first], held_out)):
        with tqdm(paths, unit=" pictures", desc=split, disable=not is_main) as bar:
            made = iter_records(map(Path.absolute, bar), folder.absolute(), tasks, seed, seen, left_out)
            records[split] = list(islice(made, rows and max(round(part * rows), 1)))
    for what, count in left_out.most_common() if is_main else ():
        print(f"left out: {count} x {what}")
    if not all(records.values()):
        raise Mistake(f"{images}: no fair question about its pictures; see what was left out")
    return records


@lru_cache(maxsize=4)  # both splits are made at once
def _records_of_folder(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return make_records(folder, folder)


def read_pretext(folder: Path, split: str) -> list[dict[str, Any]]:
    """The records of one split, `train` or `test`, of a folder of pictures: every task, and the command's defaults."""
    records = _records_of_folder(folder)
    if split not in records:
        raise Mistake(f"{folder}: split {split}: pictures are split into {' and '.join(records)}")
    return records[split]


def held_out_file(output: Path) -> Path:
    """Where the questions about held-out pictures are: `pretext.json` -> `pretext_held_out.json`."""
    return output.with_name(f"{output.stem}_held_out{output.suffix}")


def write_pretext(images: Path, output: Path, **settings: Any) -> None:
    """Write what `make_records` makes: `train` to the output, `test` to its `held_out_file`; say what is in them.

    Raises:
        Mistake: as `make_records`; or there is such a file already.
    """
    files = {"train": output, "test": held_out_file(output)}
    for file in files.values():
        if file.exists():
            raise FileMistake(f"{file} is there; name another file or delete it")
    made = make_records(images, output.parent, **settings)
    output.parent.mkdir(parents=True, exist_ok=True)
    for split, records in made.items():
        replace_file(files[split], b"[\n" + b",\n".join(to_json(record).rstrip() for record in records) + b"\n]\n")
        kinds = Counter(record["question_type"] for record in records)
        chance = sum(1 / len(record["options"]) for record in records) / len(records)
        of_each = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        print(f"{files[split]}: {len(records)} questions ({of_each}), guessing answers {chance:.1%} of them")


def share(text: str) -> float:
    """A command line's number between 0 and 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, not {text!r}")
    return value


def parse_args() -> argparse.Namespace:
    parser = command_line(__doc__, prog="python -m open_r1.tasks.pretext")
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder of pictures, in which all its folders are searched")
    add("--output", type=Path, required=True, help="the JSON file to train on; NAME_held_out.json goes beside it")
    add("--rows", type=positive, help="questions at most, of both files together (default: all that the pictures give)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    add(
        "--held_out", type=share, default=HELD_OUT, help="share of pictures in the held-out file (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="another seed, other questions (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run(lambda: write_pretext(**vars(parse_args())))
