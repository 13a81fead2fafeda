"""Files of calibration data: what is read, and what is said about a line that is not as it should be."""

import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.errors import ConvertError
from convert_w4a8.samples import lines
from convert_w4a8.samples.lines import Record, read_records

GOOD = '{"text": "a"}'


def write(path: Path, *found: str | bytes) -> Path:
    """Write lines."""
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in found) + b"\n")
    return path


def read(tmp_path: Path, *found: str | bytes, name: str = "data.jsonl") -> list[Record]:
    """Read lines from a file."""
    return list(read_records([write(tmp_path / name, *found)]))


def chat(*messages: Any, **columns: Any) -> str:
    """Return a line of messages."""
    return json.dumps({"messages": list(messages), **columns})


def user(content: Any) -> dict[str, Any]:
    """Return a message of the user's."""
    return {"role": "user", "content": content}


BAD = {
    "not JSON": ("{'text': 'a'}", "is not JSON (column 2: Expecting property name"),
    "cut off": ('{"text": "a', "is not JSON (column 10: Unterminated string"),
    "two documents": (GOOD + GOOD, "is not JSON (column 14: Extra data"),
    "nested": ("[" * 100_000, "is not JSON (it is nested too deep)"),
    "NaN": ('{"text": "a", "score": NaN}', "is not JSON (it holds NaN)"),
    "infinite": ('{"text": "a", "score": -Infinity}', "is not JSON (it holds -Infinity)"),
    "too large": ('{"text": "a", "score": 1e999}', "is not JSON (it holds a number that is too large)"),
    "many digits": ('{"input_ids": [' + "9" * 5000 + "]}", "is not JSON (Exceeds the limit"),
    "twice": ('{"text": "a", "text": "b"}', "is not JSON (an object has the key 'text' twice)"),
    "twice below": ('{"messages": [{"role": "user", "role": "a"}]}', "the key 'role' twice"),
    "half a pair": ('{"text": "\\ud800"}', "has half of a surrogate pair"),
    "not UTF-8": (b'{"text": "\xff"}', "is not UTF-8 (byte 11: 0xff)"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "is not UTF-8"),
    "list": ("[1, 2]", "is a list, not an object"),
    "string": ('"a"', "is a string, not an object"),
    "null": ("null", "is null, not an object"),
    "no column": ('{"prompt": "a"}', "has none of messages, text, input_ids; a line is"),
    "only null": ('{"text": null}', "has none of messages, text, input_ids"),
    "two columns": ('{"text": "a", "input_ids": [1]}', "has text and input_ids"),
    "tools beside text": ('{"text": "a", "tools": [{}]}', "has tools beside text; tools belong to messages"),
    "text": ('{"text": 1}', "text is a number, not a string"),
    "no text": ('{"text": ""}', "text is empty"),
    "ids": ('{"input_ids": "1 2"}', "input_ids is a string, not a list of whole numbers"),
    "no ids": ('{"input_ids": []}', "input_ids is empty"),
    "float": ('{"input_ids": [1, 2.5]}', "input_ids[1] is 2.5, not a whole number"),
    "bool": ('{"input_ids": [true]}', "input_ids[0] is true or false, not a whole number"),
    "mask": ('{"input_ids": [1, 2], "loss_mask": [0, 2]}', "loss_mask holds 2; 1 for a token that counts"),
    "mask of bools": ('{"text": "a", "loss_mask": [true]}', "loss_mask[0] is true or false"),
    "no messages": ('{"messages": []}', "messages is empty"),
    "messages": ('{"messages": {"role": "user"}}', "messages is an object, not a list of objects"),
    "message": ('{"messages": ["hi"]}', "messages[0] is a string, not an object"),
    "no role": (chat({"content": "a"}), "messages[0] has no role; roles are system, developer, user"),
    "role": (chat({"role": "bot", "content": "a"}), "messages[0] has the role 'bot'; roles are system"),
    "role no string": (chat({"role": ["user"], "content": "a"}), "messages[0] has the role a list; roles are"),
    "no content": (chat({"role": "user"}), "messages[0] has neither content nor tool_calls"),
    "content": (chat(user({"text": "a"})), "messages[0].content is an object, not a string"),
    "image": (chat(user([{"type": "image_url", "image_url": {"url": "a"}}])), "messages[0].content[0] is no text"),
    "thought": (chat({"role": "assistant", "content": "", "thinking": 1}), "messages[0].thinking is a number"),
    "calls": (chat({"role": "assistant", "tool_calls": {}}), "messages[0].tool_calls is an object, not a list"),
    "call": (chat({"role": "assistant", "tool_calls": [{"id": "1"}]}), "tool_calls[0] is no call of a function"),
    "tools": (chat(user("a"), tools="[]"), "tools is not a list of objects"),
    "tool": (chat(user("a"), tools=["find"]), "tools is not a list of objects"),
}


