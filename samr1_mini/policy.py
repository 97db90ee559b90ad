"""The policy: a Qwen-VL that thinks in text and answers with a box and points. Load it, prompt it, sample it, score it.

The prompt (about 150 tokens of text and up to 900 of the picture) is long and the same for all G answers of a group,
so it is encoded once: `encode` runs the vision tower once a question; in `sample` and `logprobs` the language model
reads the prompt once, and every answer sees the prompt and itself (attention.py).

Shapes: B questions, G answers a question, P prompt tokens, L answer tokens, T packed tokens, D width, V vocabulary.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from .attention import IMPLEMENTATION, Cache, PackedRow
from .config import UserError, check_size, first_line
from .replay import DEVICES, FixedCache, TokenReader
from .files import cause, check_adapter_files, check_policy_files, check_policy_is_whole
from .memory import compute_dtype
from .tokens import answer_text, banned_ids, choose_tokens, opened_answer, stop_ids, token_logits

TINY = (
    Path(__file__).parent / "tiny" / "policy"
)  # an ordinary model folder: from_pretrained reads it

PROMPT = """Compare the objects in the picture and find the one that the question means. Think inside \
<think> </think>, then give the final answer inside <answer> </answer> as JSON: one box that tightly holds the object, \
and points in the box, each labelled 1 on the object and 0 off it, all in {unit}. Example:
<think>The left cup is nearer to the plate.</think>\
<answer>{{"bbox": [12, 30, 58, 94], "points": [[33, 60, 1], [16, 88, 0]]}}</answer>
Question: {question}"""

# The model types that can be the policy, and what their own grounding counts in.
COORDINATES = {"qwen2_5_vl": "pixels", "qwen2_vl": "thousandths", "qwen3_vl": "thousandths"}

# The language model's projections of attention and MLP; the vision tower's, of the same names, stay as they are.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class Policy:
    model: PeftModel
    processor: object  # chat template, tokenizer and image processor
    banned: torch.Tensor  # bool [V]: ids that must never be sampled
    stop: torch.Tensor  # [k] ids that end an answer
    coordinates: str = (
        "pixels"  # what its answers count in: pixels of the square picture, or thousandths of its sides
    )

    def __post_init__(
        self,
    ):  # any other attention would let answers see each other, and say nothing
        assert self.base.config.text_config._attn_implementation == IMPLEMENTATION["text_config"]

    @property
    def base(self):
        """The transformers model under the adapter, such as a Qwen2_5_VLForConditionalGeneration."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        return self.base.lm_head.weight.device

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The adapter's weights; all others are frozen."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def coordinate_range(self, size: int) -> int:
        """The side of a size x size picture as the answers count it."""
        return 1000 if self.coordinates == "thousandths" else size

    def reference(self):
        """The frozen reference policy: within, this one with its adapter switched off, so no second model is held."""
        return self.model.disable_adapter()


@dataclass
class Prompt:
    """One question about one picture, encoded."""

    ids: torch.Tensor  # [P]
    embeds: torch.Tensor  # [P, D] token embeddings, the picture's features in their places
    positions: torch.Tensor  # [3, P] M-RoPE positions: time, height, width
    picture: torch.Tensor  # bool [P]: which tokens are the picture's
    deep: tuple[
        torch.Tensor, ...
    ] = ()  # Qwen3-VL's deepstack: [picture tokens, D] to add after the first layers
    opened: str = ""  # start of the answer that the chat template writes, such as "<think>\n"

    @property
    def next_position(self) -> int:
        """Where the answer's positions start: a picture takes fewer positions than tokens, so this is not P."""
        return int(self.positions.max()) + 1


@dataclass
class Completion:
    """One sampled answer. `ids` ends with a stop id unless it was cut off; `logps` are of what it was drawn from."""

    ids: torch.Tensor  # [L]
    logps: torch.Tensor  # [L] fp32
    truncated: bool
    text: str  # the answer as it is parsed, logged and shown: with Prompt.opened, which `ids` lack


