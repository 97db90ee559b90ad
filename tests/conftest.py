"""Shared parts: the tiny policy and the tiny SAM of the package, loaded once."""

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

# One thread here and in every process that a test starts. Threads of OpenMP wait for each other by
# spinning, so beside other work two of them are far slower than one.
os.environ["OMP_NUM_THREADS"] = "1"
# As in a process of torchrun, train.py starts no processes here. Tests of several processes change it.
os.environ["WORLD_SIZE"] = "1"
if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, and tests send it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a background job of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "benchmarks"))
sys.path.insert(0, str(TESTS.parent))  # train.py and eval.py stand there

from samr1_mini import attention, grpo
from samr1_mini.config import Settings, make_settings
from samr1_mini.data import load_data
from samr1_mini.data import public
from samr1_mini.policy import load_policy
from samr1_mini.lenient import read_leniently
from samr1_mini.reward import read_answer, score_group
from samr1_mini.segmenter import load_segmenter

# On a machine with a GPU, too, all but the tests that ask for one run on the CPU, in this process and in others.
VISIBLE, HAS_GPU = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.is_available()


def pytest_runtest_setup(item):
    asks = HAS_GPU and "gpu" in item.keywords
    torch.cuda.is_available = lambda: asks
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if not asks else VISIBLE or "0"


# The marker `quick`: tests of these files, except those that train, evaluate or start a process.
QUICK = ("test_reward", "test_attention", "test_folder", "test_first_day", "test_public")
QUICK += ("test_readme", "test_results")
EQUATIONS = ("papers_formula", "asymmetric_clip", "true_kl", "eq_1", "token_weights")  # test_grpo
SLOW = ("train", "evaluat", "command", "linear", "checkpoint", "vit_b", "memory_of", "hash")


def pytest_collection_modifyitems(items):
    # Notebooks take minutes, so they start first. Otherwise one worker would wait for the other.
    items.sort(key=lambda item: "notebook_runs" not in item.name)
    for item in items:
        slow = any(word in item.name for word in SLOW)
        equation = any(word in item.name for word in EQUATIONS)
        if equation or item.path.stem in QUICK and not slow:
            item.add_marker(pytest.mark.quick)
    if not HAS_GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def with_live_adapter(policy, seed: int = 0):
    """A fresh adapter is the identity; give it small random weights so that it shows."""
    torch.manual_seed(seed)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.02)
    return policy


@contextmanager
def failing_update(monkeypatch, number, error):
    """In the block, update number `number` raises `error` instead of learning."""
    calls, real = [], grpo.update

    def update(*args):
        calls.append(1)
        if len(calls) == number:
            raise error
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(grpo, "update", update)
        yield


def lenient_box(text, side=112):
    """The box that lenient reading finds in an answer with one object, or None."""
    objects = read_leniently(text, side).objects
    return objects[0].box if objects else None


def score(segmenter, sample, texts, side=112, lenient=False, **settings):
    """Rewards of texts that answer one sample."""
    read = read_leniently if lenient else read_answer
    answers = [read(text, side) for text in texts]
    return score_group(segmenter, sample, answers, Settings(**settings))


@pytest.fixture(scope="session", autouse=True)
def sets(tmp_path_factory):
    """Sets that tests convert go away with them."""
    public.SETS = tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="session")
def policy():
    """The tiny policy in fp32 with an adapter that is not the identity. Tests leave it as they found it."""
    return with_live_adapter(load_policy("tiny", "fp32", rank=8))


@pytest.fixture(scope="session")
def nf4_policy():
    return with_live_adapter(load_policy("tiny", "nf4", rank=8))


@pytest.fixture
def unwatched_masks(monkeypatch):
    """Create causal masks outside of dispatch modes: a mode that watches tensors fails on them."""

    def mask(*size):
        with _disable_current_modes():
            return causal_lower_right(*size)

    monkeypatch.setattr(attention, "causal_lower_right", mask)


@pytest.fixture(scope="session")
def segmenter():
    return load_segmenter("tiny")


@pytest.fixture(scope="session")
def samples():
    return list(load_data("shapes", "validation", 6))


# Qwen2.5-VL's tokenizer and configs, where at hand
VOCABULARY = Path(__file__).parent.parent.parent / "shared" / "qwen2_5_vl"


@pytest.fixture(scope="session")
def real_vocabulary(tmp_path_factory):
    """A small random Qwen2.5-VL with the real vocabulary, as a folder laid out as the hub's is."""
    if not VOCABULARY.is_dir():
        pytest.skip("the real vocabulary is not at hand")
    folder, config = tmp_path_factory.mktemp("qwen2_5_vl"), AutoConfig.from_pretrained(VOCABULARY)
    for part, small in (
        (
            config.text_config,
            dict(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            ),
        ),
        (
            config.vision_config,
            dict(
                hidden_size=32,
                intermediate_size=64,
                depth=2,
                num_heads=2,
                fullatt_block_indexes=[1],
                out_hidden_size=64,
            ),
        ),
    ):
        for name, value in small.items():
            setattr(part, name, value)
    config.text_config.layer_types, config.text_config.rope_parameters["mrope_section"] = (
        ["full_attention"] * 2,
        [2, 3, 3],
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    for file in VOCABULARY.iterdir():
        if file.name not in ("config.json", "README.md"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def settings(tmp_path):
    """Settings of a run so short that tests can afford it."""
    return make_settings(
        preset="tiny",
        device="cpu",
        run=str(tmp_path / "run"),
        samples=8,
        questions=4,
        group=4,
        micro=2,
        updates=2,
        eval_every=0,
        eval_samples=4,
        test_samples=4,
        warmup=1,
    )[0]
