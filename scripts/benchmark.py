"""Measure how fast this repository is against the usual way, in alternating rounds on this machine.

    python scripts/benchmark.py data --rows 15000
    python scripts/benchmark.py eval
    python scripts/benchmark.py step --preset sat-cpu

`data` prepares SAT, `eval` evaluates, `step` is a GRPO step against stock TRL. Medians and their ratio are printed;
`--json FILE` writes every round.
"""

import json
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import command_line, run, use_environment

use_environment()

from benchmarks import data, evaluation
from open_r1.base.files import MADE_BY, check_replaceable, replace_file


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    commands = parser.add_subparsers(required=True)
    data.add_parser(commands)
    evaluation.add_parser(commands)
    if "step" in sys.argv or "--help" in sys.argv:  # it imports torch, which the others start faster without
        from benchmarks import step

        step.add_parser(commands)
    else:
        commands.add_parser("step")  # to be listed
    args = parser.parse_args()
    if args.json is not None and not args.json.parent.is_dir():  # not when all is measured
        parser.error(f"--json: {args.json}: no folder {args.json.parent}")
    if args.json is not None:
        check_replaceable(args.json)
    machine = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    result = {"made_by": MADE_BY, "machine": machine, **args.run(args)}
    if args.json is not None:
        replace_file(args.json, json.dumps(result, indent=2).encode() + b"\n")


if __name__ == "__main__":
    run(main)
