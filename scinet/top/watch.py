"""How one run fares: its directory and its endpoints, put together at each look."""

from __future__ import annotations

import enum
import fcntl
import struct
import time
from dataclasses import dataclass, field

from scinet.options import Options
from scinet.rundir import RunDirectory
from scinet.top.rows import LARGEST, Rows, number
from scinet.top.scrape import Figures, scrape, targets

_LIMIT_S = 1.0
_RATE_WINDOW_S = 30.0
_LOCK = "hhqqi4x"  # struct flock of 64-bit Linux
_INFO = "scinet_run_info"
_WORLD_SIZE = "scinet_world_size"
_STEPS = "scinet_train_steps_total"
_PLANNED_STEPS = "scinet_train_planned_steps"
_SAMPLES = "scinet_train_samples_total"
_RANK_UP = "scinet_rank_up"
_RANK_STEPS = "scinet_rank_steps_total"
_RESIDENT = "scinet_process_resident_memory_bytes"
_ON_GPU = "scinet_gpu_memory_allocated_bytes"
_WAITED = "scinet_data_wait_seconds_sum"
_TOOK = "scinet_step_duration_seconds_sum"
_NAMES = frozenset(
    (
        *(_INFO, _WORLD_SIZE, _STEPS, _PLANNED_STEPS, _SAMPLES),
        *(_RANK_UP, _RANK_STEPS, _RESIDENT, _ON_GPU, _WAITED, _TOOK),
    )
)


class State(enum.Enum):
    """What a run does; a stalled one has taken no step for the time after which it would name a rank that hangs."""

    starting = "starting"
    training = "training"
    evaluating = "evaluating"
    stalled = "stalled"
    finished = "finished"
    ended = "ended"

    @property
    def is_alive(self) -> bool:
        """Whether a process works on it."""
        return self not in (State.finished, State.ended)


@dataclass(frozen=True)
class RankLook:
    """One rank: whether it lives, and where; its steps since it was started; its memory, of a GPU if it has one."""

    rank: str
    is_up: bool
    host: str
    steps: float | None
    memory_bytes: float | None
    wait_share: float | None


@dataclass(frozen=True)
class Look:
    """A run at one moment; None stands for what is not known."""

    name: str
    state: State
    step: int
    total_steps: int | None = None
    samples_per_second: float | None = None
    loss: float | None = None
    last_map: float | None = None
    best_map: float | None = None
    eta_s: float | None = None
    num_ranks: int | None = None
    wait_share: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    ranks: list[RankLook] = field(default_factory=list)

    @property
    def ranks_up(self) -> int:
        """How many ranks live."""
        return sum(rank.is_up for rank in self.ranks)

    @property
    def memory_bytes(self) -> float | None:
        """Return the memory of the rank that takes most."""
        return max((rank.memory_bytes for rank in self.ranks if rank.memory_bytes is not None), default=None)


