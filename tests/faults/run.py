"""Plants each fault of the lists beside this file in a copy of the tree, and sees whether a named test fails.

Exit status 0: all were caught; 1: one survived, or broke the copy so that no test ran; 2: a list is wrong, or a named
test fails without any fault.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
SOURCES = (".", "kernels", "cluster")  # folders that hold packages
# imported once, before the forks, where these are many; the second bring Triton, which must first know how it runs
MODULES = ("pytest", "hypothesis", "numpy", "torch", "omegaconf", "PIL.Image", "safetensors.torch")
LARGER_MODULES = ("torchvision", "timm", "scipy.special", "sklearn.metrics", "open_clip")
PLUGINS = (
    "--disable-plugin-autoload",
    "-p",
    "pytest_timeout",
    "-p",
    "_hypothesis_pytestplugin",
    "-p",
    "no:cacheprovider",
)
OPTIONS = (*PLUGINS, "-x", "-q", "--timeout=120")


@dataclass(frozen=True)
class Fault:
    """One entry of a list; without a file, the tests run on the tree as it is."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    interpreter: bool = False


@dataclass(eq=False)
class Outcome:
    """What pytest, whose plugin this is, said; and which modules came from the tree itself instead of its copy."""

    status: int = -1
    failed: list[str] = field(default_factory=list)
    originals: list[str] = field(default_factory=list)
    last_words: str = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a failed test."""
        self.failed += [report.nodeid] * report.failed

    def verdict(self) -> tuple[str, str]:
        """Return the verdict, and by which test or why."""
        if self.originals:
            return "BROKEN", f"imported from the tree instead of the copy: {', '.join(self.originals)}"
        if self.failed:
            return "caught", self.failed[0]
        if self.status == 0:
            return "SURVIVED", ""
        return "BROKEN", f"no test failed, pytest's status is {self.status} {self.last_words}"


def refuse(sentence: str) -> NoReturn:
    """End with status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def read_lists(root: Path, tracked: Sequence[str]) -> list[Fault]:
    """Return all faults; ends with one sentence where a list is wrong."""
    faults: dict[str, Fault] = {}
    for path in sorted((root / "tests/faults").glob("*.toml")):
        try:
            entries = [Fault(**entry) for entry in tomllib.loads(path.read_text())["fault"]]
        except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            refuse(f"{path.name} cannot be read: {error!r}")
        for fault in entries:
            where = f"{path.name}, fault '{fault.name}'"
            if fault.name in faults or not fault.tests:
                refuse(f"{where}: names no test, or another fault has its name")
            for needed in (fault.file, *(test.partition("::")[0] for test in fault.tests)):
                if needed not in tracked:
                    refuse(f"{where}: {needed} is no tracked file")
            text = (root / fault.file).read_text()
            if text.count(fault.old) != 1:
                refuse(f"{where}: the old text occurs {text.count(fault.old)} times in {fault.file}, expected once")
            try:
                compile(text.replace(fault.old, fault.new) if fault.file.endswith(".py") else "", fault.file, "exec")
            except SyntaxError as error:
                refuse(f"{where}: the new text is no Python: {error}")
            faults[fault.name] = fault
    return list(faults.values())


def outcomes(faults: Sequence[Fault], copies: Sequence[Path], root: Path) -> Iterator[tuple[Fault, Outcome, float]]:
    """Run the tests of each fault in a fork of this process, one a copy at a time; with how long it took."""
    waiting, free = list(reversed(faults)), list(copies)
    running: dict[int, tuple[Fault, Path, float]] = {}
    while waiting or running:
        while waiting and free:
            fault, copy = waiting.pop(), free.pop()
            if fault.file:
                (copy / fault.file).write_text((root / fault.file).read_text().replace(fault.old, fault.new))
            pid = os.fork()
            if pid == 0:
                run_child(fault, copy, root)
            running[pid] = (fault, copy, time.monotonic())
        pid, _ = os.wait()
        fault, copy, start = running.pop(pid)
        if fault.file:
            shutil.copy2(root / fault.file, copy / fault.file)
        said, log = copy.with_suffix(".json"), copy.with_suffix(".log").read_text(errors="replace")
        outcome = Outcome(**json.loads(said.read_text())) if said.exists() else Outcome()
        errors = [line for line in log.splitlines() if line.startswith(("E  ", "ERROR", "INTERNALERROR"))]
        outcome.last_words = " | ".join((errors or log.splitlines())[-3:])
        yield fault, outcome, time.monotonic() - start
        said.unlink(missing_ok=True)
        free.append(copy)


