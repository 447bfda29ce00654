"""The loop on a network of a few weights: what a step changes, what a state holds, when an epoch is judged."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from scinet import trainer as trainer_module
from scinet.data.batch import Batch
from scinet.distributed import Ranks, initialise
from scinet.errors import DataError, TrainingError
from scinet.guard import Guard
from scinet.objective import Step
from scinet.telemetry.observer import Observer, Standing
from scinet.trainer import Trainer
from tests.scinet import small_runs
from tests.scinet.small_runs import BATCH, begin, changed, go_back, taken, timeless, train_to

STEPS_PER_EPOCH, TOTAL = 4, 12  # 29 samples in batches of 6, three epochs
MISSING = (3, 11, 20)
SKIP = ("data.on_bad_sample=skip", "data.max_bad_fraction=0.5")
LAST = "train.last_batch=train"


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    return initialise(60)


@pytest.mark.parametrize(
    ("step", "overrides", "missing"),
    [
        (1, (), ()),
        (4, (), ()),
        (6, (), ()),
        (5, ("train.accumulation_steps=2",), ()),
        (5, (LAST,), ()),
        (7, (LAST, *SKIP), MISSING),
        (6, ("correlation.source=text", "fusion.weights=fixed", "fusion.combine=evidence"), ()),
        (6, ("profile=release", "model.bi_dominant=none"), ()),
        (6, ("method=bce",), ()),
    ],
    ids=["first", "end of epoch", "default", "accumulated", "short last batch", "gaps", "evidence", "release", "bce"],
)
def test_training_goes_on_bit_for_bit_when_it_was_broken_off(
    ranks: Ranks, step: int, overrides: tuple[str, ...], missing: tuple[int, ...]
) -> None:
    whole, rows = begin(ranks, *overrides, missing=missing)
    kept: list[tuple[dict[str, Tensor], str]] = []

    def keep() -> None:
        if whole.progress.step == step:
            kept.append(taken(whole.state()))

    train_to(whole, whole.total_steps, keep)
    # a trainer with a past of its own: what the state lacks would stay as it is
    again, others = begin(ranks, *overrides, missing=missing)
    train_to(again, 3)
    num_others = len(others.rows)
    go_back(again, *kept[0])
    assert again.progress.step == step
    train_to(again, again.total_steps)
    (tensors, scalars), (its_tensors, its_scalars) = taken(whole.state()), taken(again.state())
    assert changed(tensors, its_tensors) == []
    assert scalars == its_scalars
    assert timeless([row for row in rows.rows if row["step"] > step]) == timeless(others.rows[num_others:])


def test_state_stays_as_it_was_when_training_goes_on(ranks: Ranks) -> None:
    trainer, _ = begin(ranks)
    train_to(trainer, 2)
    state = trainer.state()
    before = json.dumps(state.scalars)
    train_to(trainer, 3)  # while a thread writes the state
    assert json.dumps(state.scalars) == before


class _Heard:
    """An aim that keeps by how many samples losses are divided, and which steps it is told to have gaps."""

    def __init__(self, aim: Any) -> None:
        self._aim = aim
        self.sizes: list[float] = []
        self.gaps: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._aim, name)

    def look(self, *arguments: Any, has_gaps: bool) -> Any:
        self.gaps.append(has_gaps)
        return self._aim.look(*arguments, has_gaps=has_gaps)

    def __call__(self, student: Any, batch: Batch, phase: Any, size: float, look: Any, place: int) -> Step:
        self.sizes.append(size)
        step: Step = self._aim(student, batch, phase, size, look, place)
        return step


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_are_divided_by_the_samples_that_are_there(ranks: Ranks, accumulation: int) -> None:
    trainer, _ = begin(ranks, LAST, f"train.accumulation_steps={accumulation}")
    heard = _Heard(trainer._aim)
    trainer._aim = heard  # type: ignore[assignment]
    train_to(trainer, 5)
    assert heard.sizes == [6 / accumulation] * 4 * accumulation + [5 / accumulation] * accumulation
    assert heard.gaps == [False] * 4 + [True]


@pytest.mark.parametrize("method", ["scinet", "bce"])
@pytest.mark.parametrize("accumulation", [2, 3])
def test_training_is_equal_when_a_global_batch_is_cut(ranks: Ranks, method: str, accumulation: int) -> None:
    overrides = (f"method={method}", LAST)
    whole, rows = begin(ranks, *overrides)
    cut, others = begin(ranks, *overrides, f"train.accumulation_steps={accumulation}")
    for trainer in (whole, cut):
        train_to(trainer, TOTAL)
    for row, its in zip(rows.rows, others.rows, strict=True):
        for key in ("loss/total", "loss/supervised", "gradient_norm", "known_ratio", "samples_seen", "learning_rate"):
            assert its[key] == pytest.approx(row[key], rel=1e-4), key
    tensors, its_tensors = taken(whole.state())[0], taken(cut.state())[0]
    for name, value in tensors.items():
        if "exp_avg" not in name:
            torch.testing.assert_close(its_tensors[name], value, rtol=1e-3, atol=1e-4, msg=name)


class _Told(Trainer):
    """A trainer that keeps what each step gave, and what it was given."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.steps: list[Step] = []
        self.ids: list[str] = []

    def train_step(self, micro: list[Batch], num_valid: int) -> list[Step]:
        steps = super().train_step(micro, num_valid)
        self.steps += steps
        self.ids += [name for batch in micro for name in batch.ids]
        return steps


