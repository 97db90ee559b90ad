"""The policy: a Qwen-VL that thinks in text and answers with a box and points. Load it, prompt it, sample it, score it.

The prompt (about 150 tokens of text and up to 900 of the picture) is long and the same for all G answers of a group, so it is
encoded once: `encode` runs the vision tower once a question; `sample` and `logprobs` lay a question and its G answers in one row, in
which every answer sees the prompt and itself.

Shapes: B questions, G answers a question, P prompt tokens, L answer tokens, T packed tokens, D width, V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    DynamicCache,
)

from .config import UserError, check_size, emulates_bf16

TINY = Path(__file__).parent / "tiny" / "policy"

PROMPT = """Compare the objects in the picture and find the one that the question means. Think inside <think> </think>, then give \
the final answer inside <answer> </answer> as JSON: one box that tightly holds the object, and points in the box, each labelled 1 \
on the object and 0 off it, all in {unit}. Example:
<think>The left cup is nearer to the plate.</think><answer>{{"bbox": [12, 30, 58, 94], "points": [[33, 60, 1], [16, 88, 0]]}}</answer>
Question: {question}"""

# The model types that can be the policy, and what their own grounding counts in.
COORDINATES = {"qwen2_5_vl": "pixels", "qwen2_vl": "thousandths", "qwen3_vl": "thousandths"}

# Attention and MLP projections of the language model; the vision tower has projections of the same names and stays as it is.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class Policy:
    model: PeftModel
    processor: object  # chat template, tokenizer and image processor
    banned: torch.Tensor  # bool [V]: ids that must never be sampled
    stop: torch.Tensor  # [k] ids that end an answer
    coordinates: str = "pixels"  # what its answers count in: pixels of the square picture, or thousandths of its sides

    @property
    def base(self):
        """The transformers model under the adapter, such as a Qwen2_5_VLForConditionalGeneration."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        return self.base.lm_head.weight.device

    def frame(self, size: int) -> int:
        """The side of a size x size picture as the answers count it."""
        return 1000 if self.coordinates == "thousandths" else size

    @contextmanager
    def reference(self):
        """The frozen reference policy: this one with its adapter switched off, so no second model is held."""
        with self.model.disable_adapter():
            yield


@dataclass
class Prompt:
    """One question about one picture, encoded."""

    ids: torch.Tensor  # [P]
    embeds: torch.Tensor  # [P, D] token embeddings, the picture's features in their places
    positions: torch.Tensor  # [3, P] M-RoPE positions: time, height, width
    picture: torch.Tensor  # bool [P]: which tokens are the picture's
    deep: tuple[torch.Tensor, ...] = ()  # Qwen3-VL's deepstack: features [picture tokens, D] to add after each of the first layers

    @property
    def next_position(self) -> int:
        """Where the answer's positions start: a picture takes fewer positions than tokens, so this is not P."""
        return int(self.positions.max()) + 1


@dataclass
class Completion:
    """One sampled answer. `ids` ends with a stop id unless it was cut off; `logps` are those of the distribution it was drawn from."""

    ids: torch.Tensor  # [L]
    logps: torch.Tensor  # [L] fp32
    truncated: bool
    text: str


# ---------------------------------------------------------------------------------------------------- load


def check_policy(name: str, image_size: int | None = None):
    """The configuration of a policy's folder or hub id. Raises UserError where there is none, where it is another kind of model, and
    where pictures of `image_size` pixels a side do not divide into its cells. Nothing large is loaded."""
    try:
        config = AutoConfig.from_pretrained(str(TINY) if name == "tiny" else name)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"--policy {name}: no model folder of that name, and the hub does not give one ({why})") from None
    if config.model_type not in COORDINATES:
        raise UserError(f"--policy {name} is a {config.model_type} model; the policy must be one of {', '.join(COORDINATES)}")
    if image_size is not None:
        check_size(config, image_size)
    return config


