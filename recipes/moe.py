"""A mixture of experts: Qwen3-30B-A3B, of which 3B work on a token, with LoRA on attention and on its fused experts.

`router_aux_loss_coef` keeps the router from sending all tokens to a few experts. Without the two `lora_target_*` the
default adapter is on the same layers.
"""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="Qwen/Qwen3-30B-A3B-Instruct-2507",
    dataset_name="trl-lib/Capybara",
    packing=True,
    max_length=2048,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=16,
    learning_rate=1e-4,
    num_train_epochs=1,
    save_total_limit=2,
    router_aux_loss_coef=0.001,
    model_init_kwargs={"experts_implementation": "grouped_mm"},
    use_peft=True,
    lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    lora_target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    lora_dropout=0.0,  # PEFT cannot drop out inputs of fused experts
)

if __name__ == "__main__":
    launch(recipe)
