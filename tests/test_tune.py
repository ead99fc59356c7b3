"""Tune: the choice is feasible, blind to the held-out half and reproducible; its parts equal brute force."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from consilience import policy, record
from consilience.cli.app import app
from consilience.draws import Draw, Problem, Verdict
from consilience.errors import InputError
from consilience.methods import register
from consilience.montecarlo.isotonic import isotonic
from consilience.replay import replay, tabulate
from consilience.report import write_tradeoff
from consilience.rules import Rule
from consilience.text.stopping.fixed import SelfConsistency
from consilience.text.voting.plurality import Plurality
from consilience.tune import FAMILIES, LEAST, Candidate, Figures, Survey, candidates, drop_figures, survey, tune
from consilience.tune.search import cheapest_within, mark_frontier

FEW = ("one", "sc", "asc")


def problems(count: int, draws: int, seed: int = 0, right: float = 0.6, gold: bool = True, **fields: float) -> list:
    """Problems whose draws say "1" (right) with a chance of their own around ``right``, else 2 to 4."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        chance = float(np.clip(right + generator.normal(0, 0.25), 0, 1))
        said = np.where(generator.random(draws) < chance, 1, generator.integers(2, 5, draws))
        given = [Draw(text="", answer=str(answer), **fields) for answer in said]
        made.append(
            Problem(id=str(number), question=f"q{number}?", kind="number", answer="1" if gold else None, draws=given)
        )
    return made


@pytest.fixture(scope="module")
def surveyed() -> tuple[list[Problem], Survey]:
    made = problems(120, 12)
    return made, survey(made, families=FEW, repeats=10)


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "consilience", "tune", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


# ------------------------------------------------------------------------------------------------------- parts

NUMBERS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=12
)  # few values, so that ties are common


@settings(deadline=None)
@given(NUMBERS)
def test_isotonic_is_the_least_squares_fit(rows: list[tuple[int, int, int]]) -> None:
    """Against the max-min formula: f(x_i) = max over a <= i of min over b >= i of the mean of x_a .. x_b."""
    x, y, w = (np.array(column, float) for column in zip(*rows, strict=True))
    knots, values = isotonic(x, y, w)
    assert (np.diff(knots) > 0).all()
    assert (np.diff(values) >= 0).all()
    places = np.unique(x)

    def mean(a: int, b: int) -> float:
        chosen = (x >= places[a]) & (x <= places[b])
        return float((w * y)[chosen].sum() / w[chosen].sum())

    size = len(places)
    for i, place in enumerate(places):
        best = max(min(mean(a, b) for b in range(i, size)) for a in range(i + 1))
        assert np.interp(place, knots, values) == pytest.approx(best)


def test_isotonic_refuses_what_it_cannot_fit() -> None:
    for x, y, w in [([], [], []), ([1.0], [1.0, 2.0], [1.0]), ([np.nan], [1.0], [1.0]), ([1.0], [1.0], [0.0])]:
        with pytest.raises(ValueError, match=r"x|y"):
            isotonic(x, y, w)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 40, 100])
def test_candidates_ask_for_no_more_than_there_is(most: int) -> None:
    rules = candidates(most)
    assert all(rule.max <= most for rule in rules)
    assert len({rule.name for rule in rules}) == len(rules)
    assert [policy.parse(rule.name) for rule in rules] == rules
    assert f"sc:n={most}" in {rule.name for rule in rules}


def test_every_family_has_policies() -> None:
    for name, families in FAMILIES.items():
        if not {family.stop for family in families} <= set(register()):
            continue
        specs = [spec for family in families for spec in family.specs(40)]
        assert candidates(40, [name]), name
        for spec in specs:
            policy.parse(spec)  # at 40 draws no combination of the table is refused
    with pytest.raises(InputError, match="unknown family 'nonsense'"):
        candidates(40, ["nonsense"])


def figures(cost: float, accuracy: float, bound: float = 0.0, count: int = 50) -> Figures:
    return Figures(count, accuracy, (0, 1), 0.0, (-1, 1), bound, cost, cost, 0.0)


