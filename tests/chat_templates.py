"""Chat templates in the formats of public models, short, and tokenizers that merge as theirs do.

Each template is written anew from its model's prompt format. `EXPECTED` states what a reader of the
format knows.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def _chatml(assistant: str, prompt: str, system: str = "") -> str:
    return (
        "{% for message in messages %}"
        + system
        + "{% if message.role == 'assistant' %}"
        + assistant
        + "{% else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + "
        "'<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


_PLAIN = "{{ '<|im_start|>assistant\\n' + message.content + '<|im_end|>\\n' }}"
_PROMPT = "{{ '<|im_start|>assistant\\n' }}"
_ALTERNATE = (
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)
_LLAMA_3 = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message.role + "
    "'<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
_DATE_LINE = (
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + "
    "'\\n\\n<|eot_id|>' }}"
)
# Qwen 3 writes a thought into the last answer only. Its switch closes the thought in the prompt.
_QWEN_3 = _chatml(
    "{%- set thought = '' %}{%- set answer = message.content %}"
    "{%- if '</think>' in answer %}"
    "{%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}{%- if loop.last %}"
    "{{- '<think>\\n' + thought + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}"
    "{%- else %}{{- answer }}{%- endif %}{{- '<|im_end|>\\n' }}",
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
)
_LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set first = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set first = '' %}{% endif %}"
    "{% for message in rest %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (first if loop.first else '') + message.content.strip() + "
    "' [/INST]' }}{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% elif message.role == 'assistant' %}"
    "{{ ' ' + message.content + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + _ALTERNATE + "{{ '<start_of_turn>' + "
    "('model' if message.role == 'assistant' else message.role) + '\\n' + message.content | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_GEMMA_3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set first = messages[0].content + '\\n\\n' %}{% else %}{% set rest = messages %}"
    "{% set first = '' %}{% endif %}{% for message in rest %}{{ '<start_of_turn>' + "
    "('model' if message.role == 'assistant' else message.role) + '\\n' + "
    "(first if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_PHI_3 = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + "
    "'<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
_PHI_4 = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '<|im_sep|>' + message.content"
    " + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + eos_token + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_R1_DISTILL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ message.content }}{% elif message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
    "{% else %}{{ '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
_FALCON = (
    "{% for message in messages %}{{ ('\\n' if not loop.first else '') + "
    "{'user': 'User', 'assistant': 'Falcon', 'system': 'System'}[message.role] + ': ' + "
    "message.content }}{% endfor %}{% if add_generation_prompt %}{{ '\\nFalcon:' }}{% endif %}"
)
_VICUNA = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ 'ASSISTANT: ' + message.content + eos_token }}{% elif message.role == 'user' %}"
    "{{ 'USER: ' + message.content + ' ' }}{% else %}{{ message.content + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_OLMO_2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message.role + '|>\\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if message.role != 'assistant' or not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Expected:
    template: str
    end: str | None
    system: bool = True
    turns: bool = True
    dated: bool = False
    thoughts: str = "none"
    trainable: bool = True


EXPECTED = {
    "chatml": Expected(_chatml(_PLAIN, _PROMPT), "<|im_end|>"),
    "qwen 2.5": Expected(_chatml(_PLAIN, _PROMPT, _DEFAULT_SYSTEM), "<|im_end|>"),
    "smollm 2": Expected(_chatml(_PLAIN, _PROMPT, _DEFAULT_SYSTEM), "<|im_end|>"),
    "qwen 3": Expected(_QWEN_3, "<|im_end|>", thoughts="known"),
    "llama 2": Expected(_LLAMA_2, "</s>"),
    "llama 3": Expected("{{ bos_token }}" + _LLAMA_3, "<|eot_id|>"),
    "llama 3.1": Expected(
        "{{ bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}"
        "{%- endif %}" + _DATE_LINE + _LLAMA_3,
        "<|eot_id|>",
        dated=True,
    ),
    "llama 3.2": Expected(
        "{{ bos_token }}{%- if not date_string is defined %}{%- set date_string = "
        "strftime_now('%d %b %Y') %}{%- endif %}" + _DATE_LINE + _LLAMA_3,
        "<|eot_id|>",
        dated=True,
    ),
    "mistral small": Expected(
        "{{ bos_token + '[SYSTEM_PROMPT]Today is ' + strftime_now('%Y-%m-%d') + "
        "'[/SYSTEM_PROMPT]' }}" + _MISTRAL.removeprefix("{{ bos_token }}"),
        "</s>",
        system=False,
        dated=True,
    ),
    "mistral": Expected(_MISTRAL, "</s>", system=False),
    "gemma 2": Expected(_GEMMA_2, "<end_of_turn>", system=False),
    "gemma 3": Expected(_GEMMA_3, "<end_of_turn>"),
    "phi 3": Expected(_PHI_3, "<|end|>"),
    "phi 4": Expected(_PHI_4, "<|im_end|>"),
    "zephyr": Expected(_ZEPHYR, "</s>"),
    "r1 distill": Expected(_R1_DISTILL, "</s>", thoughts="opened", trainable=False),
    "falcon": Expected(_FALCON, None),
    "vicuna": Expected(_VICUNA, "</s>"),
    "olmo 2": Expected(_OLMO_2, "</s>"),
}
TRAINABLE = [name for name, each in EXPECTED.items() if each.trainable and each.end is not None]

# Templates that measure or train something else than what is meant, and the words of the error.
WRONG = {
    "no generation prompt": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + "
        "'<|im_end|>\\n' }}{% endfor %}",
        "writes no generation prompt",
    ),
    "another prompt than in training": (
        _chatml(_PLAIN, "{{ '<|im_start|>bot\\n' }}"),
        "not the beginning of its training text",
    ),
    "a channel before the answer": (
        _chatml(
            "{{ '<|im_start|>assistant\\nfinal:' + message.content + '<|im_end|>\\n' }}", _PROMPT
        ),
        "between the generation prompt and the answer",
    ),
    "no answers": (_chatml("", _PROMPT), "leaves out the text of a turn"),
    "content in parts only": (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}",
        "leaves out the text of a turn",
    ),
    "two starts": ("{{ bos_token }}" + _LLAMA_2, "writes <s> twice|write <s> twice"),
    "a syntax error": ("{% for message in messages %}{{ message.content }}", "cannot render"),
    "a random greeting": (
        "{{ ['Hi', 'Hello'] | random }}" + _chatml(_PLAIN, _PROMPT),
        "so one prompt has many texts",
    ),
}

_SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<|im_start|>",
    "<|im_sep|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<｜User｜>",
    "<｜Assistant｜>",
]
# "Ċ" is a newline and "Ġ" a space. They merge with their neighbours, as in real vocabularies.
_MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "w"), (":", "Ġ"), ("]", "Ġ"), ("Ċ", "w"), (">", "Ċ")]


def byte_level(template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (GPT-2, Llama 3, Qwen) with merges across every kind of
    boundary.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*letters, *("".join(pair) for pair in _MERGES)])
    bpe = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, _MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return _tokenizer(bpe, template)


def sentence_piece(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before the first word of a text, as SentencePiece (Llama 2,
    Mistral, Gemma) does.
    """
    letters = [*(chr(code) for code in range(33, 127)), "\n", "\t", "▁", "｜"]
    merges = [*(("▁", letter) for letter in "abcdefghijklmnopqrstuvwxyzACU["), ("\n", "\n")]
    pieces = dict.fromkeys([*letters, *("".join(pair) for pair in merges), "<unk>"])
    bpe = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unk>")
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    return _tokenizer(bpe, template)


def _tokenizer(bpe: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL})
    return tokenizer
