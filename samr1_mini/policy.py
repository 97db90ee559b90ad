"""The policy: a Qwen-VL that thinks in text and answers with a box and points.

This file loads it, encodes its prompts, and computes the log-probabilities of its answers.
decoding.py samples the answers. A prompt has 150 to 200 text tokens and up to 900 picture
tokens.
All answers to a question share its prompt, so the model reads it only once (attention.py).

Shapes: B questions, G answers to each, P prompt tokens, L answer tokens, D model width,
V vocabulary size, S tokens in all answers. A packed row (see `pack`) has T tokens: prompts, and
their answers without the last token of each answer.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from .attention import IMPLEMENTATION, PackedRow
from .config import PACKAGED, UserError, cause, check_image_size, first_line
from .files import check_adapter_files, check_policy_files, check_policy_is_whole, loading_error
from .files import read_adapter, refuse_missing_weights, refuse_quantised
from .lora import compute_in_input_dtype, new_adapter
from .memory import compute_dtype
from .prompt import PROMPT, instruction
from .tokens import CHUNK_LOGITS, banned_ids, opened_answer, stop_ids, token_logits

TINY = Path(__file__).parent / "tiny" / "policy"  # an ordinary model folder for from_pretrained

# Model types that can be the policy -> unit of their coordinates (1 / 1000 of width or height)
COORDINATES = {"qwen2_5_vl": "pixels", "qwen2_vl": "thousandths", "qwen3_vl": "thousandths"}

TOWER_PIXELS = 4096 * 14 * 14  # limit for one call of the vision tower: 4,096 patches


@dataclass
class Policy:
    """Hold a Qwen-VL with its adapter, its stop ids and its banned ids."""

    model: PeftModel  # the base model with the adapter (without one while the tiny base is made)
    processor: object  # chat template, tokenizer and image processor
    coordinates: str = "auto"  # pixels, thousandths, or auto for the model's own unit
    prompt: str = PROMPT  # with {question} and {unit}, see prompt.py
    cuda_graphs: bool = True  # False after the recording of a CUDA graph has failed (decoding.py)
    stop: torch.Tensor = field(init=False)  # [k] ids that end an answer
    banned: torch.Tensor = field(init=False)  # bool [V], True for ids that are never sampled

    def __post_init__(self):
        config, tokenizer = self.base.config, self.processor.tokenizer
        # Without the attention of attention.py, answers would see each other, and no error says so.
        assert config.text_config._attn_implementation == IMPLEMENTATION["text_config"]
        if self.coordinates == "auto":
            self.coordinates = COORDINATES[config.model_type]
        self.stop = stop_ids(self.base, tokenizer)
        self.banned = banned_ids(self.base, tokenizer, self.stop)

    @property
    def base(self):
        """Return the transformers model under the adapter."""
        if isinstance(self.model, PeftModel):
            return self.model.get_base_model()
        return self.model

    @property
    def device(self) -> torch.device:
        return self.base.lm_head.weight.device

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Return the adapter's weights. All other weights are frozen."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def answer_side(self, size: int) -> int:
        """Return the largest coordinate in an answer. The smallest is 0.

        If answers are in pixels, it is `size`, the side of the policy's picture. If they are in
        thousandths of the picture's sides, it is 1,000.
        """
        if self.coordinates == "thousandths":
            return 1000
        return size

    def as_reference(self):
        """Return a context for a `with` block. In the block, the adapter is switched off.

        So the policy in the block is the frozen base model.
        """
        return self.model.disable_adapter()

    def keep_layers(self, count: int) -> None:
        """Keep the activations of the last `count` layers. The backward recomputes the others."""
        layers = self.base.model.language_model.layers
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = i < len(layers) - count


@dataclass
class Prompt:
    """Hold one encoded question about one picture."""

    ids: torch.Tensor  # [P]
    embeds: torch.Tensor  # [P, D] embeddings of text tokens, features of picture tokens
    positions: torch.Tensor  # [3, P] rotary positions in time, height and width (M-RoPE)
    picture: torch.Tensor  # bool [P], True for picture tokens
    # Qwen3-VL: more features of the picture, each tensor [picture tokens, D]. The model adds one
    # tensor to the hidden states after each of the first layers.
    deep: tuple[torch.Tensor, ...] = ()
    opened: str = ""  # the answer's start, if the chat template writes it: "<think>\n"

    @property
    def next_position(self) -> int:
        """Return an answer's first position.

        It is smaller than P. A picture with 30 rows of 30 tokens takes only 30 positions (M-RoPE).
        """
        return int(self.positions.max()) + 1


# -------------------- load


def model_source(name: str | Path) -> str:
    """Return the folder or hub id of a policy. Some folders are in the package."""
    if name in PACKAGED:
        return str(TINY.with_name(PACKAGED[name]))
    return str(name)


def check_policy(name: str, image_size: int | None = None):
    """Return the configuration of a policy's folder or hub id. No weights are loaded.

    Raises UserError for a model that is missing, damaged or of another kind. One picture token
    covers a cell of pixels. Raises UserError if `image_size` is no multiple of the cell's side.
    """
    folder = Path(model_source(name))
    why = "no such folder, and no such model on the hub: check the name and the network"
    if folder.is_dir():
        why = "its config.json cannot be used: download it again"
        check_policy_files(folder)
    try:
        config = AutoConfig.from_pretrained(model_source(name))
    except Exception as error:  # the library raises many kinds of errors for wrong values
        raise UserError(f"--policy {name}: {why} ({first_line(error)})") from None
    if config.model_type not in COORDINATES:
        known = ", ".join(COORDINATES)
        raise UserError(
            f"--policy {name} is a {config.model_type} model. It must be one of {known}"
        )
    refuse_quantised(config, name)
    if folder.is_dir():
        check_policy_is_whole(folder)
    if image_size is not None:
        check_image_size(config, image_size)
    return config


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return settings for 4 bits (NF4). The vision tower and the head keep 16 or 32 bits."""
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
    """Load a Qwen2.5-VL, Qwen2-VL or Qwen3-VL with a trainable LoRA adapter.

    name: a model folder, a hub id, or a name in PACKAGED for a folder in the package.
    load_in: format of the frozen weights: nf4, bf16 or fp32.
    rank: rank of a new adapter. A new adapter does not change the model's output.
    adapter: folder of a saved adapter to take instead of a new one.
    checkpointing: recompute each layer in the backward, which saves memory.
    coordinates: unit in answers: pixels, thousandths of the picture, or auto (the model's unit).
    Raises UserError for a model or an adapter that cannot be used.
    """
    check_policy(str(name))
    if adapter is not None:
        check_adapter_files(Path(adapter))
    base, processor = load_base(name, load_in, device)
    check_template(processor, name)
    return add_adapter(base, processor, rank, checkpointing, adapter, coordinates)


