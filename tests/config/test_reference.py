"""The reference page and the schema say what the models say."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from nightschool.config.recipe import Recipe
from nightschool.config.reference import reference
from nightschool.config.schema import children, json_schema, settings


def test_the_page_is_up_to_date():
    assert Path("docs/recipes.md").read_text("utf-8") == reference(), (
        "run: python -m nightschool.config.reference > docs/recipes.md"
    )


def test_every_setting_stands_on_the_page():
    page = reference()
    for setting in settings().values():
        assert f"`{setting.key}`" in page


def test_the_json_schema_knows_every_section_and_no_word_of_pydantic():
    schema = json_schema()
    assert set(schema["properties"]) == set(children(()))
    assert schema["required"] == ["base"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Train"]["properties"]["epochs"]["minimum"] == 1

    def words(node):
        if isinstance(node, dict):
            yield from node
            for value in node.values():
                yield from words(value)
        elif isinstance(node, list):
            for value in node:
                yield from words(value)

    assert not {"ge", "gt", "le", "lt"} & set(words(schema))


def test_a_body_without_data_or_with_true_for_a_number_is_refused():
    with pytest.raises(ValidationError, match="there is no data"):
        Recipe.model_validate({"base": "x"})
    with pytest.raises(ValidationError, match="true is neither a number nor a text"):
        Recipe.model_validate({"base": "x", "data": [{"path": "a"}], "train": {"epochs": True}})


def test_a_recipe_does_not_change_after_parsing():
    recipe = Recipe.model_validate({"base": "x", "data": [{"path": "a"}]})
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.epochs = 3
