"""A cell's key holds what can change its result, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scinet import config
from scinet.errors import ConfigError
from scinet.evaluation.comparison import keys, plan
from scinet.evaluation.comparison.keys import Facts
from scinet.options import Method
from tests.scinet.conftest import MakeShards
from tests.scinet.evaluation.comparison.fakes import PLAN, make_plan

FACTS = Facts(
    cards={"data/scenes": "a", "elsewhere": "a", "other": "b"},
    weights={"embedded embedded": "w", "ViT-B-32 openai": "v"},
    masks={"one.jsonl": "m", "same.jsonl": "m", "two.jsonl": "n"},
)


def _key(*overrides: str, facts: Facts = FACTS) -> str | None:
    return keys.key_of(config.load(None, overrides), facts)


@pytest.mark.parametrize(
    ("method", "before", "after", "is_same"),
    [
        ("scinet", "name=run", "name=other", True),
        ("scinet", "output=runs", "output=elsewhere", True),
        ("scinet", "data.workers=0", "data.workers=2", True),
        ("scinet", "telemetry.port=0", "telemetry.port=9", True),
        ("scinet", "checkpoint.keep_last=2", "checkpoint.keep_last=3", True),
        ("scinet", "data.path=data/scenes", "data.path=elsewhere", True),  # the same card lies there
        ("scinet", "data.path=data/scenes", "data.path=other", False),
        ("scinet", "data.mask_file=one.jsonl", "data.mask_file=same.jsonl", True),
        ("scinet", "data.mask_file=one.jsonl", "data.mask_file=two.jsonl", False),
        ("scinet", "fusion.momentum=0.8", "fusion.momentum=0.5", False),
        ("scinet", "fusion.weights=fitted", "fusion.weights=fixed", False),
        ("bce", "fusion.weights=fitted", "fusion.weights=fixed", True),
        ("scinet", "data.lanes=16", "data.lanes=8", False),  # another order
        ("bce", "fusion.momentum=0.8", "fusion.momentum=0.5", True),
        ("bce", "data.known_ratio=0.3", "data.known_ratio=0.7", False),
        ("bce", "seed=0", "seed=3", False),
        ("bce", "correlation.graph_top_k=20", "correlation.graph_top_k=3", False),  # baselines have the graph too
        ("bce", "train.on_bad_numbers=stop", "train.on_bad_numbers=skip", False),
        ("full_labels", "data.known_ratio=0.3", "data.single_positive=true", True),  # it looks past the mask
        ("full_labels", "data.flipped_labels=0", "data.flipped_labels=0.2", True),
        ("full_labels", "data.class_ratio_spread=0", "data.class_ratio_spread=0.2", True),
        ("full_labels", "data.annotated_classes=1", "data.annotated_classes=0.2", True),
        ("full_labels", "data.mask_seed=0", "data.mask_seed=1", True),
        ("full_labels", "data.smallest_crop=0.5", "data.smallest_crop=0.2", False),
        ("bce", "data.flipped_labels=0", "data.flipped_labels=0.2", False),
        ("bce", "data.class_ratio_spread=0", "data.class_ratio_spread=0.2", False),
        ("bce", "data.annotated_classes=1", "data.annotated_classes=0.2", False),
        ("bce", "data.mask_seed=0", "data.mask_seed=1", False),
        ("bce", "data.single_positive=false", "data.single_positive=true", False),
        ("bce", "train.log_every_steps=10", "train.log_every_steps=3", True),
        ("bce", "train.max_bad_steps=10", "train.max_bad_steps=3", False),
        ("zero_shot", "correlation.graph_top_k=20", "correlation.graph_top_k=3", False),
        ("zero_shot", "fusion.momentum=0.8", "fusion.momentum=0.5", True),
        ("full_labels", "seed=0", "seed=3", False),
        ("zero_shot", "seed=0", "seed=3", True),
        ("zero_shot", "data.known_ratio=0.3", "data.known_ratio=0.7", True),
        ("zero_shot", "train.epochs=10", "train.epochs=2", True),
        ("zero_shot", "model.image_size=224", "model.image_size=64", False),
        ("zero_shot", "data.path=data/scenes", "data.path=other", False),
    ],
)
def test_key_is_another_exactly_when_the_result_can_differ(method: str, before: str, after: str, is_same: bool) -> None:
    assert (_key(f"method={method}", before) == _key(f"method={method}", after)) == is_same


def test_own_values_on_all_axes_come_to_one_cell_a_seed(tmp_path: Path) -> None:
    axes = (
        "axes: {mu: {0: [fusion.momentum=0], 0.8: [fusion.momentum=0.8]}, K: {5: [loss.hard_k=5], 8: [loss.hard_k=8]}}"
    )
    wanted = make_plan(tmp_path, PLAN.replace("known_ratios: [0.1, 0.5]", axes).replace("  bce: [method=bce]\n", ""))
    found = {(cell.column.name, cell.seed): keys.key_of(cell.options, FACTS) for cell in plan.expand(wanted)}
    for seed in (0, 1):
        assert found["mu 0.8", seed] == found["K 5", seed]
    assert None not in found.values()
    assert len(set(found.values())) == 6


def test_key_is_another_when_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = Facts(FACTS.cards, {"embedded embedded": "x"}, FACTS.masks)
    assert _key() != _key(facts=changed)
    before = _key()
    monkeypatch.setattr(keys, "SEMANTICS", keys.SEMANTICS + 1)
    assert _key() != before


def test_key_stays_when_the_code_learns_an_option_whose_default_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, plain = _key("method=bce"), keys.effective
    monkeypatch.setattr(keys, "effective", lambda options: plain(options) | {"loss.unheard": 1.0})
    assert _key("method=bce") == before


def test_only_the_keys_of_a_method_are_others_when_it_alone_was_revised(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _key("method=bce"), _key("method=an"), _key("method=scpnet")
    monkeypatch.setattr(keys, "REVISIONS", {Method.bce: 1, Method.scpnet: keys.REVISIONS[Method.scpnet] + 1})
    after = _key("method=bce"), _key("method=an"), _key("method=scpnet")
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, False]


def test_there_is_no_key_when_a_fact_is_missing() -> None:
    assert _key(facts=Facts()) is None
    assert _key("data.mask_file=three.jsonl") is None


def test_methods_share_a_cell_when_they_resolve_to_the_same_options(tmp_path: Path) -> None:
    text = PLAN.replace("  bce:", "  again: [fusion.momentum=0.8]\n  bce:")
    cells = plan.expand(make_plan(tmp_path, text))
    found = {
        method: [keys.key_of(c.options, FACTS) for c in cells if c.method == method] for method in ("again", "bce")
    }
    assert found["again"] == [keys.key_of(c.options, FACTS) for c in cells if c.method == "scinet"]
    assert not set(found["bce"]) & set(found["again"])


def test_facts_are_those_of_card_and_mask(tmp_path: Path, make_shards: MakeShards) -> None:
    card = make_shards()
    (tmp_path / "mask.jsonl").write_text("anything")
    text = PLAN.replace("[method=bce]", "[method=bce, 'data.mask_file=" + str(tmp_path / "mask.jsonl") + "']")
    wanted = make_plan(tmp_path, text.replace("base.yaml", "on_shards.yaml"))
    (tmp_path / "on_shards.yaml").write_text(f"data: {{path: {card.directory}}}\n")
    facts = keys.look(plan.expand(wanted))
    assert facts.cards == {str(card.directory): card.sha256}
    assert list(facts.weights) == ["embedded embedded"]
    assert list(facts.masks) == [str(tmp_path / "mask.jsonl")]
    (tmp_path / "mask.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"mask\.jsonl cannot be read"):
        keys.look(plan.expand(wanted))


def test_facts_are_kept_beside_earlier_ones_when_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    with pytest.raises(ConfigError, match="nothing was compared there yet"):
        keys.recall(path)
    keys.remember(Facts(cards={"a": "1", "b": "2"}), path)
    keys.remember(Facts(cards={"b": "3"}, weights={"w": "4"}), path)
    assert keys.recall(path) == Facts(cards={"a": "1", "b": "3"}, weights={"w": "4"})
    path.write_text(json.dumps({"unheard": {}}))
    with pytest.raises(ConfigError, match="is damaged"):
        keys.recall(path)
    keys.remember(Facts(cards={"c": "5"}), path)
    assert keys.recall(path) == Facts(cards={"c": "5"})
