"""A comparison is the grid that its file says; what the file has wrong is told in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from scinet.errors import ConfigError
from scinet.evaluation.comparison import plan
from tests.scinet.evaluation.comparison.fakes import PLAN, make_plan

SETTINGS = """settings:
  single positive: [data.single_positive=true, data.known_ratio=0.7]
  flipped: ["data.mask_file=flips-{seed}.jsonl"]
seeds: [3, 4]
"""
COMMAS = PLAN.replace("  bce:", "  'scinet, fusion off': [fusion.enabled=false]\n  bce:")


def test_grid_is_every_method_ratio_and_seed_under_one_base(tmp_path: Path) -> None:
    cells = plan.expand(make_plan(tmp_path))
    assert len({(cell.method, cell.column.name, cell.seed) for cell in cells}) == len(cells) == 8
    for cell in cells:
        assert cell.options.method.value == cell.method
        assert cell.options.data.known_ratio == cell.column.known_ratio
        assert cell.options.seed == cell.options.data.mask_seed == cell.seed
        assert cell.options.train.epochs == 3


def test_settings_stand_beside_ratios_with_their_own_overrides_and_seed(tmp_path: Path) -> None:
    text = PLAN.replace("seeds: [0, 1]\n", SETTINGS).replace("[method=bce]", "[method=bce, data.shuffle_window=7]")
    cells = [cell for cell in plan.expand(make_plan(tmp_path, text)) if cell.method == "bce"]
    assert [cell.column.name for cell in cells][::2] == ["10% known", "50% known", "single positive", "flipped"]
    single, flipped = cells[4].options.data, [cell.options.data.mask_file for cell in cells[6:]]
    assert (single.single_positive, single.known_ratio, single.shuffle_window) == (True, 0.7, 7)
    assert flipped == ["flips-3.jsonl", "flips-4.jsonl"]


def test_a_setting_overrides_its_method(tmp_path: Path) -> None:
    text = PLAN.replace("seeds", "settings: {short: [train.epochs=1]}\nseeds").replace("=bce", "=bce, train.epochs=9")
    epochs = {cell.column.name: cell.options.train.epochs for cell in plan.expand(make_plan(tmp_path, text))[-6:]}
    assert epochs == {"10% known": 9, "50% known": 9, "short": 1}


def test_ratios_may_be_left_out_when_there_are_settings(tmp_path: Path) -> None:
    text = PLAN.replace("known_ratios: [0.1, 0.5]", "settings: {single: [data.single_positive=true]}")
    assert [column.name for column in make_plan(tmp_path, text).columns] == ["single"]


def test_columns_stand_on_their_axes(tmp_path: Path) -> None:
    text = (
        PLAN
        + "settings: {7: []}\naxes: {noise: {0: [], 0.5: [data.shuffle_window=1]}, epochs: {2: [train.epochs=2]}}\n"
    )
    columns = make_plan(tmp_path, text).columns[2:]
    assert [(column.name, column.axis, column.place) for column in columns] == [
        ("7", "", None),
        ("noise 0", "noise", 0),
        ("noise 0.5", "noise", 0.5),
        ("epochs 2", "epochs", 2),
    ]


def test_value_of_an_axis_that_the_first_method_has_itself_is_known(tmp_path: Path) -> None:
    axes = "axes: {mu: {0.5: [fusion.momentum=0.5], 0.8: [fusion.momentum=0.8]}, epochs: {3: [train.epochs=3]}}\n"
    assert plan.unchanged(make_plan(tmp_path, PLAN + axes)) == {"mu 0.8", "epochs 3"}
    other = (PLAN + axes).replace("scinet: []", "scinet: [fusion.momentum=0.5]")
    assert plan.unchanged(make_plan(tmp_path, other)) == {"mu 0.5", "epochs 3"}
    assert plan.unchanged(make_plan(tmp_path)) == set()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds", "seed", "unknown key 'seed'; did you mean 'seeds'"),
        ("output: out", "", "has no 'output'"),
        ("known_ratios: [0.1, 0.5]", "", "none of 'known_ratios', 'settings' and 'axes'"),
        ("[0.1, 0.5]", "[0.1, 1.5]", "'known_ratios' has 1.5, expected a number from 0 to 1"),
        ("[0.1, 0.5]", "0.1", "'known_ratios' is 0.1, expected a list"),
        ("[0.1, 0.5]", "[0.1, 0.10]", "name '10% known' twice"),
        ("[0, 1]", "[0, 0]", "'seeds' name '0' twice"),
        ("[0, 1]", "[0, x]", "'seeds' has 'x', expected a whole number"),
        ("[0, 1]", "[0, -1]", "'seeds' has -1, expected a whole number"),
        ("bce: [method=bce]", "scinet: [method=bce]", "duplicate key"),
        ("bce: [method=bce]", "0.1: []\n  '0.1': []", "'methods' name '0.1' twice"),
        ("[method=bce]", "[bce]", "expected a list such as"),
        ("[method=bce]", "method=bce", "expected a list such as"),
        ("[method=bce]", "[method=bce, seed=3]", "method 'bce' sets 'seed', which the comparison decides"),
        ("[method=bce]", "[data.known_ratio=1]", "method 'bce' sets 'data.known_ratio'"),
        ("seeds", "settings: {x: [data.mask_seed=1]}\nseeds", "setting 'x' sets 'data.mask_seed'"),
        ("seeds", "settings: {10% known: []}\nseeds", "name '10% known' twice"),
        ("seeds", "test_peak: often\nseeds", "'test_peak' is 'often', expected true or false"),
        ("seeds", "axes: 3\nseeds", "'axes' is 3, expected `name: {number: "),
        ("seeds", "axes: {mu: [0.5]}\nseeds", "'axes' has [0.5] for 'mu', expected `number: [key=value, ...]` lines"),
        ("seeds", "axes: {mu: {}}\nseeds", "'axes' has {} for 'mu', expected `number: "),
        ("seeds", "axes: {mu: {0.5: [], '0.50': []}}\nseeds", "'axes' has 0.5 twice on 'mu'"),
        ("seeds", "axes: {mu: {half: []}}\nseeds", "'axes' has 'half' on 'mu', expected a number"),
        ("seeds", "axes: {mu: {0.5: fusion.momentum=0.5}}\nseeds", "'axes.mu' has 'fusion.momentum=0.5' for '0.5'"),
    ],
)
def test_plan_is_refused_when_something_is_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"plan\.yaml") as caught:
        make_plan(tmp_path, PLAN.replace(old, new))
    assert said in str(caught.value)


def test_grid_is_refused_when_an_override_is_wrong(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path, PLAN.replace("method=bce", "metthod=bce"))
    with pytest.raises(ConfigError, match=r"method 'bce', 10% known: unknown key 'metthod'; did you mean 'method'"):
        plan.expand(wanted)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("bce", ["bce"]),
        ("bce,scinet", ["scinet", "bce"]),  # the plan's order, whose first the others are held to
        ("scinet, fusion off", ["scinet, fusion off"]),
        ("bce,scinet,fusion off", ["scinet, fusion off", "bce"]),
    ],
)
def test_methods_are_chosen_by_name_when_names_hold_commas(tmp_path: Path, names: str, chosen: list[str]) -> None:
    assert list(plan.with_methods(make_plan(tmp_path, COMMAS), names).methods) == chosen


@pytest.mark.parametrize(("names", "said"), [("bce,scinett", "'scinett' is no method.*'scinet'"), (" ,", "is empty")])
def test_methods_are_refused_when_there_is_no_such_name(tmp_path: Path, names: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan.with_methods(make_plan(tmp_path), names)


def test_other_seeds_are_refused_when_one_is_there_twice(tmp_path: Path) -> None:
    assert plan.with_seeds(make_plan(tmp_path), [7]).seeds == (7,)
    with pytest.raises(ConfigError, match="name '7' twice"):
        plan.with_seeds(make_plan(tmp_path), [7, 7])


def test_plan_says_only_what_differs_when_it_extends_another(tmp_path: Path) -> None:
    make_plan(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text("extends: plan.yaml\noutput: elsewhere\nseeds: [7]\n")
    found, parent = plan.read(child), plan.read(tmp_path / "plan.yaml")
    assert (found.output, found.seeds) == (Path("elsewhere"), (7,))
    assert (found.methods, found.columns, found.base) == (parent.methods, parent.columns, parent.base)
    changed = list(parent.methods)[-1]
    child.write_text(f"extends: plan.yaml\nmethods:\n  {changed}: [method=an]\n  more: [method=role]\n")
    assert plan.read(child).methods == parent.methods | {changed: ("method=an",), "more": ("method=role",)}
    assert list(plan.read(child).methods) == [*parent.methods, "more"]
    child.write_text("extends: plan.yaml\nmethods: [bce]\n")
    with pytest.raises(ConfigError, match="'methods' is"):
        plan.read(child)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "child.yaml").write_text("extends: ../plan.yaml\nseeds: [7]\n")
    assert plan.read(tmp_path / "own" / "child.yaml").base.resolve() == parent.base.resolve()
    child.write_text("extends: plan.yaml\nsedes: [7]\n")
    with pytest.raises(ConfigError, match=r"child\.yaml: unknown key 'sedes'; did you mean 'seeds'"):
        plan.read(child)
    (tmp_path / "grandchild.yaml").write_text("extends: child.yaml\n")
    with pytest.raises(ConfigError, match="one level is allowed"):
        plan.read(tmp_path / "grandchild.yaml")


CONFIGS = Path(__file__).parents[4] / "configs"
SHIPPED = [path for folder in ("compare", "published") for path in sorted((CONFIGS / folder).glob("*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_plan_spans_a_grid_of_data_that_it_tells_how_to_build(path: Path) -> None:
    cells = plan.expand(plan.read(path))
    assert cells
    for data in (cell.options.data for cell in cells):
        assert data.prepare.startswith("scinet data build ")
        assert f"--out {data.path}" in data.prepare
