"""Memory is given again only when nothing refers to it."""

from __future__ import annotations

import torch

from scinet.data.buffers import Buffers


def test_memory_is_given_again_when_its_batch_is_gone() -> None:
    buffers = Buffers()
    first = buffers.take(2, 3)
    address = first.data_ptr()
    del first
    assert buffers.take(2, 3).data_ptr() == address
    assert buffers.take(2, 4).shape == (2, 4)


def test_memory_is_left_alone_while_anything_refers_to_it() -> None:
    buffers = Buffers()
    weight = torch.ones(3, requires_grad=True)
    batch = buffers.take(2, 3).fill_(7)
    # a slice, and what autograd keeps for the backward pass
    part, product = batch.flatten()[:1], (batch * weight).sum()
    address = batch.data_ptr()
    del batch
    for _ in range(5):
        assert buffers.take(2, 3).fill_(1).data_ptr() != address
    product.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [14, 14, 14]
    assert part.item() == 7
    del part, product


def test_batches_that_are_all_kept_all_stay_as_they_are() -> None:
    buffers = Buffers()
    kept = [buffers.take(4).fill_(number) for number in range(20)]
    assert [batch[0].item() for batch in kept] == list(range(20))
    assert len({batch.data_ptr() for batch in kept}) == 20
