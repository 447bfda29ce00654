"""The training loop: a readable list of stages, and the state they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.data.stream import check_skipped
from scinet.distributed import Ranks, gather_rows, sum_over_ranks
from scinet.engine import Engine, uses_bf16
from scinet.errors import TrainingError
from scinet.evaluation.evaluator import Scores
from scinet.evaluation.metrics import evaluate
from scinet.fusion.confidence import Fusion
from scinet.fusion.thresholds import DynamicThresholds
from scinet.materials import Materials, share_of
from scinet.model.label_graph import adjacency, text_correlation
from scinet.model.network import Network
from scinet.model.teacher import Teacher
from scinet.objective import Objective, Phase, Step
from scinet.options import CorrelationSource, Method, OnBadSample, Options, Profile
from scinet.telemetry import MetricsLog, Voice

_TEACHER_VIEW = {Profile.paper: 1, Profile.release: 2}


@dataclass
class Progress:
    """Where a run stands, and which epoch did best on the hold-out; samples seen and skipped by all ranks."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_map: float = -1.0
    samples: int = 0
    skipped: int = 0


@dataclass
class _Window:
    """Sums between two logged steps, kept on the device so that only logging waits for it."""

    steps: int = 0
    samples: int = 0
    waited_s: float = 0.0
    started_s: float = field(default_factory=time.monotonic)
    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.parts[name] = self.parts[name] + value if name in self.parts else value.clone()


