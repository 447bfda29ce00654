"""Sources to shards: plan, write in parallel, and show the folder under its name only when it is whole.

A build works in ``.NAME.building`` beside its target. What a killed or stopped build has finished stays there, and the
same command goes on with it: a shard is kept if the plan gives it the same samples at the same indices.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from scinet.data import card
from scinet.data.cooccurrence import PairCounter
from scinet.data.plan import MISSING_NAME, Plan, make_plan, missing_line
from scinet.data.records import Collection, Progress
from scinet.data.shards import ShardReport, ShardTask, read_report, write_shard
from scinet.data.workshop import Workshop
from scinet.errors import BuildInterrupted, DataError


@dataclass(frozen=True)
class BuildOptions:
    """How a collection is written.

    Args:
        holdout: share of the training samples set aside for model selection; None takes the collection's own.
        shard_samples: samples a shard.
        jobs: processes that write shards.
        skip_missing: go on without the images that are missing or cannot be decoded, instead of stopping.
        reencode: convert other formats than JPEG, PNG and WEBP to JPEG.
        restart: throw away what an earlier build with other options has finished.
    """

    holdout: float | None = None
    shard_samples: int = 256
    jobs: int = 1
    skip_missing: bool = False
    reencode: bool = False
    restart: bool = False


def build(collect: Callable[[Path], Collection], out: Path, options: BuildOptions, progress: Progress) -> card.DataCard:
    """Write a collection as shards with a data card; the folder appears whole or not at all.

    Args:
        collect: returns the collection, given a folder for what must be unpacked.
        out: a folder that does not exist yet, or is empty.
        options: how.
        progress: told how far it is.

    Raises:
        ConfigError: if ``out`` holds something already, cannot be written, or is being built by another process.
        DataError: if the source is not what it should be, an image is missing, or the disk is full.
        BuildInterrupted: on Ctrl-C.
    """
    with Workshop.open(out, restart=options.restart) as workshop, _told(workshop):
        collection = collect(workshop.scratch)
        holdout = collection.holdout if options.holdout is None else options.holdout
        workshop.claim(
            {
                "name": collection.name or out.name,
                "options": collection.source.get("options"),
                "holdout": holdout,
                "shard_samples": options.shard_samples,
                "reencode": options.reencode,
            }
        )
        plan = make_plan(
            collection,
            workshop.plan,
            holdout=holdout,
            shard_samples=options.shard_samples,
            progress=progress,
        )
        _check_missing(plan, workshop, skip_missing=options.skip_missing)
        reports = _write_shards(plan, collection, workshop, options, progress)
        _write_card(plan, collection, workshop, reports)
        workshop.finish()
    return card.read(out)


@contextlib.contextmanager
def _told(workshop: Workshop) -> Iterator[None]:
    """Turn what ends a build from outside into a sentence that says what is left."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise BuildInterrupted(f"interrupted; {workshop.what_is_left()}") from error
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that wrote shards died, perhaps for want of memory (fewer --jobs need less); "
            f"{workshop.what_is_left()}"
        ) from error
    except OSError as error:
        raise DataError(
            f"writing {workshop.out} failed: {error.strerror or error}; {workshop.what_is_left()}"
        ) from error


def _check_missing(plan: Plan, workshop: Workshop, *, skip_missing: bool) -> None:
    if not plan.num_missing:
        return
    names = ", ".join(plan.first_missing) + (", ..." if plan.num_missing > len(plan.first_missing) else "")
    count = f"{plan.num_missing} of {plan.num_records} images are missing ({names})"
    if not plan.num_indices:
        raise DataError(f"all {count.partition(' of ')[2]}: is --source the right folder?")
    if not skip_missing:
        workshop.keep()
        raise DataError(
            f"{count}; {plan.folder / MISSING_NAME} lists them all: put them there, or leave them out with "
            "`--missing skip`"
        )


