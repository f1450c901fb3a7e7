"""The networks: the frozen teacher, the students, and the two modules that exist only in training."""
