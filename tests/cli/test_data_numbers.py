"""Numbers that a job of `t2i data` cannot work with are refused before anything is read."""

import pytest


@pytest.mark.parametrize(
    ("job", "flag", "allowed"),
    [
        ("encode", "--batch-size", "1 or more"),
        ("score", "--batch-size", "1 or more"),
        ("index", "--processes", "1 or more"),
        ("dedup", "--workers", "1 or more"),
        ("inspect", "--samples", "1 to 1000"),
        ("inspect", "--seed", "0 or more"),
    ],
)
def test_numbers_out_of_range(t2i, job, flag, allowed):
    places = {"encode": ["out"], "dedup": ["none.tar", "kept.arrow"]}.get(job, ["none.tar"])
    for number in ("-1", "0"):
        if (flag, number) != ("--seed", "0"):
            said = t2i("data", job, *places, flag, number).sentence
            assert said == f"t2i data {job}: {flag} is {number}; allowed: {allowed}."
