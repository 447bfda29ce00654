"""The training loop: a readable list of stages, and the state they share."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scinet import badnumbers
from scinet.assembling import build_aim, start_bias
from scinet.data.batch import Batch
from scinet.data.share import share_of
from scinet.data.stream import check_skipped
from scinet.distributed import Ranks, gather_objects, share_first, sum_over_ranks
from scinet.engine import Engine, partition, uses_bf16
from scinet.errors import TrainingError
from scinet.evaluation import fused
from scinet.evaluation.evaluator import Scores
from scinet.evaluation.metrics import evaluate
from scinet.fusion.confidence import Fusion
from scinet.guard import Guard
from scinet.layout import Part, held_parts, whole
from scinet.materials import Materials
from scinet.metering import Meter, Progress
from scinet.model.label_graph import adjacency
from scinet.model.network import Network, Output
from scinet.model.teacher import Teacher
from scinet.objective import Aim, Look, Objective, Phase, Step
from scinet.options import CorrelationSource, OnBadNumbers, OnBadSample, Options, Profile
from scinet.rundir import RunDirectory
from scinet.telemetry import Rows, Voice
from scinet.telemetry.observer import Observer, Standing

_log = logging.getLogger(__name__)
_MOST_FINDINGS = 3


@dataclass(frozen=True)
class State:
    """A run at one step: its tensors as this rank holds them, and the rest as a JSON tree.

    To go back to a saved one, its parts are written first; ``settle`` then takes the saved tree.
    """

    parts: list[Part]
    scalars: dict[str, Any]
    settle: Callable[[dict[str, Any]], None]


class Trainer:
    """Student, teacher, fusion and thresholds, and one pass of the loop over them."""

    def __init__(
        self,
        options: Options,
        materials: Materials,
        ranks: Ranks,
        log: Rows,
        voice: Voice,
        guard: Guard | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Build everything that trains. Collective."""
        self._options, self._materials, self._ranks, self._log, self._voice = options, materials, ranks, log, voice
        self._guard, self._observer = guard or Guard(), observer or Observer()
        train = options.train
        self._source = materials.training(options, share_of(options, ranks.rank, ranks.world_size))
        self.steps_per_epoch = self._source.steps_per_epoch
        self.total_steps = min(train.max_steps or 2**62, train.epochs * self.steps_per_epoch)
        torch.manual_seed(options.seed)
        network = materials.network(options).to(ranks.device)
        share_first(network.buffers(), ranks)
        start_bias(network, self._source, options, ranks)
        self.teacher = Teacher(network, decay=train.ema_per_epoch ** (1 / self.steps_per_epoch))
        self._aim: Aim = build_aim(options, materials, network, ranks)
        self.fusion = self._aim.fusion if isinstance(self._aim, Objective) else None
        if uses_bf16(options, ranks.device):
            network.to(torch.bfloat16)
        self.engine = Engine(network, options, ranks.world_size, ranks.device, self.total_steps)
        if self.engine.zero_stage == 3:
            partition(self.teacher.network, options, ranks.world_size)
        self.progress = Progress()
        self._bad_folder = RunDirectory(Path(options.output) / options.name).bad_numbers
        self._meter = Meter(
            log, ranks, num_classes=materials.card.num_classes, accumulation_steps=train.accumulation_steps
        )

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done; an evaluation may still be due."""
        return self.progress.step >= self.total_steps

    @property
    def evaluation_is_due(self) -> bool:
        """Whether an epoch has ended whose weights the hold-out has yet to judge."""
        progress = self.progress
        has_turn = progress.epoch % self._options.train.evaluate_every_epochs == 0 or self.is_finished
        return progress.epoch > progress.judged and has_turn

    @property
    def standing(self) -> Standing:
        """How far the run has come, for those who look at it."""
        progress = self.progress
        return Standing(
            progress.step, self.total_steps, progress.epoch, progress.samples, progress.skipped, progress.bad_steps
        )

    def train_epoch(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Train to the end of an epoch, from wherever the run stands. Collective.

        Args:
            after_step: called after each step, with all state that belongs to it.
        """
        self.engine.train(True)
        progress, train = self.progress, self._options.train
        epoch, first = progress.epoch, progress.step
        end = min(self.total_steps, (epoch + 1) * self.steps_per_epoch)
        batches = iter(self._source.epoch(epoch, first - epoch * self.steps_per_epoch))
        for _ in range(first, end):
            self._guard.mark(f"reading data for step {progress.step + 1}")
            started = time.monotonic()
            micro = [batch.to(self._ranks.device) for batch in islice(batches, train.accumulation_steps)]
            waited_s = time.monotonic() - started
            self._meter.wait(waited_s)
            self._guard.mark(f"step {progress.step + 1}")
            num_valid = self._count(micro)
            steps = self.train_step(micro, num_valid)
            if steps:
                self._meter.add(steps, micro, num_valid)
            if progress.step % train.log_every_steps == 0 or self.is_finished:
                self._write(steps[-1] if steps else None, micro[-1])
            if progress.step == end:
                progress.epoch += 1
                self._meter.begin()
            self._observer.stand(self.standing)
            done = time.monotonic()
            after_step()
            saved_s = time.monotonic() - done
            self._guard.boundary("going on")  # a GPU has done the step only there
            seconds = time.monotonic() - started - saved_s
            self._observer.step(seconds=seconds, waited_s=waited_s, fusion_s=self._aim.fusion_seconds())

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
        position = progress.step % self.steps_per_epoch * size
        progress.samples += num_valid
        progress.skipped += min(size, self._source.num_samples - position) - num_valid
        check_skipped(progress.skipped, progress.samples + progress.skipped, self._options.data.max_bad_fraction)
        return num_valid

    def train_step(self, micro: list[Batch], num_valid: int) -> list[Step]:
        """Take one optimiser step on a global batch, and the state that follows from it. Collective.

        Args:
            micro: this rank's micro-batches of it.
            num_valid: samples of the global batch.

        Returns:
            what each micro-batch gave; nothing if the step was left out, because of bad numbers or without a sample.

        Raises:
            TrainingError: at bad numbers, as ``train.on_bad_numbers`` says.
        """
        steps = self._learn(micro, num_valid) if num_valid else self._pass_over(micro)
        if self.progress.step % self.steps_per_epoch == 0:
            self._aim.end_epoch(self.progress.epoch)
            if self.fusion is not None:
                self._refresh_graph(self.fusion)
        if steps:
            self.teacher.update(self.engine.network)
        return steps

    def _pass_over(self, micro: list[Batch]) -> list[Step]:
        """Take no step on a global batch none of whose samples can be read, but its place in the schedule."""
        self.progress.step += 1
        self.engine.pass_over(len(micro))
        _log.warning("step %d is left out: none of its samples can be read", self.progress.step)
        return []

    def _learn(self, micro: list[Batch], num_valid: int) -> list[Step]:
        train = self._options.train
        warmup_steps = self._options.loss.warmup_fraction * self.total_steps
        phase = Phase(is_warm=self.progress.step >= warmup_steps, epoch=self.progress.epoch)
        size = num_valid / train.accumulation_steps
        has_gaps = num_valid < train.global_batch_size
        look = self._aim.look(micro, self.teacher.forward, self.engine.forward, has_gaps=has_gaps)
        steps = []
        for place, batch in enumerate(micro):
            student = self.engine.forward(batch.inputs)
            steps.append(self._aim(student, batch, phase, size, look, place))
            is_sound = self.engine.step(steps[-1].loss)
        self.progress.step += 1
        if not is_sound:

            def lose(output: Output, place: int) -> Step:
                return self._aim(output, micro[place], phase, size, look, place)

            self._leave_out(micro, look, lose)
            return []
        self.progress.bad_in_a_row = 0
        self._aim.update(look, phase)
        return steps

    def _refresh_graph(self, fusion: Fusion) -> None:
        """Let the label graph follow the observed correlation, once an epoch: it moves slowly and costs C^2 log C."""
        follows = self._options.correlation.source is not CorrelationSource.text
        network = self.engine.network
        if network.head is None and self._options.profile is not Profile.release and follows:
            graph = adjacency(fusion.correlation.shrunk(), self._options.correlation.graph_top_k)
            network.get_buffer("graph").copy_(graph)

    def _leave_out(self, micro: list[Batch], look: Any, lose: Callable[[Output, int], Step]) -> None:
        """Say where a step's bad numbers come from, keep the batches, and go on or stop. Collective.

        Raises:
            TrainingError: on all ranks alike.
        """
        progress, train, rank = self.progress, self._options.train, self._ranks.rank
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        findings = []
        for place, batch in enumerate(micro):
            is_teachers = isinstance(look, Look) and not bool(look.mine[place].confidence.isfinite().all())
            where = badnumbers.find(self.engine.network, batch, place, lose)
            if is_teachers or where:
                where = "in the teacher's output" if is_teachers else str(where)
                path = badnumbers.dump(self._bad_folder, batch, step=progress.step, rank=rank, place=place, where=where)
                findings.append(f"on rank {rank}, {where} (samples {badnumbers.named(batch.ids)}; kept in {path})")
        findings = [text for own in gather_objects([findings], self._ranks) for text in own]
        told = "; ".join(findings[:_MOST_FINDINGS]) or "only in the sum of all ranks' gradients"
        message = f"step {progress.step} has numbers that are not finite, first {told}"
        if train.on_bad_numbers is OnBadNumbers.stop:
            raise TrainingError(
                f"{message}: look at the batch, lower optimizer.learning_rate, or set train.on_bad_numbers=skip"
            )
        if progress.bad_in_a_row > train.max_bad_steps:
            raise TrainingError(
                f"{message}: it is the {progress.bad_in_a_row}th in a row, train.max_bad_steps={train.max_bad_steps}"
            )
        _log.warning("%s: the step is left out", message)

    def _write(self, step: Step | None, batch: Batch) -> None:
        """Write a line of metrics.jsonl, and show where the run stands. Collective."""
        figures: dict[str, Any] = {
            "learning_rate": self.engine.learning_rate(),
            "gradient_norm": self.engine.gradient_norm(),
        }
        if self._options.data.on_bad_sample is OnBadSample.skip:
            figures["skipped_samples"] = self.progress.skipped
        if self._options.train.on_bad_numbers is OnBadNumbers.skip:
            figures["bad_steps"] = self.progress.bad_steps
        row = self._meter.write(self.progress, figures, step, batch)
        loss = row.get("loss/total", float("nan"))
        detail = f"loss {loss:.3f}  {row['samples_per_second']:.0f} samples/s"
        if self.progress.best_map >= 0:
            detail += f"  hold-out mAP {self.progress.best_map:.1f}"
        self._voice.progress("training step", self.progress.step, self.total_steps, detail)

    def score(self, split: str, *, use_teacher: bool) -> Scores:
        """Return the scores of a split by teacher or student. Collective."""
        forward = self.teacher.forward
        if not use_teacher:
            self.engine.train(False)
            forward = self.engine.forward
        return self._materials.plain(split).score(forward, self._ranks, self._guard)

    def evaluate_holdout(self) -> bool:
        """Score both networks on the hold-out, and return whether the teacher is the best so far. Collective.

        The fusion's weights are fitted there too.
        """
        scores, figures = self._judge_holdout()
        teacher_map, student_map = (
            evaluate(found.probabilities, found.truth).mean_average_precision
            for found in (scores, self.score("holdout", use_teacher=False))
        )
        progress = self.progress
        epoch = progress.epoch - 1
        row = {"step": progress.step, "epoch": epoch, "samples_seen": progress.samples}
        self._log.write(row | {"holdout_map": teacher_map, "holdout_map_student": student_map} | figures)
        progress.judged, progress.last_map = progress.epoch, teacher_map
        is_best = teacher_map > progress.best_map
        if is_best:
            progress.best_map, progress.best_epoch = teacher_map, epoch
        return is_best

    def _judge_holdout(self) -> tuple[Scores, dict[str, float]]:
        """Return the teacher's scores on the hold-out, and what the fusion's terms are worth there. Collective."""
        fusion = self.fusion
        if fusion is None or not fusion.is_fitted:
            return self.score("holdout", use_teacher=True), {}
        fusion.refresh()
        answer = fused.terms(self.teacher.forward, fusion.classifier())
        holdout = self._materials.plain("holdout", masked_by=self._options.data)
        computed = holdout.compute(answer, self._ranks, self._guard)
        weights, figures = fused.judge(computed)
        if weights is not None:
            fusion.weights = weights
        return Scores(computed.columns[0], computed.truth), figures

    def state(self) -> State:
        """Return all that going on after this step needs. Collective.

        Random numbers need none: masks, order, views and variants are functions of the seed, epoch and sample.
        """
        kept = self._aim.state_dict()
        parts = [
            *_renamed("student", self.engine.layout.parts()),
            *_buffers("student", self.engine.network),
            *_renamed("teacher", held_parts(self.teacher.network)),
            *_buffers("teacher", self.teacher.network),
            *(whole(name, value) for name, value in kept.items()),
        ]
        scalars = {
            "progress": vars(self.progress),
            "updates": self.engine.layout.num_updates,
            "teacher_steps": self.teacher.steps,
            "meter": self._meter.state(),
        }

        def settle(saved: dict[str, Any]) -> None:
            self.progress = Progress(**saved["progress"])
            self.engine.go_on(self.progress.step, saved["updates"])
            self.teacher.steps = saved["teacher_steps"]
            self._meter.restore(saved["meter"])
            self._aim.load_state_dict(kept)

        return State(parts, copy.deepcopy(scalars), settle)

    def student_weights(self) -> dict[str, Tensor]:
        """Return the student's whole weights on the CPU, whatever the ZeRO stage. Collective."""
        return self.engine.whole_state(self.engine.network)

    def teacher_weights(self) -> dict[str, Tensor]:
        """Return the teacher's whole weights on the CPU, whatever the ZeRO stage. Collective."""
        return self.engine.whole_state(self.teacher.network)


def _renamed(who: str, parts: list[Part]) -> list[Part]:
    return [replace(part, name=f"{who}/{part.name}") for part in parts]


def _buffers(who: str, network: Network) -> list[Part]:
    """Return the buffers that a network saves, which ZeRO does not partition."""
    parameters = dict(network.named_parameters())
    return [
        whole(f"{who}/buffer/{name}", network.get_buffer(name))
        for name in network.state_dict()
        if name not in parameters
    ]