def candidate(index: int, *values: float) -> Candidate:
    made = figures(*values)
    return Candidate(Rule(f"p{index}", SelfConsistency(), Plurality()), made, made)


POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=15)


@settings(deadline=None)
@given(POINTS)
def test_the_frontier_is_the_pareto_set(points: list[tuple[int, int]]) -> None:
    marked = mark_frontier([candidate(i, cost, share / 6) for i, (cost, share) in enumerate(points)])

    def dominated(cost: int, share: int) -> bool:
        return any(c <= cost and s >= share and (c, s) != (cost, share) for c, s in points)

    expected = {point for point in points if not dominated(*point)}
    found = [point for point, one in zip(points, marked, strict=True) if one.frontier]
    assert len(found) == len(set(found))
    assert set(found) == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-5, 5)), max_size=12), st.integers(0, 5))
def test_the_choice_is_the_cheapest_that_is_feasible(rows: list[tuple[int, int]], limit: int) -> None:
    full = candidate(0, 6, 0.5)
    listed = [full, *(candidate(i, cost, 0.5, bound / 100) for i, (cost, bound) in enumerate(rows, 1))]
    chosen = cheapest_within(listed, limit / 100)
    eligible = [cost for cost, bound in rows if bound <= limit and cost < 6]
    assert (chosen.search.cost if chosen else None) == min(eligible, default=None)
    few = [replace(one, search=replace(one.search, problems=LEAST - 1)) for one in listed]
    assert cheapest_within(few, limit / 100) is None


def test_the_bound_is_students_where_the_answers_differ_as_much_as_the_drops_vary() -> None:
    from scipy import stats

    drops = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 80, p=[0.2, 0.4, 0.4])
    mean, interval, bound = drop_figures(drops, np.zeros(80))
    test = stats.ttest_1samp(drops, 0)
    assert mean == pytest.approx(drops.mean())
    assert interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert bound == pytest.approx(test.confidence_interval(0.9).high)
    assert drop_figures(drops, np.zeros(80), tried=100)[2] == pytest.approx(bound)  # a loss is a loss
    gain, _, lucky = drop_figures(-drops, np.zeros(80), tried=100)
    error = float(drops.std(ddof=1) / np.sqrt(80))
    assert lucky == pytest.approx(min(stats.t.ppf(0.95, 79) * error, gain + stats.t.ppf(0.9995, 79) * error))
    wider = drop_figures(drops, np.full(80, 1.0))
    assert wider[2] > bound
    assert drop_figures(np.zeros(80), np.zeros(80)) == (0.0, (0.0, 0.0), 0.0)
    assert drop_figures(np.ones(1), np.ones(1)) == (1.0, (-1.0, 1.0), 1.0)


@pytest.mark.parametrize(("count", "differ", "lost"), [(60, 0.15, 0.6), (125, 0.05, 0.7), (400, 0.03, 0.5)])
def test_the_bound_covers(count: int, differ: float, lost: float) -> None:
    """The true drop is above the bound in about 5 % of samples. 4000 samples: 7 % would be passed by chance with a
    probability below 1e-8 if the share were 5 %; the shares here are 3 to 6 %, as differences are rare and skewed."""
    generator = np.random.default_rng(1)
    above = 0
    for _ in range(4000):
        differs = (generator.random(count) < differ).astype(float)
        drops = differs * np.where(generator.random(count) < lost, 1.0, -1.0)
        above += drop_figures(drops, differs)[2] < differ * (2 * lost - 1)
    assert above / 4000 < 0.07


# -------------------------------------------------------------------------------------------------- the search


def test_figures_are_those_of_replay(surveyed: tuple[list[Problem], Survey]) -> None:
    made, found = surveyed
    tuned = found.choose(0.02)
    search, held = found.halves(0)
    assert sorted([*search.tolist(), *held.tolist()]) == list(range(120))
    table = tabulate(made)
    full = replay(table, policy.parse("sc:n=12"), repeats=10, seed=0)
    for one in tuned.candidates[::7]:
        alone = replay(table, one.rule, repeats=10, seed=0)
        for half, rows in ((one.search, search), (one.held_out, held)):
            assert half.accuracy == pytest.approx(alone.right[:, rows].mean())
            assert half.drop == pytest.approx(full.right[:, rows].mean() - alone.right[:, rows].mean())
            assert half.draws == pytest.approx(alone.draws[:, rows].mean())
            assert half.saved == pytest.approx(1 - half.draws / 12)


