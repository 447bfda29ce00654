"""How SCINet's loss is put together from its parts, and the parts against plain loops in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from scinet import config
from scinet.data.batch import Batch
from scinet.distributed import Ranks
from scinet.fusion.bank import Neighbours, plain_rows
from scinet.fusion.confidence import Fusion
from scinet.fusion.thresholds import DynamicThresholds
from scinet.model.label_graph import propagation
from scinet.model.network import Output
from scinet.objective import Look, Objective, Phase, Step
from scinet.options import Options, Profile

CPU = torch.device("cpu")
B, C, D = 12, 5, 8
PARTS = {
    "medium_view_weight": "consistency_weak",
    "strong_view_weight": "consistency_medium",
    "distillation_weight": "distillation",
}


def _step(*overrides: str) -> Step:
    """The loss of a batch of random outputs, on which the student is sure of many classes."""
    generator = torch.Generator().manual_seed(0)
    options = config.load(None, [f"loss.hard_k={C}", *overrides])
    text = torch.eye(C)
    fusion = Fusion(options.fusion, options.correlation, text, width=D, num_samples=B, samples_per_epoch=B)
    thresholds = DynamicThresholds(C, hard_k=C, window=B, device=CPU)
    observed = torch.randint(-1, 2, (B, C), generator=generator).to(torch.int8)
    batch = Batch(
        inputs=torch.zeros(3 * B, 1),
        observed=observed,
        truth=observed,
        index=torch.arange(B),
        ids=tuple(map(str, range(B))),
        valid=torch.ones(B, dtype=torch.bool),
    )
    embeddings = torch.nn.functional.normalize(torch.randn(3 * B, D, generator=generator), dim=1)
    student = Output(4 * torch.randn(3 * B, C, generator=generator), embeddings)
    teacher = Output(torch.randn(B, C, generator=generator), embeddings[:B])
    aim = Objective(options, fusion, thresholds, Ranks(0, 1, CPU))
    look = aim.look([batch], lambda _: teacher, lambda _: student, has_gaps=False)
    return aim(student, batch, Phase(is_warm=True, epoch=3), float(B), look)


def test_loss_is_the_supervised_part_and_the_weighted_rest() -> None:
    step = _step("loss.unlabelled_weight=0.5", "loss.medium_view_weight=2", "loss.strong_view_weight=3")
    parts = step.parts
    rest = 2 * parts["consistency_weak"] + 3 * parts["consistency_medium"] + parts["distillation"]
    assert all(value > 0 for value in parts.values())
    assert step.loss.item() == pytest.approx((parts["supervised"] + 0.5 * rest).item())


@pytest.mark.parametrize(("weight", "part"), PARTS.items())
def test_part_of_a_view_counts_for_nothing_when_its_weight_is_zero(weight: str, part: str) -> None:
    whole, without = _step(), _step(f"loss.{weight}=0")
    assert whole.parts[part] > 0
    assert without.loss.item() == pytest.approx((whole.loss - 0.125 * whole.parts[part]).item())


class _Scene(NamedTuple):
    """Two micro-batches of a step, the second with rows that hold no sample, and what the networks say of them."""

    aim: Objective
    options: Options
    batches: list[Batch]
    students: list[Output]
    views: list[Output]  # the teacher's answer to the weak, medium and strong view of both micro-batches
    look: Look

    def step(self, place: int, phase: Phase, size: float = 7.0) -> Step:
        return self.aim(self.students[place], self.batches[place], phase, size, self.look, place)


def _scene(*overrides: str) -> _Scene:
    """Every option that counts is another than its default; thresholds and rates are those of samples seen before."""
    generator = torch.Generator().manual_seed(0)
    given = [
        *("loss.hard_k=3", "loss.focal_gamma=1.5", "loss.margin=0.6", "loss.soft_target_weight=0.7"),
        *("loss.assumed_soft_weight=0.3", "loss.assumed_negative_weight=0.15", "correlation.graph_top_k=2"),
        *("correlation.temperature=0.4", "loss.distillation_weight=3", "fusion.momentum=0.6"),
        "model.bi_dominant=none",
        "fusion.weights=fixed",
    ]
    options = config.load(None, [*given, *overrides])
    text = torch.corrcoef(torch.randn(C, 9, generator=generator))
    fusion = Fusion(options.fusion, options.correlation, text, width=D, num_samples=99, samples_per_epoch=99)
    thresholds = DynamicThresholds(C, hard_k=options.loss.hard_k, window=30, device=CPU)

    def outputs(size: int, scale: float) -> Output:
        embeddings = torch.nn.functional.normalize(torch.randn(size, D, generator=generator), dim=1)
        return Output(scale * torch.randn(size, C, generator=generator), embeddings)

    past = torch.randint(-1, 2, (30, C), generator=generator).to(torch.int8)
    past[:, 1].clamp_(min=0)  # a class of which positives alone are known
    seen = outputs(30, 1.0)
    fusion.update(plain_rows(seen.embeddings, past, torch.sigmoid(seen.logits), torch.arange(40, 70)))
    thresholds.update(torch.rand(30, C, generator=generator) < torch.linspace(0.05, 0.9, C))
    batches, students = [], []
    for number, size in enumerate((6, 4)):
        observed = torch.randint(-1, 2, (size, C), generator=generator).to(torch.int8)
        observed[:, 1].clamp_(min=0)
        valid = torch.ones(size, dtype=torch.bool)
        valid[2:] = number == 0
        batch = Batch(
            inputs=torch.arange(3.0).repeat_interleave(size)[:, None] + 10 * number,
            observed=torch.where(valid[:, None], observed, 0),
            truth=observed,
            index=torch.where(valid, 10 * number + torch.arange(size), -1),
            ids=tuple(map(str, range(size))),
            valid=valid,
        )
        batches.append(batch)
        student = outputs(3 * size, 2.0)
        student.logits[:: size + 1] -= 6  # one image a view, another each time, of which no class passes
        students.append(Output(*(x.requires_grad_() for x in student[:2])))
    views = [outputs(len(batches[number // 3].observed), 1.0) for number in range(6)]
    aim = Objective(options, fusion, thresholds, Ranks(0, 1, CPU))

    def teacher(inputs: Tensor) -> Output:
        number, view = divmod(int(inputs[0]), 10)
        return views[3 * number + view]

    look = aim.look(batches, teacher, lambda _: pytest.fail("the student is not asked"), has_gaps=True)
    return _Scene(aim, options, batches, students, views, look)


def _probability(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def _cross_entropy(logit: float, target: float) -> float:
    return -target * math.log(_probability(logit)) - (1 - target) * math.log(_probability(-logit))


def _expected(scene: _Scene, place: int, unified: Tensor, phase: Phase) -> dict[str, float]:
    """The parts of a micro-batch's loss, sums over its samples and all classes."""
    loss, batch = scene.options.loss, scene.batches[place]
    thresholds = scene.aim.thresholds.thresholds().tolist()
    lacking = scene.aim.fusion.correlation.lacks_negatives().tolist()
    weak, medium, strong = (view.tolist() for view in scene.students[place].logits.detach().double().chunk(3))
    parts = dict.fromkeys(("supervised", *PARTS.values()), 0.0)

    def pseudo(logits: list[float], known: list[int]) -> tuple[list[float], bool]:
        top = sorted(range(C), key=lambda c: -logits[c])[: loss.hard_k]
        passed = [c in top and _probability(logits[c]) >= thresholds[c] for c in range(C)]
        return [float(passed[c] if known[c] == 0 else known[c] > 0) for c in range(C)], any(passed)

    for i, known in enumerate(batch.observed.tolist()):
        if not batch.valid[i]:
            continue
        (weak_labels, weak_holds), (medium_labels, medium_holds) = pseudo(weak[i], known), pseudo(medium[i], known)
        for c in range(C):
            q, z = unified[i, c].item(), weak[i][c]
            if known[c]:
                target, weight = float(known[c] > 0), 1.0
            elif scene.options.profile is Profile.release:
                target, weight = float(_probability(z) > 0.6 and phase.epoch > 0), 1.0
            else:
                weight = 0.7 * abs(2 * q - 1) * phase.is_warm * (0.3 if lacking[c] else 1.0)
                down = 0.15 if lacking[c] else 0.0
                target = q * weight / (weight + down) if lacking[c] else q
                weight += down
            positive, negative = _probability(z - 0.6), _probability(z)
            parts["supervised"] -= weight * target * (1 - positive) ** 1.5 * math.log(positive)
            parts["supervised"] -= weight * (1 - target) * negative**1.5 * math.log(1 - negative)
            if phase.is_warm:
                parts["consistency_weak"] += weak_holds * _cross_entropy(medium[i][c], weak_labels[c])
                parts["consistency_medium"] += medium_holds * _cross_entropy(strong[i][c], medium_labels[c])
                parts["distillation"] += medium_holds * _cross_entropy(strong[i][c], q)
    return parts


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "phase", [Phase(is_warm=False, epoch=0), Phase(is_warm=True, epoch=0), Phase(True, 2)], ids=str
)
@pytest.mark.parametrize("profile", ["paper", "release"])
def test_parts_equal_the_plain_loops_when_rows_are_missing_and_a_class_lacks_negatives(
    profile: str, phase: Phase, place: int
) -> None:
    scene = _scene(f"profile={profile}")
    step = scene.step(place, phase)
    assert step.confidence is not None
    expected = _expected(scene, place, step.confidence.unified, phase)
    assert {name: 7 * part.item() for name, part in step.parts.items()} == pytest.approx(expected, rel=1e-4)
    rest = sum(expected[name] * weight for name, weight in zip(PARTS.values(), (1, 1, 3), strict=True))
    assert step.loss.item() == pytest.approx((expected["supervised"] + 0.125 * rest) / 7, rel=1e-4)
    weak, medium, _ = torch.sigmoid(scene.students[place].logits).chunk(3)
    for view, row in ((weak, 0), (medium, 1)):
        assert (view[row] < scene.aim.thresholds.thresholds()).all()


