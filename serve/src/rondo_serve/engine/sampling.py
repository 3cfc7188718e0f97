"""How tokens are chosen from logits: by what `generate` is made of, so that both choose alike.

Shapes: V vocabulary.
"""

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rondo.modeling.speculation_recurrent import Picker
from rondo_serve.requests import Sampling


def picker_of(sampling: Sampling) -> Picker:
    """Return what chooses tokens, its processors in the order in which transformers has them."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if not sampling.temperature:
        return Picker(processors, samples=False)
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    return Picker(processors, samples=True)


def generator_of(sampling: Sampling, device: torch.device) -> torch.Generator | None:
    """Return what the draws of a request are made with, alike whoever else is served."""
    if not sampling.temperature:
        return None
    return torch.Generator(device=device).manual_seed(sampling.seed)


def pick(
    picker: Picker, generator: torch.Generator | None, tokens: list[int], logits_V: torch.Tensor
) -> int:
    """Return the token that follows others."""
    if not picker.processors and not picker.samples:
        return int(logits_V.argmax())
    ids = torch.tensor([tokens], device=logits_V.device)
    return int(picker.draw(picker.scores(ids, logits_V[None]), generator))


def logprobs(
    logits_V: torch.Tensor, token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the logarithm of a token's probability, and the best tokens with theirs."""
    found = logits_V.float().log_softmax(-1)
    best = found.topk(count)
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return float(found[token]), top
