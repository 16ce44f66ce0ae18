"""Several machines at one run; here each is a launcher of its own, and they meet over loopback."""

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.base.locks import IN_USE, check_free, holder, owned
from open_r1.running import machines, serving
from open_r1.running.launch_settings import LaunchSettings, read_launch
from support import launch_env, load_weights, read_jsonl, write_script

RUN = str(REPO_ROOT / "src/open-r1-multimodal/run_grpo_SAT.sh")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def start(tmp_path, tiny_model, examples_json, quick_python):
    """Starts the launchers of a run, one a machine; what is left of them is killed."""
    started: list[subprocess.Popen] = []

    def launch(output: Path, *arguments: str, count: int = 2, processes: int = 2, **env: str) -> list[subprocess.Popen]:
        # a constant rate: the same whether a run is to end at step 2 or 3
        settings = ["--learning_rate", "1e-3", "--lr_scheduler_type", "constant", *arguments]
        shared = {"NUM_MACHINES": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"NUM_PROCESSES": str(processes), "OMP_NUM_THREADS": "1", "PYTHON": str(quick_python), **env}
        for rank in range(count):
            started.append(
                subprocess.Popen(
                    ["sh", RUN, "--reward_funcs", "support:vowel_share", *settings],
                    env=launch_env(tiny_model, examples_json, output, **shared, MACHINE_RANK=str(rank)),
                    cwd=tmp_path,
                    stdout=(tmp_path / f"stdout_{rank}").open("w"),
                    stderr=(tmp_path / f"stderr_{rank}").open("w"),
                )
            )
        return started[-count:]

    yield launch
    for process in started:
        if process.poll() is None:
            process.kill()


def told(folder: Path, rank: int, stream: str = "stderr") -> str:
    """What a machine's launcher and its processes said."""
    return (folder / f"{stream}_{rank}").read_text()


def figures(output: Path) -> torch.Tensor:
    """(loss, reward) of every step."""
    return torch.tensor([(log["loss"], log["reward"]) for log in read_jsonl(output / "log.jsonl") if "loss" in log])


@pytest.mark.distributed
def test_two_machines_learn_what_one_does_and_go_on(tmp_path, start):
    """Two processes on each of two, ZeRO-2, resumed for the third step, against four on one."""
    assert [each.wait() for each in start(tmp_path / "one", "--max_steps", "3", count=1, processes=4)] == [0]
    for steps in ("2", "3"):
        ranks = start(tmp_path / "two", "--max_steps", steps, "--save_steps", "1")
        assert [each.wait() for each in ranks] == [0, 0], told(tmp_path, 0)[-3000:] + told(tmp_path, 1)[-3000:]
    assert "resuming from" in told(tmp_path, 0, "stdout") and "saved" in told(tmp_path, 0, "stdout")
    assert "resuming" not in told(tmp_path, 1, "stdout") and "step 3" not in told(tmp_path, 1, "stdout")
    assert len(list(tmp_path.glob("two/checkpoint-3/global_step3/*optim_states.pt"))) == 4
    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert one.shape == (3, 2) and one[:, 0].abs().max() > 0
    assert torch.allclose(one, two, atol=1e-5)
    rows = [read_jsonl(tmp_path / name / "trajectories/train.jsonl") for name in ("one", "two")]
    assert [row["completion"] for row in rows[0]] == [row["completion"] for row in rows[1]]
    weights = [load_weights(tmp_path / name) for name in ("one", "two")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])


@pytest.mark.distributed
def test_who_ends_a_run_is_told_on_its_machine(tmp_path, start):
    """And the other machine's launcher ends, too: its processes lost the connection."""
    kill = 'os.environ["RANK"] == "2" and os.kill(os.getpid(), signal.SIGKILL)'
    reward = f"def reward(completions, **others):\n    {kill}\n    return [0.0] * len(completions)\n"
    (tmp_path / "deadly.py").write_text(f"import os, signal\n\n{reward}")
    ranks = start(tmp_path / "out", "--max_steps", "3", "--reward_funcs", "deadly:reward")
    assert [each.wait() for each in ranks] == [1, 128 + signal.SIGKILL], told(tmp_path, 0) + told(tmp_path, 1)
    last = [told(tmp_path, rank).splitlines()[-1] for rank in range(2)]
    assert re.fullmatch(r"error: rank [01] of 4 ended with exit code 1; its traceback is above", last[0])
    assert last[1].startswith("error: rank 2 of 4 was ended by SIGKILL, as the kernel does when memory runs out; ")