# ---------------------------------------------------------------------------------------------------- load


def check_policy(name: str, image_size: int | None = None):
    """The configuration of a policy's folder or hub id; no weights are loaded.

    Raises UserError where there is none, for another kind of model, for a damaged or missing file of
    a folder, and where pictures of `image_size` pixels a side do not divide into the model's cells.
    """
    folder = TINY if name == "tiny" else Path(name)
    why = "no model folder of that name, nor does the hub give one"
    if folder.is_dir():
        why = "its config.json cannot be used"
        check_policy_files(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else name)
    except Exception as error:  # for wrong values the library raises anything, such as TypeError
        raise UserError(f"--policy {name}: {why} ({first_line(error)})") from None
    if config.model_type not in COORDINATES:
        raise UserError(
            f"--policy {name} is a {config.model_type} model; it must be one of {', '.join(COORDINATES)}"
        )
    if folder.is_dir():
        check_policy_is_whole(folder)
    if image_size is not None:
        check_size(config, image_size)
    return config


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation for the language model's layers; a 4-bit vision tower or head breaks a Qwen-VL."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )


def load_policy(
    name: str | Path,
    load_in: str = "nf4",
    rank: int = 32,
    adapter: str | Path | None = None,
    device: str = "cpu",
    checkpointing: bool = False,
    coordinates: str = "auto",
) -> Policy:
    """Load a Qwen2.5-VL (or Qwen2-VL, Qwen3-VL) folder or hub id, its base frozen in `load_in` (nf4, bf16 or fp32),
    with a trainable LoRA adapter.

    `adapter` is a folder written by `save_pretrained`; without it a new adapter of rank `rank` starts as the identity.
    "tiny" is the folder in the package. Raises UserError as check_policy does.
    """
    check_policy(str(name))
    if adapter is not None:
        check_adapter_files(Path(adapter))
    folder = str(TINY) if name == "tiny" else str(name)
    dtype = compute_dtype(load_in, device)
    quantization = four_bits(dtype) if load_in == "nf4" else None
    try:
        base, found = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization,
            device_map=device,
            attn_implementation=IMPLEMENTATION,
            output_loading_info=True,
        )
        processor = AutoProcessor.from_pretrained(folder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # for files that do not fit the libraries raise anything
        why = f"--policy {name} cannot be loaded ({cause(error)})"
        raise UserError(f"{why}: download its files again") from None
    if found["missing_keys"]:  # the library draws these weights, and only prints a warning
        first = min(found["missing_keys"])
        raise UserError(f"--policy {name}: its files lack weights, such as {first}")
    check_template(processor, name)
    return add_adapter(base, processor, rank, adapter, checkpointing, coordinates)


def add_adapter(
    base,
    processor,
    rank: int,
    adapter: str | Path | None = None,
    checkpointing: bool = False,
    coordinates: str = "auto",
) -> Policy:
    """Freeze a loaded base and give it a trainable LoRA adapter, a new one or the one in the folder `adapter`."""
    base.requires_grad_(False)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 bitsandbytes 0.50 swaps in a bf16 inference kernel after the first evaluation.
            # It has no backward, so gradients through the base would silently vanish, and sampling would differ from
            # training.
            module.support_avx512bf16_for_cpu = False
    if checkpointing:  # keep only each layer's input and recompute the rest in the backward
        base.activation_checkpointing_enable({"use_reentrant": False})
    if adapter is not None:
        misfit = f"adapter {adapter} does not fit this policy"
        try:
            with warnings.catch_warnings():  # where the file lacks weights PEFT only warns
                warnings.filterwarnings("error", "Found missing adapter keys")
                model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        except torch.OutOfMemoryError:
            raise
        except UserWarning:
            raise UserError(f"{misfit} (it is of other layers)") from None
        except Exception as error:  # for a damaged configuration PEFT raises anything
            raise UserError(f"{misfit} ({cause(error)})") from None
        with safe_open(
            Path(adapter) / "adapter_model.safetensors", "pt"
        ) as file:  # PEFT loads what has a place
            if len(file.keys()) != sum("lora_" in name for name, _ in model.named_parameters()):
                raise UserError(f"{misfit} (it is of other layers)")
    else:
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LORA_TARGETS
        )
        model = get_peft_model(base, lora)
    coordinates = COORDINATES[base.config.model_type] if coordinates == "auto" else coordinates
    stop = stop_ids(base, processor.tokenizer)
    return Policy(
        model.eval(), processor, banned_ids(base, processor.tokenizer, stop), stop, coordinates
    )


