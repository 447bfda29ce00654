"""A run directory that explains itself: configuration, environment, metrics, checkpoints, evaluation, page."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from scinet import config
from scinet.data import transports
from scinet.errors import CheckpointError, ConfigError, nearest
from scinet.options import Options

FREE_ON_RESUME = {
    "resume",
    "output",
    "baseline",
    "data.prepare",
    "data.workers",
    "data.cache_dir",
    "data.timeout_s",
    "data.retries",
    "data.cache_shards",
    "data.allow_pipe",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "checkpoint.keep_every_steps",
    "train.collective_timeout_s",
    "train.hang_timeout_s",
    "train.on_bad_numbers",
    "train.max_bad_steps",
    "telemetry.prometheus",
    "telemetry.host",
    "telemetry.port",
    "telemetry.push_gateway",
    "telemetry.refresh_s",
    "telemetry.tensorboard",
    "telemetry.wandb",
    "telemetry.wandb_mode",
}
"""Options that say where bytes come from, when they are kept and who is told, not what sound numbers are computed."""
_PACKAGES = (
    "scinet",
    "torch",
    "torchvision",
    "deepspeed",
    "webdataset",
    "open_clip_torch",
    "timm",
    "transformers",
    "numpy",
)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        """The result; its presence means the run is finished."""
        return self.path / "evaluation.json"

    @property
    def targets(self) -> Path:
        """Where Prometheus finds the run while it goes on: one folder for all, since it takes no ``runs/*/``."""
        path = self.path.absolute()
        return path.parent / ".prometheus" / f"{path.name}.json"

    @property
    def bad_numbers(self) -> Path:
        """Batches whose loss or gradient was not finite."""
        return self.path / "bad-numbers"

    @property
    def tensorboard(self) -> Path:
        """Events for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Weights and state."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """Held by the process that writes the run."""
        return self.checkpoints / ".lock"


def create(options: Options) -> RunDirectory:
    """Make the directory of a new run, or return that of the run to resume; call on one rank only.

    Raises:
        ConfigError: if the directory holds a run already and ``resume`` is not set, or cannot be written.
    """
    run = RunDirectory(Path(options.output) / options.name)
    check(options)
    if run.config.exists():
        return run
    try:
        if run.path.exists() and any(found for found in run.path.iterdir() if found != run.checkpoints):
            raise ConfigError(f"{run.path} exists and is no run of scinet: set another name, nothing was overwritten")
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write the run directory {run.path}: {error.strerror}") from error
    return run


@contextlib.contextmanager
def locked(run: RunDirectory, *, patience_s: float = 0.0) -> Iterator[None]:
    """Keep other processes from writing the run; the lock ends with this process, however that ends.

    Args:
        run: to be written.
        patience_s: how long a process that has it may take to end.

    Raises:
        ConfigError: if another process writes it, perhaps one that outlived its launcher.
    """
    with exclusive(run.lock, f"{run.path} is being written", patience_s=patience_s):
        yield


@contextlib.contextmanager
def exclusive(path: Path, busy: str, *, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file that ends with this process.

    Args:
        path: of the file, which is made.
        busy: what is so while another process has it, for the message.
        patience_s: how long that one may take to end.

    Raises:
        ConfigError: it does not.
    """
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    deadline = time.monotonic() + patience_s
    try:
        # a lock of this process alone: that of flock() would live on in loader processes
        while not _takes_lock(handle):
            if time.monotonic() >= deadline:
                owner = os.pread(handle, 200, 0).decode(errors="replace") or "unknown"
                raise ConfigError(f"{busy} by another process ({owner}): wait for it or end it, or set another name")
            time.sleep(0.2)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        os.close(handle)


def _takes_lock(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def discard_if_never_started(run: RunDirectory) -> None:
    """Remove the directory of a run that failed before its first step: it holds nothing yet."""
    if not run.config.exists():
        with contextlib.suppress(OSError):
            run.lock.unlink()
        for folder in (run.checkpoints, run.path):
            with contextlib.suppress(OSError):
                folder.rmdir()


def check(options: Options) -> None:
    """Check that the run is new, or may be gone on with.

    Raises:
        ConfigError: if it holds a run already and ``resume`` is not set, or one of another configuration.
    """
    run = RunDirectory(Path(options.output) / options.name)
    if not run.config.exists():
        return
    if not options.resume:
        state = "a finished" if run.evaluation.exists() else "an unfinished"
        raise ConfigError(
            f"{run.path} holds {state} run: --resume auto goes on with it, name=OTHER starts another; "
            "nothing was overwritten"
        )
    stored = _load(run)
    changed = [
        key
        for key, _, _ in config.fields()
        if key not in FREE_ON_RESUME and _value(stored, key) != _value(options, key)
    ]
    if changed:
        raise ConfigError(
            f"{run.path} was started with {changed[0]}={_value(stored, changed[0])}, now it is "
            f"{_value(options, changed[0])}: resume with the same configuration, or set another name"
        )


def _value(options: Options, key: str) -> Any:
    value: Any = options
    for part in key.split("."):
        value = getattr(value, part)
    return getattr(value, "value", value)


def describe(run: RunDirectory, options: Options, *, weights_sha256: str, card_sha256: str, world_size: int) -> None:
    """Write ``config.yaml`` and ``environment.json`` before the first step."""
    write_text(run.config, config.to_yaml(options))
    environment = {
        "command": [sys.executable, *map(transports.shown, sys.argv)],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "git_revision": git_revision(),
        "world_size": world_size,
        "weights_sha256": weights_sha256,
        "data_card_sha256": card_sha256,
    }
    if options.data.mask_file:
        environment["mask_file_sha256"] = hashlib.sha256(Path(options.data.mask_file).read_bytes()).hexdigest()
    write_text(run.path / "environment.json", json.dumps(environment, indent=1) + "\n")


def find(path: Path) -> tuple[RunDirectory, Options]:
    """Return an existing run and its configuration.

    Raises:
        CheckpointError: if there is none.
    """
    run = RunDirectory(path)
    if not run.config.is_file():
        beside = [str(found) for found in path.parent.glob("*") if (found / "config.yaml").is_file()]
        raise CheckpointError(f"{path} is no run directory: it has no config.yaml{nearest(str(path), beside)}")
    return run, _load(run)


def _load(run: RunDirectory) -> Options:
    """Return the configuration of a run, as it was when the run was made."""
    # the fusion of earlier versions had fixed weights alone
    is_older = "weights" not in config.read_tree(run.config).get("fusion", {})
    return config.load(run.config, ["fusion.weights=fixed"] if is_older else [])


def read_evaluation(run: RunDirectory) -> dict[str, Any]:
    """Return the result of a finished run.

    Raises:
        CheckpointError: if the run is not finished.
    """
    if not run.evaluation.is_file():
        raise CheckpointError(
            f"{run.path} is not finished: it has no {run.evaluation.name}; --resume auto goes on with it"
        )
    evaluation: dict[str, Any] = json.loads(run.evaluation.read_text(encoding="utf-8"))
    return evaluation


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: naming the file, if the disk is full, for instance.
    """
    # two processes may write the same file, such as comparisons that share a folder
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def version_of(name: str) -> str | None:
    """Return a package's version, or None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Return the revision of this source, or None outside of a clone."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