@pytest.mark.parametrize(("fraction", "num_cold"), [("0", 0), ("0.25", 3), ("0.3", 4), ("1", TOTAL)])
def test_consistency_begins_with_the_first_step_after_the_warm_up(ranks: Ranks, fraction: str, num_cold: int) -> None:
    trainer, _ = begin(ranks, f"loss.warmup_fraction={fraction}", "loss.hard_k=5", kind=_Told)
    assert isinstance(trainer, _Told)
    train_to(trainer, TOTAL)
    rest = [float(sum(value for name, value in step.parts.items() if name != "supervised")) for step in trainer.steps]
    assert [value > 0 for value in rest] == [place >= num_cold for place in range(TOTAL)]


def _rate(step: int, total: int, peak: float, warmup_share: float) -> float:
    """One-cycle by cosines, from a 25th of the peak to a 250,000th; its last step is never taken."""
    up, down = max(warmup_share * (total + 1), 2) - 1, total
    first, last = peak / 25, peak / 250_000

    def between(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    return between(first, peak, step / up) if step <= up else between(peak, last, (step - up) / (down - up))


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_learning_rate_is_that_of_the_steps_taken(ranks: Ranks, share: float) -> None:
    overrides = (f"optimizer.warmup_share={share}", "optimizer.graph_learning_rate=0.005")
    trainer, _ = begin(ranks, *overrides)
    rates = [trainer.engine.learning_rate()]
    train_to(trainer, TOTAL, lambda: rates.append(trainer.engine.learning_rate()))
    assert rates == pytest.approx([_rate(step, TOTAL, 0.01, share) for step in range(TOTAL + 1)])
    again, _ = begin(ranks, *overrides)
    train_to(again, 3)
    again.engine.go_on(7, 5)
    assert again.engine.learning_rate() == pytest.approx(rates[7])
    assert again.engine.layout.num_updates == 5


def test_teacher_keeps_its_share_of_an_epoch_and_forgets_its_start_faster(ranks: Ranks) -> None:
    trainer, _ = begin(ranks, "train.ema_per_epoch=0.01")
    names = [name for name, _ in trainer.teacher.network.named_parameters()]
    mine = {name: value.clone() for name, value in trainer.teacher.network.named_parameters()}
    decays = []
    for step in range(1, 9):
        train_to(trainer, step)
        student = dict(trainer.engine.network.named_parameters())
        teacher = dict(trainer.teacher.network.named_parameters())
        decay = min(0.01 ** (1 / STEPS_PER_EPOCH), step / (step + 10))
        decays.append(decay)
        for name in names:
            torch.testing.assert_close(teacher[name].data, decay * mine[name] + (1 - decay) * student[name].data)
            mine[name] = teacher[name].data.clone()
    assert len(set(decays[-2:])) == 1, "both rules are tried"
    assert trainer.teacher.steps == 8


@pytest.mark.parametrize(
    ("overrides", "moves"),
    [
        ((), True),
        (("correlation.source=confidence",), True),
        (("correlation.source=text",), False),
        (("profile=release", "model.bi_dominant=none"), False),
    ],
)
def test_label_graph_follows_the_labels_at_the_end_of_an_epoch_alone(
    ranks: Ranks, overrides: tuple[str, ...], moves: bool
) -> None:
    trainer, _ = begin(ranks, "correlation.shrinkage=1", *overrides)
    graphs = [trainer.engine.network.get_buffer("graph").clone()]
    train_to(trainer, 9, lambda: graphs.append(trainer.engine.network.get_buffer("graph").clone()))
    moved = [step for step in range(1, 10) if not torch.equal(graphs[step], graphs[step - 1])]
    assert moved == ([4, 8] if moves else [])


def test_every_epoch_takes_its_samples_in_another_order_and_each_once(ranks: Ranks) -> None:
    trainer, _ = begin(ranks, LAST, kind=_Told)
    assert isinstance(trainer, _Told)
    train_to(trainer, 10)
    ids = [name for name in trainer.ids if name]
    first, second = ids[:29], ids[29:]
    assert set(first) == set(second) == {f"train-{number}" for number in range(29)}
    assert first != second


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ((), 12),
        (("train.max_steps=5",), 5),
        (("train.max_steps=50",), 12),
        ((LAST,), 15),
        (("train.epochs=1",), 4),
    ],
)
def test_run_ends_with_its_epochs_or_its_largest_number_of_steps(
    ranks: Ranks, overrides: tuple[str, ...], steps: int
) -> None:
    trainer, log = begin(ranks, *overrides)
    assert trainer.total_steps == steps
    seen = []
    train_to(trainer, steps, lambda: seen.append(trainer.is_finished))
    assert seen == [False] * (steps - 1) + [True]
    assert log.rows[-1]["step"] == steps, "the last step is always logged"


