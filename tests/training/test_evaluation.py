"""What is seen while held-out questions are answered."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList
from transformers.utils import logging

from ma_sft.labels.encoder import ChatEncoder
from ma_sft.training.evaluation import TokenByToken, generate_answers

QUESTIONS = [[{"role": "user", "content": f"What is {i}?"}] for i in range(3)]


@pytest.fixture
def model(tiny_bpe):
    return AutoModelForCausalLM.from_pretrained(tiny_bpe)


@pytest.fixture
def encoder(tiny_bpe):
    return ChatEncoder(AutoTokenizer.from_pretrained(tiny_bpe))


@pytest.fixture(params=[True, False], ids=["bars", "no bars"])
def bars(request):
    """Whether transformers shows progress bars."""
    (logging.enable_progress_bar if request.param else logging.disable_progress_bar)()
    yield request.param
    logging.enable_progress_bar()


@pytest.mark.parametrize("ended", [False, True], ids=["to the limit", "ended at once"])
def test_bar_counts_tokens_and_comes_to_its_end(model, encoder, bars, ended, capsys):
    model.generation_config.eos_token_id = list(range(model.config.vocab_size)) if ended else None
    found = generate_answers(
        model, encoder, [encoder.encode_prompt(q) for q in QUESTIONS], max_new_tokens=5, batch_size=2
    )
    shown = capsys.readouterr().err
    assert len(found) == 3 and (not ended or all(answer.stopped for answer in found))
    assert ("10/10" in shown and "token" in shown) if bars else shown == ""  # two batches of five


def test_bar_moves_with_every_token(model, encoder):
    with logging.tqdm(total=100) as bar:
        progress = TokenByToken(bar)
        model.generation_config.eos_token_id = None
        ids = model.generate(
            **encoder.tokenizer("What is it?", return_tensors="pt"),
            max_new_tokens=7,
            stopping_criteria=StoppingCriteriaList([progress]),
        )
        assert bar.n == progress.tokens == 7 and ids.shape[1] > 7
