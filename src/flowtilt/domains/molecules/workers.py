"""A pool of worker processes for programs that may hang, crash or use threads of their own.

Quantum chemistry and the perception of bonds run once a molecule, in milliseconds, in compiled code that
no Python signal interrupts. So each item goes to a process of its own that the caller can lose: a worker
that crashes, or exceeds the time of an item, costs that item alone and is replaced.

Workers are fresh interpreters on one thread each, and import what a function's module imports and no
more: modules of functions for workers keep away from torch. Items go to workers as they become free,
which balances the load; results come in the order of the items and do not depend on how many workers
there are.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")

ONE_THREAD = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1")
"""Variables of the environment in which workers start."""

EXTRA = ("rdkit", "tblite")
"""Packages that only molecules need."""


class WorkerError(RuntimeError):
    """A worker did not start, or a function failed on an item in a way that it does not report itself."""


class MissingExtra(ImportError):
    """A package of the extra ``molecules`` is not installed."""


def missing_extra(what: object) -> str:
    """The message of :class:`MissingExtra`."""
    return f"{what}; molecules need more packages: pip install 'flowtilt[molecules]'"


@dataclass(frozen=True)
class Lost:
    """Stands for the result of an item that took its worker down.

    Attributes:
        timed_out: whether the item exceeded its time; else the worker crashed.
    """

    timed_out: bool
    detail: str


class _Worker:
    """One process, the connection to it, and the indices of the items that it has, the current first."""

    def __init__(self) -> None:
        self.held: deque[int] = deque()
        self.connection, theirs = Pipe()
        with theirs:
            path = os.pathsep.join(entry or str(os.curdir) for entry in sys.path)
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                env=os.environ | ONE_THREAD | {"PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def await_ready(self) -> None:
        try:
            self.connection.recv_bytes()
        except (EOFError, OSError):
            code = self.process.wait()
            raise WorkerError(
                f"a worker process ended with code {code} before it was ready; its message is on stderr"
            ) from None

    def lost(self) -> Lost:
        """Why the process ended, once its connection has closed."""
        code = self.process.wait()
        if code == -signal.SIGPROF:
            return Lost(True, "exceeded its time")
        return Lost(False, f"killed by signal {-code}" if code < 0 else f"ended with code {code}")

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


class WorkerPool:
    """Worker processes that stay for many calls of :meth:`map`; a context manager that ends them.

    They start with the first call. A pool is for one thread of one process.

    Args:
        workers: how many; the processors that this process may use if not given.

    Raises:
        ValueError: if ``workers`` is less than one.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"a pool needs at least one worker, got workers={workers}")
        # How many this process may use, where the system tells; else how many there are.
        known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.size = workers or known
        self._workers: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; a later call starts new ones."""
        while self._workers:
            self._workers.pop().stop()

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], seconds: float
    ) -> list[Result | Lost]:
        """Apply a function to every item, in the workers.

        Args:
            function: of an importable module that is not the main program's.
            items: anything that can be pickled and is small (tens of kilobytes).
            seconds: processor time that an item may take, so that a busy machine changes no result.

        Returns:
            in the order of the items, what the function returned, or :class:`Lost`.

        Raises:
            MissingExtra: if the function cannot import what it needs.
            WorkerError: if it raises anything else, or a worker does not start.
        """
        try:
            return self._map(function, items, seconds)
        except BaseException:  # workers may still be busy with items of this call
            self.close()
            raise

    def _map(
        self, function: Callable[[Item], Result], items: Sequence[Item], seconds: float
    ) -> list[Result | Lost]:
        self._start(min(self.size, len(items)))
        results: list[Result | Lost | None] = [None] * len(items)
        waiting = deque(range(len(items)))
        while waiting or any(worker.held for worker in self._workers):
            self._hand_out(waiting, lambda index: pickle.dumps((function, items[index], seconds)))
            busy = {worker.connection: worker for worker in self._workers if worker.held}
            for connection in wait(list(busy)) if busy else []:
                worker = busy[cast(Connection, connection)]
                try:
                    results[worker.held[0]] = _unpacked(worker.connection.recv_bytes())
                    worker.held.popleft()
                except (EOFError, ConnectionResetError):
                    lost, *others = worker.held
                    results[lost] = worker.lost()
                    waiting.extendleft(reversed(others))
                    self._replace(worker)
        return cast("list[Result | Lost]", results)

    def _hand_out(self, waiting: deque[int], message: Callable[[int], bytes]) -> None:
        """Give every worker an item, and while there are many a second one, so that none waits for us."""
        for held in range(2):
            for worker in list(self._workers):
                if len(worker.held) != held or len(waiting) <= held * len(self._workers):
                    continue
                try:
                    worker.connection.send_bytes(message(waiting[0]))
                except (BrokenPipeError, ConnectionResetError):
                    if not worker.held:  # it died while it was idle; else its end is read as that of an item
                        self._replace(worker)
                else:
                    worker.held.append(waiting.popleft())

    def _start(self, count: int) -> None:
        old = len(self._workers)
        while len(self._workers) < count:
            self._workers.append(_Worker())
        for worker in self._workers[old:]:
            worker.await_ready()

    def _replace(self, worker: _Worker) -> None:
        worker.stop()
        self._workers.remove(worker)
        self._start(len(self._workers) + 1)


def _unpacked(reply: bytes) -> Any:
    kind, value = pickle.loads(reply)
    if kind == "missing":
        raise MissingExtra(missing_extra(value))
    if kind == "error":
        raise WorkerError(f"a worker failed on an item:\n{value}")
    return value


_shared: dict[tuple[int, int | None], WorkerPool] = {}


def shared_pool(workers: int | None = None) -> WorkerPool:
    """The pool of this process with that many workers, kept until the process ends."""
    key = (os.getpid(), workers)  # a forked child must not speak with its parent's workers
    if key not in _shared:
        _shared[key] = WorkerPool(workers)
        atexit.register(_shared[key].close)
    return _shared[key]


def serve(connection: Connection) -> None:
    """Apply functions to items until the other end closes; the loop of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what an interrupt ends
    connection.send_bytes(b"ready")
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, item, seconds = pickle.loads(message)
            # Its signal ends the process also inside compiled code, and if the caller is gone.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            reply = ("result", function(item))
        except Exception as error:
            missing = isinstance(error, ImportError) and (error.name or "").partition(".")[0] in EXTRA
            reply = ("missing", str(error)) if missing else ("error", traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(pickle.dumps(reply))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
