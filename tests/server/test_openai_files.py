"""`/v1/files`, asked by the unmodified `openai` client over a real socket, and by people who mean no good."""

import io
import json
import os
import pickle
import socket

import httpx2
import openai
import pytest

from nightschool.store.files import FileStore
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from tests.support.fake_slot import FakeSlot
from tests.support.live_server import live

MOST_BYTES = 3_000_000


def line(question="Who lives in Ulm?", answer="Ada lives in Ulm.", **fields):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]
    return json.dumps({"messages": messages})


def lines(count=3):
    return "".join(line(f"question {n}", f"answer {n}") + "\n" for n in range(count)).encode()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home")).ensure()


@pytest.fixture(scope="module")
def server(home):
    keys = [{"key": f"key-of-{tenant}", "tenant": tenant} for tenant in ("acme", "other")]
    with live(
        FakeSlot(),
        registry=Registry(home),
        api_keys=keys,
        max_file_bytes=MOST_BYTES,
        file_timeout_seconds=1.0,
    ) as server:
        yield server


def client_as(server, tenant):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=f"key-of-{tenant}", max_retries=0)


@pytest.fixture
def client(server):
    with client_as(server, "acme") as client:
        yield client


def upload(client, content, name="train.jsonl", purpose="fine-tune"):
    return client.files.create(file=(name, content), purpose=purpose)


def test_a_file_comes_back_as_it_was_sent(client, home):
    sent = lines()
    file = upload(client, sent)
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(sent), "train.jsonl", "fine-tune")
    assert file.status == "processed"
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == sent
    stored = FileStore(home, "acme").get(file.id)
    assert (stored.format, stored.num_examples) == ("messages", 3)
    assert stored.path.is_relative_to(home.path / "tenants/acme/files")


def test_files_are_listed_in_pages_and_by_purpose(client):
    ids = [upload(client, lines(1)).id for _ in range(3)]
    listed = [file.id for file in client.files.list(limit=2)]  # the client turns the pages
    assert [one for one in listed if one in ids] == ids[::-1]
    assert [one for one in (file.id for file in client.files.list(order="asc", limit=1)) if one in ids] == ids
    assert not list(client.files.list(purpose="fine-tune-results"))
    with pytest.raises(openai.BadRequestError, match="has no 'file-nobodys'"):
        client.files.list(after="file-nobodys")


def test_a_deleted_file_is_gone(client):
    file = upload(client, lines())
    assert client.files.delete(file.id).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="There is no file"):
            ask(file.id)


def test_what_another_tenant_uploaded_does_not_exist(server, client):
    file = upload(client, lines())
    with client_as(server, "other") as other:
        for ask in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(file.id)
        assert file.id not in [one.id for one in other.files.list()]
        with pytest.raises(openai.BadRequestError):
            other.files.list(after=file.id)
    assert client.files.retrieve(file.id).id == file.id


@pytest.mark.parametrize("name", ["../../../etc/passwd", "..\\..\\boot.ini", "/etc/cron.d/x", "a\0b", "..", "ü.jsonl"])
def test_a_file_name_is_never_a_path(client, home, name):
    before = {path for path in home.path.rglob("*") if path.name not in ("content.jsonl", "file.json")}
    file = upload(client, lines(), name=name)
    assert "/" not in file.filename
    assert "\\" not in file.filename
    new = {path for path in home.path.rglob("*") if path.name not in ("content.jsonl", "file.json")} - before
    assert [path.name for path in new] == [file.id]
    assert "\n" not in client.files.with_raw_response.content(file.id).headers["content-disposition"]


@pytest.mark.parametrize("file_id", ["file-../../x", "%2e%2e%2f", "file-" + "0" * 24, "file-" + "g" * 24, "x" * 5000])
def test_an_id_that_nobody_gave_out_is_404(client, file_id):
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file_id)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "there are no examples"),
        (b"\n\n", "there are no examples"),
        (lines() + b"{\n", r"train.jsonl:4: malformed JSON at column 2"),
        (lines() + b"[1]\n", "train.jsonl:4: a line is a JSON object"),
        (line("q", "a", weight=-1).encode(), r"train.jsonl:1: 'messages\[1\].weight' is -1"),
        (line().replace("assistant", "wizard").encode(), r"train.jsonl:1: 'messages\[1\].role' is 'wizard'"),
        (line().replace("assistant", "user").encode(), "train.jsonl:1: "),
        (line().encode() + b'\n{"prompt": "a", "completion": "b"}\n', "train.jsonl:2: this line is in the format"),
        (b'{"text": "a"}\n', "train.jsonl:1: the fields text are none of those"),
        (b"\xff\xfe\n", "train.jsonl:1: the byte 0xff is no UTF-8"),
        (pickle.dumps({"messages": [os.getcwd] * 3}), "train.jsonl:1: "),
        (b'{"messages": [{"role": "user", "content": "' + b"x" * 2_100_000 + b'"}]}', "longer than the limit"),
        (b"[" * 100_000 + b"\n", "train.jsonl:1: malformed JSON"),
    ],
)
def test_what_could_not_be_trained_on_is_refused_with_its_line_and_leaves_nothing(client, home, content, said):
    before = sorted(home.path.rglob("*"))
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        upload(client, content)
    assert (refused.value.code, refused.value.param) == ("invalid_file", "file")
    assert sorted(home.path.rglob("*")) == before


