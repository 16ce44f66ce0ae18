"""Make the report of a run that is finished, was killed or still goes on: one page that opens from disk.

python scripts/report.py outputs/grpo_sat
python scripts/report.py outputs/grpo_sat --output report.html
python scripts/report.py outputs/grpo_sat outputs/grpo_sat_lora    the curves of several runs on one page
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import command_line, printable, run, use_environment

use_environment()

from open_r1.reporting.overlay import write_pages


def main() -> None:
    """Command line entry point."""
    parser = command_line(__doc__)
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folder that training wrote (its output_dir); several give one page with their curves",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="page to write (default: report.html in RUN; for several runs, runs.html in the current folder)",
    )
    args = parser.parse_args()
    print(printable(write_pages(args.runs, args.output)))


if __name__ == "__main__":
    run(main)
