"""Tiny models of real architectures with real tokenizers, made once per test run."""

import pytest
from conftest import load_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory):
    """A randomly initialised two-layer Qwen3 with the real Qwen3 tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    tokenizer = load_tokenizer("qwen3")
    set_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
