"""The commands: every script parses, launches agree with each other, signals end them."""

import importlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch as accelerate
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from huggingface_hub import ModelCard
from transformers import get_scheduler
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from trl import ModelConfig

from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.configs import check_attention, check_bfloat16, unused_vllm
from open_r1.grpo import GRPOScriptArguments
from open_r1.running.entry import (
    accumulate_in_float32,
    check_deepspeed,
    check_login,
    check_scaling,
    resolve_report_to,
    rounded_away,
    save_whole_weights,
)
from open_r1.running.failures import continues
from open_r1.running.launch_settings import LaunchSettings, count_gpus, listed_gpus, read_launch
from open_r1.settings.recipes import default_output, merge_recipes, read_recipe
from open_r1.trainer.trainer import Qwen2VLGRPOConfig
from support import (
    hear_signals,
    launch_env,
    load_weights,
    make_config,
    processes_naming,
    read_jsonl,
    run_grpo,
    write_script,
)

SCRIPTS = sorted(
    path for path in REPO_ROOT.rglob("*.sh") if not {".venv", "outputs"} & set(path.relative_to(REPO_ROOT).parts)
)


def test_scripts_parse():
    for script in SCRIPTS:
        for shell in ("bash", "sh"):
            subprocess.run([shell, "-n", str(script)], check=True)
        assert "conda activate" not in script.read_text()  # fails in a non-interactive shell


def test_the_papers_recipe(tmp_path):
    args = ["--config", str(REPO_ROOT / "configs/grpo_sat.yaml"), "--dataset_name", "x.json"]
    args += ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    script_args, training_args, model_args = read_recipe((GRPOScriptArguments, Qwen2VLGRPOConfig, ModelConfig), args)
    assert (script_args.max_prompt_length, script_args.max_pixels) == (1024, 401408)
    assert script_args.reward_funcs == ["accuracy", "format"] and script_args.chat_template == "base"
    assert model_args.model_name_or_path == "Qwen/Qwen2-VL-2B" and model_args.dtype == "bfloat16"
    expected = {"num_generations": 8, "completions_per_step": 64, "max_completion_length": 700}
    expected |= {"beta": 0.04, "learning_rate": 1e-6, "max_steps": 1500, "temperature": 1.0}
    assert {name: getattr(training_args, name) for name in expected} == expected
    # a linear schedule over two epochs of 15000 examples at 8 prompts a step, cut at step 1500, whatever max_steps is
    for max_steps in (100, 1500):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training_args.learning_rate)
        schedule = get_scheduler(
            training_args.lr_scheduler_type, optimizer, 0, max_steps, training_args.lr_scheduler_kwargs
        )
        rates = [schedule.lr_lambdas[0](step) * 1e-6 for step in range(1501)]
        assert rates == pytest.approx([1e-6 * (1 - step / (2 * 15000 / 8)) for step in range(1501)])
        assert rates[1500] == pytest.approx(6e-7)


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """What a launch of run_grpo_SAT.sh gives accelerate on a machine without GPUs, from tmp_path."""
    monkeypatch.chdir(tmp_path)

    def launch(*arguments: str, **env: str) -> list[str]:
        return read_launch("grpo", "grpo_sat", arguments, {"CUDA_VISIBLE_DEVICES": "-1", **env}).for_accelerate("no")

    return launch


@pytest.fixture
def passed_on(tmp_path):
    """What run_grpo_SAT.sh passes on to a Python that only lists it, line by line."""
    python = write_script(tmp_path / "python", '[ "$1" = -c ] || printf "%s\\n" "$@"')

    def launch(*arguments: str, shell: str = "sh") -> list[str]:
        command = [shell, str(REPO_ROOT / "src/open-r1-multimodal/run_grpo_SAT.sh"), *arguments]
        env = {**os.environ, "PYTHON": str(python)}
        return subprocess.check_output(command, env=env, cwd=tmp_path, text=True).splitlines()

    return launch


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_the_shell_passes_arguments_on_as_they_are(passed_on, shell):
    launcher = str(REPO_ROOT / "src/open-r1-multimodal/open_r1/running/launch.py")
    arguments = ["--run_name", "a --help  b", "*", "--doctor"]
    assert passed_on(*arguments, shell=shell) == [launcher, "grpo", "grpo_sat", *arguments]


