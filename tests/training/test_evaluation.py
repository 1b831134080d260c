"""What is seen while held-out questions are answered."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ma_sft.labels.encoder import ChatEncoder
from ma_sft.training.checkpoints import StopEvaluation
from ma_sft.training.evaluation import generate_answers


@pytest.fixture(params=[True, False], ids=["bars", "no bars"])
def bars(request):
    """Whether transformers shows progress bars."""
    (logging.enable_progress_bar if request.param else logging.disable_progress_bar)()
    yield request.param
    logging.enable_progress_bar()


@pytest.fixture
def answer(tiny_bpe):
    """Answers three questions, to the limit of five tokens or with the first one."""
    model = AutoModelForCausalLM.from_pretrained(tiny_bpe)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny_bpe))
    prompts = [encoder.encode_prompt([{"role": "user", "content": f"What is {i}?"}]) for i in range(3)]

    def start(ended=False, **more):
        model.generation_config.eos_token_id = list(range(model.config.vocab_size)) if ended else None
        return generate_answers(model, encoder, prompts, max_new_tokens=5, batch_size=2, **more)

    return start


@pytest.mark.parametrize("ended", [False, True], ids=["to the limit", "ended at once"])
def test_bar_counts_tokens_and_comes_to_its_end(answer, bars, ended, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    found, shown = answer(ended), capsys.readouterr().err
    assert len(found) == 3 and (not ended or all(answer.stopped for answer in found))
    assert ("10/10" in shown and "token" in shown) if bars else shown == ""  # two batches of five


def test_without_a_terminal_there_is_no_bar_and_a_check_is_asked_with_every_token(answer, capsys):
    asked = []
    answer(check=lambda: asked.append(1))
    assert len(asked) == 2 * (1 + 5) and capsys.readouterr().err == ""


def test_what_a_check_raises_ends_the_generation(answer):
    def check():
        raise StopEvaluation("stopped", 130)

    with pytest.raises(StopEvaluation):
        answer(check=check)
