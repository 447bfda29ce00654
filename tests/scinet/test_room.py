"""Free memory as the kernel, and control groups of both versions, tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scinet.room import host_bytes, ranks_on_this_host

MIB = 2**20


def _root(folder: Path, groups: str, files: dict[str, str]) -> Path:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: {4096 * 1024} kB\nMemAvailable:   {3000 * 1024} kB\n")
    (folder / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def _version_2(limit: str, used: int, idle: int) -> dict[str, str]:
    return {
        "jobs/memory.max": limit,
        "jobs/memory.current": str(used),
        "jobs/memory.stat": f"anon 1\ninactive_file {idle}\n",
    }


def test_host_has_what_the_kernel_calls_available_when_no_group_has_a_limit(tmp_path: Path) -> None:
    root = _root(tmp_path, "0::/jobs/one\n", _version_2("max\n", 100 * MIB, 0))
    assert host_bytes(root) == 3000 * MIB


def test_limit_of_a_group_around_this_one_counts(tmp_path: Path) -> None:
    root = _root(tmp_path, "0::/jobs/one\n", _version_2(str(1000 * MIB), 600 * MIB, 50 * MIB))
    assert host_bytes(root) == 450 * MIB


def test_limit_counts_when_groups_are_of_version_1(tmp_path: Path) -> None:
    files = {
        "memory/jobs/memory.limit_in_bytes": str(1000 * MIB),
        "memory/jobs/memory.usage_in_bytes": str(900 * MIB),
        "memory/jobs/memory.stat": f"cache 5\ntotal_inactive_file {100 * MIB}\n",
        "memory/memory.limit_in_bytes": str(2**63 - 4096),
        "memory/memory.usage_in_bytes": "0",
        "memory/memory.stat": "",
    }
    assert host_bytes(_root(tmp_path, "5:cpu:/\n4:memory:/jobs\n", files)) == 200 * MIB


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_of_a_host_are_the_launchers_word(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(other, raising=False)
    assert ranks_on_this_host(1) == 1
    monkeypatch.setenv(name, "4")
    assert ranks_on_this_host(16) == 4
