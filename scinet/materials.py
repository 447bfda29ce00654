"""What a run is made from before it starts: card, towers, views, cached features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from scinet.data import sources
from scinet.data.batch import BatchSource, FeatureBatches, Features, ImageBatches
from scinet.data.card import SPLITS, DataCard
from scinet.data.examples import Mask
from scinet.data.share import Share, share_of
from scinet.data.stream import BadSamples
from scinet.data.views import Views
from scinet.distributed import Ranks, first_rank_first
from scinet.errors import ConfigError
from scinet.evaluation.evaluator import PlainSplit
from scinet.model import backbone as model_backbone
from scinet.model import features as model_features
from scinet.model import heads, regions
from scinet.model.backbone import Backbone
from scinet.model.network import Network
from scinet.options import DataOptions, Method, Options
from scinet.paths import cache_directory


@dataclass(frozen=True)
class Materials:
    """Shared by all runs on the same data, backbone and views."""

    card: DataCard
    backbone: Backbone
    views: Views
    data: DataOptions
    features: dict[str, Features] = field(default_factory=dict)
    bad: BadSamples = field(default_factory=BadSamples)

    def training(self, options: Options, share: Share) -> BatchSource:
        """Return the batches of the training split, with the views that the method trains on."""
        names = options.method.views
        if "train" in self.features:
            mask = Mask(options.data, self.card.training_positives)
            return FeatureBatches(self.features["train"], mask, names, share, options.seed)
        return ImageBatches(self.card, options.data, self.views, names, share, options.seed, bad=self.bad)

    def plain(self, split: str, *, masked_by: DataOptions | None = None, at_most: int | None = None) -> PlainSplit:
        """Return a split for evaluation.

        Args:
            split: its name.
            masked_by: how labels are hidden; without it all are observed.
            at_most: how many of its samples, evenly drawn; without it all.
        """
        size = self.card.split(split).num_samples
        return PlainSplit(
            self.card,
            split,
            self.views,
            self.features.get(split),
            options=self.data,
            mask=None if masked_by is None else Mask(masked_by, self.card.training_positives),
            bad=self.bad,
            stride=1 if at_most is None else -(-size // max(1, at_most)),
        )

    def network(self, options: Options) -> Network:
        """Return an untrained network of the configured head."""
        return Network(self.backbone, self.card.class_names, options.model, top_k=options.correlation.graph_top_k)

    def zero_shot(self, options: Options) -> Network:
        """Return the zero-shot classifier: an untrained network with the prompt head, whatever the configured one."""
        return self.network(replace(options, model=heads.untrained(options.model)))


def gather(
    options: Options,
    ranks: Ranks,
    progress: Callable[[str, int, int], None],
    accept: Callable[[Materials], None] = lambda _: None,
) -> Materials:
    """Load, and where needed compute, everything a run is made from. Collective.

    Args:
        options: the whole configuration.
        ranks: this process.
        progress: told how far a slow part is.
        accept: called once the towers are there, before anything slow; may refuse the run.

    Raises:
        ConfigError: if data or weights cannot be had.
        DataError: if a shard or an image is damaged.
    """
    card = sources.read_card(options.data)
    if options.method is not Method.zero_shot:
        share = share_of(options, ranks.rank, ranks.world_size)
        share.steps(card.split("train").num_samples)  # refused now rather than after minutes
    cache = cache_directory(options.data.cache_dir)
    backbone: Backbone = first_rank_first(lambda: model_backbone.load(options.model, cache), ranks)
    check_regions(options, backbone)
    backbone.image.to(ranks.device)
    backbone.text.to(ranks.device)
    views = Views(options.model.image_size, backbone.normalisation, smallest_crop=options.data.smallest_crop)
    materials = Materials(card, backbone, views, options.data)
    accept(materials)
    if options.data.cache_features:
        network = materials.network(options).to(ranks.device)
        for split in SPLITS:
            if split == "test" and not options.train.test_at_end:
                continue
            materials.features[split] = model_features.ensure(
                network,
                card,
                split,
                options,
                views,
                ranks,
                weights_sha256=backbone.weights_sha256,
                cache=cache,
                progress=lambda done, total, split=split: progress(f"features of {split}", done, total),  # type: ignore[misc]
            )
    return materials


def check_regions(options: Options, backbone: Backbone) -> None:
    """Check that the image tower shows regions where they are asked for.

    Raises:
        ConfigError: if it has none, or none where ZeRO 3 releases weights.
    """
    cached, head = options.data.cached_regions, options.model.head
    if cached and not backbone.image.shows_regions:
        raise ConfigError(
            f"'data.cached_regions' is {cached}, but the image tower of 'model.backbone={backbone.name}' shows no "
            "regions: leave it at 0, or set another backbone"
        )
    releases = options.deepspeed.get("zero_optimization", {}).get("stage") == 3 and not options.model.freeze_image
    if releases and head.needs_regions and regions.reads_late(backbone.image.trunk):
        raise ConfigError(
            f"'model.head={head.value}' projects the regions of 'model.backbone={backbone.name}' once the tower has "
            "run, when 'deepspeed.zero_optimization.stage=3' has released the projection: set stage 2, or another "
            "backbone"
        )
