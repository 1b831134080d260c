"""Every shipped recipe trains a step: a tiny model of its architecture, its real tokenizer, rows of its kind."""

import ast
import json
from functools import partial

import pytest
import torch
from helpers import ROOT, assistant, load_tokenizer, save_tiny, start, user, write_rows
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ma_sft import Recipe, RecipeError, run
from ma_sft.release.export import export_folder
from ma_sft.tools.gallery import shipped

KINDS = {
    "smollm2": (LlamaConfig, LlamaForCausalLM),
    "llama3": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "qwen3_moe": (partial(Qwen3MoeConfig, num_experts=8, moe_intermediate_size=32), Qwen3MoeForCausalLM),
}
FAMILIES = {
    "HuggingFaceTB/SmolLM2": "smollm2",
    "meta-llama/Llama-3": "llama3",
    "Qwen/Qwen3-30B-A3B": "qwen3_moe",
    "Qwen/Qwen3": "qwen3",
    "google/gemma-3": "gemma3",
}

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "The weather of a city", "parameters": CITY}
ALPACA_ZH = [{"instruction": f"把数字{i}翻倍", "input": "", "output": f"结果是{2 * i}。"} for i in range(40)]


def sharegpt(*texts):
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]}


def with_a_call(i):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": f"city {i}"}}}
    result = {"role": "tool", "name": "weather", "content": "sunny"}
    turns = [assistant("", tool_calls=[call]), result, assistant(f"It is sunny in city {i}.")]
    return {"messages": [user(f"How is the weather in city {i}?"), *turns]}


def with_reasoning(i):
    answer = f"<think>\nTwice {i} is {2 * i}.\n</think>\n\n{2 * i}"
    return {"messages": [user(f"What is {i} + {i}?"), assistant(answer)]}


REASONING = [with_reasoning(i) for i in range(120)]
ROWS = {
    "alpaca": [{"instruction": f"Double {i}", "input": "", "output": f"That makes {2 * i}."} for i in range(40)],
    "alpaca_zh": ALPACA_ZH,
    "sharegpt": [
        sharegpt(f"Is {i} even?", "No." if i % 2 else "Yes.", f"And what is word number {i}?", f"I would say word {i}.")
        for i in range(40)
    ],
    "tools": [{**with_a_call(i), "tools": [{"type": "function", "function": TOOL}]} for i in range(40)],
    "reasoning": REASONING,
    "csv_qa": "Question,Answer\n"
    + "".join(f'"Does article {i} fit, and how?","Yes, article {i}: see page {i * 7}."\n' for i in range(40)),
    "base_chatml": REASONING,
    "continue_adapter": ALPACA_ZH,
    "moe": REASONING,
}
# What every run here is given beside the recipe: less of everything.
SMALL = (
    "--max_steps 1 --warmup_steps 0 --max_length 256 --generate_eval 0 --merge false --gradient_accumulation_steps 1 "
    "--test_size 4 --per_device_train_batch_size 1 --save_strategy no --report_to none"
).split()


def make_model(folder, family, *, base=False):
    """A two-layer random model of a family, with the family's real tokenizer (without chat template if `base`)."""
    tokenizer = load_tokenizer(family.removesuffix("_moe"))
    if base:
        tokenizer.chat_template = None
    return save_tiny(folder, tokenizer, *KINDS[family], hidden_size=64)


@pytest.fixture
def train(tmp_path):
    def start(name, *args, rows=None, **changed):
        recipe = Recipe.load(ROOT / "recipes" / f"{name}.py")
        rows = ROWS[name] if rows is None else rows
        data = tmp_path / ("faq.csv" if isinstance(rows, str) else "rows.jsonl")
        data.write_text(rows, encoding="utf-8") if isinstance(rows, str) else write_rows(data, rows)
        settings = recipe.settings
        if "datasets" in settings:  # keep what the recipe says of its sources, but for where they are
            sources = ({} if isinstance(source, str) else source for source in settings["datasets"])
            settings["datasets"] = [{**source, "path": str(data), "name": None} for source in sources]
        else:
            settings["dataset_name"] = str(data)
        family = next(family for start, family in FAMILIES.items() if settings["model_name_or_path"].startswith(start))
        model = tmp_path / "model"
        if not model.exists():
            make_model(model, family, base=name == "base_chatml")
        settings |= {"model_name_or_path": str(model), "output_dir": str(tmp_path / name), **changed}
        return tmp_path / name, run(recipe, [*SMALL, *args])

    return start


