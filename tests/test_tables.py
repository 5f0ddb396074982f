"""Small studies from the first run to the file of numbers, in real processes."""
import json
from dataclasses import replace

import pytest
import torch

from dpi_nbdev import tables
from dpi_nbdev.tables import (
    MAIN,
    STUDIES,
    Plan,
    Study,
    collect_study,
    plan_table,
    planned_jobs,
    run_study,
    study_jobs,
    study_rows,
)

PLAN = Plan(
    "digits",
    2,
    {"drunet-flow": ("t-map", "dpi")},
    {"drunet-flow": ("dpi-linear", "none")},
    seeds=2,
    n_samples=60,
)


@pytest.fixture
def tiny(monkeypatch):
    "Tiny networks of known cost, so that nothing is timed: DPI's step costs twice the t map's."
    fields, _, batch_size = tables._DATA["digits"]
    net = dict(widths=(2, 4), n_blocks=1)
    monkeypatch.setitem(tables._DATA, "digits", (fields, net, batch_size))
    cost = lambda rows: {k: 2.0 if "dpi" in k else 1.0 for k in rows}
    monkeypatch.setattr(tables, "step_times", cost)


def run(plan, out, **kw):
    return run_study(plan, out, workers=2, progress=False, **kw)


def names(folder):
    return sorted(p.stem for p in folder.glob("*--*.json"))


def test_a_study_is_run_cut_off_continued_and_collected(tiny, tmp_path):
    out, plan = tmp_path / "out", {"a": PLAN}
    run(plan, out, minutes=0)
    assert names(out / "a") == []
    with pytest.raises(FileNotFoundError, match="no finished run"):
        collect_study(out / "a")

    run(plan, out, only="*-t-map-*")
    t_map = [f"drunet-t-map-flow--steps--{seed}" for seed in (0, 1)]
    assert names(out / "a") == t_map  # its own time is the budget
    before = {p.name: p.stat().st_mtime_ns for p in (out / "a").glob("*--*")}
    early = Study(collect_study(out / "a"))
    assert ("drunet-dpi-flow", "time", 1) in early.missing
    assert early.find("drunet-dpi-flow") == []
    assert early.find("drunet-t-map-flow", "time") == early.of("drunet-t-map-flow")

    run(plan, out)
    after = {n: (out / "a" / n).stat().st_mtime_ns for n in before}
    assert after == before, "finished runs are not made again"
    study = Study(collect_study(out / "a"))
    assert study.missing == []
    assert len(study.find("drunet-dpi-linear-flow")) == 1
    assert len(study.of("drunet-dpi-flow", "time")) == 2
    steps = [study.values("drunet-dpi-flow", "steps", b).tolist() for b in ("steps", "time")]
    assert steps == [[2, 2], [1, 1]]
    assert 0 <= study.values("drunet-t-map-flow", "recall").min() <= 1
    # noise is farther from digits than digits
    assert study.facts["floor"]["distance"] < study.values("drunet-dpi-flow", "distance").min()
    assert len(study.of("drunet-dpi-flow")[0]["lambda"]) == 41
    assert study.values("drunet-dpi-flow", "validation").isfinite().all()
    assert study.facts["machine"] and study.facts["environment"]["torch"] == torch.__version__


def test_another_study_is_refused_and_more_rows_are_welcome(tiny, tmp_path):
    planned_jobs({"a": PLAN}, tmp_path)
    with pytest.raises(ValueError, match="steps was 2 and is 3"):
        planned_jobs({"a": replace(PLAN, steps=3)}, tmp_path)
    more = replace(PLAN, others={"drunet-flow": ("dpi-linear", "none", "dpi-one-s")}, seeds=5)
    assert len(planned_jobs({"a": more}, tmp_path)) > len(planned_jobs({"a": PLAN}, tmp_path))
    with pytest.raises(ValueError, match="no row of a fits 'adm-"):
        planned_jobs({"a": PLAN}, tmp_path, "adm-*")
    with pytest.raises(ValueError, match="no study 'faces'; there are digits"):
        planned_jobs("faces", tmp_path)


def test_the_most_important_runs_of_all_studies_come_first(tiny, tmp_path):
    late = replace(PLAN, others={}, seeds=1, budgets=("time",), turn=1)
    jobs = planned_jobs({"a": PLAN, "b": PLAN, "late": late}, tmp_path)
    order = [(name, "other" if "t-map" not in job[0] and "dpi-flow" not in job[0] else job[2])
             for name, _, _, job, _, _ in jobs]
    assert list(dict.fromkeys(order)) == [
        ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("late", 0), ("a", "other"), ("b", "other")]
    table = plan_table(jobs)
    assert f"| all | | {len(jobs)} |" in table
    assert "| a | drunet-dpi-flow | 4 | 2 / 1 |" in table


