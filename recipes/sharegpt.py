"""Multi-turn conversations in ShareGPT's form: Llama-3.2-1B-Instruct, 4-bit QLoRA, every assistant turn trained."""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="meta-llama/Llama-3.2-1B-Instruct",
    datasets=[{"path": "mlabonne/FineTome-100k", "limit": 20000}],  # conversations: [{from, value}]
    filters={"near_duplicates": 0.85},
    on_error="skip",  # scraped conversations have broken ones; they are counted and shown
    test_size=200,
    generate_eval=20,
    max_new_tokens=256,
    load_in_4bit=True,
    packing=True,
    max_length=2048,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    num_train_epochs=1,
    save_total_limit=2,
    use_peft=True,
)

if __name__ == "__main__":
    launch(recipe)
