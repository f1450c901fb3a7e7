"""What stage two and the student share: batches, the objective, checkpoints, the student at test time."""
