"""What worker processes have of the one that starts them."""

import os
import pickle
import threading

import multiprocess
import pytest
from datasets import Dataset

from ma_sft.data.parallel import Inherited, processes


def double(batch):
    return {"n": [2 * n for n in batch["n"]]}


@pytest.mark.skipif(multiprocess.get_start_method() != "fork", reason="workers are not forked on this system")
def test_forked_workers_have_what_cannot_be_pickled():
    lock = threading.Lock()

    def locked(batch):
        with lock:
            return double(batch)

    function = Inherited(locked)
    rows = Dataset.from_dict({"n": range(10)})
    found = rows.map(function, batched=True, num_proc=2, new_fingerprint="doubled")
    assert found["n"][:] == list(range(0, 20, 2))


def test_is_pickled_for_workers_that_are_started_anew(monkeypatch):
    monkeypatch.setattr(multiprocess, "get_start_method", lambda: "spawn")
    assert pickle.loads(pickle.dumps(Inherited(double)))({"n": [3]}) == {"n": [6]}


def test_each_process_has_rows_enough(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert [processes(None, rows) for rows in (100, 20_000, 100_000, 10**6)] == [None, 4, 20, 64]
    assert processes(1, 10**6) is None and processes(3, 5) == 3
