"""A base's chat template within bounds of time and size, and rendered as transformers renders it."""

import pytest

from nightschool.data.chat import sandbox
from nightschool.data.chat.render import render_example, render_prompt
from nightschool.data.chat.template import CHATML_TEMPLATE, render_text
from nightschool.data.example import Example, Message
from nightschool.errors import DataError
from tests.support.tokenizers_for_tests import byte_tokenizer

TURNS = (Message("user", "How are you?"), Message("assistant", "Well. Thank you!"))

# Each would take hours or gigabytes.
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop over a generator": "{% for a in range(99999) %}{% for b in range(99999)|map('string') %}{% endfor %}{% endfor %}",
    "a filtered loop": "{% for a in range(99999) if range(99999)|list %}{% endfor %}",
    "repetition": "{{ 'a' * (10**10) }}",
    "repetition turned round": "{{ (10**10) * 'a' }}",
    "a list repeated": "{% set x = [1] * (10**10) %}",
    "repetition of a constant in a condition": "{% if 'a' * 10000000000 %}{% endif %}",
    "doubling by +": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by join": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "doubling by str.join": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
    "doubling by format": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = '%s%s'|format(ns.x, ns.x) %}{% endfor %}",
    "doubling by %": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubling by str.format": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "doubling by replace": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
    "doubling by str.replace": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "doubling by a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = m(ns.x) %}{% endfor %}",
    "doubling by a block": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "nested lists": "{% set ns = namespace(x=[]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested objects": "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    "nested calls of dict": "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a macro without an end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a width": "{{ 'a'|center(10000000000) }}",
    "a width of a method": "{{ 'a'.center(10000000000) }}",
    "a width in zeros": "{{ '1'.zfill(10000000000) }}",
    "tabs": "{{ '\t'.expandtabs(10000000000) }}",
    "a width in a format": "{{ '%09999999999d' % 1 }}",
    "a width in format": "{{ '{:>9999999999}'.format(1) }}",
    "a width handed over": "{{ '%*d' % (9999999999, 1) }}",
    "a nested width": "{{ '{:>{}}'.format(1, 9999999999) }}",
    "indentation": "{{ ('a\n' * 1000)|indent('x' * 100000) }}",
    "indentation of JSON": "{{ [[[1]]]|tojson(indent=10000000000) }}",
    "batches": "{{ [1]|batch(10000000000, 0)|list }}",
    "slices": "{{ [1]|slice(10000000000)|list }}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "products": "{% set ns = namespace(x=9) %}{% for i in range(99999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "bytes": "{{ (5).to_bytes(10000000000) }}",
    "words": "{{ lipsum(n=1000000) }}",
    "much output": "{% set x = 'a' * 100000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "searching": "{% set x = 'a' * 900000 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    "slicing": "{% set x = 'a' * 900000 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "comparing": "{% set x = 'a' * 900000 %}{% set y = x ~ '' %}{% for i in range(99999) %}{% if x == y %}{% endif %}{% endfor %}",
    "counting": "{% set x = 'a' * 900000 %}{% for i in range(99999) %}{% set y = x.count('b') %}{% endfor %}",
    "a long template": "{# " + "a" * 1_000_001 + " #}",
}  # fmt: skip

FAULTY = {
    "division": "{{ 1 // 0 }}",
    "overflow": "{{ 1e308 * 10 | int }}{{ (1e308 * 10) | int }}",
    "a large range": "{% for i in range(10**9) %}{% endfor %}",
    "syntax": "{% for %}",
    "an unknown filter": "{{ 'a' | no_such_filter }}",
    "an unknown name": "{{ nothing.at.all }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "Python": "{{ ''.__class__.__mro__ }}",
    "an include": "{% include 'other' %}",
    "its own words": "{{ raise_exception('only user and assistant') }}",
    "escapes": "{{ raise_exception('\x1b]52;c;ZXZpbA==\x07') }}",
}


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_would_not_end_is_refused(name, monkeypatch):
    monkeypatch.setattr(sandbox, "OPERATIONS", 100_000)  # the whole budget is spent below
    for template in (BOMBS[name], CHATML_TEMPLATE + BOMBS[name]):
        with pytest.raises(DataError, match="the model's chat template"):
            render_prompt(with_template(template), TURNS[:1])


@pytest.mark.parametrize("name", FAULTY)
def test_whatever_a_template_raises_is_said_of_the_template(name):
    with pytest.raises(DataError, match=r"train\.json:7: the model's chat template .*\."):
        render_example(with_template(FAULTY[name]), Example(messages=TURNS, source="train.json", line=7), 64)


def test_a_refusal_is_the_same_every_time_and_says_what_to_do():
    said = set()
    for _ in range(3):
        with pytest.raises(DataError) as error:
            render_prompt(with_template(BOMBS["nested loops"]), TURNS[:1])
        said.add(str(error.value))
    assert said == {
        "the model's chat template does not end well: it takes too many steps: no conversation needs so many. "
        "Take another base, or correct it."
    }


def test_a_refusal_leaves_the_next_rendering_its_whole_budget():
    with pytest.raises(DataError):
        render_prompt(with_template(BOMBS["nested loops"]), TURNS[:1])
    assert render_prompt(with_template(CHATML_TEMPLATE), TURNS[:1])


# Whatever real templates are made of.
PIECES = [
    CHATML_TEMPLATE,
    "{% for m in messages %}{{ loop.index0 }}/{{ loop.length }}{% if loop.last %}!{% endif %}{{ m.content | trim }}\n{% endfor %}",
    "{%- set ns = namespace(found=false, text='') -%}{%- for m in messages[::-1] -%}{%- if m.role == 'user' and not ns.found -%}"
    "{%- set ns.found = true -%}{%- set ns.text = m['content'].split('?')[0].strip().upper() -%}{%- endif -%}{%- endfor -%}{{ ns.text }}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{% macro turn(m, last=false) %}<{{ m.role }}>{{ m.content }}{{ '' if last else '|' }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m, last=loop.last) }}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    "{{ messages | map(attribute='content') | join(' / ') }}{{ '%s-%d' % ('a', 3) }}{{ '{:>4}'.format(7) }}{{ 'a' ~ 1 ~ none ~ undefined_name }}",
    "{% set x = messages[0].content | replace('are', 'be') | indent(2, true) | title %}{{ x[:5] }}{{ x[-3:] }}{{ x.replace('e', 'E').lstrip() }}",
    "{% if tools is defined and tools is not none %}T{% endif %}{% if documents %}D{% endif %}{{ bos_token }}{{ eos_token }}{{ enable_thinking }}",
    "{{ range(3) | list }}{{ (1, 2) + (3,) }}{{ [1] + [2] * 2 }}{{ {'a': 1}.items() | list }}{{ dict(a=1) }}{{ 2 ** 8 }}{{ 7 % 3 }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% else %}none{% endfor %}{{ messages | length }}{{ messages[0] | string }}",
    "{% set content %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ content | length }}{{ content | safe }}",
    "{% for m in messages recursive %}{{ m.content }}{% endfor %}{{ messages | map('upper') | first is string }}{{ 'a' in messages[0].content }}",
    "{{ messages | groupby('role') | list | length }}{{ messages | last }}{{ [3, 1] | sort }}{{ 'x' | default('y') }}{{ z | default('w') }}",
]  # fmt: skip


@pytest.mark.parametrize("template", PIECES)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_a_template_renders_as_transformers_renders_it(template, generation_prompt):
    tokenizer = with_template(template)
    turns = [Message("system", "Be kind."), *TURNS, Message("user", 'Ünïcode 🙂 <b> & "quotes"\n\ttabs')]
    theirs = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns],
        tokenize=False,
        add_generation_prompt=generation_prompt,
        enable_thinking=False,
        thinking=False,
    )
    assert render_text(tokenizer, turns, generation_prompt=generation_prompt, thinking=False) == theirs


def test_a_long_conversation_is_rendered():
    turns = [Message(("user", "assistant")[i % 2], "word " * 2000) for i in range(401)]
    looks_back = "{% for m in messages %}{% if messages[loop.index0 - 1].role != m.role %}{{ m.content | trim }}{% endif %}{% endfor %}"
    text = render_text(with_template(looks_back), turns, generation_prompt=True, thinking=False)
    assert len(text) > 3_900_000
