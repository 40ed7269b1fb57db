"""Forms of new examples that the champion writes, before it learns: it is asked for questions with the fact before its eyes, and judged.

A question is kept if the champion, with the fact in its context, answers it with the fact, and does not without it; the examiner
decides. Asked once: what it wrote lies in the run's folder, where a resumed run and the gate read it, and in the home's cache, where another
run with the same weights and the same new examples finds it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nightschool.config.recipe import Recipe
from nightschool.data.chat.render import render_prompt, stop_token_ids
from nightschool.data.example import Example, Message
from nightschool.data.match import is_correct
from nightschool.data.study.forms import Form, form_of, is_studied
from nightschool.data.study.rewordings import wording
from nightschool.data.study.writing import asked_for_forms, control_questions, fact_of, question_in, why_not, with_fact
from nightschool.evaluation.heldout import as_found
from nightschool.events import EventLog
from nightschool.feedback.rejected_forms import RejectedForms
from nightschool.feedback.selection import Selection
from nightschool.feedback.written_forms import WrittenForms, cached, read_written, write_written
from nightschool.models.adapters import fresh_adapter_left_out
from nightschool.models.load import LoadedModel
from nightschool.models.quiet import quiet_libraries
from nightschool.store.home import Home
from nightschool.training.continuation import Sampling, answers_of
from nightschool.training.metrics import say
from nightschool.training.rehearsal import digest_of_weights

# Of an example, so many questions of each of the two kinds are asked for.
_TRIES = 3
_EXAMPLES_AT_ONCE = 8
# Between two passes, and between two tokens, is looked at the clock.
_PROMPTS_PER_PASS = 16
_QUESTION_TOKENS, _ANSWER_TOKENS = 32, 32
_SAMPLING = Sampling(temperature=0.8, top_p=0.95)
# Two kept for an example, at the least, and one of them goes to the gate where no rule made one for it.
_LEAST_TO_KEEP_ASIDE = 2


def written_for(recipe: Recipe, home: Home, folder: Path, loaded: LoadedModel, selection: Selection) -> WrittenForms:
    """What the champion wrote for a run: it lies in the run's folder, or in the cache, or is written now.

    Raises:
        Damaged: If what lies there is not what was written.
    """
    found = read_written(folder)
    if found is not None:
        return found
    taken = _taken(selection) | RejectedForms(home.database).wordings(recipe.name)
    facts = [loaded.ref, recipe.study.model_dump(mode="json"), recipe.train.seed, sorted(taken)]
    examples = [[one.digest, one.key, one.alternatives, one.corrects] for one in selection.new]
    digest = digest_of_weights(loaded, hashlib.sha256(json.dumps([facts, examples]).encode()).hexdigest())
    cache = cached(home, digest)
    found = read_written(cache)
    if found is None:
        say(f"Asking {loaded.ref} to write forms of what is new, for {recipe.study.write_for:g} s at most")
        writer = _Writer(loaded, recipe.train.seed)
        found = writer.write(selection, taken, most=_most_written(recipe), seconds=recipe.study.write_for)
        cache.mkdir(parents=True, exist_ok=True)
        write_written(cache, found)
    write_written(folder, found)
    say(found.text)
    log = EventLog(folder / "events.jsonl", run_id=folder.name)
    log.write("forms_written", **found.counts)
    log.close()
    return found


def _most_written(recipe: Recipe) -> int:
    """Of an example: all but itself, or the larger half of them where rules make forms, too."""
    room = recipe.study.forms - 1
    return room if recipe.study.write == "self" else math.ceil(room / 2)


def _taken(selection: Selection) -> set[str]:
    """The wordings that no form may have: those that are asked, kept aside or held out, and those of other forms."""
    asked = [example for example in [*selection.new, *selection.held_out] if example.question is not None]
    of_examples = {wording(text) for one in asked for text in (one.question or "", *one.paraphrases)}
    return of_examples | {wording(form.example.question or "") for form in selection.forms}


class _TimeIsUp(Exception):
    """What is being written cannot be finished."""


class _Writer:
    def __init__(self, loaded: LoadedModel, seed: int) -> None:
        self._loaded, self._seed = loaded, seed
        self._until = math.inf
        self._dropped: Counter[str] = Counter()
        self._num_written = 0

    def write(self, selection: Selection, taken: Collection[str], *, most: int, seconds: float) -> WrittenForms:
        """At most so many forms of each example; those for which no time is left are not asked for, or were in vain."""
        examples = [example for example in selection.new if is_studied(example)]
        has_aside = {form.of for form in selection.forms if form.kept_aside}
        began, asked, forms, taken = time.monotonic(), 0, list[Form](), set(taken)
        self._until = began + seconds
        device = next(self._loaded.model.parameters()).device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            quiet_libraries(),
            as_found(self._loaded.model),
            fresh_adapter_left_out(self._loaded.model),
            torch.no_grad(),
        ):
            torch.manual_seed(self._seed)
            while most > 0 and (some := examples[asked : asked + self._at_once(asked, time.monotonic() - began)]):
                before = self._num_written, self._dropped.copy()
                try:
                    found = self._questions(some, taken)
                except _TimeIsUp:
                    self._num_written, self._dropped = before
                    break
                asked += len(some)
                for example, questions in zip(some, found, strict=True):
                    wants_aside = not example.paraphrases and example.digest not in has_aside
                    made = self._forms(example, questions, most, wants_aside=wants_aside)
                    taken |= {wording(form.example.question or "") for form in made}
                    forms += made
        return WrittenForms(
            forms=forms,
            num_examples=len(examples),
            num_asked=asked,
            num_written=self._num_written,
            dropped=dict(self._dropped),
            seconds=round(time.monotonic() - began, 1),
        )

    def _at_once(self, asked: int, seconds: float) -> int:
        """How many examples come next: one alone, which shows what one takes, then as many as there is time for by that."""
        left = self._until - time.monotonic()
        if not asked:
            return 1 if left > 0 else 0
        return min(_EXAMPLES_AT_ONCE, int(left * asked / max(seconds, 1e-9)))

    def _forms(self, example: Example, questions: Sequence[str], most: int, *, wants_aside: bool) -> list[Form]:
        chosen = questions[: most + wants_aside]
        self._dropped.update(["more than wanted"] * (len(questions) - len(chosen)))
        forms = [form_of(example, question, example.answer or "", "written") for question in chosen]
        if wants_aside and len(forms) >= _LEAST_TO_KEEP_ASIDE:
            return [*forms[:-1], replace(forms[-1], kept_aside=True)]
        return forms[:most]

    def _questions(self, examples: Sequence[Example], taken: Collection[str]) -> list[list[str]]:
        """What is kept of the questions that are written for examples, by rules and by how the model answers them."""
        asked = [
            (at, turns) for at, one in enumerate(examples) for turns in asked_for_forms(one) for _ in range(_TRIES)
        ]
        said = self._answers([turns for _, turns in asked], _QUESTION_TOKENS, _SAMPLING)
        self._num_written += len(said)
        found: list[tuple[int, str]] = []
        seen = set(taken)
        for (at, _), text in zip(asked, said, strict=True):
            question = question_in(text)
            why = "no question" if question is None else why_not(examples[at], question, seen)
            if question is None or why is not None:
                self._dropped[str(why)] += 1
                continue
            seen.add(wording(question))
            found.append((at, question))
        found = self._without_parroted(examples, found)
        found = self._judged(examples, found, shown=True)
        found = self._judged(examples, found, shown=False)
        return [[question for where, question in found if where == at] for at in range(len(examples))]

    def _without_parroted(self, examples: Sequence[Example], found: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        """Without the questions for examples whose fact the model says whatever it is asked: its answers judge nothing."""
        controls = [
            (at, control) for at in sorted({at for at, _ in found}) for control in control_questions(examples[at])
        ]
        asked = [with_fact(examples[at], fact_of(examples[at]), control) for at, control in controls]
        parroted = {
            at
            for (at, control), answer in zip(controls, self._answers(asked, _ANSWER_TOKENS), strict=True)
            if is_correct(answer, examples[at].answer or "", question=control, alternatives=examples[at].alternatives)
        }
        kept = [(at, question) for at, question in found if at not in parroted]
        self._dropped.update(["fact said whatever is asked"] * (len(found) - len(kept)))
        return kept

    def _judged(
        self, examples: Sequence[Example], found: Sequence[tuple[int, str]], *, shown: bool
    ) -> list[tuple[int, str]]:
        """Those that are answered with the fact when it is in the context, or those that are not when it is not."""
        asked = [
            with_fact(examples[at], fact_of(examples[at]), q) if shown else _turns(examples[at], q) for at, q in found
        ]
        kept = []
        for (at, question), answer in zip(found, self._answers(asked, _ANSWER_TOKENS), strict=True):
            one = examples[at]
            right = is_correct(answer, one.answer or "", question=question, key=one.key, alternatives=one.alternatives)
            if right is shown:
                kept.append((at, question))
        why = "not answered with the fact" if shown else "answered without the fact"
        self._dropped.update([why] * (len(found) - len(kept)))
        return kept

    def _answers(
        self, conversations: Sequence[Sequence[Message]], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[str]:
        """What the model says to conversations, those of about one length together. Raises `_TimeIsUp`."""
        tokenizer, stops = self._loaded.tokenizer, stop_token_ids(self._loaded.tokenizer)
        prompts = [render_prompt(tokenizer, turns) for turns in conversations]
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), _PROMPTS_PER_PASS):
            some = order[start : start + _PROMPTS_PER_PASS]
            asked = [prompts[at] for at in some]
            found = answers_of(self._loaded.model, tokenizer, asked, max_new_tokens, sampling, until=self._until)
            if time.monotonic() >= self._until:
                raise _TimeIsUp
            for at, ids in zip(some, found, strict=True):
                texts[at] = str(tokenizer.decode([one for one in ids if one not in stops], skip_special_tokens=True))
        return texts


def _turns(example: Example, asked: str) -> list[Message]:
    last = max(at for at, message in enumerate(example.messages) if message.role == "user")
    return [*example.messages[:last], Message("user", asked)]
