"""The zoo's losses written again from their sources, for one cell at a time in plain numbers.

Settings are the sources' and stand here as numbers, so that a default that moves is noticed; README.md of the zoo says
where a method leaves its source. z is +1 known present, -1 known absent, 0 unknown. A cell's logit comes twice: as x,
and as ``held`` where the source lets no gradient pass; what a loss decides (a rejection, a pseudo-label) is held too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Rows = list[list[float]]


@dataclass(frozen=True)
class Step:
    """A global batch of G samples: logits [V * G][C] view by view, labels [G][C], sample indices [G], inputs [G][C]."""

    epoch: int
    logits: Rows
    observed: list[list[int]]
    truth: list[list[int]]
    index: list[int]
    inputs: Rows

    def cells(self) -> list[tuple[int, int]]:
        """Return row and class of every cell of the weak view."""
        return [(row, place) for row, labels in enumerate(self.observed) for place in range(len(labels))]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cost(x: float) -> float:
    """Return l+ of x; that of -x is l-."""
    return math.log1p(math.exp(-x))


def focal(x: float) -> float:
    return (1 - sigmoid(x)) ** 2 * cost(x)


def bce(x: float, held: float, z: int, epoch: int) -> float:
    return 0.0 if z == 0 else cost(z * x)


def an(x: float, held: float, z: int, epoch: int) -> float:
    return cost(x) if z > 0 else cost(-x)


def an_ls(x: float, held: float, z: int, epoch: int) -> float:
    return 0.9 * cost(x) + 0.1 * cost(-x) if z > 0 else 0.9 * cost(-x) + 0.1 * cost(x)


def wan_of_26_classes(x: float, held: float, z: int, epoch: int) -> float:
    return cost(-x) / 25 if z == 0 else cost(z * x)


def em(x: float, held: float, z: int, epoch: int) -> float:
    """Zhou et al. on COCO: alpha 0.1."""
    return -0.1 * (sigmoid(x) * cost(x) + sigmoid(-x) * cost(-x)) if z == 0 else cost(z * x)


def asl(x: float, held: float, z: int, epoch: int) -> float:
    """Ridnik et al. as they train: 0 and 4, margin 0.05, a focus without gradient."""
    if z > 0:
        return cost(x)
    return -(max(sigmoid(held) - 0.05, 0) ** 4) * math.log(1 - max(sigmoid(x) - 0.05, 0))


def asl_of_known(x: float, held: float, z: int, epoch: int) -> float:
    return 0.0 if z == 0 else asl(x, held, z, epoch)


def dualcoop(x: float, held: float, z: int, epoch: int) -> float:
    """Sun et al.: ASL with 1 and 2, margin 0.05, unknown cells left out."""
    if z == 0:
        return 0.0
    if z > 0:
        return (1 - sigmoid(held)) * cost(x)
    return -(max(sigmoid(held) - 0.05, 0) ** 2) * math.log(1 - max(sigmoid(x) - 0.05, 0))


def hill(x: float, held: float, z: int, epoch: int) -> float:
    return focal(x - 1) if z > 0 else (1.5 - sigmoid(x)) * sigmoid(x) ** 2


def splc(x: float, held: float, z: int, epoch: int) -> float:
    if z > 0:
        return focal(x - 1)
    return focal(x) if z == 0 and epoch >= 1 and sigmoid(held) > 0.6 else focal(-x)


def gr_of_8_epochs(x: float, held: float, z: int, epoch: int) -> float:
    """Chen et al. on COCO; the source's mu and sigma are a step ahead of its w and b."""
    if z:
        return cost(z * x)
    late, early, p, q = epoch / 8, (epoch + 1) / 8, sigmoid(x), sigmoid(held)
    belief = sigmoid(10 * late * q - 2 - 6 * late)
    weight = math.exp(-((q - 0.5 - 0.3 * early) ** 2) / (2 * (2 - 1.5 * early) ** 2))
    return weight * (belief * (1 - math.pow(p, 0.01)) / 0.01 + (1 - belief) * p)


class Plain:
    """A method: the cost of each cell of a step, and what it remembers of those that are taken."""

    def begin(self, step: Step) -> None:
        """Take the step that costs are asked of."""
        self.step = step

    def cell(self, x: float, held: float, row: int, place: int) -> float:
        """Return what a cell of a view's row costs."""
        raise NotImplementedError

    def pull(self, mean: float) -> float:
        """Return what the global batch costs for the mean number of positives of its images."""
        return 0.0

    def end(self) -> None:
        """Remember the step."""

    def end_epoch(self, epoch: int) -> None:
        """Choose by what is remembered."""


class Alone(Plain):
    """A cost that knows its cell and the epoch alone."""

    def __init__(self, formula: Callable[[float, float, int, int], float], *, sees_truth: bool = False) -> None:
        self.formula, self.sees_truth = formula, sees_truth

    def cell(self, x: float, held: float, row: int, place: int) -> float:
        labels = self.step.truth if self.sees_truth else self.step.observed
        return self.formula(x, held, labels[row][place], self.step.epoch)


