"""LoRA presets and merging: what TRL and PEFT do, with the targets chosen and the outcome checked."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ma_sft.cache import atomic_dir
from ma_sft.errors import RecipeError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ma_sft.recipe import Settings

# `mini` is MA-RLHF's choice; LoRA (https://arxiv.org/abs/2106.09685) adapts attention;
# QLoRA (https://arxiv.org/abs/2305.14314) found that adapting every linear layer matters most.
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 32, "lora_alpha": 8},
    "attention": {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "all-linear": {"lora_target_modules": "all-linear"},
}


def lora_config(settings: "Settings") -> "PeftConfig | None":
    """The `peft.LoraConfig` of a recipe, None without `use_peft`. Fields that the recipe sets win over the preset's.

    Raises:
        RecipeError: an adapter on `lm_head`, whose loss TRL computes from the weight alone.
    """
    from trl import get_peft_config

    model = settings.model
    for key, value in PRESETS[settings.data.lora_preset].items():
        if settings.chosen.get(key) is None:
            setattr(model, key, value)
    targets = model.lora_target_modules
    if model.use_peft and "lm_head" in ([targets] if isinstance(targets, str) else targets or []):
        raise RecipeError(
            "lora_target_modules: an adapter on lm_head would never be trained, because the loss is computed from "
            "lm_head's weight directly; remove it"
        )
    return get_peft_config(model)


def with_new_tokens(
    settings: "Settings", added: list[str], tokenizer: "PreTrainedTokenizerBase", peft: "PeftConfig | None"
) -> "PreTrainedModel":
    """The recipe's model with embedding rows for new tokens, which an adapter then trains as well.

    New rows are the mean of the old ones. Only these rows are trained, not the whole matrix; a separate `lm_head` has
    to learn to write the tokens too, and TRL can only train it whole.

    Raises:
        RecipeError: a quantised base model, whose embedding cannot grow.
    """
    from transformers import AutoModelForCausalLM

    if settings.model.load_in_4bit or settings.model.load_in_8bit:
        raise RecipeError(
            f"the template adds the tokens {added}, and a quantised model's embedding cannot grow; "
            "save a model with the tokens first, or use a template that the tokenizer knows"
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        settings.model.model_name_or_path,
        trust_remote_code=settings.training.trust_remote_code,
        **settings.training.model_init_kwargs,
    )
    settings.training.model_init_kwargs = None
    embedding: Any = model.get_input_embeddings()
    if len(tokenizer) > embedding.num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    if peft is not None:
        targets: Any = peft
        targets.trainable_token_indices = {"embed_tokens": tokenizer.convert_tokens_to_ids(added)}
        if not model.config.tie_word_embeddings:
            targets.modules_to_save = [*(targets.modules_to_save or []), "lm_head"]
    return model


def adapter_dir(folder: Path) -> Path:
    """The adapter in a run's folder, or the folder itself if it is one.

    Raises:
        RecipeError: neither.
    """
    for candidate in (folder / "adapter", folder):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    raise RecipeError(f"{folder} holds no adapter (adapter_config.json); give a run's folder or an adapter's")


def merge(run: Path, out: Path) -> float:
    """Merge the adapter of `run` into its base model, in the base's dtype, and save the whole model to `out`.

    The tokenizer, its chat template and a generation config with the right end-of-turn ids go along. `out` appears
    whole or not at all.

    Returns:
        The largest difference between a logit of the merged and of the adapter model on a short text.

    Raises:
        RecipeError: no adapter in `run`, `out` exists already, or the base model cannot be loaded.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if out.exists():
        raise RecipeError(f"{out} exists already; choose another folder or remove it")
    adapter = adapter_dir(run)
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    except OSError as error:
        raise RecipeError(f"the adapter's base model {base!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    embedding: Any = model.get_input_embeddings()
    if len(tokenizer) > embedding.num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.tensor([tokenizer("The merged model must say the same.")["input_ids"]])
    with torch.no_grad():
        before = adapted(ids).logits.float()
        merged = adapted.merge_and_unload(safe_merge=True)
        difference = (merged(ids).logits.float() - before).abs().max().item()
    save_model(merged, tokenizer, out)
    return float(difference)


def save_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Save a whole model with its tokenizer, chat template and end-of-turn ids, atomically."""
    from ma_sft.evaluate import end_token_ids

    model.generation_config.eos_token_id = end_token_ids(model, tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with atomic_dir(out) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