def test_a_run_that_fails_does_not_stop_the_others(tiny, tmp_path):
    ways = {"drunet-flow": ("ncsnv2", "t-map")}  # the first cannot be built for a flow
    plan = replace(PLAN, main=ways, others={}, seeds=1, n_samples=0)
    with pytest.raises(RuntimeError, match="failed, and left .*ncsnv2-flow--time--0.txt"):
        run({"a": plan}, tmp_path)
    assert names(tmp_path / "a") == ["drunet-t-map-flow--steps--0"]
    reason = (tmp_path / "a" / "drunet-ncsnv2-flow--time--0.txt").read_text()
    assert "NCSNv2 divides" in reason


def test_rows_that_join_later_are_timed_in_proportion(tiny, tmp_path, monkeypatch):
    "The machine is three times as slow on the second day; the first day's times stand."
    planned_jobs({"a": PLAN}, tmp_path, "*t-map*")
    slow = lambda rows: {k: 6.0 if "dpi" in k else 3.0 for k in rows}
    monkeypatch.setattr(tables, "step_times", slow)
    planned_jobs({"a": PLAN}, tmp_path, "*dpi-flow")
    times = json.loads((tmp_path / "a" / "study.json").read_text())["times"]
    assert times == {"drunet-t-map-flow": 1.0, "drunet-dpi-flow": 2.0}


def test_a_row_that_cannot_take_a_step_is_named_before_anything_is_run(tmp_path):
    ways = {"drunet-flow": ("t-map", "ncsnv2")}
    rows = study_rows(replace(PLAN, main=ways, others={}))
    with pytest.raises(ValueError, match="NCSNv2 divides"):  # it cannot be built
        tables.step_times({k: r.experiment for k, r in rows.items()}, rounds=1)
    odd = replace(rows["drunet-t-map-flow"].experiment, groups=7)  # 7 does not divide 64
    with pytest.raises(RuntimeError, match="a training step of 'odd' fails: .*divides"):
        tables.step_times({"odd": odd}, rounds=1)


def test_every_study_has_its_yardsticks_and_its_main_rows_several_seeds():
    for name, plan in STUDIES.items():
        rows = study_rows(plan)
        for row in rows:
            assert tables.reference_row(row) in rows
        jobs = study_jobs(plan, {k: 1.0 + 0.1 * i for i, k in enumerate(rows)})
        seeds = {row: {s for r, _, s in jobs if r == row} for row in rows}
        assert all(len(seeds[f"drunet-{k}-vp"]) == plan.seeds for k in MAIN)
        assert plan.seeds >= 3 or name == "long"
        for row in rows.values():
            assert row.experiment.n_validation > 0


def stored(tmp_path, *runs, missing=()):
    "A file of a study with these (row, budget, seed, error)."
    runs = [dict(row=row, budget=budget, seed=seed, steps=1, errors=[error])
            for row, budget, seed, error in runs]
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(dict(runs=runs, missing=list(missing))))
    return Study(path)


def test_seeds_are_paired_by_number(tmp_path):
    "Rows are compared on the seeds that both have; a budget that is not complete stands alone."
    study = stored(
        tmp_path,
        ("a", "steps", 0, 8), ("a", "steps", 1, 6), ("b", "steps", 1, 8),
        ("b", "steps", 0, 10), ("b", "time", 1, 12), ("c", "steps", 2, 1),
    )
    assert study.values("b").tolist() == [10, 8]
    assert study.lead("a", "b") == pytest.approx((2 / 9, 0))
    assert study.values("b", budget="time").tolist() == [12]
    assert study.lead("a", "b", budget="time")[0] == 0.5
    with pytest.raises(ValueError, match="no seed in common"):
        study.lead("a", "c")


def test_a_run_that_is_only_missing_is_not_replaced_by_another(tmp_path):
    study = stored(tmp_path, ("a", "steps", 0, 8), missing=[("a", "time", 0)])
    assert study.find("a", "time") == []
    with pytest.raises(ValueError, match="no row 'a' at equal time"):
        study.values("a", budget="time")


def test_nothing_to_collect(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        collect_study(tmp_path)
    with pytest.raises(FileNotFoundError, match="collect_study makes it"):
        Study(tmp_path / "tables.json")
