"""English instructions in Alpaca's columns: SmolLM2-360M, all of its weights are trained."""

from ma_sft import Recipe, launch

recipe = Recipe(
    model_name_or_path="HuggingFaceTB/SmolLM2-360M-Instruct",
    dataset_name="tatsu-lab/alpaca",  # or a file: columns instruction, input, output
    filters={"exact_duplicates": True},
    test_size=200,  # rows held out: their loss and some of their answers before and after
    generate_eval=20,
    packing=True,
    max_length=1024,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=1e-4,  # all weights of a small model; larger ones take less
    lr_scheduler_type="cosine",
    warmup_steps=0.03,
    num_train_epochs=2,
    save_total_limit=2,
)

if __name__ == "__main__":
    launch(recipe)
