"""Chinese instructions in Alpaca's columns: Qwen3-0.6B, LoRA, without thinking."""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="Qwen/Qwen3-0.6B",
    dataset_name="shibing624/alpaca-zh",  # or a file: instruction, input, output; *_zh columns work too
    filters={"exact_duplicates": True},
    template_kwargs={"enable_thinking": False},  # train what a chat without thinking will see
    test_size=200,
    generate_eval=20,
    packing=True,
    max_length=1024,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    num_train_epochs=2,
    save_total_limit=2,
    use_peft=True,
    lora_preset="all-linear",
)

if __name__ == "__main__":
    launch(recipe)
