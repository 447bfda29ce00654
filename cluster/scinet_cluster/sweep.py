"""Search the options of a training with Ray Tune: ``scinet-sweep --config configs/sweeps/loss_weights.yaml``."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import scinet.train
from scinet import config
from scinet.errors import ConfigError, ScinetError
from scinet.rundir import exclusive, write_text
from scinet_cluster.sweeps import disk, options, space
from scinet_cluster.sweeps.agenda import Agenda
from scinet_cluster.sweeps.ledger import Ledger
from scinet_cluster.sweeps.options import Sweep, SweepOptions
from scinet_cluster.sweeps.process import Job

_EPILOG = """examples:
  scinet-sweep --config configs/sweeps/loss_weights.yaml
  scinet-sweep --config configs/sweeps/loss_weights.yaml trials=8 fixed.train.epochs=4 name=short
  scinet-sweep --config configs/sweeps/loss_weights.yaml --resume         # goes on with one that was killed
  scinet-sweep --config configs/sweeps/loss_weights.yaml --address auto   # on the Ray cluster of this machine
"""
# what may be another when a sweep goes on: how much is tried and where, not what; and what makes the training, which is
# compared as a whole
_FREE_ON_RESUME = ("trials", "confirm.", "resources.", "output", "config", "fixed")
# read by Ray once, when it is imported
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials keep their own files
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # so does the sweep
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # one sentence says that a trial was lost
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no figure
}
# outside of Windows and macOS Ray listens on all interfaces, also when it is all within one process's care
_RAY_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        told = parser().parse_intermixed_args(words)
        return _run(options.load(told.config, told.overrides), words, address=told.address, resume=told.resume)
    except ScinetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    made = argparse.ArgumentParser(
        prog="scinet-sweep",
        description="Search options of a training by the mAP on its hold-out; the test split is never opened.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--config", type=Path, required=True, help="a file of configs/sweeps")
    made.add_argument("--resume", action="store_true", help="go on with the sweep that the folder holds")
    made.add_argument("--address", default="", help="a Ray cluster, such as auto (default: one within this process)")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the sweep's configuration")
    return made


def _run(sweep: Sweep, words: Sequence[str], *, address: str, resume: bool) -> int:
    folder = _opened(sweep, resume=resume)
    with exclusive(folder / ".lock", f"{folder} is being swept"):
        ledger = Ledger(folder / "trials.jsonl")
        agenda = Agenda(sweep, ledger, _say)
        try:
            return _carry_out(sweep, agenda, ledger, address)
        finally:
            if agenda.refusal or not ledger.trials:
                # refused, or its training fails from the start: there is nothing to go on with
                shutil.rmtree(folder)
            elif not agenda.is_done:
                command = shlex.join(word for word in words if word != "--resume")
                _say(f"not finished: scinet-sweep {command} --resume goes on")


def _carry_out(sweep: Sweep, agenda: Agenda, ledger: Ledger, address: str) -> int:
    folder, resources = sweep.folder, sweep.options.resources
    disk.check(folder, resources.disk_budget_gb * 2**30)
    os.environ.update(_RAY | (_credentials() if address else _RAY_ON_LOOPBACK))
    from scinet_cluster.sweeps import driving, outcome

    try:
        if agenda.is_done:
            return 0
        job = Job(folder.resolve(), scinet.train.__file__, str(Path.cwd()), resources)
        return driving.drive(sweep, agenda, ledger, job, address=address, say=_say)
    finally:
        disk.prune(folder, ledger, resources.keep_weights)
        for line in outcome.write(sweep, ledger, is_done=agenda.is_done):
            _say(line)


def _credentials() -> dict[str, str]:
    """Return what lets Ray show this user's token to a cluster that wants one; one that wants none takes it too."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    has_token = (Path.home() / ".ray/auth_token").is_file()
    return {"RAY_AUTH_MODE": "token"} if has_token and not any(name in os.environ for name in names) else {}


def _opened(sweep: Sweep, *, resume: bool) -> Path:
    """Return the folder of a new sweep, or of the one to go on with.

    Raises:
        ConfigError: it holds another one, or cannot be written.
    """
    folder = sweep.folder
    kept, base = folder / "sweep.yaml", folder / "base.yaml"
    if kept.is_file() and not resume:
        raise ConfigError(f"{folder} holds a sweep: --resume goes on with it, name=OTHER starts another")
    if not kept.is_file():
        try:
            if folder.exists() and any(folder.iterdir()):
                raise ConfigError(f"{folder} exists and is no sweep: set another name, nothing was overwritten")
            for below in ("trials", "logs"):
                (folder / below).mkdir(parents=True, exist_ok=True)
            write_text(base, config.to_yaml(sweep.base))
            write_text(kept, config.to_yaml(sweep.options))
        except OSError as error:
            raise ConfigError(f"cannot write the sweep's folder {folder}: {error.strerror}") from error
        return folder
    _check_same(sweep, kept, base)
    write_text(kept, config.to_yaml(sweep.options))
    return folder


def _check_same(sweep: Sweep, kept: Path, base: Path) -> None:
    before = config.load_as(SweepOptions, kept)
    for key, _, _ in config.fields(SweepOptions):
        then, now = space.value_of(before, key), space.value_of(sweep.options, key)
        if then != now and not key.startswith(_FREE_ON_RESUME):
            raise ConfigError(f"{kept.parent} was started with {key}={then}, now it is {now}: set another name")
    then_base = config.load(base)
    for key, _, _ in config.fields():
        then, now = space.value_of(then_base, key), space.value_of(sweep.base, key)
        if then != now:
            raise ConfigError(
                f"the training of {kept.parent} was started with {key}={then}, now it is {now}: set another name"
            )


def _say(line: str) -> None:
    # sys.stdout is given to Ray meanwhile
    print(line, file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    sys.exit(main())
