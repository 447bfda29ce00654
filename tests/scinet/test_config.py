"""A configuration is checked as a whole, and every problem is said in the user's words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scinet import config
from scinet.errors import ConfigError, nearest
from scinet.options import Combine, Memory, Options, Profile, Prometheus
from tests.scinet.options_in_words import in_words

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = settings(deadline=None, max_examples=25)


def _file(folder: Path, text: str, name: str = "it.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _refusal(path: Path | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides)
    assert caught.value.exit_status == 2
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_hold_when_nothing_is_given() -> None:
    assert config.load() == Options()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("naame=x", "name"),
        ("data.knwon_ratio=0.1", "data.known_ratio"),
        ("dta.known_ratio=0.1", "data.known_ratio"),
        ("model.bi_dominent=late", "model.bi_dominant"),
        ("optimizer.learningrate=1", "optimizer.learning_rate"),
        ("DATA.KNOWN_RATIO=0.1", "data.known_ratio"),
        ("train.global_batchsize=8", "train.global_batch_size"),
    ],
)
def test_unknown_key_suggests_the_right_one_when_mistyped(typed: str, meant: str) -> None:
    message = _refusal(None, typed)
    assert f"unknown key '{typed.partition('=')[0]}'" in message
    assert f"did you mean '{meant}'" in message


@pytest.mark.parametrize(
    ("text", "typed", "meant"),
    [
        ("metthod: bce", "metthod", "method"),
        ("fusion:\n  bank_sise: 4", "fusion.bank_sise", "fusion.bank_size"),
        ("corrlation:\n  shrinkage: 4", "corrlation.shrinkage", "correlation.shrinkage"),
    ],
)
def test_unknown_key_names_the_file_when_it_stands_in_one(tmp_path: Path, text: str, typed: str, meant: str) -> None:
    path = _file(tmp_path, text)
    message = _refusal(path)
    assert str(path) in message
    assert f"'{typed}'" in message
    assert f"did you mean '{meant}'" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=many", "a whole number"),
        ("train.epochs=1.5", "a whole number"),
        ("train.epochs=true", "a whole number"),
        ("data.known_ratio=some", "a number"),
        ("data.known_ratio=true", "a number"),
        ("model.freeze_image=1", "true or false"),
        ("data.path=[a,b]", "text"),
        ("deepspeed=3", "a section"),
        ("method=sciner", "scinet"),
        ("fusion.combine=3", "evidence, linear"),
        ("telemetry.prometheus=every_rnk", "did you mean 'every_rank'?"),
        ("telemetry.prometheus=on", "first_rank, every_rank, push, off"),
        ("telemetry.wandb_mode=ofline", "did you mean 'offline'?"),
        ("train.epochs=", "a whole number"),
        ("data=3", "section"),
        ("name.first=3", "one value"),
    ],
)
def test_value_is_refused_when_of_the_wrong_type(override: str, expected: str) -> None:
    message = _refusal(None, override)
    assert f"'{override.partition('=')[0].removesuffix('.first')}'" in message
    assert expected in message


@pytest.mark.parametrize(
    ("override", "bounds"),
    [
        ("data.known_ratio=1.01", "from 0 to 1"),
        ("data.known_ratio=-0.01", "from 0 to 1"),
        ("data.annotated_classes=0", "from 0.001 to 1"),
        ("data.flipped_labels=1.1", "from 0 to 1"),
        ("data.class_ratio_spread=1.1", "from 0 to 1"),
        ("train.epochs=0", "at least 1"),
        ("data.shuffle_window=0", "at least 1"),
        ("fusion.bandwidth_value=0", "at least 0.001"),
        ("model.image_size=16", "from 32 to 1024"),
        ("optimizer.weight_decay=.nan", "at least 0"),
        ("telemetry.port=70000", "from 0 to 65535"),
        ("telemetry.refresh_s=0", "from 0.1 to 3600"),
    ],
)
def test_value_is_refused_when_out_of_range(override: str, bounds: str) -> None:
    message = _refusal(None, override)
    assert f"'{override.partition('=')[0]}'" in message
    assert bounds in message


@pytest.mark.parametrize("override", ["data.known_ratio=0", "data.known_ratio=1", "fusion.bank_size=0", "seed=0"])
def test_value_is_taken_when_it_lies_on_the_bound(override: str) -> None:
    config.load(None, [override])


@pytest.mark.parametrize(
    "overrides", [("=push",), ("=push", "push_gateway=localhost:9091"), ("=push", "push_gateway=ftp://x")]
)
def test_push_is_refused_when_it_is_not_said_where_to(overrides: tuple[str, ...]) -> None:
    words = [f"telemetry.{word}".replace(".=", ".prometheus=") for word in overrides]
    assert "needs 'telemetry.push_gateway', a URL such as http://127.0.0.1:9091" in _refusal(None, *words)


def test_address_is_asked_for_when_it_is_empty() -> None:
    assert "'telemetry.host' is empty" in _refusal(None, "telemetry.host=")


def test_off_is_a_choice_where_yaml_reads_it_as_false(tmp_path: Path) -> None:
    path = _file(tmp_path, "telemetry:\n  prometheus: off")
    for options in (config.load(path), config.load(None, ["telemetry.prometheus=off"])):
        assert options.telemetry.prometheus is Prometheus.off
        again = _file(tmp_path, config.to_yaml(options), "again.yaml")
        assert config.load(again) == options


@pytest.mark.parametrize("override", ["epochs", "=3", "--epochs", ""])
def test_override_is_refused_when_it_is_no_assignment(override: str) -> None:
    assert "key=value" in _refusal(None, override)


def test_override_is_refused_when_its_value_is_broken_yaml() -> None:
    assert "deepspeed={a: [" in _refusal(None, "deepspeed={a: [")


def test_file_is_suggested_when_the_name_is_mistyped(tmp_path: Path) -> None:
    right = _file(tmp_path, "seed: 1", "voc2007.yaml")
    message = _refusal(tmp_path / "voc207.yaml")
    assert "voc207.yaml does not exist" in message
    assert f"did you mean '{right}'" in message


def test_file_is_refused_when_its_folder_is_missing(tmp_path: Path) -> None:
    assert "does not exist" in _refusal(tmp_path / "none" / "it.yaml")


@pytest.mark.parametrize("text", ["data: [1, 2", "a: b: c", "\tname: x", "name: ${nowhere}", "seed: 1\nseed: 2"])
def test_file_is_refused_in_one_sentence_when_it_is_no_yaml(tmp_path: Path, text: str) -> None:
    path = _file(tmp_path, text)
    assert str(path) in _refusal(path)


def test_file_is_refused_when_it_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert str(path) in _refusal(path)


@pytest.mark.parametrize("text", ["- 1\n- 2", "just words"])
def test_file_is_refused_when_it_holds_no_keys(tmp_path: Path, text: str) -> None:
    assert "it.yaml" in _refusal(_file(tmp_path, text))


def test_file_changes_nothing_when_empty(tmp_path: Path) -> None:
    assert config.load(_file(tmp_path, "# nothing\n")) == Options()


def test_later_source_wins_when_several_set_a_key(tmp_path: Path) -> None:
    _file(tmp_path, "seed: 1\nname: parent\ntrain:\n  epochs: 11\n  max_steps: 5", "parent.yaml")
    child = _file(tmp_path, "extends: parent.yaml\nseed: 2\nname: child\ntrain:\n  epochs: 12", "child.yaml")
    options = config.load(child, ["seed=3", "data.lanes=8", "data.lanes=4"])
    assert (options.seed, options.name) == (3, "child")
    assert (options.train.epochs, options.train.max_steps) == (12, 5)
    assert options.train.global_batch_size == Options().train.global_batch_size
    assert options.data.lanes == 4


def test_grandparent_counts_when_the_parent_extends_it(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    _file(folder, "seed: 7\nname: old", "old.yaml")
    _file(folder, "extends: old.yaml\nname: parent", "parent.yaml")
    options = config.load(_file(tmp_path, "extends: base/parent.yaml"))
    assert (options.seed, options.name) == (7, "parent")


def test_parent_is_named_when_it_is_missing(tmp_path: Path) -> None:
    _file(tmp_path, "seed: 1", "parent.yaml")
    message = _refusal(_file(tmp_path, "extends: parnt.yaml"))
    assert "parnt.yaml does not exist" in message
    assert "parent.yaml'?" in message


def test_parent_is_named_when_the_problem_stands_there(tmp_path: Path) -> None:
    parent = _file(tmp_path, "seeed: 1", "parent.yaml")
    assert f"{parent}: unknown key 'seeed'" in _refusal(_file(tmp_path, "extends: parent.yaml"))


def test_extends_is_refused_when_it_goes_in_a_circle(tmp_path: Path) -> None:
    _file(tmp_path, "extends: b.yaml", "a.yaml")
    path = _file(tmp_path, "extends: a.yaml", "b.yaml")
    assert "extends" in _refusal(path)


def test_all_problems_are_reported_together_when_there_are_several(tmp_path: Path) -> None:
    path = _file(tmp_path, "sed: 1\ntrain:\n  epochs: none\n  max_steps: -1")
    message = _refusal(path, "data.lanes=0", "model.context=[1]")
    for key in ("'sed'", "'train.epochs'", "'train.max_steps'", "'data.lanes'", "'model.context'"):
        assert key in message


def test_all_relations_are_reported_together_when_several_are_broken() -> None:
    message = _refusal(
        None,
        "data.cache_features=true",
        "fusion.memory=none",
        "train.accumulation_steps=3",
        "name=a/b",
        "profile=release",
    )
    for key in ("model.freeze_image", "fusion.memory=dense", "train.accumulation_steps", "'name'", "bi_dominant=none"):
        assert key in message


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        (["data.cache_features=true"], "model.freeze_image=true"),
        (["fusion.memory=none"], "fusion.momentum=0"),
        (["profile=release"], "model.bi_dominant=none"),
        (["train.global_batch_size=10", "train.accumulation_steps=4"], "train.accumulation_steps=5"),
        (["optimizer.learning_rate=0"], "method=zero_shot"),
        (["data.cached_regions=2", "model.freeze_image=true"], "data.cache_features=true"),
        (["method=dualcoop"], "model.head=dualcoop"),
        (["model.head=dualcoop", "model.context=''"], "model.context=a photo of a"),
    ],
)
def test_relation_is_refused_until_the_other_option_fits(broken: list[str], mended: str) -> None:
    assert mended.partition("=")[0] in _refusal(None, *broken)
    config.load(None, [*broken, mended])


@pytest.mark.parametrize("head", ["cam", "ml_decoder", "dualcoop"])
def test_head_of_regions_is_refused_when_none_are_cached(head: str) -> None:
    given = ("data.cache_features=true", "model.freeze_image=true", f"model.head={head}")
    message = _refusal(None, *given)
    assert f"'model.head={head}'" in message
    assert "'data.cached_regions'" in message
    config.load(None, [*given, "data.cached_regions=4"])
    config.load(None, [*given[:2], "model.head=linear"])


@pytest.mark.parametrize(
    "given", ["data.class_ratio_spread=0.5", "data.annotated_classes=0.5", "data.flipped_labels=0.1"]
)
def test_change_of_the_drawn_mask_is_refused_when_a_mask_is_read(given: str) -> None:
    config.load(None, [given])
    message = _refusal(None, given, "data.mask_file=mask.jsonl")
    assert f"'{given.partition('=')[0]}'" in message
    assert "'data.mask_file'" in message


@pytest.mark.parametrize("given", ["data.class_ratio_spread=0.5", "data.flipped_labels=0.1"])
def test_change_of_the_known_ratio_is_refused_when_one_positive_is_known(given: str) -> None:
    message = _refusal(None, given, "data.single_positive=true")
    assert f"'{given.partition('=')[0]}'" in message
    assert "'data.single_positive'" in message


def test_one_positive_can_be_known_when_few_classes_are_annotated() -> None:
    config.load(None, ["data.single_positive=true", "data.annotated_classes=0.5"])


@pytest.mark.parametrize(
    ("keys", "instead"),
    [
        (
            ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
            "'train.global_batch_size' and 'train.accumulation_steps'",
        ),
        (("bf16", "fp16", "amp", "torch_autocast", "data_types"), "'train.precision'"),
        (("optimizer", "scheduler", "gradient_clipping"), "the 'optimizer' section"),
    ],
)
def test_deepspeed_key_is_refused_when_it_is_derived(keys: tuple[str, ...], instead: str) -> None:
    for key in keys:
        assert _refusal(None, f"deepspeed.{key}=8") == f"'deepspeed.{key}' is derived: set {instead}"


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("baseline=", ""),
        ("model.context=", ""),
        ("name=7", "7"),
        ("data.prepare=a=b", "a=b"),
        ("data.path='a: b'", "a: b"),
    ],
)
def test_text_is_taken_as_it_is_typed(override: str, shown: str) -> None:
    value: object = config.load(None, ["model.bi_dominant=none", override])
    for part in override.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == shown


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.mask_file=m.jsonl", "data.single_positive=true"], "'data.single_positive' makes a mask"),
        (["method=zero_shot", "train.test_at_end=false"], "leaves 'method=zero_shot' nothing to do"),
        (["name="], "'name' is ''"),
        (["name=../x"], "'name' is '../x'"),
    ],
)
def test_relation_is_said_when_it_is_broken(overrides: list[str], said: str) -> None:
    assert said in _refusal(None, *overrides)
    for override in overrides if len(overrides) > 1 else ():
        config.load(None, [override])


@pytest.mark.parametrize(
    ("word", "known", "said"),
    [
        ("kye", ["zebra", "keys.other", "key"], "; did you mean 'key'?"),
        ("KEY", ["keys", "key"], "; did you mean 'key'?"),
        ("key", ["key", "keys"], "; did you mean 'keys'?"),  # what was typed is no help
        ("entirely", ["other", "words"], ""),
    ],
)
def test_nearest_spelling_is_the_one_with_the_fewest_changes(word: str, known: list[str], said: str) -> None:
    assert nearest(word, known) == said


def test_deepspeed_section_passes_through_when_given(tmp_path: Path) -> None:
    options = config.load(None, ["deepspeed.zero_optimization.stage=3"])
    assert options.deepspeed == {"zero_optimization": {"stage": 3}}
    path = _file(tmp_path, "deepspeed:\n  zero_optimization:\n    stage: 2\n    offload_optimizer: {device: cpu}")
    assert config.load(path).deepspeed == {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


def test_deepspeed_keys_are_merged_when_they_come_from_several_sources(tmp_path: Path) -> None:
    _file(tmp_path, "deepspeed:\n  zero_optimization: {stage: 1, overlap_comm: true}", "parent.yaml")
    child = _file(tmp_path, "extends: parent.yaml\ndeepspeed:\n  wall_clock_breakdown: true")
    options = config.load(child, ["deepspeed.zero_optimization.stage=3", "deepspeed.steps_per_print=5"])
    assert options.deepspeed == {
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "wall_clock_breakdown": True,
        "steps_per_print": 5,
    }


def test_options_cannot_be_changed_when_loaded() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load().seed = 3  # type: ignore[misc]


def test_yaml_reads_back_to_the_same_options_when_written(tmp_path: Path) -> None:
    overrides = [
        "name=2024",
        "profile=release",
        "model.bi_dominant=none",
        "optimizer.learning_rate=3e-5",
        "resume=true",
    ]
    overrides += ["data.prepare='say: x # y'", "deepspeed.a={b: 1, c: [1, 2]}", "deepspeed.d=x"]
    options = config.load(None, overrides)
    assert config.load(_file(tmp_path, config.to_yaml(options))) == options


@QUICK
@given(
    name=st.from_regex(r"[A-Za-z0-9 _.:#'\"-]{1,12}", fullmatch=True).filter(
        lambda text: text.strip(". ") == text != ""
    ),
    context=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=100),
    ratio=st.floats(0, 1),
    rate=st.floats(1e-12, 1e12),
    seed=st.integers(0, 2**40),
)
def test_options_survive_writing_and_reading_when_they_hold_anything(
    tmp_path_factory: pytest.TempPathFactory, name: str, context: str, ratio: float, rate: float, seed: int
) -> None:
    changed = config.replace(
        Options(),
        name=name,
        model__context=context,
        data__known_ratio=ratio,
        optimizer__learning_rate=rate,
        seed=seed,
    )
    assert (changed.name, changed.model.context, changed.seed) == (name, context, seed)
    assert (changed.data.known_ratio, changed.optimizer.learning_rate) == (ratio, rate)
    path = _file(tmp_path_factory.getbasetemp(), config.to_yaml(changed))
    assert config.load(path) == changed


def test_replace_changes_only_what_it_is_told() -> None:
    options = config.load(None, ["seed=4", "deepspeed.a=1", "deepspeed.zero_optimization.stage=3", "data.path=a b"])
    changed = config.replace(options, name="other", fusion__weights="fixed", fusion__combine=Combine.linear)
    assert changed.fusion.combine is Combine.linear
    back = config.replace(changed, name="run", fusion__weights="fitted", fusion__combine=options.fusion.combine.value)
    assert back == options
    assert options.name == "run"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__knwon_ratio": 0.1}, "did you mean 'data.known_ratio'"),
        ({"data__known_ratio": 2}, "from 0 to 1"),
        ({"train__epochs": "x"}, "a whole number"),
        ({"fusion__memory": "none"}, "fusion.memory=dense"),
        ({"fusion__instance_weight": 0.5}, "'fusion.instance_weight' acts with 'fusion.weights=fixed' alone"),
        ({"fusion__weights": "fixed", "fusion__label_evidence": False}, "acts with 'fusion.weights=fitted' alone"),
        ({"profile": Profile.release}, "bi_dominant=none"),
    ],
)
def test_replace_refuses_like_a_file_when_a_change_is_wrong(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.replace(Options(), **changes)


def test_enum_is_taken_by_its_value_when_written_in_a_file(tmp_path: Path) -> None:
    options = config.load(
        _file(
            tmp_path,
            "fusion:\n  memory: none\n  momentum: 0\n  weights: fixed\n  combine: linear\nmodel:\n  bi_dominant: none",
        )
    )
    assert options.fusion.memory is Memory.none
    assert options.fusion.combine is Combine.linear


def test_every_option_is_described_and_in_range_when_left_alone() -> None:
    for key, item, _ in config.fields():
        assert item.metadata["description"], key


def test_defaults_and_bounds_are_those_written_down() -> None:
    # results, published configurations and comparisons rest on each of them: a change is to be seen in a diff
    assert in_words(Options) == (Path(__file__).parent / "options.txt").read_text().splitlines()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_file_loads_when_nothing_is_changed(path: Path) -> None:
    assert config.load(path).name == path.stem
