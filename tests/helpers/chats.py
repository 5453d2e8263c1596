"""Tiny chat models: a tokenizer with BOS, chat templates of several kinds, and transformers' own reading of a chat."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# no system role, and another name for the assistant
TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# content as a list of parts
PARTS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}:{% for part in m.content %}{{ part.text }}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
# a variable that the caller may set
THINKING = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}",
)
TEMPLATES = {"chatml": CHATML, "brackets": BRACKETS, "turns": TURNS, "parts": PARTS, "thinking": THINKING}


def chat_tokenizer(template=CHATML, eos="</s>"):
    """Bytes, with BOS before every text, as Llama's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token=eos, pad_token="<pad>", clean_up_tokenization_spaces=False,
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def _model(kind, seed, **options):
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **options,
    )  # fmt: skip
    model = kind.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.25, generator=generator)
    return model


def chat_policy(seed=0):
    """A policy that writes letters only, so that its tokens and its text say the same."""
    model = _model(AutoModelForCausalLM, seed)
    tokens = chat_tokenizer().convert_ids_to_tokens(range(model.config.vocab_size))
    with torch.no_grad():
        model.lm_head.weight[[not (token.isascii() and token.isalpha()) for token in tokens]] = 0
        model.lm_head.weight.mul_(3)
    return model


def chat_reward(seed=1):
    """A stock reward model."""
    return _model(AutoModelForSequenceClassification, seed, num_labels=1)


def save(model, tokenizer, folder: Path) -> Path:
    """Write both into a folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stock_ids(tokenizer, messages, text, *, finished, **kwargs):
    """Token ids of a chat and its reply as transformers renders them: the whole conversation, or a reply cut off."""
    if finished:
        messages = [*messages, {"role": "assistant", "content": text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=not finished, return_dict=False, **kwargs)
    return ids if finished else ids + tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def stock_reward(model, ids) -> float:
    """The stock model's own reward of token ids."""
    return float(model(input_ids=torch.tensor([list(ids)])).logits[0, 0])


def as_parts(messages):
    """The same messages with their content as one text part each."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
