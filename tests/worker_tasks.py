"""Functions for worker processes to run, of the kinds that a pool must survive."""

import os
import signal
import sys
import time


def square(number):
    return number * number


def slow_square(number):
    """Later items first, so that results arrive out of order."""
    time.sleep(0.02 * (5 - number % 5))
    return number * number


def process(_):
    time.sleep(0.02)
    return os.getpid()


def surroundings(_):
    return {
        "modules": [name for name in ("torch", "rdkit", "tblite") if name in sys.modules],
        "threads": os.environ["OMP_NUM_THREADS"],
    }


def fail(number):
    raise ZeroDivisionError(f"item {number}")


def behave(kind):
    """Hang, crash or answer."""
    if kind == "hang":
        while True:
            pass
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "exit":
        os._exit(3)
    return kind


def miss(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