# ---------------------------------------------------------------------------------------------------- prompt


def instruction(question: str, width: int, height: int, coordinates: str = "pixels") -> str:
    """What the policy is told about one question."""
    unit = "thousandths of the picture's width and height"
    if coordinates == "pixels":
        unit = f"pixels of the {width} x {height} picture"
    return PROMPT.format(question=question.strip(), unit=unit)


def prompt_text(
    processor, question: str, width: int, height: int, coordinates: str = "pixels"
) -> str:
    """The chat text of one question, with one picture placeholder."""
    text = instruction(question, width, height, coordinates)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def check_template(processor, name: str | Path) -> None:
    """Raise UserError where the chat template fails, or leaves out the picture or the question."""
    try:
        text = prompt_text(processor, "the red star", 28, 28)
    except Exception as error:  # a template is a program, and may raise anything
        why = f"its chat template cannot be used ({cause(error)})"
        raise UserError(f"--policy {name}: {why}") from None
    if text.count(processor.image_token) != 1 or "Question: the red star" not in text:
        why = "its chat template leaves out the picture or the question"
        raise UserError(f"--policy {name}: {why}")


def encode(policy: Policy, images: list[Image.Image], questions: list[str]) -> list[Prompt]:
    """Encode B questions: the vision tower sees each picture once, here, and never again.

    All pictures have the same size, a multiple of the model's cell (28 pixels, Qwen3-VL 32, tiny 14) a side.
    """
    base, prompts = policy.base, []
    step = max(
        1, 4096 * 14 * 14 // (images[0].width * images[0].height)
    )  # pictures a call: 4,096 patches of 14 pixels
    for i in range(0, len(images), step):
        batch = images[i : i + step]
        pairs = zip(questions[i : i + step], batch)
        told = [(q, x.width, x.height, policy.coordinates) for q, x in pairs]
        texts = [prompt_text(policy.processor, *one) for one in told]
        opened = [opened_answer(text, instruction(*one)) for text, one in zip(texts, told)]
        inputs = policy.processor(text=texts, images=batch, padding=True, return_tensors="pt").to(
            policy.device
        )
        positions, _ = base.model.get_rope_index(
            inputs.input_ids,
            inputs.mm_token_type_ids,
            image_grid_thw=inputs.image_grid_thw,
            attention_mask=inputs.attention_mask,
        )  # [3, b, P]
        # pooler_output: b x [picture tokens, D]
        seen = base.model.get_image_features(inputs.pixel_values, inputs.image_grid_thw)
        embeds = base.get_input_embeddings()(inputs.input_ids)  # [b, P, D]
        picture = inputs.input_ids == base.config.image_token_id  # [b, P]
        embeds = embeds.masked_scatter(
            picture[..., None], torch.cat(seen.pooler_output).to(embeds.dtype)
        )
        for b, real in enumerate(inputs.attention_mask.bool()):  # [P]
            deep = tuple(layer[b] for layer in getattr(seen, "deepstack_features", ()))
            ids = inputs.input_ids[b, real]
            place = positions[:, b, real]  # [3, P]
            prompts.append(Prompt(ids, embeds[b, real], place, picture[b, real], deep, opened[b]))
    return prompts


