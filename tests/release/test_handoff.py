"""What a run leaves for the next stage: manifest, evaluation by source, export; and TRL's next stages taking it."""

import json
import shutil

import pytest
import torch
import trl
from datasets import Dataset
from fetch_converter import fetch_converter
from gguf import GGUFReader
from helpers import ROOT, read_rows, refusal, user, write_rows
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
    set_seed,
)

from ma_sft import Recipe, run, to_preference
from ma_sft.cli import main
from ma_sft.data.mixture import load_mixture
from ma_sft.labels.templates import load_tokenizer
from ma_sft.release.chat import load
from ma_sft.release.manifest import read_manifest
from ma_sft.training.prepare import prepare

ROWS = [{"instruction": f"What is {i} plus {i}?", "output": f"It is {2 * i}."} for i in range(24)]


@pytest.fixture(scope="module")
def sft(tiny_bpe, tmp_path_factory):
    """A short run of a tiny model with LoRA, two held-out sources and a metric of the user's."""
    folder = tmp_path_factory.mktemp("sft")
    (folder / "metrics.py").write_text("def length(answer, reference):\n    return len(answer) / 1000\n")
    files = {"train": ROWS, "sums": ROWS[:3], "more": ROWS[3:8]}
    train, *held_out = [write_rows(folder / f"{name}.jsonl", rows) for name, rows in files.items()]
    more = {
        **{"model_name_or_path": str(tiny_bpe), "dataset_name": train, "eval_dataset": held_out},
        **{"output_dir": str(folder / "run"), "use_peft": True, "learning_rate": 1e-2, "loraplus_lr_ratio": 4.0},
        **{"max_steps": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "generate_eval": 5},
        **{"max_new_tokens": 4, "metric": f"{folder}/metrics.py:length", "system_prompt": "You add."},
        **{"template_kwargs": {"enable_thinking": False}, "report_to": [], "save_strategy": "no"},
    }
    return folder / "run", run(Recipe(**more))


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_by_source_before_and_after(sft):
    out, summary = sft
    before, after = summary["evaluation"]["before"], summary["evaluation"]["after"]
    assert json.loads((out / "summary.json").read_text())["evaluation"]["after"] == after
    names = [name.rsplit("/", 1)[-1] for name in after["sources"]]
    assert sorted(names) == ["more.jsonl", "sums.jsonl"]
    parts = [*after["sources"].values()]
    assert after["tokens"] == sum(part["tokens"] for part in parts)
    assert after["loss"] == pytest.approx(sum(p["loss"] * p["tokens"] for p in parts) / after["tokens"])
    assert after["loss"] < before["loss"]
    assert after["perplexity"] == pytest.approx(2.718281828 ** after["loss"], rel=1e-6)
    assert after["answers"] == 5 == sum(part.get("answers", 0) for part in parts)
    assert after["metric"].endswith(":length") and 0 < after["score"] < 1 and "eos_rate" in before


def test_held_out_loss_is_the_mean_over_labels(sft):
    """By hand: every label of every row weighs the same, whatever batch it was in."""
    out, summary = sft
    settings = Recipe(**json.loads((out / "recipe.json").read_text())).resolve(["--output_dir", str(out)])
    tokenizer, _ = load_tokenizer(settings)
    model = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    losses, right = [], []
    for row in prepare(settings, tokenizer, held_out=True).dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100].tolist()
        right += (logits.argmax(-1) == labels)[labels != -100].tolist()
    after = summary["evaluation"]["after"]
    assert after["tokens"] == len(losses)
    assert after["loss"] == pytest.approx(sum(losses) / len(losses), rel=2e-3)  # the run computes in bfloat16
    assert after["token_accuracy"] == pytest.approx(sum(right) / len(right), abs=0.03)


# -- manifest ---------------------------------------------------------------------------------------------------------