def compute_dtype(load_in: str, device: str) -> torch.dtype:
    """What all that is not in four bits is held and computed in (the adapter is fp32 always).

    bf16 for NF4 on a GPU that computes in it. Before compute capability 8.0 bf16 is emulated, and fp16 overflows in Qwen's vision
    tower: fp32 there, as on a CPU.
    """
    if load_in == "nf4" and (device == "cpu" or emulates_bf16()):
        return torch.float32
    return torch.float32 if load_in == "fp32" else torch.bfloat16


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation for the language model's layers; a 4-bit vision tower or head breaks a Qwen-VL."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )


def load_policy(
    name: str | Path, load_in: str = "nf4", rank: int = 32, adapter: str | Path | None = None, device: str = "cpu",
    checkpointing: bool = False, coordinates: str = "auto", image_size: int | None = None,
) -> Policy:
    """Load a Qwen2.5-VL (or Qwen2-VL, Qwen3-VL) folder or hub id, its base frozen in `load_in` (nf4, bf16 or fp32), with a trainable
    LoRA adapter.

    `adapter` is a folder written by `save_pretrained`; without it a new adapter of rank `rank` starts as the identity.
    "tiny" is the folder in the package. Raises UserError as check_policy does.
    """
    check_policy(str(name), image_size)
    name, dtype = str(TINY) if name == "tiny" else str(name), compute_dtype(load_in, device)
    base = AutoModelForImageTextToText.from_pretrained(
        name, dtype=dtype, quantization_config=four_bits(dtype) if load_in == "nf4" else None, device_map={"": device},
        attn_implementation="sdpa",
    )
    return add_adapter(base, AutoProcessor.from_pretrained(name), rank, adapter, checkpointing, coordinates)


def add_adapter(
    base, processor, rank: int, adapter: str | Path | None = None, checkpointing: bool = False, coordinates: str = "auto"
) -> Policy:
    """Freeze a loaded base and give it a trainable LoRA adapter, a new one or the one in the folder `adapter`."""
    base.requires_grad_(False)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 bitsandbytes 0.50 swaps in a bf16 inference kernel after the first evaluation. It has no
            # backward, so gradients through the base would silently vanish, and sampling would differ from training.
            module.support_avx512bf16_for_cpu = False
    if checkpointing:  # keep only each layer's input and recompute the rest in the backward
        base.activation_checkpointing_enable({"use_reentrant": False})
    if adapter is not None:
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    else:
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LORA_TARGETS))
    coordinates = COORDINATES[base.config.model_type] if coordinates == "auto" else coordinates
    stop = stop_ids(base, processor.tokenizer)
    return Policy(model.eval(), processor, banned_ids(base, processor.tokenizer, stop), stop, coordinates)


def merge(name: str, adapter: str | Path, folder: str | Path) -> None:
    """Write the policy `name` with `adapter` added into its weights, in bf16, as an ordinary model folder with its processor."""
    policy = load_policy(name, "bf16", adapter=adapter)
    policy.model.merge_and_unload().save_pretrained(folder)
    policy.processor.save_pretrained(folder)


def stop_ids(model, tokenizer) -> torch.Tensor:
    """[k] the ids at which the model's own generation_config stops (Qwen's: <|im_end|> and <|endoftext|>), and the tokenizer's eos."""
    told = model.generation_config.eos_token_id
    told = [] if told is None else [told] if isinstance(told, int) else told
    return torch.tensor(sorted({*told, tokenizer.eos_token_id}), device=model.lm_head.weight.device)


def banned_ids(model, tokenizer, stop: torch.Tensor) -> torch.Tensor:
    """Bool [V]: what no answer may hold. Placeholders of pictures and videos (a sampled one would ask the next forward for a picture),
    ids without a token, and the padding where it does not end an answer."""
    config = model.config
    banned = torch.zeros(model.lm_head.weight.shape[0], dtype=torch.bool, device=model.lm_head.weight.device)
    banned[len(tokenizer) :] = True
    vision = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
    for token in (*vision, tokenizer.convert_tokens_to_ids("<|vision_pad|>"), tokenizer.pad_token_id):
        if token is not None and token < len(banned):
            banned[token] = True
    banned[stop] = False
    return banned


# ---------------------------------------------------------------------------------------------------- prompt


