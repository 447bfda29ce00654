"""From ``method`` to its recipe; README.md of this folder describes each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scinet.fusion.thresholds import DynamicThresholds
from scinet.losses.assumed import assume_negative, known_cells
from scinet.losses.asymmetric import asymmetric
from scinet.losses.entropy import entropy_maximisation
from scinet.losses.generalised import Robustness, between, generalised_robust
from scinet.losses.robust import hill, self_paced
from scinet.options import Method, Options
from scinet.zoo.entropy import SoftNegatives, TowersPositives
from scinet.zoo.expectation import ExpectedPositives, LabelEstimates
from scinet.zoo.large_loss import LargeLoss
from scinet.zoo.recipe import CellRecipe, Recipe, check_budget
from scinet.zoo.scpnet import StructuredConsistency
from scinet.zoo.selective import Selective

# bytes of every sample's cell that a method keeps on every rank
_CELL_BYTES = {Method.role: LabelEstimates.CELL_BYTES, Method.em_apl: SoftNegatives.CELL_BYTES, Method.ll_cp: 1}
METHODS = tuple(method for method in Method if method not in (Method.scinet, Method.zero_shot))
"""Those with a recipe."""
# the others are functions of a cell
_RECIPES: dict[Method, type[Recipe]] = {
    Method.epr: ExpectedPositives,
    Method.role: LabelEstimates,
    **dict.fromkeys((Method.ll_r, Method.ll_ct, Method.ll_cp), LargeLoss),
    Method.em_apl: SoftNegatives,
    Method.vlpl: TowersPositives,
    Method.p_asl: Selective,
    Method.scpnet: StructuredConsistency,
}
_Cells = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Frame:
    """What a recipe may ask about the run.

    num_samples: N, size of the sample index. num_positives: of an image of the training split, on average, before the
    mask. relation: R [C, C] of SCPNet, from the class names. cosines: the untrained network, from inputs to [B, C],
    for VLPL.
    """

    num_samples: int
    num_classes: int
    num_positives: float
    num_epochs: int
    device: torch.device
    relation: Callable[[], Tensor]
    cosines: Callable[[Tensor], Tensor] | None


def table_bytes(options: Options, num_samples: int, num_classes: int) -> int:
    """Return the size of the table of every sample's labels that a method keeps on every rank."""
    return _CELL_BYTES.get(options.method, 0) * num_samples * num_classes


def sees_everyone(method: Method) -> bool:
    """Return whether a step of a method gathers what the student says of the whole global batch."""
    return _RECIPES.get(method, CellRecipe).needs_everyone


def build(options: Options, frame: Frame) -> Recipe:
    """Return the recipe of ``options.method``.

    Args:
        options: the whole configuration; not of SCINet or zero-shot, which have no recipe.
        frame: of the run.

    Raises:
        ConfigError: if it would keep a table larger than ``zoo.memory_budget_mb``.
    """
    method, zoo = options.method, options.zoo
    sizes = {"num_samples": frame.num_samples, "num_classes": frame.num_classes}
    check_budget(method.value, _CELL_BYTES.get(method, 0), **sizes, budget_mb=zoo.memory_budget_mb)
    expected = zoo.expectation.positives or frame.num_positives
    if method is Method.epr:
        return ExpectedPositives(expected)
    if method is Method.role:
        rate = zoo.expectation.learning_rate
        return LabelEstimates(expected, rate, **sizes, seed=options.seed, device=frame.device)
    if method in (Method.ll_r, Method.ll_ct):
        return LargeLoss(zoo.large_loss.percent, corrects=method is Method.ll_ct, corrected=None)
    if method is Method.ll_cp:
        return LargeLoss.permanent(zoo.large_loss.percent, **sizes, device=frame.device)
    if method is Method.em_apl:
        return SoftNegatives(zoo.entropy, num_epochs=frame.num_epochs, **sizes, device=frame.device)
    if method is Method.vlpl:
        assert frame.cosines is not None
        return TowersPositives(zoo.entropy, frame.cosines)
    if method is Method.p_asl:
        share = options.loss.warmup_fraction
        epochs = max(1, round(share * frame.num_epochs)) if share else 0
        return Selective(zoo.selective, num_prior_epochs=epochs, num_classes=frame.num_classes, device=frame.device)
    if method is Method.scpnet:
        loss = options.loss
        thresholds = DynamicThresholds(
            frame.num_classes, hard_k=loss.hard_k, window=loss.threshold_window, device=frame.device
        )
        return StructuredConsistency(loss, zoo.robust, frame.relation(), thresholds)
    if method is Method.full_labels:
        return CellRecipe(lambda logits, truth, _: known_cells(logits, truth), sees_truth=True)
    return CellRecipe(_cells(options, frame))


