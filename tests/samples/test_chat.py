"""What each character and token of a chat is, for templates that treat contents in many ways."""

import re
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from chat_templates import NEEDS_TOOLS, TEMPLATES, WITH_TOOLS, with_template
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.chat import Rendered, render
from convert_w4a8.samples.encode import encode, token_kinds
from convert_w4a8.samples.lines import Record
from convert_w4a8.samples.sample import TokenKind

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": 'Finds "things" by name.',
            "parameters": {
                "type": "object",
                "properties": {"name": {"type": "string", "description": "What to find"}, "limit": {"type": "integer"}},
                "required": ["name"],
            },
        },
    }
]
CALL: dict[str, Any] = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "find", "arguments": {"name": 'a "b"', "limit": 3}},
}
ALPHABETS = {"system": "αβγδ", "user": "абвг", "assistant": "ሀለሐመ", "tool": "アイウエ"}
"""Role → characters of which its contents are made, and nothing else of a rendering."""
KINDS = {
    "system": TokenKind.SYSTEM,
    "user": TokenKind.USER,
    "assistant": TokenKind.ASSISTANT,
    "tool": TokenKind.TOOL,
}


def pieces(rendered: Rendered) -> list[tuple[str, str]]:
    """Return what stands where: kind and text of each stretch."""
    assert rendered.kinds is not None
    runs = groupby(zip(rendered.kinds, rendered.text, strict=True), key=lambda pair: pair[0])
    return [(TokenKind(kind).name, "".join(char for _, char in run)) for kind, run in runs]


def chat(tokenizer: Any, name: str, messages: list[dict[str, Any]], tools: Any = None) -> Rendered:
    """Render with one of the templates."""
    return render(with_template(tokenizer, TEMPLATES[name]), messages, tools, "here")


SAID: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"at": "home"}'},
    {"role": "assistant", "content": "At home."},
]


def test_a_plain_chat(tokenizer: Any) -> None:
    """Contents are whose they are, the rest is the template's, even where contents have white space at their ends."""
    messages = [{"role": "user", "content": " hello\n"}, {"role": "assistant", "content": "hi"}]
    assert pieces(chat(tokenizer, "chatml", messages)) == [
        ("TEMPLATE", "<|im_start|>user\n"),
        ("USER", " hello\n"),
        ("TEMPLATE", "<|im_end|>\n<|im_start|>assistant\n"),
        ("ASSISTANT", "hi"),
        ("TEMPLATE", "<|im_end|>\n"),
    ]


