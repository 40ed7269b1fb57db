"""The gate's rule language reads what is meant and refuses what would ask for a worse model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.config.rules import RULES, parse_rule


@pytest.mark.parametrize(
    ("name", "text", "candidate", "champion", "holds"),
    [
        ("holdout_loss", "<= champion + 0.02", 1.22, 1.2, True),
        ("holdout_loss", "<= champion + 0.02", 1.2201, 1.2, False),
        ("holdout_loss", "<= champion+.02", 1.22, 1.2, True),
        ("holdout_loss", "< champion", 1.2, 1.2, False),
        ("holdout_loss", "<= champion - 0.1", 1.1, 1.2, True),
        ("holdout_loss", "<= champion - 0.1", 1.11, 1.2, False),
        ("holdout_loss", "<= champion + 5%", 2.1, 2.0, True),
        ("holdout_loss", "<= champion + 5%", 2.11, 2.0, False),
        ("holdout_loss", "<= 1.5", 1.5, None, True),
        ("holdout_loss", "<1.5", 1.5, None, False),
        ("forgetting", "<= 2%", 0.02, None, True),
        ("forgetting", "<= 0.02", 0.0201, None, False),
        ("forgetting", "<= 0", 0.0, None, True),
        ("new_facts", ">= 50%", 0.5, None, True),
        ("new_facts", "> 50 %", 0.5, None, False),
        ("new_facts", ">= champion + 20%", 0.7, 0.5, True),
        ("new_facts", ">= champion + 20%", 0.69, 0.5, False),
        ("new_facts", ">= champion - 5%", 0.45, 0.5, True),
        ("preferences", ">= 50%", 0.5, None, True),
        ("preferences", "> 50%", 0.5, None, False),
    ],
)
def test_a_rule_holds_up_to_its_limit_and_not_beyond(name, text, candidate, champion, holds):
    assert parse_rule(name, text).holds(candidate, champion) is holds


def test_the_last_bit_of_a_sum_decides_nothing():
    assert 0.1 + 0.2 > 0.3
    assert parse_rule("holdout_loss", "<= 0.3").holds(0.1 + 0.2, None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("forgetting", "2%", "'2%' is not a rule; write for example '<= 2%'"),
        ("forgetting", "<= two", "'<= two' is not a rule; write for example '<= 2%'"),
        ("forgetting", "= 2%", "'= 2%' is not a rule; write for example '<= 2%'"),
        ("forgetting", "", "'' is not a rule; write for example '<= 2%'"),
        ("forgetting", ">= 2%", "'>= 2%' asks for a worse model, as lower is better here; write '<= 2%' in its place"),
        ("new_facts", "< 5%", "'< 5%' asks for a worse model, as higher is better here; write '> 5%' in its place"),
        ("forgetting", "<= 2", "'<= 2' is a share above 100 %; write for example '<= 2%'"),
        ("forgetting", "<= champion", "'<= champion' names the champion, with which this rule compares anyway; write for example '<= 2%'"),
        ("holdout_loss", "<= 2%", "'<= 2%' gives nats in percent of nothing; write for example '<= champion + 0.02'"),
        ("holdout_loss", "<= champion * 2", "'<= champion * 2' is not a rule; write for example '<= champion + 0.02'"),
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_an_example(name, text, message):
    with pytest.raises(ValueError, match=r"rule|model|share|champion|loss") as caught:
        parse_rule(name, text)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", RULES)
def test_the_examples_are_rules(name):
    assert parse_rule(name, RULES[name].example).text == RULES[name].example


@given(st.sampled_from(list(RULES)), st.text(alphabet="<>=+-%. champion0123456789x", max_size=25))
def test_any_text_is_a_rule_or_a_value_error_and_a_rule_reads_itself_back(name, text):
    try:
        rule = parse_rule(name, text)
    except ValueError:
        return
    assert parse_rule(name, rule.text) == rule
