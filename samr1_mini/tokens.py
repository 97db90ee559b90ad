"""From hidden states to tokens: the one distribution that is sampled from and trained on.

Which ids it may give, and where answers begin and end.

Shapes: D width, V vocabulary, and any number of dimensions before them.
"""

import re

import torch

CUT = "[cut]"  # ends the text of an answer that did not end by itself, so that the reasoning format is lost


def stop_ids(model, tokenizer) -> torch.Tensor:
    """[k] the ids at which the model's generation_config stops (Qwen's: <|im_end|>, <|endoftext|>),
    and eos.
    """
    eos = model.generation_config.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
    return torch.tensor(sorted({*eos, tokenizer.eos_token_id}), device=model.lm_head.weight.device)


def banned_ids(model, tokenizer, stop: torch.Tensor) -> torch.Tensor:
    """Bool [V]: what no answer may hold.

    Placeholders of pictures and videos (a sampled one would ask the next forward for a picture),
    ids without a token, and the padding where it does not end an answer.
    """
    config = model.config
    banned = torch.zeros(
        model.lm_head.weight.shape[0], dtype=torch.bool, device=model.lm_head.weight.device
    )
    banned[len(tokenizer) :] = True
    vision = (
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    )
    for token in (
        *vision,
        tokenizer.convert_tokens_to_ids("<|vision_pad|>"),
        tokenizer.pad_token_id,
    ):
        if token is not None and token < len(banned):
            banned[token] = True
    banned[stop] = False
    return banned


def opened_answer(text: str, told: str) -> str:
    """Return the start of the answer that a chat template has written at the end of `text`.

    Templates of reasoning models write "<think>\\n". Where thinking is switched off, they write
    "<think>\\n\\n</think>\\n\\n". Others write nothing. The user's turn, `told`, may contain the
    same words. They are not counted.
    """
    after = text.rpartition(told)[2]
    found = re.search(r"<think>[^<]*(?:</think>\s*)?\Z", after)
    return found[0] if found else ""


def answer_text(opened: str, generated: str, cut: bool) -> str:
    """Return the whole answer: the template's start, the generated text, and CUT if it was cut off.

    A model may write <think> although the template did. Then only the thought that the model itself
    opened counts.
    """
    text = opened + generated
    if generated.lstrip().startswith("<think>"):
        text = generated
    if cut:
        text += CUT
    return text


FP32_SUMS = {
    "cuda"
}  # kinds of device whose product of bf16 matrices can give its fp32 sums as they are


def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[..., n, d] x [..., m, d] -> fp32 [..., n, m]: in bf16 large scores would be rounded, as in
    no fused kernel.
    """
    if q.dtype == torch.float32 or q.device.type not in FP32_SUMS:
        return q.float() @ k.float().mT
    return torch.bmm(q.flatten(0, -3), k.flatten(0, -3).mT, out_dtype=torch.float32).unflatten(
        0, q.shape[:-2]
    )


class Fp32Head(torch.autograd.Function):
    """hidden [n, D] @ weight [V, D] -> logits [n, V] that are never rounded to bf16, as the head's
    own forward would do: at values of 16 to 32 a bf16 step is 0.125, and that alone would move
    every ratio away from 1. The products are bf16's, their sums fp32.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        if hidden.device.type in FP32_SUMS:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden.float() @ weight.float().T

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        [weight] = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None


def token_logits(policy, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """Hidden states [..., D] -> fp32 logits [..., V] of the one distribution that is sampled from
    and trained on.
    """
    head = policy.base.lm_head
    if head.weight.dtype == torch.float32:
        logits = head(hidden)
    else:
        logits = Fp32Head.apply(hidden.flatten(0, -2), head.weight).unflatten(0, hidden.shape[:-1])
    return (logits / temperature).masked_fill(
        policy.banned, -1e30
    )  # finite, so that 0 * logit stays 0 in the entropy


def choose_tokens(logp: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [..., V] and a uniform number in [0, 1) each [...] -> the tokens that they
    stand for [...].
    """
    cumulative = (
        logp.double().exp().cumsum(-1)
    )  # token i owns the stretch up to cumulative[i], a banned one nothing
    return torch.searchsorted(
        cumulative, uniforms.double()[..., None] * cumulative[..., -1:], right=True
    )[..., 0]