def test_manifest_says_what_the_next_stage_needs(sft):
    out, summary = sft
    for kind, folder in (("adapter", out / "adapter"), ("model", out / "merged")):
        manifest = read_manifest(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert manifest["kind"] == kind
        assert manifest["end_of_turn_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert manifest["special_ids"]["pad"] == tokenizer.pad_token_id
        assert manifest["system_prompt"] == "You add." and manifest["template_kwargs"] == {"enable_thinking": False}
        assert manifest["data"]["rows"] == 24 and len(manifest["data"]["digest"]) == 64
        assert manifest["metrics"]["loss"] == summary["eval_loss"]
        assert manifest["mask_policy"]["train_on"] == "all" and manifest["versions"]["trl"]
        assert not [*folder.glob("*.bin")], "no pickles"


def test_each_folder_has_a_card_and_files_that_others_may_read(sft):
    out, _ = sft
    for folder in (out, out / "adapter", out / "merged"):
        card = (folder / "README.md").read_text(encoding="utf-8").split("## Recipe")[0]
        assert "fine-tuned with ma_sft on train.jsonl" in card and "| train loss |" in card and "None" not in card
        assert str(out.parent) not in card
        weights = folder.glob("*.safetensors")
        assert all(path.stat().st_mode == (folder / "README.md").stat().st_mode for path in weights)
    assert "library_name: peft" in (out / "adapter" / "README.md").read_text(encoding="utf-8")


def test_handoff_check(sft, tmp_path, capsys):
    out, _ = sft
    for folder in (out, out / "adapter"):
        assert main(["handoff-check", str(folder)]) == 0
        said = capsys.readouterr().out
        assert "WRONG" not in said and not {*"{}[]'"} & {*said}, "words, no objects of Python's"
    broken = tmp_path / "broken"

    def found(change):
        shutil.rmtree(broken, ignore_errors=True)
        change(shutil.copytree(out / "merged", broken))
        code = main(["handoff-check", str(broken), "--json"])
        return code, {f["what"] for f in json.loads(capsys.readouterr().out) if not f["ok"]}

    def template(folder):
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> "))

    def stops(folder):
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [7]}))

    def tokens(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(folder)

    def weights(folder):
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])

    assert found(lambda folder: None) == (0, set())
    assert found(template) == (1, {"chat template", "ids of a test conversation"})
    assert found(stops) == (1, {"end-of-turn ids"})
    assert found(tokens) == (1, {"tokenizer", "embedding rows"})
    assert found(weights) == (1, {"weights"})
    (broken / "sft_manifest.json").unlink()
    assert "has no sft_manifest.json" in refusal(capsys, "handoff-check", broken)


def test_chat_uses_what_training_used(sft):
    out, _ = sft
    (_, encoder, system), (_, again, _) = load(out), load(out / "adapter")
    assert system == "You add." and encoder.template_kwargs == {"enable_thinking": False}
    assert again.encode_prompt([user("Hi")]) == encoder.encode_prompt([user("Hi")])


# -- export -----------------------------------------------------------------------------------------------------------


def test_exported_folder_is_what_serving_loads(sft, tmp_path, capsys):
    out, _ = sft
    assert main(["export", str(out), "-o", str(tmp_path / "served"), "--dtype", "float32"]) == 0
    assert f"vllm serve {tmp_path / 'served'}" in capsys.readouterr().out
    assert main(["export", str(out / "adapter"), "-o", str(tmp_path / "from-adapter"), "--dtype", "float32"]) == 0
    names = {path.name for path in (tmp_path / "served").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "sft_manifest.json"),
    }
    # what `transformers serve` does with a folder
    generate = pipeline("text-generation", model=str(tmp_path / "served"), device="cpu")
    answer = generate([{"role": "user", "content": "What is 2 plus 2?"}], max_new_tokens=3)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    assert generate.model.dtype == torch.float32
    assert main(["export", str(out), "-o", str(tmp_path / "served")]) == 2


def test_export_without_a_converter_says_what_to_install(sft, tmp_path, capsys, monkeypatch):
    (out, _), to = sft, ("-o", tmp_path / "model.gguf")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert "GGUF needs llama.cpp's convert_hf_to_gguf.py: clone" in refusal(capsys, "export", out, *to)
    assert "nix' does not exist" in refusal(capsys, "export", tmp_path / "nix", *to)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert "does not exist" in refusal(capsys, "export", out, *to)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.slow
