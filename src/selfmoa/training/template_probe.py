"""Render a chat template where it can do no harm: in a child process with little memory and time.

Run as a program by `intake`: the template comes in on stdin, one word goes out. Jinja's immutable
sandbox keeps a template from reaching code, and nothing keeps it from multiplying a string by a
thousand million; so it is tried here first, on conversations of every shape that is asked later.
Only jinja2 is imported, so that a trial takes a tenth of a second.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import datetime
from itertools import product
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 29
"""Bytes that the child may have: some thirty times what a template of a real model needs."""
SECONDS = 3
"""Processor time that all conversations together may take; a real template takes milliseconds."""
OUTPUT = 1 << 20
"""Characters that one conversation may become."""
FINE, ESCAPES, LONG, HUNGRY = "fine", "escapes", "long", "hungry"
USER, ASSISTANT, SYSTEM = (
    {"role": role, "content": f"I am the {role}."} for role in ("user", "assistant", "system")
)
CONVERSATIONS = (
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT],
    [USER, ASSISTANT, USER],
    [SYSTEM, *[USER, ASSISTANT] * 8, USER],
)


class Generation(Extension):
    """The block `{% generation %}` that transformers marks answers with: its body as it stands."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the nodes between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """Return the sandbox that transformers renders chat templates in."""

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, **how: Any) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | how))

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    found.filters["tojson"] = to_json
    found.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime(2024, 7, 26).strftime(form),
    }
    return found


def render(text: str) -> str:
    """Render a template for every conversation; return `FINE`, or what is wrong with it.

    What a template refuses, or stumbles over, is no harm and another module's business.
    """
    template = environment().from_string(text)
    for messages, is_open in product(CONVERSATIONS, (True, False)):
        told = {"messages": messages, "add_generation_prompt": is_open}
        length = 0
        try:
            for piece in template.generate(bos_token="<s>", eos_token="</s>", **told):  # noqa: S106
                length += len(piece)
                if length > OUTPUT:
                    return LONG
        except SecurityError:
            return ESCAPES
        except (MemoryError, RecursionError):
            return HUNGRY
        except Exception:  # noqa: BLE001, S112 - whatever a template may stumble over
            continue
    return FINE


def main() -> None:
    """Render what stands on stdin, within limits, and print the finding."""
    with suppress(ImportError, ValueError, OSError):  # not every system has limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    sys.stdout.write(render(sys.stdin.read()))


if __name__ == "__main__":
    main()
