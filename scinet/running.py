"""One run from configuration to page: prepare, train, select, evaluate, report."""

from __future__ import annotations

import contextlib
import errno
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from scinet import deferred_imports, fitting, materials, preflight, rundir
from scinet.checkpoint import weights
from scinet.checkpoint.keeper import Keeper
from scinet.data import transports
from scinet.distributed import (
    Ranks,
    from_first_rank,
    initialise,
    is_lost_contact,
    reason_of,
    shut_down,
)
from scinet.engine import uses_bf16
from scinet.errors import PeerLost, Preempted, ScinetError, TrainingError
from scinet.evaluation import fused
from scinet.evaluation.evaluator import Scores
from scinet.evaluation.metrics import evaluate
from scinet.guard import Sentry
from scinet.materials import Materials
from scinet.notes import Failures, Notes
from scinet.options import DEBUG, OWN_BACKBONES, Method, Options
from scinet.report import summary
from scinet.rundir import RunDirectory
from scinet.telemetry import Silence, Terminal, Voice, configure_logging
from scinet.telemetry.station import Station
from scinet.trainer import Trainer

_END_OF_ANOTHER_S = 60.0
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def run(options: Options) -> dict[str, Any]:
    """Carry out a configuration in its run directory and return the evaluation. Collective.

    Raises:
        ScinetError: in the user's terms; what was written before stays.
    """
    failures = Failures()
    try:
        if options.model.backbone in OWN_BACKBONES:
            deferred_imports.defer()  # open_clip imports it whatever it does
        ranks = initialise(options.train.collective_timeout_s)
        configure_logging(ranks.is_first)
        sentry = Sentry(ranks, Notes(ranks), failures, hang_timeout_s=options.train.hang_timeout_s)
        with _voice(ranks) as voice, sentry.on_duty():
            return _run(options, ranks, voice, sentry)
    except ScinetError as error:
        error.is_told = not failures.tell(error.exit_status)
        raise
    except (OSError, RuntimeError) as error:
        stopped = _in_words(error, failures)
        if stopped is None:
            raise
        raise stopped from error
    finally:
        shut_down()


def _in_words(error: OSError | RuntimeError, failures: Failures) -> ScinetError | None:
    """Return what a full disk or a broken collective means, or None for any other error, which is our own mistake."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        full = TrainingError(
            f"{error.filename or 'the run directory'} cannot be written ({error.strerror}): what was saved before "
            "stays; make room, then the same command with --resume auto goes on"
        )
        full.is_told = not failures.tell(full.exit_status)
        return full
    status = failures.elsewhere()
    if status:
        kind = PeerLost if status == PeerLost.exit_status else TrainingError
        stopped = kind("this rank stops because another failed")
        stopped.is_told = True
        return stopped
    if isinstance(error, OSError) or not is_lost_contact(error):
        failures.tell(ScinetError.exit_status)
        return None
    lost = PeerLost(f"another rank was lost ({reason_of(error)}): the same command with --resume auto goes on")
    lost.is_told = not failures.tell(lost.exit_status)
    return lost


@contextlib.contextmanager
def _voice(ranks: Ranks) -> Iterator[Voice]:
    if not ranks.is_first:
        yield Silence()
        return
    with Terminal() as terminal:
        yield terminal


def _run(options: Options, ranks: Ranks, voice: Voice, sentry: Sentry) -> dict[str, Any]:
    started = time.monotonic()
    directory: RunDirectory = from_first_rank(lambda: rundir.create(options), ranks)
    where = transports.shown(options.data.path)
    voice.say(f"{options.method.value} ({options.profile.value}) on {where}, {ranks.world_size} rank(s)")
    if options.resume and directory.evaluation.is_file():
        voice.say(f"{directory.path} is finished: there is nothing to go on with")
        return rundir.read_evaluation(directory)
    if options.model.backbone == DEBUG:
        voice.say("warning: model.backbone=debug has small random towers: no figure of this run is a result")
    with contextlib.ExitStack() as held:
        # a process that was asked to end may still be at its checkpoint
        patience_s = _END_OF_ANOTHER_S if options.resume else 0.0
        from_first_rank(lambda: held.enter_context(rundir.locked(directory, patience_s=patience_s)), ranks)
        try:
            station = held.enter_context(Station(options, ranks, directory))
            return _carry_out(options, ranks, voice, sentry, directory, station, started)
        finally:
            if ranks.is_first:
                rundir.discard_if_never_started(directory)


def _carry_out(
    options: Options,
    ranks: Ranks,
    voice: Voice,
    sentry: Sentry,
    directory: RunDirectory,
    station: Station,
    started: float,
) -> dict[str, Any]:
    made = materials.gather(
        options, ranks, voice.progress, lambda towers: fitting.check(options, towers, ranks, voice.say)
    )
    for doubt in preflight.doubts(made.card):
        voice.say(f"warning: {doubt}")
    evaluation: dict[str, Any] = {"class_names": list(made.card.class_names)}
    if options.train.test_at_end:
        untrained = evaluation["zero_shot"] = zero_shot(options, made, ranks)
        voice.say(f"zero-shot mAP {untrained['mean_average_precision']:.1f} (chance {untrained['chance']:.1f})")
    if options.method is Method.zero_shot:
        _describe(directory, options, made, ranks)
        scores: Scores | None = made.plain("test").score(made.zero_shot(options).to(ranks.device).eval(), ranks)
        correlation = None
        history: list[dict[str, Any]] = []
    else:
        scores, correlation = _train(options, made, ranks, voice, sentry, directory, station, evaluation)
        history = station.log.rows
        station.log.catch_up()
    evaluation["seconds"] = time.monotonic() - started
    if ranks.is_first:
        rundir.write_text(directory.evaluation, json.dumps(evaluation, indent=1) + "\n")
        if scores is None:
            selected = evaluation["selected"]
            voice.say(f"hold-out mAP {selected['holdout_map']:.2f} at epoch {selected['epoch']}; no test")
        else:
            page = summary.write(directory, options, made.card, evaluation, history, scores, correlation)
            _say_result(voice, evaluation, page)
    return evaluation


def _describe(directory: RunDirectory, options: Options, made: Materials, ranks: Ranks) -> None:
    """Write what the run is, once all that can be refused before its first step has been accepted."""
    if ranks.is_first and not directory.config.exists():
        rundir.describe(
            directory,
            options,
            weights_sha256=made.backbone.weights_sha256,
            card_sha256=made.card.sha256,
            world_size=ranks.world_size,
        )


def zero_shot(options: Options, made: Materials, ranks: Ranks) -> dict[str, Any]:
    """Return the metrics of the untrained network on the test split. Collective."""
    network = made.zero_shot(options).to(ranks.device).eval()
    return judge(made.plain("test").score(network, ranks))


def judge(scores: Scores) -> dict[str, Any]:
    """Return the metrics of scores as a JSON tree."""
    return evaluate(scores.probabilities, scores.truth).to_json()


def _train(
    options: Options,
    made: Materials,
    ranks: Ranks,
    voice: Voice,
    sentry: Sentry,
    directory: RunDirectory,
    station: Station,
    evaluation: dict[str, Any],
) -> tuple[Scores | None, Tensor | None]:
    """Train and fill in the evaluation; return the selected teacher's test scores, if any, and the correlation."""
    trainer = Trainer(options, made, ranks, station.rows, voice, sentry, station.observer)
    _describe(directory, options, made, ranks)
    keeper = Keeper(
        directory,
        options.checkpoint,
        ranks,
        patience_s=options.train.collective_timeout_s,
        notes=Notes(ranks),
        observer=station.observer,
    )
    if options.resume and keeper.load(trainer, voice.say):
        voice.say(f"resumed after epoch {trainer.progress.epoch} at step {trainer.progress.step}")
    station.begin(trainer.standing, voice.say)

    def after_step() -> None:
        every = options.checkpoint.every_steps
        if every and trainer.progress.step % every == 0 and not trainer.evaluation_is_due:
            keeper.save(trainer)

    with sentry.training():
        try:
            while trainer.evaluation_is_due or not trainer.is_finished:
                if trainer.evaluation_is_due:
                    if trainer.evaluate_holdout():
                        weights.save_selected(directory, trainer, made.card.class_names, ranks)
                    keeper.save(trainer)
                else:
                    trainer.train_epoch(after_step)
            last = _score(trainer) if options.train.test_at_end else {}
        except Preempted as error:
            raise _kept(keeper, trainer) from error
        keeper.wait()
    progress = trainer.progress
    selected: dict[str, Scores] = last
    if last and (progress.best_epoch != progress.epoch - 1 or uses_bf16(options, ranks.device)):
        selected = {who: _score_selected(options, made, ranks, directory, who) for who in last}
    if last and fused.is_wanted(options):
        selected = selected | _score_fused(options, made, ranks, directory)
    evaluation["selected"] = {
        "epoch": progress.best_epoch,
        "holdout_map": progress.best_map,
        **{who: judge(scores) for who, scores in selected.items()},
    }
    if last:
        evaluation["last"] = {"step": progress.step, **{who: judge(scores) for who, scores in last.items()}}
    correlation = None if trainer.fusion is None else trainer.fusion.correlation.shrunk().cpu()
    return selected.get("teacher"), correlation


