"""The rendering: what is trained is the answers and nothing else, and what is served is the beginning of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from nightschool.data.chat.render import Rendered, render_example, render_pieces, render_prompt, stop_token_ids
from nightschool.data.example import Example, Message
from nightschool.errors import DataError, ModelError
from tests.support.chat_templates import KINDS, QWEN_3, TEMPLATES, make_tokenizer

# Questions and answers share no letter, so that a token that is trained shows where it came from.
_asked = st.text("abcd?? \n\t", min_size=1, max_size=20).filter(str.strip)
_said = st.text("wxyz.é😀 \n\t", min_size=1, max_size=20).filter(str.strip)
_system = st.text("klm \n", min_size=1, max_size=10).filter(str.strip)


@st.composite
def conversations(draw, system: bool = True) -> Example:
    messages = [Message("system", draw(_system))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [
            Message("user", draw(_asked)),
            Message("assistant", draw(_said), draw(st.sampled_from([0.0, 1.0, 0.5]))),
        ]
    messages[-1] = Message("assistant", messages[-1].content)
    return Example(messages=tuple(messages), source="chats.jsonl", line=7)


def chat(*contents: str, weights: dict[int, float] | None = None) -> Example:
    messages = tuple(
        Message("assistant" if i % 2 else "user", content, (weights or {}).get(i, 1.0))
        for i, content in enumerate(contents)
    )
    return Example(messages=messages, source="chats.jsonl", line=7)


def trained_text(tokenizer, rendered: Rendered) -> str:
    ids = [i for i, weight in zip(rendered.input_ids, rendered.weights, strict=True) if weight > 0]
    return tokenizer.decode(ids, skip_special_tokens=False)


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_train_time_text_is_serve_time_text(template: str, kind: str, data) -> None:
    """Mistakes 2 and 3: the prompt of serving is, token for token, the beginning of the training rendering."""
    tokenizer = make_tokenizer(kind, template)
    example = data.draw(conversations())
    rendered = render_example(tokenizer, example, 10_000)
    prompt = render_prompt(tokenizer, example.messages[:-1])

    assert rendered.input_ids[: len(prompt)] == prompt
    assert not rendered.cut_tokens
    rest, weights = rendered.input_ids[len(prompt) :], rendered.weights[len(prompt) :]
    end = next(i for i, token in enumerate(rest) if token in stop_token_ids(tokenizer))
    assert weights[: end + 1] == [1.0] * (end + 1)
    assert not any(weights[end + 1 :])
    answer = tokenizer.decode(prompt + rest[:end]).removeprefix(tokenizer.decode(prompt))
    assert squeezed(answer) == squeezed(example.messages[-1].content)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_loss_lies_on_answers_only(template: str, kind: str, data) -> None:
    tokenizer = make_tokenizer(kind, template)
    example = data.draw(conversations())
    rendered = render_example(tokenizer, example, 10_000)
    stops = stop_token_ids(tokenizer)

    assert len(rendered.input_ids) == len(rendered.weights) == len(rendered.roles)
    assert rendered.weights[0] == 0
    assert set(rendered.weights) <= {0.0} | {m.weight for m in example.messages if m.role == "assistant"}
    for token, weight, role in zip(rendered.input_ids, rendered.weights, rendered.roles, strict=True):
        if weight > 0:
            assert role == "assistant"
            if token not in stops:
                assert not set(tokenizer.decode([token])) & set("abcd?klmtsirSIN[]/UER:<>")
    learned = squeezed(trained_text(tokenizer, rendered).replace(tokenizer.eos_token, ""))
    wanted = "".join(squeezed(m.content) for m in example.messages if m.role == "assistant" and m.weight > 0)
    if kind != "merging":  # there a token may hold the end of the template and the start of an earlier answer
        for stop in ("<|eot|>", "<|im_end|>", "\ufffd"):
            learned, wanted = learned.replace(stop, ""), wanted.replace(stop, "")
        if not any(c in wanted for c in "é😀"):
            assert learned == wanted


def test_the_end_of_an_earlier_answer_is_learned_too() -> None:
    tokenizer = make_tokenizer("ours", "chatml")
    rendered = render_example(tokenizer, chat("ab", "xy", "cd", "zw"), 1000)
    assert trained_text(tokenizer, rendered) == "xy<|im_end|>zw<|im_end|>"


def test_a_weight_of_zero_keeps_an_answer_as_context() -> None:
    tokenizer = make_tokenizer("ours", "chatml")
    rendered = render_example(tokenizer, chat("ab", "xy", "cd", "zw", weights={1: 0.0, 3: 0.25}), 1000)
    assert trained_text(tokenizer, rendered) == "zw<|im_end|>"
    assert set(rendered.weights) == {0.0, 0.25}


def test_thoughts_of_the_last_turn_are_learned_and_those_of_earlier_turns_are_gone() -> None:
    tokenizer = make_tokenizer("ours", "qwen-3")
    example = chat("ab", "<think>\nww\n</think>\n\nxy", "cd", "<think>\nzz\n</think>\n\nyx")
    rendered = render_example(tokenizer, example, 1000)
    assert trained_text(tokenizer, rendered) == "xy<|im_end|><think>\nzz\n</think>\n\nyx<|im_end|>"
    prompt = render_prompt(tokenizer, example.messages[:-1], thinking=True)
    assert rendered.input_ids[: len(prompt)] == prompt


def test_an_answer_without_thoughts_does_not_learn_the_empty_place_for_them() -> None:
    tokenizer = make_tokenizer("ours", "qwen-3")
    rendered = render_example(tokenizer, chat("ab", "xy"), 1000)
    assert trained_text(tokenizer, rendered) == "xy<|im_end|>"
    assert "<think>\n\n</think>\n\n" in tokenizer.decode(rendered.input_ids)


def test_the_date_in_a_prompt_does_not_change() -> None:
    import copy

    tokenizer = copy.deepcopy(make_tokenizer("ours", "chatml"))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    assert tokenizer.decode(render_prompt(tokenizer, chat("ab", "xy").messages[:1])).startswith("26 Jul 2024\n")


# --- refusals: each guard with the case that it is there for ---


def _with(template: str):
    import copy

    tokenizer = copy.deepcopy(make_tokenizer("ours", "chatml"))
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_refuses_is_quoted() -> None:
    tokenizer = make_tokenizer("ours", "mistral")
    example = Example(
        messages=(Message("user", "a"), Message("user", "b"), Message("assistant", "x")), source="f.json", line=3
    )
    with pytest.raises(DataError, match=r"^f\.json:3: .*Roles must alternate user and assistant"):
        render_example(tokenizer, example, 100)


def test_a_prompt_that_is_no_beginning_is_refused() -> None:
    tokenizer = _with(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
    )
    with pytest.raises(DataError, match="training would not fit serving"):
        render_example(tokenizer, chat("a", "x"), 100)


def test_an_answer_that_the_template_rewrites_is_refused() -> None:
    upper = "{% for m in messages %}{{ m.role }}:{{ m.content | upper }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(DataError, match=r"chats\.jsonl:7: "):
        render_example(_with(upper), chat("a", "x"), 100)


def test_an_earlier_answer_that_cannot_be_found_is_refused_unless_it_carries_no_loss() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}(left out){% endif %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(DataError, match="the answer in turn 2 cannot be found"):
        render_example(_with(template), chat("a", "x", "b", "y"), 100)
    rendered = render_example(_with(template), chat("a", "x", "b", "y", weights={1: 0.0}), 100)
    assert trained_text(_with(template), rendered) == "y<|im_end|>"


def test_an_answer_that_holds_the_end_marker_is_refused() -> None:
    with pytest.raises(DataError, match=r"an answer holds '<\|im_end\|>'"):
        render_example(make_tokenizer("ours", "chatml"), chat("a", "x<|im_end|>y"), 100)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(DataError, match="half a character"):
        render_prompt(make_tokenizer("ours", "chatml"), [Message("user", "a\ud83d")])


def test_a_conversation_that_ends_with_a_question_is_refused() -> None:
    with pytest.raises(DataError, match="the last turn is not the assistant's"):
        render_example(make_tokenizer("ours", "chatml"), Example(messages=(Message("user", "a"),)), 100)


def test_a_question_that_looks_like_the_template_moves_no_border() -> None:
    tokenizer = make_tokenizer("ours", "chatml")
    example = chat("a\nassistant\nx", "x", "x", "x")
    rendered = render_example(tokenizer, example, 1000)
    assert trained_text(tokenizer, rendered) == "x<|im_end|>x<|im_end|>"
    prompt = render_prompt(tokenizer, example.messages[:1])
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.weights[len(prompt)] == 1.0


@pytest.mark.parametrize("which", ["loop.last", "not loop.last"])
def test_an_answer_that_the_template_changes_a_little_is_refused(which: str) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and "
        + which
        + " %}{{ m.content | replace('w', 'v') }}"
        "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(DataError, match=r"chats\.jsonl:7: "):
        render_example(_with(template), chat("a", "w", "b", "w"), 100)
    rendered = render_example(_with(template), chat("a", "x", "b", "x"), 100)
    assert trained_text(_with(template), rendered) == "x<|im_end|>x<|im_end|>"


# --- borders between tokens ---


def test_a_token_that_begins_before_an_earlier_answer_carries_no_loss() -> None:
    """This tokenizer's offsets leave out the space that the token of the answer shares with the template."""
    tokenizer = make_tokenizer("trimming", "words")
    rendered = render_example(tokenizer, chat("ab", "yes yes", "cd", "yes yes"), 1000)
    assert " yes" in [tokenizer.decode([i]) for i in rendered.input_ids]
    assert trained_text(tokenizer, rendered) == " yesyes yes<|endoftext|>"


