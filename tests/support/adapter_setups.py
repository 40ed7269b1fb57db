"""Lively adapters: on the disk as peft writes them, and as peft answers with them, unmerged."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from nightschool.models.export import save_version_folder
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.versions import Probe, VersionMetadata
from tests.support.engine_setups import greedy, lively_model
from tests.support.tokenizers_for_tests import byte_tokenizer

PROBE = [5, 6, 7, 8]


def lively_adapter(preset="tiny-llama", *, seed=1, model_seed=1, strength=0.5, **config):
    """A model with an adapter that changes what it answers; fresh ones change nothing."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    wrapped = get_peft_model(lively_model(preset, seed=model_seed), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if ".lora_" in name and weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * strength / weight.shape[1] ** 0.5)
    return wrapped.eval()


def save_adapter(wrapped: PeftModel, folder, base="base"):
    save_version_folder(wrapped, byte_tokenizer(), folder, base_path=base)
    return folder


@dataclass
class PublishedAdapter:
    """A version, and the model that peft answers with."""

    ref: str
    model: PeftModel

    def greedy(self, prompt_ids, max_new_tokens):
        return greedy(self.model, prompt_ids, max_new_tokens)


def publish_adapter(registry, wrapped, base, *, name="bot", expected=None):
    """Publish an adapter on the version `base`, with a probe; it passes unless told otherwise."""
    probes = [Probe(prompt_ids=PROBE, expected_ids=list(expected or greedy(wrapped, PROBE, 4)))]
    facts = VersionMetadata(kind="adapter", method="lora", base=base.ref, probes=probes)
    version = registry.publish(name, lambda folder: save_adapter(wrapped, folder, str(base.path)), facts)
    return PublishedAdapter(version.ref, wrapped)


class House:
    """A home with a base, two adapters of `bot` and one of `cat` on it."""

    def __init__(self, path):
        self.home = Home(path).ensure()
        self.registry = Registry(self.home)
        self.model = lively_model("tiny-llama")
        self.tokenizer = byte_tokenizer()
        self.base = self.full("base", seed=1)
        self.one, self.two = (self.adapter("bot", seed=seed) for seed in (1, 2))
        self.cat = self.adapter("cat", seed=3)

    def full(self, name, *, seed):
        def fill(folder):
            save_version_folder(lively_model("tiny-llama", seed=seed), byte_tokenizer(), folder)

        return self.registry.publish(name, fill, VersionMetadata())

    def adapter(self, name, **settings):
        return publish_adapter(self.registry, lively_adapter(**settings), self.base, name=name)
