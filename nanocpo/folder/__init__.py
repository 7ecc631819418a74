"""A folder of your own pictures: reading it (reading.py), judging it in the browser (annotate.py)
with the auxiliary's proposals (expert.py, proposals.py)."""
