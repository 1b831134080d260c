"""Streams: each row of an epoch once, whatever files, loader workers and processes, packed or not."""

import json
import pickle
from collections import Counter
from itertools import islice

import datasets
import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from ma_sft import Recipe, run
from ma_sft.data.mixture import load_mixture
from ma_sft.errors import LabelError, RecipeError
from ma_sft.packing.pack import COLUMNS, pack_table
from ma_sft.training.distributed import Order, Share, share_out

FILES = {"unequal": (5, 400), "three equal": (40, 40, 40), "one": (50,)}
SOME, MORE = [(0, 1), (2, 1), (1, 2), (2, 2)], [(1, 1), (4, 1), (0, 2), (4, 2)]  # loader workers, processes
FEATURES = datasets.Features(dict.fromkeys(COLUMNS, datasets.List(datasets.Value("int64"))))


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
        rows = [{"prompt": str(row), "completion": "a"} for row in range(start, start + size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        start += size
    if kind == "mixture":
        return load_mixture([str(tmp_path / "*.jsonl")], streaming=True).train
    # as a hub's: a shard is a file
    rows = datasets.load_dataset("json", data_files=str(tmp_path / "*.jsonl"), split="train", streaming=True)
    return rows.map(
        lambda row: {"messages": [{"content": row["prompt"]}]}, remove_columns=["prompt", "completion"]
    ).shuffle(seed=0, buffer_size=100)


def read(rows, workers, processes, strategy, batch, steps):
    """What each process gets in `steps` batches, through accelerate's loader."""
    order = Order(max(1, workers), processes, batch, 32 if strategy == "bfd" else 1)
    share = Share(
        rows,
        label,
        Packer(strategy),
        parts=len(order.parts()),
        block=batch if strategy == "none" else 1,
        buffer=order.buffer,
    )
    found = []
    for rank in range(processes):
        loader = DataLoader(share_out(share, order, FEATURES), batch_size=batch, num_workers=workers, collate_fn=list)
        loader = prepare_data_loader(
            loader, num_processes=processes, process_index=rank, put_on_device=False, dispatch_batches=False
        )
        found.append(list(islice(loader, steps)))
    return found


def documents(pack):
    at = 0
    for length in pack["seq_lengths"]:
        yield pack["input_ids"][at]
        at += length


@pytest.mark.parametrize(("kind", "files"), [("mixture", "unequal"), ("hub", "unequal"), ("mixture", "three equal")])
@pytest.mark.parametrize(
    ("workers", "processes"), SOME + [pytest.param(*each, marks=pytest.mark.slow) for each in MORE]
)
def test_batches_are_those_of_one_process_without_workers(tmp_path, kind, files, workers, processes):
    rows = source(tmp_path, FILES[files], kind)
    total = sum(FILES[files])
    steps = -(-2 * total // (5 * processes))
    found = read(rows, workers, processes, "none", 5, steps)
    together = [row["input_ids"][0] for step in zip(*found, strict=True) for batch in step for row in batch]
    assert Counter(together[:total]) == dict.fromkeys(range(total), 1)
    assert Counter(together[total : 2 * total]) == dict.fromkeys(range(total), 1)
    assert together[:total] != together[total : 2 * total], "each epoch comes in another order"
    alone = read(rows, 0, 1, "none", 5, -(-2 * total // 5))[0]
    assert together[: 2 * total] == [row["input_ids"][0] for batch in alone for row in batch][: 2 * total]


@pytest.mark.parametrize("files", ["unequal", "one"])
@pytest.mark.parametrize(
    ("workers", "processes"), SOME + [pytest.param(*each, marks=pytest.mark.slow) for each in MORE]
)
def test_packs_of_an_epoch_hold_each_row_once(tmp_path, files, workers, processes):
    rows = source(tmp_path, FILES[files], "mixture")
    total, parts = sum(FILES[files]), max(1, workers) * processes
    packs = read(rows, workers, processes, "bfd", 1, 130)
    streams = [packs[rank][worker :: max(1, workers)] for rank in range(processes) for worker in range(max(1, workers))]
    rows_of = [[row for batch in stream for pack in batch for row in documents(pack)] for stream in streams]
    share = -(-total // parts)  # of each part's rows of an epoch: as many as of any other, or one less
    assert all(len(found) >= share for found in rows_of)
    first = Counter(row for found in rows_of for row in found[: share - 1])
    assert max(first.values()) == 1, "a row came twice before all came once"
    assert set(range(total)) == {row for found in rows_of for row in found[:share]}


def test_a_stream_without_a_label_ends_with_an_error(tmp_path):
    rows = source(tmp_path, (3,), "mixture")
    share = Share(
        rows,
        lambda batch, numbers: {"input_ids": [[1]] * len(numbers), "labels": [[-100]] * len(numbers)},
        lambda table: pack_table(table, 16, "none", drop_unlabelled=True),
        parts=1,
        block=1,
        buffer=1,
    )
    with pytest.raises(LabelError, match="no row with anything to train on"):
        next(iter(share_out(share, Order(1, 1, 1, 1), FEATURES)))


def test_a_share_can_be_sent_to_workers_that_are_not_forked(tmp_path):
    share = Share(source(tmp_path, (9,), "hub"), label, Packer("bfd"), parts=1, block=1, buffer=4)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(share.rows)  # a user's stream may hold a lambda
    first, again = (list(islice(each([0]), 20)) for each in (share, pickle.loads(pickle.dumps(share))))
    assert first == again


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_stream_goes_on_where_it_stopped_or_refuses(tmp_path, tiny, packing):
    rows = [{"prompt": f"{row}?", "completion": "so " * (row % 9) + f"{row}."} for row in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        model_name_or_path=str(tiny),
        dataset_name=str(tmp_path / "rows.jsonl"),
        dataset_streaming=True,
        dataloader_num_workers=2,
        packing=packing,
        max_length=64,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        report_to=[],
        merge=False,
    )

    def losses(name, *args):
        run(recipe, ["--output_dir", str(tmp_path / name), *args])
        state = json.loads((tmp_path / name / "checkpoint-6" / "trainer_state.json").read_text())
        return [log["loss"] for log in state["log_history"] if "loss" in log]

    going_on = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-3")]
    whole = losses("whole")
    assert len(whole) == 6 and losses("again", *going_on) == whole
    with pytest.raises(RecipeError, match=r"dataloader_num_workers=2, .* and not 4: bring 2 back"):
        run(recipe, ["--output_dir", str(tmp_path / "other"), *going_on, "--dataloader_num_workers", "4"])


@pytest.mark.parametrize("strategy", ["none", "bfd"])
@pytest.mark.parametrize(
    ("workers", "processes"),
    [(0, 1), (2, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1, 1), (2, 1), (0, 2), (1, 2)])],
)
@pytest.mark.parametrize("ends", ["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"])
def test_a_short_source_ends_an_epoch_repeats_or_drops_out(tmp_path, ends, workers, processes, strategy):
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

    batch, parts, total = 3, max(1, workers) * processes, epoch.total()
    packs = read(rows, workers, processes, strategy, batch, -(-total // batch) + parts)
    found = Counter()
    for number in range(parts):  # worker and process of a part, and how many rows of the epoch are its own
        worker, rank = divmod(number, processes)
        block = 1 if strategy == "bfd" else batch
        own = sum(row // block % parts == number for row in range(total))
        stream = [pack for each in packs[rank][worker :: max(1, workers)] for pack in each]
        found.update([row for pack in stream for row in documents(pack)][:own])
    assert found == epoch
