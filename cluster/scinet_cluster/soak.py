"""Break a training run at random, again and again, and compare it with the unbroken one: ``scinet soak --kills 20``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import scinet.train
from scinet.errors import FIRST_CURABLE, ConfigError, ScinetError, TrainingError
from scinet.rundir import RunDirectory
from scinet_cluster import faults
from scinet_cluster.faults import Fault
from scinet_cluster.likeness import differences
from scinet_cluster.soak_plan import Plan
from scinet_cluster.soak_start import LOOKS_EVERY_S, Start, step_of

_UNBROKEN = "unbroken"
_HANG_S = 20
_GRACE_S = 10
_SLACK_S = 60.0  # on a busy machine
_FULL_S = 30.0


@dataclass(frozen=True)
class Soak:
    """How many faults, on how many ranks, drawn how, where, and the training command."""

    kills: int
    ranks: int
    seed: int
    out: Path
    words: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 alike, 1 not, 2 wrong usage."""
    try:
        _run(_parse(list(sys.argv[1:] if argv is None else argv)))
    except ScinetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def _parse(words: list[str]) -> Soak:
    parser = argparse.ArgumentParser(
        prog="scinet soak",
        description="Train once undisturbed; then again and again while ranks, loaders and launcher are killed, hang "
        "or find the disk full at random, going on each time; and compare every result, bit by bit.",
        epilog="example:\n  scinet soak --kills 20 --config configs/quickstart.yaml train.epochs=4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="a YAML file")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how many faults (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, metavar="K", help="on this machine (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a new folder (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    told = parser.parse_intermixed_args(words)
    for name, value in (("--kills", told.kills), ("--ranks", told.ranks)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, but must be at least 1")
    if told.out.exists() and any(told.out.iterdir()):
        raise ConfigError(f"{told.out} is not empty: remove it or give another folder by --out")
    needed = ("train.log_every_steps=1", f"train.hang_timeout_s={_HANG_S}", f"output={told.out}")
    own = ("--config", str(told.config), "checkpoint.every_steps=5", *told.overrides, *needed)
    return Soak(told.kills, told.ranks, told.seed, told.out, (scinet.train.__file__, *own))


def _run(soak: Soak) -> None:
    """Carry it out.

    Raises:
        TrainingError: naming the first thing that was not as it should be.
    """
    print(f"training {soak.out / _UNBROKEN} undisturbed on {soak.ranks} rank(s)", flush=True)
    plan = _undisturbed(soak)
    print(f"{plan.total_steps} steps in {plan.took_s:.0f} s, the first after {plan.first_step_s:.0f} s", flush=True)
    rounds = 0
    while plan.left:
        rounds += 1
        run = soak.out / f"broken-{rounds}"
        while _begin_or_go_on(soak, run, plan):
            pass
        found = differences(RunDirectory(soak.out / _UNBROKEN), RunDirectory(run))
        if found:
            raise TrainingError(f"{run} differs from {soak.out / _UNBROKEN}: {'; '.join(found)}")
        print(f"{run} is the same as {soak.out / _UNBROKEN}, bit by bit", flush=True)
    print(f"{soak.kills} faults in {rounds} run(s), and nothing was lost")


def _undisturbed(soak: Soak) -> Plan:
    run, begun, first_step_s = soak.out / _UNBROKEN, time.monotonic(), 0.0
    with Start(soak.words, run, ranks=soak.ranks, grace_s=_GRACE_S) as start:
        while start.is_running:
            if not first_step_s and step_of(run):
                first_step_s = time.monotonic() - begun
            time.sleep(LOOKS_EVERY_S)
        status = start.wait(_SLACK_S)
        if status:
            kind = ConfigError if status == ConfigError.exit_status else TrainingError
            raise kind(f"the undisturbed run: {start.verdict.removeprefix('error: ')}")
    took_s = time.monotonic() - begun
    return Plan(soak.kills, soak.seed, total_steps=step_of(run), first_step_s=first_step_s, took_s=took_s)


def _begin_or_go_on(soak: Soak, run: Path, plan: Plan) -> bool:
    """Start a run, disturb it, see it end, and return whether it is to be started again."""
    befell: list[Fault] = []
    begun = time.monotonic()
    with Start(soak.words, run, ranks=soak.ranks, grace_s=_GRACE_S) as start:
        while plan.left and befell in ([], [Fault.fill_disk]) and plan.await_moment(start, run):
            where, begun = f"{soak.kills - plan.left + 1}/{soak.kills} at step {step_of(run)}", time.monotonic()
            befell.append(faults.inflict(plan.draw(), start.launcher, start.mark, plan.chance))
            print(f"{where}: {befell[-1].value}", flush=True)
            if befell[-1] is Fault.fill_disk:
                start.await_text("was not written", _FULL_S)
                faults.limit_files(start.mark, -1)
        ends_soon = befell and befell[-1] is not Fault.fill_disk
        status = start.wait(_HANG_S + 2 * _GRACE_S + _SLACK_S if ends_soon else 2 * plan.took_s + _SLACK_S)
        took_s = time.monotonic() - begun
        if "Traceback" in start.text or not _is_in_order(status, befell):
            raise TrainingError(f"{run} ended with status {status}: {start.text[-3000:]}")
        print(f"  status {status} {took_s:.1f} s later: {start.verdict}", flush=True)
    return status != 0


def _is_in_order(status: int, befell: Sequence[Fault]) -> bool:
    """Return whether a status is what should follow: done, or a scheduler starts it again, or a full disk."""
    is_curable = status < 0 or status >= FIRST_CURABLE
    return status == 0 or (bool(befell) and is_curable) or (Fault.fill_disk in befell and status == 1)


if __name__ == "__main__":
    sys.exit(main())
