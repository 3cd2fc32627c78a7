"""
Chat templates: the Jinja text in a model's folder that says how a conversation is written (report section 3.1).

MiMo, Qwen, Llama and DeepSeek each have one, with header tokens of their own and often a default system prompt. It is
rendered here as transformers renders it (ImmutableSandboxedEnvironment, trim_blocks, lstrip_blocks, loopcontrols, the
same globals), so that the prompt of training, evaluation and sampling is the one that vLLM or transformers will serve.

    parts(CHAT_TEMPLATE, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "<|im_end|>")
    = [("<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n", False), ("yo<|im_end|>", True), ("\\n", False)]

Text only: tokenizer.chat() makes ids of the parts. A template of somebody else's is a program. The sandbox keeps it
from files and from Python's internals, not from taking long.
"""
import datetime
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from configurator import UserError

# ChatML without a default system prompt (MiMo's README advises an empty one)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, with which some templates mark the assistant's text: no effect here."""
    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> None:
    """raise_exception of a template: it cannot write these messages."""
    raise jinja2.TemplateError(message)


def as_json(value: Any, ensure_ascii: bool = False, **how) -> str:
    """The filter tojson; Jinja's own writes <, > and & as \\u003c ..., for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """UserError for a text that is no Jinja template."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = as_json
    env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    try:
        return env.from_string(template)
    except jinja2.TemplateError as e:
        raise UserError(f"chat template: {e}") from None


def render(template: str, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False, **tokens) -> str:
    """
    The conversation as text. messages: [{"role", "content"}, ...]; add_generation_prompt: end with the header of the
    assistant's turn; tokens: bos_token, eos_token ..., which many templates write. UserError if the template fails.
    """
    try:
        return compiled(template).render(messages=messages, tools=None, documents=None,
                                         add_generation_prompt=add_generation_prompt, **tokens)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as e:
        raise UserError(f"chat template: {e}") from None


def with_system(template: str, system: str) -> str:
    """The template with `system` as the system prompt of conversations without one; "" makes an empty system turn."""
    literal = "".join(c if c.isascii() and c.isalnum() or c in " .,:;" else f"\\U{ord(c):08x}" for c in system)
    head = ("{% if not messages or messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': '"
            + literal + "'}] + messages %}{% endif %}{{ '' }}")
    return template if template.startswith(head) else head + template     # a resumed run has it already


def parts(template: str, messages: Sequence[dict[str, str]], end: str, add_generation_prompt: bool = False,
          **tokens) -> list[tuple[str, bool]]:
    """
    The conversation cut into (text, must the model learn to write it): an assistant's part is its answer with `end`,
    the text of the token that ends a turn. Before each answer stands exactly the prompt that a server would send, so
    the prompts of RL and evaluation are the prefixes of the samples of SFT.

    UserError where the template writes an earlier turn differently once the conversation has gone on (DeepSeek-R1 drops
    its <think> part): such a conversation is not one text, it has to be given as one sample per answer.
    """
    found, done = [], ""

    def put(text: str, k: int) -> None:
        nonlocal done
        if not text.startswith(done):
            raise UserError(f"message {k}: the chat template rewrites the turns before it, so the conversation is not "
                            "one text: give one sample per answer")
        if len(text) > len(done):
            found.append((text[len(done):], False))
        done = text

    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            put(render(template, messages[:k], True, **tokens), k)
            answer = written(done, render(template, messages[:k + 1], **tokens), message["content"], end)
            found.append((answer, True))
            done += answer
    whole = render(template, messages, add_generation_prompt, **tokens)
    if add_generation_prompt or not messages or messages[-1]["role"] != "assistant" or whole.startswith(done):
        put(whole, len(messages))
    return found


def written(prompt: str, text: str, content: str, end: str) -> str:
    """
    What the model must write behind the prompt: the answer as the template writes it in `text` (Llama strips it), up to
    `end`. Where the template shortens it (DeepSeek-R1 leaves out <think>) it is the content itself: the thinking is
    what SFT trains. A <think> that the prompt has opened is not written twice.
    """
    if text.startswith(prompt):
        answer = text[len(prompt):].rpartition(end)[0]
        if answer.strip() == content.strip():
            return answer + end
    for opened in ("<think>\n", "<think>"):
        if prompt.endswith(opened) and content.startswith(opened):
            return content.removeprefix(opened) + end
    return content + end
