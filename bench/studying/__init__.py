"""The parts of `python -m bench.study`: what a study is, its runs, and what they show."""
