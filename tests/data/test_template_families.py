"""Real chat templates, as TRL ships them for its own use: each is rendered with a proven mask, or refused with a reason."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest

from nightschool.data.chat.render import render_example, render_prompt, stop_token_ids
from nightschool.data.example import Example, Message
from nightschool.errors import DataError
from tests.support.chat_templates import make_tokenizer

# Only its files are read, so TRL need not be importable: pip install --no-deps trl
TRL = importlib.util.find_spec("trl")
if TRL is None or TRL.origin is None:
    pytest.skip("TRL, whose templates are the oracle, is not installed", allow_module_level=True)
FOLDER = Path(TRL.origin).parent / "chat_templates"
MARKED = {path.stem.removesuffix("_training"): path for path in sorted(FOLDER.glob("*_training.jinja"))}
FAMILIES = [path.stem for path in sorted(FOLDER.glob("*.jinja")) if not path.stem.endswith("_training")]
MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<end_of_turn>",
    "<start_of_turn>", "<|turn>", "<turn|>", "<|end|>", "<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|endoftext|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>",
    "<｜User｜>", "<｜Assistant｜>", "<|user|>", "<|assistant|>", "<|system|>", "<SPECIAL_11>", "<SPECIAL_12>", "[/INST]", "</s>", "<end_of_utterance>",
)  # fmt: skip

CONVERSATION = (
    Message("user", "Where does Anna live?"),
    Message("assistant", "Anna lives in Rome."),
    Message("user", "And Peter?"),
    Message("assistant", "Peter lives in Oslo.\n\nWith 2 cats."),
)


def tokenizer_for(path: Path):
    tokenizer = copy.deepcopy(make_tokenizer("ours", "chatml"))
    tokenizer.add_special_tokens({"extra_special_tokens": list(MARKERS)}, replace_extra_special_tokens=False)
    tokenizer.bos_token = "<|begin|>"
    tokenizer.chat_template = path.read_text()
    return tokenizer


REFUSED = {
    "deepseek_r1_distill": "training would not fit serving",  # its prompt begins a thought that its answers do not show
    "deepseekv3": "training would not fit serving",
    "idefics3": "training would not fit serving",  # shows pictures and lists of parts, and no plain text
    "smolvlm": "training would not fit serving",
    "llava_next": "refuses the conversation",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_rendered_with_a_proven_mask_or_refused(family: str) -> None:
    tokenizer = tokenizer_for(FOLDER / f"{family}.jinja")
    example = Example(messages=CONVERSATION, source="chats.jsonl", line=1)
    if family in REFUSED:
        with pytest.raises(DataError, match=REFUSED[family]):
            render_example(tokenizer, example, 10_000)
        return
    rendered = render_example(tokenizer, example, 10_000)
    prompt = render_prompt(tokenizer, CONVERSATION[:-1])
    assert rendered.input_ids[: len(prompt)] == prompt
    weights = rendered.weights[len(prompt) :]
    end = weights.index(0.0) if 0.0 in weights else len(weights)
    assert rendered.input_ids[len(prompt) + end - 1] in stop_token_ids(tokenizer)
    assert "Peter lives in Oslo.\n\nWith 2 cats." in tokenizer.decode(rendered.input_ids[len(prompt) :][:end])
    trained = [token for token, weight in zip(rendered.input_ids, rendered.weights, strict=True) if weight]
    assert "Anna lives in Rome." in tokenizer.decode(trained)
    assert "Where" not in tokenizer.decode(trained)
    assert "And Peter" not in tokenizer.decode(trained)


@pytest.mark.parametrize(
    "family", ["qwen2_5", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3", "cohere", "lfm2"]
)
def test_the_mask_agrees_with_that_of_trl(family: str) -> None:
    """TRL marks what the assistant says in templates of its own, which transformers turns into a mask."""
    turns = [{"role": m.role, "content": m.content} for m in CONVERSATION]
    oracle = tokenizer_for(MARKED[family]).apply_chat_template(
        turns, return_assistant_tokens_mask=True, return_dict=True
    )
    tokenizer = tokenizer_for(FOLDER / f"{family}.jinja")
    rendered = render_example(tokenizer, Example(messages=CONVERSATION), 10_000)
    assert rendered.input_ids == oracle["input_ids"]
    for index, (weight, theirs) in enumerate(zip(rendered.weights, oracle["assistant_masks"], strict=True)):
        if int(weight > 0) != theirs:  # they also train line ends around the answer, and what follows its end
            assert theirs == 1
            assert tokenizer.decode([rendered.input_ids[index]]).strip() in {"", tokenizer.eos_token}
