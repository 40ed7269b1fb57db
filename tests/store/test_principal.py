"""Who asks: a tenant and its scopes."""

import pytest

from nightschool.store.principal import LOCAL, SCOPES, Principal


def test_the_command_line_may_do_everything_with_the_names_of_the_default_tenant() -> None:
    assert Principal("default", SCOPES) == LOCAL


def test_a_scope_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no scope genrate; scopes are admin, feedback, infer, memory, train"):
        Principal("acme", frozenset({"genrate"}))
