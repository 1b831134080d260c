"""Whole trainings side by side with plain TRL, for `bench.py`: the demo's model, the same rows, LoRA and learning rate.

python benchmarks/trainings.py WHAT SHAPE FOLDER; the last line of its output is JSON.

Ours packs; TRL pads batches of rows, as its documentation has it where FlashAttention is not installed, or packs as
well (where its documents see each other on a CPU). A step of ours takes as many tokens as a batch of TRL's holds on
average. Each side trains for SECONDS, and is then examined by the same code.
"""

import json
import logging
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

DEMO = Path(__file__).parent.parent / "data" / "demo"
BATCH = 8  # rows of one of TRL's batches
SECONDS = 60  # of steps
HELD_OUT = 16
SHAPES = ("short answers after long prompts", "several turns", "very unequal lengths")
COMMON: dict[str, Any] = {
    "learning_rate": 8e-4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 8, "max_steps": 10_000,
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "max_length": 1024,
}  # fmt: skip
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


def rows_of(shape: str) -> tuple[list[Any], list[Any]]:
    """Conversations to train on and held-out ones, from the demo's rows."""
    rng = random.Random(0)

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]

    single, held = read("train.jsonl"), read("heldout.jsonl")[:HELD_OUT]
    if shape == "several turns":
        roles = {"human": "user", "gpt": "assistant"}
        turns = [
            [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
            for row in read("train_multi_turn.jsonl")
        ]
        return turns + [conversation(row, []) for row in single[: len(turns)]], [conversation(row, []) for row in held]

    def thread() -> list[str]:
        """Messages that came before: eight, or how many a long tail draws."""
        count = 8 if shape == "short answers after long prompts" else min(24, int(rng.lognormvariate(0.3, 1.4)))
        return [row["input"] for row in rng.sample(single, count)]

    return [conversation(row, thread()) for row in single], [conversation(row, thread()) for row in held]


def conversation(row: dict[str, Any], thread: list[str]) -> list[dict[str, str]]:
    before = "".join(f"Earlier: {text}\n" for text in thread)
    asked = f"{before}{row['instruction']}\n\n{row['input']}"
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def held_out_loss(model: Any, tokenizer: Any, held: list[Any]) -> float:
    """Mean loss of the held-out answers' tokens."""
    model.eval()
    loss, count = 0.0, 0
    with torch.no_grad():
        for messages in held:
            *before, answer = messages
            prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
            whole = prompt + tokenizer.encode(answer["content"] + "<|im_end|>", add_special_tokens=False)
            ids = torch.tensor([whole])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            loss += float(model(input_ids=ids, labels=labels).loss) * (len(whole) - len(prompt))
            count += len(whole) - len(prompt)
    return loss / count


class Clock(TrainerCallback):
    """Counts trained tokens and seconds, and ends the training after SECONDS."""

    def __init__(self, trainer: Any) -> None:
        self.seconds, self.tokens = 0.0, 0
        collate = trainer.data_collator

        def counted(rows: Any) -> Any:
            batch = collate(rows)
            self.tokens += int((batch["labels"] != -100).sum())
            return batch

        trainer.data_collator = counted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.begin
        control.should_training_stop = self.seconds >= SECONDS


def finish(trainer: Any, tokenizer: Any, held: list[Any]) -> dict[str, Any]:
    clock = Clock(trainer)
    trainer.add_callback(clock)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loss = held_out_loss(trainer.model, tokenizer, held)
    return {"seconds": clock.seconds, "tokens": clock.tokens, "peak": peak, "loss": loss}


def ours(shape: str, model: str) -> dict[str, Any]:
    from datasets import Dataset

    from ma_sft import Recipe, make_trainer

    rows, held = rows_of(shape)
    recipe = Recipe(
        model_name_or_path=model, datasets=[Dataset.from_list([{"messages": row} for row in rows])], packing=True,
        use_peft=True, lora_r=LORA["r"], lora_alpha=LORA["lora_alpha"], lora_dropout=0.0,
        lora_target_modules="all-linear", output_dir=f"{model}-ours", **{**COMMON, **packs(rows, model)},
    )  # fmt: skip
    trainer = make_trainer(recipe)
    return finish(trainer, trainer.processing_class, held)


def packs(rows: list[Any], model: str) -> dict[str, int]:
    """The shortest packs that hold the longest row, as many in a batch as hold BATCH rows on average."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer.apply_chat_template(row, return_dict=False)) for row in rows]
    longest = -(-max(lengths) // 64) * 64
    return {
        "max_length": longest,
        "per_device_train_batch_size": round(BATCH * sum(lengths) / len(rows) / longest) or 1,
    }


def trl(shape: str, model: str, packing: str = "") -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows, held = rows_of(shape)
    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes: dict[str, Any] = {"per_device_train_batch_size": BATCH}
    if packing:
        sizes = {"packing": True, **packs(rows, model)}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        SFTConfig(f"{model}-trl", assistant_only_loss=True, **{**COMMON, **sizes}),
        train_dataset=Dataset.from_list([{"messages": row} for row in rows]), processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )  # fmt: skip
    return finish(trainer, tokenizer, held)


class Speed(TrainerCallback):
    """Seconds of the steps after the third."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.begin = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "begin", 0.0)


def demo(who: str, beside: str = "") -> dict[str, Any]:
    """Tokens/s of the demo's steps, by ours or by plain TRL on the same packs, alone or beside a busy process."""
    from trl import SFTConfig, SFTTrainer

    from ma_sft import Recipe, make_trainer

    short = {"max_steps": 13, "eval_strategy": "no", "logging_steps": 100, "disable_tqdm": True,
             "report_to": "none", "check": False, "use_cpu": True, "bf16": False, "dtype": "float32"}  # fmt: skip
    settings = dict(Recipe.load(DEMO.parents[1] / "recipes" / "demo.py").settings)
    for name in ("generate_eval", "max_new_tokens", "eval_dataset", "eval_steps", "eval_packing"):
        del settings[name]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(Recipe(**{**settings, **short, "output_dir": scratch}))
        if who == "trl":
            given = {name: settings[name] for name in ("per_device_train_batch_size", "learning_rate", "warmup_steps",
                                                       "lr_scheduler_type", "gradient_checkpointing")}  # fmt: skip
            own = {name: value for name, value in short.items() if name not in ("check", "dtype")}
            args = SFTConfig(scratch, padding_free=True, max_length=None, packing=False, **given, **own,
                             dataset_kwargs={"skip_prepare_dataset": True})  # fmt: skip
            trainer = SFTTrainer(trainer.model, args, train_dataset=trainer.train_dataset,
                                 processing_class=trainer.processing_class)  # fmt: skip
        speed, collate, counts = Speed(), trainer.data_collator, []

        def counted(rows: Any) -> Any:
            batch = collate(rows)
            counts.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = counted
        trainer.add_callback(speed)
        spin = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if beside else None
        try:
            trainer.train()
        finally:
            if spin is not None:
                spin.kill()
                spin.wait()
    return {"speed": sum(counts[3:13]) / speed.seconds}


def save_model(folder: str) -> dict[str, Any]:
    """The demo's model with a ChatML template whose assistant turns TRL can mask."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ma_sft.demo import demo_model

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(demo_model()).save_pretrained(folder)
    return {"folder": folder}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
