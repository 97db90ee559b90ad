"""Device name, memory limit, peak memory, and the number of questions to sample in one batch."""

import math
import platform
import sys

import torch

from .attention import BLOCK
from .config import Settings, emulates_bf16
from .gpu import GIB, gpu_is_usable, windows_lends_memory


def cap_memory(s: Settings) -> None:
    """Limit this process to `memory_limit` GiB of its GPU. The GPU may be chosen later.

    In Windows and under WSL it takes no more than is free now. Beyond that the driver would use
    system memory, and steps would become many times slower, without an error.
    """
    windows = windows_lends_memory()
    if s.device != "cuda" or not (s.memory_limit or windows):
        return
    for i in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(i).total_memory
        most = s.memory_limit * GIB if s.memory_limit else total
        if windows:
            most = min(most, torch.cuda.mem_get_info(i)[0])
            print(
                f"Windows replaces full GPU memory with slow system memory, so this process uses at most "
                f"{most / GIB:.1f} GiB of GPU {i}",
                flush=True,
            )
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), i)


def memory_warning(s: Settings, peak: float, free: float) -> str:
    """Return a warning if `peak` exceeds the `free` memory (both in GiB), else ""."""
    if peak <= free:
        return ""
    ways = less_memory(s)
    return (
        f"warning: {free:.1f} GiB are free on the GPU and about {peak:.1f} GiB will be needed. If memory runs out, "
        f"{', '.join(ways[:-1])} or {ways[-1]}"
    )


def smaller_weights(s: Settings) -> list[str]:
    """Name the changes that let the weights of these settings fit."""
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
    """Name the changes that let a run of these settings fit."""
    ways = ["lower --group or --max-new-tokens"]
    if s.micro > 1:
        ways.append("take --micro 1")
    if not s.checkpointing:
        ways.append("add --checkpointing")
    return [*ways, *smaller_weights(s)]


def compute_dtype(load_in: str, device: str) -> torch.dtype:
    """Return the dtype for storing and computing everything except 4-bit weights and the fp32
    adapter. NF4 goes with bf16 if the GPU supports bf16 natively. Older GPUs (below 8.0) and CPUs
    get fp32: bf16 is emulated, and fp16 overflows in Qwen's vision tower.
    """
    if load_in == "nf4" and (device == "cpu" or emulates_bf16()):
        return torch.float32
    return torch.float32 if load_in == "fp32" else torch.bfloat16


def device_name() -> str:
    """Return the device name to print beside measurements."""
    if gpu_is_usable():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, {platform.machine()}"


def peak_memory(device: str) -> float:
    """Peak memory in GiB: of the GPU where there is one, else of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # accelerate brings it

        used = psutil.Process().memory_info()
        return getattr(used, "peak_wset", used.rss) / GIB
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def free_memory(s: Settings) -> float:
    """Return the bytes that this process can still allocate on its GPU; infinity without a GPU."""
    if s.device != "cuda":
        return float("inf")
    taken = torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - taken
    if s.memory_limit:
        free = min(free, s.memory_limit * GIB - taken)
    if windows_lends_memory():  # another program may have ended since cap_memory, and the cap stays
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        free = min(free, torch.cuda.get_per_process_memory_fraction() * total - taken)
    return free


def bytes_a_question(model, prompt_tokens: int, s: Settings) -> int:
    """Return the peak bytes of sampling one question.

    The peak is at the prompt or at the last token.
    """
    text, size = model.config.text_config, model.dtype.itemsize
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_key_value_heads * head * size  # keys and values of one token in one layer
    room = s.group * math.ceil(s.max_new_tokens / BLOCK) * BLOCK
    states = (
        4 * text.intermediate_size + 5 * text.hidden_size
    ) * size  # of a prompt token in a layer, with adapter
    reading = prompt_tokens * (text.num_hidden_layers * token + states)
    choosing = s.group * text.vocab_size * 20  # log-probabilities in fp32, as they add up in fp64
    return max(reading, (prompt_tokens + room) * text.num_hidden_layers * token + choosing)


def questions_per_batch(model, questions: int, prompt_tokens: int, s: Settings, free: float) -> int:
    """Return the size of equal batches, as few as possible, that each fit in half of the `free`
    bytes.
    """
    most = max(1, int(min(questions, free / 2 / bytes_a_question(model, prompt_tokens, s))))
    parts = math.ceil(questions / most)
    return math.ceil(questions / parts)