@pytest.mark.nightly
@pytest.mark.distributed
def test_a_launcher_that_waits_for_another_machine_can_be_stopped(tmp_path, start):
    """The other one could not start, since its port is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        main, other = start(tmp_path / "out", "--max_steps", "3", MASTER_PORT=str(port))
        assert main.wait() == 2
        deadline = time.monotonic() + 120
        while "meets the others" not in told(tmp_path, 1, "stdout") and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(2)  # until it waits in torch
        other.terminate()
        assert other.wait(timeout=60) == 128 + signal.SIGTERM
    assert told(tmp_path, 1).endswith("stopped by SIGTERM; the same command starts from the beginning\n")
    assert told(tmp_path, 0) == f"error: MASTER_PORT: {port} is in use; choose another, on all machines\n"


def test_every_machine_meets_at_one_port():
    def launches(**env: str) -> LaunchSettings:
        return read_launch("grpo", "grpo_sat", [], {"CUDA_VISIBLE_DEVICES": "-1", **env})

    env = {"NUM_MACHINES": "3", "MACHINE_RANK": "2", "MASTER_ADDR": "node-a", "NUM_PROCESSES": "4"}
    for port, given in (("29500", {}), ("31000", {"MASTER_PORT": "31000"})):
        told = launches(**env, **given).for_accelerate("no")
        options = dict(zip(told[::2], told[1::2], strict=False))
        assert options["--num_processes"] == "12"  # of all machines, as accelerate counts
        assert (options["--num_machines"], options["--machine_rank"]) == ("3", "2")
        assert (options["--main_process_ip"], options["--main_process_port"]) == ("node-a", port)
    alone = launches(MASTER_ADDR="node-a", MASTER_PORT="31000").for_accelerate("no")  # as a cluster sets them
    assert "--num_machines" not in alone and "node-a" not in alone
    doctor = launches(**env).for_doctor()
    assert doctor[doctor.index("--num_processes") + 1] == "12" and doctor[doctor.index("--num_machines") + 1] == "3"


def test_another_folder_of_the_same_name_is_told(tmp_path, monkeypatch):
    """The lock that the main process holds lies in it, or not."""
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(machines, "SEEN_SECONDS", 0)
    monkeypatch.setattr(machines.platform, "node", lambda: "node-b")
    owner = "process 1 on node-a since 2026-11-25 10:00:00"
    monkeypatch.setattr(machines, "decide_once", lambda decide: (owner, "node-a"))
    monkeypatch.setattr(machines, "gather_object", lambda objects: ["", *objects])
    (tmp_path / IN_USE).write_text(owner)
    machines.check_shared(str(tmp_path))
    (tmp_path / IN_USE).write_text("process 1 on node-b since 2026-11-24 10:00:00")  # an earlier run's
    with pytest.raises(Mistake, match=f"{tmp_path}: on node-b this is not the folder that node-a writes; the machines"):
        machines.check_shared(str(tmp_path))
    (tmp_path / IN_USE).unlink()
    with pytest.raises(Mistake, match="need an OUTPUT on a file system that they share"):
        machines.check_shared(str(tmp_path))


def test_launchers_that_look_at_a_time_do_not_refuse_each_other(tmp_path):
    """At a lock that a killed run left; one that is held keeps all of them out."""
    (tmp_path / IN_USE).write_text("process 1 on node-a since yesterday")
    look = "import sys\nfrom open_r1.base.locks import check_free\nfor _ in range(2000): check_free(sys.argv[1])"
    looking = [subprocess.Popen([sys.executable, "-c", look, str(tmp_path)]) for _ in range(2)]
    assert [each.wait() for each in looking] == [0, 0]
    with owned(tmp_path):
        assert holder(tmp_path).startswith(f"process {os.getpid()} on ")
        with pytest.raises(Mistake, match="in use by process"):
            check_free(tmp_path)
    assert holder(tmp_path) is None


# --- SLURM --------------------------------------------------------------------------------------------------

JOB = REPO_ROOT / "scripts/slurm.sbatch"


def test_a_jobs_dry_run_prints_the_command_of_each_node(tmp_path):
    def dry_run(**env: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "DRY_RUN": "1", **env}
        command = ["sh", str(JOB), "--max_steps", "9"]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    def machine(rank: int, count: int, more: str = "") -> str:
        setting = f"NUM_MACHINES={count} MACHINE_RANK={rank} MASTER_ADDR=a MASTER_PORT=20000"
        return f"{setting} sh {RUN} {more}--max_steps 9"

    result = dry_run(NODES="a b c")
    assert result.stdout.splitlines() == [f"{node}: {machine(rank, 3)}" for rank, node in enumerate("abc")]
    server = "--use_vllm true --vllm_mode server --vllm_server_host c --vllm_server_timeout 1200 "
    assert dry_run(NODES="a b c", VLLM_NODES="1").stdout.splitlines() == [
        f"c: sh {REPO_ROOT}/scripts/serve_rollouts.sh --max_steps 9",
        *(f"{node}: {machine(rank, 2, server)}" for rank, node in enumerate("ab")),
    ]
    for env, reason in (
        ({"NODES": "a", "VLLM_NODES": "1"}, "VLLM_NODES: 1 of 1 node leaves none to train on; ask for more --nodes"),
        ({"NODES": "a", "VLLM_NODES": "2"}, "VLLM_NODES: '2' is neither 0 nor 1"),
        ({"NODES": ""}, "NODES: this is no job of SLURM; name the nodes"),
        ({"NODES": "a", "SLURM_SUBMIT_DIR": "/tmp"}, "/tmp is not the repository's folder; submit this file from"),
    ):
        result = dry_run(**env)
        assert result.returncode == 2 and result.stderr.startswith(f"error: {reason}"), result.stderr


@pytest.fixture
def job(tmp_path):
    """Starts the job under a SLURM of scripts: srun runs a step's tasks here, each under its node's name."""
    srun = """
