"""Questions and answers of your field from a CSV file: Gemma-3-1B, LoRA, in minutes; exact columns are mapped."""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="google/gemma-3-1b-it",
    datasets=[{"path": "faq.csv", "columns": {"Question": "question", "Answer": "answer"}}],
    system_prompt="You answer questions about our products, briefly and only from what you know.",
    filters={"exact_duplicates": True},
    test_size=0.1,
    test_near_duplicates=0.8,  # a question in other words must not be trained and tested
    generate_eval=50,
    max_length=512,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    num_train_epochs=3,
    use_peft=True,
    lora_preset="all-linear",
)

if __name__ == "__main__":
    launch(recipe)