@pytest.mark.parametrize("limit", [0.0, 0.005, 0.02, 0.1, 1.0])
def test_the_chosen_is_feasible_and_none_cheaper_is(surveyed: tuple[list[Problem], Survey], limit: float) -> None:
    tuned = surveyed[1].choose(limit, seed=3)
    chosen = tuned.chosen.search
    assert tuned.found == (tuned.chosen.rule.name != tuned.full.rule.name)
    assert chosen.drop_bound <= limit + 1e-12
    better = [c for c in tuned.candidates if c.search.drop_bound <= limit and c.search.cost < chosen.cost]
    assert not better
    costs = [one.search.cost for one in tuned.frontier]
    shares = [one.search.accuracy for one in tuned.frontier]
    assert costs == sorted(set(costs))
    assert shares == sorted(set(shares))


def test_a_looser_limit_is_never_dearer(surveyed: tuple[list[Problem], Survey]) -> None:
    for seed in range(5):
        costs = [surveyed[1].choose(limit, seed).chosen.search.cost for limit in (0.0, 0.01, 0.03, 0.1, 1.0)]
        assert costs == sorted(costs, reverse=True)
        assert costs[-1] == 1.0  # all is allowed: a single draw


def test_the_held_out_half_has_no_part_in_the_choice() -> None:
    made = problems(120, 12)
    before = tune(made, max_drop=0.03, families=FEW, repeats=10, seed=5)
    _, held = survey(made, families=("one",), repeats=1).halves(5)
    generator = np.random.default_rng(0)
    for row in held.tolist():
        problem = made[row]
        answers = [draw.answer for draw in problem.draws]
        said = generator.permutation([*answers[1:], "7"]).tolist()
        draws = [Draw(text="", answer=answer) for answer in said]
        made[row] = problem.model_copy(update={"answer": str(generator.integers(1, 5)), "draws": draws})
    after = tune(made, max_drop=0.03, families=FEW, repeats=10, seed=5)
    assert after.chosen.rule == before.chosen.rule
    assert [one.search for one in after.candidates] == [one.search for one in before.candidates]
    assert [one.held_out for one in after.candidates] != [one.held_out for one in before.candidates]
    assert before.calibration is not None
    assert after.calibration is not None
    assert after.calibration.accuracy == before.calibration.accuracy