def test_what_is_wrong_with_a_launch_is_told_before_torch_is_imported():
    code = "import sys, open_r1.running.launch; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "config, recipes, output",
    [
        ("", [str(REPO_ROOT / "configs/grpo_sat.yaml")], "grpo_sat"),
        ("configs/grpo_sat.yaml  configs/overlays/lora.yaml", None, "grpo_sat_lora"),
        ("my recipe.yaml", ["my recipe.yaml"], "my recipe"),
        ("configs/grpo_sat.yaml mine.yaml", None, "grpo_sat_mine"),
    ],
)
def test_config_names_recipes(launched, tmp_path, config, recipes, output):
    for name in ("my recipe.yaml", "mine.yaml"):
        (tmp_path / name).write_text("beta: 0\n")
    lines = launched("--max_steps", "1", CONFIG=config)
    assert [lines[at + 1] for at, line in enumerate(lines) if line == "--config"] == (recipes or config.split())
    assert (
        lines[lines.index("--max_steps") + 1] == "1" and "--output_dir" not in lines and "--dataset_name" not in lines
    )
    assert default_output(recipes or config.split()) == str(REPO_ROOT / "outputs" / output)


def test_what_the_environment_names_goes_before_the_recipe_and_after_arguments(launched):
    places = {"MODEL": "a model", "DATA": "my data.json", "OUTPUT": "out here"}
    lines = launched("--dataset_name", "another.json", **places)
    for name, value in zip(("model_name_or_path", "dataset_name", "output_dir"), places.values(), strict=True):
        assert lines[lines.index(f"--{name}") + 1] == value
    data = [lines[at + 1] for at, line in enumerate(lines) if line == "--dataset_name"]
    assert data == ["my data.json", "another.json"]  # the last of two counts


FOR_GPUS, OF_MINE = "dtype: bfloat16\nbf16: true\n", "base: {configs}/grpo_sat.yaml\n"


@pytest.mark.parametrize(
    "recipe, arguments, precision",
    [
        (None, [], {"--dtype": "float32", "--bf16": "false"}),
        (None, ["--dtype", "bfloat16"], {"--dtype": "bfloat16", "--bf16": "false"}),
        (None, ["--bf16=true"], {"--dtype": "float32"}),
        (OF_MINE, [], {"--dtype": "float32", "--bf16": "false"}),
        (OF_MINE + "dtype: auto\n", [], {"--bf16": "false"}),
        (FOR_GPUS, [], {}),
    ],
)
def test_whoever_names_a_precision_gets_it_without_a_gpu(launched, tmp_path, capsys, recipe, arguments, precision):
    """On the command line or in a recipe of theirs; this project's, which are for GPUs, become float32 on a CPU."""
    path = tmp_path / "mine.yaml"
    path.write_text((recipe or "").format(configs=REPO_ROOT / "configs"))
    lines = launched(*arguments, CONFIG=str(path) if recipe else "configs/grpo_sat.yaml configs/overlays/no_kl.yaml")
    given = {name: value for name, value in itertools.pairwise(lines) if name in ("--dtype", "--bf16")}
    assert given == precision
    said = " in float32 (--dtype bfloat16 --bf16 true: in 16 bits)" if precision.get("--dtype") == "float32" else ""
    assert capsys.readouterr().out == f"no GPU found: training on CPU processes{said}\n"


TWO_MACHINES = {"NUM_MACHINES": "2", "MACHINE_RANK": "1", "MASTER_ADDR": "node-a"}


@pytest.mark.parametrize(
    "env, reason",
    [
        ({"CONFIG": " "}, "CONFIG: names no recipe"),
        ({"ACCELERATE_CONFIG": "zero9"}, "ACCELERATE_CONFIG: no file .*/configs/zero9.yaml"),
        ({"NUM_PROCESSES": "0"}, "NUM_PROCESSES: '0' is not a number of processes"),
        ({"NUM_PROCESSES": "1.5"}, "NUM_PROCESSES: '1.5' is not a number of processes"),
        ({"NUM_PROCESSES": "99999"}, "NUM_PROCESSES: '99999' is not a number of processes"),
        ({"NUM_MACHINES": "two"}, "NUM_MACHINES: 'two' is not a number of machines"),
        ({"MACHINE_RANK": "1"}, "MACHINE_RANK: '1' is not the number of a machine, of NUM_MACHINES=1 "),
        ({**TWO_MACHINES, "MACHINE_RANK": ""}, "MACHINE_RANK: '' is not the number of a machine, of NUM_"),
        ({**TWO_MACHINES, "MASTER_ADDR": "a b"}, "MASTER_ADDR: 'a b' is not the name or IPv4 address of "),
        ({**TWO_MACHINES, "MASTER_PORT": "70000"}, "MASTER_PORT: '70000' is not a port, 1 to 65535"),
    ],
)
def test_a_variable_that_means_nothing_is_one_line(launched, env, reason):
    with pytest.raises(Mistake, match=f"^{reason}"):
        launched(**env)


