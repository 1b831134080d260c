"""Packing: tokens, labels and borders survive, no document sees another, and every loss is counted."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from datasets.utils import _dill
from helpers import load_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from packed_rows import Recorder, flat, make_rows, tiny_model, trainer_settings
from torch.utils.data import DataLoader
from trl import SFTConfig, pack_dataset

from ma_sft import FormatError, LabelError, RecipeError, pack
from ma_sft.labels.verify import runs
from ma_sft.packing.best_fit import best_fit_decreasing
from ma_sft.packing.pack import IGNORED, Packs, as_arrays, fill, flatten, lengths, pack_with_report, packs_of
from ma_sft.packing.truncation import POLICIES, truncate

datasets.disable_progress_bars()
LENGTHS = st.lists(st.integers(1, 40), max_size=60)


def documents(packed: Any) -> list[tuple[list[int], list[int]]]:
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"])
        at = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][at : at + length], row["labels"][at : at + length]))
            at += length
    return sorted(found)


def pairs(dataset: datasets.Dataset) -> list[tuple[list[int], list[int]]]:
    return sorted((row["input_ids"], row["labels"]) for row in dataset if row["input_ids"])


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing in its textbook form: the spaces of the bins that it ends with."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else capacity) - length)
    return sorted(spaces)


@given(LENGTHS)
def test_best_fit_on_the_histogram_equals_best_fit_item_by_item(lengths: list[int]) -> None:
    bins = best_fit_decreasing(np.array(lengths, dtype=np.int64), 40)
    filled = np.bincount(bins, weights=np.array(lengths)) if lengths else np.zeros(0)
    assert sorted((40 - filled).astype(int).tolist()) == one_by_one(lengths, 40)


@given(LENGTHS, st.sampled_from(["bfd", "bfd_split", "none"]), st.integers(0, 3))
def test_every_document_comes_back_with_its_labels(lengths: list[int], strategy: Any, seed: int) -> None:
    rows = make_rows([*lengths, 0])
    packed, report = pack_with_report(rows, 40, strategy, seed=seed)
    assert documents(packed) == pairs(rows)
    assert report.rows_cut == report.labels_lost == 0 and report.tokens == sum(lengths)
    assert all(len(row["input_ids"]) <= 40 for row in packed)


def test_the_seed_decides_the_packs() -> None:
    rows = make_rows([3, 5, 7] * 40)
    assert pack(rows, 16, seed=1)[:] == pack(rows, 16, seed=1)[:]
    assert pack(rows, 16, seed=1)[:] != pack(rows, 16, seed=2)[:]


def test_denser_than_trl_and_999_permille_on_log_normal_lengths() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(200), 1, 20_000).astype(int), 1, 2048)
    packs = best_fit_decreasing(lengths, 2048).max() + 1
    rows = datasets.Dataset.from_dict({"input_ids": [np.zeros(n, np.int32) for n in lengths]})
    assert packs <= len(pack_dataset(rows, 2048))
    assert lengths.sum() / packs / 2048 >= 0.999


def test_wrapped_is_the_stream_cut_every_seq_length_and_says_that_it_crosses_borders() -> None:
    rows = make_rows([5, 9, 1, 30, 2])
    packed, report = pack_with_report(rows, 8, "wrapped")
    assert flat(packed["input_ids"]) == flat(rows["input_ids"])
    assert flat(packed["labels"]) == flat(rows["labels"])
    assert packed["seq_lengths"][:] == [[8], [8], [8], [8], [8], [7]]
    assert "cross document borders" in str(report)
    assert not pack_with_report(rows, 8, "bfd")[1].warnings[0].startswith("'wrapped'")


def turns(*sizes: tuple[int, int], first: int = 10) -> dict[str, list[int]]:
    """A conversation of distinct tokens: of each turn so many of the prompt, and so many trained ones."""
    ids = list(range(first, first + sum(map(sum, sizes))))
    mask = flat([False] * prompt + [True] * answer for prompt, answer in sizes)
    return {"input_ids": ids, "labels": [token if kept else IGNORED for token, kept in zip(ids, mask, strict=True)]}


KEPT = {"seq_length": 10, "overflow": "keep_answer"}
WHOLE = {"rows_cut": 1, "rows_unfinished": 0, "rows_dropped": 0}


@pytest.mark.parametrize(
    ("rows", "settings", "left", "counts", "says"),
    [
        ([(8, 0), (2, 0), (4, 0), (2, 0)], {"seq_length": 8}, ..., {"packs": 2, "density": 1.0}, ""),
        ([(2, 2), (2, 6), (2, 10), (9, 1)], {"seq_length": 8}, [(0, 0, 4), (1, 0, 8), (2, 0, 8), (3, 0, 8)],
         {"rows_cut": 2, "tokens": 28, "labels_lost": 5, "rows_unlabelled": 1, "rows_unfinished": 1},
         "1 cut rows have no label left"),
        ([(1, 3), (1, 19)], {"seq_length": 8, "strategy": "bfd_split"}, [(0, 0, 4), (1, 0, 8), (1, 8, 16), (1, 16, 20)],
         {"documents": 4, "tokens": 24, "labels_lost": 2}, ""),
        ([(1, 3), (1, 19), (1, 7)], {"seq_length": 8, "overflow": "drop"}, [(0, 0, 4), (2, 0, 8)],
         {"rows_dropped": 1, "tokens": 12, "labels_lost": 19}, "1 rows longer than 8 tokens were dropped"),
        ([(2, 10), (2, 3)], KEPT, [(1, 0, 5)], {"rows_dropped": 1, "tokens": 5, "labels_lost": 10}, ""),
        # The oldest turn goes; what would be half a turn goes with it; of one turn the prompt's beginning goes; the
        # answer is there already
        ([[(3, 2), (3, 2), (2, 2)]], KEPT, [(0, 5, 14)], WHOLE, ""),
        ([[(3, 2), (6, 2), (2, 2)]], KEPT, [(0, 13, 17)], WHOLE, ""),
        ([[(9, 4)]], KEPT, [(0, 3, 13)], WHOLE, ""),
        ([[(2, 3), (9, 0)]], KEPT, [(0, 0, 10)], WHOLE, ""),
        ([[(12, 0)]], KEPT, ..., {"rows_unlabelled": 1}, ""),
        ([(4, 8), (2, 3)], {"seq_length": 10, "overflow": "keep_end"}, [(0, 2, 12), (1, 0, 5)],
         {"rows_cut": 1, "tokens": 15, "rows_unfinished": 0}, ""),
        ([(12, 3), (4, 0), (2, 3)], {"seq_length": 10, "drop_unlabelled": True}, [(2, 0, 5)],
         {"rows": 3, "documents": 1, "rows_unlabelled": 1}, ""),
    ],
)  # fmt: skip
def test_what_is_left_of_long_rows_is_counted(rows: Any, settings: Any, left: Any, counts: Any, says: str) -> None:
    data = [turns(*(row if isinstance(row, list) else [row]), first=100 * n) for n, row in enumerate(rows, 1)]
    packed, report = pack_with_report(datasets.Dataset.from_list(data), **settings)
    if left is not ...:
        kept = [tuple(data[row][name][start:end] for name in ("input_ids", "labels")) for row, start, end in left]
        found = [document for document, _ in documents(packed)]
        assert sorted(found) == sorted(ids for ids, _ in kept)
        first = settings.get("strategy") == "bfd_split"  # whose pieces' first labels have no context
        assert first or documents(packed) == sorted(kept)
    assert {name: getattr(report, name) for name in counts} == counts and says in str(report)


def test_an_answer_that_ends_at_the_cut_is_finished() -> None:
    rows = make_rows([8, 12])
    end = rows[1]["input_ids"][7]
    assert pack_with_report(rows, 8, end_token_ids=[end])[1].rows_unfinished == 0
    assert pack_with_report(rows, 8, end_token_ids=[end + 1])[1].rows_unfinished == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_truncation_is_a_pure_function_of_lengths_and_runs_of_labels(policy: str) -> None:
    rows = [turns((3, 2), (3, 2), (2, 2)), turns((2, 3)), turns((2, 10)), turns((12, 0))]
    labels = [np.array(row["labels"]) for row in rows]
    kept = truncate(np.array([len(each) for each in labels]), lambda row: [*runs(labels[row])], 10, policy)
    spans = zip(kept.row.tolist(), kept.start.tolist(), kept.length.tolist(), strict=True)
    packed = pack(datasets.Dataset.from_list(rows), 10, "none", overflow=policy)
    assert packed["input_ids"][:] == [rows[row]["input_ids"][start : start + length] for row, start, length in spans]


@pytest.mark.parametrize(
    ("columns", "error", "words"),
    [
        ({"text": ["a"]}, FormatError, "no column 'input_ids'"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, LabelError, "row 0: 2 input_ids but 1 labels"),
        ({"input_ids": [[1], None]}, FormatError, "row 1: 'input_ids' is null"),
        ({"input_ids": [[1]], "assistant_masks": [[1]]}, LabelError, "assistant_masks"),
        ({"input_ids": ["text"]}, FormatError, "'input_ids'"),
    ],
)
def test_rows_that_cannot_be_packed_are_named(columns: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pack(datasets.Dataset.from_dict(columns), 8)


def test_settings_that_contradict_each_other_are_refused() -> None:
    rows = make_rows([4])
    for wrong in ({"strategy": "ffd"}, {"overflow": "keep"}, {"strategy": "bfd_split", "overflow": "cut"}):
        with pytest.raises(RecipeError):
            pack(rows, 8, **wrong)


def test_a_stream_packs_in_a_bounded_buffer() -> None:
    rows = make_rows([3, 5, 2, 6] * 25)
    read = 0

    def watch(row: Any) -> Any:
        nonlocal read
        read += 1
        return {**row, "source": "x"}

    packed = pack(rows.to_iterable_dataset().map(watch), 8, buffer_size=20)
    first = next(iter(packed))
    assert set(first) == {"input_ids", "labels", "seq_lengths"}
    assert read <= 60, "the stream was read far beyond its buffer"
    assert documents(packed) == pairs(rows)


def one_step(rows: datasets.Dataset, attention: str, batch_size: int, folder: Path) -> Recorder:
    more = {"per_device_train_batch_size": batch_size, "max_steps": 1, "packing": False, "padding_free": True}
    trainer = Recorder(
        model=tiny_model(attention),
        args=SFTConfig(**trainer_settings(folder), **more),
        train_dataset=rows,
        processing_class=load_tokenizer("smollm2"),
    )
    trainer.train()
    return trainer


def alone(rows: datasets.Dataset) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss per label and gradients of the documents run one by one, in plain PyTorch."""
    model = tiny_model("eager").train()
    total, labels = 0.0, sum(sum(label != IGNORED for label in row["labels"][1:]) for row in rows)
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits, torch.tensor(row["labels"][1:]), ignore_index=IGNORED, reduction="sum"
        )
        (loss / labels).backward()
        total += loss.item()
    return total / labels, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("packs", [1, 2])
