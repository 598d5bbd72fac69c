r"""Templates: how a question becomes a prompt, what stops decoding, and where a response must put its answer.

>>> R1.extract("2 and 2 </think> <answer>4</answer>")
'4'
>>> BOXED.extract(r"2+2=4, so the answer is $\boxed{4}$.")
'4'
>>> BOXED_LINE.extract("2+2=4\n\\boxed{4}")
'4'
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

from logitmix.tasks.names import unknown_name
from logitmix.tasks.rows import Message

# A text, or TRL's conversational form: messages with a role and a content.
Prompt: TypeAlias = str | list[dict[str, str]]


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, with matching braces, or of the last `\boxed ` without braces.

    >>> last_boxed(r"so \boxed{1}, or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    rest = text[start + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        match = re.match(r"[^\s$.]+", rest)
        return match[0] if match else None
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position].strip()
    return None


def unbox(text: str) -> str:
    r"""The text with each box replaced by its content.

    >>> unbox(r"so $\boxed{1}$, that is $\boxed{\frac{1}{1}}$, or \boxed 1")
    'so $1$, that is $\\frac{1}{1}$, or 1'
    """
    opened = re.sub(rf"\\boxed\s*\{{({_balanced(8)})\}}", lambda box: box[1], text)
    return re.sub(r"\\boxed\s*", "", opened)


def _balanced(depth: int) -> str:
    """A regular expression, without backtracking, for text without a box whose braces match up to a depth."""
    inner = r"(?:[^{}\\]|\\(?!boxed).)*+"
    for _ in range(depth):
        inner = rf"(?:[^{{}}\\]|\\(?!boxed).|\{{{inner}\}})*+"
    return inner


@dataclass(frozen=True)
class Template:
    r"""A template. All fields are text, so that it can come from a config file.

    prompt_format:      `str.format` text with `{question}`
    completion_format:  `str.format` text with `{solution}` and `{answer}`: a perfect response
    pattern:            regular expression that a format-correct response matches as a whole; its group
                        `answer` is the answer
    stop:               strings that end decoding and are kept in the response; if empty, only the model's
                        end-of-sequence token ends it
    chat:               whether the prompt is a user message, rendered by the tokenizer's chat template

    Raises `ValueError` for a template that does not accept its own completions, or stops inside them.
    """

    name: str
    prompt_format: str
    completion_format: str
    pattern: str
    stop: tuple[str, ...] = ()
    chat: bool = False

    def __post_init__(self) -> None:
        for field, text, names in (
            ("prompt_format", self.prompt_format, ("question",)),
            ("completion_format", self.completion_format, ("solution", "answer")),
        ):
            missing = [name for name in names if f"{{{name}}}" not in text]
            if missing:
                raise ValueError(f"the template {self.name!r} has no {{{missing[0]}}} in its {field}; put it there")
            try:
                text.format(**dict.fromkeys(names, ""))
            except (ValueError, LookupError) as error:
                raise ValueError(
                    f"the {field} of the template {self.name!r} is not a format text ({error}); write a literal brace "
                    "twice"
                ) from error
        if "" in self.stop:
            raise ValueError(f"the template {self.name!r} has an empty stop string; leave it out")
        try:
            groups = re.compile(self.pattern).groupindex
        except re.error as error:
            raise ValueError(
                f"the pattern of the template {self.name!r} is not a regular expression: {error}"
            ) from error
        if "answer" not in groups:
            raise ValueError(f"the pattern of the template {self.name!r} has no group (?P<answer>...); add it")
        completion = self.completion("First this, then that.", "1")
        if self.extract(completion) != "1":
            raise ValueError(
                f"the template {self.name!r} does not find the answer '1' in its own completion {completion!r}; make "
                "pattern match what completion_format writes"
            )

    def prompt(self, question: str, history: Sequence[Message] = ()) -> Prompt:
        """The prompt, after the messages of `history`. Raises `ValueError` for these where the prompt is a text."""
        text = self.prompt_format.format(question=question)
        if history and not self.chat:
            raise ValueError(
                f"the question is a chat of {len(history) + 1} messages ({', '.join(role for role, _ in history)}, "
                f"user), but the template {self.name!r} asks in one text; use a chat template such as boxed"
            )
        messages = [{"role": role, "content": content} for role, content in (*history, ("user", text))]
        return messages if self.chat else text

    def completion(self, solution: str, answer: str) -> str:
        r"""A perfect response. If the answer is in a box, the solution's own boxes are opened.

        >>> BOXED.completion(r"It is $\boxed{5}$.", "5")
        'It is $5$.\n\nThe final answer is $\\boxed{5}$.'

        Raises `ValueError` where a stop string occurs before its end, which no response could get past.
        """
        if "\\boxed" in self.completion_format:
            solution = unbox(solution)
        text = self.completion_format.format(solution=solution.strip(), answer=answer.strip())
        for stop in self.stop:
            if 0 <= text.find(stop) < len(text.rstrip()) - len(stop):
                raise ValueError(
                    f"the template {self.name!r} stops at {stop!r}, which its own response to the answer {answer!r} "
                    "contains before its end; choose a stop string that only ends a response"
                )
        return text

    def answer_alone(self, answer: str) -> str:
        r"""A perfect response without a solution. Raises `ValueError` if the template has none.

        >>> ANSWER_IS.answer_alone("12")
        'The answer is 12.'
        >>> R1.answer_alone("12")
        ' </think> <answer>12</answer>'
        """
        before, _, after = self.completion_format.partition("{solution}")
        for rest in (after.lstrip(), after):  # a format may ask for a line of its own
            text = (before + rest).format(answer=answer.strip())
            if self.is_formatted(text):
                return text
        raise ValueError(
            f"the template {self.name!r} has no response of the answer {answer!r} alone; demonstrate solutions"
        )

    def through_stop(self, response: str) -> str:
        """The response up to its first stop string: a token may contain more than its end (Qwen's `>.`)."""
        ends = [response.index(stop) + len(stop) for stop in self.stop if stop in response]
        return response[: min(ends)] if ends else response

    def is_formatted(self, response: str) -> bool:
        """Whether the response is format-correct: the answer is where the template requires it, and nowhere else."""
        return self.extract(response) is not None

    def extract(self, response: str) -> str | None:
        """The text of the answer, or None if the response is not format-correct or the answer is blank."""
        match = re.fullmatch(self.pattern, response, re.DOTALL)
        return (match["answer"].strip() or None) if match else None


# One think block, one answer block, and nothing after it. Each `(?:(?!tag).)*` is text without that tag:
# an answer inside the think block, or a second answer block, leaves the response without any match.
R1 = Template(
    name="r1",
    prompt_format=(
        "The Assistant answers the User's question after thinking it through step by step inside <think> and "
        "</think> tags. It then writes ONLY the final result inside <answer> and </answer> tags, that is, "
        "<think> the reasoning </think> <answer> the final result </answer>.\n"
        "User: {question}\nAssistant: <think>"
    ),
    # The leading space keeps BPE from merging the prompt's last ">" with the solution's first character.
    completion_format=" {solution} </think> <answer>{answer}</answer>",
    pattern=r"(?:(?!</think>|</?answer>).)*</think> <answer>(?P<answer>(?:(?!</?answer>).)*)</answer>\s*",
    stop=("</answer>",),
)

# Exactly one box anywhere, which may contain another. Several boxes would let a response hedge. The text around the
# box (`$`, `\]`, a unit, a closing sentence) is free, because it differs from model to model.
BOXED = Template(
    name="boxed",
    prompt_format="{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    completion_format="{solution}\n\nThe final answer is $\\boxed{{{answer}}}$.",
    pattern=(
        rf"(?:(?!\\boxed|\\fbox).)*+\\boxed\s*\{{(?P<answer>\s*\\boxed\s*\{{{_balanced(8)}\}}\s*|{_balanced(8)})\}}"
        r"(?:(?!\\boxed|\\fbox).)*+"
    ),
    chat=True,
)

# For character-level models: one step per line, then a last line with only the box.
BOXED_LINE = Template(
    name="boxed_line",
    prompt_format="{question}=?\n",
    completion_format="{solution}\n\\boxed{{{answer}}}",
    pattern=r"(?:(?!\\boxed).)*\n\\boxed\{(?P<answer>[^{}\n]*|\\boxed\{[^{}\n]*\})\}\s*",
)

# For small instruct models: many follow this instruction, and reason in as many lines as they like before.
ANSWER_IS = Template(
    name="answer_is",
    prompt_format='{question}\n\nEnd with "The answer is" and the answer.',
    completion_format="{solution}\nThe answer is {answer}.",
    pattern=r"(?:(?![Tt]he answer is).)*+[Tt]he answer is:? *(?P<answer>(?:(?![Tt]he answer is)[^\n])+?)\.?\s*",
    chat=True,
)

TEMPLATES = {template.name: template for template in (R1, BOXED, BOXED_LINE, ANSWER_IS)}


def load_template(name_or_file: str) -> Template:
    """The template of that name, or the one in a YAML file (`.yaml`, `.yml`) that holds `Template`'s fields.

    Raises `ValueError` for an unknown name, a file that does not exist, and invalid fields.
    """
    if name_or_file.endswith((".yaml", ".yml")):
        return _read_template(Path(name_or_file))
    if name_or_file not in TEMPLATES:
        hint = f"The templates are {', '.join(TEMPLATES)}, or give a YAML file with a template's fields"
        raise unknown_name("template", name_or_file, TEMPLATES, hint)
    return TEMPLATES[name_or_file]


def _read_template(path: Path) -> Template:
    import yaml

    if not path.is_file():
        raise ValueError(f"the template file {path} does not exist; the templates are {', '.join(TEMPLATES)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the template file {path} is not YAML: {' '.join(str(error).split())}") from error
    known = {field.name: field.type for field in fields(Template)}
    if not isinstance(values, dict) or not values:
        raise ValueError(f"the template file {path} holds no fields; it needs {', '.join(known)}")
    for key, value in values.items():
        if key not in known:
            raise unknown_name("template field", str(key), known, f"Correct it in {path}")
        if key == "stop":
            values[key] = (value,) if isinstance(value, str) else tuple(value or ())
        elif not isinstance(value, bool if key == "chat" else str):
            raise ValueError(f"{key} is {value!r} in the template file {path}, but must be {known[key]}")
    missing = [name for name in ("name", "prompt_format", "completion_format", "pattern") if name not in values]
    if missing:
        raise ValueError(f"the template file {path} has no field {missing[0]!r}; add it")
    return Template(**values)