def test_recipes_are_named_in_config_alone(launched):
    with pytest.raises(Mistake, match=r"^--config: name the recipes in CONFIG$"):
        launched("--max_steps", "1", "--config=mine.yaml")


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Makes a machine whose nvidia-smi does this."""

    def write(does: str) -> None:
        write_script(tmp_path / "bin/nvidia-smi", does)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    return write


FOUR_GPUS = "\n".join(f"echo 'GPU {number}: NVIDIA H100 (UUID: GPU-{number})'" for number in range(4))


@pytest.mark.parametrize(
    "name, env, processes, strategy",
    [
        ("grpo", {}, 4, "zero2"),
        ("grpo", {"CUDA_VISIBLE_DEVICES": "1,3"}, 2, "zero2"),
        ("grpo", {"CUDA_VISIBLE_DEVICES": ""}, 2, "cpu"),
        ("sft", {"ACCELERATE_CONFIG": "zero3"}, 4, "zero3"),  # as run_sft.sh sets it
    ],
)
def test_a_launch_takes_the_gpus_that_it_sees(smi, name, env, processes, strategy):
    """And without any, it goes on the CPU, which DeepSpeed and torch are told in the environment."""
    smi(FOUR_GPUS)
    environ = dict(env)
    launch = read_launch(name, f"{name}_sat", ["--beta", "0"], environ)
    assert listed_gpus() == ["NVIDIA H100"] * 4
    assert (launch.script.name, launch.num_processes) == (f"{name}.py", processes)
    assert launch.config_file == str(REPO_ROOT / f"src/open-r1-multimodal/configs/{strategy}.yaml")
    on_cpu = strategy == "cpu"
    assert launch.arguments[:2] == (["--use_cpu", "true"] if on_cpu else ["--beta", "0"])
    assert environ == env if not on_cpu else environ["DS_ACCELERATOR"] == "cpu" and int(environ["OMP_NUM_THREADS"]) > 0


@pytest.mark.parametrize(
    "lists, visible, gpus",
    [
        ("echo 'NVIDIA-SMI has failed: no driver.'; exit 9", None, 0),
        ("echo 'No devices were found'", None, 0),
        ("exec sleep 60", "-1", 0),  # not asked
        (FOUR_GPUS, "", 0),
        (FOUR_GPUS, "NoDevFiles", 0),
        (FOUR_GPUS, "1,GPU-a", 2),
        (FOUR_GPUS, "0,-1,1", 1),  # as CUDA reads it
        (FOUR_GPUS, "0,4", "CUDA_VISIBLE_DEVICES: there is no GPU 4; this machine's are 0 to 3"),
        ("exec sleep 60", None, "nvidia-smi does not answer within 0.1 s; restart the machine, or "),
    ],
)
def test_a_gpu_is_one_that_can_be_listed_and_is_visible(smi, monkeypatch, lists, visible, gpus):
    smi(lists)
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    if isinstance(gpus, int):
        assert count_gpus(environ) == gpus
        return
    monkeypatch.setattr("open_r1.running.launch_settings.NVIDIA_SMI_SECONDS", 0.1 if visible is None else 10)
    with pytest.raises(Mistake, match=f"^{gpus}"):
        count_gpus(environ)


def test_more_processes_than_gpus(smi):
    smi(FOUR_GPUS)
    with pytest.raises(Mistake, match=r"^NUM_PROCESSES: 5 is more than the 4 GPUs of this machine$"):
        read_launch("grpo", "grpo_sat", [], {"NUM_PROCESSES": "5"})


@pytest.mark.parametrize(
    "given, processes, threads",
    [({}, 3, "3"), ({"OMP_NUM_THREADS": "5"}, 2, "5"), ({"OMP_NUM_THREADS": "many"}, 4, "2")],
)
def test_what_processes_on_the_cpu_are_told(monkeypatch, capsys, given, processes, threads):
    """The cores are shared out, unless a number is given; DeepSpeed compiles into the environment."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    environ = {"CUDA_VISIBLE_DEVICES": "-1", "NUM_PROCESSES": str(processes), **given}
    read_launch("grpo", "grpo_sat", [], environ)
    assert environ["OMP_NUM_THREADS"] == threads
    assert environ["TORCH_EXTENSIONS_DIR"] == f"{sys.prefix}/torch_extensions"
    assert ("'many' is not a number of threads, and left out" in capsys.readouterr().err) == (threads == "2")


