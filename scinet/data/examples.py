"""A stored sample to what a batch is made of: drawn views, and the cells that the collection and the mask show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scinet.data import mask_file
from scinet.data.masks import UNKNOWN, annotated, class_ratios, observe
from scinet.data.stream import StoredSample
from scinet.data.views import SHARD_FORMATS, Drawn, Views, decode
from scinet.options import DataOptions

Cells = tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]
"""Places [P] and signs [P] of a sample's labels."""


class Mask:
    """The label mask of a run, applied to one sample at a time."""

    def __init__(self, options: DataOptions, num_positives: Sequence[int]) -> None:
        """Take how labels are hidden and flipped, or the file that says which are known.

        Args:
            options: of the data.
            num_positives: [C], known positives of the training split, by which ``annotated_classes`` chooses.
        """
        self._options = options
        self._table = mask_file.load(Path(options.mask_file)) if options.mask_file else None
        spread, seed = options.class_ratio_spread, options.mask_seed
        self.is_annotated = annotated(options.annotated_classes, num_positives)
        self.class_ratios = class_ratios(options.known_ratio, len(num_positives), spread=spread, seed=seed)

    def __call__(self, truth: npt.NDArray[np.int8], sample_id: str) -> npt.NDArray[np.int8]:
        """Return observed [C] int8 from truth [C] int8."""
        options = self._options
        if self._table is not None:
            return self._table.observe(sample_id)
        return observe(
            np.where(self.is_annotated, truth, UNKNOWN),
            sample_id,
            known_ratio=self.class_ratios,
            seed=options.mask_seed,
            single_positive=options.single_positive,
            flipped=options.flipped_labels,
        )

    def of_any_split(self, truth: npt.NDArray[np.int8], sample_id: str) -> npt.NDArray[np.int8]:
        """Return observed [C] int8 of a sample that need not be of the training split: a mask file may not have it."""
        if self._table is not None and self._table.find(sample_id) is None:
            return truth
        return self(truth, sample_id)


@dataclass(frozen=True)
class Example:
    """A decoded sample; labels are the places and signs [P] of its known and of its observed cells, int32 and int8."""

    drawn: Drawn
    known: Cells
    observed: Cells
    index: int
    sample_id: str


@dataclass(frozen=True)
class Decoder:
    """Sample to views; a class rather than a closure so that loader processes can receive it."""

    views: Views
    view_names: tuple[str, ...]
    mask: Mask
    seed: int
    epoch: int

    def __call__(self, sample: StoredSample) -> Example:
        """Decode the image once and draw its views.

        Raises:
            DataError: naming the sample, if its image cannot be decoded or a mask file lacks it.
        """
        enough = self.views.enough_pixels
        image = decode(sample.image, sample.where, formats=SHARD_FORMATS, enough_pixels=enough)
        drawn = self.views.draw(image, self.view_names, seed=self.seed, epoch=self.epoch, sample_id=sample.sample_id)
        truth = sample.truth
        observed = self.mask(truth, sample.sample_id)
        return Example(drawn, _sparse(truth), _sparse(observed), sample.index, sample.sample_id)


def _sparse(labels: npt.NDArray[np.int8]) -> Cells:
    places = np.flatnonzero(labels).astype(np.int32)
    return places, labels[places]