class _Watcher(Observer):
    def __init__(self) -> None:
        self.standings: list[Standing] = []
        self.seconds: list[float] = []

    def stand(self, standing: Standing) -> None:
        self.standings.append(standing)

    def step(self, *, seconds: float, waited_s: float, fusion_s: Any) -> None:
        assert 0 <= waited_s <= seconds
        self.seconds.append(seconds)


class _Marks(Guard):
    def __init__(self) -> None:
        self.done: list[str] = []
        self.boundaries = 0

    def mark(self, doing: str) -> None:
        self.done.append(doing)

    def boundary(self, doing: str) -> None:
        self.boundaries += 1


def test_standing_and_marks_are_told_after_every_step(ranks: Ranks) -> None:
    watcher, marks = _Watcher(), _Marks()
    trainer, _ = begin(ranks, LAST, *SKIP, missing=MISSING, observer=watcher, guard=marks)
    for _ in range(2):
        trainer.train_epoch()
    assert [standing.steps for standing in watcher.standings] == list(range(1, 11))
    assert [standing.epoch for standing in watcher.standings] == [0] * 4 + [1] * 5 + [2]
    assert watcher.standings[-1] == Standing(10, 15, 2, 2 * 26, 2 * 3, 0)
    assert len(watcher.seconds) == marks.boundaries == 10
    assert marks.done[:4] == ["reading data for step 1", "step 1", "reading data for step 2", "step 2"]