def test_the_doctor_looks_at_what_would_be_started():
    """test_doctor.py runs it so."""
    arguments = ["--max_steps", "3", "--doctor"]
    launch = read_launch("sft", "sft_sat", arguments, {"CUDA_VISIBLE_DEVICES": "-1"})
    assert launch.is_examined and launch.for_doctor()[:2] == ["--script", "sft"]
    assert launch.for_doctor()[-4:] == ["--max_steps", "3", "--config", str(REPO_ROOT / "configs/sft_sat.yaml")]


def test_reports_never_wait_for_an_answer(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Mistake, match=r"^report_to: wandb has no key; wandb login, WANDB_MODE=offline"):
        check_login(["wandb"])
    check_login(["tensorboard"])
    assert resolve_report_to(["auto"]) == ["tensorboard"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_report_to(["auto"]) == ["wandb"]
    assert resolve_report_to(["tensorboard"]) == ["tensorboard"]
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key")
    assert resolve_report_to(["auto"]) == ["wandb"]
    check_login(["wandb"])
    for name, value in (("WANDB_DISABLED", "true"), ("WANDB_MODE", "disabled")):  # switched off, whatever key there is
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert resolve_report_to(["auto"]) == ["tensorboard"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # another server's key
    assert resolve_report_to(["auto"]) == ["tensorboard"]


def test_what_a_user_gives_is_not_outdone_by_the_recipe(tmp_path):
    """Held-out questions are asked, an epoch more and another schedule are one, without a second option for it."""
    kinds = (GRPOScriptArguments, Qwen2VLGRPOConfig, ModelConfig)
    (tmp_path / "r.yaml").write_text(
        "model_name_or_path: m\nmax_steps: 1500\nsave_steps: 100\nbf16: false\nuse_cpu: true\n"
        "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 3750}\n"
    )
    recipe = ["--config", str(tmp_path / "r.yaml"), "--dataset_name", "x", "--output_dir", "out"]

    def args(*arguments: str) -> Qwen2VLGRPOConfig:
        return read_recipe(kinds, [*recipe, *arguments])[1]

    assert (args().eval_strategy, args().max_steps) == ("no", 1500)
    held_out = args("--eval_dataset_name", "y")
    assert (held_out.eval_strategy, held_out.eval_steps) == ("steps", 100)
    assert args("--eval_dataset_name", "y", "--save_steps=50").eval_steps == 50
    assert args("--eval_dataset_name", "y", "--eval-steps", "7").eval_steps == 7
    assert args("--eval_dataset_name", "y", "--eval_strategy", "no").eval_strategy == "no"
    assert args("--num_train_epochs", "3").max_steps == -1
    assert args("--num_train_epochs", "3", "--max_steps", "5").max_steps == 5
    assert args().lr_scheduler_kwargs == {"num_decay_steps": 3750}
    assert args("--lr_scheduler_type", "cosine").lr_scheduler_kwargs is None
    own = ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 0.0}']
    assert args(*own).lr_scheduler_kwargs == {"min_lr": 0.0}


@pytest.mark.distributed
def test_ddp_zero2_and_zero3_agree(tmp_path, tiny_model, examples_json, quick_python):
    """The same seeded three-step run over two processes; also from an unrelated folder, under sh."""
    logs, weights = {}, {}
    for strategy in ("ddp", "cpu", "zero3"):
        output = tmp_path / strategy
        result = run_grpo(
            tiny_model,
            examples_json,
            output,
            *["--max_steps", "3", "--reward_funcs", "support:vowel_share", "--learning_rate", "1e-3"],
            ACCELERATE_CONFIG=strategy,
            PYTHON=str(quick_python),
        )
        assert result.returncode == 0, result.stderr[-3000:]
        zero_files = list(output.glob("checkpoint-3/global_step3/*optim_states.pt"))
        assert len(zero_files) == (0 if strategy == "ddp" else 2)  # ZeRO really ran, on both processes
        state = (output / "trainer_state.json").read_text()
        logs[strategy] = [
            (float(loss), float(reward))
            for loss, reward in re.findall(r'"loss": ([-\d.e]+),.*?"reward": ([-\d.e]+),', state, re.DOTALL)
        ]
        weights[strategy] = load_weights(output)
        assert len(read_jsonl(output / "trajectories/train.jsonl")) == 3 * 16
    assert len(logs["ddp"]) == 3 and any(loss != 0 for loss, _ in logs["ddp"])
    for strategy in ("cpu", "zero3"):
        assert torch.allclose(torch.tensor(logs[strategy]), torch.tensor(logs["ddp"]), atol=1e-4)
        assert all(torch.allclose(weights[strategy][name], weights["ddp"][name], atol=1e-4) for name in weights["ddp"])


@pytest.mark.distributed
def test_two_processes_log_the_reflections_of_both(tmp_path, tiny_model, examples_json, quick_python):
    """On written completions; the prompts of one process reflect more than those of the other."""
    logs = {}
    for processes in ("1", "2"):
        output = tmp_path / processes
        arguments = ["--max_steps", "3", "--reward_funcs", "accuracy", "planting:zero"]
        arguments += ["--max_completion_length", "128"]
        arguments += ["--eval_dataset_name", str(examples_json), "--eval_strategy", "steps", "--eval_steps", "3"]
        arguments += ["--per_device_eval_batch_size", "4"]
        env = {"NUM_PROCESSES": processes, "PYTHON": str(quick_python)}
        result = run_grpo(tiny_model, examples_json, output, *arguments, **env)
        assert result.returncode == 0, result.stderr[-3000:]
        assert f"report: {output}/report.html" in result.stdout and (output / "report.html").stat().st_size
        assert "grpo" in ModelCard.load(output / "README.md").data.tags
        assert "{" not in result.stdout and result.stdout.count("\nstep ") == 5  # steps, evaluations
        assert json.loads((output / "run.json").read_text())["world_size"] == int(processes)
        rows = [log for log in read_jsonl(output / "log.jsonl") if "loss" in log or "eval_loss" in log]
        logs[processes] = [{name: log[name] for name in log if "reflection/" in name} for log in rows]
        rollouts = read_jsonl(output / "trajectories/train.jsonl")
        for log in rows[:3]:
            shares = [bool(row["reflections"]) for row in rollouts if row["step"] == log["step"]]
            assert log["reflection/share"] == sum(shares) / len(shares) and len(shares) == 16
        blind = read_jsonl(output / "trajectories/blind.jsonl")
        assert len(blind) == 32 and not any(row["images"] or "image_pad" in row["prompt"] for row in blind)
    assert logs["1"] == logs["2"] and len(logs["1"]) == 4
    assert logs["1"][3] == {
        "eval_reflection/share": 3 / 8,
        "eval_reflection/self_correction": 2 / 8,
        "eval_reflection/correction_success": 1 / 2,
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    "stop, launch",
    [
        (signal.SIGINT, {}),
        (signal.SIGKILL, {}),
        (signal.SIGTERM, {"ACCELERATE_CONFIG": "ddp", "NUM_PROCESSES": "1"}),  # without torch's launcher
        pytest.param(signal.SIGTERM, {}, marks=pytest.mark.nightly),
        pytest.param(signal.SIGHUP, {}, marks=pytest.mark.nightly),
    ],
)
def test_a_signal_ends_every_process_in_one_line(tmp_path, tiny_model, examples_json, quick_python, stop, launch):
    python = sys.executable if stop == signal.SIGKILL else quick_python  # whose processes have other parents
    launcher = subprocess.Popen(
        ["sh", str(REPO_ROOT / "src/open-r1-multimodal/run_grpo_SAT.sh"), "--max_steps", "100000", "--save_steps", "1"],
        env=launch_env(tiny_model, examples_json, tmp_path / "out", PYTHON=str(python), **launch),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    )
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("out/checkpoint-*/complete.json")):
        assert time.monotonic() < deadline and launcher.poll() is None, "training did not start"
        time.sleep(0.1)
    os.killpg(launcher.pid, stop) if stop == signal.SIGINT else launcher.send_signal(stop)  # Ctrl-C goes to the group
    told = stop != signal.SIGKILL
    assert launcher.wait(timeout=120) == (128 + stop if told else -stop)
    deadline = time.monotonic() + 30
    while (left := processes_naming(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []
    said = launcher.stderr.read()
    assert "Traceback" not in said
    if not told:
        return
    whole = [path.parent.name for path in tmp_path.glob("out/checkpoint-*/complete.json")]
    step = max(int(name.removeprefix("checkpoint-")) for name in whole)
    assert said.splitlines()[-1] == f"stopped by {stop.name}; the same command continues at step {step}"


@pytest.mark.parametrize(
    "steps, resumes, state",
    [
        ([], True, "the same command starts from the beginning"),
        ([3, 20, 100, "200-backup"], True, "the same command continues at step 100"),
        ([3], False, "the same command starts from the beginning"),
    ],
)
def test_a_run_continues_at_its_last_whole_checkpoint(tmp_path, steps, resumes, state):
    (tmp_path / "checkpoint-200").mkdir()  # half-written
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/complete.json").touch()
    assert continues(str(tmp_path), resumes) == state


def test_nohup_stays(monkeypatch):
    """A hangup that was ignored when the launch began goes on being ignored."""
    from open_r1.running import launch

    handled = {}
    monkeypatch.setattr(launch.signal, "signal", handled.setdefault)
    monkeypatch.setattr(launch.signal, "getsignal", {signal.SIGHUP: signal.SIG_IGN}.get)
    monkeypatch.setattr(launch, "start", lambda launch, run: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(sys, "argv", ["launch.py", "grpo", "grpo_sat"])
    launch.main()
    assert set(handled) == {signal.SIGINT, signal.SIGTERM}


@pytest.fixture
def card(monkeypatch):
    """Makes torch see GPUs of one kind, built for this project's cards, behind a driver that it can use or cannot."""

    def see(capability: tuple[int, int], name: str = "A card", count: int = 1, driver: str = "") -> None:
        def init() -> None:
            if driver:
                raise RuntimeError(driver)

        fakes = {
            "is_available": lambda: count > 0 and not driver,
            "device_count": lambda: count,
            "init": init,
            "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"],
            "get_device_capability": lambda device=0: capability,
            "get_device_name": lambda device=0: name,
        }
        for attribute, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, attribute, fake)

    return see


TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


@pytest.mark.parametrize(
    "count, driver, usable, reason",
    [(1, "", 1, ""), (2, TOO_OLD, 0, " (The NVIDIA driver on your system is too old (found version 12040))")],
)
def test_gpus_that_torch_cannot_use_are_told(card, count, driver, usable, reason):
    from open_r1.running.launch import check_gpus

    card((9, 0), count=count, driver=driver)
    check_gpus(usable)
    told = f"2 processes need a GPU each, and torch {torch.__version__} can use {usable}{reason}; update the "
    with pytest.raises(Mistake, match=rf"^{re.escape(told)}.*\(CUDA 13 needs 580 or newer\), install torch for"):
        check_gpus(2)


@pytest.mark.parametrize("capability, works", [((7, 0), False), ((7, 5), True)])
def test_a_gpu_that_torch_has_no_kernels_for_is_told(card, capability, works):
    from open_r1.doctor.environment import gpus
    from open_r1.running.launch import check_gpus

    card(capability, "Tesla V100")
    if works:
        check_gpus(1)
        return
    had = ".".join(map(str, capability))
    told = f"Tesla V100 has compute capability {had}, and torch {torch.__version__} was built for 7.5 and newer"
    with pytest.raises(Mistake, match=f"^{re.escape(told)}; install torch for CUDA 12.6 .UV_TORCH_BACKEND=cu126 "):
        check_gpus(1)
    (finding,) = gpus(None)
    assert (finding.verdict, finding.what) == ("fail", told)


@pytest.mark.parametrize(
    "recipe, changes, capability, told",
    [
        ("grpo_sat", {}, (7, 5), "bf16, dtype"),
        ("sft_sat", {"bf16": False}, (7, 5), "dtype"),
        ("grpo_sat", {"use_cpu": True}, (7, 5), None),
        ("smolvlm_256m", {}, (7, 5), None),
        ("grpo_sat", {}, (8, 0), None),
    ],
)
def test_bfloat16_on_a_gpu_without_it_is_told(card, recipe, changes, capability, told):
    """A T4 emulates it; the recipe for small GPUs runs there as it is."""
    card(capability, "Tesla T4")
    settings = {"bf16": True, "use_cpu": False, **merge_recipes([f"configs/{recipe}.yaml"]), **changes}
    settings = SimpleNamespace(**settings)
    if told is None:
        check_bfloat16(settings, settings)
        return
    line = rf"^{told}: Tesla T4 .compute capability 7.5. has no bfloat16; add --bf16 false --dtype float32, or "
    with pytest.raises(Mistake, match=line):
        check_bfloat16(settings, settings)


def test_help_names_variables_and_options(passed_on):
    lines = passed_on("--max_steps", "3", "--help")
    assert lines[0].startswith("Start a training script on every GPU") and "  NUM_PROCESSES  " in "\n".join(lines)
    assert lines[-2:] == [str(REPO_ROOT / "src/open-r1-multimodal/open_r1/grpo.py"), "--help"]


def test_a_killed_compiler_does_not_make_the_next_launch_wait(tmp_path):
    """torch waits for as long as a lock is there; one that is young, or has a compiler at work, stays."""
    from open_r1.running.launch import STALE_SECONDS, clear_stale_builds

    for name, age in (("killed", STALE_SECONDS + 9), ("busy", STALE_SECONDS + 9), ("young", 0)):
        lock = tmp_path / name / "lock"
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    compiler = subprocess.Popen(["sleep", "60"], cwd=tmp_path / "busy")
    clear_stale_builds(tmp_path)
    compiler.kill()
    compiler.wait()
    assert [path.parent.name for path in sorted(tmp_path.glob("*/lock"))] == ["busy", "young"]


BF16, FP16, FP32 = ("bf16", True, False), ("fp16", False, True), ("no", False, False)
# recipes and arguments -> what accelerate and DeepSpeed must be told
PRECISIONS = {
    ("configs/grpo_sat.yaml", ""): BF16,
    ("configs/sft_sat.yaml", ""): BF16,
    ("configs/grpo_sat.yaml configs/overlays/tiny.yaml", ""): FP32,
    ("configs/grpo_sat.yaml", "--bf16 false --dtype float32"): FP32,
    ("configs/grpo_sat.yaml", "--bf16 false --fp16 true"): FP16,
    ("configs/smolvlm_256m.yaml", "--bf16 true"): BF16,
}


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "ddp", "a file of one's own"])
def test_the_recipe_decides_the_precision_of_a_launch(strategy, monkeypatch, tmp_path):
    """What accelerate and DeepSpeed are told on GPUs, from the check to a process's settings."""
    from open_r1.running import entry, launch

    monkeypatch.setattr(launch, "check_gpus", lambda processes: None)
    monkeypatch.setattr(entry, "check_run", lambda command, arguments, *_: read_recipe(command.arguments, arguments)[1])
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    environments = []  # of the processes that accelerate would start
    for name, prepare in (
        ("deepspeed_launcher", lambda args: prepare_deepspeed_cmd_env(args)[1]),
        ("multi_gpu_launcher", prepare_multi_gpu_env),
    ):
        monkeypatch.setattr(accelerate, name, lambda args, prepare=prepare: environments.append(prepare(args)))
    config_file = str(REPO_ROOT / f"src/open-r1-multimodal/configs/{strategy}.yaml")
    if not os.path.isfile(config_file):  # as `accelerate config` writes it
        config_file = str(tmp_path / "own.yaml")
        (tmp_path / "own.yaml").write_text("distributed_type: MULTI_GPU\nmixed_precision: bf16\nnum_machines: 1\n")
    told = {}
    for recipes, changes in PRECISIONS:
        command = "sft" if "sft" in recipes else "grpo"
        arguments = [part for recipe in recipes.split() for part in ("--config", recipe)]
        arguments += ["--dataset_name", "x", "--output_dir", str(tmp_path), "--report_to", "none", *changes.split()]
        settings = LaunchSettings(Path(f"{command}.py"), arguments, config_file, 2)
        plan = multiprocessing.get_context("fork").SimpleQueue()
        launch.check_launch(settings, plan)
        arguments_of_launch = settings.for_accelerate(plan.get()[-1])
        accelerate.launch_command(accelerate.launch_command_parser().parse_args(arguments_of_launch))
        environment = environments.pop()
        deepspeed = "ACCELERATE_USE_DEEPSPEED" in environment
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                if name.startswith("ACCELERATE_"):
                    patch.setenv(name, value)
            args = read_recipe(importlib.import_module(f"open_r1.{command}").COMMAND.arguments, arguments)[1]
            config = args.deepspeed_plugin.deepspeed_config if deepspeed else {}
            enabled = [config[name]["enabled"] for name in ("bf16", "fp16")] if deepspeed else [args.bf16, args.fp16]
        assert environment["ACCELERATE_MIXED_PRECISION"] == args.mixed_precision
        assert deepspeed == strategy.startswith("zero")
        told[recipes, changes] = (args.mixed_precision, *enabled)
    assert told == PRECISIONS