def load_base(name: str | Path, load_in: str, device: str):
    """Return the model and the processor of a policy. Raises UserError if they cannot be loaded."""
    source = model_source(name)
    dtype = compute_dtype(load_in, device)
    quantization = None
    if load_in == "nf4":
        quantization = four_bits(dtype)
    try:
        base, found = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            quantization_config=quantization,
            device_map=device,
            attn_implementation=IMPLEMENTATION,
            output_loading_info=True,
        )
        processor = AutoProcessor.from_pretrained(source)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors for wrong files
        raise UserError(f"--policy {name} {loading_error(error)}") from None
    refuse_missing_weights(found, f"--policy {name}")
    return base, processor


def add_adapter(
    base, processor, rank: int, checkpointing: bool, adapter=None, coordinates: str = "auto"
) -> Policy:
    """Freeze a base model and add a LoRA adapter: a new one, or the one in the folder `adapter`."""
    base.requires_grad_(False)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 takes another kernel after model.eval().
            # This kernel has no backward, and no error says so. The flag switches it off.
            module.support_avx512bf16_for_cpu = False
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    if adapter is None:
        model = new_adapter(base, rank)
    else:
        model = read_adapter(base, adapter)
    compute_in_input_dtype(model)
    return Policy(model.eval(), processor, coordinates)


