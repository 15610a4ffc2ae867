"""The teacher is an exact float32 average of the student, and its state survives a checkpoint."""

import pytest
import torch
from torch import nn

from sim_hf.training.teacher import EMATeacher, momentum_for_steps


def make_student(value=1.0, dtype=torch.float32):
    student = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).to(dtype)
    fill(student, value)
    return student


def fill(student, value):
    with torch.no_grad():
        for tensor in (*student.parameters(), *student.buffers()):
            tensor.fill_(value)


def float_values(module):
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


def test_teacher_starts_as_an_exact_independent_copy():
    student = nn.Linear(3, 2)
    student.weight.grad = torch.ones_like(student.weight)
    teacher = EMATeacher(student)
    assert torch.equal(teacher.model.weight, student.weight)
    assert teacher.model.weight.grad is None
    fill(student, 5.0)
    assert not torch.equal(teacher.model.weight, student.weight)


def test_teacher_is_frozen_and_in_eval_mode_whatever_the_student_is():
    student = make_student().train()
    teacher = EMATeacher(student)
    assert student.training and not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not teacher(torch.ones(4, 3, requires_grad=True)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_ticks_equal_the_closed_form_for_every_student_dtype(dtype):
    student = make_student(1.0, dtype)
    teacher = EMATeacher(student, momentum=0.9999, warm_start=False)
    fill(student, 0.0)
    for _ in range(1000):
        teacher.tick(student)
    for value in float_values(teacher.model):
        assert value.dtype == torch.float32
        assert (value.double() - 0.9999**1000).abs().max() < 1e-6


def test_a_thousand_ticks_of_a_moving_bf16_student_equal_a_float64_average():
    student = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    teacher = EMATeacher(student, momentum=0.999)
    reference = student.weight.detach().double()
    for tick in range(1, 1001):
        with torch.no_grad():
            student.weight.add_(torch.randn_like(student.weight) * 0.01)
        teacher.tick(student)
        momentum = min(0.999, 1 - 1 / (tick + 1))
        reference = momentum * reference + (1 - momentum) * student.weight.detach().double()
    assert (teacher.model.weight.double() - reference).abs().max() < 1e-6


def test_warm_start_is_the_plain_mean_of_the_first_states():
    student = make_student(0.0)
    teacher = EMATeacher(student, momentum=0.9999)
    for value in (1.0, 2.0, 3.0):
        fill(student, value)
        teacher.tick(student)
    assert [teacher.momentum_at(tick) for tick in (1, 3, 10**6)] == [0.5, 0.75, 0.9999]
    assert all(torch.allclose(value, torch.tensor(1.5)) for value in float_values(teacher.model))
    assert teacher.num_ticks == 3


def test_integer_buffers_are_copied_and_float_buffers_averaged():
    student = make_student(0.0)
    teacher = EMATeacher(student)
    fill(student, 4.0)
    teacher.tick(student)
    assert teacher.model[1].num_batches_tracked.item() == 4
    assert torch.equal(teacher.model[1].running_var, torch.full((2,), 2.0))


def test_tick_leaves_the_student_alone():
    student = make_student(1.0)
    teacher = EMATeacher(student)
    fill(student, 3.0)
    before = [tensor.clone() for tensor in student.state_dict().values()]
    teacher.tick(student)
    assert all(torch.equal(a, b) for a, b in zip(before, student.state_dict().values(), strict=True))


def test_tied_parameters_stay_tied_and_move_once():
    student = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    student[1].weight = student[0].weight
    fill(student, 0.0)
    teacher = EMATeacher(student)
    fill(student, 1.0)
    teacher.tick(student)
    assert teacher.model[1].weight is teacher.model[0].weight
    assert torch.equal(teacher.model[0].weight, torch.full((2, 2), 0.5))


def test_wrapped_student_is_refused_with_advice_and_its_inner_model_works():
    student = make_student()
    teacher = EMATeacher(student)
    compiled = torch.compile(student, backend="eager")
    with pytest.raises(ValueError, match="unwrapped"):
        teacher.tick(compiled)
    assert teacher.num_ticks == 0
    teacher.tick(compiled._orig_mod)
    assert teacher.num_ticks == 1


def test_state_round_trip_continues_exactly():
    student = make_student(0.0)
    teacher = EMATeacher(student)
    for value in (1.0, 5.0):
        fill(student, value)
        teacher.tick(student)
    state = {key: value.clone() for key, value in teacher.state_dict().items()}
    assert all(type(value) is torch.Tensor for value in state.values())
    resumed = EMATeacher(make_student(9.0))
    resumed.load_state_dict(state)
    for one in (teacher, resumed):
        one.tick(student)
    assert resumed.num_ticks == teacher.num_ticks == 3
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), teacher.state_dict().values(), strict=True))


@pytest.mark.parametrize("fault", ["num_ticks", "model.0.weight", "surplus", "shape", "dtype"])
def test_states_that_do_not_fit_are_refused_and_change_nothing(fault):
    teacher = EMATeacher(make_student(1.0))
    state = dict(EMATeacher(make_student(2.0)).state_dict())
    if fault in state:
        del state[fault]
    elif fault == "surplus":
        state["model.9.weight"] = torch.zeros(1)
    elif fault == "shape":
        state["model.0.weight"] = torch.zeros(2, 4)
    else:
        state["model.0.weight"] = state["model.0.weight"].bfloat16()
    with pytest.raises(ValueError, match="teacher state"):
        teacher.load_state_dict(state)
    assert all((value == 1).all() for value in float_values(teacher.model))


@pytest.mark.parametrize(("steps", "expected"), [(90_000, 0.9999), (9000, 0.999), (900_000, 0.9999), (90, 0.9), (1, 0.9)])
def test_momentum_scales_with_the_length_of_the_run(steps, expected):
    assert momentum_for_steps(steps) == pytest.approx(expected, abs=1e-12)


def test_wrong_arguments_say_what_came():
    with pytest.raises(ValueError, match="momentum"):
        EMATeacher(nn.Linear(1, 1), momentum=1.0)
    with pytest.raises(ValueError, match="total_steps"):
        momentum_for_steps(0)
    with pytest.raises(ValueError, match="horizon_fraction"):
        momentum_for_steps(10, horizon_fraction=0)