def instruction(question: str, width: int, height: int, coordinates: str = "pixels") -> str:
    """What the policy is told about one question."""
    unit = f"pixels of the {width} x {height} picture" if coordinates == "pixels" else "thousandths of the picture's width and height"
    return PROMPT.format(question=question.strip(), unit=unit)


def prompt_text(processor, question: str, width: int, height: int, coordinates: str = "pixels") -> str:
    """The chat text of one question, with one picture placeholder."""
    text = instruction(question, width, height, coordinates)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def encode(policy: Policy, images: list[Image.Image], questions: list[str]) -> list[Prompt]:
    """Encode B questions: the vision tower sees each picture once, here, and never again.

    All pictures have the same size, a multiple of the model's cell (28 pixels, Qwen3-VL 32) a side.
    """
    base, prompts = policy.base, []
    step = max(1, 4096 * 14 * 14 // (images[0].width * images[0].height))  # pictures a call: at most about 4,096 patches
    for i in range(0, len(images), step):
        part = images[i : i + step]
        texts = [prompt_text(policy.processor, q, im.width, im.height, policy.coordinates) for q, im in zip(questions[i : i + step], part)]
        inputs = policy.processor(text=texts, images=part, padding=True, return_tensors="pt").to(policy.device)
        positions, _ = base.model.get_rope_index(
            inputs.input_ids, inputs.mm_token_type_ids, image_grid_thw=inputs.image_grid_thw, attention_mask=inputs.attention_mask
        )  # [3, b, P]
        seen = base.model.get_image_features(inputs.pixel_values, inputs.image_grid_thw)  # pooler_output: b x [picture tokens, D]
        embeds = base.get_input_embeddings()(inputs.input_ids)  # [b, P, D]
        picture = inputs.input_ids == base.config.image_token_id  # [b, P]
        embeds = embeds.masked_scatter(picture[..., None], torch.cat(seen.pooler_output).to(embeds.dtype))
        for b, real in enumerate(inputs.attention_mask.bool()):  # [P]
            deep = tuple(layer[b] for layer in getattr(seen, "deepstack_features", ()))
            prompts.append(Prompt(inputs.input_ids[b, real], embeds[b, real], positions[:, b, real], picture[b, real], deep))
    return prompts


def deepstack(prompts: list[Prompt], picture: torch.Tensor) -> dict:
    """What a Qwen3-VL's language model is given beside its embeddings, the picture's tokens being those of `picture`, bool [B, T]."""
    if not prompts[0].deep:
        return {}
    return {"visual_pos_masks": picture, "deepstack_visual_embeds": [torch.cat(layer) for layer in zip(*(p.deep for p in prompts))]}


# ---------------------------------------------------------------------------------------------------- sample


class Fp32Head(torch.autograd.Function):
    """hidden [n, D] @ weight [V, D] -> logits [n, V] that are never rounded to bf16, as the head's own forward would do: at values of 16
    to 32 a bf16 step is 0.125, so that alone would move every ratio away from 1. The products are bf16's, their sums fp32."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        if hidden.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden.float() @ weight.float().T  # a CPU has no such kernel

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        [weight] = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None


def token_logits(policy: Policy, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """Hidden states [..., D] -> fp32 logits [..., V] of the one distribution that is sampled from and trained on."""
    head = policy.base.lm_head
    if head.weight.dtype == torch.float32:
        logits = head(hidden)
    else:
        logits = Fp32Head.apply(hidden.flatten(0, -2), head.weight).unflatten(0, hidden.shape[:-1])
    return (logits / temperature).masked_fill(policy.banned, -1e30)  # finite, so that 0 * logit stays 0 in the entropy


def draw(logp: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [..., V] and one uniform number in [0, 1) each [...] -> the tokens that they stand for [...]."""
    heap = logp.double().exp().cumsum(-1)  # token i owns the stretch from heap[i - 1] to heap[i]; a banned one owns nothing
    return torch.searchsorted(heap, chance.double()[..., None] * heap[..., -1:], right=True)[..., 0]


@torch.no_grad()
def sample(
    policy: Policy, prompts: list[Prompt], group: int, max_new_tokens: int, temperature: float = 1.0, chance: torch.Tensor | None = None
) -> list[list[Completion]]:
    """Draw `group` answers to each of B prompts -> B lists of `group` completions; temperature 0 is greedy.

    No top-k, no top-p, no repetition penalty, nothing from the model's generation_config: GRPO's ratio needs the distribution
    that was sampled to be the one that is trained. `chance` [B, G, L] holds a uniform number for every token, so that an answer is, up
    to rounding, the same whatever is sampled beside it; without it they come from torch's global random state.
    """
    if chance is None and temperature:
        chance = torch.rand(len(prompts), group, max_new_tokens)
    language, tokenizer = policy.base.model.language_model, policy.processor.tokenizer
    stop, device, length = policy.stop, policy.device, max(len(p.ids) for p in prompts)
    pad = [length - len(p.ids) for p in prompts]
    # Padding goes to the left, so that every prompt's last token stands in the last column.
    embeds = torch.stack([torch.nn.functional.pad(p.embeds, (0, 0, n, 0)) for p, n in zip(prompts, pad)])  # [B, P, D]
    positions = torch.stack([torch.nn.functional.pad(p.positions, (n, 0)) for p, n in zip(prompts, pad)], 1)  # [3, B, P]
    mask = torch.stack([torch.arange(length, device=device) >= n for n in pad])  # [B, P]
    picture = torch.stack([torch.nn.functional.pad(p.picture, (n, 0)) for p, n in zip(prompts, pad)])  # [B, P]
    cache = DynamicCache(config=policy.base.config.text_config)
    hidden = language(
        inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True,
        **deepstack(prompts, picture),
    ).last_hidden_state[:, -1:]  # [B, 1, D]

    # The prompt was read once and stays once in the cache: a question's answers grow side by side in its row, G tokens a step, and
    # each sees the prompt and itself, as in the packed rows of the update.
    hidden = hidden.expand(-1, group, -1)  # [B, G, D]
    mask = mask[:, None, None].expand(-1, 1, group, -1)  # [B, 1, G, P]
    own = torch.eye(group, dtype=torch.bool, device=device).expand(len(prompts), 1, -1, -1)  # [B, 1, G, G]
    position = torch.tensor([p.next_position for p in prompts], device=device)[:, None].expand(-1, group)  # [B, G]
    ids = torch.zeros(len(prompts), group, max_new_tokens, dtype=torch.long, device=device)  # [B, G, L]
    logps = torch.zeros(ids.shape, device=device)  # [B, G, L]
    lengths = torch.full(position.shape, max_new_tokens, device=device)  # [B, G]
    alive = torch.ones(position.shape, dtype=torch.bool, device=device)  # [B, G]
    live = torch.arange(len(prompts), device=device)  # [b] the questions that still have an unfinished answer
    for t in range(max_new_tokens):
        logp = token_logits(policy, hidden, temperature or 1.0).log_softmax(-1)  # [b, G, V]
        token = draw(logp, chance[live.cpu(), :, t].to(device)) if temperature else logp.argmax(-1)  # [b, G]
        ids[live, :, t], logps[live, :, t] = token, logp.gather(-1, token[..., None])[..., 0]
        ends = torch.isin(token, stop)  # [b, G]
        lengths[live] = torch.where(alive[live] & ends, t + 1, lengths[live])
        alive[live] &= ~ends
        going = alive[live].any(1)  # [b]
        if not going.any() or t + 1 == max_new_tokens:
            break
        if not going.all():  # what is finished takes no more time or memory
            live, token, mask = live[going], token[going], mask[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
        mask = torch.cat([mask, own[live]], -1)  # [b, 1, G, P + (t + 1) G]
        hidden = language(
            inputs_embeds=policy.base.get_input_embeddings()(token), attention_mask=mask,
            position_ids=(position[live] + t).expand(3, -1, -1), past_key_values=cache, use_cache=True,
        ).last_hidden_state  # [b, G, D]
    # Where an answer ends is known from its length, never from its ids: padding and a stop id may be one token.
    groups = [
        [Completion(ids[b, g, :size], logps[b, g, :size], bool(alive[b, g]), "") for g, size in enumerate(sizes)]
        for b, sizes in enumerate(lengths.tolist())
    ]
    for answers in groups:
        for answer, text in zip(answers, tokenizer.batch_decode([a.ids for a in answers], skip_special_tokens=True)):
            answer.text = text
    return groups


# ---------------------------------------------------------------------------------------------------- log-probabilities


def pack(policy: Policy, prompts: list[Prompt], groups: list[list[torch.Tensor]]):
    """Lay each prompt and its answers in one row: [prompt, answer 1, ..., answer G].

    Returns what the language model is called with (embeds [B, T, D], mask bool [B, 1, T, T], positions [3, B, T]), and for every answer
    token, in order, where among all B * T hidden states the one is that predicts it, and the token itself: LongTensors [sum of all L].
    """
    rows = [len(p.ids) + sum(len(ids) - 1 for ids in group) for p, group in zip(prompts, groups)]
    size, embed = max(rows), policy.base.get_input_embeddings()
    embeds = prompts[0].embeds.new_zeros(len(prompts), size, prompts[0].embeds.shape[-1])
    positions = torch.zeros(3, len(prompts), size, dtype=torch.long)
    segment = torch.full((len(prompts), size), -1)  # 0: prompt, 1..G: answers, -1: padding
    picture = torch.zeros(len(prompts), size, dtype=torch.bool, device=policy.device)
    index, target = [], []
    for b, (prompt, group) in enumerate(zip(prompts, groups)):
        start = len(prompt.ids)
        parts, places = [prompt.embeds], [prompt.positions.cpu()]
        segment[b, :start], picture[b, :start] = 0, prompt.picture
        for g, ids in enumerate(group, 1):
            read = len(ids) - 1  # the last token is predicted, never read
            parts.append(embed(ids[:-1]))
            places.append((prompt.next_position + torch.arange(read)).expand(3, -1))  # every answer starts where the prompt ends
            segment[b, start : start + read] = g
            index += [b * size + i for i in (len(prompt.ids) - 1, *range(start, start + read))]  # the prompt's last token predicts the first
            target.append(ids)
            start += read
        embeds[b, :start] = torch.cat(parts)
        positions[:, b, :start] = torch.cat(places, 1)
    segment = segment.to(policy.device)
    same = segment[:, :, None] == segment[:, None, :]  # [B, T, T]
    causal = torch.ones(size, size, dtype=torch.bool, device=policy.device).tril()
    mask = causal & (same | (segment[:, None, :] == 0))
    called = dict(inputs_embeds=embeds, attention_mask=mask[:, None], position_ids=positions.to(policy.device), **deepstack(prompts, picture))
    return called, torch.tensor(index, device=policy.device), torch.cat(target)


def chosen_logprobs(policy: Policy, hidden: torch.Tensor, target: torch.Tensor, temperature: float):
    """Log-probabilities [n] of the tokens `target` [n] and the entropy [n] of each choice, from hidden states [n, D], in fp32."""
    logits = token_logits(policy, hidden, temperature)  # [n, V]
    normaliser = logits.logsumexp(-1)  # [n]
    entropy = normaliser.detach() - (logits.detach().softmax(-1) * logits.detach()).sum(-1)
    return logits.gather(1, target[:, None])[:, 0] - normaliser, entropy


def logprobs(policy: Policy, prompts: list[Prompt], groups: list[list[torch.Tensor]], temperature: float = 1.0):
    """Log-probabilities of B groups of answers (B lists of ids [L]) -> (logps, entropy), both fp32 [sum of all L], answer after answer.

    Logits [tokens, V] are made a chunk at a time, for answer tokens alone, and made again in the backward: 8 answers of 512 tokens
    over 151,936 words would be 2.5 GB whole, and twice that with their gradient.
    """
    called, index, target = pack(policy, prompts, groups)
    hidden = policy.base.model.language_model(**called, use_cache=False).last_hidden_state  # [B, T, D]
    # index_select, because the backward of plain indexing adds in whatever order its threads come: same seed, other last digits
    hidden = hidden.flatten(0, 1).index_select(0, index)  # [sum of L, D]
    step = max(1, 2**26 // policy.banned.numel())  # at most 256 MB of fp32 logits at a time
    parts = [
        checkpoint(chosen_logprobs, policy, h, t, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(step), target.split(step))
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
