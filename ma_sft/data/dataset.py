"""The inside of `datasets` that has no public name, in one place; `tests/data/test_dataset.py` names each of them."""

from typing import Any

import datasets
from datasets.utils._dill import pklregister

__all__ = ["fingerprint_of", "pklregister", "table_rows"]  # the second says how `datasets` hashes what holds it


def fingerprint_of(rows: Any) -> str:
    """What decides the rows, by which `datasets` finds again what was made of them."""
    return str(rows._fingerprint)


def table_rows(rows: datasets.Dataset) -> Any:
    """The numbers (int64) of the rows in the table `rows.data`, None where they are all of it in its order.

    A shuffled or filtered data set is a table and a list of its rows; `flatten_indices` would copy it all.
    """
    return None if rows._indices is None else rows._indices.column(0).to_numpy().astype("int64")
