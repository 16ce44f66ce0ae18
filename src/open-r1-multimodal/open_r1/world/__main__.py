"""The command that renders a spatial world: seeded scenes that ask what SAT and CV-Bench ask.

    python -m open_r1.world --output SAT_train.parquet --rows 2000 --level easy
    python -m open_r1.world --output cvbench/ --rows 400 --level full --schema cvbench

Coloured solids stand on a floor and a pinhole camera looks at them. Every answer follows from the geometry,
and a scene in which it would be a matter of taste (two distances about equal, an object half hidden, a side
that image and floor plan disagree about) is thrown away and drawn again. Row i depends on the seed and on i
alone. No torch.
"""

import argparse
from pathlib import Path

from open_r1.base.errors import command_line, positive, run
from open_r1.base.files import check_replaceable
from open_r1.tasks.benchmarks.choice import CVBENCH_FILES
from open_r1.world import scene
from open_r1.world.parquet import write_cvbench, write_sat
from open_r1.world.questions import QUESTIONS, STATIC


def parse_args() -> argparse.Namespace:
    coordinates = scene.__doc__.partition("\n")[2]  # what they mean
    parser = command_line(__doc__ + coordinates, prog="python -m open_r1.world")
    add = parser.add_argument
    add("--output", type=Path, required=True, help="sat: the file; cvbench: the folder of its two files")
    add("--rows", type=positive, default=1000, help="questions, of both files together (default: %(default)s)")
    add("--level", choices=scene.LEVELS, default="full", help="easy: 112x112, flat; full: 640x480 (default: full)")
    add("--seed", type=int, default=0, help="another seed, other scenes (default: %(default)s)")
    add("--schema", choices=("sat", "cvbench"), default="sat", help="(default: sat)")
    add(
        "--questions",
        nargs="+",
        choices=QUESTIONS,
        default=STATIC,
        help="sat: the kinds that take turns; rotation has two images (default: all but rotation)",
    )
    args = parser.parse_args()
    if args.schema == "cvbench" and args.rows < len(CVBENCH_FILES):
        parser.error(f"--rows {args.rows}: cvbench has {len(CVBENCH_FILES)} files, and each needs a row")
    return args


def main() -> None:
    args = parse_args()
    level = scene.LEVELS[args.level]
    if args.schema == "sat":
        check_replaceable(args.output)
        write_sat(args.output, args.rows, args.seed, level, args.questions)
    else:
        check_replaceable(*(args.output / name for name in CVBENCH_FILES.values()))
        write_cvbench(args.output, args.rows, args.seed, level)


if __name__ == "__main__":
    run(main, stopped="the unfinished file is gone")
