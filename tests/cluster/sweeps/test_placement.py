"""How many trials fit on the nodes that Ray has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scinet.errors import ConfigError
from scinet_cluster.sweeps import placement
from scinet_cluster.sweeps.options import ResourceOptions

TWO_NODES = ResourceOptions(nodes=2, ranks_per_node=2, cpus_per_rank=2)


def _on(monkeypatch: pytest.MonkeyPatch, *cores: float, dead: float = 0) -> None:
    nodes = [{"Resources": {"CPU": count, "memory": 8.0 * 2**30}, "Alive": True} for count in cores]
    if dead:
        nodes.append({"Resources": {"CPU": dead}, "Alive": False})
    monkeypatch.setattr(placement.ray, "nodes", lambda: nodes)


def test_trial_takes_what_its_ranks_take_together() -> None:
    options = ResourceOptions(ranks_per_node=3, cpus_per_rank=2, gpus_per_rank=1, memory_gb_per_rank=0.5)
    assert placement.demanded(options) == {"CPU": 6.0, "GPU": 3, "memory": 1.5 * 2**30}
    assert placement.demanded(ResourceOptions()) == {"CPU": 1.0}


@pytest.mark.parametrize(
    ("cores", "trials"),
    [
        ((4, 4), 1),
        ((8, 8), 2),
        ((8, 4), 1),
        ((16, 4), 1),
        ((8, 4, 4), 2),
        ((7, 7), 1),
        ((4, 4, 4), 1),
        ((4, 4, 4, 4), 2),
    ],
)
def test_each_trial_has_nodes_of_its_own(
    monkeypatch: pytest.MonkeyPatch, cores: tuple[float, ...], trials: int
) -> None:
    _on(monkeypatch, *cores, dead=64)
    assert placement.capacity(TWO_NODES) == trials


def test_what_is_lacking_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _on(monkeypatch, 8, 2)
    with pytest.raises(
        ConfigError, match=r"lower resources\.nodes, resources\.ranks_per_node or resources\.cpus_per_rank"
    ):
        placement.capacity(TWO_NODES)
    _on(monkeypatch, 8, 8)
    with pytest.raises(ConfigError, match=r"or resources\.memory_gb_per_rank"):
        placement.capacity(replace(TWO_NODES, memory_gb_per_rank=5.0))
    with pytest.raises(ConfigError, match=r"or resources\.gpus_per_rank"):
        placement.capacity(replace(TWO_NODES, gpus_per_rank=1.0))
