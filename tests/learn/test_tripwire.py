"""The tripwire on recorded runs and on hand-made ones: when it sounds, where it goes back to, what it remembers."""

import json
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.errors import LearnError
from agentsdpo.learn.alarms import Alarm, Probe, gained, newest, probe_alarms, update_alarms
from agentsdpo.learn.tripwire import QUIET, Decision, Tripwire
from agentsdpo.metrics import check_keys

RECORDED = Path(__file__).parent / "recorded"
GOOD = {"tokens_per_turn": 20.0, "tokens_per_episode": 80.0, "valid": 1.0, "mutating": 1.0}


def recording(name: str) -> tuple[list[dict[str, Any]], dict[int, Probe]]:
    """Step rows and probes by step of one recorded run."""
    rows = json.loads((RECORDED / f"{name}.json").read_text())["rows"]
    probes = {row["step"]: Probe.of(row) for row in rows if row["kind"] == "eval"}
    return [row for row in rows if row["kind"] == "step"], {at: probe for at, probe in probes.items() if probe}


def watch(name: str, *, reload: bool = False) -> list[Decision]:
    """What a tripwire decides along a recording, up to the first hard alarm; reloaded from JSON before every step."""
    steps, probes = recording(name)
    wire = Tripwire()
    decisions = [wire.judge(0, 0, probes[0])]
    for row in steps:
        if reload:
            saved, wire = json.loads(json.dumps(wire.state_dict())), Tripwire()
            wire.load_state_dict(saved)
        wire.learnt(row)
        decisions.append(wire.judge(row["step"], row["version"], probes.get(row["step"])))
        assert not decisions[-1].wants_probe
        if decisions[-1].good:
            break
    return decisions


def test_a_recorded_collapse_is_seen_before_the_score_has_halved() -> None:
    decisions, (_, probes) = watch("collapse"), recording("collapse")
    halved = next(at for at, probe in probes.items() if probe.score < 0.5 * probes[5].score)
    soft, hard = (next(d.step for d in decisions if d.level == level) for level in ("soft", "hard"))
    assert (soft, hard, halved) == (10, 15, 30), "the score was below its limit 20 steps before it had halved"
    assert [alarm.name for alarm in decisions[soft].alarms] == ["probe/best", "probe/zero_shot"]
    good = decisions[hard].good
    assert good is not None
    assert good.step == 0, "no other state had 20 quiet steps after it"


@pytest.mark.parametrize("name", ["healthy", "demo"])
def test_a_healthy_run_is_left_alone(name: str) -> None:
    decisions = watch(name)
    assert len(decisions) == 71
    assert {d.level for d in decisions} == {"clear"}
    assert [d.step for d in decisions if d.keep] == [0, 10, 20, 30, 40, 50, 60, 70]


def test_a_dip_that_passes_is_a_soft_alarm_alone() -> None:
    decisions = watch("dip")
    assert {d.level for d in decisions} == {"clear", "soft"}
    assert next(d for d in decisions if d.alarms).step == 30
    assert len(decisions) == 71


@pytest.mark.parametrize("name", ["collapse", "healthy", "dip"])
def test_a_resumed_run_decides_the_same(name: str) -> None:
    assert watch(name, reload=True) == watch(name)


# -------------------------------------------------------------------------------------------------------- hand-made


def row(step: int, **given: float) -> dict[str, float]:
    plain = {"collect/episodes": 64, "collect/turns/mean": 4.0, "collect/tokens_per_turn/mean": 20.0,
             "collect/act/calls": 4.0, "collect/act/valid_frac": 1.0, "collect/act/mutating_ok_frac": 1.0,
             "learn/grad_norm": 1.0, "learn/ess_frac": 0.95, "learn/hijack/max": 0.01, "learn/entropy/student": 0.1,
             "learn/gap/abs": 0.3, "step": step}
    return plain | {key.replace("__", "/"): value for key, value in given.items()}


def wire_at(step: int, *, every: int = 10, score: float = 0.6) -> Tripwire:
    """A quiet run of so many steps."""
    wire = Tripwire()
    wire.judge(0, 0, Probe(score, 64, GOOD))
    for at in range(1, step + 1):
        wire.learnt(row(at))
        decision = wire.judge(at, at, Probe(score, 64, GOOD) if at % every == 0 else None)
        assert decision.level == "clear"
    return wire


def test_two_low_probes_in_a_row_go_back_and_one_does_not() -> None:
    wire = wire_at(40)
    wire.learnt(row(41))
    low = Probe(0.3, 64, GOOD)
    assert wire.judge(41, 41, low).level == "soft"
    assert wire.judge(42, 42, Probe(0.6, 64, GOOD)).level == "clear"
    assert wire.judge(43, 43, low).level == "soft", "the count began anew"
    decision = wire.judge(44, 44, low)
    assert decision.level == "hard"
    assert decision.good is not None
    assert decision.good.step == 20, "30 and 40 had fewer than 20 quiet steps after them"


def test_a_soft_alarm_restrains_for_twenty_steps() -> None:
    wire = wire_at(40)
    assert (wire.lr_factor(40), wire.staleness(8, 40), wire.staleness(None, 40)) == (1.0, 8, None)
    wire.judge(41, 41, Probe(0.3, 64, GOOD))
    for step in range(41, 41 + QUIET):
        assert wire.withheld(step)
        assert (wire.lr_factor(step), wire.staleness(8, step), wire.staleness(None, step)) == (0.5, 1, 1)
        assert wire.staleness(0, step) == 0, "never raised"
    assert not wire.withheld(41 + QUIET)
    assert wire.metrics(42)["tripwire/restrained"] == 1.0
    check_keys(wire.metrics(42), "step")


