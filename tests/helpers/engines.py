"""vLLM engines in this process, and the same tokens and log-probabilities from transformers."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from unittest import mock

import pytest
import torch

from logitmix.mixture.generation import default_generation_config
from tests.helpers.members import VOCAB_SIZE

# the second model runner's kernels are interpreted here, which takes a quarter of a second for each
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# of tests of both runners: what differs from another test in what the runners share, such as the architecture
SLOW_ON_SECOND_RUNNER = [pytest.mark.slow] if IS_INTERPRETED else []
TOLERANCE = 5e-5  # nats, in float32: the log-probabilities are of magnitude 10
PROMPTS = [
    [5, 6, 7, 8],
    [9, 10],
    [int(i) for i in torch.randint(3, VOCAB_SIZE, (29,), generator=torch.Generator().manual_seed(0))],
    [11, 12, 13, 14, 15, 16, 17],
]
ALPHAS = [None, 0.0, 0.3, 1.0]


def slow_on_second_runner(test):
    """Mark a test as slow where the second model runner is interpreted."""
    for mark in SLOW_ON_SECOND_RUNNER:
        test = mark(test)
    return test


freeze = gc.freeze


@contextmanager
def quick_garbage_collection() -> Iterator[None]:
    """Within the context vLLM does not undo `clean_up`'s freeze.

    It collects garbage eight times for each engine, which takes two seconds with the objects of all imported modules.
    """
    with mock.patch.object(gc, "freeze"), mock.patch.object(gc, "unfreeze"):
        yield
    gc.unfreeze()


def clean_up() -> None:
    """Clean up after an engine, so that the process can build another; what is alive then leaves the garbage."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    freeze()


@contextmanager
def engine(folder, **kwargs) -> Iterator:
    """vLLM's `LLM` of a checkpoint, shut down afterwards."""
    from vllm import LLM

    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 8}
    llm = LLM(str(folder), **(arguments | {"disable_log_stats": True, "num_gpu_blocks_override": 256} | kwargs))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        clean_up()


def model_runner(llm):
    """The model runner of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.model_runner


def scheduler(llm):
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def random_prompts(count):
    """Prompts of 2 to 21 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (2 + i % 20,), generator=generator).tolist() for i in range(count)]


def greedy_params(fields=None, **kwargs):
    """Greedy sampling parameters with log-probabilities; `fields` are the request's `alpha`, `weights` or `member`."""
    from vllm import SamplingParams

    defaults = {"temperature": 0, "max_tokens": 12, "logprobs": 0, "ignore_eos": True}
    return SamplingParams(**defaults | kwargs, extra_args=fields)


def generate(llm, prompts, params, **kwargs):
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False, **kwargs)


def session_tokens(llm, chunks):
    """The tokens after each chunk of the input of one request; `chunks` are prompts with sampling parameters.

    vLLM drops the last token before it reads the next chunk. All chunks wait from the start. The outputs are the
    engine core's: within one process, vLLM's output processor extends the scheduler's own lists.
    """
    engine, tokens, name = llm.llm_engine, [], "session"
    ends = list(accumulate(params.max_tokens for _, params in chunks))

    def add(ids, params, **kwargs):
        prompt, tasks = {"prompt_token_ids": list(ids)}, engine.get_supported_tasks()
        request = engine.input_processor.process_inputs(name, prompt, params, tasks, **kwargs)
        engine.engine_core.add_request(request)

    for ids, params in chunks:
        add(ids, params, resumable=True)
    for _ in range(10 * ends[-1]):  # steps; a session that is stuck fails below
        if len(tokens) == ends[-1]:
            break
        outputs = engine.engine_core.get_output().outputs
        tokens += [token for output in outputs if output.request_id == name for token in output.new_token_ids]
        engine.output_processor.process_outputs(outputs)  # of other requests; it does not know this one
    add([0], chunks[-1][1])  # the end of the session
    assert len(tokens) == ends[-1]
    return [tokens[end - params.max_tokens : end] for end, (_, params) in zip(ends, chunks, strict=True)]


def greedy_tokens(mixture, prompt, length, **weights):
    """The tokens that transformers generates greedily from the mixture, past its end tokens unless they are given."""
    settings = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None}
    with default_generation_config(mixture):
        ids = mixture.generate(torch.tensor([prompt]), **settings | weights)
    return ids[0, len(prompt) :].tolist()


def token_log_probs(mixture, ids, **weights):
    """The log-probability of every token but the first, under the mixture in transformers."""
    with torch.no_grad():
        log_probs = mixture(input_ids=torch.tensor([ids]), **weights).logits[0].log_softmax(-1)
    return log_probs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def log_prob_difference(mixture, prompt, output, **weights):
    """The largest difference from transformers in the log-probability of a generated or prompt token."""
    tokens = list(output.outputs[0].token_ids)
    positions = list(output.outputs[0].logprobs)
    if output.prompt_logprobs:
        positions = list(output.prompt_logprobs)[1:] + positions
    ids = prompt + tokens
    in_vllm = torch.tensor([p[t].logprob for p, t in zip(positions, ids[-len(positions) :], strict=True)])
    return (token_log_probs(mixture, ids, **weights)[-len(positions) :] - in_vllm).abs().max().item()


def assert_matches_transformers(mixture, llm, prompts=PROMPTS, requests=None, lora_request=None, **params):
    """vLLM's greedy tokens and log-probabilities are transformers', with each request's own weights."""
    requests = requests or [{} if alpha is None else {"alpha": alpha} for alpha in ALPHAS]
    params = {"max_tokens": 6 if IS_INTERPRETED else 12} | params
    greedy = [greedy_params(fields or None, **params) for fields in requests]
    outputs = generate(llm, prompts, greedy, lora_request=lora_request)
    for prompt, output, weights in zip(prompts, outputs, requests, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert tokens == greedy_tokens(mixture, prompt, len(tokens), **weights)
        assert log_prob_difference(mixture, prompt, output, **weights) < TOLERANCE


def assert_a_session_matches_transformers(mixture, llm):
    """The input of a request arrives in chunks, each at its own alpha."""
    chunks, alphas, lengths = (PROMPTS[0], PROMPTS[3], PROMPTS[1]), (0.9, 0.1, 0.5), (5, 4, 3)
    params = [greedy_params({"alpha": a}, max_tokens=n) for a, n in zip(alphas, lengths, strict=True)]
    ids: list[int] = []
    completions = session_tokens(llm, list(zip(chunks, params, strict=True)))
    for chunk, alpha, tokens in zip(chunks, alphas, completions, strict=True):
        ids += chunk
        assert tokens == greedy_tokens(mixture, ids, len(tokens), alpha=alpha)
        ids += tokens[:-1]