def test_the_same_seed_gives_the_same_and_another_another() -> None:
    made = problems(60, 8)
    first, again, other = (tune(made, families=FEW, repeats=5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.summary() != other.summary()


def test_the_calibration_is_the_isotonic_fit_of_the_search_half(surveyed: tuple[list[Problem], Survey]) -> None:
    made, found = surveyed
    tuned = found.choose(0.02)
    search, held = found.halves(0)
    alone = replay(tabulate(made), tuned.chosen.rule, repeats=10, seed=0)
    knots, values = isotonic(alone.confidence[:, search].ravel(), alone.right[:, search].ravel())
    assert tuned.calibration is not None
    assert tuned.calibration.confidence == pytest.approx(knots)
    assert tuned.calibration.accuracy == pytest.approx(values)
    mapped = replay(tabulate(made), tuned.rule, repeats=10, seed=0)
    assert mapped.confidence[:, search].mean() == pytest.approx(alone.right[:, search].mean())  # PAV keeps the mean
    assert np.array_equal(mapped.right, alone.right)
    assert abs(mapped.confidence[:, held].mean() - alone.right[:, held].mean()) <= tuned.calibration.ece_after + 1e-9


def test_a_policy_that_was_calibrated_before_is_calibrated_anew() -> None:
    made, plain = problems(2 * LEAST, 8), policy.parse("sc:n=3")
    old = replace(plain, calibration=((0.4, 0.8), (0.1, 0.2)))
    fresh, again = (tune(made, families=["one"], own=[rule], max_drop=1.0, repeats=5) for rule in (plain, old))
    assert [one.rule for one in fresh.candidates] == [one.rule for one in again.candidates]
    rules = [survey(made, families=["one"], own=[rule], repeats=5) for rule in (plain, old)]
    fits = [one._calibrate(one.rules[-1], *one.halves(0)) for one in rules]
    assert fits[0] is not None
    assert fits[0] == fits[1]


@pytest.mark.parametrize("spec", ["sc:n=2+usc", "modelswitch:models=2"])
def test_a_candidate_that_asks_or_has_several_arms_is_sent_to_replay(spec: str) -> None:
    with pytest.raises(InputError, match=r"`replay` runs this one"):
        survey(problems(2, 3), families=["one"], own=[policy.parse(spec)], repeats=1)


def test_weighted_votes_are_tried_where_their_field_is_recorded() -> None:
    made = problems(60, 8)
    generator = np.random.default_rng(0)
    rewarded = [
        p.model_copy(
            update={
                "draws": [
                    d.model_copy(update={"reward": float(d.answer == "1") + generator.normal(0, 0.2)}) for d in p.draws
                ]
            }
        )
        for p in made
    ]
    tuned = tune(rewarded, repeats=5)
    names = {one.rule.name for one in tuned.candidates}
    assert any("best-of-n:field=reward" in name for name in names)
    assert not any("logprob" in name for name in names)
    best = max(tuned.candidates, key=lambda one: one.held_out.accuracy)
    assert best.rule.needs == ("reward",)  # a reward that knows the answer beats counting
    assert best.held_out.drop < 0
    assert not any(one.rule.needs for one in tune(made, repeats=2).candidates)
    odd = [p.model_copy(update={"draws": [Draw(text="", answer="1", confidence="high")] * 8}) for p in made]
    assert not any(one.rule.needs for one in tune(odd, repeats=2).candidates)  # no number: not ours


def test_differing_draw_counts_are_respected() -> None:
    made = problems(60, 12)
    for problem in made[::3]:
        problem.draws = problem.draws[:6]
    tuned = tune(made, repeats=5)
    assert tuned.full.rule.name == "sc:n=12"
    assert max(one.rule.max for one in tuned.candidates[1:]) == 6
    assert tuned.full.search.draws < 12
    asked = tune(made, families=["sc"], own=[policy.parse("esc:window=3,max=20")], repeats=5)
    assert any("may ask for 20 draws, the record has 12" in note for note in asked.notes)


# ----------------------------------------------------------------------------------------------- what may happen


def test_costs_are_tokens_or_dollars_where_recorded() -> None:
    made = problems(60, 8, completion_tokens=100, prompt_tokens=20, cost=0.5)
    for cost, unit in (("draws", 1.0), ("tokens", 120.0), ("usd", 0.5)):
        tuned = tune(made, cost=cost, max_drop=0.1, families=FEW, repeats=5)  # type: ignore[arg-type]
        assert tuned.chosen.search.cost == pytest.approx(unit * tuned.chosen.search.draws)
    made[3].draws[2] = Draw(text="", answer="1")
    with pytest.raises(InputError, match="cost 'tokens': 1 of 60 problems have draws without 'completion_tokens'"):
        tune(made, cost="tokens", repeats=2)


def test_without_gold_answers_the_measure_is_agreement() -> None:
    tuned = tune(problems(80, 10, gold=False, reward=1.0), max_drop=0.05, repeats=5)
    assert tuned.measure == "agreement"
    assert tuned.full.search.accuracy == 1.0
    assert tuned.calibration is None
    assert tuned.policy_file()["calibration"] is None
    assert tuned.found
    assert tuned.chosen.search.drop == pytest.approx(1 - tuned.chosen.search.accuracy)
    assert not any(one.rule.needs for one in tuned.candidates)
    mixed = [*problems(50, 6), *problems(10, 6, gold=False)]
    assert any("10 problems without a gold answer" in note for note in tune(mixed, repeats=2).notes)


def test_too_few_problems_choose_the_full_vote_and_say_why() -> None:
    tuned = tune(problems(3, 8), max_drop=0.5, repeats=5)
    assert not tuned.found
    assert tuned.chosen == tuned.full
    assert (tuned.full.search.problems, tuned.full.held_out.problems) == (2, 1)
    assert any("the search half has 2 problems" in note for note in tuned.notes)
    for count in (0, 1):
        with pytest.raises(InputError, match=r"no problems|two halves"):
            tune(problems(count, 8))


def test_records_without_draws_or_with_one() -> None:
    with pytest.raises(InputError, match="0 of the 30 can be used"):
        tune(problems(30, 0))
    tuned = tune(problems(60, 1), repeats=2)
    assert not tuned.found
    assert tuned.chosen.rule.name == "sc:n=1"
    assert any("a single draw" in note for note in tuned.notes)
    some = [*problems(50, 6), *problems(5, 0)]
    assert any("5 problems without draws" in note for note in tune(some, families=FEW, repeats=2).notes)


def test_where_all_draws_are_right_one_is_enough_even_at_no_drop() -> None:
    made = problems(60, 8, right=9.0)
    tuned = tune(made, max_drop=0.0, repeats=3)
    assert tuned.found
    assert tuned.chosen.rule.name == "one"
    assert (tuned.chosen.held_out.drop, tuned.chosen.held_out.drop_bound) == (0.0, 0.0)
    assert any("never differed from the full vote on the 30 problems" in note for note in tuned.notes)


def test_a_record_that_a_rule_stopped_early_is_named() -> None:
    made = problems(60, 8)
    made[0] = made[0].model_copy(update={"collected_by": "asc:threshold=0.9,max=9", "verdict": Verdict(decided=True)})
    assert any("collected by asc" in note for note in tune(made, families=FEW, repeats=2).notes)


@dataclass(frozen=True)
class Coupled(SelfConsistency):
    coupled: bool = True


def test_bad_arguments_are_refused() -> None:
    made = problems(40, 4)
    for limit in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="max-drop"):
            tune(made, max_drop=limit)
    with pytest.raises(InputError, match="p: its problems share"):
        tune(made, own=[Rule("p", Coupled(4), Plurality())])


# ----------------------------------------------------------------------------------------------- the command line


def test_the_command_on_a_recorded_file(recorded: Any, tmp_path: Path) -> None:
    path = recorded("esc-last-letters-a.jsonl.gz")
    flags = ("--families", "asc,esc,sc", "--repeats", "10", "--out", "policy.json", "--report", "page.html")
    done = run(path, *flags, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["found"]
    assert printed["max_drop"] == 0.01
    assert printed["chosen"]["search"]["drop_bound"] <= 0.01
    assert printed["chosen"]["held_out"]["saved"] > 0.5
    assert printed["full_vote"]["policy"] == "sc:n=40"
    content = json.loads((tmp_path / "policy.json").read_text())
    assert content["policy"] == printed["policy"]
    assert content["measured"]["record"] == path.name
    assert content["measured"]["chosen"] == printed["chosen"]
    assert {"version", "seed", "repeats", "max_drop", "ece"} <= set(content["measured"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page-tradeoff.png", "page.html", "policy.json"]

    rule = policy.parse(f"@{tmp_path / 'policy.json'}")
    table = tabulate(list(record.read(path))[:60])
    raw, mapped = replay(table, policy.parse(printed["policy"]), repeats=5), replay(table, rule, repeats=5)
    knots = (content["calibration"]["confidence"], content["calibration"]["accuracy"])
    expected = np.where(raw.answered, np.interp(raw.confidence, *knots), raw.confidence)
    assert np.allclose(mapped.confidence, expected)
    assert np.array_equal(mapped.draws, raw.draws)

    plain = run(path, *flags[:-2], cwd=tmp_path)
    assert f"Chosen: {printed['policy']}" in plain.stdout
    assert json.loads((tmp_path / "policy.json").read_text()) == content


def test_the_command_says_when_nothing_is_found_and_when_it_cannot(tmp_path: Path) -> None:
    record.write(tmp_path / "few.jsonl", problems(6, 5))
    done = run("few.jsonl", "--out", "p.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recommended: sc:n=5, the full vote" in done.stdout
    assert "warning: the search half has 3 problems" in done.stderr
    assert policy.parse(f"@{tmp_path / 'p.json'}").name == "sc:n=5"
    failed = run("few.jsonl", "--cost", "time", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "error: cost 'time': expected one of draws, tokens, usd" in failed.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-drop", "-1"), "max-drop must lie between 0 and 100 points"),
        (("--families", "zzz"), "unknown family 'zzz'"),
        (("--policy", "asc:nope=1"), "no parameter 'nope'"),
        (("--extract", "("), "extract: "),
        (("--out", "few.jsonl/p.json"), "few.jsonl"),
    ],
)
def test_the_command_refuses(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    record.write(tmp_path / "few.jsonl", problems(6, 2))
    given = [str(tmp_path / flag) if flag.startswith("few") else flag for flag in flags]
    done = CliRunner().invoke(app, ["tune", str(tmp_path / "few.jsonl"), *given])
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)
    assert done.stdout == ""


def test_an_own_policy_is_tried_too(tmp_path: Path) -> None:
    record.write(tmp_path / "r.jsonl", problems(60, 9))
    flags = ["tune", str(tmp_path / "r.jsonl"), "--families", "sc", "--repeats", "3", "--json"]
    plain, more = (CliRunner().invoke(app, [*flags, *own]).stdout for own in ([], ["--policy", "esc:window=4,max=9"]))
    assert json.loads(more)["evaluated"] == json.loads(plain)["evaluated"] + 1


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    record.write(tmp_path / "r.jsonl", problems(400, 60))
    code = "import consilience.cli as c, consilience.cli.tune as t; t.PLAIN_EVERY = 0; c.main()"
    command = [sys.executable, "-c", code, "tune", "r.jsonl", "--out", "p.json", "--repeats", "100"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("policies replayed: 8/")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_the_page_is_complete_in_itself_and_escapes(tmp_path: Path, surveyed: tuple[list[Problem], Survey]) -> None:
    from consilience.pages import tune_page

    tuned = replace(surveyed[1].choose(0.02), notes=("<script>alert(1)</script>",))
    page = tune_page(Path("<b>.jsonl"), tuned, "consilience tune --api-key=abcdefghijkl")
    written = write_tradeoff(page, tmp_path / "deep" / "page.html")
    text = written[0].read_text()
    assert [path.name for path in written] == ["page.html", "page-tradeoff.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    assert "<script" not in text
    assert "<b>.jsonl" not in text
    assert "abcdefghijkl" not in text
    assert "http" not in text.replace("http-equiv", "")
    for one in tuned.frontier:
        assert f"<code>{one.rule.name}</code>" in text
    assert text.count('class="policy ') == 2 * len(tuned.candidates)
    for bare in (surveyed[1].choose(0.0), tune(problems(3, 1), repeats=1)):
        write_tradeoff(tune_page(Path("r.jsonl"), bare, ""), tmp_path / "bare.html")


def test_the_benchmark_agrees_with_tune_itself(tmp_path: Path) -> None:
    """Its table of the search is that of `tune`, split by split; without a record it says that it was left out."""
    path = tmp_path / "made.jsonl"
    record.write(path, problems(80, 6))
    script = Path(__file__).parents[1] / "benchmarks" / "tune_halves.py"
    command = [sys.executable, str(script)]
    assert "left out" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    command += [str(path), "--splits", "3", "--repeats", "4", "--json", "--picture", str(tmp_path / "p.png")]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    (data,) = printed["records"]
    found = survey(problems(80, 6), repeats=4)
    for row in data["limits"]:
        # the seed of the orders is 0 there, that of the halves runs
        results = [found.choose(row["limit"], seed) for seed in range(3)]
        drops = [one.chosen.held_out.drop for one in results]
        assert row["found"] == sum(one.found for one in results)
        assert row["drop"] == pytest.approx(np.mean(drops))
        assert row["above"] == sum(drop > row["limit"] for drop in drops)
        assert row["promised"] == pytest.approx(np.mean([one.chosen.search.drop_bound for one in results]))
    assert (tmp_path / "p.png").stat().st_size < 80_000
