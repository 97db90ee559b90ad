"""Limit and measure the memory of this process, and advise how to use less."""

import os
import sys

import torch

from .config import Settings, emulates_bf16
from .gpu import GIB, windows_lends_memory

GAPS = 0.1  # share of memory lost between tensors


def cap_memory(s: Settings) -> None:
    """Limit this process to --memory-limit GiB of its GPU.

    In Windows and under WSL the limit is at most the free memory of the GPU. If the GPU's memory
    were full, the driver would use system memory without an error. Steps would be many times
    slower.
    """
    windows = windows_lends_memory()
    if s.device != "cuda" or not (s.memory_limit or windows):
        return
    gpu = int(os.environ.get("LOCAL_RANK", "0"))  # each process has its own GPU
    total = torch.cuda.get_device_properties(gpu).total_memory
    most = s.memory_limit * GIB if s.memory_limit else total
    if windows:
        most = min(most, torch.cuda.mem_get_info(gpu)[0])
        print(
            "When GPU memory is full, Windows uses slow system memory. So this process uses at "
            f"most {most / GIB:.1f} GiB of GPU {gpu}",
            flush=True,
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), gpu)


def memory_warning(s: Settings, peak: float, free: float) -> str:
    """Return a warning if `peak` is larger than `free`, else "". Both are in GiB."""
    if peak <= free:
        return ""
    ways = less_memory(s)
    return (
        f"warning: {free:.1f} GiB are free on the GPU, and the run needs about {peak:.1f} GiB. "
        f"If memory runs out, {', '.join(ways[:-1])} or {ways[-1]}"
    )


def smaller_weights(s: Settings) -> list[str]:
    """Return advice, one text for each change that reduces the memory of the weights."""
    ways = []
    if s.memory_limit:
        ways.append("raise --memory-limit")
    if s.preset == "7b":
        ways.append("take --preset 3b")
    if s.load_in != "nf4":
        ways.append("take --load-in nf4")
    if s.sam in ("vit_h", "vit_l"):
        ways.append("take --sam vit_b")
    return [*ways, "end other programs on the GPU (nvidia-smi lists them)"]


def less_memory(s: Settings) -> list[str]:
    """Return advice, one text for each change that reduces the memory of a run."""
    ways = ["lower --group or --max-new-tokens"]
    if s.micro > 1:
        ways.append("take --micro 1")
    if not s.checkpointing:
        ways.append("add --checkpointing")
    return [*ways, *smaller_weights(s)]


def is_memory_error(error: BaseException) -> bool:
    """Return True if the memory of the machine or of the GPU ran out.

    If RAM is full, Windows says that its paging file is too small. On a CPU, PyTorch raises a
    RuntimeError. A GPU can report it as AcceleratorError, and its library cuBLAS as
    CUBLAS_STATUS_ALLOC_FAILED.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "allocate memory", "paging file", "not enough memory", "alloc_failed")
    return any(word in str(error).lower() for word in words)


def compute_dtype(choice: str, device: str) -> torch.dtype:
    """Return the dtype of weights and computations for a value of --load-in or --sam-dtype.

    The choices bf16 and fp32 are taken as they are. nf4 and auto mean bf16 on GPUs of compute
    capability 8.0 or higher. Most CPUs and older GPUs only emulate bf16, and fp16 would overflow in
    Qwen's vision tower. So they compute in fp32. 4-bit weights have their own format. The weights
    of the adapter and of SAM's decoder are always fp32.
    """
    if choice == "fp32":
        return torch.float32
    if choice != "bf16" and (device == "cpu" or emulates_bf16()):
        return torch.float32
    return torch.bfloat16


def peak_memory(device: str) -> float:
    """Return the peak memory of this process in GiB. If `device` is cuda, it is GPU memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # accelerate depends on psutil

        used = psutil.Process().memory_info()
        return getattr(used, "peak_wset", used.rss) / GIB
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def free_memory(s: Settings) -> float:
    """Return the bytes that this process can still allocate on its GPU. Without a GPU: infinity."""
    if s.device != "cuda":
        return float("inf")
    taken = torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - taken
    if s.memory_limit:
        free = min(free, s.memory_limit * GIB - taken)
    if windows_lends_memory():  # cap_memory has set a limit, which does not grow later
        total = torch.cuda.get_device_properties().total_memory
        free = min(free, torch.cuda.get_per_process_memory_fraction() * total - taken)
    return free


def usable_memory(s: Settings) -> float:
    """Return the bytes that new tensors can fill. Some memory is lost between tensors, see GAPS."""
    free = free_memory(s)
    if s.device != "cuda":
        return free
    return free - GAPS * (free + torch.cuda.memory_allocated())
