"""Tiny random classifiers saved as others publish theirs."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertJapaneseTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from training.model.base_model import STARTER_FOLDER

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXTS = ["今日は最高の一日でした", "電車が遅れて最悪", "[SEP]という文字", "猫が好き！"]


def save_bert(folder: Path, *, dtype: torch.dtype = torch.float32, ipadic_named: bool = True, **config: Any) -> Path:
    """A BERT with MeCab, ipadic and the starter's vocabulary. As bert-base-japanese v1, it may not name ipadic."""
    torch.manual_seed(3)
    network = BertForSequenceClassification(BertConfig(vocab_size=8000, **SMALL, **config))
    spread(network)
    network.to(dtype).save_pretrained(folder)
    kwargs = {"mecab_dic": "ipadic"}
    vocabulary = str(STARTER_FOLDER / "vocab.txt")
    BertJapaneseTokenizer(vocabulary, word_tokenizer_type="mecab", mecab_kwargs=kwargs).save_pretrained(str(folder))
    if not ipadic_named:
        change_json(folder / "tokenizer_config.json", mecab_kwargs=None)
    return folder


def save_roberta(folder: Path) -> Path:
    """Another architecture, with a fast tokenizer that has no MeCab."""
    torch.manual_seed(4)
    config = RobertaConfig(vocab_size=64, max_position_embeddings=66, pad_token_id=0, num_labels=2, **SMALL)
    config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    network = RobertaForSequenceClassification(config)
    spread(network)
    network.save_pretrained(folder)
    save_unigram(folder)
    return folder


def spread(network: Any) -> None:
    """Larger weights, so that texts get different logits."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() == 2:
                weight.mul_(30 if "classifier" in name else 6)


def save_unigram(folder: Path) -> None:
    """A tokenizer without MeCab, as those of newer Japanese models are."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    ends = [("<s>", 2), ("</s>", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>"
    ).save_pretrained(str(folder))


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def change_json(path: Path, **values: Any) -> None:
    """Set values in a JSON file; None removes the key."""
    written = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in written.items() if v is not None}), encoding="utf-8")