def test_samples_that_could_not_be_read_are_counted_and_end_the_run_when_too_many(ranks: Ranks) -> None:
    trainer, _ = begin(ranks, LAST, *SKIP, missing=MISSING)
    train_to(trainer, 5)
    assert (trainer.progress.samples, trainer.progress.skipped) == (26, 3)
    strict, _ = begin(ranks, LAST, SKIP[0], "data.max_bad_fraction=0.1", missing=MISSING)
    with pytest.raises(DataError, match=r"\d of \d+ samples could not be read"):
        train_to(strict, 5)


def test_row_after_an_epochs_end_begins_with_the_epoch(ranks: Ranks) -> None:
    # between the two lies an evaluation, whose time is none of the training's
    trainer, log = begin(ranks, "train.log_every_steps=3", kind=_Told)
    assert isinstance(trainer, _Told)
    train_to(trainer, 6)
    losses = [float(step.loss.detach()) for step in trainer.steps]
    assert [row["step"] for row in log.rows] == [3, 6]
    assert log.rows[0]["loss/total"] == pytest.approx(sum(losses[:3]) / 3)
    assert log.rows[1]["loss/total"] == pytest.approx(sum(losses[4:6]) / 2)


def test_time_of_a_step_is_without_that_for_its_checkpoint(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    later_s = [0.0]

    def save() -> None:
        later_s[0] += 1000.0

    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later_s[0]))
    watcher = _Watcher()
    trainer, _ = begin(ranks, observer=watcher)
    trainer.train_epoch(save)
    assert len(watcher.seconds) == STEPS_PER_EPOCH
    assert max(watcher.seconds) < 1000


def test_rows_are_written_every_so_many_steps_with_the_means_since_the_last(ranks: Ranks) -> None:
    trainer, log = begin(ranks, "train.log_every_steps=2", kind=_Told)
    assert isinstance(trainer, _Told)
    train_to(trainer, 4)
    assert [row["step"] for row in log.rows] == [2, 4]
    for row, steps in zip(log.rows, (trainer.steps[:2], trainer.steps[2:]), strict=True):
        assert row["samples_seen"] == row["step"] * BATCH
        assert row["loss/total"] == pytest.approx(float(sum(step.loss.detach() for step in steps)) / 2)
        assert row["loss/supervised"] == pytest.approx(float(sum(step.parts["supervised"] for step in steps)) / 2)
        assert row["learning_rate"] > 0
        assert row["gradient_norm"] > 0


# what happens to a run whose batches hold no numbers


class _Spoilt(Trainer):
    """A trainer to whom some steps give a batch with a NaN, or none of whose samples can be read."""

    spoilt: tuple[int, ...] = ()
    empty: tuple[int, ...] = ()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.changed: dict[int, list[str]] = {}
        self.rates: list[float] = []

    def train_step(self, micro: list[Batch], num_valid: int) -> list[Step]:
        step = self.progress.step + 1
        before, _ = taken(self.state())
        if step in self.spoilt:
            micro = [dataclasses.replace(batch, inputs=batch.inputs * float("nan")) for batch in micro]
        if step in self.empty:
            num_valid = 0
        steps = super().train_step(micro, num_valid)
        self.changed[step] = changed(before, taken(self.state())[0])
        self.rates.append(self.engine.learning_rate())
        return steps


def _spoilt(
    ranks: Ranks, folder: Path, *overrides: str, spoilt: tuple[int, ...] = (), empty: tuple[int, ...] = ()
) -> Any:
    trainer, log = begin(ranks, f"output={folder}", "train.on_bad_numbers=skip", *overrides, kind=_Spoilt)
    assert isinstance(trainer, _Spoilt)
    trainer.spoilt, trainer.empty = spoilt, empty
    return trainer, log


