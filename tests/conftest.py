"""Real tokenizers and a real model for every test; nothing is mocked."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from patience import HANG, end_what_it_started

os.environ.setdefault("PYTEST_TIMEOUT", f"{HANG:.0f}")  # for hangs, not for slow machines

from pathlib import Path

import pytest
from helpers import FUZZ, save_tiny
from hypothesis import HealthCheck, settings
from real_tokenizers import TOKENIZERS, changed, load_tokenizer
from transformers import PreTrainedTokenizerBase

from ma_sft.demo import demo_model

__all__ = ["end_what_it_started"]  # a fixture of every test


@pytest.fixture(scope="module", autouse=True)
def what_is_loaded_is_no_garbage():
    """Every training collects garbage, and would walk through all that torch and transformers hold: 0.3 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def the_same_environment():
    """`datasets`' workers leave another object as `os.environ`: what rich and others hold would be deaf to settings."""
    kept = os.environ
    yield
    os.environ = kept  # noqa: B003


# `make fuzz` asks for many more examples, and other ones each time.
settings.register_profile(
    "ma_sft", max_examples=FUZZ or 60, derandomize=not FUZZ, deadline=None, suppress_health_check=HealthCheck
)
settings.load_profile("ma_sft")


@pytest.fixture(autouse=True)
def nobody_adds_to_a_shared_vocabulary():
    yield
    assert not changed(), "the test changes a vocabulary that others share: load_tokenizer(..., own=True)"


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return load_tokenizer(request.param)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the demo model, SmolLM2-135M-Instruct."""
    return demo_model()


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised two-layer Qwen3 with the real Qwen3 tokenizer and chat template."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-qwen3", load_tokenizer("qwen3"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with SmolLM2's tokenizer and template: a third of the tokens, which load in a third of the time."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", load_tokenizer("smollm2"))


@pytest.fixture(scope="session")
def tiny_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen3 of random weights with a BPE tokenizer of 300 tokens and ChatML: a step takes 10 ms."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from ma_sft.labels.templates import set_chat_template

    folder = tmp_path_factory.mktemp("models") / "tiny-bpe"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["What is so user assistant system"],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    set_chat_template(tokenizer, "chatml")
    return save_tiny(folder, tokenizer)
