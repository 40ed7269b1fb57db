"""Every operation of the app's own OpenAPI document, asked with generated requests, good and bad."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

from nightschool.feedback.conversations import ConversationStore
from nightschool.server.app import create_app
from nightschool.server.settings import ServerSettings
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import live

CONFIG = {
    "checks": {
        # What two fields mean together (stream_options without stream), ids that nobody gave out and names that
        # nobody serves are refused with these.
        "positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404", "409"]},
    },
}


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("home"))
    home.ensure()
    database = Database(home).connect()
    slot = FakeSlot(answer=lambda prompt: "Grüße")
    with live(
        slot, record_conversations=True, registry=Registry(home), conversations=ConversationStore(database)
    ) as server:
        config = SchemathesisConfig.from_dict(CONFIG)
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=config)
    database.close()


GOOD, BAD = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OPERATIONS = [
    (path, method.upper(), mode)
    for path, operations in create_app([FakeSlot()], ServerSettings()).openapi()["paths"].items()
    for method, operation in operations.items()
    for mode in ((GOOD, BAD) if "requestBody" in operation else (GOOD,))
]


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_every_answer_is_as_documented(document, path, method, mode):
    operation = document[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case):
        if mode is GOOD and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "bot"  # else no generated request would ever reach the model
        case.call_and_validate()

    check()
