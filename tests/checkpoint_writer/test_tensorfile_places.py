"""The header of a safetensors file says where tensors lie, and a file that does not hold them is refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nightschool.checkpoint_writer.tensorfile_places import tensor_places

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
tensors = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=30, deadline=None)
@given(tensors=tensors)
def test_the_bytes_are_where_it_says(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "places.safetensors"
    content = {
        name: (torch.arange(torch.Size(shape).numel()) + number).to(DTYPES[dtype]).view(shape)
        for number, (name, (dtype, shape)) in enumerate(tensors.items())
    }
    save_file(content, path, {"format": "pt"})
    raw, places = path.read_bytes(), tensor_places(path)
    assert places.keys() == content.keys()
    for name, tensor in content.items():
        assert (places[name].dtype, list(places[name].shape)) == (tensors[name][0], tensors[name][1])
        assert raw[places[name].begin : places[name].end] == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()  # fmt: skip


def file_of(header, data=b"12345678"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one(**changed):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "header would have 0 bytes"),
        (b"\xff" * 20, "header would have"),
        (file_of(b"[" * 100_000), "does not describe tensors"),
        (file_of(b"[1]"), "does not describe tensors"),
        (file_of({"a": 1}), "does not describe tensors"),
        (file_of(one(shape="2")), "does not describe tensors"),
        (file_of(one(shape=[3])), "other bytes than its shape"),
        (file_of(one(data_offsets=[-8, 0])), "other bytes than its shape"),
        (file_of(one(data_offsets=[8])), "does not describe tensors"),
        (file_of(one(), b"1234567"), "it is cut: 'a' would end at byte"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, content, said):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        tensor_places(path)
