#!/bin/sh
# An evening on a laptop: a real language model, SmolLM2-135M-Instruct, learns to see rendered scenes, then to answer
# after a thought (a cold start by SFT), and is then trained by GRPO with the paper's two rewards. At the end a table
# compares the accuracy after each stage. It needs no GPU and no model hub: the weights come from the package index.
# Because of the cold start it is no R1-Zero.
#
#   bash scripts/laptop.sh                  into outputs/laptop
#   bash scripts/laptop.sh --seeds "0 1 2"  seeds of GRPO and of Dr. GRPO (default: 0)
#   bash scripts/laptop.sh --rehearsal      tries whether everything runs here: two steps of each part, into
#                                           outputs/laptop-rehearsal; the figures mean nothing
#
# Training and evaluation use the scripts of the real run. The recipes are in configs/laptop, all else in scripts/laptop.
# It stops in a line if the model sees too little, or if the cold start is no better than guessing. After an interruption
# the same command goes on where it was. On two cores it takes about 35 minutes to GRPO's start, 45 for each seed, and 10
# for the rest (docs/measured.md has the times of its parts).
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/scripts/env.sh"
. "$ROOT/scripts/tiny_world.sh"

fail() {
    echo "laptop: error: $*" >&2
    exit 2
}

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$ROOT/scripts/laptop.sh"
}

step() {
    echo
    echo "== $1/8 $2 ($(($(date +%s) - START)) s)"
}

# A training script with a recipe of configs/laptop; of the precision the command line decides on a CPU.
train() { # script, recipe and overlays, folder, further arguments
    script=$1 config=$2 folder=$3
    shift 3
    CONFIG="$config" OUTPUT="$folder" sh "$ROOT/src/open-r1-multimodal/$script" --dtype bfloat16 "$@" $SHORT
}

# A model's answers to CV-Bench's kinds of questions, which GRPO is not trained on.
evaluate() { # model, folder of the result, further arguments
    model=$1 folder=$2
    shift 2
    evaluate_in_tiny_world "$RUN" "$folder" "$model" --dtype bfloat16 --prompt base $FEW "$@"
}

# Its answers to unseen questions of SAT's kinds, which GRPO is trained on.
evaluate_on_sat() { # model, folder of the result
    evaluate "$1" "$2" --benchmark SAT-test --dataset_path "$RUN/sat"
}

# LoRA on top of a model, merged into it: one more folder, which is there when all of it is done.
learn() { # recipe, model to begin with, rows, folder of the outcome
    [ -d "$4" ] || {
        MODEL=$2 DATA=$3 train run_sft.sh "configs/laptop/$1.yaml" "$4_lora"
        "$PYTHON" "$ROOT/scripts/export.py" --adapter "$4_lora" --output "$4"
    }
}

write_lessons() { # lesson, rows, seed
    [ -f "$RUN/$1/rows.json" ] ||
        "$PYTHON" "$ROOT/scripts/laptop/lessons.py" "$1" --rows "$2" --seed "$3" --output "$RUN/$1"
}

# A check that ends the evening, but not a rehearsal, where nothing was learned.
must() {
    "$PYTHON" "$@" || [ -n "$SHORT" ]
}

sat_result() { # arm, seed
    echo "$RUN/results/$1/SAT-test_result_seed$2_reasoning.json"
}

# xargs starts this script anew for each run of GRPO, as `laptop.sh --run ARM SEED`, with the rest in the environment.
if [ "${1:-}" = --run ]; then
    folder="$RUN/$2/seed$3"
    log="$folder.log" # `evaluate` sets folder
    [ ! -f "$(sat_result "$2" "$3")" ] || exit 0
    mkdir -p "$folder"
    overlay=""
    [ "$2" = grpo ] || overlay="configs/overlays/$2.yaml"
    echo "$2, seed $3: started"
    {
        MODEL="$RUN/start" DATA="$RUN/data/SAT_train_2000.json" train run_grpo_SAT.sh \
            "configs/laptop/grpo.yaml $overlay" "$folder" --eval_dataset_name "$RUN/data/SAT_val_$HELD_OUT.json" \
            --seed "$3" ${SHORT:+--completions_per_step 8 --per_device_train_batch_size 8 --max_completion_length 16} &&
            evaluate "$folder" "$folder" && evaluate_on_sat "$folder" "$RUN/results/$2"
    } >>"$log" 2>&1 || fail "$2, seed $3 failed; $log says why"
    echo "$2, seed $3: done"
    exit
