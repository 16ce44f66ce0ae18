"""Run the shipped recipes at Qwen2-VL-2B's size or a smaller one's, a step each; `scripts/dev/rehearse.sh` starts it.

Each phase is a command as a user types it. Seconds are of the whole command. Peak memory is that of its largest process
(on a GPU: of the card with most memory in use). The forecast is the doctor's for the same recipe and lengths, with the
memory of the libraries on this machine added. The table is printed and left in `rehearsal.json`.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
PACKAGE = SCRIPTS.parent / "src/open-r1-multimodal"
sys.path[:0] = [str(PACKAGE), str(SCRIPTS)]
from open_r1.base.errors import REPO_ROOT, Mistake, run, use_environment

use_environment()

import psutil
import torch
from PIL import Image

from benchmarks.published import MODELS
from open_r1.base.files import MADE_BY, check_replaceable, replace_file
from open_r1.models.loading import load_processor
from open_r1.models.memory import free_memory
from open_r1.running.data import count_prompt_tokens
from open_r1.tasks.examples import read_examples

# Without a GPU: one process, short completions and one prompt a step. Everything else is the recipe's.
CPU_LENGTHS = {
    "grpo": ["--max_completion_length", "24", "--completions_per_step", "8"],
    "sft": [],
    "smolvlm": ["--max_completion_length", "64"],  # a whole step, 8 prompts x 8 completions
}


@dataclass(frozen=True)
class Phase:
    """A command of the rehearsal.

    Attributes:
        name: in the table.
        command: as a user types it.
        env: what is set for it.
        run: the folder of a training run, whose log has the seconds of a step.
        forecast: the doctor's arguments, where it knows the phase.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    run: Path | None = None
    forecast: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """What a phase took: seconds, bytes; `note` says why a phase was left out."""

    phase: str
    seconds: float | None = None
    peak: int | None = None
    forecast: float | None = None
    step: dict[str, float] | None = None
    note: str = ""


# --- what is measured -----------------------------------------------------------------------------


def wait(process: subprocess.Popen) -> int:
    """Wait for a process; returns the most bytes meanwhile on any card, or without one in any process of its."""
    most = 0
    while process.poll() is None:
        most = max([most, *(on_cards() if torch.cuda.is_available() else in_processes(process.pid))])
        time.sleep(0.1)
    return most


def on_cards() -> list[int]:
    """Bytes in use on each card."""
    sizes = (torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count()))
    return [total - free for free, total in sizes]


def in_processes(root: int) -> list[int]:
    """The peak so far of a process and of each of its descendants, in bytes."""
    peaks = []
    with suppress(psutil.NoSuchProcess):
        root_process = psutil.Process(root)
        for process in (root_process, *root_process.children(recursive=True)):
            with suppress(OSError, StopIteration):  # it ended meanwhile
                peaks.append(peak_of(Path(f"/proc/{process.pid}/status").read_text()))
    return peaks


def peak_of(status: str) -> int:
    """Bytes of VmHWM in proc_pid_status(5)."""
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(phase: Phase, log: Path) -> Row:
    """Run a phase to its end.

    Raises:
        Mistake: it failed; the end of what it printed is shown.
    """
    print(f"== {phase.name}", flush=True)
    start = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*map(str, phase.command)], env={**os.environ, **phase.env}, stdout=file, stderr=subprocess.STDOUT
        )
        peak = wait(process)
    seconds = time.perf_counter() - start
    if process.returncode:
        print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), file=sys.stderr)
        raise Mistake(f"{phase.name}: exit code {process.returncode}; the end of {log} is above")
    forecast_bytes = forecast(phase.forecast) if phase.forecast else None
    return Row(phase.name, seconds, peak, forecast_bytes, last_step(phase.run) if phase.run else None)


def last_step(folder: Path) -> dict[str, float]:
    """The seconds of the parts of a run's last step, from its log; an SFT step has one part."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    step = [row for row in rows if "loss" in row][-1]
    parts = {key.removeprefix("time/"): value for key, value in step.items() if key.startswith("time/")}
    return parts | ({"step": step["step_time"]} if "step_time" in step else {})


def forecast(arguments: Sequence[str]) -> float:
    """The doctor's count in bytes, with what the libraries alone take beside a CPU process."""
    command = [sys.executable, REPO_ROOT / "scripts/doctor.py", "--memory", "--json", *arguments]
    counted = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak"]
    return counted + (0 if torch.cuda.is_available() else libraries())


