"""The tuner takes the best of its candidates and writes it; what they cost is measured elsewhere."""

import json

import pytest

from vidgen.pallas_kernels.attention import specs, tune
from vidgen.pallas_kernels.attention.specs import GENERATIONS, BlockSizes
from vidgen.pallas_kernels.tpu_static.attention import PASSES
from vidgen.pallas_kernels.tpu_static.report import Report


class Measured(Report):
    """A report whose kernels take as many cycles as it is told."""

    def kernel_cycles(self, method=None):
        assert method == "stall model"
        return self.told


@pytest.fixture
def asked(monkeypatch):
    """Jobs that were to be measured; the third of them is the best, the first does not compile."""
    jobs = []

    def measure(own, *, generation, evaluate, limit):
        assert generation == "v6e" and not evaluate and limit == 300.0
        jobs.extend(own)
        reports = [Measured(failure="" if index else "too large") for index in range(len(own))]
        for index, report in enumerate(reports):
            object.__setattr__(report, "told", 6400 if index == 2 else 12800)
        return reports

    monkeypatch.setattr(tune, "measure", measure)
    return jobs


@pytest.fixture
def table(monkeypatch, tmp_path):
    path = tmp_path / "block_sizes.json"
    path.write_text(json.dumps({"v6e": {"forward": {"128": {}, "64": "kept"}}}))
    monkeypatch.setattr(tune, "TABLE", path)
    return path


def test_the_best_is_printed_and_written(asked, table, capsys):
    options = ["--generation", "v6e", "--pass", "forward", "--head-dim", "128", "--no-masked"]
    assert tune.main([*options, "--write"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])["forward 128"]
    assert found.pop("cycles") == 100.0 and any("too large" in line for line in lines)
    assert found == asked[2].keywords["sizes"]
    assert json.loads(table.read_text())["v6e"]["forward"] == {"128": found, "64": "kept"}


def test_without_being_told_to_nothing_is_written(asked, table):
    before = table.read_text()
    assert tune.main(["--generation", "v6e", "--pass", "backward", "--head-dim", "64", "--masked"]) == 0
    assert table.read_text() == before
    assert all(job.keywords["segments"] == 8 and job.hints for job in asked)


def test_that_nothing_compiles_is_an_error(monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda jobs, **_: [Report(failure="no")] * len(jobs))
    with pytest.raises(RuntimeError, match="no candidate compiles for v6e, forward, head dim 64"):
        tune.tune("v6e", "forward", head_dim=64, masked=False)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_table_has_lines_that_the_tuner_writes(generation):
    table = json.loads((tune.pathlib.Path(specs.__file__).with_name("block_sizes.json")).read_text())
    for which in PASSES:
        lines = {
            specs.entry(dim, 16, masked): list(tune.candidates(which, head_dim=dim, masked=masked))
            for dim in tune.HEAD_DIMS
            for masked in (False, True)
        }
        found = {name: BlockSizes(**line) for name, line in table[generation][which].items()}
        assert set(found) == {*lines, "float32"}
        assert [name for name in lines if found[name] not in lines[name]] == []
