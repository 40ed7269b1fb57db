"""Small engines with lively models, and what transformers answers with the same weights."""

from contextlib import contextmanager

import torch

from nightschool.engine.binding import Binding
from nightschool.engine.engine import Engine
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.errors import NotLoaded
from nightschool.models.build import PRESETS, build_model
from nightschool.models.load import LoadedModel
from tests.support.tokenizers_for_tests import byte_tokenizer

VOCAB_SIZE = 259
BOUND = Binding("bot@1")


def lively_model(preset="tiny-qwen3", *, seed=1, **changes):
    """A random model whose layers weigh more than its embeddings; else one with tied weights repeats its last token."""
    model = build_model({**PRESETS[preset], **changes}, VOCAB_SIZE, seed).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "embed" not in name and "head" not in name and "router" not in name:
                weight *= 8
    return model


def loaded_model(preset="tiny-qwen3", *, model=None, context_tokens=None, **changes):
    model = model or lively_model(preset, **changes)
    most = context_tokens or model.config.max_position_embeddings
    tokenizer = byte_tokenizer()
    return LoadedModel(model, tokenizer, "test", "test", None, most, model.config.vocab_size, len(tokenizer))


@contextmanager
def running(loaded, **settings):
    """An engine that is closed at the end, and that must have given everything back by then."""
    engine = Engine(loaded, settings.pop("base", BOUND.base), **settings)
    try:
        yield engine
    finally:
        engine.close()
        assert engine.load() == (0, 0)


def greedy(model, prompt_ids, max_new_tokens):
    """What plain `generate` of transformers appends to one prompt, alone."""
    ids = torch.tensor([prompt_ids])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=None
        )
    return tuple(out[0, len(prompt_ids) :].tolist())


def request(prompt_ids, max_new_tokens=16, *, request_id="r", binding=BOUND, **params):
    """Greedy and to the full length unless told otherwise."""
    params = {"temperature": 0, "ignore_eos": True} | params
    return GenerationRequest(request_id, binding, list(prompt_ids), SamplingParams(max_new_tokens, **params))


def ask(slot, prompt_ids, max_new_tokens=16, **params):
    """Submit to what the slot serves, as the server does: again to the next if it was swapped out in between."""
    while True:
        generation = slot.current
        try:
            return generation.engine.submit(request(prompt_ids, max_new_tokens, binding=generation.binding, **params))
        except NotLoaded:
            if slot.current is generation:
                raise


def random_prompt(random, length):
    return [random.randrange(3, VOCAB_SIZE) for _ in range(length)]
