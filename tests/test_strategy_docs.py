"""The pages of the strategies: there is one for each, its formulas are what really travels, its mathematics comes
through Markdown, and what the prose says of ρ holds."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from fedlora.strategies import registry
from fedlora.strategies.step import advance

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "strategies").glob("*.md"))
MATHS = [ROOT / "docs" / "strategies.md", *PAGES]
KEEPS_ALL = {"florist": {"energy": 1}, "fedmomentum": {"energy": 1}}
"""Where the formula is the most that can be sent: options under which that much is."""
HEADINGS = ["Formula", "When to use it", "Cost", "What ρ does", "Pitfalls"]
HEADINGS += ["Properties, options, refusals", "Our reading", "Paper"]


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("generate_strategies", ROOT / "docs" / "generate.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_names():
    return [name for name in registry.names() if registry.find(name).__module__.startswith("fedlora.")]


@pytest.fixture(params=own_names())
def name(request):
    return request.param


class TestPages:
    def test_every_strategy_has_one(self, name):
        page = ROOT / "docs" / "strategies" / f"{name}.md"
        assert page.exists(), f"strategy {name} has no page; write docs/strategies/{name}.md like its neighbours"

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
    def test_is_of_a_strategy_and_built_like_the_others(self, page):
        text = page.read_text()
        assert page.stem in own_names(), f"{page.name} is about no registered strategy"
        assert text.startswith(f"# `{page.stem}`\n")
        assert re.findall(r"^## (.+)$", text, flags=re.M) == HEADINGS
        arxiv = set(re.findall(r"\d{4}\.\d{5}", registry.find(page.stem).source))
        assert arxiv <= set(re.findall(r"\d{4}\.\d{5}", text.split("## Paper")[1]))

    def test_the_overview_names_every_page(self):
        guide = (ROOT / "docs" / "strategies.md").read_text().split("## How to choose")[1].split("## Properties")[0]
        left_out = {page.stem for page in PAGES} - set(re.findall(r"\(strategies/([\w-]+)\.md\)", guide))
        assert left_out <= {"zero-padding"}, "the guide should say when to take it (zero-padding is a baseline)"


class TestCosts:
    """Numbers of the tensors that travel against the formulas of the class."""

    def check(self, docs, name, ranks=None, examples=None):
        strategy = registry.make(name, KEEPS_ALL.get(name))
        found = docs.measure(strategy, ranks, examples or docs.EXAMPLES)
        assert (found.up, found.down) == pytest.approx((found.formula_up, found.formula_down))

    def test_on_the_example_of_the_docs(self, docs, name):
        self.check(docs, name)

    def test_with_two_clients(self, docs, name):
        self.check(docs, name, examples=(3, 4))

    def test_with_ranks_that_differ(self, docs, name):
        if registry.find(name).traits.one_rank:
            return
        self.check(docs, name, docs.MIXED)

    def test_where_the_dense_update_is_smaller(self, docs, name):
        self.check(docs, name, examples=range(1, 13))

    @pytest.mark.parametrize("name", KEEPS_ALL)
    def test_no_more_than_the_formula_by_default(self, docs, name):
        found = docs.measure(registry.make(name))
        assert found.down <= found.formula_down

    def test_formulas_are_shown_as_mathematics(self, docs):
        assert docs.latex("min(R*(d_out + d_in), d_out*d_in)") == r"$\min(R (d_{out} + d_{in}), d_{out} d_{in})$"
        assert docs.latex("r*d_out if odd else r*r") == r"$r d_{out}$ in odd rounds, $r^2$ in even ones"


class TestMathematicsSurvivesMarkdown:
    """GitHub reads a page as Markdown before its mathematics: what Markdown takes for its own breaks a formula."""

    @staticmethod
    def formulas(page):
        plain = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
        return plain, re.findall(r"\$[^$]+\$", plain)

    @pytest.mark.parametrize("page", MATHS, ids=lambda page: page.stem)
    def test_dollars_pair_up_and_stand_free(self, page):
        plain, formulas = self.formulas(page)
        assert plain.count("$") == 2 * len(formulas)
        for line in plain.splitlines():
            assert line.count("$") % 2 == 0, f"a formula goes over the end of a line: {line}"
            for found in re.finditer(r"(^|.)\$[^$]+\$(.|$)", line):
                assert found[1] in ("", " ", "("), f"no space before a formula: {found[0]}"
                assert not found[2].isalnum(), f"no space after a formula: {found[0]}"
                assert found[2] != "-", f"a hyphen after a formula: {found[0]}"

    @pytest.mark.parametrize("page", MATHS, ids=lambda page: page.stem)
    def test_no_character_that_markdown_takes(self, page):
        for formula in self.formulas(page)[1]:
            assert not re.search(r"\\[^A-Za-z]|[*|<>`~]|\\operatorname", formula), formula
            assert formula.count("{") == formula.count("}"), formula

    @pytest.mark.parametrize("page", MATHS, ids=lambda page: page.stem)
    def test_comes_through_a_parser_that_knows_no_mathematics(self, page):
        parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
        pieces = []
        for token in parser.parse(page.read_text()):
            pieces += [child.content if child.type == "text" else "\0" for child in token.children or []]
        shown = "".join(pieces)
        for formula in self.formulas(page)[1]:
            assert formula in shown, f"{page.name}: Markdown changes {formula}"


class TestWhatTheProseSays:
    @staticmethod
    def rho(docs, name, ranks=None, **options):
        return docs.measure(registry.make(name, options), ranks).divergence.rho

    def test_the_order_at_equal_ranks(self, docs):
        svd, na, fair, fedit = (self.rho(docs, name) for name in ("svd", "flora-na", "lora-fair", "fedit"))
        assert svd <= na <= fedit
        assert svd <= fair <= fedit

    @pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.99])
    @pytest.mark.parametrize("name", ["florist", "fedmomentum"])
    def test_a_share_of_the_energy_bounds_rho(self, docs, name, share):
        assert self.rho(docs, name, energy=share) <= (1 - share) ** 0.5 + 1e-6

    @pytest.mark.parametrize("name", ["florist", "fedmomentum"])
    def test_all_of_the_energy_is_exact(self, docs, name):
        assert self.rho(docs, name, energy=1) < 1e-6

    @pytest.mark.parametrize(("name", "options", "plain"), [("fedrot-lora", {"strength": 0}, "fedit")]
                             + [(padded, {}, "fedit") for padded in ("zero-padding", "replication")]
                             + [(cut, {}, "svd") for cut in ("flexlora", "raflora")])  # fmt: skip
    def test_what_comes_to_the_same_at_equal_ranks(self, docs, name, options, plain):
        assert self.rho(docs, name, **options) == pytest.approx(self.rho(docs, plain), abs=1e-6)

    def test_replication_does_not_aim_at_the_mean_product(self, docs):
        assert self.rho(docs, "replication", docs.MIXED) > self.rho(docs, "zero-padding", docs.MIXED)

    @pytest.mark.parametrize("name", ["svd", "flexlora"])
    def test_products_jump_at_most_twice_as_much_as_clients_differ(self, docs, name):
        found = docs.measure(registry.make(name)).divergence
        assert found.dispersion <= found.R <= 2 * found.dispersion

    def test_fedsvd_stays_in_the_span_of_its_first_rows(self, docs):
        before, updates = docs.example(registry.make("fedsvd"), None, docs.EXAMPLES)
        first = before.adapter.factors[docs.MODULE].A
        now = advance(registry.make("fedsvd"), before, updates).adapter.factors[docs.MODULE].A
        assert torch.linalg.matrix_rank(torch.cat([first, now]), rtol=1e-4) == len(first)

    def test_the_example_tells_the_gauge_apart(self, docs):
        found = {name: docs.gauge(name) for name in ("svd", "fedex-lora", "fedit", "fedrot-lora", "ffa-lora", "fed-sb")}
        assert list(found.values()) == ["yes", "yes", "no", "no", "–", "–"]
