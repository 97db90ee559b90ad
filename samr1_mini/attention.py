"""One idea, one attention: an answer sees its prompt and itself, so a prompt is read once for all of its G answers.

                         keys
                 prompt   a1   a2         Two forms, both known to PyTorch's fused kernels, and no [T, T] mask:
         prompt    ◣                        the prompt on itself:                      causal (is_causal)
 queries   a1      ■      ◣                 an answer on [prompt, the answer so far]:  causal at the lower right
           a2      ■           ◣          Keys of the prompt are lent to the G answers; query heads share their key
                                          head (enable_gqa), so no key is repeated for them either.

Two layouts, one for each use. Either is handed to the language model as `layout=...`, which passes it on to `shared_prompt` in
every layer: `Row`, whole answers in one row (scoring), and `Cache`, answers that grow by a token at a time (sampling).
Without a layout `shared_prompt` is the library's own attention, so the model stays an ordinary model.

Shapes: B questions, G answers a question, P prompt tokens, L answer tokens, t tokens so far; H query heads in groups of R on KV key
heads, d numbers a head.
"""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# By sub-configuration of the model: the language model's is this file's, the vision tower keeps the library's.
IMPLEMENTATION = {"": "sdpa", "text_config": "shared_prompt", "vision_config": "sdpa"}


def shared_prompt(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """Attention of one layer, as transformers calls it: query [b, H, T, d], key and value [b, KV, T, d] -> [b, T, H, d]."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return layout.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("shared_prompt", shared_prompt)
AttentionMaskInterface.register("shared_prompt", sdpa_mask)  # for calls without a layout; with one, no mask is made


class Row:
    """Scoring: B questions in one row without padding, [prompt 1, its answers, prompt 2, its answers, ...]."""

    def __init__(self, prompts: list[int], answers: list[list[int]]):
        """Lengths of the B prompts, and of the tokens that are read of each one's answers."""
        self.sizes, self.masks = [], []  # of each part of the row; the mask is None for a prompt
        for prompt, group in zip(prompts, answers):
            self.sizes += [prompt, *group]
            with _disable_current_modes():  # such a mask is two sizes and no tensor, which modes that look at tensors do not know
                self.masks += [None, *(causal_lower_right(n, prompt + n) for n in group)]

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Query [1, H, T, d], key and value [1, KV, T, d] -> [1, T, H, d]."""
        out = []
        for q, k, v, mask in zip(*(x.split(self.sizes, 2) for x in (query, key, value)), self.masks):  # [1, heads, P or L, d]
            if mask is None:
                lent = k, v
            else:
                k, v = (torch.cat(pair, 2) for pair in zip(lent, (k, v)))  # [1, KV, P + L, d]
            if q.shape[2]:
                out.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True))
        return torch.cat(out, 2).transpose(1, 2)


class Cache:
    """Sampling: keys and values of b questions, the prompt's once, and every answer's own, which grow in place."""

    BLOCK = 128  # tokens that room is made for at a time

    def __init__(self, prompts: list[int], group: int, device):
        """Lengths of the prompts, which are read first, padded on the right, where causal attention never looks."""
        self.group, self.tokens = group, 0
        self.prompt, self.own = [], []  # of each layer: keys and values [2, b, KV, P, d] and [2, b, KV, G, room, d]
        size = max(prompts)
        self.shortest = min(prompts)  # only columns after it can be padding
        self.padding = torch.arange(self.shortest, size, device=device) >= torch.tensor(prompts, device=device)[:, None]

    def __len__(self) -> int:
        return len(self.padding)

    def grow(self) -> None:
        """Make room for one more token of each answer: call it before the model reads them."""
        if self.tokens % self.BLOCK == 0:
            for i, prompt in enumerate(self.prompt):
                _, b, heads, _, d = prompt.shape
                room = prompt.new_empty(2, b, heads, self.group, self.tokens + self.BLOCK, d)
                if self.tokens:
                    room[:, :, :, :, : self.tokens] = self.own[i][:, :b]
                self.own[i : i + 1] = [room]
        self.tokens += 1

    def drop(self, ended: torch.Tensor) -> torch.Tensor:
        """Forget questions, ended [b]; returns the former places of those that stay [n]. Only holes are filled, from the end."""
        stay = int((~ended).sum())
        place = torch.arange(len(ended), device=ended.device)
        place[:stay][ended[:stay]] = (~ended[stay:]).nonzero()[:, 0] + stay
        holes = ended[:stay].nonzero()[:, 0]
        for kind in (self.prompt, self.own):
            for i, x in enumerate(kind):
                x[:, holes] = x[:, place[holes]]
                kind[i] = x[:, :stay]
        self.padding = self.padding[place[:stay]]
        return place[:stay]

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Query [b, H, G, d], key and value [b, KV, G, d] of one new token of each answer -> [b, G, H, d]; at first, of the prompt."""
        if layer == len(self.prompt):
            self.prompt.append(torch.stack([key, value]))
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
        t, size, heads = self.tokens, self.prompt[layer].shape[3], key.shape[1]
        self.own[layer][:, :, :, :, t - 1] = torch.stack([key, value])
        (k, v), (own_k, own_v) = self.prompt[layer], self.own[layer][:, :, :, :, :t]  # [b, KV, P, d], [b, KV, G, t, d]
        q = (query * scale).unflatten(1, (heads, -1)).transpose(2, 3).contiguous()  # [b, KV, G, R, d]
        score = torch.cat([(q.flatten(2, 3) @ k.mT).view(*q.shape[:4], size), q @ own_k.mT], -1)  # [b, KV, G, R, P + t]
        score[..., self.shortest : size].masked_fill_(self.padding[:, None, None, None], -torch.inf)
        share = score.softmax(-1)
        seen = (share[..., :size].flatten(2, 3) @ v).view_as(q) + share[..., size:] @ own_v  # [b, KV, G, R, d]
        return seen.transpose(1, 2).flatten(2, 3)
