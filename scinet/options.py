"""The configuration tree: one dataclass a section, every field typed, documented and bounded.

The defaults below are the whole default configuration; a YAML file holds only what differs (design.md,
configuration). Greek letters in the descriptions are the symbols of ``method.md``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from scinet.option import option
from scinet.zoo_options import ZooOptions

EMBEDDED, DEBUG = OWN_BACKBONES = ("embedded", "debug")
"""Backbones of ours: towers that come out of packages, and small random ones."""


class Method(enum.Enum):
    """What is trained: SCINet, or a method of the zoo under the same protocol (``scinet/zoo/README.md``)."""

    scinet = "scinet"
    scpnet = "scpnet"
    bce = "bce"
    an = "an"
    an_ls = "an_ls"
    wan = "wan"
    em = "em"
    em_apl = "em_apl"
    epr = "epr"
    role = "role"
    ll_r = "ll_r"
    ll_ct = "ll_ct"
    ll_cp = "ll_cp"
    asl = "asl"
    p_asl = "p_asl"
    hill = "hill"
    splc = "splc"
    gr = "gr"
    vlpl = "vlpl"
    dualcoop = "dualcoop"
    full_labels = "full_labels"
    zero_shot = "zero_shot"

    @property
    def views(self) -> tuple[str, ...]:
        """The views of an image that it trains on."""
        several = {Method.scinet: ("weak", "medium", "strong"), Method.scpnet: ("weak", "strong")}
        return several.get(self, ("weak",))


class Profile(enum.Enum):
    """``paper``: everything in method.md; ``release``: the trunk that the authors released (method.md section 5)."""

    paper = "paper"
    release = "release"


class Prompt(enum.Enum):
    """``learned``: context vectors are trained; ``fixed``: the words of ``model.context`` as they are."""

    learned = "learned"
    fixed = "fixed"


class Head(enum.Enum):
    """From embeddings to logits, whatever the loss (``scinet/zoo/README.md``, heads).

    ``prompt``: cosines to the classes' text; ``linear``: a map of the image embedding. Of regions: ``prompt_regions``,
    the odds by ``prompt``, averaged; ``cam``, averaged activation maps; ``ml_decoder``, class queries that attend;
    ``dualcoop``, a positive and a negative prompt.
    """

    prompt = "prompt"
    prompt_regions = "prompt_regions"
    linear = "linear"
    cam = "cam"
    ml_decoder = "ml_decoder"
    dualcoop = "dualcoop"

    @property
    def needs_regions(self) -> bool:
        """Whether it looks at the regions of an image."""
        return self in (Head.prompt_regions, Head.cam, Head.ml_decoder, Head.dualcoop)

    @property
    def is_prompted(self) -> bool:
        """Whether it compares with SCINet's text side: learned prompts and the label graph."""
        return self in (Head.prompt, Head.prompt_regions)


class BiDominant(enum.Enum):
    """``late``: image and text embeddings attend to each other before the classifier; ``none``: they do not."""

    none = "none"
    late = "late"


class Combine(enum.Enum):
    """How the unified confidence is formed (method.md section 3)."""

    pool = "pool"
    evidence = "evidence"
    linear = "linear"


class Weights(enum.Enum):
    """``fitted``: by a regression on the known cells of the hold-out; ``fixed``: as written, and ``fusion.combine``."""

    fitted = "fitted"
    fixed = "fixed"


class Bandwidth(enum.Enum):
    """``constant``: ``fusion.bandwidth_value``; ``adaptive``: the distance to the k-th neighbour."""

    constant = "constant"
    adaptive = "adaptive"


class CorrelationSource(enum.Enum):
    """Where the label correlation comes from (method.md section 3)."""

    text = "text"
    confidence = "confidence"
    shrunk = "shrunk"


class Memory(enum.Enum):
    """``dense`` keeps the confidence of every training sample (fp32); ``none`` keeps none (needs momentum 0)."""

    dense = "dense"
    none = "none"


class Precision(enum.Enum):
    """Arithmetic of the towers; logits, losses and fusion are always fp32. ``auto``: bf16 on a GPU, else fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class OnBadSample(enum.Enum):
    """``stop``: a sample that cannot be read ends the run; ``skip``: its place in the global batch stays empty."""

    stop = "stop"
    skip = "skip"


class OnBadNumbers(enum.Enum):
    """``stop``: a loss or gradient that is not finite ends the run; ``skip``: its step is left out, on all ranks."""

    stop = "stop"
    skip = "skip"


class LastBatch(enum.Enum):
    """``drop``: an epoch's short last global batch is left out; ``train``: it is a step like the others."""

    drop = "drop"
    train = "train"


