"""Talk to what was trained, through the same template and the same encoder as training."""

from pathlib import Path
from typing import Any

from ma_sft.adapters import adapter_dir
from ma_sft.errors import RecipeError
from ma_sft.template import ChatEncoder, Message


def load(folder: Path) -> tuple[Any, ChatEncoder]:
    """Model and encoder of a run's folder (its merged model, else its adapter on the base) or of a model's folder.

    Raises:
        RecipeError: the folder does not exist or holds neither.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.is_dir():
        raise RecipeError(f"the folder {str(folder)!r} does not exist")
    for whole in (folder / "merged", folder / "model", folder):
        if (whole / "config.json").is_file():
            model = AutoModelForCausalLM.from_pretrained(whole, dtype="auto", device_map=_device())
            return model.eval(), ChatEncoder(AutoTokenizer.from_pretrained(whole))
    adapter = adapter_dir(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto", device_map=_device())
    return model.eval(), ChatEncoder(AutoTokenizer.from_pretrained(adapter))


def reply(model: Any, encoder: ChatEncoder, messages: list[Message], *, max_new_tokens: int, stream: bool) -> str:
    """Generate the next assistant turn, printing it as it comes if `stream`; say so if it did not end by itself."""
    import torch
    from transformers import TextStreamer

    from ma_sft.evaluate import end_token_ids

    ids = torch.tensor([encoder.encode_prompt(messages)], device=model.device)
    ends = end_token_ids(model, encoder.tokenizer)
    streamer = TextStreamer(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
            streamer=streamer,
        )[0, ids.shape[1] :].tolist()
    stopped = output and output[-1] in ends
    if stream:
        why = encoder.tokenizer.decode(output[-1:]) if stopped else f"limit of {max_new_tokens} tokens"
        print(f"[{len(output)} tokens, stopped by {why}]")
    return str(encoder.tokenizer.decode(output[:-1] if stopped else output, skip_special_tokens=True))


def chat(folder: Path, *, prompt: str | None = None, system: str | None = None, max_new_tokens: int = 512) -> None:
    """One answer to `prompt`, printed alone for scripts, or a conversation until an empty line."""
    model, encoder = load(folder)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        messages.append({"role": "user", "content": prompt})
        print(reply(model, encoder, messages, max_new_tokens=max_new_tokens, stream=False))
        return
    print("Talk to the model; an empty line ends.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        answer = reply(model, encoder, messages, max_new_tokens=max_new_tokens, stream=True)
        messages.append({"role": "assistant", "content": answer})


def _device() -> str:
    import torch

    return "auto" if torch.accelerator.is_available() else "cpu"
