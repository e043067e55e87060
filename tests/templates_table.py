"""What we train on beside what the training templates of the trl package mark.

trl ships chat templates of many models, and for most a patched *training* version in which `{% generation %}` marks the
text to be trained on. Our masks are made from the plain versions. `python tests/templates_table.py` prints both side by side
as the table that stands in nbs/chat_format/20_rendering.ipynb.
"""
import re
from collections import Counter
from functools import cache
from pathlib import Path

import trl
from transformers import AutoTokenizer

import sage_finetune.chat_format.rendering as prompt
import sage_finetune.chat_format.template as template
from sage_finetune.core.errors import DataError

FOLDER = Path(trl.__file__).parent/"chat_templates"
TINY = Path(prompt.__file__).parents[1]/"models"/"tiny"

# What looks like a control token in a template.
SPECIAL = re.compile(r"""<\|[^<>|\s'"+]+\|?>|<\|"\|>|<[a-z_]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|<sop>|\[gMASK\]""")
# The beginning and the end of sequence that the models' own tokenizers have (their tokenizer_config.json on the Hub).
ENDS = {"cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"), "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gemma": ("<bos>", "<eos>"), "diffusion_gemma": ("<bos>", "<eos>"), "glm4moe": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"), "idefics3": ("<|begin_of_text|>", "<end_of_utterance>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"), "llava_next": ("<s>", "</s>"), "muse": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron": ("<s>", "<|im_end|>"), "phi3": ("<s>", "<|endoftext|>"), "qwen": (None, "<|im_end|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>")}
OTHERS = (None, "<|endoftext|>")  # a template that is not known yet


def user(content): return dict(role="user", content=content)


def system(content): return dict(role="system", content=content)


def assistant(content=None, **more): return dict(role="assistant", content=content, **more)


TOOLS = [dict(type="function", function=dict(name="look_up", description="Looks up a word.",
    parameters=dict(type="object", properties=dict(word=dict(type="string", description="the word")), required=["word"])))]
CALL = dict(type="function", id="call_1", function=dict(name="look_up", arguments=dict(word="dusk")))
FOUND = dict(role="tool", name="look_up", tool_call_id="call_1", content="the time after sunset")
TALKS = {
    "single": ([user("What colour is the sky?"), assistant("Blue, mostly.")], None),
    "multi": ([user("What colour is the sky?"), assistant("Blue."), user("And at night?"), assistant("Black."),
        user("At dusk?"), assistant("Red and gold.")], None),
    "system": ([system("Answer briefly."), user("What colour is the sky?"), assistant("Blue."), user("And at night?"), assistant("Black.")],
        None),
    "tools": ([user("What is dusk?"), assistant(tool_calls=[CALL]), FOUND, assistant("It is the time after sunset.")], TOOLS),
    "thinking": ([user("What is 2+2?"), assistant("It is 4.", reasoning_content="Two and two make four.")], None),
    "thinking in text": ([user("What is 2+2?"), assistant("<think>\nTwo and two make four.\n</think>\n\nIt is 4.")], None),
    "thinking, multi": ([user("What is 2+2?"), assistant("It is 4.", reasoning_content="Two and two make four."),
        user("And 3+3?"), assistant("It is 6.", reasoning_content="Three and three make six.")], None),
    "thinking, tools": ([user("What is dusk?"), assistant(reasoning_content="I look it up.", tool_calls=[CALL]), FOUND,
        assistant("It is the time after sunset.")], TOOLS)}


def names(): return sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))


def source(name): return (FOLDER/f"{name}.jinja").read_text(encoding="utf-8")


def training(name):
    "The version with marks: the patched one, the plain one where it has marks itself, or None"
    if (FOLDER/f"{name}_training.jinja").exists(): return source(f"{name}_training")
    return source(name) if re.search(r"\{%-?\s*generation", source(name)) else None