def libraries() -> int:
    """Bytes that a training process takes before it has a model."""
    code = "import deepspeed, open_r1.grpo; print(open('/proc/self/status').read())"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return peak_of(output)


def cpu_dtype() -> str:
    """What this processor multiplies fastest: bfloat16 where it has the instructions, else float32."""
    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("amx_bf16") or has.get("avx512_bf16") else "float32"


# --- the phases -----------------------------------------------------------------------------------


def prepare(folder: Path) -> list[Phase]:
    """Scenes at SAT's size, prepared as SAT is, and a benchmark of the same kind."""
    world = [sys.executable, "-m", "open_r1.world", "--level", "full"]
    return [
        Phase("render 32 scenes", [*world, "--rows", "32", "--output", folder / "SAT_train.parquet"], {}),
        Phase(
            "prepare_dataset.sh",
            ["sh", REPO_ROOT / "src/data/SAT/prepare_dataset.sh", "--total_num", "32", "--output_dir", folder / "data"],
            {"SAT_PARQUET": str(folder / "SAT_train.parquet")},
        ),
        Phase("render a benchmark", [*world, "--schema", "cvbench", "--rows", "8", "--output", folder / "cvbench"], {}),
    ]


def training(folder: Path, model: str, sizes: Sequence[str], size: str = "qwen2_vl_2b") -> list[Phase]:
    """The shipped recipes, a step each and one to resume.

    Args:
        folder: of the rehearsal, with its prepared data.
        model: name or folder.
        sizes: the doctor's arguments for the longest prompt and largest image of these data.
        size: of `published.MODELS`.
    """
    on_gpu = torch.cuda.is_available()

    def phase(name: str, recipe: str, steps: int, *overrides: str, launch: str = "", dtype: str = cpu_dtype()) -> Phase:
        kind = recipe.split("_")[0]
        script = "run_sft.sh" if kind == "sft" else "run_grpo_SAT.sh"
        output = folder / "-".join([recipe, *(part.strip("-") for part in overrides)][:2])
        overrides = (*overrides, *(() if on_gpu else (*("--dtype", dtype), *CPU_LENGTHS[kind])))
        config = REPO_ROOT / f"configs/{recipe}.yaml"
        env = {"CONFIG": config, "MODEL": model, "DATA": folder / "data/SAT_train_32.json", "OUTPUT": output}
        processes = str(torch.cuda.device_count() or 1)
        env |= {"NUM_PROCESSES": processes, "ACCELERATE_CONFIG": launch or ("zero2" if on_gpu else "cpu")}
        counted = ["--config", config, "--model_name_or_path", model, "--num_processes", processes, *overrides, *sizes]
        counted += ["--accelerate_config", launch or "zero2"] + ([] if on_gpu else ["--cpu"])
        return Phase(
            name,
            ["sh", PACKAGE / script, "--max_steps", str(steps), "--save_steps", "1", *overrides],
            {key: str(value) for key, value in env.items()},
            output,
            [str(part) for part in counted],
        )

    if size == "smolvlm_256m":
        return [phase("GRPO, everything trained, a step", "smolvlm_256m", 1, launch="ddp", dtype="float32")]
    phases = [
        phase("GRPO with LoRA, a step", "grpo_sat_lora", 1),
        phase("the same, resumed for another", "grpo_sat_lora", 2),
        phase("SFT with LoRA, a step", "sft_sat_lora", 1),
    ]
    if on_gpu:
        return [*phases, phase("GRPO, everything trained, a step", "grpo_sat", 1)]
    # Float32 weights, or DeepSpeed's float32 copies, of 1.5 B trained parameters need more than most machines have;
    # plain AdamW on bfloat16 weights loses small updates, but takes the same steps.
    name, frozen = "SFT, vision frozen, all else trained, a step", ("--freeze_vision", "true")
    return [*phases, phase(name, "sft_sat", 1, *frozen, launch="ddp", dtype="bfloat16")]


