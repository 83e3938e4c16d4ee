"""Training on two machines, here two launchers that meet over loopback, trains what one machine does, byte for byte."""

import dataclasses
import os

import pytest
from training_runs import PARAMS, digests, folder, run

from rlaifv import ROOT
from rlaifv.params import ParamsError, TrainParams, check_train
from rlaifv.training.machines import command_of, on_machine

__all__ = ["folder"]  # a fixture: pytest finds it by its name in this module
TWO = dataclasses.replace(PARAMS, processes=2, machines=2)


@pytest.fixture
def allocation(monkeypatch):
    """An allocation of two nodes, whose `srun` starts the tasks of both on this machine."""
    helpers = ROOT / "tests" / "helpers"
    monkeypatch.setenv("PATH", os.pathsep.join([str(helpers / "slurm_step"), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(helpers / "killed_run"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")


def test_two_machines_train_what_one_with_as_many_processes_does_also_after_one_of_them_is_killed(
    folder, allocation, monkeypatch
):
    run(folder, "one-machine", dataclasses.replace(TWO, machines=1))
    expected = digests(folder / "one-machine" / "out")
    monkeypatch.setenv("KILLED_BEFORE_STEP", "6")
    monkeypatch.setenv("KILLED_RANK", "1")
    with pytest.raises(MemoryError, match="training in 2 processes failed: one was killed"):
        run(folder, "two-machines", TWO)
    assert len(list((folder / "two-machines" / "scratch").glob("train-*/trainer/checkpoint-4"))) == 1
    monkeypatch.delenv("KILLED_BEFORE_STEP")
    run(folder, "two-machines", TWO)
    assert digests(folder / "two-machines" / "out") == expected


def test_a_run_goes_on_where_as_many_processes_are_on_another_number_of_machines(folder, allocation, monkeypatch):
    monkeypatch.setenv("KILLED_BEFORE_STEP", "6")
    with pytest.raises(MemoryError, match="one was killed"):
        run(folder, "moved", TWO)
    monkeypatch.delenv("KILLED_BEFORE_STEP")
    run(folder, "moved", dataclasses.replace(TWO, machines=1))
    (work,) = (folder / "moved" / "scratch").glob("train-*/finished.json")
    assert work.is_file(), "one run's folder, not two"


def test_an_allocation_that_is_too_small_and_none_at_all_are_a_line_each(folder, allocation, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    with pytest.raises(RuntimeError, match=r"machines is 2, this allocation of Slurm's has 1 node: .*--nodes=2"):
        run(folder, "small", TWO)
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RuntimeError, match="machines is 2: start it in an allocation of Slurm's"):
        run(folder, "none", TWO)


def test_processes_are_spread_evenly():
    with pytest.raises(ParamsError, match="processes 4 cannot be spread evenly over machines 3"):
        check_train(TrainParams(processes=4, machines=3))


def test_each_launcher_is_told_its_place_and_where_the_first_one_is():
    launcher = ["python", "-m", "accelerate.commands.launch", "--num_processes", "16", "-m", "module", "job"]
    command = on_machine(launcher, 1, 2, "10.0.0.1", "29000")
    assert command[3:7] == ["--num_machines", "2", "--machine_rank", "1"] and command[-3:] == ["-m", "module", "job"]
    assert command[7:11] == ["--main_process_ip", "10.0.0.1", "--main_process_port", "29000"]


def test_slurm_starts_one_launcher_a_node_and_ends_all_when_one_fails(allocation):
    command = command_of(["python", "-m", "accelerate.commands.launch"], 2, 16)
    assert command[0] == "srun" and {"--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(command)