@cache
def tokenizer_for(name):
    "The packaged tokenizer with a template and its control tokens"
    tokenizer, text = AutoTokenizer.from_pretrained(TINY), source(name)
    bos, eos = next((ends for family, ends in ENDS.items() if name.startswith(family)), OTHERS)
    tokenizer.add_special_tokens(dict(additional_special_tokens=list(dict.fromkeys([*filter(None, (bos, eos)), *SPECIAL.findall(text)]))))
    tokenizer.add_tokens([tag for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>") if tag in text])
    tokenizer.eos_token = eos
    if bos: tokenizer.bos_token = bos
    tokenizer.chat_template = text
    return tokenizer


# ---- templates after the structure of public ones that trl does not ship, in our words ---------------------------------

PUBLIC = {
    "mistral_nemo": "{%- if messages[0]['role'] == 'system' %}{%- set first = messages[0]['content'] %}"
        "{%- set talk = messages[1:] %}{%- else %}{%- set talk = messages %}{%- endif %}"
        "{%- set asked = talk | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}{%- for m in talk %}"
        "{%- if m['role'] == 'user' %}"
        "{%- if tools and m == asked[-1] %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
        "{{- '[INST]' + (first + '\n\n' if loop.last and first is defined else '') + m['content'] + '[/INST]' }}"
        "{%- elif m['tool_calls'] %}{{- '[TOOL_CALLS][' }}{%- for call in m.tool_calls %}{{- call.function | tojson }}"
        "{%- endfor %}{{- ']' + eos_token }}"
        "{%- elif m['role'] == 'assistant' %}{{- m['content'] + eos_token }}{%- elif m['role'] == 'tool' %}"
        "{{- '[TOOL_RESULTS]' + m['content'] | tojson + '[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}",
    "reminder": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if loop.last and m.role == 'user' %} "
        "Be brief.{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "reminder_no_header": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}{% if loop.last %} Be "
        "brief.{% endif %} [/INST]{% elif m.role == 'system' %}[SYS]{{ m.content }}[/SYS]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "last_is_marked": "{% for m in messages %}<|im_start|>{{ m.role }}{% if loop.index0 == messages | length - 1 %} (last){% endif %}: "
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}",
    "nemotron_nano_2": "{{ bos_token }}<SPECIAL_10>System\n{% if messages[0].role == 'system' %}{{ messages[0].content }}"
        "{% set talk = messages[1:] %}{% else %}{% set talk = messages %}{% endif %}"
        "{% if tools %}<AVAILABLE_TOOLS>{{ tools | tojson }}</AVAILABLE_TOOLS>{% endif %}\n\n{% for m in talk %}"
        "{% if m.role == 'user' %}<SPECIAL_11>User\n{{ m.content }}\n"
        "{% elif m.role == 'tool' %}<SPECIAL_11>User\n<TOOL_RESPONSE>[{{ m.content }}]</TOOL_RESPONSE>\n{% else %}<SPECIAL_11>Assistant\n"
        "{% if m.tool_calls %}<TOOLCALL>[{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]</TOOLCALL>{% else %}"
        "{% if loop.last %}<think></think>{% endif %}{{ m.content }}{% endif %}\n<SPECIAL_12>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "<SPECIAL_11>Assistant\n{{ '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\n' }}{% endif %}",
    "r1_distill": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ (m.content or '').split('</think>')[-1] }}{{ eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
    "qwq": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ (m.content or '').split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "minimax_m2": "]~!b[{% for m in messages %}]~b]{{ 'ai' if m.role == 'assistant' else m.role }}\n"
        "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ m.content }}[e~[\n{% endfor %}{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}",
    "closed_block": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    "closed_channel": "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content }}<turn|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn>model\n<|channel>thought\n<channel|>{% endif %}",
    "closing_tag": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{{ eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜></think>{% endif %}",
    "hermes": "{{ bos_token }}<|im_start|>system\nTools: <tools> {% for tool in tools %}{% set tool = tool.function or tool %}"
        "{{ '{\"name\": \"' + tool.name + '\", \"description\": \"' + tool.description + '\", \"parameters\": ' + tool.parameters | tojson + '}' }}"
        "{% endfor %} </tools><|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"}
PUBLIC_ENDS = dict(nemotron_nano_2="<SPECIAL_12>", minimax_m2="[e~[", closed_channel="<turn|>",
    mistral_nemo="</s>", reminder_no_header="</s>")
PUBLIC_SPECIAL = re.compile(SPECIAL.pattern + r"|<SPECIAL_\d+>|\[/?(?:INST|SYS|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS)\]"
    r"|\]~!?b[\[\]]|\[e~\[|<\|turn>|<turn\|>|<\|channel>|<channel\|>")


@cache
def public_tokenizer(name):
    "The packaged tokenizer with one of them"
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens(
        dict(additional_special_tokens=list(dict.fromkeys(["<s>", "</s>", *PUBLIC_SPECIAL.findall(PUBLIC[name])]))))
    tokenizer.bos_token, tokenizer.eos_token = "<s>", PUBLIC_ENDS.get(name, "<|im_end|>")
    tokenizer.chat_template = PUBLIC[name]
    return tokenizer


# ---- both masks -------------------------------------------------------------------------------------------------------

def ours(name, kind):
    "Our examples, or the sentence that refuses the conversation"
    messages, tools = TALKS[kind]
    try: return prompt.render_all(messages, tokenizer_for(name), tools, thinking="as_is")
    except DataError as error: return str(error)


def theirs(name, kind):
    "(ids, mask) of the training version, None when it refuses the conversation; its messages may have empty text and text in parts"
    tokenizer, (messages, tools) = tokenizer_for(name), TALKS[kind]
    filled = [message | dict(content=message.get("content") or "") for message in messages]
    shape = template._in_parts if template.ChatFormat(tokenizer).in_parts else dict
    for tried in (messages, filled):
        try:
            made = tokenizer.apply_chat_template([shape(message) for message in tried], tools=tools,
                chat_template=training(name), return_assistant_tokens_mask=True, return_dict=True)
        except Exception: continue
        return made["input_ids"], made["assistant_masks"]
    return None


def marked(ids, mask):
    "The stretches of marked tokens"
    stretches = [[]]
    for token_id, one in zip(ids, mask):
        if one: stretches[-1].append(token_id)
        elif stretches[-1]: stretches.append([])
    return [stretch for stretch in stretches if stretch]


def targets(examples):
    "For each message that is trained on, the ids of its answer"
    return {turn.message: example.ids[turn.start:turn.end] for example in examples for turn in example.turns if turn.is_target}


def opening(name, kind, message):
    "What generation writes in front of an answer: the end of the generation prompt"
    tokenizer, (messages, tools) = tokenizer_for(name), TALKS[kind]
    asked = tokenizer.decode(prompt.render_prompt(messages[:message], tokenizer, tools))
    closed = template.template_text(messages[:message], tokenizer, tools)
    return asked[len(prompt.commonprefix([asked, closed])):]


# ---- why they differ --------------------------------------------------------------------------------------------------

AGREE, REFUSED = "=", "–"
REASONS = {
    "L": "trl also marks the line break behind the stop token; generation has stopped before it",
    "E": "trl also marks the end of sequence that the template puts behind the whole conversation (Phi-3); "
        "generation has stopped before it",
    "P": "trl marks tokens of the generation prompt (the header, or a thinking tag that the prompt writes); "
        "the model never has to write them",
    "X": "the template rewrites earlier answers: ours learns them in examples of their own, each as it is generated; "
        "trl marks the rewritten text",
    "R": "the template rewrites earlier answers: ours learns the same answers in examples of their own; "
        "trl's version writes them all in the last form",
    "S": "one token straddles the place where generation begins; ours is cut there, so that the prompt is a prefix of the example",
    "C": "the template writes a token behind a tool call at which generation stops (Gemma 4); ours learns it, trl does not mark it",
    "H": "behind a tool result the generation prompt has no header, so the model writes it itself; ours learns it, trl does not mark it",
    "T": "the template leaves the tool call out; ours does not train on the answer that is left empty, trl marks it",
    "K": "trl's version keeps thinking that the plain template leaves out of every answer"}
_THINKING = re.compile(r"(?:<think>)?(?:(?!<think>).)*</think>\s*|<\|channel>thought.*?<channel\|>"
    r"|<\|channel\|>analysis<\|message\|>.*?<\|end\|><\|start\|>assistant", re.DOTALL)


def unthought(text): return _THINKING.sub("", text).strip()


def answer_reasons(our, their, before, stops):
    "Why the text we train on of an answer is not the text trl marks; `before` is what stands before it in our example"
    found = set()
    if their.endswith("\n") and not our.endswith("\n"): found, their = found | {"L"}, their[:-1]
    if any(their.endswith(f"{our[-4:]}\n{stop}") for stop in stops): found, their = found | {"E"}, their[:their.rindex("\n")]
    if their.endswith(our) and before.endswith(their[:-len(our)]): return found | ({"P"} if their != our else set())
    if our == their + "<|tool_response>": return found | {"C"}
    if our == "<|turn>model\n" + their: return found | {"H"}
    if their.startswith("<|start|>assistant"): found, their = found | {"P"}, their.removeprefix("<|start|>assistant")
    for stop in stops: their, our = their.removesuffix(stop), our.removesuffix(stop)
    if our == their: return found | {"X"}  # only the stop token differs
    if unthought(our) == unthought(their): return found | {"X" if len(our) > len(their) else "K"}
    if their.endswith(our.strip()) and "</think>" in their: return found | {"K"}
    return found | {"?"}


def reasons(name, kind):
    "The reasons for which the two masks of a conversation differ, as letters; '=' when they are the same token by token"
    examples, other, tokenizer = ours(name, kind), theirs(name, kind), tokenizer_for(name)
    if isinstance(examples, str) or other is None: return REFUSED if isinstance(examples, str) and other is None else "?"
    if len(examples) == 1 and examples[0].ids == other[0] and prompt.loss_mask(examples[0]) == list(map(bool, other[1])): return AGREE
    found, stops = set(), [tokenizer.decode([stop]) for stop in prompt.stop_ids(tokenizer)] + ["<|end|>", "<|call|>"]
    marks = [tokenizer.decode(stretch) for stretch in marked(*other)]
    turns = {turn.message: (example, turn) for example in examples for turn in example.turns if turn.is_target}
    places = [at for at, message in enumerate(TALKS[kind][0]) if message["role"] == "assistant"]
    if len(marks) != len(places): return "?"
    for place, their in zip(places, marks):
        if place not in turns:
            found.add("T" if any(note.startswith("the template leaves tool calls") for note in examples[0].notes) else "?")
        else:
            example, turn = turns[place]
            found |= answer_reasons(tokenizer.decode(example.ids[turn.start:turn.end]), their,
                tokenizer.decode(example.ids[:turn.start]), stops)
    if len(examples) > 1 and "X" not in found: found.add("R")
    if len(examples) == 1 and examples[0].ids != other[0] and not found & {"X", "K"}:
        found.add("S" if tokenizer.decode(examples[0].ids) == tokenizer.decode(other[0]) else "?")
    return "".join(sorted(found)) or "?"


@cache
def comparison(): return {name: {kind: reasons(name, kind) for kind in TALKS} for name in names() if training(name) is not None}


def table():
    "The comparison as Markdown: counts, reasons, templates"
    cells = [cell for row in comparison().values() for cell in row.values()]
    counts = Counter(letter for cell in cells for letter in cell)
    more = sum(set(cell) <= set("LEP") for cell in cells)  # trl marks tokens that generation never has to write
    rest = len(cells) - cells.count(AGREE) - cells.count(REFUSED) - more
    lines = [(f"{len(comparison())} templates with marks × {len(TALKS)} conversations = {len(cells)}: "
             f"{cells.count(AGREE)} masks are the same token by token; in {more} the answers and "
             f"their stop tokens are the same and trl marks more than the model ever has to write (L, E, P alone); "
             f"{cells.count(REFUSED)} conversations are refused by both; "
             f"{rest} differ in other ways. Each difference has one or more of these reasons:"), ""]
    lines += ["| | conversations | reason |", "|---|---|---|",
        *(f"| {letter} | {counts[letter]} | {sentence} |" for letter, sentence in REASONS.items() if counts[letter]), ""]
    lines += [f"| template | {' | '.join(TALKS)} |", "|---|" + "---|" * len(TALKS),
        *(f"| {name} | {' | '.join(row.values())} |" for name, row in comparison().items())]
    return "\n".join(lines)


if __name__ == "__main__": print(table())
