"""Which process of a run this is, and what goes wrong before they have met."""

import argparse
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import processes
from jaxlm.errors import UserError
from jaxlm.mesh import make_mesh
from jaxlm.placement import place, rows_held, to_host
from jaxlm.processes import ALONE, Launch, find_launch, local_devices, wait_for

SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "node1:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


def find(environment=None, **flags: str) -> Launch | None:
    return find_launch(argparse.Namespace(**flags), environment or {})


def refused(environment=None, **flags: str) -> str:
    with pytest.raises(UserError) as caught:
        find(environment, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_process_on_its_own():
    assert find() is None
    assert find({"JOB_COMPLETION_INDEX": "3"}) is None
    assert find(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find(coordinator="a:1", num_processes="1", process_id="0") is None
    # A batch script has Slurm's job, but no step.
    assert find({k: v for k, v in SLURM.items() if "STEP" not in k}) is None


def test_flags_are_over_variables_and_these_over_schedulers():
    assert find(JAX) == Launch(1, 2, "node1:1234")
    assert find(JAX, process_id="0", num_processes="5") == Launch(0, 5, "node1:1234")
    assert find(JAX | {"JOB_COMPLETION_INDEX": "0"}).index == 1
    kubernetes = {k: v for k, v in JAX.items() if k != "JAX_PROCESS_ID"}
    assert find(kubernetes | {"JOB_COMPLETION_INDEX": "1"}) == Launch(1, 2, "node1:1234")
    assert find(SLURM | {"JAX_COORDINATOR_ADDRESS": "b:5"}).coordinator == "b:5"


def test_slurm_and_open_mpi():
    slurm, open_mpi = find(SLURM), find(OPEN_MPI)
    assert (slurm.index, slurm.count, slurm.coordinator) == (1, 4, None)
    assert (open_mpi.index, open_mpi.count, open_mpi.coordinator) == (3, 8, None)
    # Open MPI 5 does not tell the launcher's address.
    newer = {k: v for k, v in OPEN_MPI.items() if "MCA" not in k}
    assert "--coordinator is missing" in refused(newer)
    assert find(newer, coordinator="node1:1234").coordinator == "node1:1234"


def test_gpus_of_a_task():
    def gpus(visible, **changes):
        return local_devices(SLURM | {"CUDA_VISIBLE_DEVICES": visible} | changes)

    assert gpus("0,1,2,3,4,5,6,7") == (4, 5, 6, 7)
    assert gpus("0,1") == (1,)
    assert gpus("3") == (0,)  # a GPU of its own: Slurm hides the others
    alone = {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}
    assert gpus("0,1,2,3", **alone) == (0, 1, 2, 3)
    assert gpus("0,1", JAX_LOCAL_DEVICE_IDS="0") is None
    assert gpus("") is None
    assert local_devices(OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "0,1"}) == (1,)
    assert local_devices({"CUDA_VISIBLE_DEVICES": "0,1"}) is None


def test_what_is_missing_or_wrong_is_one_sentence():
    assert "--num_processes is missing" in refused(coordinator="a:1")
    assert "--process_id is missing" in refused(coordinator="a:1", num_processes="2")
    assert "--coordinator is missing" in refused(num_processes="2", process_id="0")
    assert "process_id=2 is out of range" in refused(JAX, process_id="2")
    assert "from 0 to 1" in refused(JAX, process_id="-1")
    assert "num_processes='two' is not a whole number" in refused(JAX, num_processes="two")
    for address in ("node1", ":5", "node1:", "node1:x", "node1:99999"):
        assert f"coordinator={address!r} is not HOST:PORT" in refused(JAX, coordinator=address)


def test_a_coordinator_that_is_not_there():
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    with pytest.raises(UserError, match=rf"{address} could not be reached for 0\.3 s"):
        wait_for(address, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("busy", [True, False])
def test_a_first_process_that_cannot_meet_the_others_says_so(busy):
    with socket.socket() as other:
        other.bind(("", 0))
        port = other.getsockname()[1]
        if busy:
            other.listen()
        else:
            other.close()
        program = (
            "from jaxlm import processes, cli\n"
            "processes.CONNECT_SECONDS = 2\n"
            "def main(argv):\n"
            f"    launch = processes.Launch(0, 2, 'localhost:{port}')\n"
            "    with processes.joined(launch): pass\n"
            "cli.run_command(main)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    last = done.stderr.splitlines()[-1]
    words = "cannot listen at port" if busy else "not all 2 processes met at localhost:"
    assert words in last and last.startswith("error: "), done.stderr
    assert done.returncode == (2 if busy else 76)


def test_alone_there_is_nothing_to_agree_on():
    assert ALONE.is_first and ALONE.gather(3) == [3] and ALONE.from_first(lambda: 4) == 4
    ALONE.barrier()
    ALONE.check_same({"a": (1, 2)})
    assert ALONE.who == ""


class Device:
    """What `rows_held` looks at in a device."""

    def __init__(self, process: int):
        self.process_index = process


class Sharding:
    """Rows of a batch by process."""

    def __init__(self, *rows: tuple[int, slice]):
        self.rows = rows

    def devices_indices_map(self, shape):
        return {Device(process): (rows, slice(None)) for process, rows in self.rows}


def test_rows_held_by_several_processes_are_answered_for_once(monkeypatch):
    both = Sharding((0, slice(0, 4)), (1, slice(0, 4)), (1, slice(4, 6)), (2, slice(6, None)))
    seen = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        held, owned = rows_held(both, (8, 5))
        seen.append((held.tolist(), owned.tolist()))
    assert seen == [
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 1, 2, 3, 4, 5], [4, 5]),
        ([6, 7], [6, 7]),
    ]


def test_place_takes_the_rows_that_are_held(monkeypatch):
    """The way of several processes, on one: some rows at places of their own."""
    mesh = make_mesh("dp4,tp2")
    sharding = NamedSharding(mesh, PartitionSpec("dp", "tp"))
    whole = np.arange(48).reshape(8, 6)
    placed = place(whole, sharding)
    assert np.array_equal(to_host(placed), whole)
    monkeypatch.setattr(NamedSharding, "is_fully_addressable", False)
    for rows in (None, np.arange(8)):
        again = place({"x": whole}, sharding, rows, 8)["x"]
        assert again.sharding == sharding
        assert all(np.array_equal(s.data, whole[s.index]) for s in again.addressable_shards)


def test_the_mesh_is_divided_over_the_processes():
    with pytest.raises(UserError, match="6 devices, which do not divide over 4 processes"):
        make_mesh("dp3,tp2", processes=4)
    assert processes.Launch(0, 2, None).local_devices is None
