"""The launcher for one machine with processes of any kind, and the files for clusters."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"


def start(*words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(LAUNCH / "local.py"), *words],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def local(count: int, program: str, seconds: float = 30, **environment: str):
    """Exit code, output and errors of a Python program in several processes."""
    process = start(f"--processes={count}", "--", sys.executable, "-c", program, **environment)
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output.splitlines(), errors


def test_every_process_is_told_who_it_is_and_prefixed():
    program = (
        "import os; print(*[os.environ['JAX_' + n] for n in "
        "('PROCESS_ID', 'NUM_PROCESSES', 'COORDINATOR_ADDRESS')])"
    )
    code, lines, _ = local(3, program)
    assert code == 0
    addresses = {line.split()[-1] for line in lines}
    assert len(addresses) == 1 and addresses.pop().startswith("localhost:")
    assert sorted(line.rsplit(" ", 1)[0] for line in lines) == ["[0] 0 3", "[1] 1 3", "[2] 2 3"]


def test_gpus_are_divided():
    program = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    assert sorted(local(2, program, CUDA_VISIBLE_DEVICES="4,5,6,7")[1]) == ["[0] 4,5", "[1] 6,7"]


def test_the_first_failure_ends_all(monkeypatch):
    sys.path.insert(0, str(LAUNCH))
    try:
        import local as launcher
    finally:
        sys.path.remove(str(LAUNCH))
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 1)
    program = "import os, time; os.environ['JAX_PROCESS_ID'] == '1' and exit(3); time.sleep(60)"
    began = time.monotonic()
    assert launcher.main(["--processes=3", "--", sys.executable, "-c", program]) == 3
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_passed_on_and_the_exit_code_back(number):
    program = (
        "import signal, time\n"
        f"signal.signal({int(number)}, lambda *_: exit(75))\n"
        "print('ready', flush=True)\n"
        # Not one long sleep: Python begins it even if the signal comes a moment before.
        "for _ in range(600): time.sleep(0.1)"
    )
    process = start("--processes=2", "--", sys.executable, "-c", program)
    ready = [process.stdout.readline() for _ in range(2)]
    assert sorted(ready) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_mistakes_are_one_sentence():
    for words, sentence in (
        (["--processes=2"], "no command"),
        (["--processes=0", "--", "true"], "--processes=0 starts nothing"),
        (["--processes=2", "--", "/no/such/program"], "cannot start /no/such/program"),
    ):
        process = start(*words)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 2
        assert sentence in errors and "Traceback" not in errors


def test_kubernetes_accepts_its_file():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    documents = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
    for document in documents:
        for version in ("1.31", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(document, version, strict=True)
    service, job = documents
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    # What the schema cannot know: the names by which the pods find each other.
    name = job["metadata"]["name"]
    assert (
        service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    )
    assert service["spec"]["selector"] == {"job-name": name}
    address, _, port = environment["JAX_COORDINATOR_ADDRESS"].partition(":")
    assert address == f"{name}-0.{pod['subdomain']}"
    assert (
        int(port) == container["ports"][0]["containerPort"] == service["spec"]["ports"][0]["port"]
    )
    assert spec["completions"] == spec["parallelism"] == int(environment["JAX_NUM_PROCESSES"])
    ignored = [rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"]
    assert ignored[1]["onExitCodes"]["values"] == [75, 76]


def test_files_open_with_how_to_use_them():
    uses = {"local.py": "python launch/local.py", "slurm.sbatch": "sbatch launch/slurm.sbatch"}
    uses["kubernetes.yaml"] = "kubectl apply -f launch/kubernetes.yaml"
    for name, use in uses.items():
        assert use in "\n".join((LAUNCH / name).read_text().splitlines()[:6])
