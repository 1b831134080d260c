"""Writing text: one id at a time, each drawn from the model's distribution over the next one.

    p(x_{t+1} | x_1 .. x_t) = softmax(z_t / temperature),  z_t (V,) the logits at the last position

The keys and values of earlier tokens do not depend on later ones. So they are kept (`model.Cache`), and each new
token costs one position instead of t. Without the cache the whole text is computed again for every token: the same
ids, t times the work.

Several prompts are padded **on the left**, so that the last position of every row is its last real token. Padding is
document 0 of the attention mask and positions count from the first real token, so a row's answer is the one it
would get alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ma_sft.reference import InputError
from ma_sft.reference.model import Cache, Decoder


def next_distribution(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (B, V) -> probabilities (B, V) of the next id.

    Args:
        temperature: below 1 sharpens, above 1 flattens.
        top_k: only the k most probable ids stay; 0 keeps all (Fan et al. 2018).
        top_p: only the smallest set of most probable ids with a total probability of at least `top_p` stays
            (Holtzman et al. 2019); 1 keeps all.
    """
    logits = logits.float() / temperature
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
        # An id stays if those before it do not reach top_p yet; so the most probable one always stays.
        out = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), float("-inf"))
    return logits.softmax(-1)


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """(B, V) logits -> (B, 1) ids: the most probable one at temperature 0, else a draw."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial(next_distribution(logits, temperature, top_k, top_p), 1, generator=generator)


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """The new ids of each prompt, with the end token if one was written.

    Args:
        prompts: ids, of any lengths.
        eos_ids: a row stops after one of these; all stop after `max_new_tokens`.
        temperature: 0 is greedy; `top_k` and `top_p` as in `next_distribution`.
        seed: of the draws; the same seed and batch give the same text.

    Raises:
        InputError: an empty prompt, or a sampling setting out of range.
    """
    if not prompts or not all(prompts):
        raise InputError("each prompt needs at least one token")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise InputError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}, max_new_tokens {max_new_tokens}: "
            "needed are temperature >= 0, top_k >= 0, 0 < top_p <= 1 and max_new_tokens >= 1"
        )
    model.eval()
    device = model.lm_head.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = Cache(model.config, len(prompts), width + max_new_tokens, model.lm_head.weight) if use_cache else None
    ends = torch.tensor(list(eos_ids), device=device)
    running = torch.ones(len(prompts), 1, dtype=torch.bool, device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    fresh = ids
    for _ in range(max_new_tokens):
        hidden = model.hidden(fresh if cache is not None else ids, mask, cache)
        token = choose(model.lm_head(hidden[:, -1]), temperature, top_k, top_p, generator)
        for row in running.flatten().nonzero().flatten().tolist():
            answers[row].append(int(token[row]))
        running = running & ~torch.isin(token, ends)
        if not running.any():
            break
        fresh = token
        ids = torch.cat([ids, token], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
    return answers
