"""Two ranks on the CPU are one process with the joint batch, and they stay in step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from worker_two_processes import sim_trainer

from factories import make_arguments, save_tiny_condinst, save_tiny_model, write_shapes
from sim_hf.data import StepSampler
from sim_hf.models.sim import SIMForInstanceSegmentation
from sim_hf.training.state_files import load_state
from sim_hf.training.trainer import Trainer

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "scripts" / "train.py"
TIMEOUT = 1500  # of a hang, which the process group would let last 30 minutes; most of it is for a busy machine


def launch_two(*command):
    """Run a script on two ranks; gloo, one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, *map(str, command)], env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, models and the results of the two ranks of worker_two_processes.py."""
    folder = write_shapes(tmp_path_factory.mktemp("two"))
    save_tiny_model(folder / "model")
    save_tiny_model(folder / "moving", freeze_batch_norm=False)
    save_tiny_model(folder / "swin", "swin")
    launch_two(HERE / "worker_two_processes.py", folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(folder):
    """One process with the joint batch, trained and evaluated."""
    trainer = sim_trainer(folder, folder / "out_alone", batch_size=2)
    trainer.train()
    metrics = trainer.evaluate()
    AcceleratorState._reset_state(True)
    return trainer, metrics


@pytest.fixture(scope="module")
def sharded(folder):
    """What each of two ranks has after the runs of worker_fsdp.py."""
    launch_two(HERE / "worker_fsdp.py", folder)
    return [torch.load(folder / f"fsdp{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("save_model", [save_tiny_model, pytest.param(save_tiny_condinst, marks=pytest.mark.e2e)])
def test_two_ranks_of_the_command_equal_one_process_with_the_joint_batch(save_model, tmp_path):
    """Most images are empty: in some step one rank has no object at all, and must not make the other one wait for ever."""
    data = write_shapes(tmp_path / "data", empty=(0, 1, 2, 4, 6))
    model = save_model(tmp_path / "model")
    orders = [iter(StepSampler(8, 2, seed=0, num_replicas=2, rank=rank)) for rank in (0, 1)]
    with_objects = {3, 5, 7}
    steps = [[any(index in with_objects for _, index in next(order)) for order in orders] for _ in range(3)]
    assert [True, False] in steps or [False, True] in steps

    options = {"supervision": "sim", "max_steps": 3, "learning_rate": 1e-4, "eval_limit": 3}
    options |= {"second_phase": 0.67, "paste_probability": 0.5}
    flags = {"data": data, "model": model, "output_dir": tmp_path / "two", "batch_size": 2, "report_to": "none", **options}
    flags |= {"pseudo_start": 0, "lr_warmup": 0, "num_prototypes": 3, "scale_min": 0.9, "scale_max": 1.1, "log_every": 1}
    flags |= {"eval_every": 0, "checkpoint_every": 0, "mixed_precision": "no"}
    launch_two(SCRIPT, *(part for name, value in flags.items() for part in (f"--{name}", value)))
    two = load_state(tmp_path / "two" / "checkpoints" / "step-00000003" / "training")

    trainer = Trainer(make_arguments(data, model, tmp_path / "one", batch_size=4, **options))
    trainer.train()
    one = trainer.resumer._state()
    for name, tensor in one["model"].items():
        if "input_projections" in name and name.endswith(".0.bias"):
            continue  # before a norm with one channel a group: its gradient is rounding noise, which Adam blows up
        torch.testing.assert_close(two["model"][name], tensor, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert two["step"]["teacher"]["num_ticks"] == 3
    assert two["step"]["global_step"] == 3
    lines = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("two", "one")]
    for line, expected in zip(*lines, strict=True):  # of all ranks, not of the first
        for name in [name for name in expected if name.startswith("loss") or name == "gradient_norm"]:
            assert line[name] == pytest.approx(expected[name], rel=1e-4), name
    assert (tmp_path / "two" / "results.json").is_file()


def test_two_ranks_of_sim_trainer_equal_one_process(ranks, alone):
    trainer, _ = alone
    for name, tensor in trainer.student.state_dict().items():
        torch.testing.assert_close(ranks[0]["weights"][name], tensor, rtol=0, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
    state = trainer.step.training_state()
    for name, tensor in state["criterion"].items():
        torch.testing.assert_close(ranks[0]["training_state"]["criterion"][name], tensor, rtol=0, atol=1e-4)
    bank, expected = ranks[0]["training_state"]["memory_bank"], state["memory_bank"]
    assert torch.equal(bank["image_keys"], expected["image_keys"])
    for line, single in zip(ranks[0]["history"][:3], trainer.state.log_history[:3], strict=True):
        for name in ("loss", "grad_norm", "loss_projection", "loss_cross_entropy", "loss_pseudo_mask", "loss_paste"):
            assert line[name] == pytest.approx(single[name], rel=1e-3, abs=1e-4), name


def test_both_ranks_have_the_same_weights_prototypes_teacher_and_memory_bank(ranks):
    assert_equal_tensors(ranks[1]["weights"], ranks[0]["weights"])
    for part in ("criterion", "teacher", "memory_bank"):
        assert_equal_tensors(ranks[1]["training_state"][part], ranks[0]["training_state"][part])


def test_evaluation_on_two_ranks_counts_every_image_once(ranks, alone):
    _, metrics = alone
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert ranks[0]["metrics"]["eval_segm/AP"] == pytest.approx(metrics["eval_segm/AP"], abs=1e-3)
    assert ranks[0]["metrics"].keys() == {name for name in metrics if "AP" in name or "AR" in name}


def test_batch_statistics_and_the_teacher_of_them_are_the_same_on_both_ranks(ranks):
    assert_equal_tensors(ranks[1]["moving"], ranks[0]["moving"])


def test_two_ranks_train_a_swin_with_activation_checkpointing(ranks):
    assert_equal_tensors(ranks[1]["swin"], ranks[0]["swin"])
    assert all(tensor.isfinite().all() for tensor in ranks[0]["swin"].values() if tensor.is_floating_point())


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_names_the_rank(ranks):
    for rank in ranks:
        assert "rank 1: loss_projection" in rank["non_finite"]
        assert "nothing was changed" in rank["non_finite"]


def assert_same_run(found, expected):
    """Up to the order in which numbers are summed."""
    torch.testing.assert_close(found["state"]["model"], expected["state"]["model"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["teacher"], expected["teacher"], rtol=0, atol=1e-5)
    moments, expected_moments = found["state"]["optimizer"], expected["state"]["optimizer"]
    torch.testing.assert_close(moments["state"], expected_moments["state"], rtol=1e-4, atol=1e-6)
    assert moments["param_groups"] == expected_moments["param_groups"]
    assert found["metrics"] == expected["metrics"]
    for line, single in zip(found["history"], expected["history"], strict=True):
        for name in ("loss", "gradient_norm", "loss_projection", "loss_cross_entropy", "loss_pseudo_mask"):
            assert line[name] == pytest.approx(single[name], rel=1e-4), name


def test_fsdp_trains_as_ddp(sharded):
    """A SIM run with moving batch statistics and two micro-batches a step; weights, optimiser and teacher come back whole."""
    assert_same_run(sharded[0]["sharded"], sharded[0]["ddp"])


def test_fsdp_goes_on_from_a_checkpoint_bit_for_bit(sharded):
    for rank in sharded:
        assert_equal_tensors(rank["parts"]["teacher"], rank["sharded"]["teacher"])
    parts, unbroken = sharded[0]["parts"], sharded[0]["sharded"]
    assert_equal_tensors(parts["state"]["model"], unbroken["state"]["model"])
    for index, moments in unbroken["state"]["optimizer"]["state"].items():
        assert_equal_tensors(parts["state"]["optimizer"]["state"][index], moments)
    assert parts["history"] == unbroken["history"]


def test_fsdp_exports_the_whole_student_or_teacher(sharded, folder):
    for run, weights in (("sharded", sharded[0]["sharded"]["teacher"]), ("swin", sharded[0]["swin"]["state"]["model"])):
        exported = SIMForInstanceSegmentation.from_pretrained(folder / f"fsdp_{run}" / "model").state_dict()
        prefix = "model." if run == "sharded" else ""
        assert_equal_tensors(exported, {name: weights[prefix + name] for name in exported})


def test_fsdp_with_activation_checkpointing_trains_as_ddp(sharded):
    assert_same_run(sharded[0]["swin"], sharded[0]["swin_ddp"])


def test_fsdp_in_bf16_has_the_losses_of_ddp(sharded):
    runs = (sharded[0][name]["history"] for name in ("bf16", "bf16_ddp"))
    for line, expected in zip(*runs, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_fsdp_gives_both_ranks_the_same_teacher(sharded):
    for run in ("sharded", "swin", "bf16"):
        assert_equal_tensors(sharded[1][run]["teacher"], sharded[0][run]["teacher"])
