"""Qwen3-0.6B on Capybara's multi-turn conversations with LoRA, as in the MA-RLHF material."""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="Qwen/Qwen3-0.6B",
    dataset_name="trl-lib/Capybara",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    max_length=256,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    num_train_epochs=1,
    save_total_limit=2,
    use_peft=True,
    lora_preset="mini",
)

if __name__ == "__main__":
    launch(recipe)
