import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import worker_tasks
from flowtilt.domains.molecules.workers import Lost, MissingExtra, WorkerError, WorkerPool, shared_pool
from flowtilt.domains.molecules.xtb import Molecule, XTBSettings, single_point


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_keep_the_order_of_the_items_for_any_number_of_workers(workers):
    with WorkerPool(workers) as pool:
        assert pool.map(worker_tasks.slow_square, range(11), 10) == [n * n for n in range(11)]


def test_workers_stay_from_call_to_call_and_share_the_items(pool):
    first = set(pool.map(worker_tasks.process, range(8), 10))
    second = set(pool.map(worker_tasks.process, range(8), 10))
    assert first == second
    assert len(first) == 2
    assert os.getpid() not in first


def test_no_items_need_no_workers():
    with WorkerPool(2) as pool:
        assert pool.map(worker_tasks.square, [], 10) == []
        assert not pool._workers


def test_workers_are_lean_and_on_one_thread(pool):
    (found,) = pool.map(worker_tasks.surroundings, [None], 10)
    assert found == {"modules": [], "threads": "1"}


def test_functions_for_chemistry_do_not_import_torch():
    code = """
        import sys
        from flowtilt.domains.molecules import chemistry, relaxation, sdf, workers, xtb
        sys.exit(sum(name in sys.modules for name in ("torch", "rdkit", "tblite", "scipy")))
    """
    path = os.pathsep.join(sys.path)
    assert subprocess.call([sys.executable, "-c", textwrap.dedent(code)], env={"PYTHONPATH": path}) == 0


def test_an_item_that_takes_too_long_is_lost_alone(pool):
    started = time.process_time()
    results = pool.map(worker_tasks.behave, ["a", "hang", "b", "c", "hang", "d"], 0.3)
    assert [r for r in results if not isinstance(r, Lost)] == ["a", "b", "c", "d"]
    assert results[1] == results[4] == Lost(True, "exceeded its time")
    assert time.process_time() - started < 5  # the caller waits, it does not poll


@pytest.mark.parametrize(
    ("kind", "detail"), [("crash", "killed by signal 11"), ("exit", "ended with code 3")]
)
def test_a_crash_is_lost_alone(pool, kind, detail):
    assert pool.map(worker_tasks.behave, ["a", kind, "b"], 10) == ["a", Lost(False, detail), "b"]
    assert pool.map(worker_tasks.behave, ["c"], 10) == ["c"]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("workers", [1, 3])
def test_many_losses_among_many_items(workers):
    """Items that a lost worker had not begun are not lost with it."""
    kinds = (
        np.random.default_rng(0).choice(["a", "b", "crash", "exit"], size=40, p=[0.4, 0.4, 0.1, 0.1]).tolist()
    )
    with WorkerPool(workers) as pool:
        results = pool.map(worker_tasks.behave, kinds, 10)
    for kind, result in zip(kinds, results, strict=True):
        assert isinstance(result, Lost) if kind in ("crash", "exit") else result == kind
    assert 4 <= sum(isinstance(result, Lost) for result in results) <= 20


def test_a_worker_that_died_between_calls_is_replaced():
    with WorkerPool(1) as pool:
        (first,) = pool.map(worker_tasks.process, [None], 10)
        os.kill(first, signal.SIGKILL)
        pool._workers[0].process.wait()
        (second,) = pool.map(worker_tasks.process, [None], 10)
        assert second != first


def test_an_exception_is_raised_with_its_trace_and_leaves_the_pool_usable(pool):
    # Of several workers any may be the first to fail.
    with pytest.raises(WorkerError, match=r"(?s)in fail.*ZeroDivisionError: item \d"):
        pool.map(worker_tasks.fail, range(3), 10)
    assert pool.map(worker_tasks.square, range(3), 10) == [0, 1, 4]


@pytest.mark.parametrize("package", ["tblite", "rdkit"])
def test_a_missing_package_of_the_extra_is_named_with_the_fix(pool, package):
    with pytest.raises(MissingExtra, match=rf"'{package}'; .*pip install 'flowtilt\[molecules\]'"):
        pool.map(worker_tasks.miss, [package], 10)


def test_another_missing_module_is_not_blamed_on_the_extra(pool):
    with pytest.raises(WorkerError, match="No module named 'elsewhere'"):
        pool.map(worker_tasks.miss, ["elsewhere"], 10)


def test_a_worker_that_cannot_start_is_an_error(monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with WorkerPool(1) as pool, pytest.raises(WorkerError, match="ended with code 1 before it was ready"):
        pool.map(worker_tasks.square, [1], 10)


def test_a_pool_needs_a_worker():
    with pytest.raises(ValueError, match="workers=0"):
        WorkerPool(0)


def test_the_shared_pool_is_one(monkeypatch):
    assert shared_pool(2) is shared_pool(2)
    assert shared_pool(2) is not shared_pool(1)
    mine = shared_pool(2)
    monkeypatch.setattr(os, "getpid", lambda: 0)  # as in a forked child
    assert shared_pool(2) is not mine


def test_workers_end_with_the_process_that_started_them():
    code = """
        import os, worker_tasks
        from flowtilt.domains.molecules.workers import shared_pool
        print(*set(shared_pool(2).map(worker_tasks.process, range(6), 10)), flush=True)
        os.kill(os.getpid(), 9)
    """
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, check=False
    )
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 120
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, pids))


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_installation_without_tblite_says_what_to_install(tmp_path, monkeypatch):
    stand_in = tmp_path / "tblite" / "__init__.py"
    stand_in.parent.mkdir()
    stand_in.write_text("raise ModuleNotFoundError('No module named tblite', name='tblite')")
    monkeypatch.syspath_prepend(tmp_path)
    task = (Molecule(np.array([1]), np.zeros((1, 3))), XTBSettings())
    with WorkerPool(1) as pool, pytest.raises(MissingExtra, match=r"tblite.*flowtilt\[molecules\]"):
        pool.map(single_point, [task], 10)
