"""How far the work is said to be, at hand and over a stage: in a log, a terminal, a kernel."""

import sys
from types import SimpleNamespace

import pytest

from bpo.study import progress


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def worked(clock, label, units, seconds, *, done=0):
    """A part of ten units, of which some are done now, a line after each."""
    lines = []
    with progress.part(label, 10, done=done, unit="rows") as advance:
        for _ in range(units):
            clock.seconds += seconds
            advance()
            lines.append(progress.line())
    return lines


def test_the_time_left_is_that_of_all_announced_parts(clock):
    with progress.part("whole"):
        progress.announce([("there", 4), ("first", 1), ("second", 3)])
        with progress.part("there"):  # nothing is left to do of it
            pass
        assert progress.shares() == (0.5, 0.5)
        said = worked(clock, "first", 10, 2)
        assert said[4] == "first 5 of 10 rows, 10 s left; all in all 56%, 1 min 10 s left"
        assert worked(clock, "unannounced", 1, 0)[0].endswith("all in all 62%, 1 min 0 s left")
        # Rows from before an interruption took no time.
        said = worked(clock, "second", 5, 6, done=5)
        assert said[4] == "second 10 of 10 rows, 0 s left; all in all 100%, 0 s left"
        assert progress.shares() == pytest.approx((1, 0.5 + 0.375 / 2))


def test_a_stage_in_a_stage_counts_as_its_part(clock):
    with progress.part("whole"):
        progress.announce([("s/2", 1), ("s/3", 1)])
        for name in ("s/2", "s/3"):
            with progress.part(name):
                progress.announce([("a", 3), ("b", 1)])
                worked(clock, "a", 10, 1)
                done = progress.shares()[0]
        assert done == 0.5 + 0.5 * 0.75


def test_what_an_exception_left_open_ends_with_what_is_around_it(clock):
    with pytest.raises(KeyboardInterrupt), progress.part("whole"):
        left = progress.part("left open", 5)
        left.__enter__()
        raise KeyboardInterrupt
    left.__exit__(None, None, None)
    with progress.part("again", 2) as advance:
        advance()
        assert progress.line().startswith("again 1 of 2")


def test_a_log_has_a_line_a_minute_and_a_terminal_one_that_goes(clock, capsys, monkeypatch):
    with progress.stage("s/1", "1 is computed"):
        worked(clock, "rows", 10, 15)
    told = capsys.readouterr()
    assert told.out == "1 is computed\n"
    assert told.err == "rows 4 of 10 rows, 1 min 30 s left\nrows 8 of 10 rows, 30 s left\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.stage("s/1", "1 is computed"):
        worked(clock, "rows", 10, 15)
    lines = capsys.readouterr().err.split("\r")
    assert lines[1].rstrip() == "rows 1 of 10 rows, 2 min 15 s left"
    assert lines[-1] == "" and not lines[-2].strip(), "the terminal still shows it"


def test_a_kernel_s_bar_is_updated_in_place_and_leaves_the_sentence(clock, capsys, monkeypatch):
    shown = []
    display = SimpleNamespace(update=lambda data, raw: shown.append(data))
    monkeypatch.setattr("IPython.display.display",
                        lambda data, **_: shown.append(data) or display)
    monkeypatch.setattr(progress, "_in_kernel", lambda: True)
    monkeypatch.delenv(progress.RUN, raising=False)
    sentence = "1 is computed, since <b> changed"
    with pytest.raises(ZeroDivisionError), progress.stage("s/1", sentence):
        worked(clock, "rows", 10, 1)
        raise ZeroDivisionError
    assert shown[0] == shown[-1] == {"text/plain": sentence}
    bar = '<progress value="0.500"></progress> rows 5 of 10 rows, 5 s left'
    assert bar in shown[5]["text/html"]
    assert "&lt;b&gt;" in shown[5]["text/html"]
    assert capsys.readouterr() == ("", "")


def test_what_units_took_is_told_apart_from_what_happened_between(clock, monkeypatch):
    monkeypatch.setattr(progress, "ended", [])
    with progress.part("read"):  # counts nothing
        clock.seconds += 5
    with progress.part("bpo", 3, unit="steps") as advance:
        for seconds in (10, 2, 2):  # the first warms up
            clock.seconds += seconds
            advance()
            clock.seconds += 7  # a checkpoint is written
            advance(0)
    [part] = progress.ended
    assert (part.label, part.done, part.spent, part.first) == ("bpo", 3, 14, 10)