def test_a_prompt_and_tools_of_the_template(tokenizer: Any) -> None:
    """A system prompt that the template writes by itself, what it says about tools, and calls to their ends."""
    found = pieces(chat(tokenizer, "default prompt", SAID[1:], TOOLS))
    assert found[:3] == [
        ("TEMPLATE", "<|im_start|>system\n"),
        ("SYSTEM", "You are a careful helper of few words."),
        found[2],
    ]
    assert found[2][0] == "TOOLS"
    assert found[2][1].startswith("\n\n# Functions\n\nThese can be called:\n<tools>\n{")
    assert found[2][1].endswith("</tools>\n\nAnswer with JSON within <tool_call></tool_call>.")
    assert found[3:] == [
        ("TEMPLATE", "<|im_end|>\n<|im_start|>user\n"),
        ("USER", "Where is it?"),
        ("TEMPLATE", "<|im_end|>\n<|im_start|>assistant\n"),
        (
            "ASSISTANT",
            'Let me see.\n<tool_call>\n{"name": "find", "arguments": {"name": "a \\"b\\"", "limit": 3}',
        ),
        ("TEMPLATE", "}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n"),
        ("TOOL", '{"at": "home"}'),
        ("TEMPLATE", "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
        ("ASSISTANT", "At home."),
        ("TEMPLATE", "<|im_end|>\n"),
    ]


def test_an_own_prompt_is_no_default(tokenizer: Any) -> None:
    """With a system message, nothing of the template's is a system prompt."""
    found = pieces(chat(tokenizer, "default prompt", SAID[:2]))
    assert found[:2] == [("TEMPLATE", "<|im_start|>system\n"), ("SYSTEM", "Be brief.")]


@pytest.mark.parametrize("name", ["chatml", "reasoning", "headers", "instruct", "no system", "generation", "parts"])
def test_no_prompt_is_none(tokenizer: Any, name: str) -> None:
    """A template without a system prompt of its own has none, whatever it writes before one."""
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    kinds = chat(tokenizer, name, messages).kinds
    assert kinds is not None
    assert set(kinds.tolist()) == {TokenKind.TEMPLATE, TokenKind.USER, TokenKind.ASSISTANT}


def test_tools_without_a_prompt_bring_their_own_header(tokenizer: Any) -> None:
    """The whole turn that is there because of tools is the tools'."""
    (_, text), following = pieces(chat(tokenizer, "reasoning", SAID[1:2], TOOLS))[:2]
    assert re.fullmatch(r"<\|im_start\|>system\n# Tools\n\n<tools>\n\{.*\}\n</tools><\|im_end\|>\n", text)
    assert following == ("TEMPLATE", "<|im_start|>user\n")


def test_tools_in_two_places(tokenizer: Any) -> None:
    """A line in the header and the list in the question."""
    found = pieces(chat(tokenizer, "headers", SAID[:2], TOOLS))
    tools = [text for kind, text in found if kind == "TOOLS"]
    assert tools[0] == "Environment: interpreter\n"
    assert tools[1].startswith("Answer with a call of one of these functions.\n\n{\n    ")
    assert len(tools) == 2
    assert ("SYSTEM", "Be brief.") in found
    assert ("USER", "Where is it?") in found


def test_a_prompt_in_the_last_question(tokenizer: Any) -> None:
    """Tools before it, the system prompt in it."""
    tools, *rest = pieces(chat(tokenizer, "instruct", SAID[:2], TOOLS))[1:]
    assert tools[0] == "TOOLS"
    assert tools[1].startswith("[TOOLS] [{")
    assert tools[1].endswith("[/TOOLS]")
    assert rest == [
        ("TEMPLATE", "[INST] "),
        ("SYSTEM", "Be brief."),
        ("TEMPLATE", "\n\n"),
        ("USER", "Where is it?"),
        ("TEMPLATE", "[/INST]"),
    ]


def test_reasoning_that_the_template_takes_out_or_moves(tokenizer: Any) -> None:
    """What is dropped has no characters; what is kept is the assistant's."""
    thought = "<think>\nIt hides.\n</think>\n\nHere."
    before = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": thought}]
    found = pieces(chat(tokenizer, "reasoning", [*before, {"role": "user", "content": "b?"}, before[1]]))
    assert [text for kind, text in found if kind == "ASSISTANT"] == ["Here.", thought]
    apart = {"role": "assistant", "reasoning_content": "It hides.", "content": "Here."}
    found = pieces(chat(tokenizer, "reasoning", [before[0], apart]))
    assert found[-2] == ("ASSISTANT", "It hides.\n</think>\n\nHere.")


def test_a_content_that_the_template_looks_at(tokenizer: Any) -> None:
    """A result of a tool in the user's name, as some traces have it: marks at its ends would change the rendering."""
    content = "<tool_response>\n42\n</tool_response>"
    messages = [*SAID[1:2], {"role": "assistant", "content": "<think>\nSo.\n</think>\n\nI look."}]
    found = pieces(chat(tokenizer, "reasoning", [*messages, {"role": "user", "content": content}]))
    assert ("USER", content) in found
    assert ("ASSISTANT", messages[1]["content"]) in found  # the result is no question, so the thought is there


def test_arguments_one_by_one(tokenizer: Any) -> None:
    """Numbers and nested values are the assistant's, too, though they bear no marks; tools are found where escaped."""
    arguments = {"name": "a b", "limit": 3, "more": [{"deep": None}], "last": True}
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    nothing = {"type": "function", "function": {"name": "look", "arguments": {"at": 7}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call, nothing]}
    found = pieces(chat(tokenizer, "parameters", [SAID[1], asked, *SAID[3:]], TOOLS))
    assert found[0][0] == "TOOLS"
    assert "'description': 'Finds \"things\" by name.'" in found[0][1]
    calls = "".join(text for kind, text in found if kind == "ASSISTANT")
    assert calls.startswith("find>\n<parameter=name>\na b\n</parameter>\n<parameter=limit>\n3\n")
    assert '[{"deep": null}]\n</parameter>\n<parameter=last>\ntrue\n</parameter>\n' in calls
    assert "look>\n<parameter=at>\n7\n</parameter>\n" in calls
    assert ("TOOL", '{"at": "home"}') in found
    of_template = "".join(text for kind, text in found if kind == "TEMPLATE")
    assert "parameter" not in of_template
    assert of_template.endswith(
        "</function>\n</tool_call><|im_end|>\n<|im_start|>tool\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    )


def test_a_template_that_needs_tools(tokenizer: Any) -> None:
    """It cannot be rendered without any, but with none."""
    needs = with_template(tokenizer, NEEDS_TOOLS)
    (_, before), (kind, text), *_ = pieces(render(needs, SAID[:2], TOOLS, "here"))
    assert before.rstrip() == "<|im_start|>system\nHere are the tools: <tools>"
    assert kind == "TOOLS"
    assert text.lstrip().startswith('{"name": "find", "description":')
    assert ("SYSTEM", "Be brief.") in pieces(render(needs, SAID[:2], TOOLS, "here"))


def test_the_name_of_a_tool_with_its_result(tokenizer: Any) -> None:
    """It is the call's string once more, and what lies between is not."""
    template = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}to={{ call.function.name }} "
        "{{ call.function.arguments | tojson }}<call>{% endfor %}{% if m.role == 'tool' %}<start>"
        "{{ messages[loop.index0 - 1].tool_calls[0].function.name }}={% endif %}{{ m.content }}<end>{% endfor %}"
    )
    call = {"role": "assistant", "tool_calls": [CALL]}
    assert pieces(render(with_template(tokenizer, template), [SAID[1], call, SAID[3]], None, "here"))[2:] == [
        ("ASSISTANT", 'find {"name": "a \\"b\\"", "limit": 3}'),
        ("TEMPLATE", "<call><end><start>"),
        ("ASSISTANT", "find"),
        ("TEMPLATE", "="),
        ("TOOL", '{"at": "home"}'),
        ("TEMPLATE", "<end>"),
    ]


