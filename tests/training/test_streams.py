"""Streams: each row of an epoch once, whatever files, loader workers and processes, packed or not."""

import json
import pickle
from collections import Counter
from functools import cache
from itertools import islice

import datasets
import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader
from helpers import QUICK, write_rows
from torch.utils.data import DataLoader

from ma_sft import Recipe, run
from ma_sft.data.mixture import load_mixture
from ma_sft.errors import LabelError
from ma_sft.packing.pack import pack_table
from ma_sft.training.distributed import Epochs, endless_stream

FILES = {"unequal": (5, 150), "three equal": (40, 40, 40), "one": (50,)}
SOME, MORE = [(2, 1), (1, 2), (2, 2)], [(1, 1), (4, 1), (0, 2), (4, 2)]  # loader workers, processes


def label(batch, numbers):
    """A row's number, once for each of 1 to 7 tokens."""
    rows = [int(messages[0]["content"]) for messages in batch["messages"]]
    ids = [[row] * (row % 7 + 1) for row in rows]
    return {"input_ids": ids, "labels": ids}


class Packer:
    def __init__(self, strategy):
        self.settings = {"seq_length": 16, "strategy": strategy, "seed": 0}

    def __call__(self, table):
        return pack_table(table, **self.settings)


def source(tmp_path, sizes, kind):
    start = 0
    for name, size in enumerate(sizes):
        rows = ({"prompt": str(row), "completion": "a"} for row in range(start, start + size))
        write_rows(tmp_path / f"{name}.jsonl", rows)
        start += size
    if kind == "mixture":
        return load_mixture([str(tmp_path / "*.jsonl")], streaming=True).train
    # as a hub's: a shard is a file
    rows = datasets.load_dataset("json", data_files=str(tmp_path / "*.jsonl"), split="train", streaming=True)
    columns = ["prompt", "completion"]
    rows = rows.map(lambda row: {"messages": [{"content": row["prompt"]}]}, remove_columns=columns)
    return rows.shuffle(seed=0, buffer_size=100)


def read(rows, workers, processes, strategy, batch, steps):
    """What each process gets in `steps` batches, through accelerate's loader."""
    found = []
    for rank in range(processes):
        stream = endless_stream(rows, label, Packer(strategy), 32)
        loader = DataLoader(stream, batch_size=batch, num_workers=workers, collate_fn=list)
        loader = prepare_data_loader(
            loader, num_processes=processes, process_index=rank, put_on_device=False, dispatch_batches=False
        )
        found.append(list(islice(loader, steps)))
    return found


def documents(found):
    """The rows of which the documents are that all processes got, step by step."""
    packs = [pack for step in zip(*found, strict=True) for batch in step for pack in batch]
    return [int(pack["input_ids"][at]) for pack in packs for at in np.cumsum([0, *pack["seq_lengths"][:-1]])]


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """(rows, the documents of two epochs) of a stream that one process reads without workers."""

    @cache
    def make(kind, files):
        rows = source(tmp_path_factory.mktemp("rows"), FILES[files], kind)
        return rows, documents(read(rows, 0, 1, "none", 5, -(-2 * sum(FILES[files]) // 5)))

    return make


@pytest.mark.parametrize(("kind", "files"), [("mixture", "unequal"), ("hub", "unequal"), ("mixture", "three equal")])
@pytest.mark.parametrize(
    ("workers", "processes"), SOME + [pytest.param(*each, marks=pytest.mark.slow) for each in MORE]
)
def test_batches_are_those_of_one_process_without_workers(two_epochs, kind, files, workers, processes):
    (rows, alone), total = two_epochs(kind, files), sum(FILES[files])
    together = documents(read(rows, workers, processes, "none", 5, -(-2 * total // (5 * processes))))
    assert Counter(together[:total]) == Counter(together[total : 2 * total]) == dict.fromkeys(range(total), 1)
    assert together[:total] != together[total : 2 * total], "each epoch comes in another order"
    assert together[: 2 * total] == alone[: 2 * total]


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (2, 2)])
def test_packs_hold_each_row_of_an_epoch_once(tmp_path, workers, processes):
    rows, total = source(tmp_path, (3, 61), "mixture"), 64  # two buffers of 32 rows
    found = documents(read(rows, workers, processes, "bfd", 1, 20))
    assert Counter(found[:total]) == dict.fromkeys(range(total), 1)


def test_a_stream_without_a_row_ends_with_an_error(tmp_path):
    rows = source(tmp_path, (3,), "mixture").filter(lambda row: False)
    with pytest.raises(LabelError, match="the stream has no row with anything to train on"):
        next(Epochs(rows)())


def test_a_stream_without_a_label_is_refused(tmp_path, tiny_bpe):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a?", "completion": "It is so."}] * 3)
    more = {"dataset_name": rows, "dataset_streaming": True, "max_length": 2, "check": False}
    recipe = Recipe(**{**QUICK, **more}, model_name_or_path=str(tiny_bpe), output_dir=str(tmp_path / "run"))
    with pytest.raises(LabelError, match="the stream has no row with anything to train on"):
        run(recipe)


def test_the_rows_can_be_sent_to_workers_that_are_not_forked(tmp_path):
    epochs = Epochs(source(tmp_path, (9,), "hub"))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(epochs.packs)  # a user's stream may hold a lambda
    first, again = (list(islice(each(), 20)) for each in (epochs, pickle.loads(pickle.dumps(epochs))))
    assert first == again


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_stream_goes_on_where_it_stopped(tmp_path, tiny_bpe, packing):
    rows = ({"prompt": f"{row}?", "completion": "so " * (row % 9) + f"{row}."} for row in range(30))
    more = {
        **{"model_name_or_path": str(tiny_bpe), "dataset_name": write_rows(tmp_path / "rows.jsonl", rows)},
        **{"dataset_streaming": True, "dataloader_num_workers": 2, "packing": packing, "max_length": 96},
        **{"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 3},
    }
    recipe = Recipe(**{**QUICK, **more})

    def losses(name, *args):
        run(recipe, ["--output_dir", str(tmp_path / name), *args])
        state = json.loads((tmp_path / name / "checkpoint-6" / "trainer_state.json").read_text())
        return [log["loss"] for log in state["log_history"] if "loss" in log]

    going_on = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-3")]
    whole = losses("whole")
    assert len(whole) == 6 and losses("again", *going_on) == whole
    assert losses("workers", *going_on, "--dataloader_num_workers", "1") == whole


@pytest.mark.parametrize("ends", ["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"])
def test_a_short_source_ends_an_epoch_repeats_or_drops_out(tmp_path, ends):
    source(tmp_path, (12, 60), "mixture")
    files = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in range(2)]
    rows = load_mixture(files, streaming=True, stopping_strategy=ends).train
    epoch = Counter(int(row["messages"][0]["content"]) for row in rows)
    short, long = [epoch[row] for row in range(12)], [epoch[row] for row in range(12, 72)]
    if ends == "first_exhausted":
        assert short == [1] * 12 and 4 <= sum(long) <= 30 and max(long) == 1
    elif ends == "all_exhausted":
        assert long == [1] * 60 and min(short) >= 2 and max(short) - min(short) <= 1
    else:
        assert short + long == [1] * 72
    found = documents(read(rows, 2, 2, "none", 3, -(-epoch.total() // 6)))
    assert Counter(found[: epoch.total()]) == epoch
