"""torchrun with two nodes, here two agents on the loopback: the losses of one process; and a rank that is killed."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import elastic
import pytest
import torch
from safetensors.torch import load_file

TIMEOUT = 300  # seconds; it takes 20 when nothing else runs


def two_nodes(tmp_path: Path, *arguments: object, restarts: int = 0) -> str:
    """Runs elastic.py by an agent for each node, with one process each; what they print."""
    # Without the second, processes that are started again may be told where those listened that have died (torch 2.13).
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for name in {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}:
        env["GLOO_SOCKET_IFNAME"] = name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    meeting += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    command = [*launcher, *meeting, elastic.__file__, *map(str, arguments)]
    logs = [tmp_path / f"node-{node}.log" for node in range(2)]
    agents = []
    try:
        for log in logs:
            with open(log, "w") as file:
                agents.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env))
        deadline = time.monotonic() + TIMEOUT
        while None in (codes := [agent.poll() for agent in agents]) and time.monotonic() < deadline:
            if any(codes):  # the other one may wait for it for long
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.1)
    finally:
        for agent in agents:
            agent.terminate()  # which ends its processes, too; nothing, if it has ended
            agent.wait()
    printed = "\n".join(log.read_text() for log in logs)
    assert codes == [0, 0], printed
    return printed


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, str]:
    """A run in whose FSDP2 part the second rank was killed in step 6, after a checkpoint at step 4; what it printed."""
    folder = tmp_path_factory.mktemp("killed")
    printed = two_nodes(folder, folder, 6, restarts=1)
    assert (folder / "fsdp" / "died").exists()
    return folder, printed


def losses(folder: Path) -> list[float]:
    return json.loads((folder / f"step-{elastic.STEPS}" / "losses.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_nodes_are_one_process(tmp_path, killed, engine):
    alone = elastic.train(tmp_path, "alone")
    assert alone[-1] < 0.5 * alone[0]
    assert losses(killed[0] / engine) == pytest.approx(alone, rel=1e-10)  # float64; the order of sums differs


@pytest.mark.slow
def test_a_killed_rank_goes_on_from_the_last_checkpoint(tmp_path, ranks, killed):
    """Step 5 was done twice, and all is as if nobody had been killed."""
    folder, printed = killed
    lines = sorted(line for line in printed.splitlines() if "goes on from fsdp" in line)
    assert lines == ["rank 0 goes on from fsdp/step-4", "rank 1 goes on from fsdp/step-4"]
    straight = tmp_path / "straight"
    assert ranks.run(elastic.train, straight, "fsdp") == [losses(folder / "fsdp")] * 2
    name = f"step-{elastic.STEPS}/adapter.safetensors"
    torch.testing.assert_close(load_file(folder / "fsdp" / name), load_file(straight / name), rtol=0, atol=0)
