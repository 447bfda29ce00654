"""One rank of the ZeRO test: trains under each configuration of one launch, and writes how the steps went.

Usage, under torchrun: worker_zero_stages.py OUT key=value ...

`plain` is the same training in one process without DeepSpeed: autograd, torch's AdamW, clipping and schedule. In bf16
one epoch is enough.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from scinet import config, materials, trainer
from scinet.distributed import Ranks, initialise, shut_down
from scinet.engine import parameter_groups
from scinet.materials import Materials
from scinet.model.network import Network, Output
from scinet.options import Options
from scinet.telemetry import MetricsLog, Silence

STAGES = (0, 1, 2, 3)
PLAIN = "plain"


class PlainEngine:
    """What a trainer needs of an engine, in plain PyTorch."""

    zero_stage = 0

    def __init__(self, network: Network, options: Options, world_size: int, _device: Any, total_steps: int) -> None:
        assert world_size == 1
        self.network, self._clip = network, options.optimizer.gradient_clip
        groups = parameter_groups(network, options.optimizer)
        self._optimizer = torch.optim.AdamW(groups)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            max_lr=[group["lr"] for group in groups],
            total_steps=total_steps + 1,
            pct_start=max(options.optimizer.warmup_share, 2 / (total_steps + 1)),
            cycle_momentum=False,
        )
        self._norm = torch.zeros(())

    def forward(self, inputs: Tensor) -> Output:
        output: Output = self.network(inputs)
        return output

    def step(self, loss: Tensor) -> bool:
        self._optimizer.zero_grad()
        loss.backward()
        self._norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._clip)
        self._optimizer.step()
        self._schedule.step()
        return True

    def train(self, mode: bool) -> None:
        self.network.train(mode)

    def gradient_norm(self) -> float:
        return float(self._norm)

    def learning_rate(self) -> float:
        return max(self._schedule.get_last_lr())

    def whole_state(self, network: Network) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in network.state_dict().items()}


def configurations() -> dict[str, list[str]]:
    """Return the overrides of each configuration, by name; stage 3 last, since it changes DeepSpeed's linear layer."""
    found = {PLAIN: ["train.precision=fp32"]}
    for stage in STAGES:
        zero = f"deepspeed.zero_optimization.stage={stage}"
        found[f"fp32-{stage}"] = ["train.precision=fp32", zero]
        found[f"bf16-{stage}"] = ["train.precision=bf16", zero]
        if stage != 1:
            found[f"accumulated-{stage}"] = ["train.precision=fp32", zero, "train.accumulation_steps=2"]
        if stage >= 2:
            offload = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
            found[f"offload-{stage}"] = ["train.precision=fp32", zero, offload]
        if stage in (0, 3):
            found[f"recomputed-{stage}"] = ["train.precision=fp32", zero, "model.activation_checkpointing=true"]
    return found


def _train(name: str, options: Options, made: Materials, ranks: Ranks, out: Path) -> list[dict[str, Any]]:
    log = MetricsLog(None)
    run = trainer.Trainer(options, made, ranks, log, Silence())
    run.train_epoch()
    while not (run.is_finished or name.startswith("bf16")):
        run.train_epoch()
    state = {f"student.{key}": value for key, value in run.student_weights().items()}
    state |= {f"teacher.{key}": value for key, value in run.teacher_weights().items()}
    if ranks.is_first:
        save_file({key: value.contiguous() for key, value in state.items()}, str(out / f"{name}.safetensors"))
    return log.rows


def main(out: Path, overrides: list[str]) -> None:
    ranks = initialise(120)
    made = materials.gather(config.load(None, overrides), ranks, lambda *_: None)
    rows = {}
    for name, own in configurations().items():
        options = config.load(None, [*overrides, *own])
        if name != PLAIN:
            rows[name] = _train(name, options, made, ranks, out)
        elif ranks.is_first:
            with mock.patch.object(trainer, "Engine", PlainEngine):
                rows[name] = _train(name, options, made, Ranks(0, 1, ranks.device), out)
        dist.barrier()
    if ranks.is_first:
        (out / "rows.json").write_text(json.dumps(rows))
    shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
