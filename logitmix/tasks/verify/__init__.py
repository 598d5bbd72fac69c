"""The verifier: is a response in the required format, and does its answer equal the gold? See docs/verifier.md."""

from logitmix.tasks.verify.grading import Grade, answers_match, extract_answer, grade

__all__ = ["Grade", "answers_match", "extract_answer", "grade"]
