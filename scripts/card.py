"""Write the model card of a run, with the results of its evaluations.

python scripts/card.py outputs/grpo_sat
python scripts/card.py outputs/grpo_sat --results src/eval/results/CVBench_result_grpo_sat_reasoning.json

The card is README.md in the run's folder. Training writes it without the results, and uploads it with --push_to_hub.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import command_line, printable, run, use_environment

use_environment()

from open_r1.reporting.card import write_card


def main() -> None:
    """Command line entry point."""
    parser = command_line(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that training wrote (its output_dir)")
    parser.add_argument("--results", type=Path, nargs="+", default=(), metavar="FILE", help="result files of its model")
    args = parser.parse_args()
    print(printable(write_card(args.run, args.results)))


if __name__ == "__main__":
    run(main)
