"""What the project's folders may hold, and what names its modules may bear (design.md)."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    "pyproject.toml",
    "scinet",
    "kernels",
    "cluster",
    "configs",
    "tests",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "requirements.lock",
}
PACKAGES = {
    "scinet": ROOT / "scinet",
    "scinet_kernels": ROOT / "kernels" / "scinet_kernels",
    "scinet_cluster": ROOT / "cluster" / "scinet_cluster",
}
MOST_LINES = 420

_IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch
assert not torch.distributed.is_initialized(), "importing must not join a group"
"""


def _modules() -> list[str]:
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def _tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )


def test_no_module_of_scinet_bears_the_name_of_another_top_level_module() -> None:
    # `deepspeed scinet/train.py` puts scinet/ first on the path: such a name would hide the other module
    own = {
        path.stem for path in (ROOT / "scinet").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    own.discard("__init__")
    installed = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if any(owner.lower() != "scinet" for owner in owners)
    }
    assert "torch" in installed
    assert not own & set(sys.stdlib_module_names)
    assert not own & installed


def test_packages_bear_no_name_of_another_distribution() -> None:
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        assert {owner.lower() for owner in owners.get(package, [])} <= {"scinet"}


def test_every_module_imports_in_a_fresh_interpreter_without_a_gpu() -> None:
    modules = _modules()
    assert len(modules) > 40
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**__import__("os").environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr


def test_other_packages_import_from_the_repository_root() -> None:
    done = _python("-c", "import transformers, open_clip; transformers.AutoModel; open_clip.list_models()")
    assert done.returncode == 0, done.stderr


def test_readme_names_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", (ROOT / "README.md").read_text(), flags=re.M))
    assert {"quickstart", "test"} <= named
    assert named <= targets


def test_readme_names_only_commands_that_exist() -> None:
    import typer

    from scinet import cli

    def paths(command: object, prefix: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
        below = getattr(command, "commands", {})
        return {prefix}.union(*(paths(child, (*prefix, name)) for name, child in below.items()))

    known = paths(typer.main.get_command(cli.app))
    text = (ROOT / "README.md").read_text()
    for line in re.findall(r"(?:^|[`$ ])scinet ((?:[a-z]+ ?)+)", text, flags=re.M):
        words = tuple(line.split())
        if words and (words[:1] in known or line.startswith("data")):
            assert any(words[:length] in known for length in (1, 2, 3)), line
    for command in re.findall(r"`scinet ([a-z]+)", text):
        assert (command,) in known, f"README names `scinet {command}`"


def test_readme_names_only_configurations_that_exist() -> None:
    for name in re.findall(r"configs/[\w/.-]+\.yaml", (ROOT / "README.md").read_text()):
        assert (ROOT / name).is_file(), name


def test_files_stay_short() -> None:
    long = {
        name: count
        for name in _tracked()
        if name.startswith(("scinet/", "kernels/", "cluster/")) and name.endswith((".py", ".j2", ".md", ".sh", ".yaml"))
        if (ROOT / name).is_file() and (count := len((ROOT / name).read_text().splitlines())) >= MOST_LINES
    }
    assert not long


def test_top_level_holds_only_what_is_allowed() -> None:
    found = {name.split("/")[0] for name in _tracked()}
    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL
