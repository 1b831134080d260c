"""What `ma_sft/data/dataset.py` takes for granted of `datasets`, each by its name."""

from datasets import Dataset
from datasets.fingerprint import Hasher

from ma_sft.data.dataset import fingerprint_of, pklregister, table_rows

ROWS = Dataset.from_dict({"n": range(9)})


def test_datasets_keeps_what_decides_the_rows_in_fingerprint():
    mapped = ROWS.map(lambda row: {"n": row["n"] + 1}, new_fingerprint="mine")
    assert fingerprint_of(mapped) == "mine" and fingerprint_of(ROWS) not in ("mine", fingerprint_of(ROWS.select([1])))


def test_datasets_keeps_the_order_of_rows_in_indices():
    assert table_rows(ROWS) is None
    shuffled = ROWS.shuffle(seed=3)
    rows = table_rows(shuffled)
    assert shuffled.data is ROWS.data or shuffled.data.equals(ROWS.data)
    assert rows.dtype == "int64" and rows.tolist() == shuffled["n"][:] != list(range(9))


def test_datasets_hashes_what_pklregister_says_of_a_class():
    class Held:
        """Of a class that only this test registers."""

        text = "one"

    @pklregister(Held)
    def _hash(pickler, held):
        pickler.save_reduce(str, (held.text,), obj=held)

    one, other = Held(), Held()
    other.unlike = "what is not said"
    assert Hasher.hash(one) == Hasher.hash(other)
    other.text = "other"
    assert Hasher.hash(one) != Hasher.hash(other)