def test_flash_attn_by_name_is_told_where_it_is_missing(monkeypatch):
    """Where it is installed, settings are as for any other attention."""
    installed = {"flash_attn": object()}
    monkeypatch.setattr("open_r1.configs.importlib.util.find_spec", installed.get)
    check_attention(ModelConfig("a", attn_implementation="flash_attention_2"))
    installed.clear()
    with pytest.raises(Mistake, match=r"^attn_implementation: flash_attention_2 needs flash-attn, which is"):
        check_attention(ModelConfig("a", attn_implementation="flash_attention_2"))


def test_a_gpu_run_without_vllm_is_told_what_it_saves(card, monkeypatch):
    card((9, 0))
    installed = {"vllm": object()}
    monkeypatch.setattr("open_r1.configs.importlib.util.find_spec", installed.get)

    def line(**changes: bool) -> str | None:
        args = {"use_vllm": False, "use_cpu": False, "load_in_4bit": False, **changes}
        return unused_vllm(SimpleNamespace(**args), SimpleNamespace(**args))

    assert "configs/overlays/vllm.yaml" in line() and line().endswith("(computed, not measured)")
    # vLLM gets the weights of a run, and takes no 4-bit ones
    assert line(use_vllm=True) is line(use_cpu=True) is line(load_in_4bit=True) is None
    installed.clear()
    assert line() is None


