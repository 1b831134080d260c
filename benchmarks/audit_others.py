"""`ma-sft audit` on data that LLaMA-Factory and axolotl really prepared: a right set, and one with a known fault each.

    python benchmarks/audit_others.py llamafactory PYTHON      # the interpreter of an environment with LLaMA-Factory
    python benchmarks/audit_others.py axolotl PYTHON

Each needs an environment of its own, as their pins exclude ours: `pip install llamafactory==0.9.5`, or
`pip install axolotl==0.19.0`. Their own code reads the rows, renders and labels them in that environment; the audit
runs in this one. Prints one line a set and exits with 1 if a fault is missed or a right set accused.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from ma_sft.demo import demo_model
from ma_sft.labels.audit import audit_folder

CHATS = [
    [
        {"role": "user", "content": f"What is {n} plus {n}?"},
        {"role": "assistant", "content": f"It is {n + n}.\nSure."},
        {"role": "user", "content": "谢谢 😀"},
        {"role": "assistant", "content": "You are welcome. " + "Bye. " * (n % 3)},
    ]
    for n in range(40)
]

LLAMAFACTORY = """
import sys
from transformers import Seq2SeqTrainingArguments
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
import json
settings = json.loads(sys.argv[1])
model, data, training, finetuning, _ = get_train_args(settings)
module = load_tokenizer(model)
template = get_template_and_fix_tokenizer(module["tokenizer"], data)
try:
    get_dataset(template, model, data, training, stage="sft", **module)
except SystemExit:
    pass
"""
AXOLOTL = """
import sys
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
load_datasets(cfg=load_cfg(sys.argv[1]))
"""
SYSTEM = {"default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
WITH_ROWS = "unlike inference, seen with the rows"
# name -> settings of the tool, and the code of a fault that must be found (None: right)
SETS = {
    "llamafactory": {
        "right": (SYSTEM, None),
        "train_on_prompt": ({**SYSTEM, "train_on_prompt": True}, "unlike inference"),
        "another model's template": ({"template": "llama2"}, "unlike inference"),
        # Theirs ends with a full stop that the model's own template lacks; from the ids alone it is a system message
        "its own default system": ({}, WITH_ROWS),
    },
    "axolotl": {
        "right": ({}, None),
        "train_on_inputs": ({"train_on_inputs": True}, "unlike inference"),
        "train_on_eos: none": ({"train_on_eos": "none"}, "missing end token"),
        "another model's template": ({"chat_template": "llama3"}, "unlike inference"),
    },
}


def main(tool: str, python: str) -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = AutoTokenizer.from_pretrained(demo_model())
        tokenizer.save_pretrained(folder / "model")
        Qwen3ForCausalLM(
            Qwen3Config(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=8)
        ).save_pretrained(folder / "model")
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
        for name, (settings, fault) in SETS[tool].items():
            prepared = folder / f"prepared-{len(list(folder.iterdir()))}"
            {"llamafactory": with_llamafactory, "axolotl": with_axolotl}[tool](python, folder, prepared, settings)
            for known in (None, str(rows)):
                report = audit_folder(prepared, tokenizer, known)
                codes = sorted({finding.code for finding in report.errors})
                expected = (fault or "").split(",")[0] if known or fault != WITH_ROWS else ""
                good = expected in codes if expected else not codes and report.proven_turns == report.turns > 0
                failed += not good
                print(
                    f"{'ok' if good else 'MISSED':>6}  {tool}, {name}, {'rows' if known else 'ids'}: "
                    f"{report.rows} sequences, {report.proven_turns}/{report.turns} turns proven; {codes or 'no fault'}"
                )
    return 1 if failed else 0


def with_llamafactory(python: str, folder: Path, prepared: Path, settings: dict[str, object]) -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {
        "rows": {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    arguments = {
        "model_name_or_path": str(folder / "model"), "stage": "sft", "do_train": True, "finetuning_type": "full",
        "dataset": "rows", "dataset_dir": str(folder), "template": "smollm2", "cutoff_len": 2048,
        "tokenized_path": str(prepared), "output_dir": str(folder / "out"), "use_cpu": True, "report_to": "none",
        **settings,
    }  # fmt: skip
    _run(python, LLAMAFACTORY, json.dumps(arguments))


def with_axolotl(python: str, folder: Path, prepared: Path, settings: dict[str, object]) -> None:
    source = {
        "path": str(folder / "rows.jsonl"),
        "type": "chat_template",
        "ds_type": "json",
        "field_messages": "messages",
    }
    own = {key: settings[key] for key in ("train_on_eos", "chat_template") if key in settings}
    config = {
        "base_model": str(folder / "model"), "datasets": [{**source, **own}], "dataset_prepared_path": str(prepared),
        "sequence_len": 2048, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-4,
        "optimizer": "adamw_torch", "num_epochs": 1, "output_dir": str(folder / "out"), "dataset_processes": 1,
        "train_on_inputs": bool(settings.get("train_on_inputs")),
    }  # fmt: skip
    path = folder / "axolotl.json"
    path.write_text(json.dumps(config))  # JSON is YAML
    _run(python, AXOLOTL, str(path))


def _run(python: str, code: str, *arguments: str) -> None:
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the tool failed: {done.stderr[-3000:]}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
