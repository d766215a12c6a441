"""Tokens a second of a client's training and of writing, against loops of plain PyTorch, Transformers and PEFT.

    .venv/bin/python benchmarks/throughput.py --out docs/data/throughput.json   (a quarter of an hour)
    .venv/bin/python benchmarks/throughput.py --device cuda --dtype bf16

SmolLM2-135M (`make decoder-model`) in one process on one thread, by turns: a machine that slows down slows both. Both
train the same batches from the same adapter and must come to the same losses; both write without drawing, in fp32 the
same words.

training  a client's steps: the demo's definitions, and texts of 256 tokens of which half are trained
writing   answers to prompts of the demo, batches of 16, against `model.generate` as a person would call it
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from fedlora import seeds
from fedlora.adapter import Part
from fedlora.config import DataConfig, ModelConfig, TrainingConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.lora import LoraConfig
from fedlora.data import questions, sources, tokens
from fedlora.data.batches import Batch, pad, training_rows
from fedlora.data.tokens import Examples, Padding, TokenisedData
from fedlora.model import resolve
from fedlora.model.arithmetic import DTYPES
from fedlora.model.base import load_tokenizer
from fedlora.model.resident import ResidentModel
from fedlora.model.writing import Ids, Marks, write
from fedlora.objective.generation import OBJECTIVE
from fedlora.seeds import Turn
from fedlora.training import client

MODEL, BATCH, STEPS, PROMPTS = "smollm2-135m", 4, 6, 32
TRAINING = TrainingConfig(local_steps=STEPS, batch_size=BATCH, learning_rate=1e-4, warmup_steps=0)
HOW = GenerateConfig(max_new_tokens=32, batch_size=16)
FACTORS: frozenset[Part] = frozenset({"A", "B"})


@dataclass(frozen=True)
class Compared:
    """Both ways by turns: tokens a second in the median, and the median of the ratios."""

    case: str
    tokens: int
    ours: float
    bare: float
    ratio: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    device, config = torch.device(given.device), ModelConfig(name=MODEL, dtype=given.dtype)
    ours = ResidentModel.build(OBJECTIVE, config, LoraConfig(rank=8), [], 0, 0, device)
    bare = built(device, DTYPES[given.dtype])
    same_start(ours, bare)
    data = definitions(config)
    found = []
    long = texts(4 * STEPS * BATCH, 256)
    for case, examples in (("definitions", tokens.examples(data.train, np.arange(400))), ("256 tokens", long)):
        found.append(training(f"training, {case}", ours, bare, examples, data.padding, given.repeats))
    found.append(writing(ours, bare, data, load_tokenizer(config), given.repeats))
    if given.out:
        rows = [asdict(row) for row in found]
        given.out.write_text(json.dumps({"device": given.device, "dtype": given.dtype, "cases": rows}, indent=1) + "\n")


def compared(
    case: str, ours: Callable[[], int], bare: Callable[[], int], device: torch.device, repeats: int
) -> Compared:
    """Each once to warm up, then by turns; both return how many tokens they have worked on."""
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    done = {ours(), bare()}
    for number in range(repeats):
        both = [("ours", ours), ("bare", bare)]
        for name, once in both if number % 2 else reversed(both):
            begun = time.perf_counter()
            done.add(once())
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    assert len(done) == 1, f"{case}: the two did not do the same work"
    count = done.pop()
    speed = {name: count / statistics.median(each) for name, each in seconds.items()}
    ratio = statistics.median(b / o for o, b in zip(seconds["ours"], seconds["bare"], strict=True))
    print(f"{case:24s} {speed['ours']:7.1f} tokens/s, bare {speed['bare']:7.1f}: {ratio:.2f}×", flush=True)
    return Compared(case, count, speed["ours"], speed["bare"], ratio)


# -- training


def training(case: str, ours: ResidentModel, bare: Any, examples: Examples, padding: Padding, repeats: int) -> Compared:
    turn, start = Turn(0, 1, 0), ours.read()
    order = seeds.torch_generator(turn.seed, "batches", turn.round, turn.client)
    batches = [pad(examples, rows, padding) for rows in training_rows(examples, BATCH, STEPS, order)]
    count, losses = sum(int(batch.attention_mask.sum()) for batch in batches), {}

    def client_of_ours() -> int:
        losses["ours"] = client.train(ours, start, examples, TRAINING, turn, FACTORS, padding).losses
        return count

    def loop() -> int:
        same_start(ours, bare, start)
        losses["bare"] = by_hand(bare, batches, ours.device, ours.autocast)
        return count

    result = compared(case, client_of_ours, loop, ours.device, repeats)
    tolerance = 1e-3 if ours.dtype == "fp32" else 0.05
    assert np.allclose(losses["ours"], losses["bare"], rtol=tolerance), losses
    ours.load(start)
    return result


def by_hand(model: Any, batches: Sequence[Batch], device: torch.device, autocast: Callable[[], Any]) -> list[float]:
    """The loop that one would write: Transformers' own loss, clipping, AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, TRAINING.learning_rate, weight_decay=TRAINING.weight_decay)
    model.train()
    losses = []
    for batch in batches:
        there = batch.to(device)
        optimizer.zero_grad()
        with autocast():
            loss = model(input_ids=there.input_ids, attention_mask=there.attention_mask, labels=there.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


# -- writing


def writing(ours: ResidentModel, bare: Any, data: TokenisedData, tokenizer: Any, repeats: int) -> Compared:
    asked = questions.questions(data.test, range(PROMPTS)).asked
    prompts = [tokenizer.decode(row) for row in asked]
    marks = Marks.of(ours.peft, tokenizer)
    answers: dict[str, list[list[int]]] = {}

    def library() -> int:
        answers["ours"] = write(ours, asked, HOW, marks)
        return total(answers["ours"])

    def loop() -> int:
        answers["bare"] = generated(bare, tokenizer, prompts, marks, ours.autocast)
        return total(answers["bare"])

    same_start(ours, bare)
    result = compared("writing", library, loop, ours.device, repeats)
    assert ours.dtype != "fp32" or answers["ours"] == answers["bare"], "the two did not write the same"
    return result


def generated(
    model: Any, tokenizer: Any, prompts: Sequence[str], marks: Marks, autocast: Callable[[], Any]
) -> list[list[int]]:
    """`model.generate` on batches as they come, padded by the tokenizer."""
    tokenizer.padding_side = "left"
    model.eval()
    found = []
    for start in range(0, len(prompts), HOW.batch_size):
        batch = tokenizer(
            prompts[start : start + HOW.batch_size], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        with torch.inference_mode(), autocast():
            written = model.generate(
                **batch,
                max_new_tokens=HOW.max_new_tokens,
                do_sample=False,
                eos_token_id=list(marks.ends),
                pad_token_id=marks.pad,
            )
        for row in written[:, batch["input_ids"].shape[1] :].tolist():
            ends = [place for place, token in enumerate(row) if token in marks.ends]
            found.append(row[: ends[0]] if ends else row)
    return found


def total(answers: Sequence[Sequence[int]]) -> int:
    return sum(map(len, answers))


# -- models and texts


def built(device: torch.device, dtype: torch.dtype) -> Any:
    """The model as one would make it by hand."""
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=dtype)
    chosen = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(base, chosen).to(device)


def same_start(ours: ResidentModel, bare: Any, start: Any = None) -> None:
    """The adapter of ours (or another) on the model that was made by hand."""
    from peft import set_peft_model_state_dict

    found = (start or ours.read()).tensors()
    taken = set_peft_model_state_dict(bare, dict(found))
    assert not taken.unexpected_keys, taken.unexpected_keys


def definitions(config: ModelConfig) -> TokenisedData:
    data = DataConfig(name="wordnet-definitions", max_length=64)
    with tempfile.TemporaryDirectory() as folder:
        text = sources.finish(OBJECTIVE.draft(data, None, 0))
        return tokens.open_tokens(OBJECTIVE.tokenise(text, load_tokenizer(config), data, Path(folder)))


def texts(count: int, length: int) -> Examples:
    """Random tokens, of which the later half is trained."""
    rng = np.random.default_rng(0)
    ids: list[Ids] = [rng.integers(5, 49_000, length).astype(np.int32) for _ in range(count)]
    targets = [np.where(np.arange(length) < length // 2, -100, row).astype(np.int32) for row in ids]
    return Examples(ids, None, np.zeros(count, np.int64), np.full(count, length, np.int64), targets)


if __name__ == "__main__":
    main()
