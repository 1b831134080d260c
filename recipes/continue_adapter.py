"""Go on with an adapter: what `alpaca_zh` learned is trained further on rows of your own."""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="Qwen/Qwen3-0.6B",  # the adapter's base
    adapter_name_or_path="runs/alpaca_zh",  # a run's folder or an adapter's; rank and targets are its own
    datasets=["rows.jsonl", {"path": "shibing624/alpaca-zh", "limit": 500}],  # some old rows against forgetting
    template_kwargs={"enable_thinking": False},  # as it was trained
    test_size=0.1,
    generate_eval=20,
    packing=True,
    max_length=1024,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=5e-5,  # lower than the first time
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    num_train_epochs=1,
    use_peft=True,
)

if __name__ == "__main__":
    launch(recipe)
