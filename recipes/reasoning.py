"""Reasoning traces: Qwen3-0.6B learns to think between <think> and </think> before it answers."""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="Qwen/Qwen3-0.6B",
    # "<think>...</think> answer" in the content, or the thoughts in a field reasoning_content
    datasets=[{"path": "open-r1/Mixture-of-Thoughts", "name": "math", "limit": 10000}],
    filters={"max_tokens": 8192},  # a trace that is cut off teaches never to answer
    history="split",  # Qwen3 drops earlier thoughts: each turn is trained as inference will see it
    test_size=100,
    generate_eval=10,
    max_new_tokens=2048,
    packing=True,
    max_length=8192,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=8,
    learning_rate=1e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    num_train_epochs=2,
    use_peft=True,
    lora_preset="all-linear",
)

if __name__ == "__main__":
    launch(recipe)