@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_with_bad_numbers_changes_nothing_but_the_place_in_the_run(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture, accumulation: int
) -> None:
    words = ("train.log_every_steps=1", f"train.accumulation_steps={accumulation}")
    trainer, log = _spoilt(ranks, tmp_path, *words, spoilt=(2, 6), empty=(7,))
    with caplog.at_level(logging.WARNING, logger="scinet"):
        train_to(trainer, 9)
    assert trainer.changed[2] == trainer.changed[6] == trainer.changed[7] == []
    assert all(trainer.changed[step] for step in (1, 3, 5, 9))
    assert (trainer.progress.bad_steps, trainer.progress.bad_in_a_row) == (2, 0)
    assert trainer.engine.layout.num_updates == trainer.teacher.steps == 6
    assert trainer.rates == pytest.approx([_rate(step, TOTAL, 0.01, 0.2) for step in range(1, 10)])
    assert [row["step"] for row in log.rows] == list(range(1, 10))
    assert [row["bad_steps"] for row in log.rows] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert "loss/total" not in log.rows[1]
    assert (
        "step 2 has numbers that are not finite, first on rank 0, in the teacher's output (samples train-"
        in caplog.text
    )
    assert "step 7 is left out: none of its samples can be read" in caplog.text
    paths = sorted(tmp_path.glob("run/bad-numbers/step-2-*"))
    assert [path.name for path in paths] == [f"step-2-rank-0-part-{part}.safetensors" for part in range(accumulation)]
    path = paths[0]
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["where"] == "in the teacher's output"
        assert file.get_tensor("inputs").isnan().all()


def test_run_ends_at_bad_numbers_unless_told_to_go_on(ranks: Ranks, tmp_path: Path) -> None:
    trainer, _ = _spoilt(ranks, tmp_path, "train.on_bad_numbers=stop", spoilt=(2,))
    with pytest.raises(TrainingError, match=r"step 2 has numbers .* set train\.on_bad_numbers=skip"):
        train_to(trainer, 4)
    assert trainer.progress.step == 2


@pytest.mark.parametrize(("spoilt", "ends_at"), [((2, 3), None), ((2, 3, 4), 4), ((2, 3, 5, 6), None), ((6, 7, 8), 8)])
def test_run_ends_when_too_many_steps_in_a_row_are_left_out(
    ranks: Ranks, tmp_path: Path, spoilt: tuple[int, ...], ends_at: int | None
) -> None:
    trainer, _ = _spoilt(ranks, tmp_path, "train.max_bad_steps=2", spoilt=spoilt)
    expected = pytest.raises(TrainingError, match="3th in a row") if ends_at else contextlib.nullcontext()
    with expected:
        train_to(trainer, 9)
    assert trainer.progress.step == (ends_at or 9)


def test_count_of_bad_steps_in_a_row_goes_on_when_the_run_does(ranks: Ranks, tmp_path: Path) -> None:
    trainer, _ = _spoilt(ranks, tmp_path, "train.max_bad_steps=2", spoilt=(2, 3))
    train_to(trainer, 3)
    again, _ = _spoilt(ranks, tmp_path, "train.max_bad_steps=2", spoilt=(4,))
    go_back(again, *taken(trainer.state()))
    with pytest.raises(TrainingError, match="3th in a row"):
        train_to(again, 5)


# evaluation