class Prometheus(enum.Enum):
    """Who serves a run's figures: rank 0 those of all, every rank its own, nobody (``push``: to a gateway; ``off``)."""

    first_rank = "first_rank"
    every_rank = "every_rank"
    push = "push"
    off = "off"


class WandbMode(enum.Enum):
    """``offline``: into the run directory, for `wandb sync`; ``online``: to its server, which needs a login."""

    offline = "offline"
    online = "online"


@dataclass(frozen=True)
class DataOptions:
    """Which shards are read, how they are masked and in which order they come."""

    path: str = option(
        "data/scenes",
        "folder with dataset.json and the shards, as written by `scinet data build`, or a URL prefix: http(s), s3, gs, "
        "whatever fsspec knows, or `pipe:` and a command that ends where the file's name follows (or has {} for it)",
    )
    prepare: str = option("scinet data build scenes --out data/scenes", "the command that makes that folder")
    known_ratio: float = option(0.3, "share of the (image, class) cells whose label is known", low=0.0, high=1.0)
    single_positive: bool = option(False, "keep one positive an image and nothing else, instead of known_ratio")
    class_ratio_spread: float = option(
        0.0, "0: known_ratio in every class .. 1: evenly from 0 to twice it (above 0.5: from 1 down)", low=0.0, high=1.0
    )
    annotated_classes: float = option(
        1.0, "share of the classes, most frequent in training first, of which labels are known", low=0.001, high=1.0
    )
    flipped_labels: float = option(
        0.0, "share of the known labels that are wrong: present and absent exchanged", low=0.0, high=1.0
    )
    mask_seed: int = option(0, "seed of the label mask; masks of one seed are nested over known_ratio", low=0)
    mask_file: str = option("", "label mask of `scinet data mask --out`, instead of known_ratio and mask_seed")
    lanes: int = option(16, "streams an epoch is cut into; best a multiple of ranks x workers", low=1, high=4096)
    workers: int = option(0, "loader processes a rank", low=0, high=64)
    smallest_crop: float = option(0.5, "smallest share of the area that a random crop keeps", low=0.01, high=1.0)
    shuffle_window: int = option(512, "samples a lane shuffles among", low=1)
    cache_features: bool = option(False, "train on cached features of a frozen image tower (needs freeze_image)")
    cached_variants: int = option(4, "augmented variants of each view in that cache", low=1, high=256)
    cached_regions: int = option(
        0,
        "g: a grid of g x g averaged regions is cached with each view, for heads that look at regions",
        low=0,
        high=64,
    )
    cache_dir: str = option("", "where derived files go; empty: $XDG_CACHE_HOME/scinet")
    on_bad_sample: OnBadSample = option(OnBadSample.stop, "stop the run at a damaged sample, or skip and count it")
    max_bad_fraction: float = option(0.01, "share of skipped samples beyond which a run stops", low=0.0, high=1.0)
    timeout_s: float = option(60.0, "longest wait for the next 64 KiB of a remote source, retries included", low=0.1)
    retries: int = option(3, "further attempts to read a source that fails, after 0.25, 0.5, 1, ... s", low=0, high=100)
    cache_shards: str = option("", "local folder that keeps remote shards, checked by SHA-256; empty: none")
    allow_pipe: bool = option(False, "let `data.path` start with `pipe:`, which runs its text in a shell")
    max_member_mb: int = option(128, "largest file inside a shard that is read, MiB", low=1)


@dataclass(frozen=True)
class ModelOptions:
    """The towers and what is trained on top of them."""

    backbone: str = option(
        EMBEDDED,
        "an open_clip model name; `embedded`: towers that come out of packages; `debug`: small random ones, for tests",
    )
    pretrained: str = option(EMBEDDED, "an open_clip tag, a weights file, or `embedded`")
    image_size: int = option(224, "side of the square input, pixels", low=32, high=1024)
    freeze_image: bool = option(False, "keep the image tower as it is and train a projection after it")
    head: Head = option(Head.prompt, "the classifier on top of the towers")
    boost_alpha: float = option(1.0, "cam: factor on positive activations; BoostLU takes 5", low=1.0, high=100.0)
    decoder_groups: int = option(100, "ml_decoder: most queries; more classes than that share them", low=1)
    prompt: Prompt = option(Prompt.learned, "prompt, prompt_regions: whether the context vectors are trained")
    context: str = option("a photo of a", "words that the context vectors start from")
    bi_dominant: BiDominant = option(BiDominant.late, "prompt: cross attention between image and text embeddings")
    attention_heads: int = option(
        4, "heads of that attention, and of ml_decoder's; must divide the embedding width", low=1
    )
    label_graph: bool = option(True, "prompt, prompt_regions: graph convolutions over the label correlation")
    logit_scale: float = option(10.0, "s in z = s cos(f, t) + b; 0 takes the backbone's own", low=0.0, high=200.0)
    activation_checkpointing: bool = option(False, "towers compute activations twice instead of keeping them")
    learned_bias: bool = option(True, "train b, started at the label density; false: b = 0")