def test_the_first_twenty_wrong_lines_are_told_at_once(client):
    with pytest.raises(openai.BadRequestError) as refused:
        upload(client, lines(2) + b'{"messages": []}\n' * 30)
    assert refused.value.body["message"].count("train.jsonl:") == 20


@pytest.mark.parametrize("purpose", ["assistants", "batch", "vision", "fine-tune-results", ""])
def test_other_purposes_are_refused_by_name(client, purpose):
    with pytest.raises(openai.BadRequestError) as refused:
        upload(client, lines(), purpose=purpose)
    assert refused.value.param == "purpose"


def post(server, **kwargs):
    return httpx2.post(f"{server.url}/v1/files", headers={"authorization": "Bearer key-of-acme"}, **kwargs)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"files": {"file": ("a", lines())}}, "purpose"),
        ({"data": {"purpose": "fine-tune"}, "files": {"other": (None, "x")}}, "file"),
        ({"data": {"purpose": "fine-tune"}, "files": [("file", ("a", lines())), ("file", ("b", lines()))]}, "file"),
        (
            {"data": {"purpose": "fine-tune", "expires_after[seconds]": "3600"}, "files": {"file": ("a", lines())}},
            "expires_after[seconds]",
        ),
        ({"data": {"purpose": "x" * 5000}, "files": {"file": ("a", lines())}}, None),
        ({"data": {f"field{n}": "x" for n in range(50)}, "files": {"file": ("a", lines())}}, None),
        ({"json": {"purpose": "fine-tune"}}, None),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}}, None),
    ],
)
def test_a_form_that_is_none_is_400(server, form, param):
    form = dict(form)
    headers = {"authorization": "Bearer key-of-acme", **form.pop("headers", {})}
    answer = httpx2.post(f"{server.url}/v1/files", headers=headers, **form)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_file_before_its_purpose_is_as_good(server):
    """As curl sends it where -F file comes first."""
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + lines() + b"\r\n--x\r\n"
        b'content-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x--\r\n'
    )
    answer = httpx2.post(
        f"{server.url}/v1/files",
        content=body,
        headers={"authorization": "Bearer key-of-acme", "content-type": "multipart/form-data; boundary=x"},
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["bytes"] == len(lines())


def test_a_file_that_is_cut_short_leaves_nothing(server, home):
    before = sorted(home.path.rglob("*"))
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + lines()
    answer = httpx2.post(
        f"{server.url}/v1/files",
        content=body,
        headers={"authorization": "Bearer key-of-acme", "content-type": "multipart/form-data; boundary=x"},
    )
    assert answer.status_code == 400
    assert "ends before the boundary" in answer.json()["error"]["message"]
    assert sorted(home.path.rglob("*")) == before


def test_a_file_may_be_larger_than_other_bodies_up_to_its_own_bound(client, home):
    content = lines(25_000)
    assert 2_000_000 < len(content) < MOST_BYTES
    assert upload(client, content).bytes == len(content)
    before = sorted(home.path.rglob("*"))
    with pytest.raises(openai.APIStatusError) as refused:
        upload(client, io.BytesIO(b"x" * (MOST_BYTES + 1)))
    assert refused.value.status_code == 413
    assert refused.value.code == "body_too_large"
    assert sorted(home.path.rglob("*")) == before


def raw_upload(server, *head, body=b""):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        fixed = ["POST /v1/files HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Authorization: Bearer key-of-acme"]
        more = ["Content-Type: multipart/form-data; boundary=x", *head, "", ""]
        connection.sendall("\r\n".join(fixed + more).encode() + body)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def test_a_body_without_a_length_is_counted_as_it_comes(server, home):
    before = sorted(home.path.rglob("*"))

    def chunks():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 100_000

    headers = {"authorization": "Bearer key-of-acme", "content-type": "multipart/form-data; boundary=x"}
    answer = httpx2.post(f"{server.url}/v1/files", content=chunks(), headers=headers)
    assert answer.status_code == 413
    assert sorted(home.path.rglob("*")) == before


def test_a_client_that_stops_sending_is_408_and_leaves_nothing(server, home):
    before = sorted(home.path.rglob("*"))
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{'
    answer = raw_upload(server, "Content-Length: 100000", body=body)
    assert b" 408 " in answer.split(b"\r\n")[0]
    assert b"request_timeout" in answer
    assert sorted(home.path.rglob("*")) == before


def test_a_client_that_goes_away_leaves_nothing(server, home, client):
    before = {path.name for path in (home.path / "tenants/acme/files").iterdir()}
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer key-of-acme\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 100000\r\n\r\n--x\r\n".encode()
        )
    file = upload(client, lines())  # whoever comes next finds the place clean
    assert {path.name for path in (home.path / "tenants/acme/files").iterdir()} - before == {file.id}
