#!/bin/sh
# SAT -> src/data/SAT/SAT_{fold}_{N}.json and its images.
#
#   bash prepare_dataset.sh                        the paper's: fold train, 15000 single-image examples
#   FOLD=val bash prepare_dataset.sh               another fold: train, static, val or test
#   SAT_PARQUET=my.parquet bash prepare_dataset.sh a local file instead of the Hub's
#   bash prepare_dataset.sh --total_num 1000       further arguments go to process_dataset.py (see its --help)
#
# An interrupted download is resumed; an interrupted preparation starts anew, which takes seconds. The environment
# variable PYTHON chooses the interpreter.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
fold=${FOLD:-train}

fail() {
    echo "prepare_dataset: error: $1" >&2
    exit 1
}

case $fold in
    train | static | val | test) ;;
    *) fail "FOLD=$fold: expected train, static, val or test" ;;
esac
for argument in "$@"; do
    case $argument in
        --fold | --fold=* | --parquet | --parquet=*) fail "${argument%%=*}: set FOLD or SAT_PARQUET in the environment instead" ;;
    esac
done

ROOT=$(CDPATH='' cd -- "$here/../../.." && pwd)
. "$ROOT/scripts/env.sh"
need_packages

! asks_help "$@" || exec "$PYTHON" "$here/process_dataset.py" --help

parquet=${SAT_PARQUET:-$here/SAT_$fold.parquet}
if [ -z "${SAT_PARQUET:-}" ] && [ ! -f "$parquet" ]; then
    # The Hub's client moves the file into place when it is whole, so a file that is there is complete.
    "$PYTHON" - "SAT_$fold.parquet" "$here" <<'EOF'
import sys

import httpx  # what the Hub's client speaks through
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

filename, folder = sys.argv[1:]
print(f"Fetching {filename} of array/SAT from the Hub.", flush=True)
try:
    hf_hub_download("array/SAT", filename, repo_type="dataset", local_dir=folder)
except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
    unreachable = isinstance(error, LocalEntryNotFoundError)
    reason = "the Hub cannot be reached" if unreachable else str(error).strip().split("\n")[0]
    sys.exit(
        f"prepare_dataset: error: could not fetch {filename} of array/SAT ({reason}); the same command continues "
        "the download, and SAT_PARQUET=/path/to/file uses a local file instead"
    )
except KeyboardInterrupt:
    sys.exit(130)
EOF
fi

exec "$PYTHON" "$here/process_dataset.py" --fold "$fold" --parquet "$parquet" "$@"
