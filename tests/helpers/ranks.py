"""Two processes that run tests together, kept for the whole test run: starting torch takes longer than most tests.

A test gives the name of a module-level function to `run`, which each rank calls; what they return comes back as a list.
Nothing can hang: a rank that fails or takes too long ends all of them, and the next test starts new ones.
"""

import contextlib
import datetime
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT = 120  # seconds for one call
_GRACE = 5  # for the others to end, once one has failed


class Ranks:
    """Processes that wait for functions to run; a group of torch's, by gloo and a file, is set up in each."""

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """`function(*args)` in every rank, at once; what each returned. AssertionError if any failed."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, warnings.filters[:]))  # what the test makes an error is one there, too
        return self._answers(timeout)

    def _answers(self, timeout: float) -> list[Any]:
        answers, deadline = {}, time.monotonic() + timeout
        while len(answers) < self.count and time.monotonic() < deadline:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            for pipe in multiprocessing.connection.wait(waiting, timeout=0.5):
                rank = self._pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = (False, "the process ended")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        failed = {rank: error for rank, (fine, error) in answers.items() if not fine}
        late = sorted(set(range(self.count)) - set(answers))
        if failed or late:
            self.stop()
            told = "\n".join(f"rank {rank}: {error}" for rank, error in failed.items())
            raise AssertionError(f"{told}\n" + (f"no answer from ranks {late}" if late else ""))
        return [answers[rank][1] for rank in range(self.count)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.count, str(store)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._answers(TIMEOUT)  # that they are there

    def stop(self) -> None:
        """End the processes."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(pipe: Any, rank: int, count: int, store: str) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback.pop()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count, timeout=timeout)
    pipe.send((True, None))
    while True:
        with contextlib.suppress(EOFError):
            function, args, filters = pipe.recv()
            try:
                torch.manual_seed(0)
                with warnings.catch_warnings():
                    warnings.filters[:] = filters
                    answer = (True, function(*args))
            except BaseException:
                answer = (False, traceback.format_exc())
            try:
                pipe.send(answer)
            except Exception:
                pipe.send((False, f"the answer cannot be sent: {traceback.format_exc()}"))
            continue
        return
