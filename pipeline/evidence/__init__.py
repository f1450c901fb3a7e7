"""Results of finished runs: tables, variants of a run, and whether their contrasts are the paper's."""
