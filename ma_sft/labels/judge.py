"""The judge of labels: it proves ids and labels that somebody else made, and shares no code with who made them.

It is given a conversation, the tokenizer, and the sequences that train it. Of each trained turn it proves that the ids
before it are inference's prompt, that what is trained is what the model must write to the stop token and nothing else,
that all that the row says there is in it, and that what the row says elsewhere stands in the ids or its loss is named.
Its witnesses are transformers (`inference.py`), nonsense words (`nonsense.py`), and `{% generation %}` marks, of the
template or of its training twin in TRL. That the conversation is what the raw row says is `statement.py`'s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ma_sft.labels.inference import EMPTY_REASONING, Conversation, Form, Inference, Lost, Refused, Turn, shared, starts
from ma_sft.labels.nonsense import Message

IGNORE_INDEX = -100
FEW_TURNS = 16  # assistant turns of a conversation whose prompts are rendered; see `_Hearing._plainly`
Labelled = tuple[list[int], list[int]]  # input_ids, labels


@dataclass
class Verdict:
    """What the judge found in one conversation.

    `proven` are the spans (sequence, begin, end) of turns that are right, `witnessed` of them confirmed by generation
    marks. `faults` are (code, what is wrong); `losses` name what the row says and no sequence shows; `unjudged` says
    what could not be judged and why; `remarks` what does no harm; `untrained` are the assistant messages that no
    sequence trains.
    """

    proven: list[tuple[int, int, int]] = field(default_factory=list)
    witnessed: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    unjudged: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    untrained: list[int] = field(default_factory=list)


class Judge:
    """Proves sequences of one tokenizer and chat template.

    Args:
        tokenizer: a fast tokenizer with its chat template, as inference will have it.
        stops: further ids at which generation stops; the EOS token and the folder's generation_config are known.
        template_kwargs: variables of the chat template; a conversation's own win.
        template_now: what the template's clock says at inference, an ISO date or date-time; None for the machine's.
        train_on: which assistant turns ought to be trained, `"all"` or the `"last"`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stops: Sequence[int] = (),
        template_kwargs: dict[str, Any] | None = None,
        template_now: str | None = None,
        train_on: str = "all",
    ) -> None:
        self.inference = Inference(tokenizer, stops, template_now)
        self.template_kwargs = template_kwargs or {}
        self.train_on = train_on

    def judge(
        self,
        messages: list[Message],
        sequences: Sequence[Labelled],
        *,
        tools: list[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Verdict:
        """Prove the sequences (`input_ids`, `labels`) that train one conversation.

        A message with `"train": False` must not be trained. Nothing is raised: what cannot be judged is said.
        """
        if not any(message["role"] == "assistant" for message in messages):
            return Verdict(unjudged=["turns cannot be read back from the ids"])
        conversation = Conversation(self.inference, messages, tools, {**self.template_kwargs, **(kwargs or {})})
        allowed = [k for k in conversation.turns if messages[k].get("train", True) is not False]
        wanted = allowed if self.train_on == "all" else [k for k in allowed if k == conversation.turns[-1]]
        first: Verdict | None = None
        for form, lost in conversation.forms():
            try:
                verdict = _Hearing(conversation, form, wanted).judge(sequences, lost)
            except Refused as refusal:
                verdict = Verdict(unjudged=[f"the template refuses the conversation: {refusal}"])
            if not verdict.faults and not verdict.unjudged:
                return verdict
            first = first or verdict
        return first or Verdict(unjudged=[f"the template refuses the conversation: {conversation.refusal}"])


class _Hearing:
    """One conversation in one form before the judge."""

    def __init__(self, conversation: Conversation, form: Form, wanted: list[int]) -> None:
        self.conversation = conversation
        self.inference = conversation.inference
        self.form = form
        self.wanted = wanted
        self.verdict = Verdict()
        turns, few = conversation.turns, range(min(len(conversation.turns), FEW_TURNS))
        first = {turns[n * (len(turns) - 1) // max(1, len(few) - 1)] for n in few}
        self.unread = [k for k in turns if k not in first]
        self.turns = conversation.read(form, sorted(first))
        self.openings = {turn.prompt[-3:] for turn in self.turns.values()}
        self.ends = {target[-1:] for turn in self.turns.values() for target in turn.targets}

    def judge(self, sequences: Sequence[Labelled], lost: list[Lost]) -> Verdict:
        trained: list[int] = []
        for number, (ids, labels) in enumerate(sequences):
            spans = list(runs(labels))
            trained += [self._judge_turn(number, ids, *span) for span in spans]
            if spans:
                self._judge_rest(ids, spans[-1][1])
        for k in dict.fromkeys(trained):
            if k not in self.wanted:
                self._accuse("trained against the row", f"message {k} must not be trained")
            if trained.count(k) > 1:
                self._accuse("trained twice", f"message {k} is trained {trained.count(k)} times")
        self.verdict.untrained = [k for k in self.wanted if k not in trained]
        self._judge_losses(trained, lost)
        self._hear_marks(sequences)
        return self.verdict

    def _accuse(self, code: str, what: str) -> None:
        self.verdict.faults.append((code, what))

    def _judge_turn(self, number: int, ids: list[int], begin: int, end: int) -> int:
        """Judge one stretch of labels; the message that it trains, or comes nearest to."""
        before = self.conversation.key(ids[:begin])
        k = self._turn_after(before)
        if k is None and self.unread:
            if (k := self._plainly(before, ids, begin, end)) is not None:
                self.verdict.proven.append((number, begin, end))
                return k
            self.turns |= self.conversation.read(self.form, self.unread)
            self.unread = []
            k = self._turn_after(before)
        if k is None:
            nearest = max(self.turns, key=lambda k: _nearness(self.turns[k].prompt, before))
            how = self._difference(before, self.turns[nearest].prompt)
            self._accuse("unlike inference", f"before message {nearest}: {how}")
            return nearest
        if not self.turns[k].targets:
            self.verdict.unjudged.append("the template does not continue its own generation prompt")
        elif problem := self._compare(ids, begin, end, self.turns[k]):
            self._accuse(problem[0], f"message {k}: {problem[1]}")
        else:
            self.verdict.proven.append((number, begin, end))
        return k

    def _turn_after(self, before: Any) -> int | None:
        return next((k for k, t in self.turns.items() if len(t.prompt) == len(before) and t.prompt == before), None)

    def _plainly(self, before: Any, ids: list[int], begin: int, end: int) -> int | None:
        """The turn of a long conversation that is trained here, if it is plain and said, begun and ended like others.

        That what stands before it is the history is proven at turns that follow it: rendering every prompt of a long
        conversation would take time that grows with its square.
        """
        said = self._trained(ids, begin, end, shown=False)
        if before[-3:] not in self.openings or said[-1:] not in self.ends:
            return None
        text = self.inference.spell(said[:-1]).strip()
        k = next((k for k in self.unread if self._text_of(k) == text), None)
        if k is not None:
            self.unread.remove(k)
        return k

    def _text_of(self, k: int) -> str | None:
        message = self.conversation.said[k]
        plain = isinstance(message.get("content"), str) and {*message} <= {"role", "content"}
        return str(message["content"]).strip() if plain else None

    def _compare(self, ids: list[int], begin: int, end: int, turn: Turn) -> tuple[str, str] | None:
        """What is wrong with a trained turn: its code and the first difference; None if nothing."""
        said = self._trained(ids, begin, end, shown=isinstance(turn.targets[0], str))
        if said in turn.targets:
            return None
        if any(self._is_bare(said, target) for target in turn.targets):
            return None
        right = max(turn.targets, key=lambda right: _nearness(right, said))
        if len(said) < len(right) and starts(right, said):
            return "missing end token", f"trained up to {self._spell(said[-8:])}, not to {self._spell(right[-1:])}"
        if starts(said, right):
            rest = said[len(right) :]
            if not self.inference.spell(rest).strip():
                self.verdict.remarks.append("whitespace behind the end token is trained too")
                return None
            return "trained past the end", f"{self._spell(rest)} is trained behind {self._spell(right[-1:])}"
        return "unlike the template", self._difference(said, right)

    def _is_bare(self, said: Any, target: Any) -> bool:
        """Whether the turn is written without its empty reasoning, as templates write it once it is history."""
        head = target[: len(target) - len(said)]
        return starts(target[len(head) :], said) and bool(EMPTY_REASONING.fullmatch(self.inference.spell(head)))

    def _trained(self, ids: list[int], begin: int, end: int, *, shown: bool) -> Any:
        """Sentencepiece drops the space at the beginning of a text, so a turn is read in its place."""
        key = self.conversation.key
        return key(ids[:end], shown=shown)[len(key(ids[:begin], shown=shown)) :]

    def _judge_rest(self, ids: list[int], end: int) -> None:
        """What follows the last trained turn is whitespace, or the conversation as the template goes on."""
        if not self.inference.spell(ids[end:]).strip():
            return
        key, shown = self.conversation.key(ids), self.conversation.key(ids, shown=True)
        ending = self.conversation.ending(self.form)
        for whole in [turn.whole for turn in self.turns.values()] + [ending] * (ending is not None):
            if starts(key, whole) and len(key) - len(whole) <= 1:
                return
            if not isinstance(whole, str) and shown == self.conversation.key(whole, shown=True):
                return
        self._accuse("unknown rest", f"the template does not go on with {self._spell(ids[end : end + 12])}")

    def _judge_losses(self, trained: list[int], lost: list[Lost]) -> None:
        for i, what, once_history in lost:
            if once_history and "reasoning" in what:
                self.verdict.losses.append(f"{what} of earlier turns")
            elif i in trained and "reasoning" in what and self.turns[i].thinks_on:
                continue
            elif i in trained or i not in self.turns or once_history:
                where = "the tools" if i < 0 else f"message {i}"
                self._accuse("lost content", f"{where}: the template does not write {what}")

    def _hear_marks(self, sequences: Sequence[Labelled]) -> None:
        """Generation marks of the same ids must end where the labels do."""
        conversation = self.conversation
        if not self.inference.twin or conversation.hidden or len(conversation.messages) == 1:
            return
        try:
            said = [self.form(m) for m in conversation.messages]
            marked, mask = self.inference.marked(said, conversation.tools, conversation.kwargs, conversation.written)
        except Exception:  # a twin may refuse what the template takes; the first witness is enough
            return
        marks = list(runs([0 if m else IGNORE_INDEX for m in mask]))
        for number, begin, end in self.verdict.proven:
            ids = sequences[number][0]
            if ids != marked or not marks:
                continue
            if any(self._confirms(ids, begin, end, mark) for mark in marks):
                self.verdict.witnessed += 1
            else:
                self._accuse("unlike the marks", f"tokens {begin}:{end} are trained, generation marks say {marks}")

    def _confirms(self, ids: list[int], begin: int, end: int, mark: tuple[int, int]) -> bool:
        """Marks end with the labels, but for whitespace and stop tokens; where a turn begins, the prompt proves."""
        edge = ids[end : mark[1]] or ids[mark[1] : end - 1]
        spoken = [i for i in edge if i not in self.inference.stops]
        return mark[0] < end and mark[1] > begin and not self.inference.spell(spoken).strip()

    def _spell(self, value: Any) -> str:
        return repr(self.inference.spell(value))

    def _difference(self, found: Any, right: Any) -> str:
        at = len(shared(found, right))

        def unit(value: Any) -> str:
            if at >= len(value):
                return "nothing more"
            return self._spell(value[at : at + 1]) + (f" ({value[at]})" if isinstance(value[at], int) else "")

        return (
            f"token {at}: training has {unit(found)}, inference {unit(right)}, "
            f"after {self._spell(found[max(0, at - 8) : at])}"
        )


def runs(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch of labels."""
    begin = None
    for at, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and begin is None:
            begin = at
        elif label == IGNORE_INDEX and begin is not None:
            yield begin, at
            begin = None


def _nearness(right: Any, found: Any) -> tuple[int, int]:
    return len(shared(right, found)), -abs(len(right) - len(found))