def trained_text(out):
    """What the run's own page shows as trained, row by row."""
    rows = json.loads((out / "run.json").read_text(encoding="utf-8"))["rows"]
    return ["".join(piece["text"] for piece in row["pieces"] if piece["trained"]) for row in rows]


def test_alpaca(train):
    out, summary = train("alpaca")
    assert summary["steps"] == 1 and summary["rows"] == 36
    assert (out / "model" / "model.safetensors").exists() and not (out / "adapter").exists()
    assert all(text.startswith("That makes ") and text.endswith(".<|im_end|>") for text in trained_text(out))


@pytest.mark.slow
def test_alpaca_zh_trains_what_a_chat_without_thinking_sees(train):
    out, _ = train("alpaca_zh")
    assert all(text.startswith("结果是") and text.endswith("。<|im_end|>") for text in trained_text(out))
    rows = json.loads((out / "run.json").read_text(encoding="utf-8"))["rows"]
    assert "<think>\n\n</think>\n\n结果是" in "".join(piece["text"] for piece in rows[0]["pieces"])


@pytest.mark.slow
def test_sharegpt_counts_broken_rows_and_trains_every_turn(train):
    broken = sharegpt("Nobody answers")
    out, summary = train("sharegpt", "--generate_eval", "2", "--max_new_tokens", "4", rows=[*ROWS["sharegpt"], broken])
    assert summary["rows"] == 36
    manifest = json.loads((out / "adapter" / "sft_manifest.json").read_text())
    assert manifest["base_model"]["quantization"].startswith("4-bit") and manifest["data"]["skipped_rows"] == 1
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    still = [key for key, value in adapter.items() if "lora_B" in key and not value.any()]
    assert not still, "the gradient has to reach every layer, also after the answers before training"
    for text in trained_text(out):
        assert text.count("<|eot_id|>") == 2 and "I would say word" in text and "Is" not in text


@pytest.mark.slow
def test_tools_trains_calls_and_answers_but_not_results(train):
    out, _ = train("tools")  # the template drops the empty thoughts of the first turn, so each is a sequence of its own
    texts = trained_text(out)
    calls = [text for text in texts if text.startswith('<tool_call>\n{"name": "weather", "arguments": {"city": "city ')]
    assert calls and all(text.startswith("It is sunny in city") for text in texts if text not in calls)
    assert all(text.endswith("<|im_end|>") for text in texts)


@pytest.mark.slow
def test_reasoning_trains_thoughts_and_answer(train):
    out, _ = train("reasoning")
    for text in trained_text(out):
        assert text.startswith("<think>\nTwice ") and "</think>" in text and text.endswith("<|im_end|>")


@pytest.mark.slow
def test_moe_trains_its_experts(train, tmp_path):
    out, summary = train("moe", "--merge", "true", "--learning_rate", "0.01")
    assert all(text.startswith("<think>") and text.endswith("<|im_end|>") for text in trained_text(out))
    assert json.loads((out / "adapter" / "sft_manifest.json").read_text())["data"]["packing"]
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    experts = {key: value for key, value in adapter.items() if ".mlp.experts." in key}
    assert len(experts) == 2 * 2 * 2 and all(value.any() for value in experts.values())
    assert summary["merge_max_logit_difference"] < 1e-2
    export_folder(out, tmp_path / "served")
    served = load_file(tmp_path / "served" / "model.safetensors")
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert served.keys() == before.keys()
    moved = {key for key in before if not torch.equal(served[key].float(), before[key].to(served[key].dtype).float())}
    assert any(".experts." in key for key in moved) and not any("mlp.gate.weight" in key for key in moved)


