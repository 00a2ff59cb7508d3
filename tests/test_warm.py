"""Processes that are forked from a warm one are to their caller what fresh ones are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import warm

pytestmark = pytest.mark.slow
SAYS = """
import os, sys, torch
print(__name__, sys.argv, sys.path[0], os.getcwd(), os.environ.get("GIVEN"), sys.stdin.read(),
      "bpo" in sys.modules, len(os.environ))
print("aside", file=sys.stderr)
sys.exit(int(sys.argv[-1]))
"""


def done(python, *arguments, **named):
    return subprocess.run([python, *arguments], text=True, capture_output=True, **named)


@pytest.mark.parametrize("how", ["-c", "-m", "script", "-u"])
def test_it_gets_and_gives_back_what_a_fresh_process_does(tmp_path, how):
    (tmp_path / "says.py").write_text(SAYS)
    start = {"-c": ["-c", SAYS], "-m": ["-m", "says"], "script": [str(tmp_path / "says.py")],
             "-u": ["-u", "-m", "says"]}[how]
    fresh, forked = (done(python, *start, "a b", "7", cwd=tmp_path, input="typed",
                          env={**os.environ, "GIVEN": "é\n"})
                     for python in (sys.executable, warm.python()))
    assert (forked.returncode, forked.stdout, forked.stderr) == (7, fresh.stdout, fresh.stderr)


def test_an_error_is_printed_and_a_refused_environment_is_said():
    failed = done(warm.python(), "-c", "raise ValueError('here')")
    assert failed.returncode == 1 and failed.stderr.endswith("ValueError: here\n")
    other = done(warm.python(), "-c", "", env={**os.environ, "OMP_NUM_THREADS": "3"})
    if warm.python() != sys.executable:
        assert other.returncode == 1 and "['OMP_NUM_THREADS'] differ" in other.stderr


ENDS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests started with & would ignore it
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number, code", [
    (signal.SIGTERM, 5), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_ends_the_process_itself(number, code):
    with subprocess.Popen([warm.python(), "-c", ENDS], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait() == code
        assert process.stdout.read() == ""  # comes once nobody holds the stream any more
    gone_by = time.monotonic() + 60
    while Path(f"/proc/{pid}/status").exists():
        assert time.monotonic() < gone_by
        time.sleep(0.01)


def test_what_it_starts_is_warm_as_well_and_draws_numbers_of_its_own():
    start = ("import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', "
             "'import random, sys, numpy; print(random.random(), numpy.random.rand(), "
             "sys.executable)']).returncode)")
    first, second = (done(warm.python(), "-c", start).stdout.split() for _ in range(2))
    assert first[2] == second[2] == warm.python()
    assert first[0] != second[0] and first[1] != second[1]