# -------------------- prompt


def prompt_text(
    processor, question: str, width: int, height: int, coordinates="pixels", prompt=PROMPT
) -> str:
    """Return the whole text of one prompt, with one placeholder for the picture."""
    text = instruction(question, width, height, coordinates, prompt)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def check_template(processor, name: str | Path) -> None:
    """Raise UserError if the chat template fails, or leaves out the picture or the question."""
    try:
        text = prompt_text(processor, "the red star", 28, 28)
    except Exception as error:  # a template is a program, and may raise any exception
        why = f"its chat template cannot be used ({cause(error)})"
        raise UserError(f"--policy {name}: {why}") from None
    if text.count(processor.image_token) != 1 or "Question: the red star" not in text:
        why = "its chat template leaves out the picture or the question"
        raise UserError(f"--policy {name}: {why}")


def encode(policy: Policy, images: list[Image.Image], questions: list[str]) -> list[Prompt]:
    """Encode B questions about B pictures. The vision tower reads each picture once.

    All pictures have the same size, a multiple of 28 pixels (Qwen3-VL: 32, tiny: 14).
    """
    prompts = []
    count = max(1, TOWER_PIXELS // (images[0].width * images[0].height))  # pictures in one call
    for i in range(0, len(images), count):
        prompts += encode_batch(policy, images[i : i + count], questions[i : i + count])
    return prompts


def encode_batch(policy: Policy, images: list[Image.Image], questions: list[str]) -> list[Prompt]:
    """Encode b questions in one call of the vision tower."""
    base = policy.base
    texts, opened = [], []
    for question, image in zip(questions, images):
        asked = (question, image.width, image.height, policy.coordinates, policy.prompt)
        texts.append(prompt_text(policy.processor, *asked))
        opened.append(opened_answer(texts[-1], instruction(*asked)))
    inputs = policy.processor(text=texts, images=images, padding=True, return_tensors="pt")
    inputs = inputs.to(policy.device)
    positions, _ = base.model.get_rope_index(
        inputs.input_ids,
        inputs.mm_token_type_ids,
        image_grid_thw=inputs.image_grid_thw,
        attention_mask=inputs.attention_mask,
    )  # [3, b, P]
    seen = base.model.get_image_features(inputs.pixel_values, inputs.image_grid_thw)
    features = torch.cat(seen.pooler_output)  # [picture tokens of all, D]
    deep = getattr(seen, "deepstack_features", ())  # for each layer: b x [picture tokens, D]
    embeds = base.get_input_embeddings()(inputs.input_ids)  # [b, P, D]
    picture = inputs.input_ids == base.config.image_token_id  # [b, P]
    embeds = embeds.masked_scatter(picture[..., None], features.to(embeds.dtype))
    prompts = []
    for b, real in enumerate(inputs.attention_mask.bool()):  # [P], False for padding
        prompt = Prompt(
            ids=inputs.input_ids[b, real],
            embeds=embeds[b, real],
            positions=positions[:, b, real],
            picture=picture[b, real],
            deep=tuple(layer[b] for layer in deep),
            opened=opened[b],
        )
        prompts.append(prompt)
    return prompts


def deepstack(prompts: list[Prompt], picture: torch.Tensor) -> dict:
    """Return Qwen3-VL's extra arguments, or {}. `picture` (bool) marks all picture tokens."""
    if not prompts[0].deep:
        return {}
    layers = zip(*(p.deep for p in prompts))
    deep = [torch.cat(layer) for layer in layers]
    return {"visual_pos_masks": picture, "deepstack_visual_embeds": deep}


# -------------------- log-probabilities


def pack(policy: Policy, prompts: list[Prompt], groups: list[list[torch.Tensor]]):
    """Lay prompts and answers in one row: [prompt 1, its answers, prompt 2, its answers, ...].

    groups: B lists of G answers, each a tensor of ids [L].
    Returns the language model's arguments, and two tensors [S] with a number for each answer token.
    The first has the index in the row of the state that predicts the token. The second has the
    token's id.
    """
    device = policy.device
    # The last token of an answer is only predicted. The model does not read it.
    lengths = [[len(ids) - 1 for ids in group] for group in groups]
    answers = [ids for group in groups for ids in group]
    read = torch.cat([ids[:-1] for ids in answers])
    embeds = policy.base.get_input_embeddings()(read)  # [tokens to read, D]
    embeds = embeds.split([sum(group) for group in lengths])
    parts, positions, picture, index = [], [], [], []
    start = 0  # place in the row where the next prompt or answer begins
    for prompt, group, answer_embeds in zip(prompts, lengths, embeds):
        parts += [prompt.embeds, answer_embeds]
        # All answers to a prompt have the same first rotary position, the one after the prompt.
        after = [prompt.next_position + torch.arange(n) for n in group]
        positions += [prompt.positions, torch.cat(after).expand(3, -1).to(device)]
        picture += [prompt.picture, prompt.picture.new_zeros(len(answer_embeds))]
        last = start + len(prompt.ids) - 1  # this state predicts the first token of each answer
        start = last + 1
        for n in group:
            index += [last, *range(start, start + n)]
            start += n
    inputs = {
        "inputs_embeds": torch.cat(parts)[None],  # [1, T, D]
        "position_ids": torch.cat(positions, 1)[:, None],  # [3, 1, T]
        "layout": PackedRow([len(p.ids) for p in prompts], lengths),
        **deepstack(prompts, torch.cat(picture)[None]),
    }
    return inputs, torch.tensor(index, device=device), torch.cat(answers)


def chosen_logprobs(policy: Policy, hidden: torch.Tensor, target: torch.Tensor, temperature: float):
    """Return the log-probabilities [n] of the tokens `target` [n] and the entropy [n], in fp32.

    hidden [n, D]: the hidden states that predict these tokens.
    """
    logits = token_logits(policy, hidden, temperature)  # [n, V]
    normaliser = logits.logsumexp(-1)  # [n]
    fixed = logits.detach()
    entropy = normaliser.detach() - (fixed.softmax(-1) * fixed).sum(-1)
    return logits.gather(1, target[:, None])[:, 0] - normaliser, entropy


def logprobs(
    policy: Policy,
    prompts: list[Prompt],
    groups: list[list[torch.Tensor]],
    temperature: float = 1.0,
):
    """Return the log-probabilities of B groups of answers and the entropy, both fp32 [S].

    groups: B lists of G answers, each a tensor of ids [L]. S counts the tokens of all answers.
    Computes logits [tokens, V] only for answer tokens, one chunk at a time. The backward computes
    each chunk again. For 8 answers of 512 tokens, all logits and gradients would take 5 GB.
    """
    inputs, index, target = pack(policy, prompts, groups)
    language = policy.base.model.language_model
    hidden = language(**inputs, use_cache=False).last_hidden_state  # [1, T, D]
    # On a CPU, the backward of plain indexing adds in a varying order, so runs would differ.
    hidden = hidden[0].index_select(0, index)  # [S, D]
    count = max(1, CHUNK_LOGITS // policy.banned.numel())  # tokens in a chunk
    logps, entropies = [], []
    for h, t in zip(hidden.split(count), target.split(count)):
        logp, entropy = checkpoint(chosen_logprobs, policy, h, t, temperature, use_reentrant=False)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)
