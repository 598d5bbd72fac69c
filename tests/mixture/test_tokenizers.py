"""A tokenizer against its uses: prompts stay open, chats are rendered whole, a template's tags survive decoding."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from logitmix.mixture.generation import tokenize_prompts
from logitmix.mixture.loading import load_tokenizer
from logitmix.mixture.tokenizers import (
    get_end_of_turn_token_id,
    keep_tags,
    leave_texts_open,
    prepare_for_task,
    validate_chat_template,
    validate_texts_open,
)
from logitmix.tasks import BOXED, R1, Problem, Task, Template
from logitmix.training.sft import sft_dataset
from tests.helpers.members import character_tokenizer

BOS, EOS = 1, 2
APPENDS = "ignore:the tokenizer of .* appends"


def with_post_processor(single, wrap=lambda processor: processor):
    tokenizer = character_tokenizer()
    special = [("<pad>", 0), ("<bos>", BOS), ("<eos>", EOS)]
    tokenizer.backend_tokenizer.post_processor = wrap(TemplateProcessing(single=single, special_tokens=special))
    return tokenizer


def llama(**options):
    tokens = ["<unk>", "<s>", "</s>", "▁", *"ab12"]
    return LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], **options)


APPENDING = {
    "eos": lambda: with_post_processor("$A <eos>"),
    "bos and eos": lambda: with_post_processor("<bos> $A <eos>"),
    "two before, two after": lambda: with_post_processor("<bos> <pad> $A <eos> <pad>"),
    "eos before and after": lambda: with_post_processor("<eos> $A <eos>"),
    "in a sequence": lambda: with_post_processor("<bos> $A <eos>", lambda p: Sequence([ByteLevel(), p])),
    "llama": lambda: llama(add_eos_token=True),
    "llama with bos": lambda: llama(add_bos_token=True, add_eos_token=True),
}


@pytest.mark.filterwarnings(APPENDS)
@pytest.mark.parametrize("build", APPENDING.values(), ids=APPENDING)
def test_what_a_tokenizer_appends_is_removed_and_what_it_prepends_is_kept(build, tmp_path):
    original = build()
    plain, whole = original("ab1", add_special_tokens=False)["input_ids"], original("ab1")["input_ids"]
    start = whole.index(plain[0])
    assert whole != whole[: start + len(plain)], "it appends"
    original.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    loaded.save_pretrained(tmp_path / "again")
    for tokenizer in (loaded, leave_texts_open(build()), AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert tokenizer("ab1")["input_ids"] == whole[:start] + plain
        assert tokenizer(["ab1", "b"])["input_ids"][0] == whole[:start] + plain
    assert tokenize_prompts(build(), ["ab1"]) == [whole[:start] + plain]


@pytest.mark.parametrize("build", [character_tokenizer, lambda: with_post_processor("<bos> $A"), llama])
def test_a_tokenizer_that_appends_nothing_is_left_as_it_is(build, recwarn):
    tokenizer, before = build(), build()
    assert leave_texts_open(tokenizer) is tokenizer
    validate_texts_open(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    assert not recwarn.list


def test_a_tokenizer_whose_appended_token_is_removed_says_so():
    with pytest.warns(UserWarning, match="appends <eos> to every text"):
        leave_texts_open(with_post_processor("<bos> $A <eos>"))
    with pytest.raises(ValueError, match="appends <eos> to every prompt"):
        validate_texts_open(with_post_processor("<bos> $A <eos>"))


@pytest.mark.filterwarnings(APPENDS)
def test_sft_prompts_do_not_end_in_eos():
    tokenizer = with_post_processor("<bos> $A <eos>")
    sft_dataset([{"prompt": "1+1=", "completion": "2"}], tokenizer, max_length=8)
    assert tokenizer("1+1=")["input_ids"][-1] != EOS


# --- chats -----------------------------------------------------------------------------------------------------------

PARTS = (
    "<bos>{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = PARTS.replace("{% for part in m.content %}{{ part.text }}{% endfor %}", "{{ m.content }}")
RAISES = "{{ raise_exception('only tools may call') }}"


def chat_tokenizer(template):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (PARTS, "leaves out the text of a user's message"),
        ("<bos>{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}", "leaves out the text"),
        (RAISES, "cannot render the messages (only tools may call)"),
        ("{{ messages[0].content.strip(5) }}", "cannot render the messages"),
        ("{{ undefined.name }}", "cannot render the messages"),
        ("{% for", "cannot render the messages"),
        (None, "has no chat template"),
    ],
)
def test_a_chat_template_that_does_not_render_texts_is_refused(template, reason):
    tokenizer = chat_tokenizer(template)
    rows = [{"prompt": BOXED.prompt("1+1?"), "completion": [{"role": "assistant", "content": "2"}]}]
    for use in (
        lambda t: tokenize_prompts(t, [BOXED.prompt("1+1?")]),
        lambda t: sft_dataset(rows, t, max_length=None),
    ):
        with pytest.raises(ValueError, match=r"tokenizer|chat template") as error:
            use(tokenizer)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


def test_a_chat_template_may_need_a_system_message():
    tokenizer = chat_tokenizer(
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    validate_chat_template(tokenizer)
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert tokenize_prompts(tokenizer, [chat]) == [tokenizer("ab")["input_ids"]]
    with pytest.raises(ValueError, match="no system message"):
        tokenize_prompts(tokenizer, [chat[1:]])


@pytest.mark.parametrize("template", [RAISES, "{{ undefined.name }}", "{% for", PARTS])
def test_texts_need_no_chat_template_that_works(template):
    tokenizer = chat_tokenizer(template)
    assert tokenize_prompts(tokenizer, ["1+1="]) == [tokenizer("1+1=")["input_ids"]]
    get_end_of_turn_token_id(tokenizer)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEXTS, EOS),
        (PARTS, EOS),
        ("<bos>{{ messages[0].content }}", None),  # without the reply, BOS is no end of turn
        ("<bos>{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}<eos>", None),
        ("<bos>{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("<bos>{% for m in messages %}{{ m.content }}\t{% endfor %}", None),  # which is the unknown token here
        (RAISES, None),
    ],
)
def test_the_end_of_turn_is_the_special_token_after_the_reply(template, end):
    assert get_end_of_turn_token_id(chat_tokenizer(template)) == end


# --- tags ------------------------------------------------------------------------------------------------------------


class Sums(Task):
    name = "sums"
    template = R1

    def problems(self, split, limit=None):
        return [Problem("1+1?", "2", "1+1=2"), Problem("2+2?", "4", "2+2=4")][:limit]


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def tagged(tags, **options):
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(tags)} | options)
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        tagged(TAGS),
        tagged(["</think>"]),
        tagged(["</answer>"]),
        tagged(["<answer>", "</answer>"]),
        tagged(["</think> <answer>"]),
        tagged([], eos_token="</answer>"),
    ],
    ids=["all", "</think>", "</answer>", "answer", "one token", "EOS"],
)
def test_a_perfect_response_keeps_special_tags(tokenizer, tmp_path):
    task = Sums()
    problem = task.problems("train")[0]
    ids = tokenizer(task.demonstration(problem), add_special_tokens=False)["input_ids"]
    assert not task.grade(tokenizer.decode(ids, skip_special_tokens=True), problem).format_ok
    prepare_for_task(tokenizer, task, task.problems("train"))
    assert tokenizer(task.demonstration(problem), add_special_tokens=False)["input_ids"] == ids
    assert task.grade(tokenizer.decode(ids, skip_special_tokens=True), problem).answer_ok
    assert task.grade(tokenizer.batch_decode([ids], skip_special_tokens=True)[0], problem).answer_ok
    assert tokenizer.decode([BOS, *ids, 0], skip_special_tokens=True) == task.demonstration(problem)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    prepare_for_task(again, task, task.problems("train"))
    assert again.decode(ids, skip_special_tokens=True) == task.demonstration(problem)


def test_a_saved_tokenizer_keeps_the_tags_for_other_programs(tmp_path):
    tokenizer = tagged(TAGS)
    keep_tags(tokenizer, R1)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.decode(again(R1.completion("a", "2"))["input_ids"], skip_special_tokens=True) == R1.completion(
        "a", "2"
    )
    assert again.get_vocab() == tokenizer.get_vocab()


def test_special_tokens_that_the_template_does_not_require_stay_special():
    tokenizer = tagged([*TAGS, "<|end|>"])
    before = tokenizer.backend_tokenizer.to_str()
    keep_tags(tokenizer, BOXED)
    assert tokenizer.backend_tokenizer.to_str() == before
    tolerant = Template("mine", "{question}", "{solution}={answer}<|end|>", r".*=(?P<answer>\d+)(?:<\|end\|>)?")
    keep_tags(tokenizer, tolerant)
    assert tokenizer.backend_tokenizer.to_str() == before
    keep_tags(tokenizer, R1)
    assert {"<|end|>", "<think>"} <= set(tokenizer.all_special_tokens)


def test_a_vocabulary_without_the_tags_warns_and_names_them():
    lossy = character_tokenizer("abc0123456789+-=? ")  # without angle brackets and slashes
    with pytest.warns(UserWarning, match=r"does not keep ' </think> <answer>' and '</answer>' of the template 'r1'"):
        prepare_for_task(lossy, Sums(), Sums().problems("train"))


def test_a_tokenizer_that_loses_the_space_between_the_tags_is_refused():
    from tokenizers import AddedToken

    tokenizer = character_tokenizer()
    tokenizer.add_tokens([AddedToken("</think>", rstrip=True, special=True, normalized=False)], special_tokens=True)
    with pytest.raises(ValueError, match=r"is decoded as .*</think><answer>2</answer>"):
        prepare_for_task(tokenizer, Sums(), Sums().problems("train"))


def test_one_problem_of_unknown_characters_refuses_nothing():
    class Hearts(Sums):
        def problems(self, split, limit=None):
            return [Problem("?", "♥"), Problem("1+1?", "2", "1+1=2")]

    prepare_for_task(character_tokenizer(), Hearts(), Hearts().problems("train"))


def test_a_tokenizer_without_a_fast_version_is_refused_with_the_tags(monkeypatch):
    tokenizer = tagged(TAGS)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(ValueError, match=r"the tags '</answer>' and '</think>' and '<answer>' .* are special tokens"):
        keep_tags(tokenizer, R1)


def test_word_tokenizers_of_a_single_word_are_left_open():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1, "</s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    with pytest.warns(UserWarning, match="appends </s>"):
        leave_texts_open(tokenizer)
    assert tokenizer("word")["input_ids"] == [1]
    assert json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]["single"] == [
        {"Sequence": {"id": "A", "type_id": 0}}
    ]
