"""Customers' messages, English and Chinese, to one line of JSON: SmolLM2-135M, LoRA, packed, minutes on a laptop."""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="demo",
    datasets=["data/demo/train.jsonl", "data/demo/train_multi_turn.jsonl"],
    eval_dataset="data/demo/heldout.jsonl",
    system_prompt="You write JSON.",
    generate_eval=-1,
    max_new_tokens=80,
    eval_strategy="steps",
    eval_steps=60,
    eval_packing=True,
    per_device_eval_batch_size=2,
    packing=True,
    max_length=512,
    max_steps=120,
    per_device_train_batch_size=1,
    learning_rate=8e-4,
    full_learning_rate=1e-4,
    lr_scheduler_type="cosine",
    warmup_steps=8,
    logging_steps=5,
    save_strategy="no",
    gradient_checkpointing=False,
    use_peft=True,
    lora_preset="all-linear",
    lora_dropout=0.0,
)

if __name__ == "__main__":
    launch(recipe)
