"""The GPU of this machine: can PyTorch use it, why not, and how much of its memory is free.

Nothing here needs the rest of the package, so the settings can ask before anything large is imported.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

GIB = 2**30
DRIVER_FILE = Path("/proc/driver/nvidia/version")  # Linux: the driver writes its version there
WSL_DEVICE = Path("/dev/dxg")  # WSL: the GPU of the Windows machine
WSL_TOOL = Path("/usr/lib/wsl/lib/nvidia-smi")
OLDEST_DRIVERS = {"11": 450, "12": 525, "13": 580}  # CUDA's major version -> the oldest driver, by NVIDIA's notes
WHEELS = "https://download.pytorch.org/whl/cu130"
HIDES_ALL = ("", "-1", "none")  # values of CUDA_VISIBLE_DEVICES that hide every GPU


def gpu_is_usable() -> bool:
    """Return whether PyTorch finds a GPU and has kernels for it."""
    return torch.cuda.is_available() and has_kernels(
        torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    )


def has_kernels(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Return whether code that was built for `built_for`, such as ["sm_80", "compute_90"], runs on this GPU.

    Machine code (sm) runs on its own major version, from its minor version on. PTX (compute) is translated for any
    newer GPU. With the ending "a" both run on exactly this version, with "f" on this major version alone.
    """
    known = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", entry) for entry in built_for]
    known = [entry.groups() for entry in known if entry]
    if not known:  # a build for other GPUs than NVIDIA's, which uses other names
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
    """Say in one line why PyTorch can use no GPU here; "" where it can."""
    if gpu_is_usable():
        return ""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return (
            f"the GPU {torch.cuda.get_device_name()} has compute capability {major}.{minor}, and PyTorch "
            f"{torch.__version__} was built for {', '.join(torch.cuda.get_arch_list())} alone"
        )
    driver = driver_version()
    if driver is None:
        return missing_cuda("no GPU was found")
    if torch.version.cuda is None:
        return missing_cuda(f"{driver_name(driver)} is installed")
    return driver_fault(driver)


def missing_cuda(found: str) -> str:
    """Return `found`, with advice where this PyTorch was built without CUDA."""
    if torch.version.cuda or torch.version.hip or sys.platform == "darwin":
        return found
    torch_version = torch.__version__.split("+")[0]
    try:
        vision = f" torchvision=={version('torchvision').split('+')[0]}+cu130"
    except PackageNotFoundError:
        vision = ""
    return (
        f"{found}, and PyTorch {torch.__version__} was built without CUDA. For an NVIDIA GPU: pip install "
        f"torch=={torch_version}+cu130{vision} --extra-index-url {WHEELS}"
    )


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, "" where it cannot be read, None where no driver was found."""
    try:
        return first_version(DRIVER_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        pass
    tool = shutil.which("nvidia-smi")
    if tool is None and WSL_TOOL.exists():
        tool = str(WSL_TOOL)
    if tool is None:
        return "" if WSL_DEVICE.exists() else None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return first_version(done.stdout)


def first_version(text: str) -> str:
    """Return the first number like 570.86.15 in `text`, "" where there is none."""
    found = re.search(r"\b\d{3,4}\.\d+(\.\d+)*", text)
    return found.group() if found else ""


def driver_name(driver: str) -> str:
    """Return words for a driver of this version; "" is a version that cannot be read."""
    if driver:
        return f"the NVIDIA driver {driver}"
    return "a GPU driver of unknown version"


def driver_fault(driver: str) -> str:
    """Say why this PyTorch, built with CUDA, finds no GPU with the driver of this version."""
    major = torch.version.cuda.split(".")[0]
    oldest = OLDEST_DRIVERS.get(major)
    needed = f"NVIDIA driver {oldest} or newer" if oldest else f"an NVIDIA driver for CUDA {major}"
    needs = f"PyTorch {torch.__version__} needs {needed} (CUDA {torch.version.cuda})"
    where = " in Windows" if under_wsl() else ""
    if driver and oldest and int(driver.split(".")[0]) < oldest:
        return f"the NVIDIA driver {driver} is too old: {needs}; install a newer driver{where}"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip().lower() in HIDES_ALL:
        hint = "CUDA_VISIBLE_DEVICES hides every GPU"
    else:
        hint = "a container needs access to the GPU (docker run --gpus all)"
    if driver and oldest:
        return f"{driver_name(driver)} is new enough for PyTorch, which still finds no GPU: {hint}"
    return f"{driver_name(driver)} is installed, and PyTorch finds no GPU: {needs}{where}, and {hint}"


def under_wsl() -> bool:
    """Return whether this is Linux inside Windows."""
    return "microsoft" in platform.release().lower() or WSL_DEVICE.exists()


def windows_lends_memory() -> bool:
    """Return whether the driver would use system memory where the GPU's is full: slow, and without an error."""
    return sys.platform == "win32" or under_wsl()


def card_memory(limit: float = 0.0) -> tuple[float, float]:
    """Return GiB (free, whole) of this process's GPU, at most `limit` where that is above 0.

    With several processes the whole memory counts as free: otherwise two processes could choose different presets.
    """
    whole = torch.cuda.get_device_properties(0).total_memory / GIB
    free = whole
    if os.environ.get("WORLD_SIZE", "1") == "1":
        free = min(free, free_gib(whole))
    if limit:
        free, whole = min(free, limit), min(whole, limit)
    return free, whole


def free_gib(whole: float) -> float:
    """Return GiB that are free on the GPU now; `whole`, its memory, where the driver does not tell."""
    try:
        return torch.cuda.mem_get_info()[0] / GIB
    except (RuntimeError, AssertionError) as error:
        # a GPU that other programs have filled has no memory left even for the question
        return 0.0 if "out of memory" in str(error) else whole