@pytest.mark.slow
def test_csv_qa_maps_columns_and_keeps_the_system_message(train):
    out, summary = train("csv_qa")
    assert summary["rows"] == 36
    assert all(text.startswith("Yes, article ") and text.endswith("<end_of_turn>") for text in trained_text(out))
    assert json.loads((out / "adapter" / "sft_manifest.json").read_text())["system_prompt"].startswith("You answer")


@pytest.mark.slow
def test_base_chatml_adds_tokens_and_trains_their_rows(train, tmp_path):
    out, _ = train("base_chatml", "--learning_rate", "0.1", "--merge", "true")
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    before = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    after = load_file(out / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    assert sorted(ids) == [len(before), len(before) + 1] and tokenizer.eos_token == "<|im_end|>"
    assert torch.equal(after[: len(before)], before.to(after.dtype))  # no other row moved
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert not any(len(value) == len(after) for value in saved.values())  # the rows alone
    assert (after[ids[1]] - before.float().mean(0)).abs().max() > 0.01
    assert "<|im_start|>assistant" in tokenizer.chat_template
    assert all(text.endswith("<|im_end|>") for text in trained_text(out))


@pytest.mark.slow
def test_continue_adapter_begins_where_the_adapter_ended(train, tmp_path):
    make_model(tmp_path / "model", "smollm2")  # a third of the tokens, for four starts
    first, _ = train("alpaca_zh", "--learning_rate", "0.05")
    adapter = load_file(first / "adapter" / "adapter_model.safetensors")
    again = {"adapter_name_or_path": str(first)}
    still, _ = train("continue_adapter", "--learning_rate", "0", **again)
    same = load_file(still / "adapter" / "adapter_model.safetensors")
    assert same.keys() == adapter.keys() and all(torch.equal(same[key], adapter[key]) for key in adapter)
    on, _ = train("continue_adapter", "--learning_rate", "0.05", "--overwrite_output_dir", "true", **again)
    further = load_file(on / "adapter" / "adapter_model.safetensors")
    moved = [key for key in adapter if not torch.equal(further[key], adapter[key])]
    assert len(moved) == len(adapter)
    config = json.loads((on / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == json.loads((first / "adapter" / "adapter_config.json").read_text())["r"]
    with pytest.raises(RecipeError, match=r"another chat template; set template: .*chat_template\.jinja"):
        train("continue_adapter", "--template", "role-tags", "--overwrite_output_dir", "true", **again)
    with pytest.raises(RecipeError, match="lora_r: an adapter that is trained further has its own settings"):
        train("continue_adapter", "--lora_r", "4", "--overwrite_output_dir", "true", **again)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["alpaca_qlora", "alpaca_pack"])
def test_scripts_of_ma_rlhf_train_the_answers_alone(recipe, tmp_path):
    """As a launcher starts them."""
    rows = ({"instruction": "Double it", "input": str(i), "output": f"That is {2 * i}."} for i in range(40))
    done = start(
        *("accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml", f"recipes/{recipe}.py"),
        *("--model_name_or_path", "demo", "--dataset_name", write_rows(tmp_path / "rows.jsonl", rows)),
        *("--output_dir", tmp_path / "run", "--max_steps", "1", "--max_length", "64"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # "That is 2i." and the end token; nothing of the question
    assert summary["steps"] == 1 and 40 * 6 <= summary["trained_tokens"] <= 40 * 8


def test_all_recipes_are_tested_short_and_tell_what_they_are():
    recipes = [item for item in shipped().values() if item.kind == "recipe"]
    tested_elsewhere = {"demo", "qwen3", "alpaca_qlora", "alpaca_pack"}  # in the slow set
    assert {item.name for item in recipes} == set(ROWS) | tested_elsewhere
    demo = Recipe.load(ROOT / "recipes" / "demo.py").settings
    assert 2 <= demo["max_steps"] // demo["eval_steps"] <= 4  # a curve of held-out rows, of which each costs a pass
    for item in recipes:
        source = item.path.read_text(encoding="utf-8")
        lines = [line for line in source.splitlines() if line.strip()]
        assert len(lines) <= 30, item.name
        assert 20 < len(item.about) < 120 and item.model, item.name
        assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For | ast.FunctionDef)]