class Epr(Plain):
    def __init__(self, expected: float) -> None:
        self.expected = expected

    def cell(self, x: float, held: float, row: int, place: int) -> float:
        return bce(x, held, self.step.observed[row][place], self.step.epoch)

    def pull(self, mean: float) -> float:
        num_rows, num_classes = len(self.step.observed), len(self.step.observed[0])
        return num_rows * num_classes * ((mean - self.expected) / num_classes) ** 2


class Role(Epr):
    """Two halves: the classifier towards the estimates, and the estimates, by an Adam of their own, towards it.

    The estimates' start is the recipe's.
    """

    def __init__(self, expected: float, start: Rows) -> None:
        super().__init__(expected)
        self.estimates = [list(row) for row in start]
        self.first, self.second = ([[0.0] * len(row) for row in start] for _ in range(2))
        self.updates = [0] * len(start)

    def begin(self, step: Step) -> None:
        self.step = step
        for row, place in step.cells():
            if self.updates[step.index[row]] == 0 and step.observed[row][place]:
                self.estimates[step.index[row]][place] = step.observed[row][place] * math.log(0.995 / 0.005)

    def half(self, x: float, other: float, row: int, place: int) -> float:
        return 0.5 * (super().cell(x, x, row, place) + sigmoid(other) * cost(x) + sigmoid(-other) * cost(-x))

    def cell(self, x: float, held: float, row: int, place: int) -> float:
        return self.half(x, self.estimates[self.step.index[row]][place], row, place)

    def pull(self, mean: float) -> float:
        return 0.5 * super().pull(mean)

    def end(self) -> None:
        step, estimates = self.step, [self.estimates[index] for index in self.step.index]
        gradient = slopes(estimates, lambda e, _, row, c: self.half(e, step.logits[row][c], row, c), self.pull)
        for row, index in enumerate(step.index):
            self.updates[index] += 1
            for place, value in enumerate(gradient[row]):
                slope = value / len(step.index)
                first = self.first[index][place] = 0.9 * self.first[index][place] + 0.1 * slope
                second = self.second[index][place] = 0.999 * self.second[index][place] + 0.001 * slope**2
                first, second = first / (1 - 0.9 ** self.updates[index]), second / (1 - 0.999 ** self.updates[index])
                self.estimates[index][place] -= 0.01 * first / (math.sqrt(second) + 1e-8)


class Apl(Plain):
    """Zhou et al. on COCO: alpha 0.1, beta 0.9, nine tenths of a class's unknown cells over the epochs from half on."""

    def __init__(self, num_epochs: int) -> None:
        self.num_epochs = num_epochs
        self.seen: dict[tuple[int, int], float] = {}
        self.targets: dict[tuple[int, int], float] = {}

    def cell(self, x: float, held: float, row: int, place: int) -> float:
        target = self.targets.get((self.step.index[row], place))
        if target is None:
            return em(x, held, self.step.observed[row][place], self.step.epoch)
        return 0.9 * (target * cost(x) + (1 - target) * cost(-x))

    def end(self) -> None:
        for row, place in self.step.cells():
            if self.step.observed[row][place] == 0:
                self.seen[self.step.index[row], place] = sigmoid(self.step.logits[row][place])

    def end_epoch(self, epoch: int) -> None:
        if not self.num_epochs / 2 <= epoch + 1 < self.num_epochs:
            return
        for place in {place for _, place in self.seen}:
            of_class = sorted((p, cell) for cell, p in self.seen.items() if cell[1] == place)
            wanted = math.floor(0.9 * len(of_class) / (self.num_epochs / 2))
            for p, cell in [free for free in of_class if free[1] not in self.targets][:wanted]:
                self.targets[cell] = p


class LargeLoss(Plain):
    """Kim et al.: 0.2 percent of the batch's cells, more each epoch; R leaves them out, Ct turns them."""

    def __init__(self, *, corrects: bool, is_permanent: bool = False) -> None:
        self.corrects, self.is_permanent = corrects, is_permanent
        self.turned: set[tuple[int, int]] = set()
        self.rejected: list[tuple[int, int]] = []

    def begin(self, step: Step) -> None:
        self.step = step
        unknown = [(row, c) for row, c in step.cells() if self._label(row, c) == 0]
        unknown.sort(key=lambda cell: -step.logits[cell[0]][cell[1]])
        times = min(step.epoch, 1) if self.is_permanent else step.epoch
        self.rejected = unknown[: math.ceil(0.002 * times * len(step.cells()))]

    def _label(self, row: int, place: int) -> int:
        return 1 if (self.step.index[row], place) in self.turned else self.step.observed[row][place]

    def cell(self, x: float, held: float, row: int, place: int) -> float:
        if (row, place) in self.rejected:
            return cost(x) if self.corrects else 0.0
        return cost(x) if self._label(row, place) > 0 else cost(-x)

    def end(self) -> None:
        if self.is_permanent:  # as in the source the last of them, which is not above itself, is not kept
            self.turned.update((self.step.index[row], place) for row, place in self.rejected[:-1])