def using(folder: Path, size: str = "qwen2_vl_2b") -> list[Phase]:
    """What is done with a trained adapter, or with a model that was trained whole."""
    merged = folder / ("smolvlm_256m" if size == "smolvlm_256m" else "merged")
    results = folder / "results"
    evaluate = [sys.executable, REPO_ROOT / "src/eval/test_qwen2vl_CVBench.py", "--model_path", merged]
    evaluate += ["--dataset_path", folder / "cvbench", "--output_dir", results, "--limit", "4"]
    evaluate += [] if torch.cuda.is_available() else ["--max_new_tokens", "24", "--dtype", cpu_dtype()]
    adapter = folder / "grpo_sat_lora"
    export = [sys.executable, REPO_ROOT / "scripts/export.py", "--adapter", adapter, "--output", merged]
    exported = [] if size == "smolvlm_256m" else [Phase("export: merge the adapter", export, {})]
    return [*exported, Phase("evaluate 4 questions", evaluate, {})]


def measure_data(model: str, json_path: Path, chat_template: str = "base") -> list[str]:
    """The longest prompt and the largest image of prepared examples, as the doctor's arguments."""
    processor = load_processor(model, chat_template=chat_template, max_pixels=401408)
    examples = read_examples(json_path)
    longest = max(count_prompt_tokens(example, processor) for example in examples)
    pixels = 0
    for example in examples:
        for path in example["images"]:
            with Image.open(path) as image:
                pixels = max(pixels, image.width * image.height)
    return ["--max_prompt_length", str(longest), "--max_pixels", str(min(pixels, 401408))]


def rehearse(folder: Path, model: str | None, size: str = "qwen2_vl_2b") -> list[Row]:
    """All phases, one after the other; a training that does not fit is left out and says so."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    log = folder / "last_phase.log"

    if model is None:
        model = str(folder / "model")
        if not (folder / "model/processor_config.json").is_file():  # written last
            code = "from open_r1.base.errors import run; from benchmarks import published; run(published.main)"
            build = [sys.executable, "-c", code, "--model", size, "--output", model]
            env = {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(PACKAGE)])}
            rows.append(measure(Phase("build the model", build, env), log))
    rows += [measure(phase, log) for phase in prepare(folder)]
    for pattern in ("grpo_*", "sft_*", "smolvlm_*", "merged", "results"):  # of an earlier rehearsal
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    template = "base" if size == "qwen2_vl_2b" else "instruct"
    for phase in training(folder, model, measure_data(model, folder / "data/SAT_train_32.json", template), size):
        needed = forecast(phase.forecast)
        if needed > (free := free_memory(on_cpu=not torch.cuda.is_available())):
            note = f"left out: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            rows.append(Row(phase.name, forecast=needed, note=note))
            print(f"== {phase.name}: {note}")
            continue
        rows.append(measure(phase, log))
    rows += [measure(phase, log) for phase in using(folder, size)]
    log.unlink()
    return rows


def table(rows: Sequence[Row]) -> str:
    """The figures as a Markdown table."""
    lines = ["| phase | seconds | peak memory, GB | forecast, GB | a step |", "|---|---|---|---|---|"]
    for row in rows:
        seconds = "-" if row.seconds is None else f"{row.seconds:.0f}"
        peak, forecast_size = ("-" if size is None else f"{size / 1e9:.1f}" for size in (row.peak, row.forecast))
        step = ", ".join(f"{name} {duration:.1f} s" for name, duration in (row.step or {}).items())
        lines.append(f"| {row.phase} | {seconds} | {peak} | {forecast_size} | {step or row.note or '-'} |")
    return "\n".join(lines)


def machine() -> str:
    """What this was measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU"


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        prog="rehearse.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=REPO_ROOT / "outputs/rehearsal", help="(default: %(default)s)")
    parser.add_argument(
        "--size", choices=MODELS, default="qwen2_vl_2b", help="model whose size is taken (default: %(default)s)"
    )
    args = parser.parse_args()
    model = os.environ.get("MODEL")
    path = args.output / "rehearsal.json"
    check_replaceable(path)
    rows = rehearse(args.output, model, args.size)
    result = {
        "made_by": MADE_BY,
        "date": date.today().isoformat(),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "model": model or f"random weights of {MODELS[args.size].name}'s size",
        "phases": [asdict(row) for row in rows],
    }
    replace_file(path, json.dumps(result, indent=1).encode() + b"\n")
    print(f"{result['machine']}, {result['date']}, {result['model']}\n\n{table(rows)}\n\n{path}")


if __name__ == "__main__":
    run(main, stopped="every finished phase is in OUTPUT")