def test_confidence_is_the_fusions_of_the_medium_view_when_all_samples_of_the_step_are_neighbours() -> None:
    scene = _scene()
    everyone = [
        plain_rows(view.embeddings, batch.observed, torch.sigmoid(view.logits), batch.index)
        for view, batch in zip(scene.views[1::3], scene.batches, strict=True)
    ]
    joined = Neighbours(*(torch.cat(columns)[:8] for columns in zip(*everyone, strict=True)))
    for place in range(2):
        confidence = scene.step(place, Phase(is_warm=True, epoch=1)).confidence
        assert confidence is not None
        expected = scene.aim.fusion.combine(everyone[place], everyone[place].confidence, joined)
        torch.testing.assert_close(confidence.unified, expected.unified)


def test_confidence_spreads_the_strong_views_probabilities_over_the_graph_when_as_released() -> None:
    scene = _scene("profile=release")
    confidence = scene.step(0, Phase(is_warm=True, epoch=1)).confidence
    assert confidence is not None
    probabilities = torch.sigmoid(scene.views[2].logits)
    graph = propagation(scene.aim.fusion.correlation.shrunk(), 2, 0.4)
    expected = [[sum(graph[c, d] * row[d] for d in range(C)).item() for c in range(C)] for row in probabilities]
    torch.testing.assert_close(confidence.unified, torch.tensor(expected))


