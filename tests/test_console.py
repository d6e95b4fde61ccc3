"""What a person sees while a run goes on: words, the count, plain lines, the live picture."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from selfmoa import console
from selfmoa.console.board import Meter
from selfmoa.console.live import REDRAWS_A_SECOND, Live
from selfmoa.console.views import Plain
from selfmoa.console.words import clean, columns, duration, reading
from selfmoa.rundir import ROUND_STAGES

PLAN = [("reset", 0), ("evaluate", 0)]
PLAN += [(name, round_) for round_ in (1, 2, 3) for name in ROUND_STAGES] + [("report", 0)]


INSTRUCT = (
    "safety 41.2 % [39.2, 43.2], helpfulness 95.0 % [93.0, 97.0], over-refusal 2.0 % [0.0, 4.0]"
)
RESET = (
    "safety 0.0 % [0.0, 2.0], helpfulness 93.0 % [91.0, 95.0], over-refusal 100.0 % [98.0, 100.0]"
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def estimate(value, unjudged=0):
    low, high = max(0.0, value - 0.02), min(1.0, value + 0.02)
    return {"value": value, "low": low, "high": high, "n": 400, "n_unjudged": unjudged}


def metrics(safety, helpfulness, over_refusal, unjudged=0):
    return {
        "safety": estimate(safety, unjudged),
        "helpfulness": estimate(helpfulness),
        "over_refusal": estimate(over_refusal),
    }


def begin(listen, directory="runs/demo", rounds=3, plan=PLAN):
    listen("run_started", name="demo", directory=directory, recipe="r", rounds=rounds, stages=plan)


def do(listen, clock, stage, round_, seconds):
    listen("stage_started", stage=stage, round=round_)
    clock.now += seconds
    listen("stage_done", stage=stage, round=round_, seconds=seconds, skipped=False, note="")


def play(listen, clock):
    """Tell a run up to the middle of its second round."""
    begin(listen)
    do(listen, clock, "reset", 0, 41)
    listen("measured", phase="instruct", metrics=metrics(0.412, 0.95, 0.02))
    listen("measured", phase="reset", metrics=metrics(0.0, 0.93, 1.0))
    listen("stage_started", stage="evaluate", round=0)
    listen("stage_done", stage="evaluate", round=0, seconds=9.3, skipped=True, note="")
    for stage in ROUND_STAGES:
        do(listen, clock, stage, 1, 123.4)
    listen("measured", phase="round 1", metrics=metrics(0.912, 0.93, 0.04, unjudged=3))
    listen("decision", round=1, accepted=True, reason="safer \x1b[31mand\nnot mute")
    listen("stage_started", stage="red_team", round=2)
    for n in range(10):
        clock.now += 1
        facts = {"stage": "red_team", "round": 2, "done": 12 * n, "total": 480}
        listen("progress", **facts, unit="call", note="")


# Words


def test_clean_leaves_one_printable_line():
    assert clean("a\x1b[2Jb\r\n\tc\x07\u202ed\ud800 \u200b") == "a [2Jb c d"
    assert clean("naïve 漢字") == "naïve 漢字"


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"value": 0.912, "low": 0.889, "high": 0.932}, "91.2 % [88.9, 93.2]"),
        ({"value": 1.0, "low": 1.0, "high": 1.0}, "100.0 % [100.0, 100.0]"),
        ({"value": None, "low": None, "high": None}, "n/a"),
        (None, "n/a"),
    ],
)
def test_no_rate_is_told_without_its_interval(found, told):
    assert reading(found) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (-1, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "1m40s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (7260, "2h01m"),
    ],
)
def test_duration_is_short(seconds, told):
    assert duration(seconds) == told


def test_columns_line_up():
    assert columns([("a", "bb"), ("ccc", "")], indent=" ") == " a    bb\n ccc"


# The count


def test_rate_and_time_left_by_hand():
    clock = Clock()
    meter = Meter("judge@2", clock)
    meter.update(0, 480, "response")
    assert (meter.rate(), meter.left()) == (None, None)
    assert meter.line() == "judge@2: 0/480 responses"
    clock.now += 10
    meter.update(120, 480, "response", "fast")  # 120 in 10 s: 12/s, 360 left: 30 s
    assert (meter.rate(), meter.left()) == (12.0, 30.0)
    assert meter.line() == "judge@2: 120/480 responses, 12.0/s, 30 s left, fast"
    clock.now += 4
    assert meter.left() == 26.0
    clock.now += 400
    assert meter.left() == 0.0
    meter.update(480, 480, "response")
    assert "left" not in meter.line()


def test_what_an_earlier_process_did_is_not_fast():
    clock = Clock()
    meter = Meter("sample@1", clock)
    for done in (100, 200, 400):  # passed over in a moment
        meter.update(done, 500)
        clock.now += 0.1
    clock.now = 110.2  # 10 s after the last of them
    meter.update(420, 500)
    assert meter.rate() == pytest.approx(2.0)
    assert meter.left() == pytest.approx(40.0)


def test_rate_is_of_the_last_half_minute():
    clock = Clock()
    meter = Meter("train@1", clock)
    done = 0
    for _ in range(60):
        clock.now += 1
        done += 1
        meter.update(done, 1000)
    for _ in range(60):
        clock.now += 1
        done += 5
        meter.update(done, 1000)
    assert meter.rate() == pytest.approx(5.0)


def test_quick_looks_do_not_pile_up():
    clock = Clock()
    meter = Meter("judge@1", clock)
    for done in range(40_000):
        clock.now += 0.001
        meter.update(done, 40_000)
    assert len(meter._marks) < 130
    assert meter.rate() == pytest.approx(1000, rel=0.01)


def test_another_count_starts_anew():
    clock = Clock()
    meter = Meter("judge@1", clock)
    for facts in [(0, 10, "a"), (10, 10, "a"), (0, 10, "a")]:
        meter.update(*facts)
        clock.now += 5
    assert meter.rate() is None
    meter.update(7, 0, "row")
    assert meter.line() == "judge@1: 7 rows"


# Plain lines


def test_plain_lines_of_a_run():
    clock, out = Clock(), io.StringIO()
    view = Plain(out, clock)
    play(view.listen, clock)
    view.listen("stopped", round=2, reason="found too little")
    view.listen("run_done", directory="d", report="r.html", headline=["Safer\x07."])
    view.listen("something_new", whatever=1)
    view.stop()
    lines = out.getvalue().splitlines()
    assert lines[:7] == [
        "demo: 3 rounds, in runs/demo",
        "reset: started",
        "reset: done in 41 s",
        f"instruct: {INSTRUCT}",
        f"reset: {RESET}",
        "evaluate@0: started",
        "evaluate@0: already done",
    ]
    assert "3 of 403 unjudged for safety" in lines[-5]
    assert lines[-4:] == [
        "round 1 accepted: safer [31mand not mute",
        "red_team@2: started",
        "red_team@2: 108/480 calls, 12.0/s, 31 s left",
        "stopped after round 2: found too little",
    ]
    assert all(line.isprintable() for line in lines)
    assert (view.board.report, view.board.headline) == ("r.html", ["Safer ."])


def test_a_count_is_told_every_ten_seconds_and_only_if_it_grew():
    clock, out = Clock(), io.StringIO()
    listen = Plain(out, clock).listen
    for second in range(45):
        clock.now = 100.0 + second
        done = min(second, 15)
        listen("building", what="instruct model", done=done, total=100, unit="step")
    told = [line.split()[3] for line in out.getvalue().splitlines()]
    assert told == ["0/100", "10/100", "15/100"]


def test_a_training_counts_its_steps_and_remarks_are_told_where_they_belong():
    clock, out = Clock(), io.StringIO()
    view = Plain(out, clock)
    listen = view.listen
    listen("remark", text="shared prompts by 'mask':\x1b[2J exact")
    for n in range(3):
        clock.now += 10
        listen("training", what="out", done=10 * n, total=20, unit="step")
    listen("stage_started", stage="train", round=2)
    listen("remark", stage="train", round=2, text="1 of 9 rows are left out")
    listen("remark", stage="reset", round=0, text="going on from checkpoint-5")
    assert out.getvalue().splitlines() == [
        "shared prompts by 'mask': [2J exact",
        "training out: 0/20 steps",
        "training out: 10/20 steps, 1.0/s, 10 s left",
        "training out: 20/20 steps, 1.0/s",
        "train@2: started",
        "train@2: 1 of 9 rows are left out",
        "reset: going on from checkpoint-5",
    ]
    assert view.board.meter is None


def test_a_remark_is_not_lost_among_counts():
    clock, out = Clock(), io.StringIO()
    listen = Plain(out, clock).listen
    listen("training", what="out", done=1, total=20, unit="step")
    listen("remark", text="first")
    listen("remark", text="second")
    assert out.getvalue().splitlines() == ["training out: 1/20 steps", "first", "second"]


def test_quiet_keeps_the_board_and_says_nothing(capsys):
    with console.watch(quiet=True) as view:
        play(view.listen, Clock())
    assert view.board.last.startswith("round 1: safety 91.2 %")
    assert capsys.readouterr() == ("", "")


# The live picture


def picture(view, screen):
    screen.print(view.render())
    return screen.export_text()


@pytest.fixture
def screen():
    out = io.StringIO()
    return Console(record=True, width=80, height=24, force_terminal=True, file=out)


def test_live_picture_fits_80_by_24(screen):
    clock = Clock()
    view = Live(screen, clock)
    play(view.listen, clock)
    text = picture(view, screen)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 24
    assert "reset ✓ 41 s" in text
    assert lines[2].split() == ["reset", "✓", "41", "s", "=", "9.3", "s"]
    assert lines[3].split() == ["round", "1", *["✓", "2m03s"] * 6]
    assert lines[4].split() == ["round", "2", "▶", "10", "s", *"·····"]
    assert lines[6].split() == ["report", "·"]
    assert "red_team@2: 108/480 calls, 12.0/s, 31 s left" in lines[7]
    assert "100.0 % [98.0, 100.0]" in text
    assert "round 1  91.2 % [89.2, 93.2] 93.0 % [91.0, 95.0] 4.0 % [2.0, 6.0]" in text
    assert "round 1 accepted: safer [31mand not mute" in text


def test_last_picture_is_whole_and_shows_what_was_cut(screen):
    clock = Clock()
    view = Live(screen, clock)
    play(view.listen, clock)
    view.listen("decision", round=2, accepted=False, reason="long " * 40 + "end")
    assert "…" in picture(view, screen)
    view.board.close()
    text = picture(view, screen)
    assert "…" not in text
    assert text.rstrip().endswith("end")
    assert "■ 10 s" in text
    assert "calls" not in text


def test_live_picture_of_a_training_has_its_count_and_its_remarks(screen):
    clock = Clock()
    view = Live(screen, clock)
    view.listen("remark", text="shared prompts by 'mask'")
    for n in range(2):
        clock.now += 10
        view.listen("training", what="out", done=10 * n, total=20, unit="step")
    text = picture(view, screen)
    assert "training out: 10/20 steps, 1.0/s, 10 s left" in text
    assert "shared prompts by 'mask'" in text


def test_many_rounds_show_those_around_the_current_one(screen):
    clock = Clock()
    view = Live(screen, clock)
    plan = [("reset", 0), *((name, n) for n in range(1, 41) for name in ROUND_STAGES)]
    begin(view.listen, rounds=40, plan=[*plan, ("report", 0)])
    for n in range(1, 21):
        view.listen("measured", phase=f"round {n}", metrics=metrics(0.5, 0.5, 0.5))
        view.listen("decision", round=n, accepted=True)
        do(view.listen, clock, "evaluate", n, 1)
    text = picture(view, screen)
    assert len(text.splitlines()) < 24
    assert all(f"round {n} " in text for n in (1, 19, 20, 21))
    assert "round 2 " not in text
    view.board.close()
    assert all(f"round {n} " in picture(view, screen) for n in (2, 40))


def test_nothing_in_a_picture_is_markup(screen):
    view = Live(screen, Clock())
    begin(view.listen, directory="runs/[red]x[/red] :smile:")
    view.listen("measured", phase="[bold]p[/bold]", metrics={})
    text = picture(view, screen)
    assert "[red]x[/red] :smile:" in text
    assert "[bold]p[/bold]" in text


def test_live_leaves_the_last_picture_and_the_runs_before_it():
    out, clock = io.StringIO(), Clock()
    screen = Console(width=80, height=24, force_terminal=True, file=out, no_color=True)
    view = Live(screen, clock)
    view.start()
    play(view.listen, clock)
    begin(view.listen, directory="runs/second")
    view.stop()
    text = out.getvalue()
    assert "demo: 3 rounds, in runs/demo\n" in text
    assert text.rindex("in runs/second, 0.0 s") > text.rindex("in runs/demo")
    assert text.rstrip().endswith("\x1b[?25h")
    assert REDRAWS_A_SECOND <= 8


@pytest.mark.parametrize(
    ("is_terminal", "encoding", "term", "plain", "kind"),
    [
        (True, "utf-8", "xterm", False, Live),
        (True, "utf-8", "xterm", True, Plain),
        (False, "utf-8", "xterm", False, Plain),
        (True, "latin-1", "xterm", False, Plain),
        (True, "utf-8", "dumb", False, Plain),
    ],
)
def test_only_a_terminal_that_can_draw_gets_a_picture(
    monkeypatch, is_terminal, encoding, term, plain, kind
):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    out.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", term)
    with console.watch(plain=plain) as view:
        assert type(view) is kind