def _write_shards(
    plan: Plan, collection: Collection, workshop: Workshop, options: BuildOptions, progress: Progress
) -> list[ShardReport]:
    """Write the shards that are not finished yet, and return the reports of all in the plan's order."""
    finished: dict[str, ShardReport] = {}
    waiting: list[ShardTask] = []
    sizes: dict[str, int] = {}
    for shard in plan.shards:
        file = f"{shard.split}-{shard.number:06d}.tar"
        sizes[file] = shard.num_samples
        task = ShardTask(
            file=file,
            directory=workshop.whole,
            sidecar=workshop.reports / f"{file}.json",
            plan=plan.file(shard.split),
            offset=shard.offset,
            length=shard.length,
            digest=shard.digest,
            num_classes=len(collection.class_names),
            load=collection.load,
            reencode=options.reencode,
            skip_broken=options.skip_missing,
        )
        report = _finished(task)
        if report is None:
            waiting.append(task)
        else:
            finished[file] = report
    workshop.keep()
    workshop.sweep(set(sizes))
    done = sum(sizes[file] for file in finished)
    for report in _run(waiting, options.jobs):
        finished[report.file] = report
        done += sizes[report.file]
        progress("images", done, plan.num_indices)
    return [finished[file] for file in sizes]


def _finished(task: ShardTask) -> ShardReport | None:
    """Return the report of a shard that an earlier build has written as this one would."""
    report = read_report(task.sidecar)
    path = task.directory / task.file
    if report is None or report.plan_digest != task.digest or not path.is_file():
        return None
    if path.stat().st_size != report.num_bytes or (report.broken and not task.skip_broken):
        return None
    return report


def _run(tasks: list[ShardTask], jobs: int) -> Iterator[ShardReport]:
    """Write shards in this process or in several, and yield each report as it comes."""
    if jobs == 1 or len(tasks) <= 1:
        yield from map(write_shard, tasks)
        return
    # not forked: this process has threads, and a child would inherit the lock on the folder
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_start_worker)
    try:
        futures: list[Future[ShardReport]] = [pool.submit(write_shard, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except (KeyboardInterrupt, GeneratorExit):
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        # the shards at hand are finished, unless the workers were told to end
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the first process, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _write_card(plan: Plan, collection: Collection, workshop: Workshop, reports: list[ShardReport]) -> None:
    directory = workshop.whole
    splits: dict[str, card.Split] = {}
    for name in card.SPLITS:
        of_split = [report for report in reports if report.file.startswith(f"{name}-")]
        if of_split:
            splits[name] = _split(of_split, len(collection.class_names))
    if not any(split.num_samples for split in splits.values()):
        raise DataError("not one image could be decoded: nothing was written")
    broken = [entry for report in reports for entry in report.broken]
    missing = {"not_found": plan.num_missing, "broken": len(broken)}
    if plan.num_missing or broken:
        text = (plan.folder / MISSING_NAME).read_text(encoding="utf-8")
        text += "".join(missing_line(*entry) for entry in broken)
        (directory / MISSING_NAME).write_text(text, encoding="utf-8")
    for report in reports:
        if not report.num_samples:
            (directory / report.file).unlink()
    card.write(
        directory,
        name=collection.name or workshop.out.name,
        class_names=collection.class_names,
        splits=splits,
        source=json.loads(json.dumps(collection.source)),
        num_indices=plan.num_indices,
        missing=card.Missing(**missing, file=MISSING_NAME if any(missing.values()) else ""),
    )


def _split(reports: list[ShardReport], num_classes: int) -> card.Split:
    positives: Counter[int] = Counter()
    negatives: Counter[int] = Counter()
    pairs = PairCounter(num_classes)
    for report in reports:
        positives.update(report.positives)
        negatives.update(report.negatives)
        pairs.merge(report.pair_codes, report.pair_counts)
    return card.Split(
        num_samples=sum(report.num_samples for report in reports),
        num_positives=tuple(positives[label] for label in range(num_classes)),
        num_negatives=tuple(negatives[label] for label in range(num_classes)),
        shards=tuple(
            card.Shard(report.file, report.num_samples, report.num_bytes, report.sha256)
            for report in reports
            if report.num_samples
        ),
        cooccurrence=pairs.result(),
    )
