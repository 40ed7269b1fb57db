"""What opens gated repositories of the Hub: the same for models and for data sets."""

import huggingface_hub
import pytest

from nightschool.data.sources.hub_files import hub_files
from nightschool.models import hub


@pytest.mark.parametrize(("of_library", "of_document", "sent"), [("a", "b", "a"), (None, "b", "b"), (None, None, None)])
@pytest.mark.parametrize("kind", ["model", "data set"])
def test_a_repository_is_asked_for_with_the_token_that_there_is(
    kind, of_library, of_document, sent, tmp_path, monkeypatch
):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}")
    tokens = []

    def snapshot_download(repository, *, token, **more):
        tokens.append(token)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: of_library)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.delenv("HUGGINGFACE_TOKEN", raising=False)
    if of_document is not None:
        monkeypatch.setenv("HUGGINGFACE_TOKEN", of_document)
    if kind == "model":
        hub.fetch_from_hub("owner/name")
    else:
        hub_files("owner/name", ["*.jsonl"])
    assert tokens == [sent]