def _score(trainer: Trainer) -> dict[str, Scores]:
    """Return the test scores of teacher and student as they are. Collective."""
    return {who: trainer.score("test", use_teacher=who == "teacher") for who in ("teacher", "student")}


def _score_selected(options: Options, made: Materials, ranks: Ranks, directory: RunDirectory, who: str) -> Scores:
    """Return the test scores of the selected weights, which are fp32 whatever trained them. Collective."""
    network = made.network(options).to(ranks.device).eval()
    weights.load_into(network, directory.checkpoints / "selected" / f"{who}.safetensors")
    return made.plain("test").score(network, ranks)


def _score_fused(options: Options, made: Materials, ranks: Ranks, directory: RunDirectory) -> dict[str, Scores]:
    """Build the selected teacher's bank, keep it beside the weights, and return the fused test scores. Collective."""
    network = made.network(options).to(ranks.device).eval()
    weights.load_into(network, directory.checkpoints / "selected" / "teacher.safetensors")
    classifier = fused.build(network, made, options, ranks)
    if classifier is None:
        return {}
    if ranks.is_first:
        weights.save_weights(directory.checkpoints / "selected" / weights.BANK, classifier.tensors())
    return {"fused": fused.both(made.plain("test"), network, classifier, ranks)[1]}


def _kept(keeper: Keeper, trainer: Trainer) -> Preempted:
    """Write a checkpoint of a run that was asked to stop, and return what to say. Collective."""
    keeper.save(trainer)
    keeper.wait()
    return Preempted(
        f"stopped by SIGTERM after step {trainer.progress.step} of {trainer.total_steps}, its checkpoint is written: "
        "the same command with --resume auto goes on"
    )


def _say_result(voice: Voice, evaluation: dict[str, Any], page: Path) -> None:
    if "selected" in evaluation:
        for moment in ("selected", "last"):
            shown = (
                f"{who} {evaluation[moment][who]['mean_average_precision']:.2f}"
                for who in ("teacher", "student", "fused")
                if who in evaluation[moment]
            )
            voice.say(f"test mAP, {moment} epoch: {', '.join(shown)}")
    voice.say(f"done in {evaluation['seconds']:.0f} s: {page}")