@dataclass(frozen=True)
class CorrelationOptions:
    """The Pearson label correlation (method.md section 3)."""

    source: CorrelationSource = option(CorrelationSource.shrunk, "text prior, observed, or observed shrunk to the text")
    shrinkage: float = option(100.0, "n_0: co-observations that weigh as much as the text prior", low=0.0)
    unknown_weight: float = option(0.25, "weight of an unknown cell against a known one", low=0.0, high=1.0)
    memory_epochs: float = option(1.0, "exponential forgetting: epochs after which a sample weighs 1/e", low=0.01)
    graph_top_k: int = option(20, "entries kept in a row of the label graph", low=1)
    temperature: float = option(0.3, "T of the row softmax over the kept entries", low=0.01)


@dataclass(frozen=True)
class FusionOptions:
    """The cross-modality fusion module: one confidence matrix Q (method.md section 3)."""

    enabled: bool = option(True, "false: Q is the teacher's probability, known cells override")
    weights: Weights = option(Weights.fitted, "fitted at each evaluation on the hold-out, or fixed")
    instance_evidence: bool = option(True, "fitted: what labels of similar images say")
    label_evidence: bool = option(True, "fitted: what the image's other labels say; for at most 1,024 classes")
    region_evidence: bool = option(False, "fitted: what labels of similar regions say, where the head looks at regions")
    region_bank_size: int = option(2048, "fitted: samples whose regions are kept", low=0)
    target_sharpness: float = option(1.0, "factor on the log-odds of the soft targets", low=0.0, high=10.0)
    combine: Combine = option(
        Combine.pool, "fixed: pool, log-odds averaged; evidence, log-odds added; linear, the literal reading"
    )
    instance_weight: float = option(1.0, "fixed: l_n, weight of the instance-similarity term", low=0.0)
    label_weight: float = option(0.5, "fixed: l_q, weight of the label-correlation term", low=0.0)
    momentum: float = option(0.8, "mu: share of the sample's previous confidence", low=0.0, high=1.0)
    bandwidth: Bandwidth = option(Bandwidth.constant, "fixed: constant, or the distance to the k-th neighbour")
    bandwidth_value: float = option(0.3, "fixed: sigma on unit vectors", low=1e-3)
    bandwidth_neighbours: int = option(10, "fixed: k of the adaptive bandwidth", low=1)
    radius: float = option(2.0, "fixed: samples farther apart are no neighbours; 2 keeps all unit vectors", low=0.0)
    bank_size: int = option(8192, "M: samples of past batches kept as neighbours", low=0)
    prior_strength: float = option(0.05, "fixed: a, weight of the class prior in the neighbour vote", low=1e-6)
    label_shrinkage: float = option(30.0, "co-observations at which a known-cell correlation is halved", low=0.0)
    label_noise: float = option(0.3, "V: noise variance of a known label in the conditional expectation", low=1e-4)
    memory: Memory = option(Memory.dense, "keep every sample's confidence (needed by momentum > 0)")
    memory_budget_mb: int = option(2048, "largest confidence memory allowed, MiB", low=0)
    differentiable: bool = option(False, "fuse the student's medium view and let gradients through the neighbour term")


