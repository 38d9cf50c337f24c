import io
import sys

import pytest

from vidgen.train import progress as progress_module
from vidgen.train.progress import Progress


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def run(monkeypatch, *, terminal, start=0, total=100, every=10, stop=40, enabled=True):
    """What is shown of steps of 2 s and 16 frames each, the first of which takes 300 s."""
    screen, clock = Screen(terminal), [1000.0]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    rates = []
    with Progress(start=start, total=total, enabled=enabled) as progress:
        for step in range(start + 1, stop + 1):
            clock[0] += 300.0 if step == start + 1 else 2.0
            progress.advance(16)
            if step % every == 0:
                rates.append(progress.rates())
                progress.show({"loss": 0.5, **rates[-1]})
    return screen.getvalue(), rates


def test_a_log_gets_a_line_for_each_interval_and_no_compile_in_the_time_left(monkeypatch):
    out, rates = run(monkeypatch, terminal=False)
    assert out.splitlines() == [
        "step 1/100: compiling",
        "step 10/100 loss=0.5000 0.5 steps/s 8.0 frames/s, 0:03:00 left",
        "step 20/100 loss=0.5000 0.5 steps/s 8.0 frames/s, 0:02:40 left",
        "step 30/100 loss=0.5000 0.5 steps/s 8.0 frames/s, 0:02:20 left",
        "step 40/100 loss=0.5000 0.5 steps/s 8.0 frames/s, 0:02:00 left",
    ]
    assert rates == [{"steps_per_second": 0.5, "frames_per_second": 8.0}] * 4


def test_the_first_step_alone_has_a_rate_but_tells_no_time(monkeypatch):
    out, rates = run(monkeypatch, terminal=False, start=50, total=52, every=1, stop=52)
    assert out.splitlines() == [
        "step 51/52: compiling",
        "step 51/52 loss=0.5000 0.00333 steps/s 0.1 frames/s",
        "step 52/52 loss=0.5000 0.5 steps/s 8.0 frames/s, 0:00:00 left",
    ]
    assert rates[0]["steps_per_second"] == pytest.approx(1 / 300)


def test_a_terminal_gets_one_line_that_is_rewritten(monkeypatch):
    out, _ = run(monkeypatch, terminal=True)
    first, _, rest = out.partition("\n")
    assert first == "step 1/100: compiling"
    assert rest.count("\n") == 1 and rest.count("\r") > 2
    lines = rest.split("\r")
    assert not [line for line in lines if line.startswith("0/100")]
    assert "01:18<02:00  2.00s/step, loss=0.5000 8.0 frames/s" in lines[-1]


def test_silent_where_not_enabled_or_nothing_is_left(monkeypatch):
    assert run(monkeypatch, terminal=False, enabled=False)[0] == ""
    assert run(monkeypatch, terminal=True, enabled=False)[0] == ""
    assert run(monkeypatch, terminal=False, start=40, total=40)[0] == ""
