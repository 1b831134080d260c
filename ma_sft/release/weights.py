"""A model folder's safetensors: what they hold, whether they are whole, a digest, and writing them shard by shard."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from safetensors import safe_open
from safetensors.torch import save_file

from ma_sft.errors import RecipeError
from ma_sft.hub import refuse_pickles, weight_files

SHARD_BYTES = 4 * 2**30


_SAMPLE = 4096


@dataclass(frozen=True)
class Weights:
    """The tensors of a model folder.

    Args:
        folder: where they lie.
        files: tensor name -> file name.
        sizes: tensor name -> number of elements.
        nbytes: bytes of all tensors.
        digest: of names, shapes, dtypes and the first 4 KiB of every tensor: any fine-tune of a model differs.
    """

    folder: Path
    files: dict[str, str]
    sizes: dict[str, int]
    nbytes: int
    digest: str


def read_weights(folder: Path) -> Weights:
    """The weights of a folder, from the headers of its files; no tensor is loaded.

    Raises:
        RecipeError: no safetensors, a shard that is missing, or a file that is cut off or broken.
    """
    names = weight_files(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        refuse_pickles(str(folder), names, [path.name for path in folder.iterdir()])
        raise RecipeError(
            f"{folder} lacks {len(missing)} of {len(names)} files: {', '.join(missing[:3])}; get the whole model"
        )
    files, sizes, nbytes, digest = {}, {}, 0, hashlib.sha256()
    for name in names:
        path = folder / name
        with open(path, "rb") as file:
            try:
                tensors = parse_local_safetensors_file_metadata(path).tensors
                begin = 8 + int.from_bytes(file.read(8), "little")
                end = begin + max(tensor.data_offsets[1] for tensor in tensors.values())
            except (SafetensorsParsingError, ValueError, TypeError):
                raise RecipeError(f"{path} is no safetensors file, or a broken one; get it again") from None
            if path.stat().st_size != end:
                raise RecipeError(f"{path} is cut off: {path.stat().st_size:,} bytes of {end:,}; get it again")
            for key, tensor in sorted(tensors.items()):
                start, stop = tensor.data_offsets
                file.seek(begin + start)
                digest.update(f"{key} {tensor.dtype} {tensor.shape}".encode())
                digest.update(file.read(min(stop - start, _SAMPLE)))
                files[key], sizes[key] = name, tensor.parameter_count
                nbytes += stop - start
    return Weights(folder, files, sizes, nbytes, digest.hexdigest()[:32])


def read_tensors(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder one after the other, on the CPU."""
    for file in dict.fromkeys(weights.files.values()):
        with safe_open(weights.folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write tensors as they come, holding at most `SHARD_BYTES` and one tensor, named as transformers names them."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append([*held])
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, Any] = {}
    for at, names in enumerate(shards):
        file = f"model-{at + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{at}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
