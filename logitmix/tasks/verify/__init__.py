"""The verifier: is a response in the required format, and is its answer the gold? (docs/verifier.md)"""

from logitmix.tasks.verify.grading import Grade, answers_match, extract_answer, grade, normalise

__all__ = ["Grade", "answers_match", "extract_answer", "grade", "normalise"]
