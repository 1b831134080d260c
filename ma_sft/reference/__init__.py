"""Supervised fine-tuning by hand, in plain PyTorch: read it to learn how it works, run it to check the fast path.

Reading order: `template` (text to ids and marks), `collate` (ids to a batch), `model` (the decoder), `train` (the
loss and the loop), `lora` (low-rank updates), `generate` (the KV cache and sampling). `docs/reference.md` walks
through them. Nothing here uses TRL, PEFT or a transformers model; the tests hold each piece against theirs.
"""


class InputError(ValueError):
    """Input or settings that the reference does not know; the message is one line that can be acted on."""
