"""Data sets behind one interface (base.py), their names and splits (classes.py), prompts (prompts.py)."""