@dataclass(frozen=True)
class LossOptions:
    """The objective (method.md section 5) and the pseudo-labels (section 4)."""

    unlabelled_weight: float = option(0.125, "lambda_u: weight of the consistency losses", low=0.0)
    medium_view_weight: float = option(1.0, "within them, the medium view towards the weak one's hard labels", low=0.0)
    strong_view_weight: float = option(1.0, "within them, the strong view towards the medium one's", low=0.0)
    distillation_weight: float = option(1.0, "kappa: weight of self-distillation within them", low=0.0)
    soft_target_weight: float = option(1.0, "w_u: weight of unknown cells' soft targets", low=0.0)
    assumed_negative_weight: float = option(
        0.04, "weight of unknown cells as negatives, in classes without a known negative", low=0.0
    )
    assumed_soft_weight: float = option(0.2, "factor on the weight of soft targets in such classes", low=0.0)
    warmup_fraction: float = option(
        0.25, "share of the steps before soft targets and consistency begin", low=0.0, high=1.0
    )
    focal_gamma: float = option(2.0, "gamma of the focal-margin loss", low=0.0)
    margin: float = option(1.0, "margin of the focal-margin loss on positives", low=0.0)
    hard_k: int = option(5, "K: classes of an image that can become pseudo-positive", low=1)
    threshold_window: int = option(2048, "n: samples over which pseudo-positives are counted", low=1)


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW under a one-cycle schedule (method.md section 6)."""

    learning_rate: float = option(4e-5, "peak, for the image tower, the prompts and the attention", low=0.0)
    graph_learning_rate: float = option(2e-4, "peak, for the label graph", low=0.0)
    head_learning_rate: float = option(1e-3, "peak, for a projection on a frozen tower, the bias and heads", low=0.0)
    weight_decay: float = option(1e-4, "on matrices; vectors have none", low=0.0)
    warmup_share: float = option(0.2, "share of the steps before the peak", low=0.0, high=0.95)
    gradient_clip: float = option(1.0, "largest gradient norm; 0: no clipping", low=0.0)


@dataclass(frozen=True)
class TrainOptions:
    """How long, in which batches, and what is written on the way."""

    epochs: int = option(10, "passes over the training split", low=1)
    global_batch_size: int = option(128, "samples a step over all ranks and accumulation steps", low=1)
    accumulation_steps: int = option(1, "micro-batches a step; all are fused with the whole global batch", low=1)
    max_steps: int = option(0, "stop after this many steps; 0: after the epochs", low=0)
    precision: Precision = option(Precision.auto, "arithmetic of the towers")
    ema_per_epoch: float = option(0.82, "share of the teacher that an epoch keeps", low=0.0, high=1.0)
    log_every_steps: int = option(10, "steps between two lines of metrics.jsonl", low=1)
    evaluate_every_epochs: int = option(1, "epochs between two evaluations on the hold-out", low=1)
    collective_timeout_s: int = option(600, "longest wait for another rank in a collective call", low=1)
    hang_timeout_s: float = option(300.0, "longest time without progress before a rank that hangs is named", low=1.0)
    on_bad_numbers: OnBadNumbers = option(
        OnBadNumbers.stop, "stop at a loss or gradient that is not finite, or leave the step out"
    )
    max_bad_steps: int = option(10, "steps left out in a row beyond which a run stops", low=0)
    test_at_end: bool = option(True, "score the test split; false: never open it, and write no page (sweeps)")
    last_batch: LastBatch = option(LastBatch.drop, "what happens to the rest of an epoch that fills no global batch")


@dataclass(frozen=True)
class CheckpointOptions:
    """When the training state is saved, and which checkpoints stay."""

    every_steps: int = option(0, "steps between two checkpoints within an epoch; 0: only at evaluations", low=0)
    keep_last: int = option(2, "newest checkpoints kept; more than one survives a damaged newest", low=1)
    keep_best: int = option(0, "checkpoints kept with the best hold-out mAP", low=0)
    keep_every_steps: int = option(0, "checkpoints at multiples of this step are kept for good; 0: none", low=0)


@dataclass(frozen=True)
class TelemetryOptions:
    """Who else is told how a run goes, beside the terminal and metrics.jsonl; none of it changes a result."""

    prometheus: Prometheus = option(Prometheus.first_rank, "who serves the figures for Prometheus")
    host: str = option("127.0.0.1", "address that is listened on; 0.0.0.0 or :: lets other machines in")
    port: int = option(
        0, "port of rank 0, or of a host's first rank; 0: a free one, said at the start", low=0, high=65535
    )
    push_gateway: str = option("", "URL of a push gateway, for prometheus=push")
    refresh_s: float = option(2.0, "time between two looks at the figures, and between two pushes", low=0.1, high=3600)
    tensorboard: bool = option(False, "write events for TensorBoard into the run directory")
    wandb: bool = option(False, "log to Weights & Biases")
    wandb_mode: WandbMode = option(WandbMode.offline, "where Weights & Biases puts it")


@dataclass(frozen=True)
class Options:
    """The whole configuration of a run."""

    name: str = option("run", "name of the run; its directory is <output>/<name>")
    output: str = option("runs", "folder of the run directories")
    method: Method = option(Method.scinet, "scinet, or a method of the zoo under the same protocol")
    profile: Profile = option(Profile.paper, "paper: all of method.md; release: the released trunk")
    seed: int = option(0, "seed of initialisation, order and augmentation", low=0)
    resume: bool = option(False, "go on with the run that the directory holds")
    baseline: str = option("", "a finished run's directory, whose result the page shows beside this one's")
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    correlation: CorrelationOptions = field(default_factory=CorrelationOptions)
    fusion: FusionOptions = field(default_factory=FusionOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    zoo: ZooOptions = field(default_factory=ZooOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    telemetry: TelemetryOptions = field(default_factory=TelemetryOptions)
    deepspeed: dict[str, Any] = option({}, "DeepSpeed's own configuration, passed through as it is")
