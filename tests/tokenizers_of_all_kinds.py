"""Small tokenizers of every kind, trained here, and text that is hard on them."""

import json
import random
import string

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    "the",
    "of",
    "and",
    "in",
    "to",
    "a",
    "was",
    "The",
    "for",
    "on",
    "as",
    "is",
    "with",
    "by",
    "he",
    "that",
    "from",
    "at",
    "were",
    "an",
    "it",
    "his",
    "which",
    "are",
    "not",
    "or",
    "be",
    "had",
    "this",
    "film",
    "season",
]
FRAGMENTS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\n\n\n",
    "\t",
    "😀",
    "👩‍👩‍👧‍👦",
    "é",
    "e\u0301\u0301",
    "\u200b",
    "\u200d",
    "\ufeff",
    "日本",
    "語。",
    "哈",
    "12345",
    "3.14159",
    "aaaa",
    "a",
    "ab",
    "<s>",
    "</s>",
    "<mask>",
    " <mask> ",
    "of the",
    "xx",
    "...",
    "!!",
    "'s",
    "ﬁ",
    "½",
    "İ",
    "Σ",
    "\u0000",
    "\u00a0",
    "\u3000",
    "Wörld",
    "▁",
    "##ing",
    "<0x0A>",
    "\u2028",
    "👍🏽",
    "नमस्ते",
    "ไทย",
    "ـ",
    "\U0001f1e9\U0001f1ea",
]


def prose(rng, length):
    """Something like English."""
    words = [
        rng.choice(WORDS) if rng.random() < 0.6 else "".join(rng.choices("etaoinshr", k=rng.randrange(2, 9)))
        for _ in range(length // 4)
    ]
    return "".join(w + rng.choice([" ", " ", " ", " ", ", ", ". ", "\n"]) for w in words)[:length]


def nasty(rng, length):
    """Long runs without spaces, of spaces, of line breaks; emoji, half-width, combining and unassigned
    characters; special tokens.
    """
    parts, size = [], 0
    while size < length:
        kind = rng.random()
        if kind < 0.45:
            part = "".join(rng.choice([*FRAGMENTS, *WORDS]) for _ in range(rng.randrange(1, 60)))
        elif kind < 0.6:
            part = rng.choice(FRAGMENTS) * rng.randrange(1, rng.choice([10, 100, 900]))
        elif kind < 0.75:
            part = prose(rng, rng.randrange(400))
        elif kind < 0.85:
            ranges = [(32, 127), (160, 0x2000), (0x3000, 0xA000), (0x1F300, 0x1F700)]
            part = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(80)))
        else:
            part = "".join(rng.choices(rng.choice([string.digits, "ab", "a"]), k=rng.randrange(1, 600)))
        parts.append(part)
        size += len(part)
    return "".join(parts)[:length]


def _corpus():
    rng = random.Random(0)
    return [prose(rng, 200) for _ in range(150)] + [nasty(rng, 300) for _ in range(40)]


def _bpe(pre=None, normalizer=None, alphabet=(), **model):
    made = Tokenizer(models.BPE(**model))
    made.normalizer, made.pre_tokenizer = normalizer, pre
    suffix = {"end_of_word_suffix": model["end_of_word_suffix"]} if "end_of_word_suffix" in model else {}
    made.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=700,
            show_progress=False,
            initial_alphabet=list(alphabet),
            special_tokens=SPECIAL,
            **suffix,
        ),
    )
    return made


def _changed(made, **model):
    described = json.loads(made.to_str())
    described["model"] |= model
    return Tokenizer.from_str(json.dumps(described))


def _with_bytes(made):
    """As SentencePiece's: what the vocabulary lacks becomes bytes."""
    vocab = json.loads(made.to_str())["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    return _changed(made, vocab=vocab, byte_fallback=True, unk_token="<unk>", fuse_unk=True)


def _around(made, right=False):
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if right else "<s> $A",
        special_tokens=[(t, made.token_to_id(t)) for t in ("<s>", "</s>")],
    )
    return made


def _byte_level():
    return pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()


def gpt2():
    pre, alphabet = _byte_level()
    return _bpe(pre, alphabet=alphabet)


def roberta():
    made = _bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), alphabet=_byte_level()[1])
    made.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    ends = [(t, made.token_to_id(t)) for t in ("</s>", "<s>")]
    made.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=True)
    return made


def llama3():
    parts = [
        pre_tokenizers.Split(Regex(GPT4), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    made = _changed(
        _bpe(pre_tokenizers.Sequence(parts), normalizers.NFC(), _byte_level()[1]), ignore_merges=True
    )
    template = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return made


def llama2():
    """The whole text is one word, and merges may span spaces."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _around(_with_bytes(_bpe(normalizer=spaces)))


def llama2_first():
    made = _with_bytes(_bpe(pre_tokenizers.Metaspace(prepend_scheme="always", split=True)))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _around(made)


def unigram():
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=500, show_progress=False, special_tokens=SPECIAL, unk_token="<unk>"
    )
    made.train_from_iterator(_corpus(), trainer)
    return _around(made, right=True)


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        _corpus(), trainers.WordPieceTrainer(vocab_size=700, show_progress=False, special_tokens=SPECIAL)
    )
    return _around(made, right=True)


def words():
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        _corpus(), trainers.WordLevelTrainer(vocab_size=700, show_progress=False, special_tokens=SPECIAL)
    )
    return _around(made)


def clip():
    return _around(
        _bpe(
            pre_tokenizers.WhitespaceSplit(),
            normalizers.Lowercase(),
            unk_token="<unk>",
            end_of_word_suffix="</w>",
        ),
        right=True,
    )


def odd():
    parts = [
        pre_tokenizers.UnicodeScripts(),
        pre_tokenizers.Punctuation(),
        pre_tokenizers.Digits(individual_digits=True),
    ]
    clean = [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Strip()]
    made = _bpe(pre_tokenizers.Sequence(parts), normalizers.Sequence(clean), unk_token="<unk>")
    made.add_tokens(
        [AddedToken("of the", lstrip=True, rstrip=True, normalized=True), AddedToken("xx", single_word=True)]
    )
    return _around(made)


KINDS = (gpt2, roberta, llama3, llama2, llama2_first, unigram, word_piece, words, clip, odd)


def wrapped(made):
    """As transformers loads it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