def run_child(fault: Fault, copy: Path, root: Path) -> NoReturn:
    """Run pytest on the copy and write down what it said."""
    outcome = Outcome()
    try:
        import pytest
        from hypothesis import Phase, settings

        # the same examples each time, none remembered from another fault, and no smaller ones sought once one fails
        few = (Phase.explicit, Phase.generate)
        settings.register_profile("faults", phases=few, database=None, derandomize=True, print_blob=False)
        settings.load_profile("faults")
        with copy.with_suffix(".log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        paths = [str(copy / source) for source in SOURCES]
        sys.path[:] = [*paths, *(path for path in sys.path if path != str(HERE))]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for the processes that tests start
        if fault.interpreter:
            os.environ["TRITON_INTERPRET"] = "1"
        os.chdir(copy)
        outcome.status = int(pytest.main([*OPTIONS, *fault.tests], plugins=[outcome]))
        files = {Path(getattr(module, "__file__", None) or "/") for module in sys.modules.values()} - {Path(__file__)}
        # the environment lies in the tree, too
        own = (file for file in files if file.is_relative_to(root) and not file.is_relative_to(root / ".venv"))
        outcome.originals = sorted(map(str, own))
        copy.with_suffix(".json").write_text(json.dumps(asdict(outcome)))
    finally:
        os._exit(0)


def copied(root: Path, tracked: Sequence[str], to: Path) -> Path:
    """Copy the tracked files as they are now."""
    for name in tracked:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, to / name, follow_symlinks=False)
    return to


def main() -> int:
    """Run the faults and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults whose name or file contains these words")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults at a time")
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="the tree, with its lists in tests/faults")
    given = parser.parse_args()
    root, wanted, start = given.root.resolve(), " ".join(given.words), time.monotonic()
    listed = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    tracked = [name for name in listed.split("\0") if (root / name).is_file()]
    faults = [fault for fault in read_lists(root, tracked) if wanted in fault.name or wanted in fault.file]
    if not faults:
        refuse(f"no fault's name or file contains '{wanted}'")
    sys.dont_write_bytecode = True  # two faults of one length within a second would look alike
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    counts = {"caught": 0, "SURVIVED": 0, "BROKEN": 0}
    with tempfile.TemporaryDirectory(prefix="scinet-faults-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"  # built faulty C code stays out of the user's
        copies = [copied(root, tracked, Path(folder) / f"copy{number}") for number in range(max(1, given.jobs))]
        for interpreter, modules in ((True, MODULES), (False, (*MODULES, *LARGER_MODULES))):
            group = [fault for fault in faults if fault.interpreter is interpreter]
            tests = sorted({test for fault in group for test in fault.tests})
            for module in modules if len(group) > 4 else modules[:2]:
                importlib.import_module(module)
            gc.freeze()  # pytest collects garbage, which would touch every object of these modules in every fork
            shares = (tuple(tests[number :: len(copies)]) for number in range(len(copies)))
            unchanged = [Fault("", "", "", "", share, interpreter) for share in shares if share]
            for fault, outcome, _ in outcomes(unchanged, copies, root):
                if outcome.verdict()[0] != "SURVIVED":
                    refuse(f"without any fault, {' '.join(fault.tests)}: {' '.join(outcome.verdict())}")
            for fault, outcome, seconds in outcomes(group, copies, root):
                verdict, by = outcome.verdict()
                counts[verdict] += 1
                print(f"{verdict:9}{seconds:6.1f} s  {fault.file}: {fault.name}  {by}", flush=True)
    print(f"{', '.join(f'{n} {what}' for what, n in counts.items())}, in {time.monotonic() - start:.0f} s")
    return 0 if counts["caught"] == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
