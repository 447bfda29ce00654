"""The order of a sweep's trials, what is kept of them, and which of them wins."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

import pytest
from optuna.distributions import FloatDistribution

from scinet.errors import ConfigError
from scinet_cluster.sweeps import options
from scinet_cluster.sweeps.agenda import Agenda, candidates, confirmed, winner
from scinet_cluster.sweeps.ledger import Ledger, Purpose, State, Trial
from scinet_cluster.sweeps.options import Sampler, Sweep
from scinet_cluster.sweeps.sampling import Sampling
from scinet_cluster.sweeps.space import Dimension

ROOT = Path(__file__).resolve().parents[3]


def _silent(_: str) -> None:
    pass


def _opened(sweep: Sweep) -> tuple[Agenda, Ledger]:
    ledger = Ledger(sweep.folder / "trials.jsonl")
    return Agenda(sweep, ledger, _silent), ledger


def _run(agenda: Agenda, trial: Trial, value: float, state: State = State.completed) -> None:
    agenda.told(trial.number, 1, value / 2, [(0, "host", "cpu")])
    agenda.told(trial.number, 2, value, [(0, "host", "cpu")])
    agenda.ended(trial.number, state)


def _next(agenda: Agenda) -> Trial:
    trial = agenda.next()
    assert trial is not None
    return trial


def test_default_goes_ahead_alone_until_its_first_evaluation(sweep: Sweep) -> None:
    agenda, _ = _opened(sweep)
    first = _next(agenda)
    assert first.number == 0
    assert first.parameters == {key: dimension.default for key, dimension in sweep.space.items()}
    assert agenda.next() is None
    agenda.told(0, 1, 30.0, [])
    assert _next(agenda).number == 1


def test_best_and_default_are_trained_again_with_other_seeds_and_their_mean_decides(sweep: Sweep) -> None:
    agenda, ledger = _opened(sweep)
    for value in (40.0, 60.0, 50.0, 30.0):
        _run(agenda, _next(agenda), value)
    again = []
    for value in (45.0, 35.0, 47.0, 33.0):  # the default, then the search's best, for each seed
        trial = _next(agenda)
        again.append((trial.confirms, trial.seed))
        assert trial.purpose is Purpose.confirm
        assert trial.parameters == ledger.trials[trial.confirms].parameters
        _run(agenda, trial, value)
    assert again == [(0, 1), (1, 1), (0, 2), (1, 2)]
    assert agenda.next() is None
    assert agenda.is_done
    best = winner(ledger)
    assert best is not None
    assert best.number == 0, "60 was luck"
    assert confirmed(ledger, best) == [45.0, 47.0]


def test_confirmations_wait_for_the_last_trial_of_the_search(sweep: Sweep) -> None:
    agenda, _ = _opened(sweep)
    _run(agenda, _next(agenda), 40.0)
    running = [_next(agenda) for _ in range(3)]
    for trial in running[:2]:
        _run(agenda, trial, 50.0)
        assert agenda.next() is None
        assert not agenda.is_done
    _run(agenda, running[2], 20.0, State.stopped)
    side_by_side = [_next(agenda) for _ in range(4)]
    assert all(trial.purpose is Purpose.confirm for trial in side_by_side)
    assert agenda.next() is None
    assert not agenda.is_done


def test_killed_sweep_goes_on_with_what_was_interrupted_and_the_same_proposals(sweep: Sweep) -> None:
    agenda, ledger = _opened(sweep)
    _run(agenda, _next(agenda), 40.0)
    _run(agenda, _next(agenda), 50.0)
    interrupted = _next(agenda)
    unbroken = _next(agenda)
    path = sweep.folder / "trials.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:40])  # killed while it wrote the fourth trial

    agenda, ledger = _opened(sweep)
    assert ledger.trials[1].best == 50.0
    assert _next(agenda) == interrupted
    assert _next(agenda).parameters == unbroken.parameters
    assert agenda.next() is None
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()][-2:] == [2, 3]


def test_failed_trial_keeps_its_reason_and_is_not_tried_again(sweep: Sweep) -> None:
    agenda, ledger = _opened(sweep)
    _run(agenda, _next(agenda), 40.0)
    failed = _next(agenda)
    agenda.ended(failed.number, State.failed, "status 1: step 3 has numbers that are not finite")
    assert not agenda.refusal
    assert [_next(agenda).number for _ in range(2)] == [2, 3]
    assert Ledger(sweep.folder / "trials.jsonl").trials[1].reason.endswith("not finite")
    assert ledger.trials[1].best is None


def test_sweep_is_given_up_when_the_default_fails_from_the_start(sweep: Sweep) -> None:
    agenda, _ = _opened(sweep)
    agenda.ended(_next(agenda).number, State.failed, "status 2: no such data")
    assert "no such data" in agenda.refusal
    assert agenda.next() is None


def test_trial_that_starts_again_tells_no_evaluation_twice(sweep: Sweep) -> None:
    agenda, ledger = _opened(sweep)
    _run(agenda, _next(agenda), 40.0)
    trial = _next(agenda)
    for _ in range(2):
        agenda.told(trial.number, 1, 33.0, [])
    agenda.ended(trial.number, State.completed)
    assert ledger.trials[1].history == [(1, 33.0)]


def test_grid_ends_with_its_last_combination(sweep: Sweep, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"config: {ROOT / 'configs/quickstart.yaml'}\noutput: {tmp_path}\nname: grid\nsampler: grid\n"
        "confirm: {top: 0}\nspace: {loss.hard_k: [1, 2], loss.margin: [0, 1]}\n"
    )
    grid = options.load(path, [])
    grid.folder.mkdir()
    agenda, ledger = _opened(grid)
    while (trial := agenda.next()) is not None:
        _run(agenda, trial, 10.0 + trial.number)
    tried = [tuple(trial.parameters.values()) for trial in ledger.of(Purpose.search)][1:]
    assert sorted(tried) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert agenda.is_done


def test_line_that_no_sweep_wrote_is_named(sweep: Sweep) -> None:
    (sweep.folder / "trials.jsonl").write_text('{"number": "x"}\n')
    with pytest.raises(ConfigError, match=r"trials\.jsonl has a line that no sweep wrote"):
        Ledger(sweep.folder / "trials.jsonl")


def test_line_is_whole_on_the_disk_before_a_trial_goes_on(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sweep.folder / "trials.jsonl"
    flushed: list[str] = []
    fsync = os.fsync

    def look(handle: int) -> None:
        fsync(handle)
        flushed.append(path.read_text())

    monkeypatch.setattr(os, "fsync", look)
    Ledger(path).write(Trial(0, Purpose.search, 0, 0, {"a": 1}))
    assert flushed == [path.read_text()]
    assert flushed[0].endswith("\n")


def test_best_of_a_trial_is_that_of_all_its_epochs() -> None:
    trial = Trial(0, Purpose.search, 0, 0, {})
    assert trial.best is None
    for epoch, value in ((1, 40.0), (2, 60.0), (3, 50.0), (2, 99.0)):
        trial.note(epoch, value)
    assert trial.best == 60.0
    assert trial.history == [(1, 40.0), (2, 60.0), (3, 50.0)]


def test_only_trials_that_went_to_their_end_are_confirmed(sweep: Sweep) -> None:
    ledger = Ledger(sweep.folder / "trials.jsonl")
    states = (State.completed, State.stopped, State.completed, State.failed, State.begun, State.completed)
    for number, state in enumerate(states):
        ledger.write(Trial(number, Purpose.search, number, 0, {}, state, [(1, 10.0 * number)]))
    assert [trial.number for trial in candidates(ledger, 1)] == [0, 5]
    assert [trial.number for trial in candidates(ledger, 9)] == [0, 5, 2]
    assert candidates(ledger, 0) == []
    best = winner(ledger)
    assert best is not None
    assert best.number == 5


SPACE = {"loss.margin": Dimension(FloatDistribution(0.0, 1.0), 0.5)}


def _tried(count: int) -> list[Trial]:
    """Trials whose mAP grows with what was tried."""
    values = [number / count for number in range(count)]
    return [
        Trial(number, Purpose.search, number, 0, {"loss.margin": value}, State.completed, [(1, 50 * value)])
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize("sampler", [Sampler.random, Sampler.tpe])
def test_proposal_is_that_of_its_number_whenever_it_is_asked_for(sampler: Sampler) -> None:
    found = [Sampling(SPACE, sampler, 3).propose(number, _tried(number)) for number in (1, 2, 3, 4)]
    again = Sampling(SPACE, sampler, 3)
    assert [again.propose(number, _tried(number)) for number in (1, 2, 3, 4)] == found
    assert len({str(proposal) for proposal in found}) == 4
    assert Sampling(SPACE, sampler, 4).propose(1, _tried(1)) != found[0]


def test_search_goes_where_the_map_is_high() -> None:
    sampling = Sampling(SPACE, Sampler.tpe, 0)
    found = [sampling.propose(number, _tried(30)) for number in range(30, 45)]
    assert statistics.fmean(proposal["loss.margin"] for proposal in found if proposal) > 0.7
