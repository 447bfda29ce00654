"""A comparison of small trainings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Compare = Callable[..., tuple[int, str, str]]

BASE = """
data: {path: PATH, cache_features: true, cached_variants: 2}
model: {freeze_image: true, image_size: 64}
fusion: {bank_size: 64}
train: {epochs: 2, global_batch_size: 16}
"""


@pytest.fixture
def plan_file(scenes: Path, tmp_path: Path) -> Path:
    """A plan of two methods, one under two names, on cached features; its output lies in the same folder."""
    (tmp_path / "base.yaml").write_text(BASE.replace("PATH", str(scenes)))
    path = tmp_path / "plan.yaml"
    path.write_text(
        f"output: {tmp_path / 'out'}\n"
        "base: base.yaml\n"
        "methods:\n"
        "  bce: [method=bce]\n"
        "  bce again: [method=bce, fusion.momentum=0.1]\n"
        "  zero-shot: [method=zero_shot]\n"
        "known_ratios: [0.5]\n"
        "settings: {single: [data.single_positive=true]}\n"
        "seeds: [0]\n"
        "test_peak: true\n"
    )
    return path


@pytest.fixture
def compare(own_environment: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Compare:
    """``compare(plan_file, "--jobs", 2)``: the command inside this process, as status, output and errors."""
    from scinet import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["scinet", "compare", "--config", *map(str, arguments)])
        capfd.readouterr()
        status = cli.main()
        return status, *capfd.readouterr()

    return call
