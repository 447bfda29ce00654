"""Which samples of each global batch a rank gets; arithmetic, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from scinet.errors import ConfigError
from scinet.options import LastBatch, Options


@dataclass(frozen=True)
class Share:
    """Which part of each global batch a rank gets: every ``world_size``-th sample, in ``accumulation`` parts.

    ``trains_last``: whether the short rest of an epoch is a global batch too.
    """

    rank: int
    world_size: int
    global_batch_size: int
    accumulation: int
    trains_last: bool = False

    def __post_init__(self) -> None:
        """Check that the global batch divides.

        Raises:
            ConfigError: with the arithmetic, if it does not.
        """
        parts = self.parts
        if self.global_batch_size % parts:
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size} does not divide over {self.world_size} ranks x "
                f"{self.accumulation} accumulation steps: set it to a multiple of {parts}"
            )

    @property
    def parts(self) -> int:
        """Micro-batches of a global batch."""
        return self.world_size * self.accumulation

    @property
    def micro_batch_size(self) -> int:
        """B, samples a rank sees at once."""
        return self.global_batch_size // self.parts

    def steps(self, num_samples: int) -> int:
        """Return the global batches in a pass; a short rest that is dropped is left to the next epoch's order.

        Raises:
            ConfigError: if there is none.
        """
        if self.trains_last:
            return -(-num_samples // self.global_batch_size)
        if num_samples < self.global_batch_size:
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size} is more than the {num_samples} training samples: "
                f"set at most {num_samples // self.parts * self.parts or self.parts}, or train.last_batch=train"
            )
        return num_samples // self.global_batch_size

    def length(self, num_samples: int) -> int:
        """Return the samples that a pass trains on."""
        return min(num_samples, self.steps(num_samples) * self.global_batch_size)


def share_of(options: Options, rank: int, world_size: int) -> Share:
    """Return a rank's share of the global batches.

    Raises:
        ConfigError: with the arithmetic, if they do not divide.
    """
    train = options.train
    return Share(
        rank,
        world_size,
        train.global_batch_size,
        train.accumulation_steps,
        trains_last=train.last_batch is LastBatch.train,
    )