def test_state_takes_the_samples_with_their_answers_when_updated() -> None:
    scene, phase = _scene(), Phase(is_warm=True, epoch=1)
    steps = [scene.step(place, phase) for place in range(2)]
    before = int(scene.aim.thresholds.state_dict()["place"][1])
    scene.aim.update(scene.look, phase)
    is_sample = torch.cat([batch.valid for batch in scene.batches])
    unified = torch.cat([step.confidence.unified for step in steps if step.confidence is not None])[is_sample]
    passed = torch.cat([step.pseudo.positive for step in steps if step.pseudo is not None])
    assert passed[is_sample].any()
    assert not passed[~is_sample].any()
    state = scene.aim.fusion.state_dict()
    index = torch.cat([batch.index for batch in scene.batches])[is_sample]
    assert torch.equal(scene.aim.fusion.bank.rows().indices[-8:], index)
    assert torch.equal(state["memory"][index], unified)
    thresholds = scene.aim.thresholds.state_dict()
    assert int(thresholds["place"][1]) == before + 8
    assert torch.equal(thresholds["ring"][:8], passed[is_sample])


def test_gradient_flows_through_the_medium_embeddings_alone_when_the_fusion_is_differentiable() -> None:
    for weight, flows in (("0", False), ("3", True)):
        scene = _scene("fusion.differentiable=true", f"loss.distillation_weight={weight}", "fusion.momentum=0")
        step = scene.step(0, Phase(is_warm=True, epoch=1))
        student = scene.students[0]
        logits, embeddings = torch.autograd.grad(
            step.loss, [student.logits, student.embeddings], allow_unused=True, materialize_grads=True
        )
        assert logits.abs().sum() > 0
        weak, medium, strong = (part.abs().sum().item() for part in embeddings.chunk(3))
        assert (medium > 0) == flows
        assert weak == strong == 0
