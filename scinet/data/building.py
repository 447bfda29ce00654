"""Sources to shards: plan, write in parallel, and show the folder under its name only when it is whole.

A build works in ``.NAME.building`` beside its target. What a killed or stopped build has finished stays there, and the
same command goes on with it: a shard is kept if the plan gives it the same samples at the same indices.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from scinet.data import card
from scinet.data.images import BrokenImageError
from scinet.data.plan import MISSING_NAME, Plan, make_plan
from scinet.data.records import Collection, Progress
from scinet.data.shards import ShardTask, read_report, write_shard
from scinet.data.totals import write_card
from scinet.data.workshop import Workshop
from scinet.errors import BuildInterrupted, DataError
from scinet.texttable import is_unicode


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
        collection = _collected(collect, workshop.scratch)
        _check_classes(collection.class_names)
        holdout = collection.holdout if options.holdout is None else options.holdout
        workshop.claim(
            {
                "name": collection.name or out.name,
                "options": collection.source.get("options"),
                "holdout": holdout,
                "shard_samples": options.shard_samples,
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
        _write_shards(plan, collection, workshop, options, progress)
        write_card(plan, collection, workshop)
        workshop.finish()
    return card.read(out)


def _collected(collect: Callable[[Path], Collection], scratch: Path) -> Collection:
    try:
        return collect(scratch)
    except BrokenImageError as error:
        # a list, not an image: there is nothing to leave out
        raise DataError(f"{error}; download the archive again") from error


@contextlib.contextmanager
def _told(workshop: Workshop) -> Iterator[None]:
    """Turn what ends a build from outside into a sentence that says what is left."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise BuildInterrupted(f"interrupted; {workshop.what_is_left()}") from error
    except BrokenImageError as error:
        raise DataError(f"{error}, or leave it out with `--missing skip`; {workshop.what_is_left()}") from error
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that wrote shards died, perhaps for want of memory (fewer --jobs need less); "
            f"{workshop.what_is_left()}"
        ) from error
    except OSError as error:
        reason = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise DataError(f"writing {workshop.out} failed: {reason}; {workshop.what_is_left()}") from error


def _check_classes(names: list[str]) -> None:
    if not names:
        raise DataError("the source names no class: nothing was written")
    for number, name in enumerate(names):
        if not name.strip():
            raise DataError(f"class {number} has no name")
        if not is_unicode(name):
            raise DataError(f"class name {name!a} holds half a character: it is no Unicode text")
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise DataError(f"two classes are called '{repeated[0]}'")


def _check_missing(plan: Plan, workshop: Workshop, *, skip_missing: bool) -> None:
    if not plan.num_missing:
        return
    names = ", ".join(plan.first_missing) + (", ..." if plan.num_missing > len(plan.first_missing) else "")
    missing = f"{plan.num_records} images are missing ({names})"
    if not plan.num_indices:
        raise DataError(f"all {missing}: is it the right folder?")
    if not skip_missing:
        workshop.keep()
        raise DataError(
            f"{plan.num_missing} of {missing}; {plan.folder / MISSING_NAME} lists them all: put them there, or leave "
            "them out with `--missing skip`"
        )


def _write_shards(
    plan: Plan, collection: Collection, workshop: Workshop, options: BuildOptions, progress: Progress
) -> None:
    """Write the shards that are not finished yet."""
    sizes = {shard.file: shard.num_samples for shard in plan.shards}
    tasks = (
        ShardTask(
            file=shard.file,
            directory=workshop.whole,
            sidecar=workshop.sidecar(shard.file),
            plan=plan.file(shard.split),
            offset=shard.offset,
            length=shard.length,
            digest=shard.digest,
            num_classes=len(collection.class_names),
            load=collection.load,
            reencode=options.reencode,
            skip_broken=options.skip_missing,
        )
        for shard in plan.shards
    )
    waiting = [task for task in tasks if not _is_finished(task)]
    workshop.keep()
    workshop.sweep(set(sizes))
    done = plan.num_indices - sum(sizes[task.file] for task in waiting)
    for file in _run(waiting, options.jobs):
        done += sizes[file]
        progress("images", done, plan.num_indices)


def _is_finished(task: ShardTask) -> bool:
    """Tell whether an earlier build has written a shard as this one would.

    How images are converted, and whether broken ones are left out, may differ where the shard has neither.
    """
    report = read_report(task.sidecar)
    path = task.directory / task.file
    if report is None or report.plan_digest != task.digest or not path.is_file():
        return False
    is_alike = report.reencode == task.reencode or not (report.broken or report.num_reencoded)
    return path.stat().st_size == report.num_bytes and is_alike and (task.skip_broken or not report.broken)


def _run(tasks: list[ShardTask], jobs: int) -> Iterator[str]:
    """Write shards in this process or in several, and yield the name of each when it is finished."""
    if jobs == 1 or len(tasks) <= 1:
        yield from map(write_shard, tasks)
        return
    # not forked: this process has threads, and a child would inherit the lock on the folder
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_start_worker)
    try:
        for future in as_completed([pool.submit(write_shard, task) for task in tasks]):
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
