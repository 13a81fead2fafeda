"""Small chat templates in the manner of known families."""

import copy
from typing import Any

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

DEFAULT_PROMPT = """{%- set own = messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' }}
{%- if own %}{{ messages[0].content }}{% else %}{{ 'You are a careful helper of few words.' }}{% endif %}
{%- if tools %}
    {{- '\\n\\n# Functions\\n\\nThese can be called:\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\n\\nAnswer with JSON within <tool_call></tool_call>.' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + (m.content or '') }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}"""
"""As Qwen2.5: a system prompt of the template's own, tools behind the system prompt, calls as JSON."""

REASONING = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- set result = m.content and m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>') %}
    {%- if m.role == 'user' and not result %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content or '' %}
        {%- set thought = m.reasoning_content or '' %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
        {{- content.lstrip('\\n') if loop.index0 > ns.last else content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}"""
"""As Qwen3: reasoning only after the last question, taken out of contents, results of tools joined."""

HEADERS = """{{- '<|begin|>' }}
{%- set tell = tools is defined and tools %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}{% set rest = messages %}
{%- endif %}
{{- '<|start_header|>system<|end_header|>\\n\\n' }}
{%- if tell %}{{ 'Environment: interpreter\\n' }}{% endif %}
{{- 'Knowledge ends: December 2023\\n\\n' + system + '<|turn_end|>' }}
{%- for m in rest %}
    {%- if loop.first and tell and m.role == 'user' %}
        {{- '<|start_header|>user<|end_header|>\\n\\nAnswer with a call of one of these functions.\\n\\n' }}
        {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
        {{- m.content | trim + '<|turn_end|>' }}
    {%- elif m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('This model calls one tool at a time!') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header|>assistant<|end_header|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|turn_end|>' }}
    {%- elif m.role in ['tool', 'ipython'] %}
        {{- '<|start_header|>ipython<|end_header|>\\n\\n' + m.content + '<|turn_end|>' }}
    {%- else %}
        {{- '<|start_header|>' + m.role + '<|end_header|>\\n\\n' + m.content | trim + '<|turn_end|>' }}
    {%- endif %}
{%- endfor %}"""
"""As Llama 3.1: contents are trimmed, a system header always, tools in the first question, one call at a time."""

INSTRUCT = """{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(index=0) %}
{%- for m in rest if m.role in ['user', 'assistant'] and not m.tool_calls %}
    {%- if (m.role == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- '<s>' }}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {%- if tools and m == users[-1] %}{{ '[TOOLS] ' + (tools | tojson) + '[/TOOLS]' }}{% endif %}
        {{- '[INST] ' }}
        {%- if loop.last and system is defined %}{{ system + '\\n\\n' }}{% endif %}
        {{- m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('Ids of tool calls are 9 characters long!') }}
            {%- endif %}
            {{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}
            {{- ', ' if not loop.last else ']</s>' }}
        {%- endfor %}
    {%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + '</s>' }}
    {%- elif m.role == 'tool' %}{{ '[RESULTS] {"content": ' + m.content | tojson + '}[/RESULTS]' }}
    {%- endif %}
{%- endfor %}"""
"""As Mistral: turns alternate, the system prompt stands in the last question, tools before it."""

NO_SYSTEM = """{{ '<s>' }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}"""
"""As Gemma 2."""

GENERATION = """{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>
{% generation %}{{ m.content }}<|end|>{% endgeneration %}

{% else %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endif %}{% endfor %}"""
"""That says itself what the model writes, the end of the turn included."""

PARTS = """{% for m in messages %}<|{{ m.role }}|>
{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|end|>
{% endfor %}"""
"""As templates of models for images: contents are lists only."""

PARAMETERS = """{%- for m in messages %}
    {%- if loop.first and tools %}
        {{- '<|im_start|>system\\n# Tools' }}
        {%- for tool in tools %}{{ '\\n' + (tool | string) }}{% endfor %}
        {{- '\\n<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
        {%- for name, value in call.function.arguments | items %}
            {{- '<parameter=' + name + '>\\n' }}{{ value if value is string else value | tojson }}
            {{- '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}"""
"""As Qwen3-Coder's calls, with parameters one by one; tools are written as Python does, which escapes characters."""

NEEDS_TOOLS = """<|im_start|>system
Here are the tools: <tools>{% for tool in tools %} {{ tool.function | tojson }}{% endfor %} </tools><|im_end|>
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}"""
"""As Hermes 2 Pro: for chats with tools only."""

TEMPLATES = {
    "chatml": CHATML,
    "default prompt": DEFAULT_PROMPT,
    "reasoning": REASONING,
    "headers": HEADERS,
    "instruct": INSTRUCT,
    "no system": NO_SYSTEM,
    "generation": GENERATION,
    "parts": PARTS,
    "parameters": PARAMETERS,
}
WITH_TOOLS = ("default prompt", "reasoning", "headers", "instruct", "parameters")


def with_template(tokenizer: Any, template: str) -> Any:
    """Return a copy of a tokenizer that has another chat template."""
    found = copy.copy(tokenizer)
    found.chat_template = template
    return found