def test_a_packed_batch_trains_like_its_documents_one_by_one(attention: str, packs: int, tmp_path: Path) -> None:
    rows = make_rows([18, 9, 3, 16, 11, 5] if packs == 2 else [20, 9, 3], prompt=0)
    packed = pack(rows, 32)
    assert len(packed) == packs and max(map(len, packed["seq_lengths"])) > 1
    loss, gradients = alone(rows)

    trainer = one_step(packed, attention, packs, tmp_path)
    assert "attention_mask" not in trainer.seen and trainer.seen["input_ids"].shape[0] == 1
    assert trainer.loss.item() == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(trainer.gradients[name], gradient, rtol=1e-4, atol=1e-6)

    # The same tokens and labels without the borders must be another loss, or this test proves nothing.
    blind = packed.map(lambda row: {"seq_lengths": [len(row["input_ids"])]})
    trainer = one_step(blind, attention, packs, tmp_path)
    assert abs(trainer.loss.item() - loss) > 1e-4
    assert not torch.allclose(trainer.gradients["lm_head.weight"], gradients["lm_head.weight"], rtol=1e-3, atol=1e-5)


@pytest.fixture(params=["memory", "disk", "shards", "shuffled", "large lists"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> datasets.Dataset:
    """The same 60 rows, as data sets of every kind hold them; of shuffled ones some are left out."""
    plain = make_rows([1 + n % 13 for n in range(60)])
    if request.param == "memory":
        return plain
    if request.param == "large lists":
        large = datasets.LargeList(datasets.Value("int64"))
        return plain.cast(datasets.Features({"input_ids": large, "labels": large}))
    plain.save_to_disk(tmp_path / "rows", num_shards=3 if request.param == "shards" else 1)
    saved = datasets.load_from_disk(str(tmp_path / "rows"))
    if request.param == "shuffled":
        return saved.shuffle(seed=1).filter(lambda row: len(row["input_ids"]) % 2)
    return saved


def test_packs_of_every_kind_of_data_set(rows: datasets.Dataset, tmp_path: Path) -> None:
    packed = pack(rows, 16)
    assert documents(packed) == pairs(rows)
    real = flatten(packed)
    assert real[:] == packed[:] and not packs_of(real) and documents(real) == pairs(rows)
    assert real.features["input_ids"].feature == rows.features["input_ids"].feature
    assert bool(real.cache_files) == bool(rows.cache_files)
    assert flatten(packed, cache_file_name=str(tmp_path / "packs.arrow"))[:] == packed[:]
    assert pack(rows, 16, cache_file_name=str(tmp_path / "same.arrow"))[:] == packed[:]
    assert packed.shuffle(seed=2).select(range(3))[:] == real.shuffle(seed=2).select(range(3))[:]
    assert lengths(packed.select([2, 0])).tolist() == [len(real[2]["input_ids"]), len(real[0]["input_ids"])]
    assert packed["labels"][1] == real["labels"][1] and packed[0:0] == real[0:0]
    arrays = as_arrays(packed)[:3]
    assert all(array.dtype == np.int64 for array in arrays["labels"])  # as a loss takes them
    assert [array.tolist() for array in arrays["input_ids"]] == packed[:3]["input_ids"]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_workers_read_packs(rows: datasets.Dataset, start: str) -> None:
    packed = as_arrays(pack(rows, 16))
    loader = DataLoader(packed, batch_size=2, num_workers=1, collate_fn=list, multiprocessing_context=start)
    read = [pack for batch in loader for pack in batch]
    assert [pack["input_ids"].tolist() for pack in read] == [pack["input_ids"].tolist() for pack in packed]


def test_a_view_holds_no_tokens_and_knows_its_rows() -> None:
    tokens = np.zeros(1_000_000, np.int32)
    many = datasets.Dataset.from_dict({"input_ids": np.split(tokens, 1000)})
    packed = pack(many, 4000)
    assert packed.data.nbytes < 10_000
    assert packed._fingerprint != pack(many, 3000)._fingerprint != pack(many, 3000, seed=1)._fingerprint
    assert len(Hasher.hash(packs_of(packed))) == 16
    few = datasets.Dataset.from_dict({"input_ids": [[1]]})
    assert packed._fingerprint != pack(few, 4000)._fingerprint


def test_what_is_mapped_or_filled_up_stays_readable() -> None:
    packed = pack(make_rows([3, 5, 2]), 8)
    doubled = packed.map(lambda row: {"labels": [2 * label for label in row["labels"]]})
    assert doubled[0]["input_ids"] == packed[0]["input_ids"]
    assert doubled[0]["labels"] == [2 * label for label in packed[0]["labels"]]
    filled = fill(packed, 3, pad_token_id=7)
    assert filled[: len(packed)] == packed[:]
    assert filled[-1] == {"input_ids": [7], "labels": [IGNORED], "seq_lengths": [1]}
    assert len(filled) == len(packed) + 3 and lengths(filled)[-1] == 0
    wrapped = fill(pack(make_rows([3, 5, 2]), 8, "wrapped"), 1, pad_token_id=7)
    assert wrapped[-1] == {"input_ids": [7], "labels": [IGNORED], "seq_lengths": [1]}


def test_names_of_datasets_that_are_not_public() -> None:
    """What `pack.py` uses of the inside of `datasets`; a release without it is named here."""
    rows = make_rows([1] * 9).shuffle(seed=0)
    assert sorted(rows._indices.column(0).to_pylist()) == list(range(9))
    assert rows._fingerprint and make_rows([1])._indices is None
    assert Packs in _dill.Pickler.dispatch