while :; do
    case $1 in --nodelist=*) nodes=${1#*=} ;; --*) ;; *) break ;; esac
    shift
done
id=0 tasks=""
for node in $(echo "$nodes" | tr , ' '); do
    NODE=$node SLURM_NODEID=$id "$@" & tasks="$tasks $!"
    id=$((id + 1))
done
echo $tasks >>"$LOG/tasks"
code=0
for task in $tasks; do wait $task || code=$?; done
exit $code"""
    write_script(tmp_path / "bin/srun", srun)
    write_script(tmp_path / "bin/scancel", 'echo "scancel $*" >>"$LOG/said"; kill -TERM $(cat "$LOG/tasks")')
    write_script(tmp_path / "bin/scontrol", '[ "$1" != show ] || { printf "a\\nb\\n"; exit; }; echo "$*" >>"$LOG/said"')
    (tmp_path / "copy").write_text(JOB.read_text())  # as SLURM runs it, from its own folder

    def start(task: str) -> subprocess.Popen:
        repository = tmp_path / "repository"
        write_script(repository / "scripts/serve_rollouts.sh", "exit")
        write_script(repository / "src/open-r1-multimodal/run_grpo_SAT.sh", task)
        env = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "[a-b]", "SLURM_SUBMIT_DIR": str(repository)}
        env |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG": str(tmp_path), "SLURM_CPUS_ON_NODE": "4"}
        return subprocess.Popen(["sh", str(tmp_path / "copy"), "--beta", "0"], env={**os.environ, **env})

    return start


def test_a_job_starts_every_machine_and_ends_as_they_do(tmp_path, job):
    tell = 'echo "$NODE $NUM_MACHINES $MACHINE_RANK $MASTER_ADDR $MASTER_PORT $*" >"$LOG/task_$NODE"'
    assert job(tell).wait(timeout=60) == 0
    assert (tmp_path / "task_a").read_text() == "a 2 0 a 20017 --beta 0\n"
    assert (tmp_path / "task_b").read_text() == "b 2 1 a 20017 --beta 0\n"
    assert job('[ "$MACHINE_RANK" = 0 ] || exit 3').wait(timeout=60) == 3
    assert not (tmp_path / "said").exists()


@pytest.mark.parametrize("code, said", [(143, ["requeue 17"]), (0, [])])
def test_a_job_whose_time_is_over_goes_back_into_the_queue(tmp_path, job, code, said):
    """Unless the run ended with it."""
    job = job(f'trap "exit {code}" TERM; touch "$LOG/ready_$NODE"; while :; do sleep 0.1; done')
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready_*"))) < 2 or not (tmp_path / "tasks").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "said").read_text().splitlines() == ["scancel --signal=TERM 17", *said]


# --- The rollout server -------------------------------------------------------------------------------------


def test_the_server_sees_images_and_computes_as_the_recipes_policy(tiny_model, monkeypatch, capsys):
    def command(*arguments: str, vllm_arguments: str = "") -> list[str]:
        monkeypatch.setenv("DRY_RUN", "1")
        monkeypatch.setenv("VLLM_ARGUMENTS", vllm_arguments)
        recipe = ["--config", "configs/grpo_sat.yaml", "--model_name_or_path", str(tiny_model)]
        monkeypatch.setattr(sys, "argv", ["serving.py", *recipe, *arguments])
        serving.main()
        return shlex.split(capsys.readouterr().out)

    def value(command: list[str], option: str) -> str:
        return command[len(command) - command[::-1].index(option)]

    paper = command()
    assert paper[:4] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", str(tiny_model)]
    size = {"shortest_edge": 3136, "longest_edge": 401408}
    assert json.loads(value(paper, "--mm-processor-kwargs")) == {"size": size}
    assert (value(paper, "--dtype"), value(paper, "--max-model-len")) == ("bfloat16", "1724")
    assert value(paper, "--weight-transfer-config") == '{"backend": "nccl"}' and "--enable-scale-out" in paper
    assert value(paper, "--seed") == "42" and value(command("--seed", "3"), "--seed") == "3"
    own = command("--max_pixels", "50176", "--vllm_server_port", "8001", "--max_completion_length", "100")
    assert json.loads(value(own, "--mm-processor-kwargs"))["size"]["longest_edge"] == 50176
    assert (value(own, "--port"), value(own, "--max-model-len")) == ("8001", "1124")
    own = command("--dtype", "auto", "--bf16", "false", vllm_arguments="--max-model-len 900")
    assert (value(own, "--dtype"), value(own, "--max-model-len")) == ("float32", "900")  # the tiny checkpoint's
    overlays = ("--config", "configs/overlays/vllm.yaml", "--config", "configs/overlays/lora.yaml")
    assert value(command(*overlays), "--dtype") == "bfloat16"


@pytest.mark.slow
def test_the_server_says_what_it_takes_and_that_vllm_is_missing(tmp_path, tiny_model, quick_python):
    script = ["bash", str(REPO_ROOT / "scripts/serve_rollouts.sh")]
    help_text = subprocess.check_output([*script, "--help"], text=True)
    assert help_text.startswith("Start the server that samples a run's completions") and "VLLM_ARGUMENTS" in help_text
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here, and would start")
    env = {**os.environ, "MODEL": str(tiny_model), "PYTHON": str(quick_python)}
    result = subprocess.run(script, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and "serve_rollouts.sh: vLLM is not installed; setup.sh installs it" in result.stderr
    assert result.stderr.count("\n") == 1
