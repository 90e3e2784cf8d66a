"""Tasks of encoders: classes of tags, pairs of sentences, splits by source; and their rows for the training loop."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from reqat.config.catalogue import LABELLED_TASKS
from reqat.config.errors import ReqatError
from reqat.data import classified_rows, tagged_rows
from reqat.data.packing import IGNORE
from reqat.tasks.labelled import TASKS, chosen
from reqat.tasks.labelled.brown_tagging import CLASSES, class_of


def tokenizer() -> PreTrainedTokenizerFast:
    """One piece a letter, in BERT's frame."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("nn", "noun"), ("np-tl", "noun"), ("nns$-hl", "noun"), ("nr", "noun"), ("vbd", "verb"), ("bedz*", "verb"),
        ("md*", "verb"), ("hvz", "verb"), ("jjr", "adjective"), ("rb+cs", "adverb"), ("wrb", "adverb"),
        ("ppss+bem", "pronoun"), ("wps", "pronoun"), ("ex", "pronoun"), ("at-tl", "determiner"), ("abn", "determiner"),
        ("wdt", "determiner"), ("in", "preposition"), ("cc", "conjunction"), ("cs", "conjunction"), ("cd", "number"),
        ("od", "number"), ("to", "particle"), ("rp", "particle"), ("*", "particle"), ("*-hl", "particle"),
        ("fw-in", "other"), ("uh", "other"), ("nil", "other"), ("NN", "noun"),
    ],
)  # fmt: skip
def test_tags_are_reduced_to_their_class(tag: str, expected: str) -> None:
    assert CLASSES[class_of(tag)] == expected


def test_punctuation_has_no_class() -> None:
    assert {class_of(tag) for tag in (".", ",", "--", "``", "''", "(", ")", ":", ".-hl", "---tl", "'")} == {IGNORE}
    with pytest.raises(ReqatError, match="empty tag"):
        class_of("")


def brown(n: int = 30) -> list[dict[str, object]]:
    sentence = [["The", "at"], ["dog", "nn"], ["barks", "vbz"], ["at", "in"], ["night", "nn"], [".", "."]]
    return [
        {"id": f"ca{i:02d}", "genre": "news", "sentences": [[[f"w{s}", "nn"], *sentence] for s in range(20)]}
        for i in range(n)
    ]


def test_splits_are_by_text_and_choices_by_seed() -> None:
    texts = brown()
    for name in ("brown_tagging", "brown_succession"):
        task = TASKS[name]
        train, test = (task.make(texts, split) for split in ("train", "test"))
        assert len(train) == 9 * len(test) > 0
        some = chosen(task, texts, "train", 20, seed=1)
        assert some == chosen(task, texts, "train", 20, seed=1) != chosen(task, texts, "train", 20, seed=2)
        with pytest.raises(ReqatError, match="ask for fewer"):
            chosen(task, texts, "test", 10**6, seed=0)
    mails = [{"id": f"spam-1/{i}", "label": i % 2, "text": f"text {i}"} for i in range(500)]
    parts = [TASKS["spam_assassin"].make(mails, split) for split in ("train", "test")]
    assert sum(map(len, parts)) == 500 and not set(parts[0]) & set(parts[1]) and 50 < len(parts[1]) < 150
    assert set(TASKS) == set(LABELLED_TASKS)


def test_succession_is_balanced_and_pairs_are_what_they_say() -> None:
    pairs = TASKS["brown_succession"].make(brown(), "train")
    number = [(int(a.split()[0][1:]), int(b.split()[0][1:]), label) for a, b, label in pairs]
    assert all((second == first + 1) if label else abs(second - first) > 5 for first, second, label in number)
    assert 0.4 < sum(label for *_, label in number) / len(number) < 0.6


def test_rows_have_labels_at_first_pieces_or_at_the_first_token() -> None:
    tagged = tagged_rows(tokenizer(), [(["ab", "c", "def"], [1, IGNORE, 2])], classes=3, max_tokens=16)
    assert tagged.labels[0].tolist() == [IGNORE, 1, IGNORE, IGNORE, 2, IGNORE, IGNORE, IGNORE]
    cut = tagged_rows(tokenizer(), [(["ab", "c", "def"], [1, 0, 2])], classes=3, max_tokens=5)
    assert cut.labels[0].tolist() == [IGNORE, 1, IGNORE, 0, IGNORE] and cut.ids[0][-1] == 3
    pairs = classified_rows(tokenizer(), [("ab", "c", 1), ("a", "b c d", 0)], classes=2, max_tokens=16)
    batch = pairs.batch([0, 1])
    assert batch.labels.tolist()[0][:2] == [1, IGNORE] and batch.token_types is not None
    assert batch.token_types.tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert batch.segment_ids.tolist() == [[1] * 6 + [0], [1] * 7] and batch.n_tokens == 13
    assert batch.n_response_tokens == pairs.n_labels == 2
    assert torch.equal(batch.position_ids, torch.arange(7).expand(2, 7))


def test_bad_examples_are_named() -> None:
    with pytest.raises(ReqatError, match="2 words and 1 classes"):
        tagged_rows(tokenizer(), [(["a", "b"], [0])], classes=2, max_tokens=8)
    with pytest.raises(ReqatError, match="label 7.*0 to 1"):
        classified_rows(tokenizer(), [("a", None, 7)], classes=2, max_tokens=8)
    with pytest.raises(ReqatError, match="some of the texts are pairs"):
        classified_rows(tokenizer(), [("a", None, 0), ("a", "b", 0)], classes=2, max_tokens=8)
    with pytest.raises(ReqatError, match="no label within its 2 tokens"):
        tagged_rows(tokenizer(), [(["a"], [IGNORE])], classes=2, max_tokens=2)
    for make in (tagged_rows, classified_rows):
        with pytest.raises(ReqatError, match="empty"):
            make(tokenizer(), [], classes=2, max_tokens=8)
