"""`fedlora aggregate` and `fedlora merge` as a user meets them: the report, what is printed, what a failure leaves."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from fedlora.errors import RunFolderError
from fedlora.exchange import result

SHAPES = {"enc.q": (7, 5), "enc.deep.v": (4, 9)}
S = 1.5
WEIGHTS = (3, 1, 2)


def write(folder, seed, rank=2, shared_a=False, dtype=torch.float32, common=0.0):
    """A client; `common` is the share of one adapter that all have."""
    g = torch.Generator().manual_seed(seed)
    one = torch.Generator().manual_seed(99)
    tensors = {"base_model.model.head.weight": torch.randn(3, 4, generator=g)}
    for module, (d_out, d_in) in SHAPES.items():
        for part, shape in {"A": (rank, d_in), "B": (d_out, rank)}.items():
            same, own = torch.randn(shape, generator=one), torch.randn(shape, generator=g)
            mixed = same if shared_a and part == "A" else common * same + (1 - common) * own
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = mixed.to(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": S * rank, "target_modules": ["q", "v"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["head"]}))
    return folder


@pytest.fixture
def clients(tmp_path):
    """`clients((2, 3, 1))`: folders c0, c1, c2 of these ranks."""
    return lambda ranks=(2, 2, 2), **how: [write(tmp_path / f"c{u}", u, rank, **how) for u, rank in enumerate(ranks)]


@pytest.fixture
def report(fedlora, tmp_path):
    """`report("svd", folders, "--weights", "3,1,2")`: the content of the report, as strict JSON."""

    def content(strategy, folders, *words):
        place = tmp_path / "reports" / "report.json"
        code, _, err = fedlora(
            "aggregate", "--strategy", strategy, "--out", tmp_path / "out", "--report", place, *words, *folders
        )
        assert (code, err) == (0, "")
        return json.loads(place.read_text(), parse_constant=pytest.fail)

    return content


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def pairs(folders, module):
    """[(B, A)] of a module as float64 arrays."""
    name = f"base_model.model.{module}.lora_{{}}.weight"
    return [tuple(tensors_of(f)[name.format(part)].double().numpy() for part in "BA") for f in folders]


def size(folder, *parts):
    """Bytes of the tensors whose names hold one of `parts`, serialised."""
    chosen = {name: t for name, t in tensors_of(folder).items() if any(part in name for part in parts)}
    return len(save(chosen, {})) if chosen else 0


class TestBase:
    """Rows of different tokens: what a client has not trained is the base's."""

    @pytest.fixture
    def folders(self, clients):
        name = "base_model.model.embed.token_adapter.trainable_tokens_delta"
        folders = clients()
        for u, tokens in enumerate([[4, 1], [1], [1, 4]]):
            rows = torch.tensor([[10.0 * u + token, 1.0] for token in tokens])
            save_file({**tensors_of(folders[u]), name: rows}, folders[u] / "adapter_model.safetensors")
            config = json.loads((folders[u] / "adapter_config.json").read_text())
            config["trainable_token_indices"] = tokens
            (folders[u] / "adapter_config.json").write_text(json.dumps(config))
        return folders

    def test_is_asked_for(self, fedlora, tmp_path, folders):
        code, out, err = fedlora("aggregate", "--strategy", "svd", "--out", tmp_path / "out", *folders)
        assert (code, out) == (2, "")
        assert re.search(r"c1 has not trained token 4 of 'embed'.*--base", err)
        assert not (tmp_path / "out").exists()

    def test_and_read(self, fedlora, tmp_path, folders):
        (tmp_path / "base").mkdir()
        save_file({"embed.weight": torch.arange(12.0).reshape(6, 2)}, tmp_path / "base/model.safetensors")
        words = ["--weights", "3,1,2", "--base", tmp_path / "base", "--out", tmp_path / "out"]
        assert fedlora("aggregate", "--strategy", "svd", *words, *folders)[0] == 0
        (rows,) = (t for name, t in tensors_of(tmp_path / "out").items() if "tokens" in name)
        four = (3 * 4 + 1 * 8 + 2 * 24) / 6, (3 * 1 + 1 * 9 + 2 * 1) / 6
        assert rows.tolist() == [pytest.approx([(3 * 1 + 1 * 11 + 2 * 21) / 6, 1.0]), pytest.approx(list(four))]


