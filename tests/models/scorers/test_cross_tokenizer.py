"""A reward model with its own tokenizer: special tokens, chat template, context, and errors."""

import pytest
import torch
from tokenizers import normalizers

from helpers.chats import chat_reward, chat_tokenizer
from helpers.naive import info, reward
from helpers.other_tokenizers import byte_level, encoder_with, reward_model_with, tokenizer_of, word_piece
from rgtg.errors import DataError, PromptTooLongError, UnknownTokenError, UsageError
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.reward_model import PrefixScorer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "Who is Max?"}]


def scorer_of(kind="byte-level", template=None, trained=None, **more):
    tokenizer = byte_level() if kind == "byte-level" else tokenizer_of(kind)
    if template is not None:
        tokenizer.chat_template = template
    return CrossTokenizerScorer(
        PrefixScorer(reward_model_with(tokenizer, **more), tokenizer, info=trained, name="mine")
    )


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("byte-level", [], []), ("llama", [0], []), ("unigram", [], []), ("word-piece", [2], [3])],
)
def test_special_tokens_around_a_text(kind, before, after):
    scorer = scorer_of(kind)
    assert (scorer.before, scorer.after) == (before, after)
    (ids,) = scorer.encode([scorer.render("the dog")], [" was old"], [True])
    assert ids == scorer.tokenizer("the dog was old").input_ids


def test_a_tokenizer_that_changes_the_text_raises_an_error():
    class Odd:
        def __call__(self, text, add_special_tokens=True):
            return type("E", (), {"input_ids": [len(text), *[7] * len(text)] if add_special_tokens else [8]})()

    with pytest.raises(UsageError, match="special tokens inside a text"):
        CrossTokenizerScorer(PrefixScorer(reward_model_with(tokenizer_of("llama")), Odd()))


def test_scores_do_not_depend_on_the_batch():
    scorer = scorer_of("llama")
    assert scorer.tokenizer.pad_token_id is not None
    scorer.tokenizer.pad_token_id = None  # hidden by the mask: none is needed
    prompts, completions = ["the dog", "a", "it is"], [" was old.", " slow inn", ""]
    alone = [reward(scorer.model, scorer.tokenizer(p + c).input_ids) for p, c in zip(prompts, completions, strict=True)]
    assert scorer.score(prompts, completions, batch_size=2) == pytest.approx(alone, abs=1e-4)


@torch.no_grad()
def test_an_encoder_without_a_padding_token():
    tokenizer = word_piece()
    scorer = CrossTokenizerScorer(PrefixScorer(encoder_with(tokenizer), tokenizer))
    assert not scorer.causal
    alone = [float(scorer.model(**tokenizer(text, return_tensors="pt")).logits) for text in ("the dog was", "a")]
    tokenizer.pad_token = None
    assert scorer.score(["the dog", "a"], [" was", ""]) == pytest.approx(alone, abs=1e-5)


def test_incomplete_characters_are_removed_from_unfinished_texts_only():
    scorer = scorer_of()
    going, done = scorer.score(["a", "a"], [" dog\ufffd", " dog\ufffd"], finished=[False, True])
    assert going == pytest.approx(reward(scorer.model, scorer.tokenizer("a dog").input_ids), abs=1e-4)
    assert done == pytest.approx(reward(scorer.model, scorer.tokenizer("a dog\ufffd").input_ids), abs=1e-4)


def test_the_completion_is_the_reply_in_the_scorers_chat_template():
    scorer = scorer_of(template=TEMPLATE)
    turn = scorer.render(CHAT)
    assert (turn.text, turn.closing) == ("<user>Who is Max?<assistant>", "</s>\n")
    whole = scorer.tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": "The dog."}], tokenize=False)
    ids = scorer.tokenizer(whole, add_special_tokens=False).input_ids
    assert scorer.score([CHAT], ["The dog."]) == pytest.approx([reward(scorer.model, ids)], abs=1e-4)
    assert scorer.encode([turn], ["The"], [False]) == [scorer.tokenizer(turn.text + "The").input_ids]


@pytest.mark.parametrize(
    ("template", "trained", "closing"),
    [
        (TEMPLATE, info(), "</s>"),
        (TEMPLATE, info(append_eos=False), "</s>\n"),
        (TEMPLATE.replace("{{ eos_token }}\n", "{{ '\\n' }}"), info(), "\n</s>"),
        (TEMPLATE.replace("{{ eos_token }}\n", "<end>"), info(), "<end>"),
        (TEMPLATE.replace("{{ eos_token }}\n", "{{ '\\n' }}"), None, "\n"),
    ],
)
def test_a_reply_is_closed_as_in_training(template, trained, closing):
    assert scorer_of(template=template, trained=trained).render(CHAT).closing == closing


def test_chats_that_the_template_cannot_render_raise_an_error():
    with pytest.raises(UsageError, match=r"the scorer mine cannot read a chat: .*no chat template"):
        scorer_of().render(CHAT)
    with pytest.raises(UsageError, match="leaves the assistant's reply out"):
        scorer_of(template="{{ messages[0].content }}").render(CHAT)


def test_texts_that_exceed_the_context():
    scorer = scorer_of("llama", positions=8)
    scorer.require_room("the dog")
    with pytest.raises(PromptTooLongError, match=r"is \d+ tokens to the scorer mine, whose context of 8"):
        scorer.require_room("the dog " * 4)
    with pytest.raises(DataError, match=r"completion 2 of 2 exceeds, .* context of 8 tokens"):
        scorer.score(["a", "a"], [" dog", " dog" * 8])
    assert scorer.rewards(["a", "a"], [" dog", " dog" * 8], finished=True)[1] is None


def test_a_prompt_without_any_token_raises_an_error():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(DataError, match="no token at all"):
        CrossTokenizerScorer(PrefixScorer(reward_model_with(tokenizer), tokenizer)).require_room("  ")


def test_a_token_without_an_embedding_raises_an_error():
    tokenizer = byte_level()
    scorer = CrossTokenizerScorer(
        PrefixScorer(reward_model_with(tokenizer_of("byte-level-bos")), tokenizer, name="mine")
    )
    with pytest.raises(UnknownTokenError, match=r"the text has token \d+, and the scorer mine has embeddings for tok"):
        scorer.score([tokenizer.decode([len(tokenizer) - 1])], [" old"])


def test_another_number_of_finished_flags_raises_an_error():
    with pytest.raises(UsageError, match="finished has 1 values for 2 completions"):
        scorer_of().score(["a", "b"], ["c", "d"], finished=[True])


def test_equal_texts_have_equal_scores_in_any_batch():
    scorer = scorer_of("llama")
    texts = [" was old", " was", " was old", " was old and slow in the woods"]
    scores = scorer.score(["the dog"] * 4, texts, batch_size=2)
    assert scores[0] == scores[2] != scores[1]


def test_a_text_that_begins_with_bos_gets_no_second_one():
    scorer = CrossTokenizerScorer(PrefixScorer(chat_reward(), chat_tokenizer(), name="mine"))
    once, twice = (scorer.encode([scorer.render(text)], [" you"], [False])[0] for text in ("Hi", "<s><s>Hi"))
    assert scorer.encode([scorer.render("<s>Hi")], [" you"], [False]) == [once]
    assert twice == [scorer.tokenizer.bos_token_id, *once]
    assert scorer.score(["<s>Hi"], [" you"]) == scorer.score(["Hi"], [" you"])
    plain = scorer_of("byte-level")  # it adds none
    assert plain.encode([plain.render("<s>Hi")], [""], [False])[0].count(plain.tokenizer.bos_token_id) == 1
