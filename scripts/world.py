"""Render a spatial world in SAT's or CV-Bench's schema: `python -m open_r1.world` without activating an environment.

python scripts/world.py --output world.parquet --rows 2000 --level full
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import use_environment

use_environment()

if __name__ == "__main__":
    runpy.run_module("open_r1.world", run_name="__main__")