def deepstack(prompts: list[Prompt], picture: torch.Tensor) -> dict:
    """What Qwen3-VL's language model takes beside its embeddings; `picture`, bool [B, T]: the picture's tokens."""
    if not prompts[0].deep:
        return {}
    deep = [torch.cat(layer) for layer in zip(*(p.deep for p in prompts))]
    return {"visual_pos_masks": picture, "deepstack_visual_embeds": deep}


# ---------------------------------------------------------------------------------------------------- sample


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: list[Prompt],
    group: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: torch.Tensor | None = None,
) -> list[list[Completion]]:
    """Draw `group` answers to each of B prompts -> B lists of `group` completions; temperature 0 is greedy.

    No top-k, no top-p, no repetition penalty, nothing from the model's generation_config: GRPO's ratio needs the
    distribution that was sampled to be the one that is trained. `uniforms` [B, G, L] holds a uniform number for every
    token, so that an answer is, up to rounding, the same whatever is sampled beside it; without it they come from
    torch's global random state.
    """
    language, embed, device = (
        policy.base.model.language_model,
        policy.base.get_input_embeddings(),
        policy.device,
    )
    tokenizer, stop = policy.processor.tokenizer, policy.stop
    if temperature:
        uniforms = (
            torch.rand(len(prompts), group, max_new_tokens) if uniforms is None else uniforms
        ).to(device)
    sizes = [len(p.ids) for p in prompts]
    cache = (FixedCache if device.type in DEVICES else Cache)(sizes, group, device)
    reader = TokenReader(
        language, cache
    )  # on a GPU it records a token as a CUDA graph and replays it
    hidden = language(
        inputs_embeds=pad_sequence([p.embeds for p in prompts], True),
        layout=cache,
        use_cache=False,  # [B, P, D]
        position_ids=pad_sequence([p.positions.T for p in prompts], True).permute(
            2, 0, 1
        ),  # [3, B, P]
        **deepstack(prompts, pad_sequence([p.picture for p in prompts], True)),
    ).last_hidden_state  # [B, P, D]
    hidden = torch.stack([h[n - 1] for h, n in zip(hidden, sizes)])[:, None].expand(
        -1, group, -1
    )  # [B, G, D]
    position = torch.tensor([p.next_position for p in prompts], device=device)[:, None].expand(
        -1, group
    )  # [B, G]
    ids = torch.zeros(
        len(prompts), group, max_new_tokens, dtype=torch.long, device=device
    )  # [B, G, L]
    logps = torch.zeros(ids.shape, device=device)  # [B, G, L]
    unfinished = torch.arange(
        len(prompts), device=device
    )  # [b] questions that are still in the batch
    for t in range(max_new_tokens):
        logp = token_logits(policy, hidden, temperature or 1.0).log_softmax(-1)  # [b, G, V]
        token = (
            choose_tokens(logp, uniforms[unfinished, :, t]) if temperature else logp.argmax(-1)
        )  # [b, G]
        ids[unfinished, :, t], logps[unfinished, :, t] = (
            token,
            logp.gather(-1, token[..., None])[..., 0],
        )
        if t + 1 == max_new_tokens:
            break
        if t % 8 == 7:  # not at every token: to ask a GPU for a number is to wait for it
            ended = torch.isin(ids[unfinished, :, : t + 1], stop).any(-1).all(-1)  # [b]
            if ended.all():
                break
            if (stay := reader.drop(ended)) is not None:
                unfinished, token = unfinished[stay], token[stay]
        cache.grow()
        hidden = reader(embed(token), (position[unfinished] + t).expand(3, -1, -1))  # [b, G, D]
    if reader.failed:
        DEVICES.discard(device.type)  # the answers after these are not recorded either
    # An answer ends with its first stop token; what was drawn after it, while others went on, is left out.
    stopped = torch.isin(ids, stop)  # [B, G, L]
    truncated = ~stopped.any(-1)  # [B, G]
    lengths = torch.where(truncated, max_new_tokens, stopped.int().argmax(-1) + 1)  # [B, G]
    answers = []
    for i, (n, cut) in enumerate(zip(lengths.flatten().tolist(), truncated.flatten().tolist())):
        answer, logp = ids.flatten(0, 1)[i, :n], logps.flatten(0, 1)[i, :n]
        text = tokenizer.decode(
            answer if cut else answer[:-1]
        )  # other special tokens stay, and break the format
        text = answer_text(prompts[i // group].opened, text, cut)
        answers.append(Completion(answer, logp, cut, text))
    return [answers[i : i + group] for i in range(0, len(answers), group)]


# ---------------------------------------------------------------------------------------------------- log-probabilities


def pack(policy: Policy, prompts: list[Prompt], groups: list[list[torch.Tensor]]):
    """Lay prompts and answers in one row without padding: [prompt 1, its answers, prompt 2, its answers, ...].

    Returns what the language model is called with (embeds [1, T, D], positions [3, 1, T], the layout), and for every
    answer token, in order, the index of the hidden state that predicts it, and the token itself: LongTensors [S].
    """
    device = policy.device
    read = [
        [len(ids) - 1 for ids in group] for group in groups
    ]  # the last token of an answer is predicted, never read
    embeds = policy.base.get_input_embeddings()(
        torch.cat([ids[:-1] for group in groups for ids in group])
    )
    parts, positions, picture, index, start = [], [], [], [], 0
    for prompt, lengths, answers in zip(
        prompts, read, embeds.split([sum(lengths) for lengths in read])
    ):
        parts += [prompt.embeds, answers]
        after = [
            prompt.next_position + torch.arange(n) for n in lengths
        ]  # every answer starts where the prompt ends
        positions += [prompt.positions, torch.cat(after).expand(3, -1).to(device)]
        picture += [prompt.picture, prompt.picture.new_zeros(len(answers))]
        last = (
            start + len(prompt.ids) - 1
        )  # the prompt's last token predicts the first of each answer
        start = last + 1
        for n in lengths:
            index += [last, *range(start, start + n)]
            start += n
    inputs = dict(
        inputs_embeds=torch.cat(parts)[None],
        position_ids=torch.cat(positions, 1)[:, None],
        layout=PackedRow([len(p.ids) for p in prompts], read),
        **deepstack(prompts, torch.cat(picture)[None]),
    )
    return (
        inputs,
        torch.tensor(index, device=device),
        torch.cat([ids for group in groups for ids in group]),
    )


def chosen_logprobs(policy: Policy, hidden: torch.Tensor, target: torch.Tensor, temperature: float):
    """Hidden states [n, D] -> log-probabilities [n] of the tokens `target` [n] and the entropy [n] there, in fp32."""
    logits = token_logits(policy, hidden, temperature)  # [n, V]
    normaliser = logits.logsumexp(-1)  # [n]
    entropy = normaliser.detach() - (logits.detach().softmax(-1) * logits.detach()).sum(-1)
    return logits.gather(1, target[:, None])[:, 0] - normaliser, entropy


def logprobs(
    policy: Policy,
    prompts: list[Prompt],
    groups: list[list[torch.Tensor]],
    temperature: float = 1.0,
):
    """Log-probabilities of B groups of answers (B lists of ids [L]) -> (logps, entropy), both fp32 [sum of all L],
    answer after answer.

    Logits [tokens, V] are made a chunk at a time, for answer tokens alone, and made again in the backward: 8 answers
    of 512 tokens over 151,936 words would be 2.5 GB whole, and twice that with their gradient.
    """
    inputs, index, target = pack(policy, prompts, groups)
    hidden = policy.base.model.language_model(
        **inputs, use_cache=False
    ).last_hidden_state  # [1, T, D]
    # index_select, because the backward of plain indexing adds in whatever order its threads come: same seed, other
    # last digits
    hidden = hidden[0].index_select(0, index)  # [sum of L, D]
    step = max(1, 2**26 // policy.banned.numel())  # at most 256 MB of fp32 logits at a time
    parts = [
        checkpoint(chosen_logprobs, policy, h, t, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(step), target.split(step))
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
