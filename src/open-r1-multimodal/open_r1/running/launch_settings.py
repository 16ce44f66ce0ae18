"""Reads from environment variables and arguments how a run is launched: recipes, GPUs, processes, machines.

`launch.sh` says at its head what each variable means. Nothing here imports torch, so that an error
is printed at once.

    read_launch("grpo", "grpo_sat", ["--beta", "0"], {"NUM_PROCESSES": "4", "OUTPUT": "out"})
    -> 4 processes of grpo.py --output_dir out --beta 0 --config .../configs/grpo_sat.yaml
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from open_r1.base.errors import REPO_ROOT, Mistake

FOLDER = REPO_ROOT / "src/open-r1-multimodal"
VARIABLES = {"DATA": "--dataset_name", "OUTPUT": "--output_dir", "MODEL": "--model_name_or_path"}
SHIPPED = REPO_ROOT / "configs"
IN_FLOAT32 = {"dtype": "float32", "bf16": "false"}  # what 16 bits of a recipe in SHIPPED become on a CPU
LISTED_GPU = re.compile(r"^GPU [0-9]+: (.*) \(UUID: GPU-.*\)$", re.MULTILINE)
NVIDIA_SMI_SECONDS = 10
COUNTS = range(1, 10_000)


@dataclass(frozen=True)
class Machine:
    """This machine among those of a launch."""

    rank: int = 0
    count: int = 1
    address: str = ""  # of machine 0, where all meet
    port: int = 0  # 0: any free one


@dataclass(frozen=True)
class LaunchSettings:
    """A launch, of which this machine starts its part."""

    script: Path
    arguments: list[str]  # of the script
    config_file: str  # accelerate's
    num_processes: int  # on all machines
    machine: Machine = Machine()
    is_examined: bool = False  # the doctor looks at it, and nothing starts

    def for_accelerate(self, precision: str) -> list[str]:
        """The arguments of `accelerate launch`, for precision "bf16", "fp16" or (float32) "no"."""
        options = {"config_file": self.config_file, "num_processes": self.num_processes}
        options |= {"mixed_precision": precision, "main_process_port": self.machine.port}
        if self.machine.count > 1:
            options |= {"num_machines": self.machine.count, "machine_rank": self.machine.rank}
            options |= {"main_process_ip": self.machine.address}
            # Each machine starts its own processes, none of another by pdsh.
            options |= {"deepspeed_multinode_launcher": "standard"}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [*arguments, str(self.script), *self.arguments]

    def for_doctor(self) -> list[str]:
        """The arguments of `scripts/doctor.py`."""
        return [
            *("--script", self.script.stem, "--accelerate_config", self.config_file),
            *("--num_processes", str(self.num_processes), "--num_machines", str(self.machine.count)),
            *self.arguments,
        ]


def read_launch(name: str, recipe: str, arguments: Sequence[str], environ: MutableMapping[str, str]) -> LaunchSettings:
    """What a command and its environment ask for, as far as this machine can do it.

    Args:
        name: of the training script, "grpo" or "sft".
        recipe: the name of its recipe, for an environment that names none.
        arguments: of the command.
        environ: the environment variables; what the processes of the launch need is set in them.
    """
    without_doctor = [argument for argument in arguments if argument != "--doctor"]
    recipes = recipes_of(recipe, without_doctor, environ)
    for_script = script_arguments(recipes, without_doctor, environ)
    gpus = count_gpus(environ)
    processes = read_number(environ, "NUM_PROCESSES", str(gpus or 2), COUNTS, "a number of processes")
    machine = read_machine(environ)
    threads = environ.get("OMP_NUM_THREADS") or "1"
    if not re.fullmatch("[1-9][0-9]*", threads):  # accelerate would end in a traceback
        del environ["OMP_NUM_THREADS"]
        print(f"OMP_NUM_THREADS: {threads!r} is not a number of threads, and left out", file=sys.stderr)
    if gpus and processes > gpus:
        raise Mistake(f"NUM_PROCESSES: {processes} is more than the {gpus} GPUs of this machine")
    if not gpus:
        prepare_cpu(environ, processes)
        defaults = defaults_on_cpu(recipes, without_doctor)
        precision = " in float32 (--dtype bfloat16 --bf16 true: in 16 bits)" if "--dtype" in defaults else ""
        print(f"no GPU found: training on CPU processes{precision}", flush=True)
        for_script = [*defaults, *for_script]
    strategy = environ.get("ACCELERATE_CONFIG") or ("zero2" if gpus else "cpu")
    config_file = strategy if os.path.isfile(strategy) else f"{FOLDER}/configs/{strategy}.yaml"
    if not os.path.isfile(config_file):
        raise Mistake(f"ACCELERATE_CONFIG: no file {config_file}")
    return LaunchSettings(
        script=FOLDER / f"open_r1/{name}.py",
        arguments=for_script,
        config_file=config_file,
        num_processes=processes * machine.count,
        machine=machine,
        is_examined="--doctor" in arguments,
    )


def recipes_of(recipe: str, arguments: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The recipes that CONFIG names, else the command's own."""
    if any(argument.partition("=")[0] == "--config" for argument in arguments):
        raise Mistake("--config: name the recipes in CONFIG")
    named = environ.get("CONFIG") or f"{REPO_ROOT}/configs/{recipe}.yaml"
    # One file, which may have blanks in its name, or several
    is_one = os.path.isfile(named) or os.path.isfile(REPO_ROOT / named)
    recipes = [named] if is_one else named.split()
    if not recipes:
        raise Mistake("CONFIG: names no recipe")
    return recipes