def test_gguf(smollm2, tmp_path, capsys, monkeypatch):
    """llama.cpp's converter makes the file; transformers reads it back and says the same."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    set_seed(0)
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "eos_token_id": 2},
        **{"max_position_embeddings": 256, "tie_word_embeddings": True},
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("LLAMA_CPP", str(fetch_converter()))
    out = tmp_path / "tiny.gguf"
    assert main(["export", str(tmp_path / "model"), "-o", str(out), "--outtype", "f32"]) == 0
    assert f"llama-server -m {out}" in capsys.readouterr().out
    fields = GGUFReader(out).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert main(["export", str(tmp_path / "model"), "-o", str(tmp_path / "bad.gguf")]) == 2
    assert "convert_hf_to_gguf.py failed on" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "tiny.gguf"}


# -- the next stages, offline -----------------------------------------------------------------------------------------

FILES = sorted((ROOT / "tests/files/preference").glob("*.jsonl"))
PAIRS = [pair for path in FILES for row in read_rows(path) if (pair := to_preference(row))]
COMMON = {
    **{"per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "save_strategy": "no", "use_cpu": True},
    **{"gradient_checkpointing": False, "bf16": False, "logging_steps": 1, "learning_rate": 1e-3},
}


def train_next(method, folder, tmp_path, model, rows, more=None, **config):
    """The trainer of a next stage on what the run left, after two steps that changed the model."""
    trainer = getattr(trl, f"{method}Trainer")(
        model=model,
        args=getattr(trl, f"{method}Config")(output_dir=str(tmp_path), **config, **COMMON),
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=rows,
        **(more or {}),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    return trainer


def test_reward_model(sft, tmp_path):
    out, _ = sft
    folder, manifest = out / "merged", read_manifest(out / "merged")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    backbone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.state_dict()
    assert all(model.model.state_dict()[name].equal(tensor) for name, tensor in backbone.items())
    trainer = train_next("Reward", folder, tmp_path, model, Dataset.from_list(PAIRS))
    assert model.config.pad_token_id == manifest["special_ids"]["pad"]
    assert trainer.processing_class.chat_template == tokenizer.chat_template
    assert len(trainer.train_dataset) == len(PAIRS)
    text = tokenizer.apply_chat_template(PAIRS[0]["prompt"] + PAIRS[0]["chosen"], tokenize=False)
    assert tokenizer.decode(trainer.train_dataset[0]["chosen_ids"]) == text


@pytest.mark.parametrize("folder", ["merged", "adapter"])
def test_dpo(sft, tmp_path, folder):
    """On the merged model, or on the adapter, of which TRL keeps a copy as the reference."""
    out, _ = sft
    of_adapter = {"is_trainable": True} if folder == "adapter" else {}
    kind = AutoPeftModelForCausalLM if of_adapter else AutoModelForCausalLM
    rows = load_mixture([str(path) for path in FILES], kind="preference", system_prompt="Be kind.").train
    model = kind.from_pretrained(out / folder, dtype=torch.float32, **of_adapter)
    trainer = train_next("DPO", out / "merged", tmp_path, model, rows, max_length=128)
    for column in ("prompt", "chosen", "rejected"):
        text = trainer.processing_class.decode(trainer.train_dataset[0][f"{column}_ids"])
        assert all(message["content"] in text for message in rows[0][column])
    first = next(log for log in trainer.state.log_history if "loss" in log)
    assert first["loss"] == pytest.approx(0.6931, abs=0.02)  # at first policy and reference are the same model
    with pytest.raises(ValueError, match="model_type"):
        trl.DPOTrainer(model=str(out / "adapter"), args=trainer.args, train_dataset=Dataset.from_list(PAIRS))


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_online_method(sft, tmp_path, method):
    """The merged model as policy, judged by a reward model on the same backbone, or by a function."""
    out, _ = sft
    folder, manifest = out / "merged", read_manifest(out / "merged")
    tokenizer, seen = AutoTokenizer.from_pretrained(folder), []

    def length(completions, **kwargs):
        seen.extend(completions)
        return [float(len(completion[0]["content"])) for completion in completions]

    judge = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    judge.config.pad_token_id = tokenizer.pad_token_id
    judged = {"reward_funcs": [length, judge], "reward_processing_classes": [None, tokenizer]}
    judged = judged if method == "GRPO" else {"reward_funcs": length}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS])
    trainer = train_next(method, folder, tmp_path, model, prompts, judged, num_generations=2, max_completion_length=8)
    assert len(seen) == 4
    stops = trainer.model.generation_config.eos_token_id
    assert set(manifest["end_of_turn_ids"]) == set(stops if isinstance(stops, list) else [stops])
