"""docs/http.md is what the OpenAPI document says, and the document says everything."""

from functools import cache
from pathlib import Path

from pydantic import SecretStr

from nightschool.server import reference
from nightschool.server.app import create_app
from nightschool.server.reference_page import render
from nightschool.server.settings import ServerSettings
from tests.support.fake_slot import FakeSlot

PAGE = Path(__file__).parents[2] / "docs" / "http.md"


@cache
def document(**settings):
    return create_app([FakeSlot()], ServerSettings(**settings)).openapi()


def test_the_page_is_up_to_date(capsys):
    reference.main()
    assert PAGE.read_text("utf-8") == capsys.readouterr().out, (
        "run: python -m nightschool.server.reference > docs/http.md"
    )


def test_every_operation_has_a_description_and_documents_its_errors():
    for path, operations in document()["paths"].items():
        for method, operation in operations.items():
            what = f"{method} {path}"
            assert operation.get("description"), what
            if method == "post" and path != "/refresh_model" and "rollback" not in path:
                assert {"401", "403", "408", "413", "429"} <= set(operation["responses"]), what
            assert "HTTPValidationError" not in str(operation), what


def test_every_field_of_a_body_has_a_description():
    found = document()
    for operations in found["paths"].values():
        for operation in operations.values():
            body = operation.get("requestBody")
            for content in body["content"].values() if body else ():
                name = content["schema"].get("$ref", "").rpartition("/")[2]
                described = found["components"]["schemas"][name] if name else content["schema"]
                for field, schema in described["properties"].items():
                    assert schema.get("description"), f"{name}.{field}"


def test_the_document_has_the_bounds_of_the_settings():
    schema = document(max_new_tokens_limit=77)["components"]["schemas"]["GenerateRequest"]
    assert schema["properties"]["max_new_tokens"]["maximum"] == 77


def test_the_page_names_every_path_and_its_bounds():
    page = render(document())
    for path in document()["paths"]:
        assert path in page
    assert "| `max_new_tokens` | integer 1…8192 | `256` |" in page
    assert "| `query` | string | required |" in page


def test_the_page_names_what_stands_in_a_query_and_what_a_form_has():
    page = render(document())
    assert "| `limit` | integer 1…10000 | `10000` | Most files on a page. |" in page
    assert "Body (multipart/form-data):" in page


def test_the_document_says_where_the_key_goes_if_there_is_one():
    assert "security" not in document()
    found = document(api_keys=(SecretStr("a-long-enough-key"),))
    assert found["security"] == [{"bearer": []}, {"header": []}]
    assert found["paths"]["/healthz"]["get"]["security"] == []
    assert "a-long-enough-key" not in str(found)