fi

if asks_help "$@"; then
    usage
    exit
fi
RUN="$ROOT/outputs/laptop" seeds=0 SHORT="" FEW="" captions=3840 answers=1600 HELD_OUT=64
while [ $# -gt 0 ]; do
    case $1 in
        --seeds)
            seeds=${2:-}
            case $seeds in "" | *[!0-9\ ]*) fail "--seeds: expected whole numbers between blanks, not '$seeds'" ;; esac
            shift
            ;;
        --rehearsal)
            RUN="$ROOT/outputs/laptop-rehearsal" captions=64 answers=64 HELD_OUT=8
            SHORT="--max_steps 2" FEW="--limit 16 --max_new_tokens 16"
            ;;
        *) fail "unknown argument $1; --help lists them" ;;
    esac
    shift
done
START=$(date +%s)
step 1 "set up"
sh "$ROOT/setup.sh"
. "$ROOT/scripts/env.sh"
install_language_model
cd "$ROOT" # where recipes are looked up
export PYTHON RUN SHORT FEW HELD_OUT HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=-1
export NUM_PROCESSES=1 NUM_MACHINES=1 ACCELERATE_CONFIG=ddp
# glibc returns the memory of large tensors and asks for it again; to keep it saves a sixth of an update's time.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
results="$RUN/results"

step 2 "the language model, in the shape of a Qwen2-VL; until it is trained, images mean nothing to it"
[ -d "$RUN/blind" ] || "$PYTHON" "$ROOT/scripts/laptop/language_model.py" --output "$RUN/blind"
[ -d "$RUN/first_words" ] ||
    "$PYTHON" "$ROOT/scripts/laptop/first_words.py" --model "$RUN/blind" --output "$RUN/first_words"

step 3 "scenes: captions, reasoned answers, and questions in SAT's and CV-Bench's schemas"
prepare_tiny_world "$RUN"
FOLD=val SAT_PARQUET="$RUN/SAT_val.parquet" sh "$ROOT/src/data/SAT/prepare_dataset.sh" --total_num "$HELD_OUT" \
    --output_dir "$RUN/data"
render_scenes "$RUN/sat/SAT_test.parquet" 512 4 --output "$RUN/sat/SAT_test.parquet"
write_lessons captions "$captions" 31
write_lessons answers "$answers" 32

step 4 "sight: run_sft.sh on captions"
learn sft_sight "$RUN/first_words" "$RUN/captions/rows.json" "$RUN/sight"
must "$ROOT/scripts/laptop/sight.py" --model "$RUN/sight" --output "$results/sight.json" ${SHORT:+--scenes 4}

step 5 "cold start: run_sft.sh on reasoned answers"
learn sft_cold_start "$RUN/sight" "$RUN/answers/rows.json" "$RUN/start"
evaluate "$RUN/start" "$results"
must "$ROOT/scripts/laptop/start.py" "$results/CVBench_result_start_reasoning.json"

step 6 "GRPO and Dr. GRPO: run_grpo_SAT.sh from the cold start, a run a core"
for seed in $seeds; do
    for arm in grpo dr_grpo; do
        echo "$arm $seed"
    done
done | OMP_NUM_THREADS=1 xargs -P "$(getconf _NPROCESSORS_ONLN)" -n 2 sh "$ROOT/scripts/laptop.sh" --run

step 7 "what it was before: blind, with sight alone, and at GRPO's start"
evaluate "$RUN/blind" "$results"
evaluate "$RUN/sight" "$results"
for model in blind sight start; do
    evaluate_on_sat "$RUN/$model" "$results"
done

step 8 "compare"
set --
for model in start blind sight; do
    set -- "$@" --model "$model" "$results"/*"_result_${model}_reasoning.json"
done
runs=""
for arm in grpo dr_grpo; do
    set -- "$@" --model "$arm"
    for seed in $seeds; do
        set -- "$@" "$RUN/$arm/seed$seed/CVBench_result_seed${seed}_reasoning.json" "$(sat_result "$arm" "$seed")"
        runs="$runs $arm/seed$seed"
    done
done
"$PYTHON" "$ROOT/scripts/laptop/table.py" "$@"
(cd "$RUN" && "$PYTHON" "$ROOT/scripts/sweep.py" $runs --output "$RUN")
echo
echo "curves and completions: report.html in each of $RUN/*/seed*"
echo "done in $(($(date +%s) - START)) s"
