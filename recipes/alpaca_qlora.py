"""MA-RLHF's `sft.py`: the plain question-answer template, labels by response template, 4-bit QLoRA."""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="meta-llama/Llama-3.2-1B",
    dataset_name="tatsu-lab/alpaca",
    formatting_func="question-answer",
    response_template="###Answer:",
    load_in_4bit=True,
    use_bnb_nested_quant=True,
    max_length=512,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=1e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    num_train_epochs=1,
    optim="paged_adamw_8bit",
    use_peft=True,
    lora_preset="mini",
)

if __name__ == "__main__":
    launch(recipe)
