"""A small model that says something, a memory of two facts, and a version that reads it."""

from contextlib import contextmanager

import torch

from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Message
from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore
from nightschool.models.build import build_model
from nightschool.models.export import save_version_folder
from nightschool.models.memory_modules import MemoryModules, shape_for
from nightschool.models.memory_version import MemoryVersion, save_memory_folder
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from nightschool.store.registry import Registry
from nightschool.store.versions import VersionMetadata
from tests.support.live_server import live
from tests.support.tokenizers_for_tests import byte_tokenizer


def reader_bot(path):
    """The home, with a version that reads the memory in its layers."""
    bot = MemoryBot(path)
    bot.publish_reader()
    return bot


@contextmanager
def served(bot):
    """A server of both versions."""
    pool = EnginePool(bot.home, num_rows=4)
    with live([Slot("bot", pool), Slot("reader", pool)], registry=bot.registry) as server:
        yield server


class MemoryBot:
    """A home with one version of lively random weights and a memory of two facts."""

    def __init__(self, path):
        torch.set_num_threads(1)
        self.home = Home(path).ensure()
        self.registry = Registry(self.home)
        self.tokenizer = byte_tokenizer()
        model = build_model("tiny-qwen3", 259, seed=1, eos_token_id=self.tokenizer.eos_token_id).eval()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight *= 300
        self.model = model
        self.publish("bot")
        self.facts = MemoryStore.create(memory_path(self.home, "facts"))
        self.facts.add([NewEntry("Ada lives in Oslo."), NewEntry("Bob likes tea.")], author="test")

    def publish(self, name):
        """The same weights as a version of a name, promoted; returns the name."""
        version = self.registry.publish(
            name, lambda folder: save_version_folder(self.model, self.tokenizer, folder), VersionMetadata()
        )
        self.registry.promote(name, version.id, by="test")
        return name

    def remember(self, name, *texts):
        """A memory of these facts."""
        with MemoryStore.create(memory_path(self.home, name)) as store:
            store.add([NewEntry(text) for text in texts], author="test")

    def greedy(self, text, tokens=12):
        ids = torch.tensor([render_prompt(self.tokenizer, [Message("user", text)])])
        with torch.inference_mode():
            out = self.model.generate(ids, max_new_tokens=tokens, do_sample=False)
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def publish_reader(self, name="reader", memory="facts"):
        """A version whose layers read the memory, on the same base; returns its modules."""
        base = self.registry.resolve("bot").ref
        modules = MemoryModules(shape_for(self.model, self.tokenizer, fusion_rank=16, gate_rank=4), seed=3)
        with torch.no_grad():
            for layer in modules.reader.fusion.layers:
                layer.out += torch.randn_like(layer.out) * 0.5
            modules.reader.pointer.sentinel_bias.fill_(6.0)
            for fit in (modules.reader.subject_fit, modules.reader.relation_fit):  # whatever is found fits
                fit.bias.fill_(50.0)
        version = self.registry.publish(
            name,
            lambda folder: save_memory_folder(modules, MemoryVersion(base, memory), self.tokenizer, folder),
            VersionMetadata(kind="memory", base=base, method="memory"),
        )
        self.registry.promote(name, version.id, by="test")
        return modules
