# Sourced by quickstart.sh, laptop.sh and sweep.sh, with ROOT and PYTHON set: makes the tiny world's data and evaluates
# models on them.

# Scenes in SAT's and CV-Bench's schemas, and SAT's prepared for training; what is there is not made again.
prepare_tiny_world() { # folder
    world=$1
    mkdir -p "$world"
    render_scenes "$world/SAT_train.parquet" 2000 1 --output "$world/SAT_train.parquet"
    render_scenes "$world/SAT_val.parquet" 256 2 --output "$world/SAT_val.parquet"
    render_scenes "$world/cvbench/test_3d.parquet" 600 3 --schema cvbench --output "$world/cvbench"
    SAT_PARQUET="$world/SAT_train.parquet" sh "$ROOT/src/data/SAT/prepare_dataset.sh" --total_num 2000 \
        --output_dir "$world/data"
    FOLD=val SAT_PARQUET="$world/SAT_val.parquet" sh "$ROOT/src/data/SAT/prepare_dataset.sh" --total_num 256 \
        --output_dir "$world/data"
}

render_scenes() { # file that shows it is done, rows, seed, further arguments
    done_when=$1 rows=$2 scenes=$3
    shift 3
    [ -f "$done_when" ] || "$PYTHON" "$ROOT/scripts/world.py" --level easy --rows "$rows" --seed "$scenes" "$@"
}

# Answers to the questions in CV-Bench's schema.
evaluate_in_tiny_world() { # folder of the world, folder of the results, model, further arguments
    world=$1 results=$2 model=$3
    shift 3
    "$PYTHON" "$ROOT/src/eval/test_qwen2vl_CVBench.py" --model_path "$model" --dataset_path "$world/cvbench" \
        --output_dir "$results" --max_new_tokens 96 --bs 128 "$@"
}
