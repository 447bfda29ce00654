"""What is put off is not imported by eager code, and is there as soon as it is asked for."""

from __future__ import annotations

import subprocess
import sys

_EAGER_THEN_COMPILED = """
import sys
from scinet import deferred_imports
deferred_imports.defer()
deferred_imports.defer()
import torch, torchvision
from torchvision.transforms import v2
weight = torch.nn.Parameter(torch.ones(2))
for optimiser in (torch.optim.AdamW([weight]), torch.optim.SGD([weight], lr=0.1)):
    optimiser.zero_grad()
    weight.square().sum().backward()
    optimiser.step()
v2.RandAugment()(torch.zeros(3, 8, 8, dtype=torch.uint8))
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.distributed.destroy_process_group()
late = ("torch._dynamo.symbolic_convert", "torchvision.models.resnet", "torchvision.datasets.mnist")
assert not set(late) & set(sys.modules), set(late) & set(sys.modules)

assert torchvision.models.resnet18 is sys.modules["torchvision.models.resnet"].resnet18
assert torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0, 2, 2]])], 1).shape == (1, 1, 1, 1)
compiled = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)
assert compiled(torch.ones(1)).item() == 2
assert "torch._dynamo.symbolic_convert" in sys.modules
import torch._dynamo.utils
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
assert torch._dynamo.utils.__file__
"""


def test_deferred_modules_are_imported_when_they_are_used_and_not_before() -> None:
    done = subprocess.run([sys.executable, "-c", _EAGER_THEN_COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
