"""The label graph: what a row keeps, and what the graph adds to the text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scinet.model.label_graph import LabelGraph, adjacency, propagation, text_correlation


def _move_last(layer: LabelGraph) -> None:
    """Let the graph do something: its last layer starts at zero."""
    with torch.no_grad():
        list(layer.parameters())[-1].normal_()


def _correlation(size: int, seed: int) -> Tensor:
    matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return ((matrix + matrix.T) / 2).fill_diagonal_(1.0)


@settings(deadline=None, max_examples=25)
@given(size=st.integers(1, 12), top_k=st.integers(1, 15), seed=st.integers(0, 99))
def test_rows_keep_the_strongest_positive_entries_when_adjacent(size: int, top_k: int, seed: int) -> None:
    correlation = _correlation(size, seed)
    graph = adjacency(correlation, top_k)
    for a in range(size):
        positive = {b: correlation[a, b].item() for b in range(size) if b != a and correlation[a, b] > 0}
        kept = sorted(positive, key=lambda b: -positive[b])[:top_k]
        total = sum(positive[b] for b in kept)
        expected = [0.2 * positive[b] / total if b in kept else 0.0 for b in range(size)]
        expected[a] = 0.8
        assert graph[a].tolist() == pytest.approx(expected, abs=1e-6)


def test_row_keeps_only_itself_when_nothing_correlates() -> None:
    graph = adjacency(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), 5)
    torch.testing.assert_close(graph, 0.8 * torch.eye(2))


def test_input_is_left_alone_when_the_adjacency_is_formed() -> None:
    correlation = _correlation(4, 0)
    before = correlation.clone()
    adjacency(correlation, 2)
    assert torch.equal(correlation, before)


@settings(deadline=None, max_examples=25)
@given(size=st.integers(1, 12), top_k=st.integers(1, 15), seed=st.integers(0, 99), temperature=st.floats(0.01, 10))
def test_rows_sum_to_one_over_the_kept_entries_when_propagated(
    size: int, top_k: int, seed: int, temperature: float
) -> None:
    graph, weights = (
        adjacency(_correlation(size, seed), top_k),
        propagation(_correlation(size, seed), top_k, temperature),
    )
    torch.testing.assert_close(weights.sum(1), torch.ones(size))
    assert (weights[graph == 0] == 0).all()
    assert (weights.argmax(1) == torch.arange(size)).all()
    assert weights.isfinite().all()


def test_weights_follow_the_softmax_when_there_are_two_entries() -> None:
    weights = propagation(torch.tensor([[1.0, 0.4], [0.4, 1.0]]), 1, 0.3)
    expected = torch.softmax(torch.tensor([0.8, 0.2]) / 0.3, dim=0)
    torch.testing.assert_close(weights[0], expected)


def test_text_correlation_is_pearson_over_the_coordinates() -> None:
    text = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = text - text.mean(1, keepdim=True)
    expected = rows @ rows.T / rows.norm(dim=1)[:, None] / rows.norm(dim=1)
    torch.testing.assert_close(text_correlation(text), expected)
    torch.testing.assert_close(text_correlation(3 * text + 5), expected, atol=1e-5, rtol=1e-5)


def test_text_correlation_is_a_matrix_when_there_is_one_class() -> None:
    assert text_correlation(torch.randn(1, 5)).shape == (1, 1)


def test_graph_adds_nothing_when_training_begins() -> None:
    text = torch.randn(4, 8)
    torch.testing.assert_close(LabelGraph(8)(text, adjacency(_correlation(4, 0), 2)), text)


def test_every_layer_gets_a_gradient_when_the_last_has_moved() -> None:
    layer = LabelGraph(8)
    _move_last(layer)
    text, graph = torch.randn(4, 8), adjacency(_correlation(4, 0), 2)
    informed = layer(text, graph)
    assert informed.shape == text.shape
    assert not torch.allclose(informed, text)
    informed.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in layer.parameters())


def test_text_is_informed_as_by_the_plain_loop_when_all_layers_have_moved() -> None:
    layer = LabelGraph(4).double()
    _move_last(layer)
    text = torch.randn(3, 4, dtype=torch.float64)
    graph = torch.tensor([[0.8, 0.15, 0.05], [0.0, 0.8, 0.2], [0.1, 0.0, 0.8]], dtype=torch.float64)
    weights = [weight.detach() for weight in layer.parameters()]
    assert [tuple(weight.shape) for weight in weights] == [(8, 4), (8, 8), (4, 8)]
    rows = list(text)
    for number, weight in enumerate(weights):
        rows = [sum(graph[a, b] * (weight @ rows[b]) for b in range(3)) for a in range(3)]
        if number < 2:
            rows = [torch.where(row > 0, row, 0.2 * row) for row in rows]
    torch.testing.assert_close(layer(text, graph).detach(), text + torch.stack(rows))


def test_classes_stay_apart_when_the_graph_has_no_edge() -> None:
    layer = LabelGraph(8)
    _move_last(layer)
    text = torch.randn(3, 8)
    changed = text.clone()
    changed[2] += 1
    before, after = (layer(rows, 0.8 * torch.eye(3)) for rows in (text, changed))
    torch.testing.assert_close(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])
