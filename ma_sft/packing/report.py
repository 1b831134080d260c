"""What packing did to a data set, in numbers."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ma_sft.packing.pieces import Pieces
from ma_sft.packing.plan import Plan
from ma_sft.packing.tokens import IGNORED, Tokens


@dataclass(frozen=True)
class PackingReport:
    """What packing did to a data set; `str(report)` is the text that a run prints.

    Attributes:
        strategy: how documents were put together.
        overflow: what happened to documents longer than `seq_length`.
        seq_length: room of one pack, in tokens.
        rows: documents that came in.
        rows_empty: documents without a token, left out.
        rows_cut: documents that lost their end or their beginning.
        rows_split: documents that lie in more than one piece.
        rows_dropped: documents left out because they, or their last answer, were too long.
        rows_unlabelled: cut documents that have no label left: they train nothing, and a run leaves them out.
        rows_unfinished: documents cut inside a trained turn, whose end token is gone: they do not teach to
            stop.
        cut_tokens: tokens removed by cutting and dropping.
        labels_lost: labels among them, and the first label of each later piece of a split document, which has
            nothing before it to be predicted from.
        documents: documents and pieces in the packs.
        packs: rows that came out.
        tokens: tokens in the packs.
        batch_size: documents per batch that `padded_tokens` assumes.
        padded_tokens: tokens that the same documents fill when padded to the longest of their batch.
    """

    strategy: str
    overflow: str
    seq_length: int
    rows: int
    rows_empty: int
    rows_cut: int
    rows_split: int
    rows_dropped: int
    rows_unlabelled: int
    rows_unfinished: int
    cut_tokens: int
    labels_lost: int
    documents: int
    packs: int
    tokens: int
    batch_size: int
    padded_tokens: int

    @property
    def density(self) -> float:
        """Share of the packs' room that holds tokens, 0 to 1."""
        return self.tokens / (self.packs * self.seq_length) if self.packs else 0.0

    @property
    def padding_saved(self) -> int:
        """Padding tokens that unpacked batches would have carried."""
        return self.padded_tokens - self.tokens

    @property
    def speed_up(self) -> float:
        """Tokens that a padded epoch computes over those of a packed one; attention is left out."""
        return self.padded_tokens / self.tokens if self.tokens else 1.0

    def steps(self, batch_size: int, epochs: float = 1.0) -> int:
        """Optimiser steps for `epochs`, where `batch_size` packs of all devices together make one step."""
        return int(np.ceil(np.ceil(self.packs / batch_size) * epochs))

    @property
    def warnings(self) -> list[str]:
        """One line for each thing that a user should look at before training."""
        found = []
        if self.rows_unlabelled:
            found.append(f"{self.rows_unlabelled:,} cut rows have no label left and train nothing")
        if self.rows_unfinished:
            found.append(f"{self.rows_unfinished:,} rows are cut inside an answer and lost its end token")
        if self.rows_dropped:
            found.append(f"{self.rows_dropped:,} rows longer than {self.seq_length:,} tokens were dropped")
        if self.strategy == "wrapped" and self.documents > self.packs:
            found.append("'wrapped' packs cross document borders: documents in one pack see each other")
        return found

    def __str__(self) -> str:
        lines = [
            f"packing        {self.strategy}, {self.seq_length:,} tokens, too long: {self.overflow}",
            f"rows in        {self.rows:,} ({self.rows_empty:,} empty, {self.rows_cut:,} cut, "
            f"{self.rows_split:,} split, {self.rows_dropped:,} dropped)",
            f"packs out      {self.packs:,} of {self.documents:,} documents",
            f"density        {self.density:.2%}",
            f"tokens         {self.tokens:,} ({self.cut_tokens:,} cut, {self.labels_lost:,} labels lost)",
            f"padding saved  {self.padding_saved:,} tokens at {self.batch_size} rows a batch",
            f"steps          {self.steps(self.batch_size):,} an epoch instead of "
            f"{-(-self.documents // self.batch_size):,}",
            f"speed-up       {self.speed_up:.2f}x by tokens computed",
        ]
        return "\n".join(lines + [f"warning        {line}" for line in self.warnings])


def make_report(
    tokens: Tokens,
    kept: Pieces,
    plan: Plan,
    settings: tuple[str, str, int],
    batch_size: int,
    end_token_ids: Collection[int] | None,
) -> PackingReport:
    """The report of a plan.

    Args:
        tokens: the rows.
        kept: what was kept of them, those without a label among it.
        plan: the packs, which may be without these.
        settings: strategy, overflow and `seq_length`.
        batch_size: of `padded_tokens`.
        end_token_ids: what ends an answer; without it, an answer is cut where labels stand on both sides.
    """
    rows, pieces = len(tokens.lengths), plan.pieces
    left = np.bincount(kept.row, weights=kept.length, minlength=rows)
    lost = np.flatnonzero(left < tokens.lengths)
    cut = kept.take(np.flatnonzero(np.isin(kept.row, lost))) if len(lost) else kept.take(slice(0))
    labels_left, ends = tokens.trained(cut), cut.start + cut.length
    early = np.flatnonzero(ends < tokens.lengths[cut.row])
    last, following = (tokens.labels.one(cut.row[early], ends[early] + where) for where in (-1, 0))
    inside = following != IGNORED if end_token_ids is None else ~np.isin(last, list(end_token_ids))
    # The first label of a later piece has nothing before it, but where the piece before it is in the same document.
    starts = slice(None) if plan.apart else plan.bounds[:-1]
    later = pieces.take(starts)
    later = later.take(np.flatnonzero(later.start))
    alone = tokens.labels.one(later.row, later.start) != IGNORED
    whole = Pieces(lost, np.zeros_like(lost), tokens.lengths[lost])
    count = int(plan.documents.length.sum())
    padded = np.random.default_rng(0).permutation(plan.documents.length)
    padded = np.pad(padded, (0, -len(padded) % batch_size)).reshape(-1, batch_size)
    return PackingReport(
        *settings,
        rows=rows,
        rows_empty=int((tokens.lengths == 0).sum()),
        rows_cut=len(cut.row),
        rows_split=int((np.bincount(pieces.row) > 1).sum()),
        rows_dropped=int(((left == 0) & (tokens.lengths > 0)).sum()),
        rows_unlabelled=int((labels_left == 0).sum()),
        rows_unfinished=int(((last != IGNORED) & inside).sum()),
        cut_tokens=int(tokens.lengths.sum()) - count,
        labels_lost=int(tokens.trained(whole).sum() - labels_left.sum() + alone.sum()),
        documents=len(plan.documents.row),
        packs=len(plan.bounds) - 1,
        tokens=count,
        batch_size=batch_size,
        padded_tokens=int(((padded > 0).sum(axis=1) * padded.max(axis=1, initial=0)).sum()),
    )
