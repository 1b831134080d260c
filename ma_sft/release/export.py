"""A finished model for other programs: a folder that vLLM and `transformers serve` take, or a GGUF file."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ma_sft.errors import RecipeError
from ma_sft.hub import load_pretrained, saved_folder
from ma_sft.utils import atomic_dir, must_be_new, say

CONVERTER = "convert_hf_to_gguf.py"


def export_folder(run: Path, out: Path, dtype: str | None = None, *, code: bool = False) -> list[str]:
    """Put the whole model of a run, or of a model's folder, into `out`: weights, tokenizer, template, ids, manifest.

    An adapter is merged. Nothing else is copied: no checkpoints, no pickles.

    Returns:
        The commands that serve it.

    Raises:
        RecipeError: no model there, weights that are not whole, `out` exists.
    """
    must_be_new(out)
    folder = saved_folder(run)
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from ma_sft.release.manifest import read_manifest, read_weights, write_manifest
    from ma_sft.release.merge import merge, save_configs, write_weights

    if not (folder / "config.json").is_file():
        say(merge(folder, out, dtype=dtype, code=code))
    else:
        weights = read_weights(folder)
        config, tokenizer = (load_pretrained(auto, str(folder), code=code) for auto in (AutoConfig, AutoTokenizer))
        config.dtype = dtype or config.dtype
        with atomic_dir(out) as target:
            write_weights(weights.tensors, {}, getattr(torch, dtype) if dtype else None, target)
            save_configs(config, folder, tokenizer, target)
            if manifest := read_manifest(folder):
                write_manifest(target, manifest)
    return [f"vllm serve {out}", f"transformers serve {out}", f"ma-sft chat {out}"]


def find_converter(given: Path | None = None) -> Path:
    """llama.cpp's converter: `given`, in `$LLAMA_CPP`, or on the PATH.

    Raises:
        RecipeError: it is nowhere; says what to install.
    """
    clone = os.environ.get("LLAMA_CPP")
    found = given or (Path(clone, CONVERTER) if clone else shutil.which(CONVERTER))
    if not found or not Path(found).is_file():
        raise RecipeError(
            f"GGUF needs llama.cpp's {CONVERTER}{f', and {found} does not exist' if found else ''}: clone "
            "github.com/ggml-org/llama.cpp and set LLAMA_CPP to its folder, or pass --converter PATH"
        )
    return Path(found)


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
    must_be_new(out, "choose another name or remove it")
    folder, script = saved_folder(run), find_converter(converter)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.stem}.") as scratch:
        if not (folder / "config.json").is_file():
            export_folder(folder, Path(scratch, "model"))
            folder = Path(scratch, "model")
        file = Path(scratch, out.name)
        command = [sys.executable, str(script), str(folder), "--outfile", str(file), "--outtype", outtype]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or not file.is_file():
            last = [line for line in ["no word", *(done.stdout + done.stderr).splitlines()] if line.strip()][-1]
            raise RecipeError(f"{script.name} failed on {folder}: {last.strip()}")
        file.rename(out)
    return [f"llama-cli -m {out} --jinja", f"llama-server -m {out} --jinja"]
