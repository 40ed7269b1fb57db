"""Everything that is wrong with a recipe is said at once: where, which key, what, and what to write."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nightschool.config.load import parse_recipe
from nightschool.errors import RecipeError

MINIMAL = "base: new:tiny\ndata: [{path: a.json}]\n"


def problems(text, *overrides, env=None):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides, file="r.yaml", env=env or {})
    return [str(problem) for problem in caught.value.problems]


def test_all_problems_of_all_sources_are_reported_together():
    text = """\
name: Bot
base: x
data:
  - path: a.json
train:
  epochs: many
  batchsize: 4
  seed: 1
  seed: 2
lora: {r: 0, learning_rate: 1}
serve: {promote: if_gate_pass}
"""
    found = problems(text, "train.dropout=1", "nonsense", env={"NIGHTSCHOOL_GATE__PINS": "some"})
    assert found == [
        "r.yaml:1: name: 'Bot' is not a name; write up to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit",
        "r.yaml:6: train.epochs: 'many' is not a whole number",
        "r.yaml:7: train.batchsize: is not a setting; did you mean train.batch_size?",
        "r.yaml:9: train.seed: is written twice, first on line 8; remove one",
        "r.yaml:10: lora.learning_rate: is not a setting here: this key belongs at train.learning_rate",
        "r.yaml:10: lora.r: 0 is too small; it is at least 1",
        "r.yaml:11: serve.promote: 'if_gate_pass' is none of if_gate_passes, never, always; did you mean if_gate_passes?",
        "nonsense: is not an override; write key=value, such as train.learning_rate=1e-5",
        "train.dropout=1: train.dropout: is not a setting here: this key belongs at lora.dropout",
        "NIGHTSCHOOL_GATE__PINS: gate.pins: 'some' is none of all, off; write one of them",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train: {epochs: true}", "r.yaml:3: train.epochs: true is neither a number nor a text"),
        ("train: {epochs: 2.5}", "r.yaml:3: train.epochs: 2.5 is not a whole number"),
        ("train: {learning_rate: fast}", "r.yaml:3: train.learning_rate: 'fast' is not a number; write for example 0.5 or 1e-5"),
        ("train: {learning_rate: .inf}", "r.yaml:3: train.learning_rate: inf is not finite; write an ordinary number"),
        ("train: {learning_rate: .nan}", "r.yaml:3: train.learning_rate: nan is not finite; write an ordinary number"),
        ("train: {learning_rate: -1}", "r.yaml:3: train.learning_rate: -1 is too small; it must be above 0"),
        ("train: {beta1: 1}", "r.yaml:3: train.beta1: 1 is too large; it must be below 1"),
        ("train: {compile: maybe}", "r.yaml:3: train.compile: 'maybe' is neither true nor false"),
        ("train: {max_seq_len: 16q}", "r.yaml:3: train.max_seq_len: '16q' is not a count of tokens; write for example 2048 or 16k tokens"),
        ("train: {evaluate_every: 0.5}", "r.yaml:3: train.evaluate_every: 0.5 is not a rhythm; write for example 500 steps, 2 epochs or 10m"),
        ("train: 3", "r.yaml:3: train: 3 is not a section; write its settings below it, each as `key: value`"),
        ("train: [1]", "r.yaml:3: train: a list is not a section; write its settings below it, each as `key: value`"),
        ("train: {epochs: {a: 1}}", "r.yaml:3: train.epochs.a: is not a setting: train.epochs takes a value and has no keys below it"),
        ("train.epochs: 3", "r.yaml:3: train.epochs: is not a setting: in a file, sections are nested; write train: {epochs: …}"),
        ("held_out: {share: 120%}", "r.yaml:3: held_out.share: '120%' lies outside 0…100 %; write for example 5% or 0.05"),
        ("schedule: {every: soon}", "r.yaml:3: schedule.every: 'soon' is not a duration; write for example 90s, 10m, 24h or 7d"),
        ("schedule: {cron: 0 3 *}", "r.yaml:3: schedule.cron: '0 3 *' is not a cron expression (Wrong number of fields); write five fields, such as '0 3 * * *'"),
        ("schedule: {timezone: Mars/North}", "r.yaml:3: schedule.timezone: 'Mars/North' is not a time zone; write a name such as UTC or Europe/Paris"),
        ("schedule: {timezone: ../../etc/passwd}", "r.yaml:3: schedule.timezone: '../../etc/passwd' is not a time zone; write a name such as UTC or Europe/Paris"),
        ("gate: {forgetting: 2%}", "r.yaml:3: gate.forgetting: '2%' is not a rule; write for example '<= 2%'"),
        ("every: 3h", "r.yaml:3: every: could mean train.early_stopping.every (how often the model in training is spot-checked) or checkpoints.every (how often) or checkpoints.keep.every (milestones that stay for ever) or schedule.every (seconds between the starts of two cycles); write the one that is meant"),
        ("tain: {epochs: 3}", "r.yaml:3: tain: is not a setting; did you mean train?"),
        ("name: a..b", "r.yaml:3: name: 'a..b' holds '..'; a name is a folder on disk: write single dots"),
        ("held_out: {path: ' '}", "r.yaml:3: held_out.path: ' ' is blank; write a text, or leave the key out"),
        ("? [a]\n: 1", "r.yaml:3: is a list or a mapping in the place of a key; write `key: value`"),
        ("name: !!python/name:os.system x", "r.yaml:3: name: has the tag 'tag:yaml.org,2002:python/name:os.system'; a recipe holds plain values: remove the tag"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_sentence(line, message):
    assert problems(MINIMAL + line) == [message]


def test_a_recipe_without_base_or_data_says_what_they_are():
    assert problems("name: a\n") == [
        "r.yaml:1: base: is missing: starting weights: a hub id, ./folder, ./file.gguf, name@version of the registry, or new:<preset>.",
        "r.yaml:1: data: there is no data; write `data: [{path: train.json}]`",
    ]
    assert problems("base: x\ndata: []\n") == ["r.yaml:2: data: there is no data; write `data: [{path: train.json}]`"]
    assert problems("base: x\ndata: a.json\n") == [
        "r.yaml:2: data: 'a.json' is not a list; write data: [{path: train.json}]"
    ]
    assert problems("base: x\ndata: {path: a.json}\n") == [
        "r.yaml:2: data.path: is not a setting: data is a list; write data.0.path, or a list with dashes"
    ]
    assert problems("base: x\ndata:\n  - format: text\n") == [
        "r.yaml:3: data.0: a data source has one of `path`, `dataset` and `from: conversations`; write exactly one"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("base: [x", 1),
        ("base: x\na: b: c\n", 2),
        ("base: x\n\tb: 1\n", 2),
        ("a: *nobody", 1),
        ("base: x\n--- \nb: 1", 2),
    ],
)
def test_what_is_no_yaml_is_named_with_its_line_and_nothing_else(text, line):
    (problem,) = problems(text)
    assert problem.startswith(f"r.yaml:{line}: is no YAML: ")


def test_a_control_character_is_named_with_its_line():
    (problem,) = problems("base: x\nname: a\x07\n")
    assert problem.startswith("r.yaml:2: is no YAML: it holds the character")


def test_a_list_or_a_word_is_no_recipe():
    for text in ("- a\n- b\n", "hello\n"):
        assert problems(text)[0] == "r.yaml:1: is not a recipe; a recipe is made of `key: value`"


def test_anchors_that_multiply_or_bite_their_own_tail_end_in_a_problem():
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert any("more than" in problem for problem in problems(bomb))
    assert any("more than" in problem for problem in problems("train: &t\n  epochs: *t\n"))
    assert any("merges itself" in problem for problem in problems("train: &t\n  epochs: 1\n  <<: *t\n"))
    wide = "train: &t\n  <<: [" + "*t, " * 30 + "*t]\n"
    assert any("merges itself" in problem for problem in problems(wide))


@pytest.mark.parametrize(
    "text",
    ["[" * 9000, "- " * 9000 + "x", "? " * 9000, "a:\n" + "\n".join(" " * i + "a:" for i in range(1, 900))],
    ids=["brackets", "dashes", "question marks", "indents"],
)
def test_what_nests_too_deep_ends_in_a_problem_and_soon(text):
    assert problems(text)[0].endswith("is nested more than 32 levels deep; flatten it")


def test_a_key_below_an_unknown_section_is_reported_once():
    assert problems(MINIMAL + "parallelism:\n  name: tensor\n  degrees: [2, 4]\n") == [
        "r.yaml:3: parallelism: is not a setting; a recipe knows name, base, start, from_checkpoint, method, shape, tokenizer, data, held_out, "
        "replay, study, rehearse, train, lora, quantization, dpo, memory, experts, pretrain, checkpoints, gate, schedule, serve, jobs"
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=60)
    | st.text("abtrin: {}[]&*!|>%@`'\"#-,\n\t.0123456789", max_size=60)
)
@example("<<: x")
@example("a: &a [*a]")
@example("? {a: b} : c")
@example("- " * 200 + "x")
@example("[" * 5000)
@example("train: {epochs: 0x}")
@example("train: {epochs: 99999999999999999999999999}")
@example("data: [{path: a, where: {rating: [good]}}]")
@example("%YAML 1.1\n---\na: yes")
def test_no_text_breaks_the_loader(text):
    for recipe, overrides in (
        (text, []),
        (MINIMAL, [text]),
        (MINIMAL, [f"train.epochs={text}", f"data.0.path={text}"]),
    ):
        try:
            parse_recipe(recipe, overrides, env={})
        except RecipeError as error:
            said = [str(problem) for problem in error.problems]
        else:
            continue
        assert said
        assert all(said)
