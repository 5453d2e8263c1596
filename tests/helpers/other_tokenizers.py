"""Tokenizers of every kind, trained in a moment on a few lines, and tiny models that read them."""

from functools import cache

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from helpers.tiny_models import randomise

CORPUS = [
    "Once upon a time, there was a little girl who lived in the woods with her mother and a very old dog.",
    "The dog's name was Max. It's 12 years old, isn't it? They're going to the market, and they'd like 345 apples!",
    "the then they there thereby them themselves; a an and ant any; in inn inner; lower lowest slow slower",
    "def f(x):\n    return {'a': x ** 2}\n\nUne naïve café à Ünïcödé Straße, où l'été est là.",
    "Ελληνικά русский язык עברית العربية 中文字符 日本語テキスト 한국어 हिन्दी ภาษาไทย 🙂 👩‍👩‍👧‍👦 🇫🇷 ✨",
    "e\u0301 n\u0303",
]
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>"]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _wrap(raw, **special):
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | special
    given = {name: token for name, token in names.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **given)


def byte_level(size=420, splitter=None, bos=False):
    """GPT-2-like; with ``splitter``, Llama-3-like."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if splitter is None
        else pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(splitter), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=SPECIAL[:2],
            show_progress=False,
        ),
    )
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _wrap(raw, pad_token=None, unk_token=None)


def llama_like(size=300):
    """A BPE over whole texts, spaces written ▁, unknown characters as bytes: Llama 2."""
    raw = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    # merges must not cross words while training, as SentencePiece does it
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    latin = "".join(CORPUS[:3])
    trained.train_from_iterator([latin], trainers.BpeTrainer(vocab_size=size, show_progress=False))
    import json

    state = json.loads(trained.to_str())["model"]
    tokens = [*SPECIAL, *bytes_, *state["vocab"]]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(pair) for pair in state["merges"]]
    raw.model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    raw.add_special_tokens(SPECIAL)
    return _wrap(raw)


def unigram(size=250):
    """SentencePiece's unigram model behind NFKC, spaces collapsed, EOS behind every text: T5."""
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _wrap(raw)


def word_piece(size=250):
    """BERT, lower-cased."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


KINDS = {
    "byte-level": byte_level,
    "byte-level-cl100k": lambda: byte_level(380, CL100K),
    "byte-level-bos": lambda: byte_level(340, bos=True),
    "llama": llama_like,
    "unigram": unigram,
    "word-piece": word_piece,
}


@cache
def tokenizer_of(kind):
    return KINDS[kind]()


def _config(tokenizer, **more):
    return LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=more.pop("positions", 512), bos_token_id=0,
        eos_token_id=1, **more,
    )  # fmt: skip


def policy_with(tokenizer, seed=0):
    """A tiny random causal language model for a tokenizer."""
    model = AutoModelForCausalLM.from_config(_config(tokenizer), attn_implementation="sdpa")
    return randomise(model, seed)


def reward_model_with(tokenizer, seed=1, **more):
    """A tiny random causal reward model, without a padding token."""
    config = _config(tokenizer, num_labels=1, **more)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    return randomise(model, seed)


def encoder_with(tokenizer, seed=2, positions=256):
    """A tiny random BERT with one label."""
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=positions, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval().requires_grad_(False)