@pytest.mark.parametrize(("line", "said"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, said: str) -> None:
    """By file and number, on one line, with a remedy."""
    with pytest.raises(ConvertError) as caught:
        read(tmp_path, GOOD, "", line, GOOD)
    assert str(caught.value).startswith(f"{tmp_path / 'data.jsonl'} line 3: ")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert caught.value.problem.remedy


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "text", "input_ids", "loss_mask", "tools", "role", "content", "tool_calls",
                         "function", "name", "arguments", "type", "thinking"]), value, max_size=5),
    max_leaves=12,
))  # fmt: skip
def test_whatever_json_there_is(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    """It is read or refused; nothing else is raised."""
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", json.dumps(value))
    try:
        (record,) = read_records([path])
    except ConvertError:
        return
    assert (record.messages is not None) + (record.text is not None) + (record.input_ids is not None) == 1


def test_what_is_read(tmp_path: Path) -> None:
    """Each column; blank lines and a byte order mark are passed over, and null is as if it were not there."""
    found = read(
        tmp_path,
        b"\xef\xbb\xbf" + b'{"text": "a\xc3\xa9", "id": 7, "tools": null}',
        "  ",
        '{"input_ids": [1, 2], "loss_mask": [0, 1], "text": null}',
        chat(user("b"), tools=[]),
    )
    path = tmp_path / "data.jsonl"
    assert found == [
        Record(f"{path} line 1", text="aé"),
        Record(f"{path} line 3", input_ids=[1, 2], loss_mask=[0, 1]),
        Record(f"{path} line 4", messages=[user("b")]),
    ]


def test_messages_are_as_vllm_hands_them_to_the_template(tmp_path: Path) -> None:
    """Parts are joined by newlines, arguments are objects, and what is no object is an empty one."""

    def call(arguments: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "arguments": arguments}}

    given = [call('{"a": 1}'), call({"a": 1}), call(""), call(None), call("[1]"), call("{")]
    (record,) = read(
        tmp_path,
        chat(
            user([{"type": "text", "text": "a"}, "b"]),
            {"role": "assistant", "content": None, "tool_calls": given},
            {"role": "assistant", "content": "c", "tool_calls": []},
        ),
    )
    assert record.messages is not None
    first, second, third = record.messages
    assert first == user("a\nb")
    assert [found["function"]["arguments"] for found in second["tool_calls"]] == [{"a": 1}, {"a": 1}, {}, {}, {}, {}]
    assert second["content"] == ""
    assert third == {"role": "assistant", "content": "c"}


def test_compressed_and_plain_text(tmp_path: Path) -> None:
    """Files are read in their order: *.jsonl.gz, and *.txt, whose documents have NULs between them."""
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(GOOD.encode()))
    text = tmp_path / "b.txt"
    text.write_bytes(b"one\n\0\n\0two")
    assert list(read_records([text, packed])) == [
        Record(f"{text} document 1", text="one\n"),
        Record(f"{text} document 3", text="two"),
        Record(f"{packed} line 1", text="a"),
    ]


def test_a_huge_line_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that a small file unpacks to."""
    monkeypatch.setattr(lines, "MAX_LINE", 1000)
    line = json.dumps({"text": "a" * 989})
    assert len(line) == 1001
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(line.encode()))
    for path in (write(tmp_path / "data.jsonl", line), packed):
        with pytest.raises(ConvertError, match="line 1: is longer than 1 kB"):
            list(read_records([path]))
    assert read(tmp_path, line.replace("aa", "a", 2))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Each in one line."""
    broken, cut = tmp_path / "a.gz", tmp_path / "b.gz"
    broken.write_bytes(b"no")
    cut.write_bytes(gzip.compress(GOOD.encode())[:-9])
    for path, said in (
        (tmp_path / "none.jsonl", r"cannot be read \(No such file"),
        (tmp_path, "is a directory; name files"),
        (broken, r"cannot be read \(Not a gzipped file"),
        (cut, r"cannot be read \(Compressed file ended"),
    ):
        with pytest.raises(ConvertError, match=said) as caught:
            list(read_records([path]))
        assert str(caught.value).startswith(str(path))


def test_a_pipe_is_read(tmp_path: Path) -> None:
    """As of `--data <(zstd -dc …)`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(GOOD,))
    writer.start()
    assert len(list(read_records([pipe]))) == 1
    writer.join()
