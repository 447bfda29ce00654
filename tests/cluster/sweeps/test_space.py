"""What a sweep searches, and how wrong words are answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from scinet import config
from scinet.errors import ConfigError
from scinet_cluster.sweeps import options, space
from scinet_cluster.sweeps.options import SweepOptions
from tests.scinet.options_in_words import in_words

ROOT = Path(__file__).resolve().parents[3]


def test_ranges_take_the_type_of_their_option() -> None:
    found = space.parse(
        {
            "loss.unlabelled_weight": {"low": 0.1, "high": 2, "log": True},
            "loss": {"hard_k": {"low": 1, "high": 5}},
            "correlation.source": ["shrunk", "text"],
        },
        config.load(),
    )
    assert found["loss.unlabelled_weight"].distribution == FloatDistribution(0.1, 2.0, log=True)
    assert found["loss.hard_k"].distribution == IntDistribution(1, 5)
    assert found["correlation.source"].distribution == CategoricalDistribution(("shrunk", "text"))
    assert found["loss.unlabelled_weight"].default == 0.125
    assert found["correlation.source"].default == "shrunk"


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"loss.unlabeled_weight": {"low": 0, "high": 1}}, "did you mean 'loss.unlabelled_weight'"),
        ({"loss.margin": {"low": -1, "high": 1}}, "'loss.margin' is -1.0, expected a number at least 0"),
        ({"loss.margin": {"low": 2, "high": 1}}, "'low' is 2 and 'high' 1"),
        ({"loss.margin": {"low": 0, "high": 1, "log": True}}, "more than 0 with 'log: true'"),
        ({"loss.margin": {"low": 0, "high": 1, "logs": True}}, "unknown word 'logs'; did you mean 'log'?"),
        ({"loss.margin": {"low": 0, "high": True}}, "'high' is True, expected a number"),
        ({"loss.hard_k": {"low": 1, "high": 2.5}}, "'high' is 2.5, expected a whole number"),
        ({"loss.margin": 3}, "found 3, expected a list of choices or low and high"),
        ({"fusion.combine": {"low": 0, "high": 1}}, "expected a list of choices"),
        ({"fusion.combine": ["pol"]}, "did you mean 'pool'?"),
        ({"fusion.combine": []}, "found []"),
    ],
)
def test_wrong_dimension_is_named(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match="'space\\.") as caught:
        space.parse(tree, config.load())
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trails=3"], "unknown key 'trails'; did you mean 'trials'?"),
        (["trials=0"], "'trials' is 0, expected a number at least 1"),
        (["config="], "'config' is empty"),
        (["config=nowhere.yaml"], "does not exist"),
        (["fixed.train.epohcs=3"], "did you mean 'train.epochs'?"),
        (["fixed.output=x"], "'output' is the sweep's own to set"),
        (["space.name=[a,b]"], "'name' is the sweep's own to set"),
        (["name=a/b"], "expected a plain folder name"),
        (["sampler=grid"], "expected a list of choices for 'sampler=grid'"),
        (["resources.gpus_per_rank=0.5", "resources.ranks_per_node=2"], "a part of a GPU is for trials of one rank"),
    ],
)
def test_wrong_sweep_is_refused_in_a_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.load(ROOT / "configs/sweeps/loss_weights.yaml", overrides)
    assert sentence in str(caught.value)


def test_trials_never_open_the_test_split() -> None:
    sweep = options.load(ROOT / "configs/sweeps/loss_weights.yaml", ["fixed.train.epochs=3"])
    assert not sweep.base.train.test_at_end
    assert sweep.base.train.epochs == 3
    assert not sweep.base.baseline


def test_defaults_and_bounds_of_a_sweep_are_those_written_down() -> None:
    assert in_words(SweepOptions) == (Path(__file__).parent / "options.txt").read_text().splitlines()


@pytest.mark.parametrize("key", ["name", "output", "resume", "baseline", "train.test_at_end", "telemetry.port"])
@pytest.mark.parametrize("section", ["fixed", "space"])
def test_option_that_a_sweep_sets_itself_is_refused(key: str, section: str) -> None:
    words = [f"{section}.{key}=[1]"]
    with pytest.raises(ConfigError, match=f"'{key}' is the sweep's own to set: take it out of '{section}'"):
        options.load(ROOT / "configs/sweeps/loss_weights.yaml", words)
