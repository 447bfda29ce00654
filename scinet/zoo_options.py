"""Hyperparameters of the zoo's methods; ``method`` picks one, and only its section counts.

Defaults are the sources' where one value serves all their data sets, otherwise those of COCO. What differs by data set
is listed in ``configs/published``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scinet.option import option


@dataclass(frozen=True)
class EntropyOptions:
    """``em``, ``em_apl`` and ``vlpl`` (Zhou et al. 2022; Xing et al. 2024)."""

    weight: float = option(0.1, "alpha: weight of the entropy of unknown cells", low=0.0)
    negatives: float = option(0.9, "em_apl: share of the unknown cells that become soft negatives", low=0.0, high=1.0)
    negative_weight: float = option(0.9, "em_apl: beta, weight of soft negatives", low=0.0)
    start: float = option(0.5, "em_apl: share of the epochs before soft negatives are chosen", low=0.0, high=1.0)
    positive_weight: float = option(0.7, "vlpl: weight of pseudo-positives", low=0.0)
    temperature: float = option(0.01, "vlpl: temperature of the zero-shot softmax over classes", low=1e-4)
    threshold: float = option(0.3, "vlpl: zero-shot probability above which a class is positive", low=0.0, high=1.0)


@dataclass(frozen=True)
class ExpectationOptions:
    """``epr`` and ``role`` (Cole et al. 2021)."""

    positives: float = option(
        0.0, "k: positives an image; 0 takes the training split's from the data card, as the source does", low=0.0
    )
    learning_rate: float = option(0.01, "role: of the label estimates; ten times the classifier's in the source", low=0)


@dataclass(frozen=True)
class LargeLossOptions:
    """``ll_r``, ``ll_ct`` and ``ll_cp`` (Kim et al. 2022)."""

    percent: float = option(0.2, "Delta_rel: percent of cells rejected, more each epoch; ll_r: 0.4 on COCO", low=0.0)


@dataclass(frozen=True)
class AsymmetricOptions:
    """``asl`` (Ridnik et al. 2021)."""

    gamma_positive: float = option(0.0, "asl: focus on positives", low=0.0)
    gamma_negative: float = option(4.0, "asl: focus on negatives", low=0.0)
    margin: float = option(0.05, "asl: probability below which a negative costs nothing", low=0.0, high=0.99)
    unknown_is_negative: bool = option(True, "asl: unknown cells are negatives; false: they are left out")


@dataclass(frozen=True)
class SelectiveOptions:
    """``p_asl``: the class-aware selective loss (Ben-Baruch et al. 2022)."""

    focus_positive: float = option(0.0, "focus on known positives", low=0.0)
    focus_negative: float = option(1.0, "focus on known negatives", low=0.0)
    focus_unknown: float = option(4.0, "focus on unknown cells", low=0.0)
    ignored: int = option(5, "likely positives left out, unknown cells times the global batch", low=0)
    common: float = option(0.5, "mean prediction above which a class's unknown cells are left out", low=0.0, high=1.0)


@dataclass(frozen=True)
class RobustOptions:
    """``hill`` and ``splc`` (Zhang et al. 2021)."""

    ceiling: float = option(1.5, "hill: lambda", low=1.0)
    margin: float = option(1.0, "subtracted from the logit of a known positive", low=0.0)
    gamma: float = option(2.0, "focus", low=0.0)
    threshold: float = option(0.6, "splc: tau, from which an unknown cell is a positive", low=0.0, high=1.0)
    start: int = option(1, "splc: epochs before labels are corrected", low=0)


@dataclass(frozen=True)
class GeneralisedOptions:
    """``gr`` (Chen et al. 2024); each parameter goes linearly from a start to an end."""

    slope_start: float = option(0.0, "w of the belief K, at the start")
    slope_end: float = option(10.0, "and at the end; 2 on VOC")
    offset_start: float = option(-2.0, "b of the belief, at the start")
    offset_end: float = option(-8.0, "and at the end; -2 on VOC")
    centre_start: float = option(0.5, "mu of the weight V, at the start")
    centre_end: float = option(0.8, "and at the end")
    width_start: float = option(2.0, "sigma of the weight, at the start", low=1e-3)
    width_end: float = option(0.5, "and at the end", low=1e-3)
    positive_power: float = option(0.01, "q2", low=1e-4)
    negative_power: float = option(1.0, "q3", low=1e-4)


@dataclass(frozen=True)
class ZooOptions:
    """One section a family of methods."""

    label_smoothing: float = option(0.1, "an_ls: share of each target that goes to the other one", low=0.0, high=0.5)
    memory_budget_mb: int = option(2048, "largest table of every sample's labels allowed, MiB", low=0)
    entropy: EntropyOptions = field(default_factory=EntropyOptions)
    expectation: ExpectationOptions = field(default_factory=ExpectationOptions)
    large_loss: LargeLossOptions = field(default_factory=LargeLossOptions)
    asymmetric: AsymmetricOptions = field(default_factory=AsymmetricOptions)
    selective: SelectiveOptions = field(default_factory=SelectiveOptions)
    robust: RobustOptions = field(default_factory=RobustOptions)
    generalised: GeneralisedOptions = field(default_factory=GeneralisedOptions)
