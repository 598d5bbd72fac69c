"""The model and tokenizer of the quickstart: small enough to learn arithmetic on a CPU in a minute."""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

EOS, PAD = "<|endoftext|>", "<|pad|>"


def character_tokenizer(alphabet: str) -> Qwen2Tokenizer:
    """A tokenizer with one token for each character of the (ASCII) alphabet, and tokens for EOS and padding.

    It is a Qwen2 tokenizer without merges: `AutoTokenizer` loads that class for a Qwen2 model, whatever was saved.
    """
    symbols = bytes_to_unicode()
    tokens = [EOS, PAD, *(symbols[ord(character)] for character in alphabet)]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        eos_token=EOS,
        unk_token=EOS,
        pad_token=PAD,
        padding_side="left",
    )


def tiny_model(vocab_size: int) -> Qwen2ForCausalLM:
    """A Qwen2 of about 0.3 million parameters."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.06,  # at transformers' default, 0.02, a model this small learns half as fast
            eos_token_id=0,
            pad_token_id=1,
        )
    )
