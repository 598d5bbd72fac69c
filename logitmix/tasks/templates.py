r"""Templates: how a question becomes a prompt, what stops generation, where a response must put its answer.

>>> R1.extract("2 and 2 </think> <answer>4</answer>")
'4'
>>> BOXED_LINE.extract("2+2=4\n\\boxed{4}")
'4'
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    r"""One template, all of it text, so that it can come from a config file.

    prompt_format:      `str.format` text with `{question}`
    completion_format:  `str.format` text with `{solution}` and `{answer}`: what a perfect response looks like
    pattern:            regular expression that a format-correct response matches as a whole; its group
                        `answer` is the answer
    stop:               strings that end generation; they stay in the response. Empty: the model's own
                        end-of-sequence token ends it.
    """

    name: str
    prompt_format: str
    completion_format: str
    pattern: str
    stop: tuple[str, ...] = ()

    def prompt(self, question: str) -> str:
        return self.prompt_format.format(question=question)

    def completion(self, solution: str, answer: str) -> str:
        return self.completion_format.format(solution=solution.strip(), answer=answer.strip())

    def is_formatted(self, response: str) -> bool:
        """Format-correct: the answer stands where the template requires it, and nowhere else."""
        return self.extract(response) is not None

    def extract(self, response: str) -> str | None:
        """The answer's text, or None where the response is not format-correct or its answer is blank."""
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

# For character-level models: steps on lines of their own, then a last line that holds only the box.
BOXED_LINE = Template(
    name="boxed_line",
    prompt_format="{question}=?\n",
    completion_format="{solution}\n\\boxed{{{answer}}}",
    pattern=r"(?:(?!\\boxed).)*\n\\boxed\{(?P<answer>[^{}\n]*)\}\s*",
)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, braces matched, or after the last `\boxed ` without braces.

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
