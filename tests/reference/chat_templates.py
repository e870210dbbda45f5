"""Chat templates and messages; `make_fixtures.py` has transformers render them."""

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

HEADERS = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message, with the dates that every chat begins with. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

ALTERNATING = """{%- set loop_messages = messages -%}
{%- if messages and messages[0].role == 'system' -%}
    {%- set system, loop_messages = messages[0].content.strip(), messages[1:] -%}
{%- endif -%}
{{ bos_token }}
{%- for message in loop_messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set content = message.content.strip() -%}
    {%- if loop.first and system is defined -%}
        {%- set content = '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ content -%}
    {%- endif -%}
    {{ '[INST] ' ~ content ~ ' [/INST]' if message.role == 'user' else ' ' ~ content ~ ' ' ~ eos_token }}
{%- endfor -%}
"""

LOOP_CONTROLS = """{%- macro quote(role) -%}[{{ role }}: {{ caller() }}]{%- endmacro -%}
{% set ns = namespace(seen=0, last='') %}
{% for m in messages %}
    {% if m.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if ns.seen >= 3 %}
        {% break %}
    {% endif %}
    {% set ns.seen = ns.seen + 1 %}
    {% set ns.last = m.content %}
{{ loop.index }}/{{ loop.length }}{{ ' first' if loop.first }}{{ ' last' if loop.last }} {{ m.role | upper }}: {{ m.content | tojson }}
{% endfor %}
{% for m in messages if m.role == 'tool' %}{{ m.content }}{% else %}no tool{% endfor %}

{{ {'seen': ns.seen, 'last': ns.last, 'roles': messages | map(attribute='role') | list, 'none': none, 'yes': true, 'x': 1.5} | tojson }}
{% call quote(messages[-1].role) %}{{ messages[-1].content | trim | replace('"', "'") }}{% endcall %}
{% for role, group in messages | groupby('role') %}{{ role }} {{ group | length }}{{ ', ' if not loop.last }}{% endfor %}

{% set whole %}{{ messages | map(attribute='content') | map('upper') | join(' ~ ') }}{% endset %}
{{ whole[:20] }}{{ whole[-3:] if whole | length > 23 }}
{{ messages | tojson(indent=2) }}
"""

REASONING = """{%- macro open(role) -%}
<|{{ role }}|>
{%- endmacro -%}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- set ns = namespace(index=-1) -%}
{%- for message in messages[::-1] -%}
    {%- if ns.index < 0 and message.role == 'user' -%}
        {%- set ns.index = (messages | length) - loop.index0 - 1 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages %}
{{ open(message.role) }}
    {%- if message.role == 'assistant' and '</think>' in message.content and loop.index0 < ns.index -%}
        {{- message.content.split('</think>')[-1].lstrip('\\n') -}}
    {%- elif message.content.startswith('/') and not message.content.endswith('!') -%}
        {{- message.content[1:].replace('_', ' ').title() -}}
    {%- else -%}
        {{- message['content'] | default('', true) -}}
    {%- endif -%}
{%- endfor %}
{{ users | length }} {{ messages[-1].role }} {{ messages | length // 2 }} {{ "%s-%d" | format("n", users | length) }}
{%- if add_generation_prompt is defined and add_generation_prompt %}
{{ open('assistant') }}
    {%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif -%}
{%- endif %}
"""

PRINTED = """{{ true }} {{ false }} {{ none }} {{ 1.0 }} {{ 7 / 2 }} {{ [1, 'a', none, true] }} {{ {'k': 'v'} }} {{ missing }}|
{{- messages | length }} {{ messages[0].name is defined }} {{ messages[0].get('name', 'nobody') }} {{ documents is none }}
{%- for key, value in messages[0].items() %} {{ key }}={{ value }}{% endfor %}
{%- for m in messages if m.role == 'user' %} {{ loop.cycle('odd', 'even') }} {{ m.content | length }}{% endfor %}
{%- if messages | rejectattr('role', 'in', ['user', 'system', 'assistant']) | list %} strange{% endif %}
{{ messages | map(attribute='content') | join('; ') }}
"""

TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "alternating": ALTERNATING,
    "loop controls": LOOP_CONTROLS,
    "reasoning": REASONING,
    "printed": PRINTED,
}

# Each is a list of (role, content).
CHATS = {
    "one question": [("user", "Hi <b> & 'you'! \"Quotes\", \\ and /slashes/.")],
    "with a system message": [("system", "  Be terse.\n"), ("user", "  2 + 2?  "), ("assistant", "<think>\n4\n</think>\n\nFour."), ("user", "/and_you")],
    "many languages": [("user", "Zażółć gęślą jaźń – 日本語 🦀\u2028line\ttab\r\nend"), ("assistant", "ñ"), ("user", "\u00a0x\u00a0"), ("assistant", "ok!"), ("user", "/so_long!")],
    "out of order": [("assistant", "I begin."), ("user", ""), ("tool", '{"a": 1}')],
    "system alone": [("system", "Nobody asks.")],
}