class Trainer:
    """Student, teacher, fusion and thresholds, and one pass of the loop over them."""

    def __init__(self, options: Options, materials: Materials, ranks: Ranks, log: MetricsLog, voice: Voice) -> None:
        """Build everything that trains. Collective."""
        self._options, self._materials, self._ranks, self._log, self._voice = options, materials, ranks, log, voice
        train = options.train
        self._source = materials.training(options, share_of(options, ranks))
        self._steps_per_epoch = self._source.steps_per_epoch
        self.total_steps = min(train.max_steps or 2**62, train.epochs * self._steps_per_epoch)
        torch.manual_seed(options.seed)
        network = materials.network(options).to(ranks.device)
        self._start_bias(network)
        self.teacher = Teacher(network, decay=train.ema_per_epoch ** (1 / self._steps_per_epoch))
        self.fusion, self.thresholds = self._build_fusion(network), self._build_thresholds()
        self._objective = Objective(options, self.fusion, self.thresholds, ranks)
        if uses_bf16(options, ranks.device):
            network.to(torch.bfloat16)
        self.engine = Engine(network, options, ranks.world_size, ranks.device, self.total_steps)
        self.progress = Progress()
        self._window = _Window()

    def _build_fusion(self, network: Network) -> Fusion | None:
        if self._options.method is not Method.scinet:
            return None
        train = self._materials.card.split("train")
        holds = max(split.num_samples for split in self._materials.card.splits.values())
        total = sum(split.num_samples for split in self._materials.card.splits.values())
        options = self._options.fusion
        if self._options.profile is Profile.release:
            # its targets come from the label correlation alone: no bank, no memory (method.md section 5)
            options = replace(options, enabled=False)
        return Fusion(
            options,
            self._options.correlation,
            text_correlation(network.prompter.get_buffer("fixed")),
            width=self._materials.backbone.width,
            num_samples=max(holds, total),
            samples_per_epoch=train.num_samples,
        )

    def _build_thresholds(self) -> DynamicThresholds:
        loss = self._options.loss
        num_classes = self._materials.card.num_classes
        return DynamicThresholds(
            num_classes, hard_k=loss.hard_k, window=loss.threshold_window, device=self._ranks.device
        )

    def _start_bias(self, network: Network) -> None:
        """Start b so that the mean probability on the first batch is the label density (method.md section 2)."""
        if network.bias is None:
            return
        batch = next(self._source.epoch(0)).to(self._ranks.device)
        with torch.no_grad():
            logits = gather_rows(network(batch.inputs[: len(batch.observed)]).logits, self._ranks).double()
        valid = gather_rows(batch.valid, self._ranks)
        if not valid.any():
            return
        logits, observed = logits[valid], gather_rows(batch.observed, self._ranks)[valid]
        positives, negatives = (observed > 0).sum(), (observed < 0).sum()
        # without a known negative the density among known cells would be 1
        cells = positives + negatives if negatives else torch.tensor(observed.numel())
        density = (positives + 0.5) / (cells + 1.0)
        low, high = -50.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if torch.sigmoid(logits + middle).mean() > density else (middle, high)
        with torch.no_grad():
            network.bias.fill_(middle)

    def epochs(self, save: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Train, and yield the number of each epoch that has just ended. Collective.

        Args:
            save: called after every ``train.save_every_steps`` within an epoch.
        """
        while self.progress.step < self.total_steps:
            self._train_epoch(self.progress.epoch, save)
            self.progress.epoch += 1
            self._window = _Window()
            yield self.progress.epoch - 1

    def _train_epoch(self, epoch: int, save: Callable[[], None]) -> None:
        self.engine.train(True)
        train, end = self._options.train, min(self.total_steps, (epoch + 1) * self._steps_per_epoch)
        batches = iter(self._source.epoch(epoch, self.progress.step - epoch * self._steps_per_epoch))
        while self.progress.step < end:
            started = time.monotonic()
            micro = [batch.to(self._ranks.device) for batch in islice(batches, train.accumulation_steps)]
            self._window.waited_s += time.monotonic() - started
            num_valid = self._count(micro)
            for batch in micro:
                step = self.micro_step(batch, epoch, num_valid / train.accumulation_steps)
                self._window.add(self._measure(step, batch))
            self._after_step()
            self._window.steps += 1
            self._window.samples += num_valid
            if self.progress.step % train.log_every_steps == 0 or self.progress.step == self.total_steps:
                self._write(self._window, step, batch)
                self._window = _Window()
            if train.save_every_steps and self.progress.step % train.save_every_steps == 0 and self.progress.step < end:
                save()

    def _count(self, micro: list[Batch]) -> int:
        """Return the samples of a global batch, and keep count of those that were skipped. Collective.

        Raises:
            DataError: on all ranks alike, if too many were.
        """
        size = self._options.train.global_batch_size
        if not self._source.has_gaps:
            self.progress.samples += size
            return size
        num_valid = int(sum_over_ranks(torch.stack([batch.valid.sum() for batch in micro]).sum(), self._ranks))
        progress = self.progress
        position = progress.step % self._steps_per_epoch * size
        progress.samples += num_valid
        progress.skipped += min(size, self._source.num_samples - position) - num_valid
        check_skipped(progress.skipped, progress.samples + progress.skipped, self._options.data.max_bad_fraction)
        return num_valid

    def micro_step(self, batch: Batch, epoch: int, size: float) -> Step:
        """Forward, loss, backward and the fusion's state for one micro-batch. Collective.

        Args:
            batch: this rank's.
            epoch: it belongs to.
            size: samples of the global batch over the accumulation steps.
        """
        warmup_steps = self._options.loss.warmup_fraction * self.total_steps
        phase = Phase(is_warm=self.progress.step >= warmup_steps, epoch=epoch)
        student = self.engine.forward(batch.inputs)
        teacher = None
        if self._options.method is Method.scinet:
            view = _TEACHER_VIEW[self._options.profile]
            teacher = self.teacher.forward(batch.inputs.chunk(3)[view])
        step = self._objective(student, teacher, batch, phase, size)
        self.engine.step(step.loss)
        if self.fusion is not None and step.everyone is not None and step.passed is not None:
            self.fusion.update(step.everyone)
            self.thresholds.update(step.passed)
        return step

    def _after_step(self) -> None:
        self.progress.step += 1
        self._refresh_graph()
        self.teacher.update(self.engine.network, self.engine.whole)

    def _refresh_graph(self) -> None:
        """Let the label graph follow the observed correlation, once an epoch: it moves slowly and costs C^2 log C."""
        follows = self._options.correlation.source is not CorrelationSource.text
        if self.fusion is None or self._options.profile is Profile.release or not follows:
            return
        if self.progress.step % self._steps_per_epoch == 0:
            graph = adjacency(self.fusion.correlation.shrunk(), self._options.correlation.graph_top_k)
            self.engine.network.get_buffer("graph").copy_(graph)

    def _measure(self, step: Step, batch: Batch) -> dict[str, Tensor]:
        """Return device sums of one micro-batch: loss parts, and pseudo-labels against the truth where it is known."""
        values = {f"loss/{name}": part for name, part in step.parts.items()} | {"loss/total": step.loss.detach()}
        values["known_cells"] = (batch.observed != 0).sum()
        if step.pseudo is not None:
            hidden = (batch.observed == 0) & (batch.truth != 0)
            positive = step.pseudo.positive & hidden
            values["pseudo/positives"] = step.pseudo.positive.sum()
            values["pseudo/checked"] = positive.sum()
            values["pseudo/right"] = (positive & (batch.truth > 0)).sum()
            values["pseudo/wanted"] = (hidden & (batch.truth > 0)).sum()
        return values

    def _write(self, window: _Window, step: Step, batch: Batch) -> None:
        """Sum over ranks, check, and write a line of metrics.jsonl. Collective."""
        names = sorted(window.parts)
        stacked = torch.stack([window.parts[name].double().reshape(()) for name in names])
        sums = dict(zip(names, sum_over_ranks(stacked, self._ranks).tolist(), strict=True))
        micro_steps = window.steps * self._options.train.accumulation_steps
        loss = sums["loss/total"] / micro_steps
        if loss != loss or abs(loss) == float("inf"):
            raise TrainingError(
                f"the loss is {loss} at step {self.progress.step}: lower optimizer.learning_rate or look at the batch"
            )
        seconds = time.monotonic() - window.started_s
        samples = max(1, window.samples)
        row: dict[str, Any] = {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "samples_seen": self.progress.samples,
            **{name: value / micro_steps for name, value in sums.items() if name.startswith("loss/")},
            "learning_rate": self.engine.learning_rate(),
            "gradient_norm": self.engine.gradient_norm(),
            "samples_per_second": samples / seconds,
            "data_wait_share": window.waited_s / seconds,
            "known_ratio": sums["known_cells"] / (samples * self._materials.card.num_classes),
        }
        if "pseudo/positives" in sums:
            row["pseudo_positives"] = sums["pseudo/positives"]
            row["pseudo_precision"] = _ratio(sums["pseudo/right"], sums["pseudo/checked"])
            row["pseudo_recall"] = _ratio(sums["pseudo/right"], sums["pseudo/wanted"])
        if self._options.data.on_bad_sample is OnBadSample.skip:
            row["skipped_samples"] = self.progress.skipped
        row |= self._judge_confidence(step, batch)
        self._log.write(row)
        detail = f"loss {loss:.3f}  {row['samples_per_second']:.0f} samples/s"
        if self.progress.best_map >= 0:
            detail += f"  hold-out mAP {self.progress.best_map:.1f}"
        self._voice.progress("training step", self.progress.step, self.total_steps, detail)

    def _judge_confidence(self, step: Step, batch: Batch) -> dict[str, float | None]:
        """Log-loss of P, N, L and Q on this batch's unknown cells, where the truth is known (method.md section 3.1)."""
        if step.confidence is None or step.everyone is None:
            return {}
        cells = (batch.observed == 0) & (batch.truth != 0)
        target = (batch.truth > 0).double()
        result = {}
        for name, part in step.confidence._asdict().items():
            if part is not None:
                clamped = part.detach().double().clamp(1e-4, 1 - 1e-4)
                loss = torch.nn.functional.binary_cross_entropy(clamped, target, reduction="none")
                sums = sum_over_ranks(torch.stack([loss[cells].sum(), cells.sum().double()]), self._ranks)
                result[f"log_loss/{name}"] = _ratio(float(sums[0]), float(sums[1]))
        return result

    def score(self, split: str, *, use_teacher: bool) -> Scores:
        """Return the scores of a split by teacher or student. Collective."""
        forward = self.teacher.forward
        if not use_teacher:
            self.engine.train(False)
            forward = self.engine.forward
        return self._materials.plain(split).score(forward, self._ranks)

    def evaluate_holdout(self, epoch: int) -> bool:
        """Evaluate the teacher on the hold-out, and return whether it is the best so far. Collective."""
        scores = self.score("holdout", use_teacher=True)
        holdout_map = evaluate(scores.probabilities, scores.truth).mean_average_precision
        self._log.write(
            {
                "step": self.progress.step,
                "epoch": epoch,
                "samples_seen": self.progress.samples,
                "holdout_map": holdout_map,
            }
        )
        is_best = holdout_map > self.progress.best_map
        if is_best:
            self.progress.best_map, self.progress.best_epoch = holdout_map, epoch
        return is_best

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the engine does not know: teacher, fusion, thresholds, sums since the last log. Collective.

        Random numbers need none: masks, order, views and variants are functions of the seed, epoch and sample.
        """
        window = self._window
        sums = {name: gather_rows(value.reshape(1), self._ranks) for name, value in sorted(window.parts.items())}
        parts: dict[str, dict[str, Tensor]] = {
            "window": sums | {"counts": torch.tensor([window.steps, window.samples])},
            "teacher": self.teacher.state_dict(),
            "thresholds": self.thresholds.state_dict(),
            "fusion": self.fusion.state_dict() if self.fusion is not None else {},
        }
        return {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the state of another trainer of the same configuration."""
        parts: dict[str, dict[str, Tensor]] = {"teacher": {}, "thresholds": {}, "fusion": {}, "window": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value.to(self._ranks.device)
        self.teacher.load_state_dict(parts["teacher"])
        self.thresholds.load_state_dict(parts["thresholds"])
        if self.fusion is not None:
            self.fusion.load_state_dict(parts["fusion"])
        steps, samples = parts["window"].pop("counts", torch.zeros(2, dtype=torch.int64)).tolist()
        mine = {name: values[self._ranks.rank].clone() for name, values in parts["window"].items()}
        self._window = _Window(steps, samples, parts=mine)

    def student_state(self) -> dict[str, Tensor]:
        """Return the student's whole weights, whatever the ZeRO stage. Collective."""
        state = {}
        for name, parameter in self.engine.network.named_parameters():
            with self.engine.whole(parameter) as value:
                state[name] = value.float().cpu().clone()
        buffers = set(self.engine.network.state_dict()) - set(state)
        return state | {name: self.engine.network.get_buffer(name).cpu().clone() for name in buffers}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
