"""The settings of our own, a dataclass for each stage of a fine-tune."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ma_sft.errors import RecipeError


def setting(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    """A dataclass field with its default, its text in `ma-sft settings` and, if it is not free, its choices."""
    metadata = {"help": help, **({"choices": list(choices)} if choices else {})}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RowsConfig:
    """Where the rows come from, and which of them are used."""

    dataset_name: str | None = setting(None, "One source: a hub id, a file, a glob, or a folder. See docs/formats.md.")
    datasets: list[str] = setting(
        [], "Several sources: each a path or hub id, or a mapping with path, format, weight, ..."
    )
    eval_dataset: list[str] = setting([], "Held-out rows: sources like those of datasets, measured one by one.")
    test_size: float | None = setting(
        None, "Hold out this share (below 1) or number of rows; duplicates stay together."
    )
    test_near_duplicates: float | None = setting(
        None, "Similarity from which near duplicates stay on one side of the split."
    )
    filters: dict[str, Any] | str | None = setting(
        None, "Rows to leave out, e.g. '{\"exact_duplicates\": true}'. See docs/formats.md."
    )
    stopping_strategy: str = setting(
        "first_exhausted",
        "For sources with weights: stop when one runs dry, repeat its rows until all were seen, or go on without it.",
        ["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"],
    )
    dataset_streaming: bool = setting(False, "Read rows while training; needs max_steps.")
    dataset_config: str | None = setting(None, "Configuration of a hub data set, for sources that name none.")
    dataset_train_split: str = setting("train", "Split of a hub data set to train on.")
    dataset_test_split: str = setting("test", "Split of eval_dataset, if it has several.")
    dataset_format: str | None = setting(None, "Format of the rows, where detection by columns is not wanted.")
    on_error: str = setting("raise", "What to do with a broken row: stop, or count and skip it.", ["raise", "skip"])
    system_prompt: str | None = setting(None, "System message for conversations that have none.")
    merge_turns: bool = setting(False, "Join neighbouring turns of one role, which most chat templates refuse.")


@dataclass
class LabelsConfig:
    """How rows become token ids and labels, and that these are proven."""

    template: str | None = setting(
        None, "Chat template: the tokenizer's own (default), chatml, question-answer, role-tags, a .jinja file."
    )
    template_kwargs: dict[str, Any] | str | None = setting(
        None, "Variables for the chat template, e.g. '{\"enable_thinking\": false}'."
    )
    template_now: str | None = setting(
        None,
        "ISO date or date-time that a chat template which reads the clock takes for now; by default the day on which "
        "the run was first prepared.",
    )
    train_on: str = setting("all", "Train every assistant turn, or the last one.", ["all", "last"])
    history: str = setting(
        "split",
        "A turn that the template rewrites in history is trained in a sequence of its own, or masked.",
        ["split", "mask"],
    )
    add_eos: bool = setting(
        False, "Put the EOS token behind each turn, for a chat template that writes no end of turn."
    )
    response_template: str | None = setting(
        None, "Find labels by this text with DataCollatorForCompletionOnlyLM; needs formatting_func."
    )
    instruction_template: str | None = setting(
        None, "Text that begins a user turn, for multi-turn rows with response_template."
    )
    formatting_func: str | None = setting(
        None, "Function row -> text for the classic path: module:function, or question-answer."
    )
    overflow: str | None = setting(
        None,
        "A sequence longer than max_length: cut its end (default; bfd_split and wrapped split) or its beginning "
        "(keep_end), split it, drop it, or keep_answer: the oldest turns go first.",
        ["cut", "split", "drop", "keep_answer", "keep_end"],
    )
    check: bool = setting(True, "Prove the labels before training; wrong ones stop the run.")

    def __post_init__(self) -> None:
        if self.template_now is not None:
            try:
                datetime.fromisoformat(self.template_now)
            except ValueError:
                found = f"found {self.template_now!r}"
                raise RecipeError(f"template_now: a date as 2026-11-25 or 2026-11-25T09:30 expected, {found}") from None


@dataclass
class AdapterConfig:
    """What of the model is trained, beside the `lora_*` settings of TRL's `ModelConfig`."""

    adapter_name_or_path: str | None = setting(
        None, "Go on with this adapter (a run's folder, or an adapter's); its own settings, no lora_* ones."
    )
    lora_preset: str = setting(
        "all-linear",
        "Modules that LoRA adapts, unless lora_target_modules is set.",
        ["mini", "attention", "all-linear"],
    )
    lora_config: dict[str, Any] | str | None = setting(
        None, 'Any field of peft.LoraConfig by name, e.g. \'{"init_lora_weights": "pissa"}\'.'
    )
    loraplus_lr_ratio: float | None = setting(None, "LoRA+: the learning rate of every B is this many times that of A.")
    freeze: list[str] = setting(
        [], "Full fine-tuning: parameters whose name one of these regular expressions finds stay as is."
    )
    full_learning_rate: float | None = setting(
        None, "Learning rate for full fine-tuning, where the recipe's learning_rate is meant for adapters."
    )
    merge: bool = setting(True, "Merge the adapter into the base model when training is done.")


@dataclass
class ExamConfig:
    """What held-out rows are asked before and after training."""

    generate_eval: int = setting(0, "Held-out answers to generate before and after training (-1: all).")
    metric: str = setting(
        "exact-match",
        "How answers are graded: exact-match, or module:function, (answer, reference) -> a number or bool.",
    )
    max_new_tokens: int = setting(128, "Longest answer to generate, in tokens.")


@dataclass
class RunConfig:
    """The run and its folder."""

    name: str | None = setting(None, "Name of the run; its folder is runs/<name>.")
    overwrite_output_dir: bool = setting(False, "Delete what an earlier run left in the output folder.")
    resume: str = setting(
        "auto",
        "Go on with an unfinished run of the same recipe from its newest whole checkpoint, or start anew.",
        ["auto", "never"],
    )


STAGES = {"rows": RowsConfig, "labels": LabelsConfig, "adapter": AdapterConfig, "exam": ExamConfig, "run": RunConfig}
