"""launch/slurm.sbatch under a real Slurm, which the test starts on this machine."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.checkpoint import complete_steps
from jaxlm.monitor import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("sbatch", "slurmctld", "slurmd", "munged", "runuser"))),
        reason="Slurm is not installed: apt-get install slurm-wlm munge",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons are started as root only"),
]

STEPS = 120
SCRIPT = Path(__file__).parents[1] / "launch" / "slurm.sbatch"
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
ReturnToService=2
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=16 State=UNKNOWN
PartitionName=test Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A Slurm of one node; yields the environment in which its commands work."""
    home = tmp_path_factory.mktemp("slurm")
    for folder in ("state", "spool", "munge"):
        (home / folder).mkdir()
    for folder in (home, *home.parents):  # munged insists that its socket can be come to
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    shutil.chown(home / "munge", "munge")
    as_munge = ["runuser", "-u", "munge", "--"]
    key = f"--keyfile={home}/munge/key"
    subprocess.run([*as_munge, "mungekey", "--create", key], check=True)
    names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
    files = [f"--{option}={home}/munge/{name}" for option, name in names.items()]
    files.append(f"--seed-file={home}/munge/seed")
    subprocess.run([*as_munge, "munged", "--force", *files], check=True)
    host = subprocess.run(["hostname", "-s"], capture_output=True, text=True).stdout.strip()
    port = 20000 + os.getpid() % 20000
    conf = home / "slurm.conf"
    conf.write_text(CONF.format(home=home, host=host, ctld_port=port, slurmd_port=port + 1))
    environment = os.environ | {"SLURM_CONF": str(conf)}
    try:
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([daemon], env=environment, check=True, timeout=30)
        wait_until(lambda: "idle" in command(environment, "sinfo", "-h", "-o", "%T"), 30)
        yield environment
    finally:
        for name in ("slurmd.pid", "slurmctld.pid", "munge/pid"):
            end(home / name)


def end(pid_file: Path) -> None:
    """End the daemon whose number is in the file."""
    if pid_file.exists():
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 15)


def command(environment, *words: str) -> str:
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def steps_in(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [line["step"] for line in read_metrics(path)] if path.exists() else []


def state_of(slurm, job: str) -> str:
    return command(slurm, "scontrol", "show", "job", "-o", job).split("JobState=")[1].split()[0]


def test_a_preempted_job_goes_back_into_the_queue_and_ends(slurm, tmp_path, small_run):
    run, log = tmp_path / "run", tmp_path / "job.log"
    arguments = small_run(out=run, mesh="dp2,tp2", train__steps=STEPS, checkpoint__every_steps=60)
    environment = slurm | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
    }
    sizes = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"]
    options = [*sizes, "--time=10", f"--output={log}"]
    submit = ["sbatch", "--parsable", *options, str(SCRIPT), *arguments]
    job = command(environment, *submit).strip()
    try:
        wait_until(lambda: steps_in(run), 120)
        command(slurm, "scancel", "--signal=USR1", "--batch", job)
        wait_until(lambda: state_of(slurm, job) == "PENDING", 60)
        stopped_at = complete_steps(run)[-1]
        assert 1 <= stopped_at < STEPS
        wait_until(lambda: state_of(slurm, job) in ("COMPLETED", "FAILED", "TIMEOUT"), 180)
    except AssertionError as error:
        text = log.read_text() if log.exists() else "no log"
        raise AssertionError(f"{error}: {state_of(slurm, job)}\n{text}") from None
    finally:
        subprocess.run(["scancel", job], env=slurm, timeout=30)
    text = log.read_text()
    assert state_of(slurm, job) == "COMPLETED", text
    assert f"stopped by SIGUSR1: step {stopped_at} is saved" in text
    assert f"job {job} saved and goes back into the queue" in text
    assert f"continuing at step {stopped_at}" in text and "in 2 processes" in text
    updates = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert updates == list(range(1, STEPS + 1))
