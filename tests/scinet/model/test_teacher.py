"""The teacher follows the student, faster at first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from scinet.model.network import Network
from scinet.model.teacher import Teacher
from scinet.options import ModelOptions
from tests.scinet.model.conftest import MakeBackbone


@pytest.fixture
def student(make_backbone: MakeBackbone) -> Network:
    return Network(make_backbone(), ("cat", "dog"), ModelOptions(), top_k=1)


def _set(network: nn.Module, value: float) -> None:
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(value)


def _value(teacher: Teacher) -> float:
    values = torch.cat([weight.flatten() for weight in teacher.network.parameters()])
    assert values.max() - values.min() < 1e-5
    return values.mean().item()


def test_teacher_equals_the_student_when_made(student: Network) -> None:
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(Teacher(student, decay=0.9).forward(images).logits, student.eval()(images).logits)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
def test_weights_follow_the_formula_when_updated(student: Network, decay: float) -> None:
    _set(student, 0.0)
    teacher, expected = Teacher(student, decay=decay), 0.0
    for step in range(1, 30):
        _set(student, float(step))
        teacher.update(student)
        kept = min(decay, step / (step + 10))
        expected = kept * expected + (1 - kept) * step
        assert _value(teacher) == pytest.approx(expected, rel=1e-4)


def test_first_steps_forget_faster_when_the_decay_is_high(student: Network) -> None:
    _set(student, 0.0)
    teacher = Teacher(student, decay=0.999)
    _set(student, 1.0)
    teacher.update(student)
    assert _value(teacher) == pytest.approx(10 / 11, rel=1e-4)


def test_decay_is_the_given_one_when_many_steps_were_made(student: Network) -> None:
    teacher = Teacher(student, decay=0.8)
    for _ in range(60):
        teacher.update(student)
    _set(student, 0.0)
    _set(teacher.network, 1.0)
    teacher.update(student)
    assert _value(teacher) == pytest.approx(0.8, rel=1e-4)


def test_teacher_never_trains_when_the_student_does(student: Network) -> None:
    teacher = Teacher(student, decay=0.9)
    assert not any(weight.requires_grad for weight in teacher.network.parameters())
    assert not any(part.training for part in teacher.network.modules())
    assert not teacher.forward(torch.randn(2, 3, 8, 8)).logits.requires_grad
    assert any(weight.requires_grad for weight in student.parameters())


def test_teacher_stays_in_fp32_when_the_student_is_in_bf16(student: Network) -> None:
    student.to(torch.bfloat16)
    teacher = Teacher(student, decay=0.9)
    teacher.update(student)
    assert {weight.dtype for weight in teacher.network.parameters()} == {torch.float32}


def test_buffers_are_the_students_when_updated(student: Network) -> None:
    teacher = Teacher(student, decay=0.9)
    student.get_buffer("graph").fill_(0.25)
    teacher.update(student)
    assert (teacher.network.get_buffer("graph") == 0.25).all()


def test_student_is_left_alone_when_the_teacher_is_updated(student: Network) -> None:
    teacher = Teacher(student, decay=0.5)
    _set(teacher.network, 9.0)
    before = copy.deepcopy(student.state_dict())
    teacher.update(student)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_teacher_goes_on_equally_when_its_state_was_saved(student: Network) -> None:
    first, second = (Teacher(student, decay=0.9) for _ in range(2))
    _set(student, 1.0)
    for _ in range(5):
        first.update(student)
    second.network.load_state_dict(copy.deepcopy(first.network.state_dict()))
    second.steps = first.steps
    _set(student, 2.0)
    for teacher in (first, second):
        teacher.update(student)
    for mine, theirs in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