def test_a_space_that_the_template_puts_before_an_answer_is_generated_too() -> None:
    tokenizer = make_tokenizer("ours", "mistral")
    rendered = render_example(tokenizer, chat("ab", "xy", "cd", "zw"), 1000)
    assert trained_text(tokenizer, rendered) == " xy<|eot|> zw<|eot|>"


def test_what_follows_an_answer_without_an_end_is_not_trained() -> None:
    tokenizer = make_tokenizer("ours", "words")
    rendered = render_example(tokenizer, chat("ab", "xy", "cd", "zw"), 1000)
    assert trained_text(tokenizer, rendered) == "xyzw<|im_end|>"
    assert rendered.weights[-1] == 1.0


def test_an_end_token_that_swallows_the_line_end_is_learned() -> None:
    tokenizer = _with(
        "{% for m in messages %}<|head|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}{% if add_generation_prompt %}<|head|>assistant\n{% endif %}"
    )
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken("<|stop|>", rstrip=True, special=True)]},
        replace_extra_special_tokens=False,
    )
    rendered = render_example(tokenizer, chat("ab", "xy", "cd", "zw"), 1000)
    assert trained_text(tokenizer, rendered) == "xy<|stop|>zw<|stop|>"


def test_nothing_can_be_predicted_before_the_first_token() -> None:
    tokenizer = _with("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    messages = (Message("assistant", "xy"), Message("user", "ab"), Message("assistant", "zw"))
    rendered = render_example(tokenizer, Example(messages=messages), 1000)
    assert rendered.weights[0] == 0
    assert trained_text(tokenizer, rendered) == "y<|im_end|>zw<|im_end|>"


# --- templates that a tokenizer lacks ---


def test_a_tokenizer_without_a_template_gets_one_that_fits_its_tokens() -> None:
    for kind in KINDS:
        tokenizer = make_tokenizer(kind, None)
        rendered = render_example(tokenizer, chat("ab", "xy", "cd", "zw"), 1000)
        end = tokenizer.convert_ids_to_tokens(rendered.input_ids[max(i for i, w in enumerate(rendered.weights) if w)])
        assert end == "<|im_end|>"


def test_the_default_without_chatml_tokens_ends_with_eos() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<eos>", *pre_tokenizers.ByteLevel.alphabet()])}, merges=[])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    rendered = render_example(tokenizer, chat("ab", "xy", "cd", "zw"), 1000)
    assert trained_text(tokenizer, rendered) == "xy<eos>zw<eos>"
    without = PreTrainedTokenizerFast(tokenizer_object=raw)
    with pytest.raises(ModelError, match="neither a chat template nor an end-of-sequence token"):
        render_example(without, chat("ab", "xy"), 1000)


def test_answers_stop_where_the_template_ends_them_and_where_the_model_says() -> None:
    configured = SimpleNamespace(eos_token_id=[5, 6])
    tokenizer = make_tokenizer("merging", "llama-3")
    ids = tokenizer.convert_tokens_to_ids
    assert stop_token_ids(tokenizer) == {ids("<|endoftext|>"), ids("<|eot|>")}
    assert stop_token_ids(tokenizer, configured) == {ids("<|endoftext|>"), ids("<|eot|>"), 5, 6}


# --- cutting ---


def long_chat() -> Example:
    messages = [Message("system", "kkk")]
    for number in range(4):
        messages += [Message("user", f"{number} " + "ab " * 10), Message("assistant", f"{number} " + "xy " * 10)]
    return Example(messages=tuple(messages))


def test_early_exchanges_go_first_and_what_is_gone_is_counted() -> None:
    tokenizer = make_tokenizer("ours", "chatml")
    example = long_chat()
    whole = render_example(tokenizer, example, 10_000)
    kept = Example(messages=(example.messages[0], *example.messages[5:]))
    expected = render_example(tokenizer, kept, 10_000)

    rendered = render_example(tokenizer, example, len(expected.input_ids))
    assert rendered.input_ids == expected.input_ids
    assert rendered.weights == expected.weights
    assert rendered.cut_tokens == len(whole.input_ids) - len(expected.input_ids)
    assert rendered.cut_trained == whole.trained_tokens - expected.trained_tokens
    assert rendered.cut_trained > 0


def test_then_the_end_of_the_last_answer_is_cut() -> None:
    tokenizer = make_tokenizer("ours", "chatml")
    example = long_chat()
    last = render_example(tokenizer, Example(messages=(example.messages[0], *example.messages[-2:])), 10_000)
    size = len(last.input_ids) - 10
    rendered = render_example(tokenizer, example, size)
    assert rendered.input_ids == last.input_ids[:size]
    assert rendered.weights[-1] == 1.0
    assert rendered.input_ids[-1] not in stop_token_ids(tokenizer)


@settings(max_examples=40, deadline=None)
@given(conversations(), st.integers(8, 80))
def test_cutting_never_exceeds_the_limit_and_loses_no_count(example: Example, max_seq_len: int) -> None:
    tokenizer = make_tokenizer("ours", "qwen-3")
    whole = render_example(tokenizer, example, 10_000)
    rendered = render_example(tokenizer, example, max_seq_len)
    assert len(rendered.input_ids) <= max_seq_len
    assert len(rendered.input_ids) + rendered.cut_tokens == max(len(whole.input_ids), len(rendered.input_ids))
    assert rendered.trained_tokens + rendered.cut_trained == whole.trained_tokens


# --- plain text ---


def test_every_token_of_a_text_but_the_first_carries_loss_and_it_ends() -> None:
    tokenizer = make_tokenizer("ours", "chatml")
    rendered = render_example(tokenizer, Example(text="Anna lives in Rome."), 100)
    assert rendered.weights == [0.0] + [1.0] * (len(rendered.input_ids) - 1)
    assert tokenizer.decode(rendered.input_ids) == "Anna lives in Rome.<|im_end|>"
    short = render_example(tokenizer, Example(text="Anna lives in Rome."), 4)
    assert short.cut_tokens == short.cut_trained == len(rendered.input_ids) - 4


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.integers(8, 40))
def test_pieces_of_a_text_lose_nothing_and_repeat_no_loss(text: str, max_seq_len: int) -> None:
    tokenizer = make_tokenizer("ours", "chatml")
    whole = render_example(tokenizer, Example(text=text), 100_000)
    pieces = render_pieces(tokenizer, Example(text=text), max_seq_len)
    predicted = [
        token for piece in pieces for token, weight in zip(piece.input_ids, piece.weights, strict=True) if weight
    ]
    assert predicted == whole.input_ids[1:]
    assert all(len(piece.input_ids) <= max_seq_len for piece in pieces)
    assert all(len(piece.input_ids) == len(piece.weights) == len(piece.roles) for piece in pieces)


