"""Stage two and the student: batches, the objective, checkpoints, the student at test time."""
