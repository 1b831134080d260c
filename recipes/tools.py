"""Tool calls: Qwen3-1.7B learns when to call which function; the tools are in each row, the calls are trained.

A row: {"messages": [{"role": "user", ...}, {"role": "assistant", "tool_calls": [...]}, {"role": "tool", ...}, ...],
"tools": [{"type": "function", "function": {"name": ..., "parameters": {...}}}]}
"""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="Qwen/Qwen3-1.7B",
    dataset_name="tools.jsonl",
    template_kwargs={"enable_thinking": False},
    test_size=0.05,
    packing=True,
    max_length=2048,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    learning_rate=1e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    num_train_epochs=2,
    save_total_limit=2,
    use_peft=True,
    lora_preset="all-linear",
)

if __name__ == "__main__":
    launch(recipe)