def test_best_epoch_is_the_first_of_the_teachers_best(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    coming = [50.0, 90.0, 50.0, 91.0, 60.0, 20.0, 55.0, 99.0]
    monkeypatch.setattr(
        trainer_module, "evaluate", lambda *_: type("Given", (), {"mean_average_precision": coming.pop(0)})
    )
    trainer, log = begin(ranks, "train.epochs=4", "train.log_every_steps=100")
    found = []
    for _ in range(4):
        trainer.train_epoch()
        assert trainer.evaluation_is_due
        found.append(trainer.evaluate_holdout())
        assert not trainer.evaluation_is_due
        assert trainer.progress.judged == trainer.progress.epoch
    assert found == [True, False, True, False]
    assert (trainer.progress.best_epoch, trainer.progress.best_map, trainer.progress.last_map) == (2, 60.0, 55.0)
    judged = [row for row in log.rows if "holdout_map" in row]
    assert {key: value for key, value in judged[1].items() if not key.startswith("fusion/")} == {
        "step": 8,
        "epoch": 1,
        "samples_seen": 48,
        "holdout_map": 50.0,
        "holdout_map_student": 91.0,
    }


@pytest.mark.parametrize(
    ("overrides", "due"),
    [
        (("train.epochs=5", "train.evaluate_every_epochs=2"), [2, 4, 5]),
        (("train.epochs=3", "train.evaluate_every_epochs=1"), [1, 2, 3]),
        (("train.epochs=2", "train.evaluate_every_epochs=9"), [2]),
        (("train.epochs=9", "train.max_steps=6", "train.evaluate_every_epochs=9"), [2]),
    ],
)
def test_evaluation_is_due_every_so_many_epochs_and_at_the_end(
    ranks: Ranks, overrides: tuple[str, ...], due: list[int]
) -> None:
    trainer, _ = begin(ranks, *overrides)
    found = []
    while not trainer.is_finished:
        trainer.train_epoch()
        if trainer.evaluation_is_due:
            found.append(trainer.progress.epoch)
            trainer.progress.judged = trainer.progress.epoch
    assert found == due


def test_scores_are_those_of_the_network_that_is_asked_for(ranks: Ranks) -> None:
    trainer, _ = begin(ranks)
    train_to(trainer, 5)
    plain = small_runs.materials(trainer._options).features["holdout"]
    networks = {True: trainer.teacher.network, False: trainer.engine.network.eval()}
    for use_teacher, network in networks.items():
        scores = trainer.score("holdout", use_teacher=use_teacher)
        with torch.no_grad():
            expected = torch.sigmoid(network(plain.plain).logits)
        torch.testing.assert_close(scores.probabilities, expected)
        assert torch.equal(scores.truth, plain.truth)
    modes: list[bool] = []
    networks[False].register_forward_hook(lambda network, *_: modes.append(network.training))
    train_to(trainer, 6)
    student, teacher = (trainer.score("holdout", use_teacher=who).probabilities for who in (False, True))
    assert not torch.allclose(student, teacher)
    assert modes == [True, False], "a step trains, a score does not"


def test_weights_that_are_kept_are_whole_and_those_of_their_network(ranks: Ranks) -> None:
    trainer, _ = begin(ranks)
    train_to(trainer, 2)
    for weights, network in (
        (trainer.student_weights(), trainer.engine.network),
        (trainer.teacher_weights(), trainer.teacher.network),
    ):
        state = network.state_dict()
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[name], value) for name, value in state.items())
        assert all(weights[name].data_ptr() != value.data_ptr() for name, value in state.items())
    assert changed(trainer.student_weights(), trainer.teacher_weights())


def test_seed_decides_weights_and_order(ranks: Ranks) -> None:
    states = []
    for seed in (0, 0, 1):
        trainer, _ = begin(ranks, f"seed={seed}", kind=_Told)
        assert isinstance(trainer, _Told)
        start, _ = taken(trainer.state())
        train_to(trainer, 2)
        states.append((start, taken(trainer.state())[0], trainer.ids))
    assert changed(states[0][1], states[1][1]) == []
    assert states[0][2] == states[1][2] != states[2][2]
    assert "student/weight/label_graph.layers.0.weight" in changed(states[0][0], states[2][0])


def test_teacher_is_the_student_at_the_start(ranks: Ranks) -> None:
    trainer, _ = begin(ranks)
    assert changed(dict(trainer.engine.network.state_dict()), dict(trainer.teacher.network.state_dict())) == []
