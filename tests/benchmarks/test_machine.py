"""What a measurement depends on is told as far as it can be found."""

import subprocess
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import machine as module
from machine import cpu_name, gpu_state, measured_on

ANSWER = "580.159.04, 1980, 3201, 1980, 131.52, 700.00, [N/A]\n"


@pytest.fixture
def asked(monkeypatch):
    """The commands that nvidia-smi of a GPU got."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(stdout=ANSWER)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    properties = SimpleNamespace(uuid="12ab-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_gpu_tells_its_state(asked, monkeypatch):
    state = gpu_state()
    assert state["driver"] == "580.159.04" and state["sm_mhz"] == 1980.0
    assert state["watts"] == 131.52 and state["most_watts"] == 700.0
    assert "celsius" not in state
    assert [command[:3] for command in asked] == [["nvidia-smi", "-i", "GPU-12ab-34"]]
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=FileNotFoundError))
    assert gpu_state() == {}


def test_all_of_it():
    told = measured_on()
    assert told["torch"] == torch.__version__ and told["transformers"] != "not installed"
    assert told["sparse-bitnet"] and told["cpu"] and told["cores"]
    if not torch.cuda.is_available():
        assert told["gpu"] == {} and told["cuda"] is None


def test_a_cpu_without_a_name(monkeypatch, tmp_path):
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nmodel name\t: Abacus 9: fast\n")
    monkeypatch.setattr(module, "CPUINFO", listed)
    assert cpu_name() == "Abacus 9: fast"
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "none")
    assert cpu_name()
