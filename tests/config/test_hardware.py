"""The machine is recognised from what its own tools print, without torch."""

import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

import preftune
from preftune.config import hardware
from preftune.config.hardware import cpu_has_bf16


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose command `name` prints `text`; nothing else of its kind is found, and no device is hidden."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA", "HIP", "ROCR"):
        monkeypatch.delenv(f"{name}_VISIBLE_DEVICES", raising=False)

    def build(name, text, code=0):
        tool = tmp_path / name
        tool.write_text(f"#!{sys.executable}\nprint({text!r})\nraise SystemExit({code})\n")
        tool.chmod(0o755)
        hardware.accelerator.cache_clear()

    hardware.accelerator.cache_clear()
    yield build
    hardware.accelerator.cache_clear()


H100 = "0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 9.0"
RTX = "1, GPU-bb, NVIDIA GeForce RTX 4090, 24564, 8.9"
T4 = "2, GPU-cc, Tesla T4, 15360, 7.5"


@pytest.mark.parametrize(
    ("cards", "choice"), [([H100], "gpu80gb"), ([RTX], "gpu24gb"), ([T4], "gpu"), ([H100, RTX], "gpu24gb"), ([], "cpu")]
)
def test_the_smallest_visible_nvidia_card_decides(machine, cards, choice):
    machine("nvidia-smi", "\n".join(cards))
    assert hardware.detect() == choice


@pytest.mark.parametrize(
    ("visible", "choice"),
    [
        ("", "cpu"),
        ("-1", "cpu"),
        ("0", "gpu80gb"),
        ("1", "gpu24gb"),
        ("GPU-aa", "gpu80gb"),
        ("0,2", "gpu"),
        ("MIG-1", "gpu"),
    ],
)
def test_hidden_cards_do_not_count(machine, monkeypatch, visible, choice):
    machine("nvidia-smi", "\n".join([H100, RTX, T4]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.detect() == choice


def test_a_card_says_whether_it_has_bfloat16(machine):
    machine("nvidia-smi", T4)
    assert not hardware.accelerator().bf16
    assert hardware.describe() == "hardware: gpu (Tesla T4, 15 GiB, no bfloat16)"
    machine("nvidia-smi", H100)
    assert hardware.describe() == "hardware: gpu80gb (NVIDIA H100 80GB HBM3, 80 GiB)"


def test_a_broken_driver_is_no_card(machine):
    machine("nvidia-smi", "NVIDIA-SMI has failed because it couldn't communicate with the driver", code=9)
    assert hardware.detect() == "cpu"
    assert hardware.describe().startswith("hardware: cpu (no GPU found; ")


def test_rocm_cards_count(machine, monkeypatch):
    header = "device,VRAM Total Memory (B),VRAM Total Used Memory (B)"
    machine("rocm-smi", f"{header}\ncard0,206141652992,0\ncard1,25753026560,0")
    assert hardware.detect() == "gpu24gb"
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    hardware.accelerator.cache_clear()
    assert hardware.detect() == "gpu80gb"


def test_auto_reads_each_key_from_the_file_of_the_machine(machine):
    machine("nvidia-smi", RTX)
    read = OmegaConf.create({"batch": "${auto:per_device_train_batch_size}", "cpu": "${auto:use_cpu}"})
    assert OmegaConf.to_container(read, resolve=True) == {"batch": 2, "cpu": False}


def test_auto_has_every_key_that_a_machine_may_have():
    keys = set(hardware.settings("auto"))
    for choice in ("cpu", "gpu", "gpu24gb", "gpu80gb"):
        assert set(hardware.settings(choice)) <= keys


def test_torch_agrees_about_the_processor():
    import torch

    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        assert cpu_has_bf16() == has_bf16


def test_detection_leaves_torch_out():
    code = "import sys; from preftune.config import hardware; hardware.describe(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("", "1"), ("0", "0")])
def test_tensors_lie_in_huge_pages_where_the_kernel_has_them(before, after):
    if not preftune.PAGES.exists() or "[never]" in preftune.PAGES.read_text():
        pytest.skip("this kernel has no huge pages for those who ask")
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if before is None else {"THP_MEM_ALLOC_ENABLE": before}
    code = "import os, preftune; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == after