class Watch:
    """One run that is looked at again and again."""

    def __init__(self, run: RunDirectory, options: Options) -> None:
        """Take the run; nothing in its directory is ever changed or locked."""
        self._run, self._name, train = run, options.name, options.train
        self._hang_s = train.hang_timeout_s
        self._batch, self._epochs, self._max_steps, self._epochs_a_judgement = (
            min(LARGEST, value)
            for value in (train.global_batch_size, train.epochs, train.max_steps, train.evaluate_every_epochs)
        )
        self._rows = Rows(run.metrics)
        self._past: list[Figures] = []
        self._moved_at, self._moved_to = 0.0, -1

    def look(self) -> Look:
        """Return how it fares now; takes a second at most if an endpoint is silent."""
        self._rows.follow()
        figures = self._ask()
        self._past = [each for each in self._past if figures.at_s - each.at_s < _RATE_WINDOW_S]
        self._past = [*self._past, figures] if figures else []
        row, rows = self._rows.training, self._rows
        live_step = figures.value(_STEPS)
        step = rows.step if live_step is None else int(live_step)
        total = self._total_steps(figures)
        state = self._state(figures, step, total)
        speed = self._speed() or number(row, "samples_per_second")
        speed = speed if speed is not None and speed > 0 else None
        eta_s = None
        if speed and total is not None and state in (State.training, State.evaluating):
            eta_s = max(0, total - step) * self._batch / speed
        last, best = number(rows.holdout, "holdout_map"), rows.best_map
        return Look(
            name=self._run.path.name,
            state=state,
            step=step,
            total_steps=step if state is State.finished else total,
            samples_per_second=speed,
            loss=number(row, "loss/total"),
            last_map=last,
            best_map=best,
            eta_s=eta_s,
            num_ranks=_whole(figures.value(_WORLD_SIZE)),
            wait_share=number(row, "data_wait_share"),
            parts={name[5:]: value for name in row if name[:5] == "loss/" and (value := number(row, name)) is not None},
            ranks=_ranks(figures),
        )

    def _ask(self) -> Figures:
        """Return what its endpoints say, unless another run has come by the port of one that was killed."""
        figures = scrape(targets(self._run.targets), _NAMES, limit_s=_LIMIT_S)
        is_another = figures.labels(_INFO).get("run", self._name) != self._name
        return Figures([], figures.at_s) if is_another else figures

    def _total_steps(self, figures: Figures) -> int | None:
        """Return the steps that are planned, or what the epochs so far and the configuration say about it."""
        planned = figures.value(_PLANNED_STEPS)
        if planned is not None:
            return int(planned)
        steps_per_epoch = self._steps_per_epoch()
        if steps_per_epoch is None:
            return self._max_steps or None
        by_epochs = round(steps_per_epoch * self._epochs)
        return min(self._max_steps or by_epochs, by_epochs)

    def _steps_per_epoch(self) -> float | None:
        """Return what the last evaluation says about it, or None before the first."""
        step, epoch = number(self._rows.holdout, "step"), number(self._rows.holdout, "epoch")
        return step / (epoch + 1) if step and epoch is not None and epoch >= 0 else None

    def _state(self, figures: Figures, step: int, total: int | None) -> State:
        if self._run.evaluation.is_file():
            return State.finished
        if not figures and not _is_locked(self._run):
            return State.ended
        if step != self._moved_to:
            # before the second look only the file knows when it moved
            self._moved_at = self._rows.changed_at if self._moved_to < 0 else time.time()
            self._moved_to = step
        if step == 0:
            return State.starting
        if total is not None and self._is_between_epochs(step, total):
            return State.evaluating
        is_late = time.time() - max(self._moved_at, self._rows.changed_at) > self._hang_s
        return State.stalled if is_late else State.training

    def _is_between_epochs(self, step: int, total: int) -> bool:
        """Whether an evaluation is due: at the end of an epoch that has no row of it yet, or after all steps."""
        if step >= total:
            return True
        steps_per_epoch = self._steps_per_epoch() if self._max_steps else total / self._epochs
        every = (steps_per_epoch or 0) * self._epochs_a_judgement
        return bool(every) and step % every == 0 and number(self._rows.holdout, "step") != step

    def _speed(self) -> float | None:
        """Return the samples per second over the last looks, or None while there is but one or no step was taken."""
        if len(self._past) < 2:
            return None
        old, new = self._past[0], self._past[-1]
        before, after = (each.value(_SAMPLES) for each in (old, new))
        if before is None or after is None or after <= before:
            return None
        return (after - before) / (new.at_s - old.at_s)


def _ranks(figures: Figures) -> list[RankLook]:
    up = figures.by(_RANK_UP, "rank")
    steps = figures.by(_RANK_STEPS, "rank")
    resident = figures.by(_RESIDENT, "rank")
    memory = {**resident, **figures.by(_ON_GPU, "rank")}
    waited, took = figures.by(_WAITED, "rank"), figures.by(_TOOK, "rank")
    return [
        RankLook(
            rank=rank,
            is_up=up[rank] == 1,
            host=figures.labels(_RANK_UP, rank=rank).get("host", ""),
            steps=steps.get(rank),
            memory_bytes=memory.get(rank),
            wait_share=waited[rank] / took[rank] if took.get(rank) and rank in waited else None,
        )
        for rank in sorted(up, key=lambda rank: (len(rank), rank))
    ]


def _is_locked(run: RunDirectory) -> bool:
    """Whether a process writes the run: asks for the lock's owner, since taking the lock could turn a start away."""
    if not run.lock.is_file():  # a pipe would never open
        return False
    try:
        with run.lock.open("rb") as file:
            asked = struct.pack(_LOCK, fcntl.F_RDLCK, 0, 0, 0, 0)
            told = struct.unpack(_LOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return False
    return bool(told[0] != fcntl.F_UNLCK)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
