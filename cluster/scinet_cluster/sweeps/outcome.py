"""What came out of a sweep: ``best.yaml``, ``sweep.json``, ``trials.csv`` and ``sweep.html``."""

from __future__ import annotations

import csv
import io
import json
import statistics
from typing import Any

from scinet import config
from scinet.report import sweep_page
from scinet.rundir import write_text
from scinet_cluster.sweeps.agenda import candidates, confirmed, winner
from scinet_cluster.sweeps.ledger import Ledger, Purpose, Trial
from scinet_cluster.sweeps.options import Sweep
from scinet_cluster.sweeps.sampling import Sampling


def write(sweep: Sweep, ledger: Ledger, *, is_done: bool) -> list[str]:
    """Write the results of what has ended so far into the sweep's folder, and return them in words.

    Args:
        sweep: its configuration.
        ledger: its trials.
        is_done: whether nothing is left to try.
    """
    best = winner(ledger)
    if best is None:
        return []
    folder = sweep.folder
    importance = Sampling(sweep.space, sweep.options.sampler, sweep.options.seed).importance(ledger.of(Purpose.search))
    tree = _tree(sweep, ledger, best, importance, is_done=is_done)
    write_text(folder / "best.yaml", _best_yaml(sweep, best))
    write_text(folder / "sweep.json", json.dumps(tree, indent=1) + "\n")
    write_text(folder / "trials.csv", _table(sweep, ledger))
    page = sweep_page.write(folder, tree)
    return [*_in_words(ledger, best, is_done=is_done), f"best.yaml, sweep.json, trials.csv and the page: {page}"]


def _best_yaml(sweep: Sweep, best: Trial) -> str:
    """Return the best trial's whole configuration, which trains it as it is, now with the test split."""
    changes = {key.replace(".", "__"): value for key, value in best.parameters.items()}
    options = config.replace(
        sweep.base,
        **changes,
        name=f"{sweep.options.name}-best",
        output="runs",
        train__test_at_end=True,
    )
    return f"# trial {best.number} of {sweep.folder}\n" + config.to_yaml(options)


def _tree(sweep: Sweep, ledger: Ledger, best: Trial, importance: dict[str, float], *, is_done: bool) -> dict[str, Any]:
    return {
        "name": sweep.options.name,
        "is_done": is_done,
        "space": list(sweep.space),
        "log": [key for key, found in sweep.space.items() if getattr(found.distribution, "log", False)],
        "best": best.number,
        "default": 0,
        "importance": importance,
        "confirmed": {trial.number: confirmed(ledger, trial) for trial in candidates(ledger, len(ledger.trials))},
        "trials": [
            {
                "number": trial.number,
                "purpose": trial.purpose.value,
                "confirms": trial.confirms,
                "seed": trial.seed,
                "state": trial.state.value,
                "holdout_map": trial.best,
                "epochs": len(trial.history),
                "seconds": trial.seconds,
                "reason": trial.reason,
                "parameters": trial.parameters,
                "history": trial.history,
                "placed": trial.placed,
            }
            for _, trial in sorted(ledger.trials.items())
        ],
    }


def _table(sweep: Sweep, ledger: Ledger) -> str:
    buffer = io.StringIO()
    columns = ["number", "purpose", "confirms", "seed", "state", "holdout_map", "epochs", "seconds", "reason"]
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow([*columns, *sweep.space])
    for _, trial in sorted(ledger.trials.items()):
        best = "" if trial.best is None else trial.best
        row = [trial.number, trial.purpose.value, trial.confirms, trial.seed, trial.state.value, best]
        row += [len(trial.history), f"{trial.seconds:.1f}", trial.reason]
        table.writerow([*row, *(trial.parameters.get(key, "") for key in sweep.space)])
    return buffer.getvalue()


def _in_words(ledger: Ledger, best: Trial, *, is_done: bool) -> list[str]:
    default = ledger.trials[0]
    so_far = "best" if is_done else "best so far"
    lines = [f"{so_far}: trial {best.number} with hold-out mAP {_map(best.best)}; the default has {_map(default.best)}"]
    mine, theirs = confirmed(ledger, best), confirmed(ledger, default)
    if mine and theirs and best is not default:
        lines.append(f"with {len(mine)} other seed(s): {_spread(mine)}; the default {_spread(theirs)}")
    if is_done and best is default:
        lines.append("nothing that was tried holds against the default")
    return lines


def _map(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"