# --- an oracle that needs transformers alone ---


@settings(max_examples=40, deadline=None)
@given(conversations(system=False))
def test_the_mask_agrees_with_the_generation_blocks_of_transformers(example: Example) -> None:
    """`{% generation %}` marks in the template what the assistant says; its mask is made without our code."""
    import copy

    example = Example(messages=tuple(Message(m.role, m.content) for m in example.messages))
    tokenizer = make_tokenizer("ours", "chatml")
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    turns = [{"role": m.role, "content": m.content} for m in example.messages]
    oracle = marked.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    rendered = render_example(tokenizer, example, 10_000)
    if rendered.input_ids == oracle["input_ids"]:
        theirs = oracle["assistant_masks"]
        ours = [int(weight > 0) for weight in rendered.weights]
        # Theirs counts a token that begins before the answer; ours never does.
        assert all(o <= t for o, t in zip(ours, theirs, strict=True))
        if not any(m.content[0].isspace() for m in example.messages if m.role == "assistant"):
            assert ours == theirs
    else:  # the tokenizer merged the prompt with the answer, as no server would
        assert example.messages[-1].content[0].isspace()


def test_the_template_of_this_test_is_not_prefix_stable() -> None:
    """Without that, the tests above would prove less than they say."""
    tokenizer = make_tokenizer("ours", "qwen-3")
    assert tokenizer.chat_template == QWEN_3
    first = render_example(tokenizer, chat("ab", "xy"), 1000)
    both = render_example(tokenizer, chat("ab", "xy", "cd", "zw"), 1000)
    assert both.input_ids[: len(first.input_ids)] != first.input_ids


def test_a_token_that_swallows_the_line_end_behind_an_earlier_answer_is_learned() -> None:
    tokenizer = make_tokenizer("ours", "words")
    rendered = render_example(tokenizer, chat("?", ".\n", "?", "w"), 100)
    assert squeezed(trained_text(tokenizer, rendered)).replace(tokenizer.eos_token, "") == ".w"
