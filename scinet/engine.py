"""From our configuration to DeepSpeed: parameter groups, schedule, initialise, step."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from scinet import layout
from scinet.distributed import quieten_deepspeed
from scinet.errors import ConfigError, TrainingError
from scinet.model.heads import DualPromptHead
from scinet.model.network import Network, Output
from scinet.options import OptimizerOptions, Options, Precision


def uses_bf16(options: Options, device: torch.device) -> bool:
    """Return whether the towers compute in bf16: as configured, or on a GPU where ``auto``."""
    precision = options.train.precision
    return precision is Precision.bf16 or (precision is Precision.auto and device.type == "cuda")


def deepspeed_config(options: Options, world_size: int, device: torch.device) -> dict[str, Any]:
    """Return DeepSpeed's configuration: our derived defaults, then the ``deepspeed`` section as it is."""
    train = options.train
    derived: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "gradient_accumulation_steps": train.accumulation_steps,
        "train_micro_batch_size_per_gpu": train.global_batch_size // (world_size * train.accumulation_steps),
        "bf16": {"enabled": uses_bf16(options, device)},
        "gradient_clipping": options.optimizer.gradient_clip,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        # torch's fused AdamW steps on the CPU too, and needs no compiler at run time as DeepSpeed's own does
        "zero_force_ds_cpu_optimizer": False,
    }
    return derived | options.deepspeed


def parameter_groups(network: Network, options: OptimizerOptions) -> list[dict[str, Any]]:
    """Return AdamW's groups: three learning rates, weight decay on matrices only (method.md section 6)."""
    rates = {"label_graph": options.graph_learning_rate}
    # a head's contexts are prompts
    own = () if isinstance(network.head, DualPromptHead) else ("head",)
    rates |= dict.fromkeys(("projection", "bias", *own), options.head_learning_rate)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(name.split(".")[0], options.learning_rate)
            decay = options.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def zero_config(options: Options) -> Any:
    """Return DeepSpeed's own reading of ``deepspeed.zero_optimization``, its defaults included.

    Raises:
        ConfigError: if DeepSpeed refuses it.
    """
    quieten_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = options.deepspeed.get("zero_optimization", {})
    try:
        return DeepSpeedZeroConfig(**section)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"DeepSpeed refuses 'deepspeed.zero_optimization' {section}: {' '.join(str(error).split())}"
        ) from error


def partition(network: nn.Module, options: Options, world_size: int) -> None:
    """Partition a network that is only evaluated, such as the teacher, as ZeRO 3 does the student. Collective.

    A forward pass then gathers one layer at a time; no layer stays whole between two.
    """
    import deepspeed

    own = options.deepspeed["zero_optimization"]
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if "offload_param" in own:
        zero["offload_param"] = own["offload_param"]
    config = {"train_batch_size": world_size, "zero_optimization": zero, "steps_per_print": 2**31}
    deepspeed.initialize(model=network, config=config)


class Engine:
    """A DeepSpeed engine around the student."""

    def __init__(
        self, network: Network, options: Options, world_size: int, device: torch.device, total_steps: int
    ) -> None:
        """Build optimiser and schedule and hand them to DeepSpeed. Collective.

        Raises:
            ConfigError: if DeepSpeed refuses its configuration.
        """
        import deepspeed

        groups = parameter_groups(network, options.optimizer)
        offloads = "offload_optimizer" in options.deepspeed.get("zero_optimization", {})
        optimizer = torch.optim.AdamW(groups, fused=offloads or None)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in groups],
            total_steps=total_steps + 1,
            # the peak no earlier than the second step: torch divides by the steps before it
            pct_start=max(options.optimizer.warmup_share, 2 / (total_steps + 1)),
            cycle_momentum=False,
        )
        config = deepspeed_config(options, world_size, device)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=network, optimizer=optimizer, lr_scheduler=cast(Any, schedule), config=config
            )
        except (ValueError, AssertionError, KeyError, TypeError) as error:
            raise ConfigError(f"DeepSpeed refuses the 'deepspeed' section {options.deepspeed}: {error}") from error
        self.network = network
        self._schedule, self._section = schedule, options.deepspeed
        self._world_size = world_size
        self._plain_norm = torch.zeros(())
        self.zero_stage = int(self._engine.zero_optimization_stage())
        self.layout = layout.of_engine(self._engine)

    def forward(self, inputs: Tensor) -> Output:
        """Run the student."""
        return cast(Output, self._engine(inputs))

    def step(self, loss: Tensor) -> bool:
        """Backward, and at an accumulation boundary the optimiser's and the schedule's step. Collective.

        A gradient that is not finite on any rank changes no weight and no moment; the schedule goes on.

        Args:
            loss: this rank's sum over the global batch size; DeepSpeed averages over ranks, hence the factor.

        Returns:
            False at a boundary whose step was left out, on all ranks alike; True otherwise.

        Raises:
            TrainingError: if DeepSpeed took a step that it should have left out.
        """
        # 1, or NaN for a loss that is not finite, whose gradient may look sound
        soundness = 1 + 0 * loss.detach()
        self._engine.backward(loss * self._world_size * soundness)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return True
        if self.zero_stage == 0 and not self._measure_plain():
            # DeepSpeed's own optimisers look at the norm themselves, torch's does not
            self._engine.zero_grad()
            self.pass_over(1)
            return False
        self._engine.step()
        if self._engine.was_step_applied():
            if not math.isfinite(self.gradient_norm()):
                raise TrainingError(
                    f"DeepSpeed took a step with a gradient that is not finite: the 'deepspeed' section "
                    f"{self._section} switches its check off"
                )
            return True
        self._schedule.step()
        return False

    def pass_over(self, num_micro_batches: int) -> None:
        """Count micro-batches that end a step without one, and go on with the schedule."""
        self._engine.micro_steps += num_micro_batches
        self._schedule.step()

    def _measure_plain(self) -> bool:
        """Keep the norm of plain gradients, and return whether it is finite.

        DeepSpeed clips them without keeping it; fp32 sums of squares lose 2e-5 on the CPU.
        """
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        self._plain_norm = torch.linalg.vector_norm(torch.stack(norms))
        return bool(self._plain_norm.isfinite())

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def gradient_norm(self) -> float:
        """Return the norm of the last step's gradient over all ranks, before clipping."""
        return float(self._engine.get_global_grad_norm() or self._plain_norm)

    def learning_rate(self) -> float:
        """Return the largest learning rate of the groups."""
        return float(max(self._engine.get_lr()))

    def whole_state(self, network: nn.Module) -> dict[str, Tensor]:
        """Return weights (fp32) and saved buffers on the CPU, gathered one by one under ZeRO 3. Collective."""
        import deepspeed

        state = {}
        for name, parameter in network.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                state[name] = parameter.data.float().to("cpu", copy=True)
        buffers = set(network.state_dict()) - set(state)
        return state | {name: network.get_buffer(name).to("cpu", copy=True) for name in buffers}

    def go_on(self, step: int, num_updates: int) -> None:
        """Take up training after a step whose weights and moments the layout has just been given. Collective.

        Args:
            step: steps taken, by which the schedule goes.
            num_updates: of AdamW; fewer where steps were left out.
        """
        self.layout.num_updates = num_updates
        self.layout.refresh()
        self._schedule.last_epoch = step - 1
        with (
            warnings.catch_warnings()
        ):  # torch takes it for the first step of a schedule that is ahead of its optimiser
            warnings.simplefilter("ignore", UserWarning)
            self._schedule.step()