def test_a_soft_alarm_that_is_heard_of_late_lasts_from_then_on() -> None:
    wire = wire_at(40)
    assert wire.judge(41, 41, Probe(0.3, 64, GOOD), now=70).level == "soft"
    assert wire.withheld(70)
    assert wire.withheld(69 + QUIET)
    assert not wire.withheld(70 + QUIET)


def test_roll_backs_halve_for_good_and_the_fourth_is_the_last() -> None:
    wire, version = wire_at(40), 40
    for turn in range(5):
        step = 50 + 10 * turn
        wire.judge(step, version, Probe(0.1, 64, GOOD))
        decision = wire.judge(step + 1, version, Probe(0.1, 64, GOOD))
        assert decision.good is not None
        assert decision.last == (turn >= 3)
        wire.rolled_back(decision.good, step=step + 1, gone=version, version=version + 1)
        version += 1
        assert wire.spent == (turn >= 3)
        assert wire.lr_factor(step + 1) == 0.5 ** (turn + 1)
        assert wire.staleness(8, step + 1) == max(1, 8 >> (turn + 1))
        assert wire.state.floor == version
    assert wire.state.abandoned[0] == [31, 40], "up to what was published, not of the good one"
    assert wire.state.abandoned[1] == [42, 41], "what stands in for the good version is good"


def test_good_states_are_quiet_near_the_best_and_at_least_three() -> None:
    wire = wire_at(60)
    assert sorted(wire.steps_kept()) == [20, 30, 40, 50, 60]
    wire.learnt(row(61))
    assert not wire.judge(61, 61, Probe(0.53, 64, GOOD)).keep, "below 0.9 of the best"
    wire.judge(62, 62, Probe(0.3, 64, GOOD))
    assert sorted(wire.steps_kept()) == [20, 30, 40], "an alarm undoes what had no 20 quiet steps yet"
    assert not wire.judge(63, 63, Probe(0.6, 64, GOOD)).keep, "not while an alarm is in force"


def test_behaviour_asks_for_a_probe_and_a_good_one_sets_the_measure_anew() -> None:
    wire = wire_at(40)
    before = wire.state_dict()
    wire.learnt(row(41, **{"collect/turns/mean": 6.0}))
    decision = wire.judge(41, 41, None)
    assert decision.wants_probe
    assert [(a.name, a.limit) for a in decision.alarms] == [("collect/tokens_per_episode", 100.0)]
    assert wire.state.judged == before["judged"], "nothing was decided yet"
    assert wire.judge(41, 41, Probe(0.6, 64, GOOD)).level == "soft"
    wire.learnt(row(42, **{"collect/turns/mean": 6.0}))
    assert wire.judge(42, 42, None).level == "clear", "the probe was good: agents may take six turns"
    assert wire.withheld(42)


def test_halved_valid_calls_and_broken_numbers_go_back_at_once() -> None:
    wire = wire_at(40)
    bad = Probe(0.6, 64, {**GOOD, "valid": 0.4})
    assert [a.level for a in wire.judge(41, 41, bad).alarms] == ["hard"]
    decision = wire_at(40).judge(40, 40, None, broken=True)
    assert decision.level == "hard"
    assert decision.evidence() == {"update/not_finite": {"value": 1.0, "limit": 0.0, "level": "hard"}}
    with pytest.raises(LearnError, match="before there was a state to go back to"):
        Tripwire().judge(3, 3, None, broken=True)


@pytest.mark.parametrize(("key", "value", "name"), [
    ("learn/grad_norm", 4.1, "update/grad_norm"), ("learn/ess_frac", 0.4, "update/ess_frac"),
    ("learn/hijack/max", 0.2, "update/hijack"), ("learn/entropy/student", 0.4, "update/entropy"),
    ("learn/entropy/student", 0.01, "update/entropy"), ("learn/gap/abs", 0.02, "update/gap")])
def test_numbers_of_the_update_count_when_they_persist(key: str, value: float, name: str) -> None:
    start = {"entropy": 0.1, "gap": 0.3}
    quiet = [row(at) for at in range(20)]
    assert update_alarms(quiet, start) == []
    assert [a.name for a in update_alarms([*quiet, *(row(at, **{key: value}) for at in range(5))], start)] == [name]
    assert update_alarms([*quiet, row(20, **{key: value}), *quiet[:4]], start) == []
    assert update_alarms([row(at, **{key: value}) for at in range(9)], start) == [], "too early to say"


def test_numbers_of_the_update_are_not_heard_while_the_score_rises() -> None:
    wire = wire_at(10)
    for at in range(11, 40):
        wire.learnt(row(at, **{"learn/hijack/max": 0.5, "learn/gap/abs": 0.001}))
        assert wire.judge(at, at, Probe(0.95, 64, GOOD) if at == 11 else None).level == "clear"
    assert gained(Probe(0.95, 64, {}), Probe(0.95, 64, {}), Probe(0.6, 64, {}))
    assert not gained(Probe(0.6, 64, {}), Probe(0.95, 64, {}), Probe(0.6, 64, {})), "no longer near its best"


def test_small_probes_must_be_clearly_low() -> None:
    first = Probe(0.6, 16, {})
    assert probe_alarms(Probe(0.4, 16, {}), first, first) == []
    assert probe_alarms(Probe(0.1, 16, {}), first, first)
    assert probe_alarms(Probe(0.4, 64, {}), Probe(0.6, 64, {}), first) == [Alarm("probe/best", 0.4, 0.7 * 0.6)]


def test_behaviour_is_that_of_the_newest_episodes() -> None:
    rows = [row(at, **{"collect/episodes": 16, "collect/turns/mean": float(at)}) for at in range(8)]
    assert newest(rows)["tokens_per_episode"] == pytest.approx(20.0 * 5.5)
    assert newest(rows[:3]) == {}, "48 episodes say too little"