class Selective(Plain):
    """Ben-Baruch et al.: 0, 1, 4; five cells an image ignored, and classes of a prior above a half.

    The prior is the mean prediction in the first quarter of the epochs, in which known cells alone count.
    """

    def __init__(self, num_epochs: int) -> None:
        self.num_prior_epochs = num_epochs // 4
        self.predictions: list[list[float]] = []
        self.ignored: set[tuple[int, int]] = set()

    def begin(self, step: Step) -> None:
        self.step = step
        unknown = [(row, c) for row, c in step.cells() if step.observed[row][c] == 0]
        if step.epoch >= self.num_prior_epochs:
            priors = [sum(column) / len(column) for column in zip(*self.predictions, strict=True)]
            common = [cell for cell in unknown if priors[cell[1]] > 0.5]
            unknown = sorted(unknown, key=lambda cell: -step.logits[cell[0]][cell[1]])[: 5 * len(step.index)] + common
        self.ignored = set(unknown)

    def cell(self, x: float, held: float, row: int, place: int) -> float:
        z = self.step.observed[row][place]
        if (row, place) in self.ignored:
            return 0.0
        return cost(x) if z > 0 else sigmoid(held) ** (1 if z < 0 else 4) * cost(-x)

    def end(self) -> None:
        if self.step.epoch < self.num_prior_epochs:
            self.predictions += [[sigmoid(x) for x in row] for row in self.step.logits]


class Vlpl(Plain):
    """Xing et al.: 0.7 of a target of 0.9 where the softmax of cosines / 0.01 is above 0.3; the inputs are cosines."""

    def begin(self, step: Step) -> None:
        self.step, odds = step, [[math.exp(cosine / 0.01) for cosine in row] for row in step.inputs]
        self.is_seen = [[value / sum(row) > 0.3 for value in row] for row in odds]

    def cell(self, x: float, held: float, row: int, place: int) -> float:
        z = self.step.observed[row][place]
        if z == 0 and self.is_seen[row][place]:
            return 0.7 * (0.9 * cost(x) + 0.1 * cost(-x))
        return em(x, held, z, self.step.epoch)


class Scpnet(Plain):
    """Ding et al. on VOC: an image's five likeliest classes, both consistencies an eighth; counts of 2048 samples."""

    def __init__(self, relation: Rows) -> None:
        self.relation = relation
        self.counted: list[list[bool]] = []
        self.labels: list[list[bool]] = []
        self.is_confident: list[bool] = []
        self.related: Rows = []

    def begin(self, step: Step) -> None:
        self.step, num_classes, seen = step, len(self.relation), self.counted[-2048:]
        counts = [sum(row[place] for row in seen) for place in range(num_classes)]
        most = max(*counts, 5 * len(seen) - sum(counts), 1)
        least = [0.95 * a / (2 - a) for a in (max(count / most, 1 / num_classes) for count in counts)]
        self.labels, self.is_confident, self.related = [], [], []
        for logits, observed in zip(step.logits, step.observed, strict=False):  # the weak view's rows come first
            top = sorted(range(num_classes), key=lambda c: -logits[c])[:5]
            passed = [c in top and sigmoid(logits[c]) >= least[c] for c in range(num_classes)]
            self.labels.append([passed[c] if z == 0 else z > 0 for c, z in enumerate(observed)])
            self.is_confident.append(any(passed))
            weak = [sigmoid(x) for x in logits]
            self.related.append([sum(map(math.prod, zip(shares, weak, strict=True))) for shares in self.relation])

    def cell(self, x: float, held: float, row: int, place: int) -> float:
        num_rows = len(self.labels)
        if row < num_rows:
            return splc(x, held, self.step.observed[row][place], self.step.epoch)
        row -= num_rows
        if not self.is_confident[row]:
            return 0.0
        related = self.related[row][place]
        return 0.125 * (cost(x if self.labels[row][place] else -x) + related * cost(x) + (1 - related) * cost(-x))

    def end(self) -> None:
        self.counted += self.labels


def total(rows: Rows, method: Plain) -> float:
    """Return what a method's step costs."""
    cells = sum(method.cell(x, x, row, place) for row, xs in enumerate(rows) for place, x in enumerate(xs))
    return cells + method.pull(_mean_positives(rows))


def slopes(
    rows: Rows, cell: Callable[[float, float, int, int], float], pull: Callable[[float], float], width: float = 1e-5
) -> Rows:
    """Return the central differences of the costs of a step by each logit, held values at rest."""
    mean = _mean_positives(rows)

    def at(x: float, held: float, row: int, place: int) -> float:
        return cell(x, held, row, place) + pull(mean + (sigmoid(x) - sigmoid(held)) / len(rows))

    return [
        [(at(x + width, x, row, place) - at(x - width, x, row, place)) / (2 * width) for place, x in enumerate(xs)]
        for row, xs in enumerate(rows)
    ]


def _mean_positives(rows: Rows) -> float:
    return sum(sigmoid(x) for xs in rows for x in xs) / len(rows)