def test_parts_are_given_where_strings_say_nothing(tokenizer: Any) -> None:
    """A template that knows lists of parts only would render no contents at all."""
    assert ("USER", "Where is it?") in pieces(chat(tokenizer, "parts", SAID[:2]))


def test_a_template_that_leaves_everything_out_is_refused(tokenizer: Any) -> None:
    """It would calibrate with nothing but headers."""
    mute = with_template(tokenizer, "{% for m in messages %}<|{{ m.role }}|>{% endfor %}")
    with pytest.raises(ConvertError, match="here: the chat template leaves out what is said in it"):
        render(mute, SAID[:2], None, "here")


@pytest.mark.parametrize(
    ("name", "messages", "said"),
    [
        ("no system", SAID[:2], "System role not supported"),
        ("instruct", SAID[1:2] * 2, "Roles must alternate"),
        ("headers", [SAID[1], {**SAID[2], "tool_calls": [CALL, CALL]}], "one tool at a time!"),
    ],
)
def test_a_refusal_is_told_in_the_templates_words(
    tokenizer: Any, name: str, messages: list[dict[str, Any]], said: str
) -> None:
    """With the line; and nothing else."""
    with pytest.raises(ConvertError, match=rf"here: the chat template refuses it \(.*{said}.*\); mend") as caught:
        chat(tokenizer, name, messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages[0].nothing.more }}", "{{ 1 // 0 }}"])
def test_a_broken_template_is_one_line(tokenizer: Any, template: str) -> None:
    """Whatever Jinja raises."""
    with pytest.raises(ConvertError, match="the chat template refuses it"):
        render(with_template(tokenizer, template), SAID[1:2], None, "here")


def test_a_template_runs_in_a_sandbox(tokenizer: Any) -> None:
    """It cannot reach Python."""
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ConvertError, match="refuses it"):
        render(with_template(tokenizer, escape), SAID[1:2], None, "here")


def test_a_template_that_hides_contents(tokenizer: Any) -> None:
    """Where marks change what is rendered, nothing is guessed."""
    measured = with_template(tokenizer, "{% for m in messages %}{{ m.content }} ({{ m.content | length }}){% endfor %}")
    assert render(measured, SAID[1:2], None, "here") == Rendered("Where is it? (12)", None)


def test_no_template(tokenizer: Any) -> None:
    """Base models have none."""
    with pytest.raises(ConvertError, match="the model has no chat template; give the data as text or input_ids"):
        render(with_template(tokenizer, ""), SAID[1:2], None, "here")


WORDS = ["</think>", "<think>", "<tool_response>", "</tool_response>", '"', "\\", "\U000f0001", "\U00100001", "'"]


def contents(role: str) -> st.SearchStrategy[str]:
    """Make contents of a role's own characters, white space, and what templates look for."""
    own = st.text(ALPHABETS[role], min_size=1, max_size=4)
    parts = st.lists(st.one_of(own, st.sampled_from([" ", "\n", "\n\n", "\t"]), st.sampled_from(WORDS)), max_size=6)
    return st.tuples(parts, own).map(lambda found: "".join(found[0]) + found[1])


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Make chats that most templates accept."""
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": draw(contents("system"))}] if draw(st.booleans()) else []
    )
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(contents("user"))})
        answer: dict[str, Any] = {"role": "assistant", "content": draw(contents("assistant"))}
        if draw(st.booleans()):
            name, number = draw(contents("assistant")), draw(st.integers(0, 99))
            call = {"name": "find", "arguments": {"name": name, "limit": number}}
            messages.append({**answer, "tool_calls": [{"id": "abcdefghi", "type": "function", "function": call}]})
            messages.append({"role": "tool", "content": draw(contents("tool"))})
        messages.append(answer)
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=chats(), with_tools=st.booleans())
def test_every_character_is_whose_it_is(
    tokenizer: Any, name: str, messages: list[dict[str, Any]], *, with_tools: bool
) -> None:
    """Characters that only one role uses are that role's in every rendering, and what no role uses is none's.

    The tokens are those of the ordinary rendering, and those of a kind have all of its characters.
    """
    tools = TOOLS if with_tools and name in WITH_TOOLS else None
    own = with_template(tokenizer, TEMPLATES[name])
    try:
        rendered = render(own, messages, tools, "here")
    except ConvertError as error:
        assert name == "no system"
        assert "System role not supported" in str(error)  # noqa: PT017
        return
    if {"\U000f0001", "\U00100001"} <= set(rendered.text):
        assert rendered.kinds is None  # no characters are left for marks
        return
    assert rendered.kinds is not None
    for role, alphabet in ALPHABETS.items():
        is_own = np.array([char in alphabet for char in rendered.text])
        assert (rendered.kinds[is_own] == KINDS[role]).all()
    if not tools and name != "default prompt" and not any("tool_calls" in message for message in messages):
        of_template = np.array(
            [char in "<|>" for char in re.sub("|".join(map(re.escape, WORDS)), blank, rendered.text)]
        )
        assert (rendered.kinds[of_template] == TokenKind.TEMPLATE).all()
    tokens, kinds = encode(own, Record("here", messages=messages, tools=tools), len(own))
    if name != "parts":
        ordinary = own.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True)
        assert tokens.tolist() == ordinary["input_ids"]
    assert kinds is not None
    assert len(kinds) == len(tokens)
    for role, alphabet in ALPHABETS.items():
        of_kind = own.decode(tokens[kinds == KINDS[role]])
        assert [c for c in of_kind if c in alphabet] == [c for c in rendered.text if c in alphabet]


def blank(match: re.Match[str]) -> str:
    """Replace by as many spaces."""
    return " " * len(match[0])


def test_what_a_template_says_itself_is_obeyed(tokenizer: Any) -> None:
    """With generation blocks, the end of the turn is the model's too."""
    own = with_template(tokenizer, TEMPLATES["generation"])
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokens, kinds = encode(own, Record("here", messages=messages), len(own))
    assert kinds is not None
    assert own.decode(tokens[kinds == TokenKind.ASSISTANT]) == "b<|end|>"


@given(st.data())
def test_a_token_is_what_its_first_content_is(data: st.DataObject) -> None:
    """Of tokens that hold characters of several kinds, against a loop over characters."""
    kinds = np.array(data.draw(st.lists(st.sampled_from(TokenKind), min_size=1, max_size=12)), np.uint8)
    bounds = st.integers(0, len(kinds))
    offsets = data.draw(st.lists(st.tuples(bounds, bounds).map(sorted), min_size=1, max_size=8))
    expected = []
    for start, end in offsets:
        held = [kind for kind in kinds[start : max(end, start + 1)] if kind != TokenKind.TEMPLATE]
        expected.append(held[0] if held else TokenKind.TEMPLATE)
    assert token_kinds(kinds, np.array(offsets, np.int64)).tolist() == expected
