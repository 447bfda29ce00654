"""What does not fit is refused in one sentence, whose advice the estimate itself has tried."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

from scinet import config, estimating, fitting, memory
from scinet.data.views import Views
from scinet.distributed import Ranks
from scinet.errors import ConfigError
from scinet.estimating import DataSize
from scinet.materials import Materials
from scinet.memory import Estimate, Moment, Part, Subject
from scinet.model import backbone as model_backbone
from scinet.options import Options
from scinet.paths import cache_directory
from scinet.room import Room
from tests.scinet.conftest import MakeShards

DATA = DataSize(1000, 4, 1, 3, 50_000, 100, 800, 100)
NAMES = ("cat", "dog", "owl", "barn owl")
GIB = 2**30


def _options(*overrides: str) -> Options:
    return config.load(None, ["model.image_size=64", "train.global_batch_size=32", *overrides])


@cache
def _subject(device: str = "cpu") -> Subject:
    towers = model_backbone.load(_options().model, cache_directory(""))
    return Subject(DATA, towers, NAMES, torch.device(device))


def _estimate(*overrides: str, ranks: int = 1, device: str = "cpu") -> Estimate:
    return memory.estimate(_options(*overrides), _subject(device), ranks)


def _bytes(found: Estimate, word: str) -> float:
    return next(part.num_bytes for part in found.parts if part.what.startswith(word))


def test_moments_that_take_turns_count_once() -> None:
    parts = (Part("a", 1), Part("b", 10, Moment.step), Part("c", 20, Moment.update), Part("d", 5, is_there=True))
    found = Estimate(parts, has_gpu=False)
    assert found.peak(host=True) == 21
    assert found.peak(host=True, with_what_is_there=True) == 26
    on_gpu = Estimate((*parts, Part("e", 100, is_on_host=True)), has_gpu=True)
    assert (on_gpu.peak(host=False), on_gpu.peak(host=True)) == (21, 100)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_share_what_zero_partitions(stage: int) -> None:
    plain = _estimate(ranks=4)
    shared = _estimate(f"deepspeed.zero_optimization.stage={stage}", ranks=4)
    assert _bytes(shared, "AdamW's moments") == pytest.approx(_bytes(plain, "AdamW's moments") / 4)
    assert _bytes(shared, "gradients / 4") == pytest.approx(_bytes(plain, "gradients") / 4)
    divisor = 4 if stage == 3 else 1
    for word in ("trainable weights", "teacher"):
        assert _bytes(shared, word) == pytest.approx(_bytes(plain, word) / divisor)


def test_offloaded_optimiser_is_on_the_host_when_there_is_a_gpu() -> None:
    words = ("deepspeed.zero_optimization.stage=2", "deepspeed.zero_optimization.offload_optimizer.device=cpu")
    plain, moved = _estimate(words[0], ranks=2, device="cuda"), _estimate(*words, ranks=2, device="cuda")
    assert moved.peak(host=False) < plain.peak(host=False)
    assert moved.peak(host=True) > plain.peak(host=True)


def test_offloaded_weights_take_the_teacher_with_them() -> None:
    words = ("deepspeed.zero_optimization.stage=3", "deepspeed.zero_optimization.offload_param.device=cpu")
    found = _estimate(*words, ranks=2, device="cuda")
    on_host = [part.what for part in found.on(host=True)]
    assert {"trainable weights / 2 ranks", "teacher, fp32 / 2 ranks"} <= set(on_host)


def test_deepspeeds_bucket_counts_in_full_on_a_gpu_and_as_far_as_it_is_filled_on_the_cpu() -> None:
    word = "deepspeed.zero_optimization.stage=2"
    assert _bytes(_estimate(word, ranks=2, device="cuda"), "ZeRO's bucket") == 2 * 500_000_000
    assert _bytes(_estimate(word, ranks=2), "ZeRO's bucket") == _bytes(_estimate(ranks=2), "trainable weights")
    smaller = f"{word[:-7]}reduce_bucket_size=1000"
    assert _bytes(_estimate(word, smaller, ranks=2, device="cuda"), "ZeRO's bucket") == 2 * 1000


def _refusal(room: Room, *overrides: str, ranks: int = 1, device: str = "cpu") -> str:
    return fitting.refusal(_options(*overrides), _subject(device), ranks, room)


def test_advice_is_the_least_accumulation_that_fits() -> None:
    found = _estimate()
    free = int(found.peak(host=True)) - 1
    text = _refusal(Room(None, free, "here"))
    assert "set train.accumulation_steps=2" in text
    assert "kept for backward" in text
    assert "here" in text
    tight = int(_estimate("train.accumulation_steps=8").peak(host=True)) + 1
    assert "set train.accumulation_steps=8" in _refusal(Room(None, tight, "here"))


def test_advice_is_zero_when_weights_are_what_does_not_fit() -> None:
    overrides = ("train.global_batch_size=4",)
    stages = {s: _estimate(*overrides, f"deepspeed.zero_optimization.stage={s}", ranks=4) for s in (0, 1, 2, 3)}
    free = int(min(stages[s].peak(host=True) for s in (1, 2, 3))) + 1
    assert free < stages[0].peak(host=True)
    text = _refusal(Room(None, free, "here"), *overrides, ranks=4)
    (stage,) = re.findall(r"set deepspeed.zero_optimization.stage=(\d)", text)
    assert stages[int(stage)].peak(host=True) <= free


def test_advice_is_no_memory_of_confidence_when_that_is_what_does_not_fit() -> None:
    data = DataSize(2_000_000, 4, 1, 3, 50_000, 100, 800, 100)
    subject = Subject(data, _subject().backbone, NAMES, torch.device("cpu"))
    options = _options("train.global_batch_size=1", "model.activation_checkpointing=true")
    free = int(memory.estimate(options, subject, 1).peak(host=True)) - 2**20
    assert "set fusion.memory=none fusion.momentum=0, which changes the results" in fitting.refusal(
        options, subject, 1, Room(None, free, "here")
    )


def test_advice_is_to_recompute_when_the_batch_cannot_be_accumulated() -> None:
    odd = ("train.global_batch_size=31",)
    free = int(_estimate(*odd, "model.activation_checkpointing=true").peak(host=True)) + 1
    assert free < _estimate(*odd).peak(host=True)
    assert _refusal(Room(None, free, "here"), *odd).endswith(": set model.activation_checkpointing=true")


def test_what_changes_results_is_advised_last() -> None:
    words = [words for words, _, _ in fitting.changes(_options(), 2, has_gpu=True)]
    assert [word for word in words if "changes the results" in word] == words[-1:]


def test_offload_is_advised_for_a_gpu_only() -> None:
    words = [words for words, _, _ in fitting.changes(_options(), 1, has_gpu=True)]
    assert sum("offload_optimizer.device=cpu" in word for word in words) == 1
    assert not any("offload" in words for words, _, _ in fitting.changes(_options(), 1, has_gpu=False))


def test_nothing_is_advised_when_no_single_change_would_fit() -> None:
    text = _refusal(Room(None, 1000, "here"), "train.global_batch_size=1")
    assert "no single change makes it fit" in text
    assert "comes nearest" in text


RANKS = Ranks(0, 1, torch.device("cpu"))


def _materials(make_shards: MakeShards) -> Materials:
    towers = _subject().backbone
    options = _options()
    views = Views(options.model.image_size, towers.normalisation, smallest_crop=options.data.smallest_crop)
    return Materials(make_shards(), towers, views, options.data)


def test_run_is_refused_on_a_full_machine(monkeypatch: pytest.MonkeyPatch, make_shards: MakeShards) -> None:
    made = _materials(make_shards)
    monkeypatch.setattr(fitting, "look", lambda *_: Room(None, 2**20, "here"))
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"a rank would take .* 1.0 MiB are free for each rank on host here"):
        fitting.check(_options("train.global_batch_size=1"), made, RANKS, said.append)
    assert said == []


def test_run_that_fits_easily_says_one_line_and_a_tight_one_its_parts(
    monkeypatch: pytest.MonkeyPatch, make_shards: MakeShards
) -> None:
    made, options, said = _materials(make_shards), _options("train.global_batch_size=1"), list[str]()
    monkeypatch.setattr(fitting, "look", lambda *_: Room(None, 100 * GIB, "here"))
    fitting.check(options, made, RANKS, said.append)
    assert len(said[0].splitlines()) == 1
    subject = Subject(estimating.of_card(made.card), made.backbone, made.card.class_names, RANKS.device)
    peak = memory.estimate(options, subject, 1).peak(host=True)
    monkeypatch.setattr(fitting, "look", lambda *_: Room(None, int(1.5 * peak), "here"))
    fitting.check(options, made, RANKS, said.append)
    assert "AdamW's moments" in said[1]
    assert len(said[1].splitlines()) > 8