class TestReport:
    @pytest.mark.parametrize(
        ("strategy", "ranks"), [("fedit", (2, 2, 2)), ("flexlora", (2, 3, 1)), ("local", (2, 2, 2))]
    )
    def test_rho_and_its_floor(self, report, clients, strategy, ranks):
        """Against dense float64 matrices: ‖Ŵ − W*‖/‖W*‖, root mean square over clients, and the best of their ranks."""
        folders = clients(ranks)
        found = report(strategy, folders, "--weights", "3,1,2", "--per-client")["rho"]
        w, errors, sizes, tails = np.array(WEIGHTS) / 6, [], [], []
        assert list(found["modules"]) == sorted(SHAPES)
        for module, values in found["modules"].items():
            own = pairs(folders, module)
            ideal = sum(x * B @ A for x, (B, A) in zip(w, own, strict=True))
            u, s, vh = np.linalg.svd(ideal)
            if strategy == "fedit":
                B, A = (sum(x * pair[k] for x, pair in zip(w, own, strict=True)) for k in (0, 1))
                held = [B @ A] * 3
            else:
                held = [B @ A for B, A in own]
            if strategy == "flexlora":
                held = [(u[:, :r] * s[:r]) @ vh[:r] for r in ranks]
            errors.append(sum(x * np.linalg.norm(hat - ideal) ** 2 for x, hat in zip(w, held, strict=True)))
            tails.append(sum(x * (s[r:] ** 2).sum() for x, r in zip(w, ranks, strict=True)))
            sizes.append((s**2).sum())
            assert values["rho"] == pytest.approx(np.sqrt(errors[-1] / sizes[-1]), rel=1e-5)
            assert values["floor"] == pytest.approx(np.sqrt(tails[-1] / sizes[-1]), rel=1e-5)
            assert values["effective_clients"] == pytest.approx(1 if strategy == "local" else 36 / 14)
        assert found["model"] == pytest.approx(np.sqrt(sum(errors) / sum(sizes)), rel=1e-5)
        assert found["floor"] == pytest.approx(np.sqrt(sum(tails) / sum(sizes)), rel=1e-5)
        assert found["excess"] == pytest.approx(found["model"] - found["floor"], abs=1e-12)

    def test_clients_weights_and_the_rest(self, report, clients):
        folders = clients((2, 3, 1))
        content = report("svd", folders, "--weights", "3,1,2")
        assert list(content) == ["strategy", "clients", "rho", "abo", "bytes", "seconds"]
        assert content["strategy"] == "svd"
        assert content["clients"] == [
            {"path": str(folder), "rank": rank, "weight": pytest.approx(weight / 6)}
            for folder, rank, weight in zip(folders, (2, 3, 1), WEIGHTS, strict=True)
        ]
        assert content["abo"].keys() == {"R", "P", "Q", "dispersion"}
        assert 0 < content["seconds"] < 60

    def test_weights_are_equal_without_any(self, report, clients):
        assert [c["weight"] for c in report("fedit", clients())["clients"]] == pytest.approx([1 / 3] * 3)

    def test_r_p_and_q(self, report, clients):
        folders = clients()
        found, w = report("fedit", folders, "--weights", "3,1,2")["abo"], np.array(WEIGHTS) / 6
        wanted = dict.fromkeys(found, 0.0)
        for module in SHAPES:
            own = pairs(folders, module)
            B, A = (sum(x * pair[k] for x, pair in zip(w, own, strict=True)) for k in (0, 1))
            ideal = sum(x * b @ a for x, (b, a) in zip(w, own, strict=True))
            for x, (b, a) in zip(w, own, strict=True):
                wanted["R"] += x * np.linalg.norm(B @ A - b @ a) ** 2
                wanted["P"] += x * np.linalg.norm(B - b) ** 2
                wanted["Q"] += x * np.linalg.norm(A - a) ** 2
                wanted["dispersion"] += x * np.linalg.norm(b @ a - ideal) ** 2
        assert found == pytest.approx(wanted, rel=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bytes_are_those_of_the_files(self, report, clients, tmp_path, dtype):
        folders = clients((2, 3, 1), dtype=dtype)
        found = report("zero-padding", folders, "--per-client")["bytes"]
        received = [tmp_path / "out" / f"client-{u:03d}" for u in range(3)]
        assert found == {
            "up_adapter": sum(size(folder, "lora_") for folder in folders),
            "up_head": sum(size(folder, "head") for folder in folders),
            "down_adapter": sum(size(folder, "lora_") for folder in received),
            "down_head": sum(size(folder, "head") for folder in received),
            "down_base": 0,
        }

    def test_bytes_of_what_is_not_sent(self, report, clients, tmp_path):
        """FFA-LoRA sends B alone; FLoRA's adapter follows from the seed, and its stack goes to everybody."""
        folders = clients(shared_a=True)
        found = report("ffa-lora", folders)["bytes"]
        assert found["up_adapter"] == sum(size(folder, "lora_B") for folder in folders)
        assert found["down_adapter"] == 3 * size(tmp_path / "out", "lora_B")
        (tmp_path / "out").rename(tmp_path / "before")
        found = report("flora", folders)["bytes"]
        assert found["down_adapter"] == 0
        smaller = sum(4 * min(6 * (d_out + d_in), d_out * d_in) for d_out, d_in in SHAPES.values())
        assert found["down_base"] == 3 * smaller

    def test_a_mean_of_nothing(self, report, tmp_path):
        """W* = 0 but B̄Ā is not: ρ is no number, and JSON has no infinity."""
        for u, (b, a) in enumerate([(1.0, 2.0), (2.0, -1.0)]):
            folder = write(tmp_path / f"c{u}", u)
            tensors = {name: torch.zeros_like(t) for name, t in tensors_of(folder).items()}
            tensors["base_model.model.enc.q.lora_B.weight"][0, 0] = b
            tensors["base_model.model.enc.q.lora_A.weight"][0, 0] = a
            save_file(tensors, folder / "adapter_model.safetensors")
        found = report("fedit", [tmp_path / "c0", tmp_path / "c1"])["rho"]
        assert (found["model"], found["excess"], found["floor"]) == (None, None, 0)
        assert found["modules"]["enc.q"]["rho"] is None
        assert found["modules"]["enc.deep.v"]["rho"] == 0


class TestCommand:
    def test_what_it_prints(self, fedlora, clients, tmp_path):
        code, out, err = fedlora("aggregate", "--strategy", "flora", "--out", tmp_path / "out", *clients())
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert re.fullmatch(r"flora: 3 clients, rho \S+ \(floor \S+\)", lines[0])
        assert lines[-2] == f"written           {tmp_path}/out"
        assert "fedlora merge" in lines[-1]
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "base_delta.safetensors",
            "README.md",
        }

    def test_options_ranks_and_seed(self, fedlora, clients, tmp_path):
        folders = clients()
        words = ["--ranks", "4,1,3", "--option", "energy=0.5", "--seed", 7, "--per-client"]
        assert fedlora("aggregate", "--strategy", "florist", "--out", tmp_path / "out", *words, *folders)[0] == 0
        ranks = {
            str(p.parent.name): json.loads(p.read_text())["r"] for p in tmp_path.glob("out/**/adapter_config.json")
        }
        assert ranks == {"out": 4, "client-000": 4, "client-001": 1, "client-002": 3}
        kept = load_file(tmp_path / "out/base_delta.safetensors")["enc.q.left"].shape[1]
        values = np.linalg.svd(sum(B @ A for B, A in pairs(folders, "enc.q")), compute_uv=False) ** 2
        assert kept == np.searchsorted(values.cumsum(), 0.5 * values.sum()) + 1
        again = ["--seed", 8, *words[:4], *folders]
        assert fedlora("aggregate", "--strategy", "florist", "--out", tmp_path / "other", *again)[0] == 0
        A = "base_model.model.enc.q.lora_A.weight"
        assert not torch.equal(tensors_of(tmp_path / "out")[A], tensors_of(tmp_path / "other")[A])

    @pytest.mark.parametrize("inside", [True, False])
    def test_where_the_report_goes(self, fedlora, clients, tmp_path, inside):
        """It may be part of the output, and into an empty folder that is there."""
        place = tmp_path / ("out" if inside else "elsewhere") / "sub" / "r.json"
        (tmp_path / "out").mkdir()
        code, _, err = fedlora(
            "aggregate", "--strategy", "fedit", "--out", tmp_path / "out", "--report", place, *clients()
        )
        assert (code, err) == (0, "")
        assert json.loads(place.read_text())["strategy"] == "fedit"
        assert (tmp_path / "out/adapter_config.json").exists()

    @pytest.mark.parametrize("what", ["_fill", "_write_report"])
    def test_a_failure_while_writing(self, fedlora, clients, tmp_path, monkeypatch, what):
        """The disk fills up under the folder, or under the report: neither is left."""

        def full(*arguments):
            raise OSError(28, "No space left on device")

        folders = clients()
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(result, what, full)
        words = ["--out", tmp_path / "out", "--report", tmp_path / "r.json"]
        code, out, err = fedlora("aggregate", "--strategy", "fedit", *words, *folders)
        assert (code, out) == (RunFolderError.exit_code, "")
        assert "no space left" in err
        assert sorted(tmp_path.rglob("*")) == before

    def test_nothing_to_aggregate(self, fedlora, tmp_path):
        code, _, err = fedlora("aggregate", "--strategy", "fedit", "--out", tmp_path / "out")
        assert (code, err.count("\n")) == (2, 1)
        assert "CLIENT_DIR" in err
        assert not list(tmp_path.iterdir())

    def test_the_installed_command(self, clients, tmp_path):
        """`.venv/bin/fedlora`, once with success and once refused."""
        command = [Path(sys.executable).with_name("fedlora"), "aggregate", "--strategy", "svd", "--out"]
        folders = clients()
        bad = write(tmp_path / "bad", 4, rank=3)
        (bad / "adapter_model.safetensors").write_bytes(b"\x80\x04K\x01.")
        with contextlib.ExitStack() as stack:
            runs = [
                stack.enter_context(
                    subprocess.Popen([*command, tmp_path / out, *given], stdout=-1, stderr=-1, text=True)
                )
                for out, given in (("fine", folders), ("none", [*folders, bad]))
            ]
            (out, err), (nothing, refusal) = (run.communicate(timeout=120) for run in runs)
        assert [run.returncode for run in runs] == [0, 2]
        assert (err, nothing) == ("", "")
        assert out.startswith("svd: 3 clients, rho ")
        assert refusal.startswith(f"error: {bad}/adapter_model.safetensors cannot be read as safetensors")
        assert refusal.count("\n") == 1
        assert not (tmp_path / "none").exists()
        assert not list(tmp_path.glob(".*"))


