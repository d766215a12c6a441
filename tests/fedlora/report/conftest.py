"""A made-up comparison whose numbers can be checked by hand."""

import pandas as pd
import pytest

from fedlora.report import Comparison, Excluded

ACCURACIES = {
    "svd": {0: 0.60, 1: 0.70, 2: 0.80},
    "fedit": {0: 0.58, 1: 0.66, 2: 0.74},
    "local": {0: 0.30, 1: 0.40, 2: 0.50},
}
RHO = {"svd": 0.1, "fedit": 0.4, "local": 1.8}
MODULES = ("encoder.layer.0.query", "encoder.layer.1.query")


def build(accuracies=ACCURACIES, ranks=(8,), **changes):
    """Two rounds after round 0; 1 MB a round; ρ falls by half in round two; a run per strategy, rank and seed."""
    runs, rounds, modules, configs = [], [], [], {}
    for strategy, seeds in accuracies.items():
        for rank in ranks:
            for seed, accuracy in seeds.items():
                run = f"{strategy}-{rank}-{seed}"
                score = accuracy + (rank - 8) / 100
                runs.append(
                    {
                        "run_id": run,
                        "name": f"{strategy} seed {seed}",
                        "status": "FINISHED",
                        "sweep": "s",
                        "strategy": strategy,
                        "seed": seed,
                        "partition": f"hash{seed}",
                        "digest": run,
                        "started": pd.Timestamp("2026-01-01", tz="UTC"),
                        "clients": 4,
                        "lora.rank": rank,
                        "runner.kind": "threads" if seed else "processes",
                        "final/accuracy": score,
                        "final/macro_f1": score - 0.1,
                        "final/gap": 0.05,
                    }
                )
                rho = RHO.get(strategy, 0.2)
                rounds.append(
                    {"run_id": run, "round": 0, "global/accuracy": 0.1, "bytes/total": 0.0, "time/round_s": 1.0}
                )
                for number in (1, 2):
                    rounds.append(
                        {
                            "run_id": run,
                            "round": number,
                            "global/accuracy": score * number / 2,
                            "gap/accuracy": 0.05,
                            "rho/model": rho / number,
                            "rho/floor": 0.05,
                            "abo/R": 1e-31 if strategy == "local" else 2.0,
                            "abo/P": 1.0,
                            "abo/Q": 1.0,
                            "bytes/up_adapter": 1e6,
                            "bytes/total": 1e6 * number,
                            "time/round_s": 2.0,
                        }
                    )
                    modules += [{"run_id": run, "round": number, "module": m, "rho": rho / number} for m in MODULES]
                configs[run] = {"strategy": strategy, "seed": seed, "rounds": 2, "lora.ranks": None}
    counts = [[5, 0], [1, 9], [3, 3], [0, 2]]
    parts = {f"hash{seed}": {"labels": ["a", "b"], "label_counts": counts, "partitioner": "iid"} for seed in range(3)}
    content = {
        "title": "Sweep made-up",
        "note": "a note",
        "runs": pd.DataFrame(runs),
        "rounds": pd.DataFrame(rounds),
        "modules": pd.DataFrame(modules),
        "partitions": parts,
        "configs": configs,
        "excluded": [Excluded("flora lora.ranks=[2, 4]", "skipped", "not with mixed ranks")],
    }
    return Comparison(**{**content, **changes})


@pytest.fixture(scope="session")
def comparison():
    return build()


@pytest.fixture(scope="session")
def make():
    """`make(accuracies, ranks, title=…)`."""
    return build
