"""A small study from the first run to the file of numbers, in real processes; stopped, continued, refused."""
import json
from dataclasses import replace

import pytest
import torch

from dpi_nbdev import tables
from dpi_nbdev.tables import Study, collect_study, run_study, study_rows


@pytest.fixture
def tiny(monkeypatch):
    "Three rows with tiny networks and few steps; of known cost, so that nothing is timed."
    real = study_rows

    def rows(data="digits", steps=700):
        names = ("drunet-dpi-flow", "drunet-t-map-flow", "drunet-dpi-linear-flow")
        small = {k: real(data, steps)[k] for k in names}
        return {k: replace(e, net=dict(widths=(2, 4), n_blocks=1, ones_channel=True)) for k, e in small.items()}

    monkeypatch.setattr(tables, "study_rows", rows)
    monkeypatch.setattr(tables, "step_times", lambda rows: {k: 2.0 if "dpi" in k else 1.0 for k in rows})


def test_a_study_is_run_continued_and_collected(tiny, tmp_path):
    out = run_study("digits", tmp_path / "study", seeds=1, steps=2, workers=2, n_samples=100, only="drunet-t-map-*", progress=False)
    made = sorted(p.name for p in out.glob("*--*.json"))
    assert made == ["drunet-dpi-flow--steps--0.json", "drunet-t-map-flow--steps--0.json", "drunet-t-map-flow--time--0.json"]  # the row it is compared with comes along
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*--*")}

    run_study("digits", out, seeds=1, steps=2, workers=2, n_samples=100, only="*linear*", progress=False)
    assert {n: (out / n).stat().st_mtime_ns for n in before} == before, "finished runs are not made again"
    with pytest.raises(ValueError, match="steps was 2 and is 3"):
        run_study("digits", out, seeds=1, steps=3, progress=False)
    with pytest.raises(ValueError, match="no row of 'digits' fits 'adm-"):
        run_study("digits", out, only="adm-*", progress=False)

    study = Study(collect_study(out))
    assert set(study.rows) == {"drunet-dpi-flow", "drunet-t-map-flow", "drunet-dpi-linear-flow"}
    assert [study.values("drunet-t-map-flow", "steps", b).item() for b in ("steps", "time")] == [2, 4]
    assert study.of("drunet-dpi-flow", "time") == study.of("drunet-dpi-flow")  # its time is the budget
    assert 0 <= study.values("drunet-t-map-flow", "recall").item() <= 1
    assert study.facts["floor"]["distance"] < study.values("drunet-t-map-flow", "distance").item(), "noise is farther from digits than digits"
    assert len(study.of("drunet-dpi-flow")[0]["lambda"]) == 41
    with pytest.raises(ValueError, match="no row 'nonsense'"):
        study.of("nonsense")
    text = json.loads((out / "tables.json").read_text())
    assert text["machine"] and text["environment"]["torch"] == torch.__version__


def test_rows_that_join_later_are_timed_in_proportion(tiny, tmp_path, monkeypatch):
    "The machine is three times as slow on the second day; the first day's times stand."
    run = dict(seeds=1, steps=2, workers=1, n_samples=0, progress=False)
    out = run_study("digits", tmp_path / "study", only="*dpi-flow", **run)
    monkeypatch.setattr(tables, "step_times", lambda rows: {k: 6.0 if "dpi" in k else 3.0 for k in rows})
    run_study("digits", out, only="*t-map*", **run)
    assert json.loads((out / "study.json").read_text())["times"] == {"drunet-dpi-flow": 2.0, "drunet-t-map-flow": 1.0}
    assert (out / "drunet-t-map-flow--time--0.json").exists()


def test_seeds_are_paired_by_number(tmp_path):
    "A row that lacks a seed, and a budget that is not complete yet, are compared on what both have."
    run = lambda row, budget, seed, error: dict(row=row, budget=budget, seed=seed, steps=1, errors=[error])
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(dict(runs=[run("a", "steps", 0, 8), run("a", "steps", 1, 6), run("b", "steps", 1, 8), run("b", "steps", 0, 10), run("b", "time", 1, 12), run("c", "steps", 2, 1)])))
    study = Study(path)
    assert study.values("b").tolist() == [10, 8]
    assert study.lead("a", "b") == pytest.approx((2 / 9, 0))
    assert study.values("b", budget="time").tolist() == [12], "the run at equal steps does not stand in for one at equal time"
    assert study.lead("a", "b", budget="time")[0] == 0.5
    with pytest.raises(ValueError, match="no seed in common"):
        study.lead("a", "c")


def test_nothing_to_collect(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        collect_study(tmp_path)
    with pytest.raises(FileNotFoundError, match="collect_study makes it"):
        Study(tmp_path / "tables.json")
