"""The fused classifier: a network's probabilities, and what the labels of the bank say beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scinet.fusion import evidence as terms_of
from scinet.fusion import weights as fusion_weights
from scinet.fusion.bank import Neighbours, blank
from scinet.fusion.evidence import CoCounts, Evidence, LabelStatistics, Reference

_DTYPES = {
    "rows.embeddings": torch.float16,
    "rows.observed": torch.int8,
    "rows.indices": torch.int64,
    "regions.observed": torch.int8,
    "regions.indices": torch.int64,
    "regions.regions": torch.float16,
    "regions.choice": torch.uint8,
}


@dataclass(frozen=True)
class FusedClassifier:
    """``logit Q = w_0 logit P + w_N N + w_L L + w_R R + b``.

    Attributes:
        reference: labelled samples.
        weights: [5] float64, in the order of ``weights.TERMS``.
        uses: which of N, L and R there are.
        names: of the samples of the bank [M].
    """

    reference: Reference
    weights: Tensor
    uses: tuple[bool, bool, bool]
    names: tuple[str, ...] = ()

    @property
    def num_regions(self) -> int:
        """R of the images that it keeps regions of."""
        return self.reference.regions.regions.shape[1]

    def to(self, device: torch.device) -> FusedClassifier:
        """Return it on a device."""
        return replace(self, reference=self.reference.to(device))

    def evidence(self, query: Neighbours, *, only_weighty: bool = False) -> Evidence:
        """Return the terms of rows that ask; a term that is not used is None.

        Args:
            query: with the probabilities as confidence, and the labels that are known of an image, if any.
            only_weighty: leave terms of weight 0 out.
        """
        instance, label, region = (
            is_used and (not only_weighty or bool(weight))
            for is_used, weight in zip(self.uses, self.weights[1:4].tolist(), strict=True)
        )
        return Evidence(
            terms_of.instance_evidence(self.reference.rows, query) if instance else None,
            terms_of.label_evidence(self.reference, query) if label else None,
            terms_of.region_evidence(self.reference.regions, query) if region and query.regions.shape[1] else None,
        )

    def log_odds(self, query: Neighbours) -> Tensor:
        """Return logit Q of rows that ask: [B, C] fp32."""
        cells = fusion_weights.features(query.confidence, self.evidence(query, only_weighty=True))
        return (cells @ self.weights.to(cells.device)).float()

    def probabilities(self, query: Neighbours) -> Tensor:
        """Return Q of rows that ask, a known label as it is: [B, C] fp32."""
        unified = torch.sigmoid(self.log_odds(query))
        return torch.where(query.observed == 0, unified, (query.observed > 0).to(unified.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file holds of it; embeddings in fp16."""
        rows, regions, labels = self.reference.rows, self.reference.regions, self.reference.labels
        held = {
            "rows.embeddings": rows.embeddings.half(),
            "rows.observed": rows.observed,
            "rows.indices": rows.indices,
            "regions.observed": regions.observed,
            "regions.indices": regions.indices,
            "regions.regions": regions.regions,
            "regions.choice": regions.choice,
            "label": torch.tensor([labels.shrinkage, labels.noise], dtype=torch.float64),
            "weights": self.weights,
            "uses": torch.tensor(self.uses),
            "names": torch.frombuffer(bytearray(json.dumps(self.names).encode()), dtype=torch.uint8),
        }
        # banks may share columns, which a file may not
        return {name: tensor.clone() for name, tensor in held.items()}


def from_tensors(tensors: dict[str, Tensor], *, num_classes: int) -> FusedClassifier:
    """Return the classifier that a file holds.

    Raises:
        ValueError: with the reason, if the tensors are no classifier of ``num_classes``.
    """
    try:
        known = {name: tensors[f"rows.{name}"] for name in ("embeddings", "observed", "indices")}
        shown = {name: tensors[f"regions.{name}"] for name in ("observed", "indices", "regions", "choice")}
        shrinkage, noise = tensors["label"].tolist()
        weights, (instance, label, region) = tensors["weights"].double(), tensors["uses"].tolist()
        names = json.loads(bytes(tensors["names"].tolist()))
    except KeyError as error:
        raise ValueError(f"no tensor {error}") from error
    except (TypeError, RecursionError) as error:
        raise ValueError(f"'label', 'uses' or 'names' is unreadable ({error})") from error
    width = known["embeddings"].shape[-1]
    side = shown["regions"].shape[1] if shown["regions"].ndim == 3 else 0
    expected = {
        "rows.embeddings": (known["embeddings"], (len(known["indices"]), width)),
        "rows.observed": (known["observed"], (len(known["indices"]), num_classes)),
        "regions.observed": (shown["observed"], (len(shown["indices"]), num_classes)),
        "regions.regions": (shown["regions"], (len(shown["indices"]), side, width)),
        "regions.choice": (shown["choice"], (len(shown["indices"]), num_classes if side else 0)),
        "weights": (weights, (len(fusion_weights.TERMS),)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"'{name}' has shape {list(tensor.shape)}, expected {list(shape)}")
    for name, dtype in _DTYPES.items():
        if tensors[name].dtype != dtype:
            raise ValueError(f"'{name}' is {tensors[name].dtype}, expected {dtype}")
    finite = (known["embeddings"], shown["regions"], weights, tensors["label"])
    if not (all(bool(tensor.isfinite().all()) for tensor in finite) and shrinkage >= 0 and noise > 0):
        raise ValueError("numbers out of range")
    if shown["choice"].numel() and int(shown["choice"].max()) >= max(1, side):
        raise ValueError(f"'regions.choice' names a region beyond the {side} that there are")
    rows = blank(len(known["indices"]), num_classes, width)._replace(**known)
    rows = rows._replace(embeddings=rows.embeddings.float())
    regions = blank(len(shown["indices"]), num_classes, width)._replace(**shown)
    counts = CoCounts.of(rows.observed if label else rows.observed[:, :0])
    reference = Reference(rows, regions, LabelStatistics(counts, shrinkage, noise))
    if not isinstance(names, list) or set(map(type, names)) - {str} or len(names) != len(known["indices"]):
        raise ValueError(f"'names' are not those of {len(known['indices'])} samples")
    return FusedClassifier(reference, weights, (bool(instance), bool(label), bool(region)), tuple(names))
