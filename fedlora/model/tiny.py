"""Makes the packaged decoder: a Llama of about a million parameters, trained a little on what nouns mean.

    python -m fedlora.model.tiny --out fedlora/assets/llama-tiny

Everything is drawn from a seed; on another machine the last bits may differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora import seeds
from fedlora.config import DataConfig
from fedlora.data import dialogues, sources
from fedlora.data.turns import IGNORED, Turns
from fedlora.errors import counted

WORDS, UNITS, LAYERS, POSITIONS = 2048, 128, 4, 512
DATA = DataConfig(name="wordnet-definitions")
STEPS, ROWS, RATE = 1200, 32, 3e-3
_LONGEST, _SCORED = 64, 128

README = """# llama-tiny

A Llama with {parameters:,} parameters ({layers} layers of {units} units, {words:,} tokens), trained from scratch for
{steps:,} steps on the packaged definitions of nouns (`wordnet-definitions`, the training split). It writes sentences
that look like definitions and know next to nothing: for tests, and to try a decoder without any download. Licence: that
of fedlora (Apache 2.0); its texts are WordNet's, see `fedlora/assets/wordnet-definitions`. Made by

    python -m fedlora.model.tiny --out fedlora/assets/llama-tiny

Loss on the test split: {loss:.3f} nats per token.
"""


def tokenizer_of(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of `WORDS` tokens, made from texts; it has no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def network() -> Any:
    """A fresh Llama, drawn by seed 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    seeds.seed_torch(0, "tiny")
    shape = {"hidden_size": UNITS, "intermediate_size": 3 * UNITS, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": POSITIONS}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**shape, **marks))


def make(out: Path, steps: int = STEPS) -> float:
    """Train it and write it to a folder; its loss on the test split, in nats per token."""
    torch.set_num_threads(1)  # the order of sums
    text = sources.finish(dialogues.read(DATA, None, 0))
    train, test = (text.tables[split]["messages"].to_pylist() for split in ("train", "test"))
    tokenizer = tokenizer_of([each["content"] for messages in train for each in messages])
    turns = Turns(tokenizer, _LONGEST, loss_on="all", too_long="cut")
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for ids, targets in _batches(turns.encode(train), steps):
        loss = _loss(model, ids, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    turns = Turns(tokenizer, _LONGEST, too_long="cut")
    found = _mean_loss(model.eval(), [row for row in turns.encode(test) if row])
    _write(model, tokenizer, out, steps, found)
    return found


def _mean_loss(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> float:
    """Over all targets of some rows, in nats."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(rows), _SCORED):
            ids, targets = _padded(rows[start : start + _SCORED])
            some = int((targets[:, 1:] != IGNORED).sum())
            total, count = total + some * float(_loss(model, ids, targets)), count + some
    return total / count


def _write(model: Any, tokenizer: Any, out: Path, steps: int, loss: float) -> None:
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    parameters = sum(each.numel() for each in model.parameters())
    shape = {"parameters": parameters, "layers": LAYERS, "units": UNITS, "words": WORDS}
    (out / "README.md").write_text(README.format(**shape, steps=steps, loss=loss), encoding="utf-8")


def _batches(rows: Sequence[tuple[list[int], list[int]] | None], steps: int) -> Iterator[tuple[Any, Any]]:
    kept, draws = [row for row in rows if row], seeds.numpy_generator(0, "tiny/batches")
    for _ in range(steps):
        yield _padded([kept[i] for i in draws.choice(len(kept), ROWS, replace=False)])


def _padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, targets = (
        nn.utils.rnn.pad_sequence([torch.tensor(row[part]) for row in rows], batch_first=True, padding_value=value)
        for part, value in ((0, 0), (1, IGNORED))
    )
    return ids, targets


def _loss(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # what pads stands behind
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    given = parser.parse_args()
    print(f"{counted(given.steps, 'step')}: loss {make(given.out, given.steps):.3f}, written to {given.out}")


if __name__ == "__main__":
    main()
