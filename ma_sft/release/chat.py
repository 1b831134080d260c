"""Talk to what was trained, through the same template and the same encoder as training."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from ma_sft.errors import RecipeError
from ma_sft.hub import load_pretrained, saved_folder
from ma_sft.labels.encoder import ChatEncoder, end_ids
from ma_sft.labels.turns import Message
from ma_sft.release.manifest import read_manifest, read_weights, trained_encoder
from ma_sft.utils import as_written, say

HELP = "Talk to the model. /reset (or /new) begins again, /exit or an empty line ends, /help says this."


def load(folder: Path, base: str | None = None, *, code: bool = False) -> tuple[Any, ChatEncoder, str | None]:
    """Model, encoder and system message of a run's folder (its merged model, else its adapter) or a model's.

    The encoder has the template and its variables that training had, from the tokenizer and the manifest beside it.

    Raises:
        RecipeError: the folder holds no model, or one that is not whole, or that brings code while `code` is false.
    """
    folder = saved_folder(folder)
    manifest = read_manifest(folder) or {}
    device = "auto" if torch.accelerator.is_available() else "cpu"
    if (folder / "config.json").is_file():
        read_weights(folder)
        model = load_pretrained(AutoModelForCausalLM, str(folder), code=code, dtype="auto", device_map=device).eval()
    else:
        from ma_sft.release.merge import load_adapter

        model = load_adapter(folder, base, device_map=device, code=code)
    tokenizer = load_pretrained(AutoTokenizer, str(folder), code=code)
    return model, trained_encoder(tokenizer, manifest), manifest.get("system_prompt")


def reply(
    model: Any,
    encoder: ChatEncoder,
    messages: list[Message],
    *,
    max_new_tokens: int,
    stream: bool,
    temperature: float = 0.0,
) -> str:
    """Generate the next assistant turn; with `stream`, print it as it comes, and then where and why it stopped.

    Raises:
        RecipeError: the conversation leaves no room in the model's context.
    """
    ids = torch.tensor([encoder.encode_prompt(messages)], device=model.device)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room and ids.shape[1] >= room:
        raise RecipeError(f"the conversation has {ids.shape[1]} tokens and the model's context holds {room}")
    limit = min(max_new_tokens, room - ids.shape[1]) if room else max_new_tokens
    ends = end_ids(model.generation_config, encoder.tokenizer)
    streamer = Streamer(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.no_grad(), as_written(model.name_or_path):  # its generation config decides much
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            eos_token_id=ends,
            pad_token_id=ends[0],
            tokenizer=encoder.tokenizer,  # for stop strings of the model's own
            streamer=streamer,
            **sampling,
        )[0, ids.shape[1] :].tolist()
    stopped = output and output[-1] in ends
    if stream:
        full = "the context is full" if limit < max_new_tokens else f"limit of {limit} tokens, not by itself"
        why = encoder.tokenizer.decode(output[-1:]) if stopped else full if len(output) == limit else "a stop string"
        say(f"[{len(output)} tokens, stopped by {why}]")
    return str(encoder.tokenizer.decode(output[:-1] if stopped else output, skip_special_tokens=True))


def chat(
    folder: str | Path,
    *,
    prompt: str | None = None,
    system: str | None = None,
    base: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    code: bool = False,
) -> None:
    """One answer to `prompt`, printed alone for scripts, or a conversation until an empty line.

    Args:
        folder: a run's, a model's or an adapter's.
        system: system message; None takes the one that rows without their own were trained with, `""` none.
        base: base model of an adapter, where it is not the one that the adapter names.
        temperature: 0 takes the likeliest token each time.
        code: whether the model's own Python code may run.
    """
    with as_written(folder):
        model, encoder, trained_system = load(Path(folder), base, code=code)
    system = trained_system if system is None else system
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if prompt is not None:
        say(reply(model, encoder, [*start, {"role": "user", "content": prompt}], stream=False, **settings))
        return
    say(HELP + (f" System message: {system}" if system else ""))
    messages = [*start]
    with suppress(EOFError):  # Ctrl-D
        while (text := input("> ")) not in ("", "/exit"):
            if text in ("/new", "/reset"):
                messages = [*start]
            elif text.startswith("/"):
                say(HELP)
            else:
                messages.append({"role": "user", "content": text})
                try:
                    answer = reply(model, encoder, messages, stream=True, **settings)
                    messages.append({"role": "assistant", "content": answer})
                except KeyboardInterrupt:  # stops this answer, not the conversation
                    say("\n[stopped by Ctrl-C]")
                    messages.pop()


class Streamer(TextStreamer):
    """Shows an answer as it comes; a model's words are obeyed by no terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        say(text, end="\n" if stream_end else "")
