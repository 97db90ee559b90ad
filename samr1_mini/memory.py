"""Limit and measure memory, and choose how many questions to sample in one batch."""

import math
import os
import platform
import sys

import torch

from .attention import BLOCK
from .config import Settings, emulates_bf16
from .gpu import GIB, gpu_is_usable, windows_lends_memory


def cap_memory(s: Settings) -> None:
    """Limit this process to --memory-limit GiB of its GPU.

    In Windows and under WSL it also takes no more than is free now. Beyond the free memory the
    driver would use system memory. Steps would become many times slower, without an error.
    """
    windows = windows_lends_memory()
    if s.device != "cuda" or not (s.memory_limit or windows):
        return
    gpu = int(os.environ.get("LOCAL_RANK", "0"))  # of several processes, each has its own GPU
    total = torch.cuda.get_device_properties(gpu).total_memory
    most = s.memory_limit * GIB if s.memory_limit else total
    if windows:
        most = min(most, torch.cuda.mem_get_info(gpu)[0])
        print(
            "Windows replaces full GPU memory with slow system memory, so this process uses at "
            f"most {most / GIB:.1f} GiB of GPU {gpu}",
            flush=True,
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), gpu)


def memory_warning(s: Settings, peak: float, free: float) -> str:
    """Return a warning if `peak` exceeds the `free` memory (both in GiB), else ""."""
    if peak <= free:
        return ""
    ways = less_memory(s)
    return (
        f"warning: {free:.1f} GiB are free on the GPU and about {peak:.1f} GiB will be needed. "
        f"If memory runs out, {', '.join(ways[:-1])} or {ways[-1]}"
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
    """Return the dtype of all weights and computations except 4-bit weights and the adapter.

    With NF4 it is bf16. On CPUs and on GPUs below compute capability 8.0 it is fp32, because they
    emulate bf16, and fp16 overflows in Qwen's vision tower. The adapter is always fp32.
    """
    if load_in == "nf4" and (device == "cpu" or emulates_bf16()):
        return torch.float32
    if load_in == "fp32":
        return torch.float32
    return torch.bfloat16


def device_name() -> str:
    """Return the name of the GPU, or the CPU's threads and architecture."""
    if gpu_is_usable():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, {platform.machine()}"


def peak_memory(device: str) -> float:
    """Return the peak memory in GiB that this process has used, on the GPU if `device` is cuda."""
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
    if windows_lends_memory():  # cap_memory's limit stays if another program has ended since
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        free = min(free, torch.cuda.get_per_process_memory_fraction() * total - taken)
    return free


def bytes_a_question(model, prompt_tokens: int, s: Settings) -> int:
    """Return the peak bytes of sampling G answers to one question.

    The peak is reached while the prompt is read, or at the last token of the answers.
    """
    text = model.config.text_config
    size = model.dtype.itemsize
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Keys and values of one token in all layers, and the states of a prompt token in one layer.
    token = 2 * text.num_key_value_heads * head * size * text.num_hidden_layers
    states = (4 * text.intermediate_size + 5 * text.hidden_size) * size
    answer_tokens = s.group * math.ceil(s.max_new_tokens / BLOCK) * BLOCK
    # Log-probabilities take 20 bytes: they are fp32, and their sums fp64.
    choosing = s.group * text.vocab_size * 20
    at_prompt = prompt_tokens * (token + states)
    at_last_token = (prompt_tokens + answer_tokens) * token + choosing
    return max(at_prompt, at_last_token)


def questions_per_batch(model, questions: int, prompt_tokens: int, s: Settings, free: float) -> int:
    """Return the number of questions to sample in one batch.

    Batches are as few as possible, nearly equal, and each fits in half of the `free` bytes.
    """
    fitting = free / 2 / bytes_a_question(model, prompt_tokens, s)  # may be infinite
    most = max(1, int(min(questions, fitting)))
    parts = math.ceil(questions / most)
    return math.ceil(questions / parts)
