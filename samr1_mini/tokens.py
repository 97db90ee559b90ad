"""Compute the distribution of the next token, and find ids that end answers or are banned.

Answers are sampled from this distribution, and the same distribution is trained.

Shapes: D model width, V vocabulary size. "..." stands for any dimensions before these.
"""

import re

import torch

CHUNK_LOGITS = 2**26  # most logits that logprobs computes at once: 256 MB in fp32

# This mark ends a text that was cut off. It breaks the reasoning format.
CUT = "[cut]"


# -------------------- ids


def stop_ids(model, tokenizer) -> torch.Tensor:
    """Return the ids [k] that end an answer.

    These are the ids of the model's generation_config (Qwen's: <|im_end|> and <|endoftext|>), and
    the tokenizer's end of sequence.
    """
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = []
    if isinstance(ends, int):
        ends = [ends]
    return torch.tensor(sorted({*ends, tokenizer.eos_token_id}), device=model.lm_head.weight.device)


def banned_ids(model, tokenizer, stop: torch.Tensor) -> torch.Tensor:
    """Return bool [V]: True for the ids that no answer may contain.

    These are unused ids, padding, and the placeholders of pictures and videos. After a sampled
    placeholder, the next forward would expect a picture. A stop id is never banned.
    """
    config = model.config
    weight = model.lm_head.weight  # [V, D]
    banned = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    banned[len(tokenizer) :] = True
    special = [
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
        tokenizer.convert_tokens_to_ids("<|vision_pad|>"),
        tokenizer.pad_token_id,
    ]
    for token in special:
        if token is not None and token < len(banned):
            banned[token] = True
    banned[stop] = False
    return banned


# -------------------- text


def opened_answer(text: str, instruction: str) -> str:
    """Return the first words of the answer if they are at the end of the prompt `text`, or "".

    Templates of reasoning models write "<think>\\n". If thinking is switched off, they write
    "<think>\\n\\n</think>\\n\\n". Other templates write nothing. The same words inside the user's
    `instruction` do not count.
    """
    after = text.rpartition(instruction)[2]
    found = re.search(r"<think>[^<]*(?:</think>\s*)?\Z", after)
    if found is None:
        return ""
    return found[0]


def answer_text(opened: str, generated: str, cut: bool) -> str:
    """Return the whole answer: the template's start, the generated text, and CUT if it was cut off.

    A model may write <think> again, although the template wrote it. Then the template's start is
    left out.
    """
    text = opened + generated
    if generated.lstrip().startswith("<think>"):
        text = generated
    if cut:
        text += CUT
    return text


# -------------------- logits


def has_fp32_sums(device: torch.device) -> bool:
    """Return True if this kind of device multiplies bf16 matrices and adds in fp32."""
    return device.type == "cuda"


def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Multiply q [..., n, d] by k [..., m, d] -> fp32 [..., n, m].

    bf16 would round large attention scores. PyTorch's fused kernels keep them in fp32 too.
    """
    if q.dtype == torch.float32 or not has_fp32_sums(q.device):
        return q.float() @ k.float().mT
    left, right = q.flatten(0, -3), k.flatten(0, -3)  # bmm takes one batch dimension
    out = torch.bmm(left, right.mT, out_dtype=torch.float32)
    return out.unflatten(0, q.shape[:-2])


class Fp32Head(torch.autograd.Function):
    """Multiply hidden [n, D] by the head's weight [V, D] -> fp32 logits [n, V].

    The head's own forward would round the logits to bf16. A logit between 16 and 32 would become a
    multiple of 0.125. Sampling and training compute slightly different hidden states, and rounding
    can turn a small difference into 0.125. Then pi / pi_old would not start at 1. Here the products
    are bf16 and their sums are fp32.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        if has_fp32_sums(hidden.device):
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden.float() @ weight.float().T

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        [weight] = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None


def token_logits(policy, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return fp32 logits [..., V] of the next token for hidden states [..., D]."""
    head = policy.base.lm_head
    if head.weight.dtype == torch.float32:
        logits = head(hidden)
    else:
        logits = Fp32Head.apply(hidden.flatten(0, -2), head.weight)
        logits = logits.unflatten(0, hidden.shape[:-1])
    # With -inf, the entropy would contain 0 * -inf, which is NaN.
    return (logits / temperature).masked_fill(policy.banned, -1e30)
