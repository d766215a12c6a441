"""What `benchmarks/rounds.py` compares: one file per contestant, and what they share.

`work` and `said` import nothing of fedlora: plain PyTorch and PEFT, all that a contestant in an environment of its own
needs. `exported` writes the work that they read.
"""
