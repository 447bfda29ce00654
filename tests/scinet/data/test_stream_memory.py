"""A stream of many samples and many classes holds its windows and nothing else."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from scinet.data import card as data_card
from scinet.data.card import Missing, Shard, Split

ROOT = Path(__file__).resolve().parents[3]
NUM_CLASSES = 9605
SHARD_SAMPLES = 2000
# 100 shards under names of their own, one file: 200,000 samples. A million (500 shards) took 127 s on a busy core, and
# 554 MiB at its end as at 100,000, most of it torch.
NUM_SHARDS = 100

_READER = """
import sys
from pathlib import Path
from scinet.data import card as data_card
from scinet.data.stream import Order, SampleStream
card = data_card.read(Path(sys.argv[1]))
stream = SampleStream(card, "train", Order(0, 0, lanes=16, shuffle_window=512), rank=0, world_size=1)
seen, marks = 0, {}
for sample in stream:
    assert len(sample.positives) == 12
    seen += 1
    if seen in (40_000, 200_000):
        # not getrusage: its peak outlives exec and would be that of the process that runs the tests
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        marks[seen] = int(status["VmHWM"].split()[0]) // 1024
print(seen, *marks.values())
"""


def _shard(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(SHARD_SAMPLES):
            classes = [(number * 31 + k * 797) % NUM_CLASSES for k in range(52)]
            labels = {"id": str(number), "index": number, "positives": classes[:12], "negatives": classes[12:]}
            for extension, content in (("jpg", bytes(3000)), ("json", json.dumps(labels).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.timeout(300)
def test_memory_does_not_grow_when_a_split_of_many_classes_is_streamed(tmp_path: Path) -> None:
    _shard(tmp_path / "0.tar")
    shards = []
    for number in range(NUM_SHARDS):
        if number:
            os.link(tmp_path / "0.tar", tmp_path / f"{number}.tar")
        shards.append(Shard(f"{number}.tar", SHARD_SAMPLES, (tmp_path / "0.tar").stat().st_size, ""))
    nothing = (0,) * NUM_CLASSES
    split = Split(NUM_SHARDS * SHARD_SAMPLES, nothing, nothing, tuple(shards))
    names = [f"class {number}" for number in range(NUM_CLASSES)]
    data_card.write(
        tmp_path,
        name="many",
        class_names=names,
        splits={"train": split},
        source={},
        num_indices=split.num_samples,
        missing=Missing(),
    )
    done = subprocess.run(
        [sys.executable, "-c", _READER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seen, early, late = map(int, done.stdout.split())
    assert seen == NUM_SHARDS * SHARD_SAMPLES
    assert late - early < 16, "MiB; the labels alone would take 1.8 GiB dense"
    assert late < 1024
