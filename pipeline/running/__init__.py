"""What every stage needs while it runs: engine, manifests, console, processes, the rows of the cache."""
