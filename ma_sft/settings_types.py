"""The keywords of `Recipe`, as types. Written by scripts/settings_page.py."""

from os import PathLike
from typing import Any, Literal, TypedDict


class RecipeSettings(TypedDict, total=False):
    """Every setting of a recipe; `ma-sft settings` and docs/settings.md say what each does."""

    dataset_name: Any
    datasets: Any
    eval_dataset: Any
    test_size: float | None
    test_near_duplicates: float | None
    filters: dict[str, Any] | str | None
    stopping_strategy: Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]
    dataset_streaming: bool
    dataset_config: str | None
    dataset_train_split: str
    dataset_test_split: str
    dataset_format: str | None
    on_error: Literal["raise", "skip"]
    system_prompt: str | None
    merge_turns: bool
    template: str | PathLike[str] | None
    template_kwargs: dict[str, Any] | str | None
    template_now: str | None
    train_on: Literal["all", "last"]
    history: Literal["split", "mask"]
    response_template: str | None
    instruction_template: str | None
    formatting_func: str | None
    overflow: Literal["cut", "split", "drop", "keep_answer", "keep_end"] | None
    add_eos: bool
    check: bool
    adapter_name_or_path: str | PathLike[str] | None
    lora_preset: Literal["mini", "attention", "all-linear"]
    lora_config: dict[str, Any] | str | None
    peft_config: dict[str, Any] | str | None
    quantization_config: dict[str, Any] | str | None
    loraplus_lr_ratio: float | None
    freeze: list[Any] | str
    full_learning_rate: float | None
    merge: bool
    generate_eval: int
    metric: str
    max_new_tokens: int
    predict_with_generate: bool
    early_stopping_patience: int | None
    name: str | None
    overwrite_output_dir: bool
    resume: Literal["auto", "never"]
    rehearse: bool
    output_dir: str | PathLike[str] | None
    per_device_train_batch_size: int
    num_train_epochs: float
    max_steps: int
    learning_rate: float
    lr_scheduler_type: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"]
    lr_scheduler_kwargs: dict[str, Any] | str | None
    warmup_steps: float
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw", "muon"]
    optim_args: str | None
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    optim_target_modules: str | list[Any] | None
    gradient_accumulation_steps: int
    average_tokens_across_devices: bool
    max_grad_norm: float
    label_smoothing_factor: float
    bf16: bool | None
    fp16: bool
    bf16_full_eval: bool
    fp16_full_eval: bool
    tf32: bool | None
    activation_checkpointing: bool | None
    activation_checkpointing_kwargs: dict[str, Any] | str | None
    gradient_checkpointing: bool
    gradient_checkpointing_kwargs: dict[str, Any] | str | None
    torch_compile: bool
    torch_compile_backend: str | None
    torch_compile_mode: str | None
    use_liger_kernel: bool
    liger_kernel_config: dict[str, Any] | str | None
    use_cache: bool
    neftune_noise_alpha: float | None
    torch_empty_cache_steps: int | None
    auto_find_batch_size: bool
    logging_strategy: Literal["no", "steps", "epoch"]
    logging_steps: float
    logging_first_step: bool
    log_on_each_node: bool
    logging_nan_inf_filter: bool
    include_num_input_tokens_seen: bool | str
    log_level: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
    log_level_replica: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
    disable_tqdm: bool | None
    report_to: str | list[Any] | None
    run_name: str | None
    project: str
    trackio_space_id: str | None
    trackio_bucket_id: str | None
    trackio_static_space_id: bool | str | None
    eval_strategy: Literal["no", "steps", "epoch"]
    eval_steps: float | None
    eval_delay: float
    per_device_eval_batch_size: int
    prediction_loss_only: bool
    eval_on_start: bool
    eval_do_concat_batches: bool
    eval_use_gather_object: bool
    eval_accumulation_steps: int | None
    include_for_metrics: list[Any] | str
    batch_eval_metrics: bool
    save_only_model: bool
    save_strategy: Literal["no", "steps", "epoch", "best"]
    save_steps: float
    save_on_each_node: bool
    save_total_limit: int | None
    enable_jit_checkpoint: bool
    push_to_hub: bool
    hub_token: str | None
    hub_private_repo: bool | None
    hub_model_id: str | None
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"]
    hub_always_push: bool
    hub_revision: str | None
    load_best_model_at_end: bool
    metric_for_best_model: str | None
    greater_is_better: bool | None
    ignore_data_skip: bool
    restore_callback_states_from_checkpoint: bool
    full_determinism: bool
    seed: int
    data_seed: int | None
    use_cpu: bool
    accelerator_config: dict[str, Any] | str | PathLike[str] | None
    parallelism_config: Any
    dataloader_drop_last: bool
    dataloader_num_workers: int
    dataloader_pin_memory: bool
    dataloader_persistent_workers: bool
    dataloader_prefetch_factor: int | None
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None
    dataloader_in_order: bool
    remove_unused_columns: bool
    label_names: list[Any] | str | None
    train_sampling_strategy: Literal["random", "sequential", "group_by_length", "batch_rebalance"]
    length_column_name: str
    ddp_find_unused_parameters: bool | None
    ddp_bucket_cap_mb: int | None
    ddp_broadcast_buffers: bool | None
    ddp_static_graph: bool | None
    ddp_backend: Literal["nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"] | None
    ddp_timeout: int
    fsdp: bool | str | list[Any] | None
    fsdp_config: dict[str, Any] | str | PathLike[str] | None
    deepspeed: dict[str, Any] | str | PathLike[str] | None
    debug: str | list[Any]
    skip_memory_metrics: bool
    do_train: bool
    do_eval: bool
    do_predict: bool
    resume_from_checkpoint: str | PathLike[str] | None
    local_rank: int
    model_init_kwargs: dict[str, Any] | str | None
    trust_remote_code: bool
    router_aux_loss_coef: float | None
    chat_template_path: str | PathLike[str] | None
    dataset_text_field: str
    dataset_kwargs: dict[str, Any] | str | None
    dataset_num_proc: int | None
    eos_token: str | None
    max_length: int | None
    truncation_mode: Literal["keep_end", "keep_start"]
    shuffle_dataset: bool
    packing: bool
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"]
    padding_free: bool
    pad_to_multiple_of: int | str | None
    eval_packing: bool | None
    completion_only_loss: bool | None
    assistant_only_loss: bool
    loss_type: Literal["nll", "dft", "chunked_nll"]
    activation_offloading: bool
    pad_token: str | None
    model_name_or_path: str | PathLike[str] | None
    model_revision: str
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None
    attn_implementation: str | None
    use_peft: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_target_modules: list[Any] | str | None
    lora_target_parameters: list[Any] | str | None
    lora_modules_to_save: list[Any] | str | None
    lora_task_type: str
    use_rslora: bool
    use_dora: bool
    load_in_8bit: bool
    load_in_4bit: bool
    bnb_4bit_quant_type: Literal["fp4", "nf4"]
    use_bnb_nested_quant: bool
    bnb_4bit_quant_storage: str | None
