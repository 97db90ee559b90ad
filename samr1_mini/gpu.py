"""Find a GPU that PyTorch can use, and read the amount of its free memory.

This module imports no other module of the package. The settings use it before slow imports.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

GIB = 2**30
DRIVER_FILE = Path("/proc/driver/nvidia/version")  # Linux: the driver writes its version there
WSL_DEVICE = Path("/dev/dxg")  # WSL: the GPU of the Windows machine
WSL_TOOL = Path("/usr/lib/wsl/lib/nvidia-smi")
# CUDA's major version -> the oldest driver that supports it (NVIDIA's release notes)
OLDEST_DRIVERS = {"11": 450, "12": 525, "13": 580}
WHEELS = "https://download.pytorch.org/whl/cu130"


def has_kernels(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Return True if PyTorch's code runs on a GPU of this compute capability (major, minor).

    `built_for` lists the architectures of the code, such as ["sm_80", "compute_90"]. Machine code
    (sm) needs a GPU of the same major version and an equal or higher minor version. PTX (compute)
    is translated for every newer GPU. Code with the suffix "a" runs only on its own version. Code
    with the suffix "f" needs the same major version.
    """
    known = re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", " ".join(built_for))
    if not known:  # a build for GPUs of another maker has other names
        return True
    for kind, major, minor, ending in known:
        built = int(major), int(minor)
        if ending == "a":
            runs = capability == built
        elif kind == "compute" and not ending:
            runs = capability >= built
        else:
            runs = capability[0] == built[0] and capability >= built
        if runs:
            return True
    return False


def gpu_fault() -> str:
    """Return the reason why PyTorch cannot use a GPU here, in one line. Return "" if it can."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        built_for = torch.cuda.get_arch_list()
        if has_kernels((major, minor), built_for):
            return ""
        return (
            f"PyTorch {torch.__version__} has no code for the GPU {torch.cuda.get_device_name()} "
            f"of compute capability {major}.{minor}, only for {', '.join(built_for)}"
        )
    driver = driver_version()
    if driver is None:
        return missing_cuda("no GPU was found")
    if torch.version.cuda is None:
        return missing_cuda(f"{driver_name(driver)} is installed")
    return driver_fault(driver)


def missing_cuda(found: str) -> str:
    """Return the text `found`. If PyTorch was built without CUDA, add advice."""
    if torch.version.cuda or torch.version.hip or sys.platform == "darwin":
        return found
    torch_version = torch.__version__.split("+")[0]
    vision_version = version("torchvision").split("+")[0]
    return (
        f"{found}, and PyTorch {torch.__version__} was built without CUDA. An NVIDIA GPU needs: "
        f"pip install torch=={torch_version}+cu130 torchvision=={vision_version}+cu130 "
        f"--extra-index-url {WHEELS}"
    )


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, "" if it is unreadable, None without a driver."""
    try:
        return first_version(DRIVER_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        pass
    tool = shutil.which("nvidia-smi") or shutil.which(WSL_TOOL)
    if tool is None:
        return "" if WSL_DEVICE.exists() else None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return first_version(done.stdout)


def first_version(text: str) -> str:
    """Return the first version number in `text`, such as 570.86.15, or "" without a number."""
    found = re.search(r"\b\d{3,4}\.\d+(\.\d+)*", text)
    return found.group() if found else ""


def driver_name(driver: str) -> str:
    """Return a description of the driver. If its version is unknown, `driver` is empty."""
    if driver:
        return f"the NVIDIA driver {driver}"
    return "a GPU driver of unknown version"


def driver_fault(driver: str) -> str:
    """Return the reason why a PyTorch with CUDA finds no GPU with this driver, and advice."""
    cuda = torch.version.cuda
    pytorch = f"PyTorch {torch.__version__} (CUDA {cuda})"
    oldest = OLDEST_DRIVERS.get(cuda.split(".")[0])
    needed = f"driver {oldest} or newer" if oldest else f"a driver for CUDA {cuda}"
    if under_wsl():
        needed += " in Windows"
    if not driver or not oldest:
        found = f"{pytorch} finds no GPU, but {driver_name(driver)} is installed"
        return f"{found}. An NVIDIA GPU needs {needed}"
    if int(driver.split(".")[0]) < oldest:
        return f"the NVIDIA driver {driver} is too old for {pytorch}. Install {needed}"
    hint = "In a container, start with docker run --gpus all"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        named = os.environ["CUDA_VISIBLE_DEVICES"].strip() or "empty"
        hint = f"CUDA_VISIBLE_DEVICES is {named}: it may hide the GPUs of this machine"
    return (
        f"{pytorch} finds no GPU. The NVIDIA driver {driver} is new enough ({oldest} is "
        f"needed). {hint}"
    )


def under_wsl() -> bool:
    """Return True if this is Linux inside Windows (WSL)."""
    return "microsoft" in platform.release().lower() or WSL_DEVICE.exists()


def windows_lends_memory() -> bool:
    """Return True if the driver uses system memory when the GPU's memory is full."""
    return sys.platform == "win32" or under_wsl()


def card_memory(limit: float) -> tuple[float, float]:
    """Return the free and the total memory of this process's GPU in GiB.

    A `limit` above 0 (GiB) is the upper bound of both. With several processes the free memory is
    not read. Otherwise the processes could choose different presets. If the free memory is not
    known, the total memory takes its place.
    """
    whole = torch.cuda.get_device_properties(0).total_memory / GIB
    free = whole
    try:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            free = torch.cuda.mem_get_info()[0] / GIB
    except RuntimeError as error:
        # If other programs have filled the GPU, this call itself runs out of memory.
        if "out of memory" in str(error):
            free = 0.0
    if limit:
        free, whole = min(free, limit), min(whole, limit)
    return free, whole
