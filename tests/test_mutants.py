"""The planted bugs of mutants.py still fit the code. Running them takes longer:
`python tests/mutants.py`."""
from mutants import MUTANTS, check


def test_every_mutant_fits_exactly_one_place():
    assert check() == []


def test_mutants_are_many_and_differ():
    assert len(MUTANTS) >= 60 and len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)
    assert all(m.old != m.new and m.why for m in MUTANTS)
