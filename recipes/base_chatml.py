"""A base model that has never seen a chat: Llama-3.2-1B gets ChatML's two tokens, and trains their rows."""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="meta-llama/Llama-3.2-1B",
    template="chatml",  # adds <|im_start|> and <|im_end|>, which ends a turn from now on
    datasets=[{"path": "HuggingFaceTB/smoltalk", "name": "all", "limit": 50000}],
    test_size=200,
    generate_eval=20,
    packing=True,
    max_length=2048,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    num_train_epochs=1,
    save_total_limit=2,
    use_peft=True,  # the two new rows of the embedding are trained beside the adapter
    lora_preset="all-linear",
)

if __name__ == "__main__":
    launch(recipe)
