"""Chat templates in the manner of the common families."""

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
LLAMA = (
    "{{- bos_token }}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system = messages[0]['content'] | trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' ~ system ~ '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}\n"
    "    {{- message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}"
)
MISTRAL = (
    "{%- set ns = namespace(index=0) %}\n"
    "{{- bos_token }}\n"
    "{%- for message in messages | rejectattr('role', 'equalto', 'system') %}\n"
    "    {%- if (message.role == 'user') != (ns.index % 2 == 0) %}\n"
    "        {{- raise_exception('roles must alternate') }}\n"
    "    {%- endif %}\n"
    "    {%- set ns.index = ns.index + 1 %}\n"
    "    {%- if message.role == 'user' %}\n"
    "        {{- ' [INST] ' + message.content + ' [/INST]' }}\n"
    "    {%- else %}\n        {{- ' ' + message.content + eos_token }}\n    {%- endif %}\n"
    "{%- endfor %}\n"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ 'Tools: ' }}{% for tool in tools %}{{ tool | tojson(indent=2) }}\n{% endfor %}"
    "{% endif %}{% for message in messages %}{{ message | tojson }}\n{% endfor %}"
)
SWITCHES = (
    "{% macro turn(role, text) %}[{{ role | upper }}] {{ text | trim }}\n{% endmacro %}\n"
    "{% for message in messages %}\n"
    "  {% if message.role == 'tool' %}{% continue %}{% endif %}\n"
    "{{ turn(message.role, message.content) }}\n"
    "  {% if loop.index > 50 %}{% break %}{% endif %}\n"
    "{% endfor %}\n"
    "{% if thinking is defined and thinking %}<think>{% else %}{{ loop_end | default('.') }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}|{% endif %}{% endfor %}"
)
SLICES = (
    "{% for message in messages[::-1] %}{{ loop.index0 }}/{{ loop.length }}:"
    "{{ message.content.split(' ')[-1] }}{{ message.get('name', '-') }}{{ ',' if not loop.last }}"
    "{% endfor %}{{ messages | map(attribute='role') | join('+') }}"
    "{{ '%s is %d' % ('x', 3) }}{{ 'a{}b'.format(1) }}{{ [1, 2] + [3] }}{{ 'ab' * 2 }}{{ {'k': none} }}"
    "{{ range(3) | list }}{{ dict(a=1).items() | list }}{{ 7 // 2 }}{{ 2 ** 3 }}{{ missing }}"
)
ALL = {
    "chatml": CHATML,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "tools": TOOLS,
    "switches": SWITCHES,
    "generation": GENERATION,
    "slices": SLICES,
}