def _cells(options: Options, frame: Frame) -> _Cells:
    """Return the loss of a method that is a function of logit, label and epoch."""
    zoo = options.zoo
    smoothing, entropy_weight = zoo.label_smoothing, zoo.entropy.weight
    unknown_weight = 1 / max(1, frame.num_classes - 1)
    cells: dict[Method, _Cells] = {
        Method.bce: lambda logits, observed, _: known_cells(logits, observed),
        Method.an: lambda logits, observed, _: assume_negative(logits, observed),
        Method.an_ls: lambda logits, observed, _: assume_negative(logits, observed, smoothing=smoothing),
        Method.wan: lambda logits, observed, _: assume_negative(logits, observed, unknown_weight=unknown_weight),
        Method.em: lambda logits, observed, _: entropy_maximisation(logits, observed, weight=entropy_weight),
        Method.asl: _asymmetric(options),
        Method.dualcoop: _dualcoop,
        Method.hill: lambda logits, observed, _: hill(
            logits, observed, ceiling=zoo.robust.ceiling, margin=zoo.robust.margin, gamma=zoo.robust.gamma
        ),
        Method.splc: lambda logits, observed, epoch: self_paced(
            logits,
            observed,
            threshold=zoo.robust.threshold,
            margin=zoo.robust.margin,
            gamma=zoo.robust.gamma,
            corrects=epoch >= zoo.robust.start,
        ),
        Method.gr: _generalised(options, frame.num_epochs),
    }
    return cells[options.method]


def _asymmetric(options: Options) -> _Cells:
    asl = options.zoo.asymmetric
    gamma_unknown = asl.gamma_negative if asl.unknown_is_negative else None

    def cells(logits: Tensor, observed: Tensor, _: int) -> Tensor:
        return asymmetric(
            logits,
            observed,
            gamma_positive=asl.gamma_positive,
            gamma_negative=asl.gamma_negative,
            margin=asl.margin,
            gamma_unknown=gamma_unknown,
            detaches_focus=True,
        )

    return cells


def _dualcoop(logits: Tensor, observed: Tensor, _: int) -> Tensor:
    """Return ASL as DualCoOp has it; its two-way softmax is the sigmoid of the head's logit."""
    return asymmetric(
        logits,
        observed,
        gamma_positive=1.0,
        gamma_negative=2.0,
        margin=0.05,
        gamma_unknown=None,
        detaches_focus=True,
    )


def _generalised(options: Options, num_epochs: int) -> _Cells:
    gr = options.zoo.generalised
    start = Robustness(gr.slope_start, gr.offset_start, gr.centre_start, gr.width_start)
    end = Robustness(gr.slope_end, gr.offset_end, gr.centre_end, gr.width_end)

    def cells(logits: Tensor, observed: Tensor, epoch: int) -> Tensor:
        return generalised_robust(
            logits,
            observed,
            robustness=between(start, end, epoch=epoch, num_epochs=num_epochs),
            positive_power=gr.positive_power,
            negative_power=gr.negative_power,
        )

    return cells
