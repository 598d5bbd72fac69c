"""Which way of decoding is cheaper, by a model of what a pass costs that does not read the clock.

A pass of a member of S parameters over n tokens takes the time `S * (B_0 + n)`, in some unit: reading the weights and
starting the operations takes as long as computing `B_0` tokens. So results depend on the machine's kind, the sizes of
the members, the number of sequences and the acceptance rate so far, but never on the load of the machine.
`benchmarks/decoding.py` measures how well the choice is.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from logitmix.mixture.base import MixtureBase

MAX_DRAFTS = 8
# (tokens, tokens * parameters of a layer) whose computation takes as long as reading the weights, and as starting the
# operations of a layer
_CPU = (8.0, 1.2e7)
_GPU = (150.0, 6e10)


@dataclass
class PassCosts:
    """The cost of passes of two members.

    sizes:          the parameters that a pass of each member reads
    fixed_tokens:   `B_0`, the number of tokens whose computation costs as much as the fixed part of a pass
    """

    sizes: tuple[float, float]
    fixed_tokens: float

    @classmethod
    def of(cls, model: MixtureBase) -> "PassCosts":
        """The costs of the members of `model` on its device."""
        sizes = [_num_read_parameters(member) for member in model.members]
        by_weights, by_layer = _CPU if model.device.type == "cpu" else _GPU
        layers = sum(model.config.cache_layers)
        return cls((sizes[0], sizes[1]), by_weights + by_layer * layers / sum(sizes))

    @classmethod
    def of_large_models(cls, device_type: str) -> "PassCosts":
        """The costs of two members of one size, so large that starting their operations takes no time."""
        return cls((1.0, 1.0), (_CPU if device_type == "cpu" else _GPU)[0])

    def choose_num_drafts(
        self, num_open: int, acceptance: float, may_be_joint: bool = True, max_drafts: int = MAX_DRAFTS
    ) -> tuple[int, int] | None:
        """The numbers of drafts of the members, at most `max_drafts`, that cost least for `num_open` sequences.

        None where joint decoding costs less, if `may_be_joint`.
        """
        cheap, dear = sorted(self.sizes)
        joint = (cheap + dear) * (self.fixed_tokens + num_open)
        costs = {n: self._cost(n, num_open, acceptance, cheap, dear) for n in range(1, max_drafts + 1)}
        best = min(costs, key=lambda n: costs[n])
        if may_be_joint and costs[best] >= joint:
            return None
        return (best, 1) if self.sizes[0] < self.sizes[1] else (1, best)

    def _cost(self, num_drafts: int, num_open: int, acceptance: float, cheap: float, dear: float) -> float:
        """The cost of one token of each sequence; the cheaper member drafts `num_drafts` tokens, the other one."""
        cycle = dear * (self.fixed_tokens + (num_drafts + 1) * num_open)
        cycle += cheap * (num_drafts * (self.fixed_tokens + num_open) + num_open)
        return cycle / tokens_of_a_cycle(num_drafts, acceptance)


def tokens_of_a_cycle(num_drafts: int, acceptance: float) -> float:
    """The expected tokens of a turn of each member, one drafting N = `num_drafts` tokens and the other drafting one.

    N drafts give `1 + a + ... + a^{N-1}` tokens. After all are accepted, with probability `a^N`, the other member's
    draft gives one more token; if that draft is rejected, the next turn has N - 1 drafts. For N = 1 it is 2 / (2 - a).
    """
    N, a = num_drafts, max(acceptance, 1e-6)  # the limit at 0, where the fraction below is 0 / 0

    def tokens(n: int) -> float:
        return sum(a**i for i in range(n)) + a**n

    # the stationary probability of a turn that has one draft less
    fewer = a**N * (1 - a) / (1 - (1 - a) * (a ** (N - 1) - a**N))
    return (1 - fewer) * tokens(N) + fewer * tokens(N - 1)


def _num_read_parameters(model: PreTrainedModel) -> float:
    """Without the input embedding, of which a pass reads a few rows, unless it is the head too."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    in_head = set() if head is None else {id(p) for p in head.parameters()}
    looked_up = {id(p) for p in embedding.parameters()} - in_head
    return sum(p.numel() for p in model.parameters() if id(p) not in looked_up)