def script_arguments(recipes: Sequence[str], arguments: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The training script's: arguments win over DATA, OUTPUT and MODEL, and all of them over recipes."""
    variables = [(option, environ[name]) for name, option in VARIABLES.items() if environ.get(name)]
    configs = [part for path in recipes for part in ("--config", path)]
    return [*sum(variables, ()), *arguments, *configs]


def defaults_on_cpu(recipes: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Arguments of a run on the CPU, to stand before its own: those that turn this project's recipes into float32.

    They are written for GPUs. What the command line or a recipe of the user's own names stays as it is.
    """
    from open_r1.settings.recipes import read_files  # needs packages, and setup.sh runs this file without any

    files = read_files(recipes)
    named = {name for path, settings in files if SHIPPED not in path.resolve().parents for name in settings}
    named |= {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    precision = [part for name, value in IN_FLOAT32.items() if name not in named for part in (f"--{name}", value)]
    # use_cpu goes to the trainer alone: accelerate would put plain DDP in DeepSpeed's place.
    return ["--use_cpu", "true", *precision]


def read_number(environ: Mapping[str, str], name: str, default: str, allowed: range, meaning: str) -> int:
    text = environ.get(name) or default
    if not re.fullmatch("0|[1-9][0-9]{0,4}", text) or int(text) not in allowed:
        raise Mistake(f"{name}: '{text}' is not {meaning}")
    return int(text)


def read_machine(environ: Mapping[str, str]) -> Machine:
    """Which machine this is, and where several meet; for one alone a cluster may set an address too."""
    count = read_number(environ, "NUM_MACHINES", "1", COUNTS, "a number of machines")
    meaning = f"the number of a machine, of NUM_MACHINES={count} from 0 on"
    rank = read_number(environ, "MACHINE_RANK", "" if count > 1 else "0", range(count), meaning)
    if count == 1:
        return Machine()
    port = read_number(environ, "MASTER_PORT", "29500", range(1, 65536), "a port, 1 to 65535")
    address = environ.get("MASTER_ADDR", "")
    if not re.fullmatch(r"[0-9A-Za-z._-]+", address):
        raise Mistake(
            f"MASTER_ADDR: '{address}' is not the name or IPv4 address of machine 0, which every machine needs"
        )
    return Machine(rank, count, address, port)


def prepare_cpu(environ: MutableMapping[str, str], processes: int) -> None:
    """Set what DeepSpeed and torch need to know in processes on the CPU."""
    environ["DS_ACCELERATOR"] = "cpu"
    # What DeepSpeed compiles for the CPU fits this environment alone.
    if not environ.get("TORCH_EXTENSIONS_DIR") and os.access(sys.prefix, os.W_OK):
        environ["TORCH_EXTENSIONS_DIR"] = f"{sys.prefix}/torch_extensions"
    if not environ.get("OMP_NUM_THREADS"):
        environ["OMP_NUM_THREADS"] = str(math.ceil((os.cpu_count() or 1) / processes))


def count_gpus(environ: Mapping[str, str]) -> int:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (not visible or visible.startswith("-1")):
        return 0  # without asking nvidia-smi, which may wait for a GPU that hangs
    listed = len(listed_gpus())
    if visible is None or not listed:
        return listed
    count = 0
    for device in visible.replace(",", " ").split():
        if not re.fullmatch("(GPU|MIG)-.*|[0-9]+", device):  # where CUDA stops reading, too
            break
        if device.isdecimal() and int(device) >= listed:
            raise Mistake(f"CUDA_VISIBLE_DEVICES: there is no GPU {device}; this machine's are 0 to {listed - 1}")
        count += 1
    return count


def listed_gpus() -> list[str]:
    """The names of this machine's NVIDIA GPUs; none where nvidia-smi is missing or finds no driver.

    Raises:
        Mistake: nvidia-smi does not answer; there is a GPU then, and it hangs.
    """
    command, seconds = ["nvidia-smi", "--list-gpus"], NVIDIA_SMI_SECONDS
    try:
        listing = subprocess.run(command, capture_output=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise Mistake(
            f"nvidia-smi does not answer within {seconds} s; restart the machine, or go on without "
            "its GPU: CUDA_VISIBLE_DEVICES=-1"
        ) from error
    except OSError:
        return []
    return [] if listing.returncode else LISTED_GPU.findall(listing.stdout)


def print_gpu() -> None:
    """For `setup.sh`, which has no packages yet: print the first GPU's name if a launch would use one."""
    try:
        if count_gpus(os.environ):
            print(listed_gpus()[0])
    except Mistake as mistake:
        sys.exit(f"error: {mistake}")