class TestMerge:
    @pytest.fixture
    def gpt2(self, tmp_path):
        """`gpt2(layers)`: the folder of a random classifier."""
        import transformers

        def folder(layers):
            config = transformers.GPT2Config(
                vocab_size=50, n_embd=16, n_layer=layers, n_head=2, n_positions=20, pad_token_id=0, num_labels=3
            )
            transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / f"gpt{layers}")
            return tmp_path / f"gpt{layers}"

        return folder

    def test_a_folder_from_elsewhere(self, fedlora, gpt2, tmp_path):
        """Once with the base it was trained on, once with a deeper one, which PEFT would only warn of."""
        import peft
        import transformers

        base = transformers.GPT2ForSequenceClassification.from_pretrained(gpt2(1))
        config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
        code, out, _ = fedlora("merge", tmp_path / "adapter", "--out", tmp_path / "plain")
        assert (code, out) == (0, f"written           {tmp_path}/plain\n")
        assert (tmp_path / "plain/model.safetensors").exists()
        code, out, err = fedlora("merge", tmp_path / "adapter", "--out", tmp_path / "no", "--base", gpt2(2))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "adapter does not fit the base model: tensor 'base_model.model.transformer.h.1" in err
        assert not (tmp_path / "no").exists()

    def test_refusals(self, fedlora, clients, tmp_path):
        folder = clients()[0]
        for words, said in [
            ([folder, "--out", folder], "c0 is there already"),
            ([folder, "--out", folder / "adapter_config.json" / "x"], "adapter_config.json is no folder"),
            ([folder, "--out", tmp_path / "out"], "does not say which model it is for"),
            ([tmp_path / "none", "--out", tmp_path / "out"], "is no PEFT adapter folder"),
        ]:
            code, out, err = fedlora("merge", *words)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert said in err
            assert not (tmp_path / "out").exists()
