"""Building the C routines: kept and reused, and done without where there is no compiler, which is said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scinet_kernels import native

CALL = (
    "import logging, torch, scinet_kernels as k; logging.basicConfig(); x = torch.eye(3); "
    "print(k.gaussian_propagate(x, x, bandwidth=1.0).sum().item(), k.pearson(x)[0].sum().item())"
)


def run(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"XDG_CACHE_HOME": str(cache)} | environment
    return subprocess.run([sys.executable, "-c", CALL], env=settings, capture_output=True, text=True, check=True)


def test_routines_are_built_once_and_only_their_owner_may_write_them(tmp_path: Path) -> None:
    first = run(tmp_path)
    folder = tmp_path / "scinet" / "native"
    (made,) = folder.iterdir()
    assert made.suffix == ".so"
    assert folder.stat().st_mode & 0o077 == 0
    stamp = made.stat().st_mtime_ns
    assert run(tmp_path).stdout == first.stdout
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [stamp]
    assert "slower" not in first.stderr


@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_torch_does_the_work_where_nothing_can_be_built(tmp_path: Path, compiler: str) -> None:
    if compiler == "broken":
        broken = tmp_path / "cc"
        broken.write_text("#!/bin/sh\necho 'cc: out of order' >&2\nexit 1\n")
        broken.chmod(0o755)
    found = run(tmp_path, PATH=str(tmp_path), CC="")
    expected = "no C compiler" if compiler == "none" else "out of order"
    assert found.stderr.count(expected) == 1
    assert "slower" in found.stderr
    assert [round(float(word), 5) for word in found.stdout.split()] == [
        round(float(word), 5) for word in run(tmp_path / "cache").stdout.split()
    ]


def test_routines_are_built_anew_when_source_compiler_processor_or_dtype_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, version, sources = tmp_path / "cc", tmp_path / "cc.version", tmp_path / "native"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exec cat "$0.version"\nfor last; do :; done\n: > "$last"\n')
    compiler.chmod(0o755)
    version.write_text("cc 1")
    shutil.copytree(native._SOURCES, sources)
    monkeypatch.setattr(native, "_SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def built(dtype: torch.dtype = torch.float32) -> Path:
        return native._compiled(str(compiler), dtype)

    found = [built()]
    assert built() == found[0]
    found.append(built(torch.float64))
    for source in ("gaussian.c", "common.h"):
        (sources / source).write_text((sources / source).read_text() + "\n")
        found.append(built())
    version.write_text("cc 2")
    found.append(built())
    monkeypatch.setattr(native, "_processor", lambda: b"another")
    found.append(built())
    assert len(set(found)) == 6
    assert all(path.exists() for path in found)