@pytest.mark.parametrize(
    "dtype, rate, changes, told",
    [
        (torch.bfloat16, 1e-6, {}, True),
        (torch.bfloat16, 0.0, {}, False),  # that nothing moves is asked for
        (torch.bfloat16, 1e-2, {}, False),
        (torch.float32, 1e-6, {}, False),
        (torch.bfloat16, 1e-6, {"is_deepspeed_enabled": True}, False),
    ],
)
def test_a_run_whose_steps_are_rounded_away_says_so(dtype, rate, changes, told):
    """Nothing else shows that it does not learn."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, dtype=dtype)
    flags = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, **changes}
    line = rounded_away(SimpleNamespace(model=model, args=SimpleNamespace(learning_rate=rate), **flags))
    assert (line or "").startswith("warning: 100% of the torch.bfloat16 weights stay as they are" if told else "")
    assert bool(line) == told


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_weights_whose_gradients_fp16_cannot_scale_are_one_line(dtype):
    """torch refuses them at the first update, behind a rollout; DeepSpeed does not."""
    model, known = torch.nn.Linear(4, 4, dtype=dtype), str(dtype).removeprefix("torch.")
    for has_deepspeed in (True, False):
        for fp16 in (True, False):
            trainer = SimpleNamespace(model=model, args=SimpleNamespace(fp16=fp16), is_deepspeed_enabled=has_deepspeed)
            fails = fp16 and not has_deepspeed and dtype != torch.float32
            with pytest.raises(Mistake, match=f"^fp16: .* {known}; add --dtype float32") if fails else nullcontext():
                check_scaling(trainer)


def test_a_run_tells_deepspeed_how_to_add_gradients_up():
    """What a file of DeepSpeed's own says stays."""
    fp16 = {"data_types": {"grad_accum_dtype": "fp16"}}
    for stage, config, dtype in ((2, {}, "fp32"), (3, {}, "fp32"), (1, {}, None), (2, fp16, "fp16")):
        plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
        accumulate_in_float32(SimpleNamespace(deepspeed_plugin=plugin))
        assert plugin.deepspeed_config.get("data_types", {}).get("grad_accum_dtype") == dtype


def test_a_launch_file_that_says_otherwise_than_the_run_is_one_line(tmp_path):
    """As `accelerate config` writes one: it asks for these numbers."""
    args = make_config(tmp_path)
    check_deepspeed(None)
    for steps, clipping in ((2, 1.0), ("auto", "auto"), (1, 1.0)):
        config = {"gradient_accumulation_steps": steps, "gradient_clipping": clipping, "train_batch_size": "auto"}
        compared = HfTrainerDeepSpeedConfig(config)
        compared.trainer_config_process(args)  # as the trainer does
        line = "^ACCELERATE_CONFIG, deepspeed: the file says gradient_accumulation_steps=1 against the run's gradient_"
        with pytest.raises(Mistake, match=line) if steps == 1 else nullcontext():
            check_deepspeed(SimpleNamespace(hf_ds_config=compared))


def test_zero3_saves_whole_weights_whatever_a_launch_file_says():
    """DeepSpeed's default is to save each process's part, which no library loads as a model."""
    key = "stage3_gather_16bit_weights_on_model_save"
    for stage, zero, gathers in ((3, {}, True), (3, {key: False}, True), (2, {}, None)):
        plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero})
        save_whole_weights(SimpleNamespace(deepspeed_plugin=plugin))
        assert zero.get(key) is gathers


@pytest.mark.slow
@pytest.mark.parametrize("stage, precision, dtype", [(2, "bf16", "bfloat16"), (3, "no", "float32")])
def test_deepspeed_adds_gradients_up_in_float32(tmp_path, quick_python, stage, precision, dtype):
    """In a model that is bfloat16, too; and without bf16 the weights stay float32."""
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    env = {**os.environ, **deepspeed, "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    command = [quick_python, Path(__file__).parent / "worker_deepspeed.py", tmp_path, precision]
    result = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {"dtypes": [dtype, "float32"], "weight": dtype, "sum": 263.0}
