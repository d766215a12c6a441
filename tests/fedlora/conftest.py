"""Uploads to aggregate, and the mathematics of ALGORITHMS.md on dense float64 matrices, with no algebra of fedlora's.

Every shape is non-square and the scaling s = α/r is 4, so that a transpose or a lost scaling cannot pass.
After them, base models of several architectures: small and random, in temporary folders.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies.base import ServerState

RANK, ALPHA = 3, 12
MODULES = {"encoder.layer.0.query": (40, 23), "encoder.layer.1.mlp": (17, 53), "narrow": (9, 14)}
"""With 12 clients: 36 columns < 40 rows but not < 23 (one side reduced), not < 17, and dense on both sides."""
HEAD = {"classifier.weight": (4, 6), "classifier.bias": (4,)}


class Dense:
    """Oracles: arrays in, arrays out; `pairs` are [(B_u, A_u)], `w` the normalised weights."""

    scaling = ALPHA / RANK

    @staticmethod
    def pairs(factors: Sequence[Factors]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(f.B.double().numpy(), f.A.double().numpy()) for f in factors]

    @staticmethod
    def mean_product(pairs, w) -> np.ndarray:
        return sum(weight * (B @ A) for weight, (B, A) in zip(w, pairs, strict=True))

    @staticmethod
    def product_of_means(pairs, w) -> np.ndarray:
        mean_b = sum(weight * B for weight, (B, _) in zip(w, pairs, strict=True))
        mean_a = sum(weight * A for weight, (_, A) in zip(w, pairs, strict=True))
        return mean_b @ mean_a

    @staticmethod
    def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ vh[:rank]

    @staticmethod
    def floor(matrix: np.ndarray, rank: int) -> float:
        s = np.linalg.svd(matrix, compute_uv=False)
        return float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))

    @staticmethod
    def rho(hats: Sequence[np.ndarray], ideal: np.ndarray, w) -> float:
        square = sum(weight * np.linalg.norm(hat - ideal) ** 2 for weight, hat in zip(w, hats, strict=True))
        return float(np.sqrt(square) / np.linalg.norm(ideal))

    @staticmethod
    def alternating(pairs, w, sweeps: int = 100, tolerance: float = 1e-10):
        """FLoRA-NA by dense alternating least squares: (p, q, objective after each sweep)."""
        ideal, p, q = Dense.mean_product(pairs, w), np.array(w), np.array(w)
        objective = [np.linalg.norm(Dense.product_of_means(pairs, w) - ideal) ** 2]
        for _ in range(sweeps):
            hat_a = np.tensordot(q, np.stack([A for _, A in pairs]), 1)
            columns = np.stack([(B @ hat_a).ravel() for B, _ in pairs], axis=1)
            p = np.linalg.lstsq(columns, ideal.ravel(), rcond=None)[0]
            hat_b = np.tensordot(p, np.stack([B for B, _ in pairs]), 1)
            columns = np.stack([(hat_b @ A).ravel() for _, A in pairs], axis=1)
            q = np.linalg.lstsq(columns, ideal.ravel(), rcond=None)[0]
            objective.append(np.linalg.norm(columns @ q - ideal.ravel()) ** 2)
            if objective[-2] - objective[-1] <= tolerance * objective[-2]:
                break
        return p, q, objective

    @staticmethod
    def flora_na(pairs, w) -> np.ndarray:
        p, q, _ = Dense.alternating(pairs, w)
        hat_b = np.tensordot(p, np.stack([B for B, _ in pairs]), 1)
        return hat_b @ np.tensordot(q, np.stack([A for _, A in pairs]), 1)


class Uploads:
    """Makes uploads by seed: adapters, states and updates with unequal weights."""

    modules, rank = MODULES, RANK

    @staticmethod
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    @classmethod
    def factors(cls, shape: tuple[int, int], rank: int, generator, dtype=torch.float32) -> Factors:
        d_out, d_in = shape
        return Factors(
            torch.randn(d_out, rank, generator=generator, dtype=dtype),
            torch.randn(rank, d_in, generator=generator, dtype=dtype),
        )

    @classmethod
    def adapter(cls, seed: int, modules: Mapping[str, tuple[int, int]] = MODULES, rank: int = RANK) -> Adapter:
        g = cls.generator(seed)
        head = {name: torch.randn(shape, generator=g) for name, shape in HEAD.items()}
        return Adapter({name: cls.factors(shape, rank, g) for name, shape in modules.items()}, head)

    @classmethod
    def state(cls, seed: int = 99) -> ServerState:
        """What clients start from: A drawn by seed, B zero."""
        start = cls.adapter(seed)
        zero = {m: Factors(torch.zeros_like(f.B), f.A) for m, f in start.factors.items()}
        return ServerState(Adapter(zero, start.head))

    @staticmethod
    def example_counts(count: int) -> list[int]:
        """Unequal, and not sorted by size."""
        return [7 + (29 * u * u + 11 * u) % 37 for u in range(count)]

    @classmethod
    def list(cls, count: int, seed: int = 0, drift: float = 1.0, shared_a: Adapter | None = None) -> list[Update]:
        """`drift` is how far clients are from one common adapter; `shared_a` gives them all its A."""
        common = cls.adapter(1000 + seed)
        updates = []
        for client, examples in enumerate(cls.example_counts(count)):
            own = cls.adapter(2000 + 50 * seed + client)
            mixed = {
                m: Factors(
                    (1 - drift) * common.factors[m].B + drift * f.B,
                    shared_a.factors[m].A if shared_a else (1 - drift) * common.factors[m].A + drift * f.A,
                )
                for m, f in own.factors.items()
            }
            updates.append(Update(client, examples, Adapter(mixed, own.head)))
        return updates

    @classmethod
    def updates(cls, count: int, seed: int = 0, drift: float = 1.0, shared_a: Adapter | None = None) -> Updates:
        return Updates.collect(cls.list(count, seed, drift, shared_a))


@pytest.fixture(scope="session")
def dense() -> type[Dense]:
    return Dense


@pytest.fixture(scope="session")
def uploads() -> type[Uploads]:
    return Uploads


@pytest.fixture(scope="session")
def save():
    """`save("gpt2", folder, pad_token_id=7)`: a random model of that architecture in the folder, without tokenizer."""
    import transformers

    small = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    configs = {
        "bert": lambda: transformers.BertConfig(**small, num_attention_heads=2, max_position_embeddings=40),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=99, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=40
        ),
        "roberta": lambda: transformers.RobertaConfig(
            **small, num_attention_heads=2, max_position_embeddings=42, pad_token_id=1
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=2, eos_token_id=3
        ),
        "llama": lambda: transformers.LlamaConfig(
            **small, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=40
        ),
    }

    def to(name: str, folder: Path, **changes) -> Path:
        config = configs[name]()
        for key, value in changes.items():
            setattr(config, key, value)
        torch.manual_seed(5)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        return folder

    return to


@pytest.fixture(scope="session")
def folders(save, tmp_path_factory) -> dict[str, Path]:
    """The folder of a small random model of each architecture."""
    names = ("bert", "distilbert", "roberta", "gpt2", "llama")
    return {name: save(name, tmp_path_factory.mktemp("models") / name) for name in names}


@pytest.fixture(scope="session")
def tokens():
    """`tokens(count, length)`: random ids that the small models know, none of them padding."""

    def ids(count: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
        return torch.randint(5, 99, (count, length), generator=torch.Generator().manual_seed(seed))

    return ids


@pytest.fixture(scope="session")
def logits():
    """`logits(network, ids)`: what a classifier says of these ids, in evaluation mode."""

    def of(network, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad():
            return network.eval()(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask).logits

    return of
