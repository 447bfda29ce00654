"""Masks are a pure function of (sample id, class, seed), nested over the known ratio."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scinet.data.masks import annotated, class_ratios, derive, observe, text_key, uniform, uniforms

QUICK = settings(deadline=None, max_examples=25)
TRUTHS = st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=40).map(lambda row: np.array(row, dtype=np.int8))
SEEDS = st.integers(0, 2**63)


def test_hashes_never_change_when_the_code_does() -> None:
    # a change here changes every published mask: data made and results measured before are no longer comparable
    expected = ["0x1.275f9deefb527p-1", "0x1.53ea8ea0c3a47p-1", "0x1.e791451db0cb8p-3", "0x1.83ff86f5bb76cp-2"]
    assert [value.hex() for value in uniforms("scene-0000001", 4, 0).tolist()] == expected
    assert uniforms("ü/a.b", 3, 7).tolist() == [0.6030682516888711, 0.6484182574399392, 0.8972664919023255]
    assert uniform("holdout/a") == 0.4245883812400473
    assert derive(3, "views", 1, "a") == 4754102034400308814
    assert class_ratios(0.5, 3, spread=0.5, seed=1).tolist() == [0.3333333333333333, 0.6666666666666667, 0.5]
    observed = observe(np.ones(12, dtype=np.int8), "scene-0000001", known_ratio=1.0, seed=0, flipped=0.4)
    assert np.flatnonzero(observed < 0).tolist() == [1, 2, 3, 5, 7, 9]


def test_hashes_are_equal_when_another_process_computes_them() -> None:
    code = "from scinet.data.masks import uniforms; print(uniforms('a', 2, 1).tolist())"
    answers = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout for _ in range(2)}
    assert answers == {f"{uniforms('a', 2, 1).tolist()}\n".encode()}


@QUICK
@given(
    sample_id=st.text(max_size=30).filter(lambda text: text.isprintable()),
    seed=SEEDS,
    sizes=st.tuples(*[st.integers(1, 50)] * 2),
)
def test_hashes_lie_in_the_unit_interval_and_do_not_depend_on_the_number_of_classes(
    sample_id: str, seed: int, sizes: tuple[int, int]
) -> None:
    few, many = (uniforms(sample_id, size, seed) for size in sorted(sizes))
    assert ((many >= 0) & (many < 1)).all()
    assert (many[: len(few)] == few).all()


@QUICK
@given(
    truth=TRUTHS,
    sample_id=st.text(max_size=10).filter(str.isprintable),
    seed=SEEDS,
    ratios=st.tuples(*[st.floats(0, 1)] * 2),
)
def test_masks_are_nested_when_the_ratio_grows(
    truth: NDArray[np.int8], sample_id: str, seed: int, ratios: tuple[float, float]
) -> None:
    few, many = (observe(truth, sample_id, known_ratio=ratio, seed=seed) for ratio in sorted(ratios))
    assert few.dtype == np.int8
    assert ((few == 0) | (few == many)).all()
    assert ((many == 0) | (many == truth)).all()


def test_masks_are_nested_over_all_published_ratios() -> None:
    truth = np.array([1, -1] * 10, dtype=np.int8)
    before = np.zeros((50, 20), dtype=np.int8)
    for ratio in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0):
        rows = np.stack([observe(truth, f"image-{n}", known_ratio=ratio, seed=0) for n in range(50)])
        assert (rows[before != 0] == before[before != 0]).all()
        assert (rows != 0).sum() > (before != 0).sum()
        before = rows


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_nothing_or_all_is_known_at_the_bounds_of_the_ratio(ratio: float) -> None:
    truth = np.array([1, -1, 0, 1], dtype=np.int8)
    assert observe(truth, "a", known_ratio=ratio, seed=0).tolist() == (truth * int(ratio)).tolist()


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_known_share_equals_the_ratio_when_counted_over_many_cells(ratio: float, sign: int) -> None:
    num_images, num_classes = 1000, 20
    truth = np.full(num_classes, sign, dtype=np.int8)
    rows = np.stack([observe(truth, f"image-{n}", known_ratio=ratio, seed=0) for n in range(num_images)])
    for cells in (rows, *rows.T):
        deviation = np.sqrt(ratio * (1 - ratio) / cells.size)
        assert abs((cells == sign).mean() - ratio) < 4.5 * deviation


def _assert_uncorrelated(columns: NDArray[np.float64]) -> None:
    off = np.asarray(np.corrcoef(columns, rowvar=False))[~np.eye(columns.shape[1], dtype=bool)]
    assert np.abs(off).max() < 5 / np.sqrt(len(columns))


def test_cells_are_independent_when_ids_or_classes_are_neighbours() -> None:
    base = np.stack([uniforms(f"image-{n}", 8, 0) for n in range(4000)])
    _assert_uncorrelated(np.concatenate([base, np.roll(base, 1, axis=0)], axis=1))


def test_cells_are_independent_when_seeds_are_neighbours() -> None:
    columns = [np.stack([uniforms(f"image-{n}", 6, seed) for n in range(2000)]) for seed in (0, 1, 2)]
    _assert_uncorrelated(np.concatenate(columns, axis=1))


def test_input_is_left_alone_when_masked() -> None:
    truth = np.array([1, -1, 1], dtype=np.int8)
    observe(truth, "a", known_ratio=0.0, seed=0)
    observe(truth, "a", known_ratio=0.0, seed=0, single_positive=True)
    assert truth.tolist() == [1, -1, 1]


@QUICK
@given(truth=TRUTHS, seed=SEEDS)
def test_one_positive_is_known_and_nothing_else_when_single_positive(truth: NDArray[np.int8], seed: int) -> None:
    observed = observe(truth, "a", known_ratio=1.0, seed=seed, single_positive=True)
    positives = np.flatnonzero(truth == 1)
    if not len(positives):
        assert not observed.any()
        return
    chosen = positives[np.argmin(uniforms("a", len(truth), seed)[positives])]
    assert np.flatnonzero(observed).tolist() == [chosen]
    assert observed[chosen] == 1


def test_every_positive_is_chosen_about_equally_often_when_single_positive() -> None:
    truth = np.array([1, -1, 1, 0, 1, 1], dtype=np.int8)
    chosen = [int(np.argmax(observe(truth, str(n), known_ratio=0, seed=0, single_positive=True))) for n in range(2000)]
    counts = np.bincount(chosen, minlength=6)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert np.abs(counts[[0, 2, 4, 5]] - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_seeds_differ_when_the_purpose_or_any_part_does() -> None:
    parts = [
        (0, "views", 1, "a"),
        (0, "views", 1, "b"),
        (0, "order", 1, "a"),
        (1, "views", 0, "a"),
        (0, "views", 11, "a"),
    ]
    assert len({derive(*part) for part in parts}) == len(parts)
    assert all(0 <= derive(*part) < 2**63 for part in parts)
    assert text_key("a") != text_key("b")


@QUICK
@given(truth=TRUTHS, sample_id=st.sampled_from(["a", "scene-7"]), seed=SEEDS, data=st.data())
def test_flips_are_nested_and_leave_what_is_known_alone(
    truth: NDArray[np.int8], sample_id: str, seed: int, data: st.DataObject
) -> None:
    few, many = sorted(data.draw(st.tuples(*[st.floats(0, 1)] * 2)))
    ratio, more = sorted(data.draw(st.tuples(*[st.floats(0, 1)] * 2)))
    clean, one, two, wider = (
        observe(truth, sample_id, known_ratio=known, seed=seed, flipped=share)
        for known, share in ((ratio, 0.0), (ratio, few), (ratio, many), (more, few))
    )
    assert one.dtype == np.int8
    assert (np.abs(one) == np.abs(clean)).all()
    assert ((one == clean) | (two == -clean)).all()
    assert ((one == 0) | (one == wider)).all()


def test_all_or_no_label_is_flipped_at_the_bounds_of_the_share() -> None:
    truth = np.array([1, -1, 0, 1], dtype=np.int8)
    for share, sign in ((0.0, 1), (1.0, -1)):
        assert observe(truth, "a", known_ratio=1.0, seed=0, flipped=share).tolist() == (sign * truth).tolist()


@pytest.mark.parametrize("ratio", [0.1, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_flipped_share_of_the_known_is_the_asked_one_when_counted_over_many_cells(ratio: float, sign: int) -> None:
    truth = np.full(20, sign, dtype=np.int8)
    rows = np.stack([observe(truth, f"image-{n}", known_ratio=ratio, seed=0, flipped=0.2) for n in range(2000)])
    for cells in (rows, *rows.T):
        known = cells[cells != 0]
        assert abs((known == -sign).mean() - 0.2) < 4.5 * np.sqrt(0.2 * 0.8 / known.size)


def test_flips_are_independent_when_ids_classes_or_seeds_are_neighbours() -> None:
    truth = np.ones(6, dtype=np.int8)
    flips = [
        np.stack([observe(truth, f"image-{n}", known_ratio=1.0, seed=seed, flipped=0.5) for n in range(2000)])
        for seed in (0, 1)
    ]
    masks = [np.stack([uniforms(f"image-{n}", 6, 0) for n in range(2000)])]
    _assert_uncorrelated(np.concatenate([*flips, np.roll(flips[0], 1, axis=0), *masks], axis=1).astype(np.float64))


@QUICK
@given(
    ratios=st.tuples(*[st.floats(0, 1)] * 2),
    num_classes=st.integers(1, 50),
    spread=st.floats(0, 1),
    seed=SEEDS,
)
def test_class_ratios_are_shares_with_the_asked_mean_and_grow_with_it(
    ratios: tuple[float, float], num_classes: int, spread: float, seed: int
) -> None:
    few, many = (class_ratios(ratio, num_classes, spread=spread, seed=seed) for ratio in sorted(ratios))
    for ratio, found in zip(sorted(ratios), (few, many), strict=True):
        assert found.shape == (num_classes,)
        assert ((found >= 0) & (found <= 1)).all()
        assert found.mean() == pytest.approx(ratio, abs=1e-12)
        # evenly from the lowest to the highest
        reach = spread * min(ratio, 1 - ratio) * (1 - 1 / num_classes)
        expected = np.linspace(ratio - reach, ratio + reach, num_classes) if num_classes > 1 else [ratio]
        np.testing.assert_allclose(np.sort(found), expected, atol=1e-12)
    assert (many >= few - 1e-12).all()


def test_class_ratios_are_the_known_ratio_itself_when_nothing_is_spread() -> None:
    assert set(class_ratios(0.3, 7, spread=0.0, seed=3).tolist()) == {0.3}


def test_class_ratios_are_dealt_out_anew_when_the_seed_changes() -> None:
    rows = {tuple(class_ratios(0.3, 30, spread=1.0, seed=seed).tolist()) for seed in range(20)}
    assert len(rows) == 20
    # no class is at the top for every seed
    assert len({int(np.argmax(row)) for row in rows}) > 5


def test_each_class_has_its_own_known_share_when_ratios_are_spread() -> None:
    ratios = class_ratios(0.3, 10, spread=1.0, seed=0)
    truth = np.ones(10, dtype=np.int8)
    rows = np.stack([observe(truth, f"image-{n}", known_ratio=ratios, seed=0) for n in range(2000)])
    assert (np.abs(rows.mean(0) - ratios) < 4.5 * np.sqrt(ratios * (1 - ratios) / 2000)).all()


@QUICK
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=30), shares=st.tuples(*[st.floats(0.001, 1)] * 2))
def test_annotated_classes_are_the_most_frequent_and_nested(counts: list[int], shares: tuple[float, float]) -> None:
    few, many = (annotated(share, counts) for share in sorted(shares))
    assert not (few & ~many).any()
    assert few.sum() == max(1, round(min(shares) * len(counts)))
    assert min(np.array(counts)[few]) >= max(np.array(counts)[~few], default=0)
    assert annotated(1.0, counts).all()


def test_first_class_is_annotated_when_several_are_as_frequent() -> None:
    assert annotated(0.5, [2, 3, 2, 2]).tolist() == [True, True, False, False]
